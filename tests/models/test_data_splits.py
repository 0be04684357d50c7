"""A test set of another shape than the training images is found out before a run is trained, by its header alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from mrvae_models.cli import main
from mrvae_models.data import DataError, ImageDataset, VideoDataset, arrays, idx, load
from mrvae_models.data.checks import Header
from mrvae_models.preflight import check_splits
from test_data_files import pictures, write_idx, write_images
from test_data_videos import bair_example, write_clips, write_records


def check(path, **options) -> None:
    train, validation = (load(path, split, **options) for split in ("train", "validation"))
    check_splits(train, validation, str(path))


def refused(path, found: str, expected: str, **options) -> None:
    with pytest.raises(DataError, match=f"training images have shape {expected} and test images {found}; expected one"):
        check(path, **options)


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
def test_arrays(tmp_path, monkeypatch, write):
    path = tmp_path / "set.npz"
    write(path, x_train=pictures(20, 8, 8, 3), x_test=pictures(5, 8, 8))
    read, keys = arrays.read, []
    monkeypatch.setattr(arrays, "read", lambda path, key=None: keys.append(key) or read(path, key))
    refused(path, r"\(1, 8, 8\)", r"\(3, 8, 8\)")
    assert "x_test" not in keys
    write(path, x_train=pictures(20, 8, 8, 3), x_test=pictures(5, 3, 8, 8))
    check(path)  # channels first and last
    write(path, x_train=pictures(20, 3, 8, 3), x_test=pictures(5, 3, 9, 3))
    refused(path, r"\(3, 9, 3\)", r"\(3, 8, 3\)", layout="NCHW")
    write(path, x_train=pictures(20, 8, 8), x_test=pictures(5, 64))
    with pytest.raises(DataError, match=r"\[x_test\]: the array has shape \(5, 64\); expected images"):
        check(path)
    assert len(load(path)) == 18  # in Python it can be trained on
    write(path, images=pictures(20, 8, 8))
    check(path)
    assert load(path).test_shape is None


def test_clips_in_arrays(tmp_path):
    path = tmp_path / "set.npz"
    np.savez(path, train_images=pictures(6, 20, 8, 8), test_images=pictures(4, 5, 8, 8))  # frames before clips
    refused(path, r"\(4, 1, 8, 8\)", r"\(6, 1, 8, 8\)", layout="TNHW")
    refused(path, r"\(4, 1, 8, 8\)", r"\(5, 1, 8, 8\)", layout="TNHW", frames=5)
    refused(path, r"\(2, 1, 8, 8\)", r"\(3, 1, 8, 8\)", layout="TNHW", frames=3, frame_stride=2)
    check(path, layout="TNHW", frames=4)
    check(path, layout="TNHW", frames=2, frame_stride=3)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_files(tmp_path, monkeypatch, suffix):
    write_idx(tmp_path / f"train-images-idx3-ubyte{suffix}", pictures(20, 5, 4))
    test = write_idx(tmp_path / f"t10k-images-idx3-ubyte{suffix}", pictures(6, 5, 5))
    read = idx.read_idx
    monkeypatch.setattr(idx, "read_idx", lambda path: read(path) if path != test else pytest.fail("read"))
    refused(tmp_path, r"\(1, 5, 5\)", r"\(1, 5, 4\)")
    write_idx(test, pictures(6, 5, 4))
    check(tmp_path)


def test_folders_of_frames(tmp_path):
    write_clips(tmp_path / "train", pictures(6, 4, 6, 5))
    write_clips(tmp_path / "val", pictures(2, 4, 6, 5))
    write_clips(tmp_path / "test", pictures(3, 3, 6, 5))
    refused(tmp_path, r"\(3, 1, 6, 5\)", r"\(4, 1, 6, 5\)", frames=4)
    check(tmp_path, frames=3)


def test_records(tmp_path):
    write_records(tmp_path / "train/a.tfrecord", [bair_example(clip) for clip in pictures(6, 4, 8, 8, 3)])
    write_records(tmp_path / "test/a.tfrecord", [bair_example(clip) for clip in pictures(2, 4, 9, 9, 3)])
    refused(tmp_path, r"\(4, 3, 9, 9\)", r"\(4, 3, 8, 8\)")
    write_records(tmp_path / "test/a.tfrecord", [])
    check(tmp_path)
    write_records(tmp_path / "test/a.tfrecord", [bair_example(clip) for clip in pictures(2, 7, 8, 8, 3)])
    refused(tmp_path, r"\(7, 3, 8, 8\)", r"\(4, 3, 8, 8\)")
    check(tmp_path, frames=4)


def test_data_sets_of_own_tensors():
    data = ImageDataset(torch.rand(4, 1, 8, 8))
    check_splits(data, data, "mine")
    data.test = Header((3, 9, 8), "mine")
    with pytest.raises(DataError, match=r"test images \(1, 9, 8\)"):
        check_splits(data, data, "mine")
    assert VideoDataset(torch.rand(4, 5, 1, 8, 8)).test_shape is None


def test_no_run_is_trained_whose_curve_would_fail(tmp_path, capsys):
    np.savez(tmp_path / "set.npz", x_train=pictures(20, 8, 8), x_test=pictures(5, 9, 9))
    write_images(tmp_path / "images/train", pictures(20, 8, 8))
    write_images(tmp_path / "images/test", pictures(20, 8, 9))
    for data, message in (("set.npz", "test images (1, 9, 9)"), ("images", "has 8x8; expected one size for all")):
        out = tmp_path / "run"
        assert main(["train", "--data", str(tmp_path / data), "--out", str(out), "--epochs", "1"]) == 1
        assert message in capsys.readouterr().err and not out.exists()


@pytest.mark.parametrize("names", [("val", "validation"), ("test", "testing")])
def test_two_folders_of_one_split_are_refused(tmp_path, names):
    for name in ("train", *names):
        write_images(tmp_path / name, pictures(3, 4, 4))
    with pytest.raises(DataError, match=rf"{names[1]}.* are both the (validation|test) set; expected one"):
        load(tmp_path, "train")

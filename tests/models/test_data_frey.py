"""Frey Face in its published form, split by blocks of frames."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from mrvae_models.data import DataError, load
from scipy.io import savemat
from test_data_files import pictures


def write(path, n: int = 1965) -> np.ndarray:
    """Frames whose first two pixels number them."""
    images = pictures(n, 28, 20)
    images[:, 0, 0], images[:, 0, 1] = np.arange(n) // 256, np.arange(n) % 256
    savemat(path, {"ff": images.reshape(n, -1).T})
    return images


def numbers(data) -> np.ndarray:
    first = (data.examples[:, 0, 0, :2] * 255).round().long().numpy()
    return np.sort(first[:, 0] * 256 + first[:, 1])


def test_frey_face_by_name_folder_and_file(root):
    (root / "frey-face").mkdir()
    images = write(root / "frey-face/frey_rawface.mat")
    for source in ("frey-face", root / "frey-face", root / "frey-face/frey_rawface.mat"):
        whole = load(source, "all")
        assert whole.input_shape == (1, 28, 20)
        assert torch.equal(whole.examples[:, 0], torch.from_numpy(images).float() / 255)
    parts = {split: numbers(load("frey-face", split)) for split in ("train", "validation", "test")}
    assert np.array_equal(np.sort(np.concatenate(list(parts.values()))), np.arange(1965))
    blocks = {split: set(part * 20 // 1965) for split, part in parts.items()}
    assert [len(blocks[split]) for split in parts] == [16, 2, 2] and len(set.union(*blocks.values())) == 20
    for split in ("validation", "test"):
        part = parts[split]
        assert len(part) in (196, 197)
        beside = [n for n in part if n - 1 in parts["train"] or n + 1 in parts["train"]]
        assert len(beside) <= 4  # the ends of two blocks
    assert not np.array_equal(parts["test"], numbers(load("frey-face", "test", seed=1)))


def test_frey_face_files_that_are_wrong(tmp_path):
    path = tmp_path / "frey_rawface.mat"
    for content, message in [
        ({"ff": np.zeros((561, 9), np.uint8)}, r"ff is uint8, shape \(561, 9\); expected uint8, \(560, N\)"),
        ({"ff": np.zeros((560, 9))}, "ff is float64"),
        ({"faces": np.zeros((560, 9), np.uint8)}, "holds faces; expected ff"),
        ({"ff": pictures(560, 2)}, "its 2 examples are from 2 sources|2 examples: too few"),
    ]:
        savemat(path, content)
        with pytest.raises(DataError, match=message):
            load(path)
    write(path, 40)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="frey_rawface.mat: cannot be read, damaged or cut short"):
        load(path)

"""Public sets by name: what is missing is said, what is fetched or changed is noticed, what is there is described."""

from __future__ import annotations

import json
import sys
import types

import numpy as np
import pytest
from mrvae_models.cli import main
from mrvae_models.data import DataError, load, public
from mrvae_models.data.hub import SPRITE_COLUMNS
from published import (
    agree,
    by_bytes,
    encoded,
    grid,
    write_celeba,
    write_dsprites,
    write_svhn,
)
from scipy.io import savemat
from test_data_files import Rows, hub, pictures, write_idx

# Elsewhere: fetched, compared with the first load, described


def test_what_is_missing_is_said_with_files_folders_and_the_line_to_run(root, monkeypatch):
    for name, entry in public.PUBLIC.items():
        if not entry.files:
            continue
        with pytest.raises(DataError) as error:
            load(name)
        message = str(error.value)
        assert str(root / entry.folders[0]) in message and entry.files in message
        if entry.repository is not None:
            repository = entry.repository.replace(":", "', '")
            assert f"datasets.load_dataset('{repository}')" in message and "no route to host" in message
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="cifar10: not found in .*; put there data_batch_1.*pip install datasets"):
        load("cifar10")


def test_sets_fetched_from_the_hub(root, monkeypatch, tmp_path):
    images = pictures(20, 28, 28)
    files = encoded(tmp_path, images)
    hub(monkeypatch, {"train": Rows(files, list(range(20))), "test": Rows(files[:6], list(range(6)))})
    agree(load("mnist", "test"), images[:6, None], np.arange(6))
    faces = list(write_celeba(tmp_path / "faces", False).values())
    files = encoded(tmp_path, faces)
    hub(monkeypatch, {word: Rows(files, list(range(12))) for word in ("train", "valid", "test")})
    write = load(tmp_path / "faces", "test")
    assert set(by_bytes(write.examples.numpy())) < set(by_bytes(load("celeba", "test").examples.numpy()))


class SpriteRows(Rows):
    def __init__(self, files, classes):
        super().__init__(files, None)
        self.features = {"pixels": self.features["pixels"], **dict.fromkeys(SPRITE_COLUMNS, types.SimpleNamespace())}
        self.classes = classes

    def __getitem__(self, key):
        if key in SPRITE_COLUMNS:
            return self.classes[:, SPRITE_COLUMNS.index(key)].tolist()
        return super().__getitem__(key)


@pytest.mark.parametrize("white", [1, 255])
def test_dsprites_from_the_hub_in_the_order_of_the_grid(root, monkeypatch, tmp_path, white):
    images, classes = grid((2, 2, 2, 2, 2))
    order = np.random.default_rng(0).permutation(len(images))
    rows = SpriteRows(encoded(tmp_path, images[order] * np.uint8(white)), classes[order])
    hub(monkeypatch, {"train": rows})
    whole = load("dsprites", "all")
    assert np.array_equal(whole.examples[:, 0].numpy(), images) and whole.factors.tolist() == classes.tolist()


def test_a_later_load_is_held_to_the_first(root):
    (root / "svhn").mkdir()
    write_svhn(root / "svhn/train_32x32.mat", 20, 0)
    write_svhn(root / "svhn/test_32x32.mat", 20, 1)
    first = load("svhn", "test")
    kept = json.loads((root / "checksums.json").read_text())
    key = "svhn [test] 32x32x3 from svhn"
    assert list(kept) == [key] and len(kept[key]["sha256"]) == 64
    assert load("svhn", "test").examples.equal(first.examples)
    write_svhn(root / "svhn/test_32x32.mat", 20, 2)
    with pytest.raises(DataError, match=r"test_32x32.mat: its arrays have SHA-256 .*have changed; restore.*\[test\]"):
        load("svhn", "test")
    images = pictures(20, 32, 32, 3, seed=1)
    savemat(root / "svhn/test_32x32.mat", {"X": images.transpose(1, 2, 3, 0), "y": np.full((20, 1), 3, np.uint8)})
    with pytest.raises(DataError, match="have changed"):  # the labels alone
        load("svhn", "test")
    (root / "checksums.json").write_text("{")
    with pytest.raises(DataError, match="checksums.json: cannot be read .*remove it"):
        load("svhn", "test")


def test_mrvae_data_lists_the_sets(root, capsys):
    assert main(["data"]) == 0
    text = capsys.readouterr().out
    assert str(root) in text
    for name, entry in public.PUBLIC.items():
        assert f"\n{name}\n" in text and entry.about in text and entry.source in text


def test_mrvae_data_describes_a_set(root, capsys):
    (root / "mnist").mkdir()
    for word, n in (("train", 20), ("t10k", 6)):
        write_idx(root / "mnist" / f"{word}-images-idx3-ubyte.gz", pictures(n, 28, 28, seed=n))
    assert main(["data", "mnist"]) == 0
    text = capsys.readouterr().out
    assert f"files: {root / 'mnist'}" in text and "train: 20 images of 28 x 28, 0 to 255, no labels" in text
    assert text.count("NOT as published") == 2 and text.count("SHA-256") == 2 and "as at the first load" in text
    kept = json.loads((root / "checksums.json").read_text())
    assert all(entry["sha256"] in text for entry in kept.values()) and len(kept) == 2
    write_dsprites(root / "dsprites" / public.dsprites.FILE, *grid())
    assert main(["data", "dsprites"]) == 0
    text = capsys.readouterr().out
    assert "all: 216 images of 64 x 64" in text and "shape 3, scale 2, orientation 4" in text
    assert main(["data", "mnits"]) == 1
    assert "'mnits' is no public set; expected one of mnist" in capsys.readouterr().err
    assert main(["data", "svhn"]) == 1
    assert "train_32x32.mat, test_32x32.mat" in capsys.readouterr().err

"""IDX files, folders of images, and public sets. The tests make the files; what is wrong with one must be named."""

from __future__ import annotations

import gzip
import struct
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from mrvae_models.data import DataError, load
from mrvae_models.data.idx import read_idx
from PIL import Image


def pictures(n: int, *shape: int, seed: int = 0) -> np.ndarray:
    return np.random.RandomState(seed).randint(0, 256, (n, *shape)).astype(np.uint8)


def write_idx(path: Path, array: np.ndarray) -> Path:
    header = struct.pack(">BBBB", 0, 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    content = header + array.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def write_images(folder: Path, images: np.ndarray, suffix: str = ".png") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i:03}{suffix}")


def multiset(images: torch.Tensor) -> list[bytes]:
    return sorted(image.numpy().tobytes() for image in images)


# IDX


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_folder_with_the_names_of_mnist(tmp_path, suffix):
    images = {"train": pictures(20, 5, 4), "t10k": pictures(6, 5, 4, seed=1)}
    for word, array in images.items():
        write_idx(tmp_path / f"{word}-images-idx3-ubyte{suffix}", array)
        write_idx(tmp_path / f"{word}-labels-idx1-ubyte{suffix}", np.arange(len(array), dtype=np.uint8))
    train, validation, test = (load(tmp_path, split) for split in ("train", "validation", "test"))
    assert [len(part) for part in (train, validation, test)] == [18, 2, 6] and train.input_shape == (1, 5, 4)
    for row, label in zip(test.examples, test.labels, strict=True):
        torch.testing.assert_close(row[0], torch.from_numpy(images["t10k"][label]).float() / 255)


def test_idx_folder_with_a_file_and_its_gz_beside_it(tmp_path):
    for suffix in ("", ".gz"):
        write_idx(tmp_path / f"train-images.idx3-ubyte{suffix}", pictures(20, 5, 4))
    assert len(load(tmp_path, "train")) == 16


def test_idx_file_alone_and_one_decompressed_under_its_old_name(tmp_path):
    path = write_idx(tmp_path / "any-idx3-ubyte", pictures(10, 3, 3))
    assert len(load(path, "train")) == 8
    renamed = path.rename(tmp_path / "any-idx3-ubyte.gz")
    assert read_idx(renamed).shape == (10, 3, 3)


def test_idx_files_that_are_damaged(tmp_path):
    whole = write_idx(tmp_path / "train-images-idx3-ubyte", pictures(20, 5, 4)).read_bytes()
    packed = gzip.compress(whole)
    huge = struct.pack(">BBBBIII", 0, 0, 8, 3, 2**32 - 1, 2**32 - 1, 2**32 - 1)
    for content, message in [
        (packed[:-30], "gzip.*cut short"),
        (packed[:60] + b"\xff\xff\xff" + packed[63:], "gzip.*damaged"),
        (whole[:-1], "needs 400 bytes, found 399"),
        (whole + b"\0", "needs 400 bytes, found more"),
        (whole[:9], "announces"),
        (b"", "begins with b''"),
        (b"\x89PNG" + whole, r"begins with b'\\x89PNG'"),
        (whole[:2] + b"\x0d" + whole[3:], "type 0x0d"),
        (huge, "more than the file can hold"),
        (gzip.compress(huge), "more than the file can hold"),
        (whole[:3] + b"\x01" + struct.pack(">I", 412 - 8) + b"\1" * 404, "1 axes.*label file"),
    ]:
        (tmp_path / "train-images-idx3-ubyte").write_bytes(content)
        with pytest.raises(DataError, match=f"train-images-idx3-ubyte: .*{message}"):
            load(tmp_path, "train")


def test_idx_folder_with_two_files_for_a_split(tmp_path):
    for word in ("letters", "digits"):
        write_idx(tmp_path / f"emnist-{word}-train-images-idx3-ubyte", pictures(20, 5, 4))
    with pytest.raises(DataError, match="emnist-digits-train.*emnist-letters-train.*both train"):
        load(tmp_path)


def test_names_that_only_look_like_idx(tmp_path):
    images = pictures(10, 6, 5)
    write_images(tmp_path / "scans", images)
    for i, path in enumerate(sorted((tmp_path / "scans").iterdir())):
        path.rename(path.with_name(f"{'idx' if i < 5 else 'scan_idx'}{i}.png"))
    assert multiset(load(tmp_path / "scans", "all").examples[:, 0]) == multiset(torch.from_numpy(images).float() / 255)
    for path in (tmp_path / "train_idx1.npz", tmp_path / "ubyte.npy"):
        np.savez(path, images=images) if path.suffix == ".npz" else np.save(path, images)
        assert load(path, "all").input_shape == (1, 6, 5)
    (tmp_path / "notes_idx1.txt.old").write_text("no images")
    with pytest.raises(DataError, match="notes_idx1.txt.old: this kind of file is not known"):
        load(tmp_path / "notes_idx1.txt.old")
    (tmp_path / "scans/icon_idx1.ico").write_bytes(b"\0\0\1\0")
    assert len(load(tmp_path / "scans", "all")) == 10


@pytest.mark.parametrize("packed", [False, True])
def test_idx_files_under_other_endings_are_known_by_their_first_bytes(tmp_path, packed):
    path = write_idx(tmp_path / f"train-images-idx3-ubyte{'.gz' * packed}", pictures(10, 3, 3))
    path = path.rename(tmp_path / "train-images-idx3-ubyte.bin")
    (tmp_path / "._train-images-idx3-ubyte").write_bytes(b"what a Mac adds")
    assert len(load(path, "all")) == len(load(tmp_path)) + len(load(tmp_path, "test")) + 1 == 10


# Folders of images


def test_image_folder_with_labels_from_sub_folders(tmp_path):
    for i, name in enumerate(["cat", "dog"]):
        write_images(tmp_path / name, pictures(10, 6, 5, 3, seed=i))
    data = load(tmp_path, "train")
    assert data.input_shape == (3, 6, 5) and len(data) == 16 and set(data.labels.tolist()) == {0, 1}
    originals = torch.from_numpy(pictures(10, 6, 5, 3, seed=1)).permute(0, 3, 1, 2).float() / 255
    assert set(multiset(data.examples[data.labels == 1])) < set(multiset(originals))


def test_image_folder_with_splits(tmp_path):
    for name, n in (("train", 10), ("val", 3), ("test", 4)):
        write_images(tmp_path / name, pictures(n, 6, 5), ".bmp")
    parts = [load(tmp_path, split) for split in ("train", "validation", "test")]
    assert [len(part) for part in parts] == [10, 3, 4]
    assert parts[0].input_shape == (1, 6, 5) and parts[0].labels is None


def test_image_sizes_that_differ_need_resize(tmp_path):
    write_images(tmp_path, pictures(5, 6, 5))
    Image.fromarray(pictures(1, 9, 8, 3)[0]).save(tmp_path / "other.png")
    with pytest.raises(DataError, match=r"other.png: 8x9 pixels, and .*000.png has 5x6.*resize"):
        load(tmp_path)
    data = load(tmp_path, resize=(8, 4))
    assert data.input_shape == (3, 8, 4)  # one image has colour, so all have
    assert load(tmp_path, resize=7).input_shape == (3, 7, 7)


def test_image_folder_errors(tmp_path):
    with pytest.raises(DataError, match="no images; expected files ending in"):
        load(tmp_path)
    write_images(tmp_path, pictures(5, 60, 50))
    path = tmp_path / "002.png"
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(DataError, match="002.png: cannot be decoded"):
        load(tmp_path)
    path.write_text("no image")
    with pytest.raises(DataError, match="002.png: cannot be decoded"):
        load(tmp_path)
    Image.fromarray(pictures(1, 60, 50)[0].astype(np.uint16)).save(path)
    with pytest.raises(DataError, match="002.png: pixels of mode I;16.*8 bits"):
        load(tmp_path)


# Public sets by name


def hub(monkeypatch, result):
    def load_dataset(name, config):
        if isinstance(result, Exception):
            raise result
        return result

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))


class ImageFeature:
    def __init__(self, decode=True):
        self.decode = decode


ImageFeature.__name__ = "Image"
ClassLabel = type("ClassLabel", (), {})


class Rows:
    """The few methods of a Hugging Face dataset that loading needs."""

    def __init__(self, files, labels):
        self.files, self.labels = files, labels
        self.features = {"pixels": ImageFeature(), "kind": ClassLabel()}

    def __len__(self):
        return len(self.files)

    def select_columns(self, columns):
        assert columns == ["pixels"]
        return self

    def cast_column(self, column, feature):
        assert column == "pixels" and not feature.decode
        return self

    def __getitem__(self, key):
        return self.labels if key == "kind" else {"pixels": {"bytes": self.files[key], "path": None}}


def test_public_set_by_name(monkeypatch, tmp_path):
    write_images(tmp_path, pictures(20, 5, 4))
    files = [path.read_bytes() for path in sorted(tmp_path.iterdir())]
    hub(monkeypatch, {"train": Rows(files, list(range(20))), "test": Rows(files[:3], [0, 1, 2]), "extra": None})
    train, test = load("hf:some/set"), load("hf:some/set", "test")
    assert (len(train), len(test), train.input_shape) == (18, 3, (1, 5, 4))
    expected = torch.from_numpy(pictures(20, 5, 4)[train.labels[0]]).float() / 255
    torch.testing.assert_close(train.examples[0, 0], expected)


def test_public_set_without_the_package_or_the_network(monkeypatch):
    hub(monkeypatch, ConnectionError("no route to host"))
    with pytest.raises(DataError, match="hf:some/set could not be loaded .ConnectionError: no route.*HF_HOME"):
        load("hf:some/set")
    hub(monkeypatch, {"unsupervised": None})
    with pytest.raises(DataError, match="its splits are unsupervised"):
        load("hf:some/set")
    hub(monkeypatch, {"train": types.SimpleNamespace(features={"text": ""})})
    with pytest.raises(DataError, match=r"hf:some/set \[train\]: its columns are .*expected one of type Image"):
        load("hf:some/set")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="pip install datasets"):
        load("hf:some/set")

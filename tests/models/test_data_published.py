"""MNIST, Omniglot, SVHN and CelebA in the forms in which they are published, each small file made here."""

from __future__ import annotations

import sys
import zipfile

import numpy as np
import pytest
import torch
from mrvae_models.data import DataError, amat, load
from mrvae_models.data.archive import Archive
from PIL import Image
from published import (
    agree,
    by_bytes,
    write_amat,
    write_celeba,
    write_svhn,
)
from scipy.io import savemat
from test_data_files import pictures, write_idx

# MNIST


def test_mnist_by_name_in_the_folders_of_this_package_and_of_torchvision(root):
    for folder in ("mnist", "MNIST/raw"):
        (root / folder).mkdir(parents=True)
        for word, n in (("train", 20), ("t10k", 6)):
            write_idx(root / folder / f"{word}-images-idx3-ubyte", pictures(n, 28, 28, seed=n))
            write_idx(root / folder / f"{word}-labels-idx1-ubyte", np.arange(n, dtype=np.uint8))
        assert len(load("mnist")) == 18
        agree(load("mnist", "test"), pictures(6, 28, 28, seed=6)[:, None], np.arange(6))
        for file in (root / folder).iterdir():
            file.unlink()
        (root / "checksums.json").unlink()


def test_binarized_mnist_by_name_by_folder_and_by_file(root):
    made = write_amat(root / "binarized-mnist", {"train": 7, "valid": 5, "test": 6})
    for source in ("binarized-mnist", root / "binarized-mnist"):
        for split, word in (("train", "train"), ("validation", "valid"), ("test", "test")):
            agree(load(source, split), made[word])
    whole = load(root / "binarized-mnist" / "binarized_mnist_test.amat", "all")
    assert np.array_equal(whole.examples[:, 0].numpy(), made["test"])  # in the order of the file


def test_binarized_mnist_that_is_damaged(root):
    write_amat(root / "binarized-mnist", {"train": 5, "valid": 5, "test": 5})
    path = root / "binarized-mnist" / "binarized_mnist_train.amat"
    text = path.read_bytes()
    line = 2 * 784
    for content, message in [
        (text[: 3 * line + 101], "line 4 holds 51 values; expected 784"),
        (text[:line] + b"0 " + text[line:], "line 2 holds 785 values"),
        (text[:line] + b"2" + text[line + 1 :], "line 2 holds .*expected 0 and 1"),
        (text[: line + 1] + b"0" + text[line + 2 :], "line 2 holds .*expected 0 and 1"),
        (text.replace(b"0", b"0.0"), "line 1 holds .*expected 0 and 1"),
        (b"", "line 1 holds 0 values"),
    ]:
        path.write_bytes(content)
        with pytest.raises(DataError, match=f"binarized_mnist_train.amat: {message}"):
            amat.read_amat(path)
    path.write_bytes(text.replace(b"\n", b" \r\n") + b"\n")
    assert amat.read_amat(path).shape == (5, 28, 28)
    path.unlink()
    with pytest.raises(DataError, match="binarized_mnist_train.amat not there; expected"):
        load(root / "binarized-mnist")


# Omniglot


def test_omniglot_of_chardata(root):
    grey = np.random.default_rng(0).random((30, 28, 28))
    columns = {"data": grey[:22], "testdata": grey[22:]}
    targets = {"target": np.eye(50)[np.arange(22)].T, "testtarget": np.eye(50)[np.arange(8)].T}
    (root / "omniglot").mkdir()
    # as published: an image is a column, column by column
    savemat(root / "omniglot/chardata.mat",
            {**{key: images.transpose(2, 1, 0).reshape(784, -1, order="C") for key, images in columns.items()},
             **targets})  # fmt: skip
    for source in ("omniglot", root / "omniglot", root / "omniglot/chardata.mat"):
        agree(load(source, "test"), columns["testdata"][:, None].astype(np.float32), np.arange(8))
        assert len(load(source)) == 20 and len(load(source, "validation")) == 2
    first, again = load("omniglot", "test", "fixed"), load("omniglot", "test", "fixed")
    assert first.examples.equal(again.examples) and set(first.examples.unique().tolist()) == {0.0, 1.0}
    assert load("omniglot", "train", "dynamic").binarize == "dynamic"
    with pytest.raises(DataError, match="resize=32 is for image files"):
        load("omniglot", resize=32)


def test_omniglot_chardata_that_is_wrong(root):
    path = root / "chardata.mat"
    grey = np.random.default_rng(0).random((784, 9))
    savemat(path, {"data": grey})
    with pytest.raises(DataError, match="chardata.mat: holds data; expected testdata"):
        load(path, "test")
    savemat(path, {"data": grey[:700], "testdata": grey})
    with pytest.raises(DataError, match=r"chardata.mat \[data\]: float64, shape \(700, 9\); expected .*\(784, N\)"):
        load(path)
    whole = path.read_bytes()
    for content in (whole[:500], whole[:60], b"", b"no MATLAB file" * 20):
        path.write_bytes(content)
        with pytest.raises(DataError, match="chardata.mat: cannot be read, damaged or cut short"):
            load(path)


def test_mat_files_without_scipy(root, monkeypatch):
    savemat(root / "chardata.mat", {"data": np.eye(784), "testdata": np.eye(784)})
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(DataError, match="chardata.mat: .mat files need the package scipy: run `pip install scipy`"):
        load(root / "chardata.mat")


@pytest.mark.parametrize("zipped", [False, True])
def test_omniglot_of_the_original_images(root, zipped):
    inks = {"images_background": 12, "images_evaluation": 6}
    expected = {}
    for folder, n in inks.items():
        black = np.random.default_rng(n).random((n, 105, 105)) < 0.3
        expected[folder] = black
        for i, image in enumerate(black):
            file = root / "omniglot" / folder / f"Alphabet_{i % 2}" / f"character0{i % 3}" / f"{i:04}_01.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(~image).save(file)  # mode 1: ink black, paper white
        if zipped:
            with zipfile.ZipFile(root / "omniglot" / f"{folder}.zip", "w") as archive:
                for file in sorted((root / "omniglot" / folder).rglob("*.png")):
                    archive.write(file, file.relative_to(root / "omniglot"))
                    file.unlink()
            for path in sorted((root / "omniglot" / folder).rglob("*"), reverse=True):
                path.rmdir()
            (root / "omniglot" / folder).rmdir()
    test = load("omniglot", "test")
    assert test.input_shape == (1, 28, 28) and len(test) == 6 and len(load("omniglot")) == 11
    assert sorted(test.labels.tolist()) == [6, 7, 8, 9, 10, 11]  # after those of the six characters to train on
    train = torch.cat([load("omniglot", split).labels for split in ("train", "validation")])
    assert sorted(train.tolist()) == sorted([*range(6), *range(6)])
    labels = 6 + kept_labels(6)
    by_label = dict(zip(labels.tolist(), expected["images_evaluation"], strict=True))
    for x, label in zip(test.examples, test.labels.tolist(), strict=True):
        ink = Image.fromarray(np.uint8(255) * by_label[label]).resize((28, 28), Image.Resampling.BICUBIC)
        torch.testing.assert_close(x[0] * 255, torch.from_numpy(np.array(ink, np.float32)), atol=1, rtol=0)
    kept = load("omniglot", "test", resize=105)
    agree(kept, np.uint8(255) * expected["images_evaluation"][:, None], labels)


def test_what_a_mac_or_a_notebook_adds_to_an_archive_is_left_out(tmp_path):
    stray = ("__MACOSX/a/1.png", "a/.ipynb_checkpoints/1.png", "a/._1.png", ".Trash/1.png")
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as packed:
        for name in (*stray, "a/1.png", "a/2.PNG", "a/notes.txt"):
            packed.writestr(name, b"")
            (tmp_path / ".hidden/set" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / ".hidden/set" / name).touch()
    for path in (tmp_path / "set.zip", tmp_path / ".hidden/set"):
        assert [str(file) for file in Archive(path).files] == ["a/1.png", "a/2.PNG"]


def kept_labels(n: int) -> np.ndarray:
    """Characters in the order of their folders, of images made in turn for 2 alphabets and 3 characters."""
    folders = [(i % 2, i % 3) for i in range(n)]
    return np.array([sorted(set(folders)).index(folder) for folder in folders])


def test_omniglot_with_a_part_missing(root):
    (root / "omniglot/images_background").mkdir(parents=True)
    with pytest.raises(DataError, match="images_evaluation not there; expected images_background and"):
        load("omniglot")
    (root / "omniglot/images_evaluation.zip").write_bytes(b"PK\x03\x04 cut")
    with pytest.raises(DataError, match="images_evaluation.zip: cannot be read, damaged or cut short"):
        load("omniglot", "test")
    with pytest.raises(DataError, match="images_background: no images"):
        load("omniglot")


# SVHN


def test_svhn_by_name_by_folder_by_file_and_with_the_extra_digits(root):
    made = {word: write_svhn(root / "svhn" / f"{word}_32x32.mat", n, n) for word, n in
            (("train", 20), ("test", 12), ("extra", 30))}  # fmt: skip
    for source in ("svhn", root / "svhn"):
        assert len(load(source)) == 18
        agree(load(source, "test"), *made["test"])
    agree(load(root / "svhn/test_32x32.mat", "all"), *made["test"])
    extra = load("svhn-extra")
    assert len(extra) == 45 and extra.input_shape == (3, 32, 32)
    both = torch.cat([load("svhn-extra", split).examples for split in ("train", "validation")]).numpy()
    assert by_bytes(both) == by_bytes(np.concatenate([made["train"][0], made["extra"][0]]).astype(np.float32) / 255)
    (root / "svhn/extra_32x32.mat").unlink()
    with pytest.raises(DataError, match="extra_32x32.mat not there"):
        load("svhn-extra")


def test_svhn_files_that_are_wrong(root):
    images, y = pictures(5, 32, 32, 3).transpose(1, 2, 3, 0), np.arange(1, 6)[:, None]
    path = root / "train_32x32.mat"
    for content, message in [
        ({"X": images}, "holds X; expected X, y"),
        ({"X": images.transpose(3, 0, 1, 2), "y": y}, r"X is uint8, shape \(5, 32, 32, 3\); expected uint8, \(32, 32"),
        ({"X": images / 255, "y": y}, "X is float64"),
        ({"X": images, "y": y[:4]}, "y has 4 labels for 5 images"),
        ({"X": images, "y": y - 1}, "y has 5 labels .*values 0, 1, 2, 3, 4; expected .*1 to 10"),
    ]:
        savemat(path, content)
        with pytest.raises(DataError, match=f"train_32x32.mat: {message}"):
            load(path)
    with pytest.raises(DataError, match="test_32x32.mat not there"):
        load(root)


# CelebA


@pytest.mark.parametrize("zipped", [False, True])
def test_celeba_is_cropped_resized_and_parted(root, zipped):
    faces = list(write_celeba(root / "celeba", zipped).values())
    for source in ("celeba", root / "celeba"):
        for part, split in enumerate(("train", "validation", "test")):
            data = load(source, split)
            assert data.input_shape == (3, 64, 64)
            crops = [Image.fromarray(face[35:183, 15:163]).resize((64, 64), Image.Resampling.BILINEAR)
                     for face in faces[4 * part : 4 * part + 4]]  # fmt: skip
            agree(data, np.stack([np.asarray(crop).transpose(2, 0, 1) for crop in crops]))
    assert load("celeba", resize=32).input_shape == (3, 32, 32)
    kept = load("celeba", resize=148).examples
    assert kept[0, 0, 0, 0] == np.float32(35) / 255 and kept[0, 1, 0, 0] == np.float32(15) / 255


def test_celeba_that_is_wrong(root):
    write_celeba(root / "celeba", False)
    partition = root / "celeba/list_eval_partition.txt"
    text = partition.read_text()
    for content, message in [
        (text.replace("000003.jpg 0", "000003.jpg 3"), "line 3 is '000003.jpg 3'; expected an image's name and 0, 1"),
        (text.replace("000003.jpg 0", "000003.jpg"), "line 3 is '000003.jpg'"),
        ("\n".join(text.split("\n")[:8]), "names no image of test"),
        (text.replace("000003.jpg 0", "000013.jpg 0"), "000013.jpg and 0 more images of train are not there"),
    ]:
        partition.write_text(content)
        with pytest.raises(DataError, match=message):
            load("celeba")
    partition.write_text(text)
    Image.fromarray(pictures(1, 64, 64, 3)[0]).save(root / "celeba/img_align_celeba/000002.jpg")
    with pytest.raises(DataError, match="000002.jpg: 64x64 pixels; expected at least 148x148.*original images"):
        load("celeba")
    (root / "celeba/img_align_celeba/000002.jpg").write_bytes(b"cut")
    with pytest.raises(DataError, match="000002.jpg: cannot be decoded"):
        load("celeba")
    partition.unlink()
    with pytest.raises(DataError, match="list_eval_partition.txt not there"):
        load(root / "celeba")

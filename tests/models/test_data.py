"""The embedded digits, arrays, and options of `load`. What is wrong with a file must be named."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from mrvae_models.data import DataError, ImageDataset, load


def pictures(n: int, *shape: int, seed: int = 0) -> np.ndarray:
    return np.random.RandomState(seed).randint(0, 256, (n, *shape)).astype(np.uint8)


def multiset(images: torch.Tensor) -> list[bytes]:
    return sorted(image.numpy().tobytes() for image in images)


# The embedded digits


def test_digits_have_three_disjoint_splits():
    train, validation, test = (load("digits", split) for split in ("train", "validation", "test"))
    assert [len(part) for part in (train, validation, test)] == [4500, 500, 1000]
    assert train.input_shape == (1, 28, 28) and train.examples.dtype == torch.float32
    assert train.examples.min() == 0 and train.examples.max() == 1
    assert not set(multiset(train.examples)) & set(multiset(validation.examples))
    assert torch.bincount(test.labels).tolist() == [100] * 10
    assert torch.bincount(torch.cat([train.labels, validation.labels])).tolist() == [500] * 10


def test_digits_are_shuffled_by_the_seed_alone():
    first, again, other = load(seed=0), load(seed=0), load(seed=1)
    assert first.examples.equal(again.examples) and not first.examples.equal(other.examples)
    assert first.labels[:200].unique().numel() == 10  # the file is sorted by label


def test_digits_load_fast():
    load("digits")
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        load("digits")
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.3


# Arrays


@pytest.mark.parametrize(
    ("array", "shape"),
    [
        (pictures(20, 5, 6), (1, 5, 6)),
        (pictures(20, 3, 5, 6), (3, 5, 6)),
        (pictures(20, 5, 6, 3), (3, 5, 6)),
        (pictures(20, 5, 6, 1), (1, 5, 6)),
        (pictures(20, 5, 6) / 255, (1, 5, 6)),
        ((pictures(20, 5, 6) / 255).astype(">f4"), (1, 5, 6)),
        ((pictures(20, 5, 6) / 255).astype(np.float16), (1, 5, 6)),
        (pictures(20, 5, 6) > 127, (1, 5, 6)),
        ((pictures(20, 5, 6) > 127).astype(np.uint8), (1, 5, 6)),
    ],
)
def test_layouts_and_types_of_arrays(tmp_path, array, shape):
    np.save(tmp_path / "set.npy", array)
    data = load(tmp_path / "set.npy", "train")
    assert data.input_shape == shape and data.examples.dtype == torch.float32 and len(data) == 16
    assert data.labels is None
    expected = array.astype(np.float64) / (255 if array.dtype == np.uint8 and array.max() > 1 else 1)
    if array.ndim == 4 and array.shape[3] in (1, 3):
        expected = expected.transpose(0, 3, 1, 2)
    whole = torch.cat([load(tmp_path / "set.npy", split).examples for split in ("train", "validation", "test")])
    assert multiset(whole) == multiset(torch.from_numpy(expected.astype(np.float32)).reshape(20, *shape))


def test_tensors_of_bfloat16_which_numpy_does_not_know():
    images = torch.rand(20, 3, 5, 5).bfloat16()
    assert torch.equal(load(images, "all").examples, images.float())


def test_arrays_in_memory_and_ambiguous_layouts():
    array = pictures(20, 3, 8, 3)
    with pytest.raises(DataError, match=r"\(20, 3, 8, 3\).*layout='NCHW'"):
        load(array)
    assert load(array, layout="NHWC").input_shape == (3, 3, 8)
    assert load(torch.from_numpy(array), layout="NCHW").input_shape == (3, 8, 3)


@pytest.mark.parametrize("names", [("{}_images", "{}_labels"), ("x_{}", "y_{}")])
def test_npz_with_named_splits(tmp_path, names):
    content = {}
    for seed, (word, n) in enumerate([("train", 30), ("test", 7)]):
        content[names[0].format(word)] = pictures(n, 4, 4, seed=seed)
        content[names[1].format(word)] = np.arange(n)
    np.savez(tmp_path / "set.npz", **content)
    train, validation, test = (load(tmp_path / "set.npz", split, seed=3) for split in ("train", "validation", "test"))
    assert [len(part) for part in (train, validation, test)] == [27, 3, 7]
    assert sorted([*train.labels.tolist(), *validation.labels.tolist()]) == list(range(30))
    row = int(train.labels[0])
    expected = torch.from_numpy(content[names[0].format("train")][row]).float() / 255
    torch.testing.assert_close(train.examples[0, 0], expected)


def test_npz_with_one_set_is_divided(tmp_path):
    np.savez(tmp_path / "set.npz", images=pictures(50, 4, 4), labels=np.arange(50), palette=np.zeros(3))
    parts = [load(tmp_path / "set.npz", split) for split in ("train", "validation", "test")]
    assert [len(part) for part in parts] == [40, 5, 5]
    assert sorted(torch.cat([part.labels for part in parts]).tolist()) == list(range(50))


def change(array: np.ndarray, index: tuple[int, ...], value: float) -> np.ndarray:
    array = array.copy()
    array[index] = value
    return array


UNIT = pictures(20, 4, 4) / 255


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (UNIT * 255, "0 to 25[45].*expected floats in .0, 1.: divide by 255"),
        (UNIT * 2 - 1, r"-1 to .*\(x \+ 1\) / 2"),
        (UNIT * 1000, "0 to 996.078.*scale them"),
        (change(UNIT, (7, 1, 2), np.nan), r"nan at index \(7, 1, 2\), 1 such"),
        (change(UNIT, (3, 0, 0), np.inf), r"inf at index \(3, 0, 0\)"),
        (pictures(20, 4, 4).astype(np.int64), "int64, values 0 to 25[45].*astype"),
        (pictures(20, 4, 4).astype(np.complex64), "complex64; expected uint8"),
        (np.zeros((20, 4, 4), np.uint8), "every value is 0"),
        (np.ones((20, 4, 4)), "every value is 1"),
        (np.zeros((0, 4, 4), np.uint8), "0 examples: the set is empty"),
        (np.zeros((20, 0, 4), np.uint8), r"\(20, 0, 4\).*empty"),
        (pictures(2, 4, 4), "2 examples: too few to split; expected at least 3"),
        (pictures(20, 784), r"\(20, 784\).*reshape"),
        (pictures(20), r"\(20,\); expected images"),
        (pictures(20, 1, 1, 4, 4, 4), r"\(20, 1, 1, 4, 4, 4\); expected images"),
        (np.float32(0.5), "0 examples"),
    ],
)
def test_wrong_arrays_are_named(tmp_path, array, message):
    np.save(tmp_path / "wrong.npy", array)
    with pytest.raises(DataError, match=rf"wrong.npy: .*{message}"):
        load(tmp_path / "wrong.npy")


def test_pickled_objects_are_refused_unread(tmp_path):
    ran = tmp_path / "ran"

    class Malicious:
        def __reduce__(self):
            return Path.touch, (ran,)

    objects = np.empty(2, object)
    objects[:] = [Malicious(), pictures(1, 3, 4)]
    np.save(tmp_path / "set.npy", objects)
    np.savez(tmp_path / "set.npz", train_images=objects, test_images=objects)
    for name in ("set.npy", "set.npz"):
        with pytest.raises(DataError, match=rf"{name}.*Python objects.*np.stack"):
            load(tmp_path / name)
    assert not ran.exists()
    np.load(tmp_path / "set.npy", allow_pickle=True)
    assert ran.exists()  # so the file would have run, had it been read


def test_files_that_are_cut_short_or_no_numpy_files(tmp_path):
    np.save(tmp_path / "set.npy", pictures(20, 4, 4))
    np.savez(tmp_path / "set.npz", images=pictures(20, 4, 4))
    for name, keep in (("set.npy", 200), ("set.npz", 200), ("set.npy", 0), ("set.npz", 0)):
        path = tmp_path / name
        path.write_bytes(path.read_bytes()[:keep])
        with pytest.raises(DataError, match=f"{name}.*(cut short|no NumPy file)"):
            load(path)
    (tmp_path / "text.npz").write_text("hello")
    with pytest.raises(DataError, match="text.npz.*no NumPy file"):
        load(tmp_path / "text.npz")


def test_npz_with_unknown_names_or_wrong_labels(tmp_path):
    np.savez(tmp_path / "names.npz", photos=pictures(5, 4, 4), masks=pictures(5, 4, 4))
    with pytest.raises(DataError, match="names.npz: holds photos, masks; expected train_images"):
        load(tmp_path / "names.npz")
    np.savez(tmp_path / "labels.npz", images=pictures(20, 4, 4), labels=np.arange(19))
    with pytest.raises(DataError, match=r"labels.npz.*\(19,\).*20 images"):
        load(tmp_path / "labels.npz")


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
def test_labels_in_a_column_are_taken_as_a_row(tmp_path, write):
    """As MedMNIST's .npz have them, (N, 1) uint8."""
    names = ("train", "val", "test")
    write(tmp_path / "set.npz",
          **{f"{name}_images": pictures(20, 4, 4, seed=i) for i, name in enumerate(names)},
          **{f"{name}_labels": np.arange(20, dtype=np.uint8)[:, None] for name in names})  # fmt: skip
    data = load(tmp_path / "set.npz", "test")
    assert data.labels.dtype == torch.int64 and sorted(data.labels.tolist()) == list(range(20))
    expected = torch.from_numpy(pictures(20, 4, 4, seed=2)[data.labels]).float() / 255
    assert torch.equal(data.examples[:, 0], expected)


def test_several_labels_an_image_are_left_out_with_one_warning(tmp_path):
    """As ChestMNIST's, (N, 14)."""
    path = tmp_path / "set.npz"
    np.savez(path, images=pictures(20, 4, 4), labels=np.ones((20, 14), np.uint8))
    message = r"\[images\]: labels of shape \(20, 14\) are left out; expected one an image, shape \(20,\)"
    with pytest.warns(UserWarning, match=message) as given:
        assert load(path).labels is None
    assert len(given) == 1 and given[0].filename == __file__
    for labels in (np.ones((19, 14)), np.ones((19, 1)), np.ones((14, 20)), np.array(3), np.ones((20, 1))):
        np.savez(path, images=pictures(20, 4, 4), labels=labels)
        with pytest.raises(DataError, match="labels of shape .* for 20 images; expected whole numbers"):
            load(path)


# Options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "no/such/file.npz"}, "no/such/file.npz: no such file"),
        ({"source": "digit"}, "digit: no such file or folder in .*; expected 'digits'"),
        ({"source": __file__}, "test_data.py: this kind of file is not known"),
        ({"split": "valid"}, "'valid' is not known; expected one of train, validation, test"),
        ({"binarize": "static"}, "'static'; expected one of none, fixed, dynamic"),
        ({"seed": -1}, "seed is -1"),
        ({"resize": 32}, "resize=32 is for image files"),
        ({"source": pictures(9, 4, 4), "layout": "HWC"}, "layout 'HWC'"),
        ({"source": pictures(9, 4, 4), "layout": "NCHW"}, r"\(9, 4, 4\).*here NCHW"),
    ],
)
def test_options_that_are_wrong(options, message):
    with pytest.raises(DataError, match=message):
        load(**options)


def test_dataset_of_own_tensors_is_checked():
    with pytest.raises(DataError, match="torch.uint8"):
        ImageDataset(torch.zeros(3, 1, 4, 4, dtype=torch.uint8))
    with pytest.raises(DataError, match=r"labels have shape \(2,\)"):
        ImageDataset(torch.zeros(3, 1, 4, 4), torch.zeros(2))

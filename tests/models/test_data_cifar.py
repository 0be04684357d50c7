"""CIFAR's pickles, read without running what they ask for, and its binary files."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from mrvae_models.data import DataError, load
from mrvae_models.data.cifar import LAYOUTS, read
from published import (
    agree,
    by_bytes,
    cifar,
    python2_pickle,
    python3_pickle,
)

# CIFAR


@pytest.mark.parametrize("written", [python2_pickle, python3_pickle])
@pytest.mark.parametrize("folder", ["cifar10", "cifar10/cifar-10-batches-py", "cifar-10-batches-py"])
def test_cifar10_pickled(root, written, folder):
    (root / folder).mkdir(parents=True)
    names = [f"data_batch_{i}" for i in range(1, 6)]
    batches = {name: cifar(4, seed) for seed, name in enumerate([*names, "test_batch"])}
    for name, (array, labels) in batches.items():
        (root / folder / name).write_bytes(written(array, labels, "labels"))
    (root / folder / "batches.meta").write_bytes(b"never read")
    images, labels = batches["test_batch"]
    for source in ("cifar10", root / folder):
        agree(load(source, "test"), images.reshape(-1, 3, 32, 32), np.array(labels))
        assert len(load(source)) == 18 and len(load(source, "validation")) == 2
    whole = np.concatenate([batches[name][0] for name in names])
    both = torch.cat([load("cifar10", split).examples for split in ("train", "validation")])
    assert by_bytes(both.numpy()) == by_bytes(whole.reshape(-1, 3, 32, 32).astype(np.float32) / 255)


@pytest.mark.parametrize("protocol", range(6))
def test_every_protocol_of_python_3_is_read(tmp_path, protocol):

    array, labels = cifar(4, 0)
    (tmp_path / "batch").write_bytes(python3_pickle(array, labels, "labels", protocol))
    images, found = read(tmp_path / "batch", LAYOUTS[0])
    assert np.array_equal(images, array.reshape(-1, 3, 32, 32)) and found.tolist() == labels


def test_cifar100_pickled_and_binary_and_cifar10_binary(root):
    (root / "cifar-100-python").mkdir()
    (root / "cifar-10-batches-bin").mkdir()
    for seed, name in enumerate(["train", "test"]):
        array, labels = cifar(10, seed, 100)
        (root / "cifar-100-python" / name).write_bytes(python2_pickle(array, labels, "fine_labels"))
    agree(load("cifar100", "test"), array.reshape(-1, 3, 32, 32), np.array(labels))
    (root / "cifar100").mkdir()
    for seed, name in enumerate(["train.bin", "test.bin"]):
        array, labels = cifar(10, seed, 100)
        rows = np.concatenate([np.full((10, 1), 7), np.array(labels)[:, None], array], 1).astype(np.uint8)
        (root / "cifar100" / name).write_bytes(rows.tobytes())
    agree(load("cifar100", "test"), array.reshape(-1, 3, 32, 32), np.array(labels))
    for seed, name in enumerate([*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]):
        array, labels = cifar(3, seed)
        rows = np.concatenate([np.array(labels)[:, None], array], 1).astype(np.uint8)
        (root / "cifar-10-batches-bin" / name).write_bytes(rows.tobytes())
    agree(load("cifar10", "test"), array.reshape(-1, 3, 32, 32), np.array(labels))


def test_cifar_that_would_run_code_is_refused_unrun(tmp_path):

    ran = tmp_path / "ran"

    class Malicious:
        def __reduce__(self):
            return Path.touch, (ran,)

    objects = np.empty(1, object)
    objects[0] = Malicious()
    path = tmp_path / "data_batch_1"
    for content in (Malicious(), {"data": Malicious(), "labels": []}, {"data": objects, "labels": [0]}):
        path.write_bytes(pickle.dumps(content, protocol=2))
        with pytest.raises(DataError, match="data_batch_1: asks for .* when it is read, which could run code|'O8'"):
            read(path, LAYOUTS[0])
    assert not ran.exists()
    for name in ("eval", "exec", "getattr", "__import__"):
        path.write_bytes(b"\x80\x02c__builtin__\n" + name.encode() + b"\nU\x011\x85R.")
        with pytest.raises(DataError, match=f"asks for .*{name} when it is read.*refused"):
            read(path, LAYOUTS[0])
    path.write_bytes(b"\x80\x02U\x01aQ.")
    with pytest.raises(DataError, match="refers to an object outside"):
        read(path, LAYOUTS[0])
    pickle.loads(pickle.dumps(Malicious()))
    assert ran.exists()  # so it would have run


def test_cifar_files_that_are_wrong(tmp_path):

    array, labels = cifar(4, 0)
    whole = python2_pickle(array, labels, "labels")
    path = tmp_path / "data_batch_1"
    for content, message in [
        (whole[:5000], "cannot be read, damaged or cut short"),
        (b"", "cannot be read, damaged or cut short"),
        (b"hello", "cannot be read, damaged or cut short"),
        (pickle.dumps([1, 2]), "holds a list; expected a dictionary with data and labels"),
        (pickle.dumps({"pixels": 1}), "holds pixels; expected data and labels"),
        (pickle.dumps({"data": [1], "labels": labels}), r"data is list; expected an array of bytes, \(N, 3072\)"),
        (python2_pickle(array[:, :100], labels, "labels"), r"data is of shape \(4, 100\)"),
        (python2_pickle(array, labels[:3], "labels"), "3 labels for 4 images"),
        (python2_pickle(array, [*labels[:3], 10], "labels"), "values .*10.*from 0 to 9"),
        (pickle.dumps({"data": array, "labels": "4321"}), "labels is str; expected a list of whole numbers"),
        (pickle.dumps({"data": array.astype(np.float32), "labels": labels}), "type 'f4'; expected bytes"),
    ]:
        path.write_bytes(content)
        with pytest.raises(DataError, match=message):
            read(path, LAYOUTS[0])
    binary = tmp_path / "data_batch_1.bin"
    for content in (bytes(3072), b""):
        binary.write_bytes(content)
        with pytest.raises(DataError, match=f"{len(content)} bytes; expected a multiple of 3073"):
            read(binary, LAYOUTS[1])
    with pytest.raises(DataError, match="data_batch_2, data_batch_3, data_batch_4, data_batch_5, test_batch not there"):
        load(tmp_path)

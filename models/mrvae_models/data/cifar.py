"""CIFAR-10 and CIFAR-100 (Krizhevsky, 2009), as pickled batches or as binary files.

Unpickling runs what a file asks for. Here it cannot: every name that CIFAR's pickles use is bound to a stand-in of this
module that reads an array of bytes, and any other name is refused.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .checks import DataError, Raw
from .splits import Sets

PIXELS = 3 * 32 * 32


class Layout(NamedTuple):
    """The files of one way in which a set is distributed, and where an image's label is."""

    train: tuple[str, ...]
    test: tuple[str, ...]
    key: str  # of the labels in a pickle
    label_bytes: int  # before an image in a binary file; the last one is the label
    classes: int


LAYOUTS = (
    Layout(tuple(f"data_batch_{i}" for i in range(1, 6)), ("test_batch",), "labels", 1, 10),
    Layout(tuple(f"data_batch_{i}.bin" for i in range(1, 6)), ("test_batch.bin",), "labels", 1, 10),
    Layout(("train",), ("test",), "fine_labels", 2, 100),
    Layout(("train.bin",), ("test.bin",), "fine_labels", 2, 100),
)
"""CIFAR-10 pickled and binary, CIFAR-100 pickled and binary."""


def found(path: Path) -> bool:
    return path.is_dir() and any(map(lambda layout: _begins(path, layout), LAYOUTS))


def _begins(path: Path, layout: Layout) -> bool:
    return any((path / name).is_file() for name in (*layout.train, *layout.test))


def sets(path: Path) -> Sets:
    """Train and test of a folder of CIFAR-10 or CIFAR-100: images (N, 3, 32, 32) uint8, labels 0 to classes - 1."""
    layout = next(layout for layout in LAYOUTS if _begins(path, layout))
    missing = [name for name in (*layout.train, *layout.test) if not (path / name).is_file()]
    if missing:
        raise DataError(f"{path}: {', '.join(missing)} not there; expected {', '.join(layout.train + layout.test)}")
    return {"train": lambda: _raw(path, layout.train, layout), "test": lambda: _raw(path, layout.test, layout)}


def _raw(folder: Path, names: Sequence[str], layout: Layout) -> Raw:
    parts = [read(folder / name, layout) for name in names]
    images, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return Raw(images, labels, f"{folder} ({names[0]}{f' to {names[-1]}' if len(names) > 1 else ''})")


def read(path: Path, layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, 3, 32, 32) uint8 and labels (N,) of one file."""
    rows, labels = _read_binary(path, layout.label_bytes) if path.suffix == ".bin" else _read_pickle(path, layout.key)
    if len(labels) != len(rows) or (len(labels) and not (0 <= labels.min() and labels.max() < layout.classes)):
        raise DataError(
            f"{path}: {len(labels)} labels for {len(rows)} images, values {np.unique(labels)[[0, -1]].tolist()}; "
            f"expected one an image, from 0 to {layout.classes - 1}"
        )
    return rows.reshape(-1, 3, 32, 32), labels


def _read_binary(path: Path, label_bytes: int) -> tuple[np.ndarray, np.ndarray]:
    content = np.frombuffer(path.read_bytes(), np.uint8)
    length = label_bytes + PIXELS
    if len(content) == 0 or len(content) % length:
        raise DataError(
            f"{path}: {len(content)} bytes; expected a multiple of {length}, a label of {label_bytes} and an image of "
            f"{PIXELS}: damaged or cut short; download it again"
        )
    rows = content.reshape(-1, length)
    return rows[:, label_bytes:], rows[:, label_bytes - 1].astype(np.int64)


def _read_pickle(path: Path, key: str) -> tuple[np.ndarray, np.ndarray]:
    try:
        with open(path, "rb") as file:
            content = _Unpickler(file, path).load()
    except DataError:
        raise
    except Exception as error:  # a damaged pickle raises whatever its bytes lead to
        raise DataError(
            f"{path}: cannot be read, damaged or cut short ({type(error).__name__}: {error}); download it again"
        ) from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: holds a {type(content).__name__}; expected a dictionary with data and {key}")
    content = {name.decode("latin1") if isinstance(name, bytes) else name: value for name, value in content.items()}
    if "data" not in content or key not in content:
        raise DataError(f"{path}: holds {', '.join(map(str, content)) or 'nothing'}; expected data and {key}")
    array = content["data"].array if isinstance(content["data"], _Array) else None
    if array is None or array.ndim != 2 or array.shape[1] != PIXELS:
        found = type(content["data"]).__name__ if array is None else f"of shape {array.shape}"
        raise DataError(f"{path}: data is {found}; expected an array of bytes, (N, {PIXELS})")
    labels = content[key]
    if not isinstance(labels, list) or not all(type(label) is int for label in labels):
        raise DataError(f"{path}: {key} is {type(labels).__name__}; expected a list of whole numbers")
    return array, np.array(labels, np.int64)


class _Dtype:
    """Stands for numpy.dtype; only unsigned bytes are known."""

    def __init__(self, code: Any, *_: Any):
        if code not in ("u1", "|u1", b"u1"):
            raise DataError(f"an array of type {code!r}; expected bytes, 'u1'")

    def __setstate__(self, state: Any) -> None: ...


class _Array:
    """Stands for numpy.ndarray, and for the functions that make one: what they are given is read as bytes."""

    array: np.ndarray | None = None

    def __init__(self, *_: Any): ...

    def __setstate__(self, state: Any) -> None:
        _, shape, _, fortran, content = state
        self.fill(content, shape, "F" if fortran else "C")

    def fill(self, content: Any, shape: Any, order: str) -> None:
        content = content.encode("latin1") if isinstance(content, str) else bytes(content)
        self.array = np.frombuffer(content, np.uint8).reshape(tuple(shape), order="F" if order == "F" else "C")


def _array_of_buffer(content: Any, dtype: Any, shape: Any, order: str) -> _Array:
    made = _Array()
    made.fill(content, shape, order)
    return made


def _encoded(text: str, encoding: str) -> bytes:
    """How Python 3 pickles bytes by the protocols of Python 2."""
    return str.encode(text, "latin1")


KNOWN = {
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy.core.numeric", "_frombuffer"): _array_of_buffer,
    ("numpy", "ndarray"): "ndarray",  # only ever handed to _reconstruct, so it need not be callable
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _encoded,
}


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: Any, path: Path):
        super().__init__(file, encoding="latin1")  # Python 2 wrote them
        self.path = path

    def find_class(self, module: str, name: str) -> Any:
        known = KNOWN.get((module.replace("numpy._core", "numpy.core"), name))
        if known is None:
            raise DataError(
                f"{self.path}: asks for {module}.{name} when it is read, which could run code, and was refused; "
                "expected nothing but arrays of bytes, numbers, texts, lists and dictionaries: download it again, or "
                "use the binary version (data_batch_1.bin)"
            )
        return known

    def persistent_load(self, pid: Any) -> Any:
        raise DataError(f"{self.path}: refers to an object outside of it, {pid!r}; expected none")

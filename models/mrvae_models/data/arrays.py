"""Arrays in .npz and .npy files.

An array `source` beside the images, (N,), says which photograph, person or recording each is from: `load` then divides
by source, so that what is tested on comes from sources that were not trained on.
"""

from __future__ import annotations

import contextlib
import math
import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from .checks import DataError, Header, Raw
from .splits import NAMES, Sets

LOCAL_HEADER = 30
"""Bytes before an entry's name in a zip file; the last four are the lengths of the name and of what follows it."""

DIGITS = Path(__file__).parent.parent / "data_files" / "mnist6k.npz"
"""The embedded digits, 5,000 train and 1,000 test."""

UNDIVIDED = ("images", "imgs", "patches", "x", "data", "arr_0")
GROUPS = ("source", "sources", "group", "groups")
"""Keys of (N,) whole numbers or texts: what each image is a part of, such as the photograph of a patch."""

EXPECTED = "train_images, validation_images, test_images (or x_train, x_val, x_test), or images for one undivided set"


def sets(path: Path) -> Sets:
    """The sets of an .npz file by its keys, or the one array of an .npy file."""
    if path.suffix.lower() == ".npy":
        return {"all": lambda: Raw(read(path), None, str(path))}
    keys = list(read(path))
    found: dict[str, tuple[str, str | None, str | None]] = {}
    for word, split in NAMES.items():
        for image_key, label_key in ((f"{word}_images", f"{word}_labels"), (f"x_{word}", f"y_{word}")):
            if image_key in keys and split not in found:
                group_key = _first(keys, *(f"{word}_{key}" for key in GROUPS), *(f"{key}_{word}" for key in GROUPS))
                found[split] = (image_key, _first(keys, label_key), group_key)
    if found:
        test_key = found["test"][0] if "test" in found else None
        return {split: partial(_raw, path, *of_split, test_key) for split, of_split in found.items()}
    only = keys[0] if len(keys) == 1 else None
    undivided = _first(keys, *UNDIVIDED) or only
    if undivided is None:
        raise DataError(f"{path}: holds {', '.join(keys) or 'no array'}; expected {EXPECTED}: rename the arrays")
    return {"all": partial(_raw, path, undivided, _first(keys, "labels", "y"), _first(keys, *GROUPS), None)}


def _first(keys: Sequence[str], *wanted: str) -> str | None:
    return next((key for key in wanted if key in keys), None)


def _raw(path: Path, image_key: str, label_key: str | None, group_key: str | None, test_key: str | None) -> Raw:
    labels = None if label_key is None else read(path, label_key)
    images = read(path, image_key)
    groups = None if group_key is None else _groups(read(path, group_key), len(images), f"{path} [{group_key}]")
    test = None if test_key is None else Header(header(path, test_key)[0], f"{path} [{test_key}]")
    return Raw(images, labels, f"{path} [{image_key}]", groups=groups, test=test)


def _groups(array: np.ndarray, n: int, origin: str) -> np.ndarray | None:
    """Numbers of groups, (n,), from 0; None for one text, of where the set is from. DataError for anything else."""
    if array.ndim == 0 and array.dtype.kind in "US":
        return None
    if array.shape != (n,) or array.dtype.kind not in "iubUS":
        raise DataError(
            f"{origin}: {array.dtype}, shape {array.shape}; expected a whole number or a text for each of the {n} "
            "images, what it is a part of: correct it, or leave it out to split by row"
        )
    return np.unique(array, return_inverse=True)[1]


def read(path: Path, key: str | None = None) -> Any:
    """The array of an .npy file, the keys of an .npz file, or its array `key`. Pickled objects are refused."""
    with _damage(path, key):
        content = np.load(path, allow_pickle=False)
        if isinstance(content, np.ndarray):
            return content
        with content:
            return content.files if key is None else content[key]


def header(path: Path, key: str) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and type of an array of an .npz file, which is not read."""
    with _damage(path), zipfile.ZipFile(path) as content, content.open(f"{key}.npy") as entry:
        shape, _, kind = _read_header(entry)
        return shape, kind


def mapped(path: Path, key: str) -> np.ndarray | None:
    """An array of an .npz file, mapped from it and read where it is indexed; None where it is compressed.

    The checksum of the .npz is of the whole array, and is not looked at.
    """
    with _damage(path), zipfile.ZipFile(path) as content, open(path, "rb") as file:
        entry = content.getinfo(f"{key}.npy")
        if entry.compress_type != zipfile.ZIP_STORED:
            return None
        file.seek(entry.header_offset)
        local = file.read(LOCAL_HEADER)
        if local[:4] != b"PK\3\4":
            raise ValueError(f"no entry at byte {entry.header_offset}")
        begin = entry.header_offset + LOCAL_HEADER + sum(struct.unpack("<HH", local[-4:]))  # its name and extra field
        file.seek(begin)
        shape, fortran, kind = _read_header(file)
        values = math.prod(shape) * kind.itemsize
        if file.tell() - begin + values != entry.file_size or kind.hasobject:
            raise ValueError(f"{key} is {kind}, shape {shape}, in {entry.file_size} bytes")
        order: Any = "F" if fortran else "C"
        return np.memmap(path, kind, "r", file.tell(), shape, order)


def _read_header(file: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(file)
    reader = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
    if reader is None:
        raise ValueError(f"the format of arrays has version {version}; expected 1.0 or 2.0")
    return reader(file)


@contextlib.contextmanager
def _damage(path: Path, key: str | None = None) -> Iterator[None]:
    """Turns what a damaged file raises into a DataError, and what refuses one of Python objects."""
    try:
        yield
    except (ValueError, OSError, EOFError, KeyError, MemoryError, zipfile.BadZipFile, zlib.error) as error:
        if "allow_pickle" in str(error):
            raise DataError(
                f"{path}{f' [{key}]' if key else ''}: is no NumPy file, or holds Python objects, which could run code "
                "when read; expected plain numbers: save the images as one array, np.stack(images).astype('uint8')"
            ) from None
        raise DataError(
            f"{path}: cannot be read, damaged or cut short ({error}); expected a file written by numpy.save or "
            "numpy.savez: make or download it again"
        ) from error

"""IDX files, the format of MNIST: two zero bytes, a type, the number of axes, the axes as big-endian int32, bytes."""

from __future__ import annotations

import gzip
import math
import re
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import IO, TypeVar

import numpy as np

from .checks import DataError, Header, Raw
from .splits import NAMES, Sets

UNSIGNED_BYTE = 8
MOST_INFLATION = 1032  # deflate cannot expand further, so a header that claims more is wrong

NAMED = re.compile(r"idx[1-4]|ubyte|\.idx(\.gz)?$")
ENDS = re.compile(r"((idx[1-4]|ubyte)[^.]*|\.idx)(\.gz)?$")

Found = TypeVar("Found")


def is_idx(path: Path) -> bool:
    """By the name; where that ends as other files do, by the first bytes as well: idx1.png is an image."""
    name = path.name.lower()
    if not NAMED.search(name):
        return False
    if ENDS.search(name):
        return True
    try:
        return _read(path, _magic)[2] == UNSIGNED_BYTE
    except DataError:
        return False


def files(folder: Path) -> list[Path]:
    """The IDX files of images in a folder, none that is hidden; of a file and its .gz, the file."""
    images = {path.name: path for path in sorted(folder.iterdir()) if path.is_file() and is_idx(path)}
    return [
        path
        for name, path in images.items()
        if "label" not in name.lower()
        and not name.startswith(".")
        and not (name.endswith(".gz") and name.removesuffix(".gz") in images)
    ]


def sets(path: Path) -> Sets:
    """The sets of a folder of IDX files by their names (train, t10k, test, val), or the one of a file."""
    if path.is_file():
        return {"all": partial(_raw, path, None)}
    origins: dict[str, Path] = {}
    for file in files(path):
        words = re.split(r"[^a-z0-9]+", file.name.lower())
        split = next((NAMES[word] for word in words if word in NAMES), "all")
        if split in origins:
            raise DataError(
                f"{path}: {origins[split].name} and {file.name} are both {split} images; expected one file a split: "
                "give the file instead of the folder, or move one away"
            )
        origins[split] = file
    return {split: partial(_raw, file, origins.get("test")) for split, file in origins.items()}


def _raw(path: Path, test: Path | None) -> Raw:
    images = read_idx(path)
    if images.ndim not in (3, 4):
        raise DataError(f"{path}: {images.ndim} axes, shape {images.shape}; expected 3 or 4: is this a label file?")
    labels = _labels_beside(path)
    header = None if test is None else Header(_read(test, _shape), str(test))
    return Raw(images, None if labels is None else read_idx(labels), str(path), test=header)


def _labels_beside(path: Path) -> Path | None:
    name = re.sub(r"idx[34]", "idx1", path.name.replace("images", "labels"))
    for candidate in (name, name.removesuffix(".gz"), f"{name}.gz"):
        if candidate != path.name and (path.parent / candidate).is_file():
            return path.parent / candidate
    return None


def read_idx(path: Path) -> np.ndarray:
    """The array of an IDX file of unsigned bytes, gzipped or not (by its first bytes, whatever its name says)."""
    return _read(path, _array)


def _read(path: Path, parse: Callable[[Callable[[int], bytes], int, Path], Found]) -> Found:
    """What `parse` makes of a file, from a function that reads so many bytes and how many there can be at most."""
    try:
        with open(path, "rb") as file:
            compressed = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            stream: IO[bytes] | gzip.GzipFile = gzip.GzipFile(fileobj=file) if compressed else file
            most = path.stat().st_size * (MOST_INFLATION if compressed else 1)
            return parse(stream.read, most, path)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}: the gzip file is damaged or cut short ({error}); download it again") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error})") from error


def _magic(read: Callable[[int], bytes], most: int, path: Path) -> bytes:
    magic = read(4)
    if len(magic) < 4 or magic[:2] != b"\0\0":
        raise DataError(f"{path}: begins with {magic!r}; expected an IDX file, which begins with two zero bytes")
    return magic


def _shape(read: Callable[[int], bytes], most: int, path: Path) -> tuple[int, ...]:
    magic = _magic(read, most, path)
    if magic[2] != UNSIGNED_BYTE:
        raise DataError(f"{path}: IDX values of type 0x{magic[2]:02x}; expected 0x08: convert to unsigned bytes")
    axes = read(4 * magic[3])
    shape = tuple(int(size) for size in np.frombuffer(axes[: len(axes) // 4 * 4], ">u4"))
    if len(shape) < magic[3] or math.prod(shape) > most:
        raise DataError(f"{path}: the header announces shape {shape}, more than the file can hold; download it again")
    return shape


def _array(read: Callable[[int], bytes], most: int, path: Path) -> np.ndarray:
    shape = _shape(read, most, path)
    count = math.prod(shape)
    content = read(count + 1)
    if len(content) != count:
        found = f"{len(content)} bytes" if len(content) < count else "more bytes"
        raise DataError(
            f"{path}: shape {shape} needs {count} bytes, found {found}: damaged or cut short; download again"
        )
    return np.frombuffer(content, np.uint8).reshape(shape)

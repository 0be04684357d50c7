"""IDX files, the format of MNIST: two zero bytes, a type, the number of axes, the axes as big-endian int32, bytes."""

from __future__ import annotations

import gzip
import math
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO

import numpy as np

from .checks import DataError, Raw
from .splits import NAMES, Sets

UNSIGNED_BYTE = 8
MOST_INFLATION = 1032  # deflate cannot expand further, so a header that claims more is wrong


def is_idx(path: Path) -> bool:
    return re.search(r"idx[1-4]|ubyte|\.idx(\.gz)?$", path.name.lower()) is not None


def files(folder: Path) -> list[Path]:
    """The IDX files of images in a folder; of a file and its .gz, the file."""
    images = {path.name: path for path in sorted(folder.iterdir()) if path.is_file() and is_idx(path)}
    return [
        path
        for name, path in images.items()
        if "label" not in name.lower() and not (name.endswith(".gz") and name.removesuffix(".gz") in images)
    ]


def sets(path: Path) -> Sets:
    """The sets of a folder of IDX files by their names (train, t10k, test, val), or the one of a file."""
    if path.is_file():
        return {"all": lambda: _raw(path)}
    found: Sets = {}
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
        found[split] = lambda file=file: _raw(file)  # type: ignore[misc]
    return found


def _raw(path: Path) -> Raw:
    images = read_idx(path)
    if images.ndim not in (3, 4):
        raise DataError(f"{path}: {images.ndim} axes, shape {images.shape}; expected 3 or 4: is this a label file?")
    labels = _labels_beside(path)
    return Raw(images, None if labels is None else read_idx(labels), str(path))


def _labels_beside(path: Path) -> Path | None:
    name = re.sub(r"idx[34]", "idx1", path.name.replace("images", "labels"))
    for candidate in (name, name.removesuffix(".gz"), f"{name}.gz"):
        if candidate != path.name and (path.parent / candidate).is_file():
            return path.parent / candidate
    return None


def read_idx(path: Path) -> np.ndarray:
    """The array of an IDX file of unsigned bytes, gzipped or not (by its first bytes, whatever its name says)."""
    try:
        with open(path, "rb") as file:
            compressed = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            stream: IO[bytes] | gzip.GzipFile = gzip.GzipFile(fileobj=file) if compressed else file
            most = path.stat().st_size * (MOST_INFLATION if compressed else 1)
            return _parse(stream.read, most, path)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}: the gzip file is damaged or cut short ({error}); download it again") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error})") from error


def _parse(read: Callable[[int], bytes], most: int, path: Path) -> np.ndarray:
    magic = read(4)
    if len(magic) < 4 or magic[:2] != b"\0\0":
        raise DataError(f"{path}: begins with {magic!r}; expected an IDX file, which begins with two zero bytes")
    if magic[2] != UNSIGNED_BYTE:
        raise DataError(f"{path}: IDX values of type 0x{magic[2]:02x}; expected 0x08: convert to unsigned bytes")
    axes = read(4 * magic[3])
    shape = tuple(int(size) for size in np.frombuffer(axes[: len(axes) // 4 * 4], ">u4"))
    count = math.prod(shape)
    if len(shape) < magic[3] or count > most:
        raise DataError(f"{path}: the header announces shape {shape}, more than the file can hold; download it again")
    content = read(count + 1)
    if len(content) != count:
        found = f"{len(content)} bytes" if len(content) < count else "more bytes"
        raise DataError(
            f"{path}: shape {shape} needs {count} bytes, found {found}: damaged or cut short; download again"
        )
    return np.frombuffer(content, np.uint8).reshape(shape)

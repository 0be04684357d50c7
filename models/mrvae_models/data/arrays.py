"""Arrays in .npz and .npy files."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from .checks import DataError, Raw
from .splits import NAMES, Sets

UNDIVIDED = ("images", "imgs", "x", "data", "arr_0")
EXPECTED = "train_images, validation_images, test_images (or x_train, x_val, x_test), or images for one undivided set"


def sets(path: Path) -> Sets:
    """The sets of an .npz file by its keys, or the one array of an .npy file."""
    if path.suffix.lower() == ".npy":
        return {"all": lambda: Raw(read(path), None, str(path))}
    keys = list(read(path))
    found: Sets = {}
    for word, split in NAMES.items():
        for image_key, label_key in ((f"{word}_images", f"{word}_labels"), (f"x_{word}", f"y_{word}")):
            if image_key in keys and split not in found:
                found[split] = _reader(path, image_key, label_key if label_key in keys else None)
    if found:
        return found
    only = keys[0] if len(keys) == 1 else None
    undivided = next((key for key in UNDIVIDED if key in keys), only)
    if undivided is None:
        raise DataError(f"{path}: holds {', '.join(keys) or 'no array'}; expected {EXPECTED}: rename the arrays")
    return {"all": _reader(path, undivided, next((key for key in ("labels", "y") if key in keys), None))}


def _reader(path: Path, image_key: str, label_key: str | None) -> Any:
    def raw() -> Raw:
        labels = None if label_key is None else read(path, label_key)
        return Raw(read(path, image_key), labels, f"{path} [{image_key}]")

    return raw


def read(path: Path, key: str | None = None) -> Any:
    """The array of an .npy file, the keys of an .npz file, or its array `key`. Pickled objects are refused."""
    try:
        content = np.load(path, allow_pickle=False)
        if isinstance(content, np.ndarray):
            return content
        with content:
            return content.files if key is None else content[key]
    except (ValueError, OSError, EOFError, KeyError, MemoryError, zipfile.BadZipFile, zlib.error) as error:
        if "allow_pickle" in str(error):
            raise DataError(
                f"{path}{f' [{key}]' if key else ''}: holds Python objects (or is no NumPy file), which could run code "
                "when read; expected plain numbers: save the images as one array, np.stack(images).astype('uint8')"
            ) from None
        raise DataError(
            f"{path}: cannot be read, damaged or cut short ({error}); expected a file written by numpy.save or "
            "numpy.savez: make or download it again"
        ) from error

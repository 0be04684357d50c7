"""SVHN's cropped digits (Netzer et al., 2011): train_32x32.mat, test_32x32.mat and, when asked for, extra_32x32.mat."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from .checks import DataError, Raw
from .matlab import read_mat
from .splits import Sets

SUFFIX = "_32x32.mat"


def found(path: Path) -> bool:
    return path.name.endswith(SUFFIX) if path.is_file() else any(path.glob(f"*{SUFFIX}"))


def sets(path: Path, extra: bool = False) -> Sets:
    """Train and test of a folder, or one file as one undivided set. extra: the extra digits join those of train."""
    if path.is_file():
        return {"all": partial(read, [path])}
    files = {"train": ["train", "extra"] if extra else ["train"], "test": ["test"]}
    paths = {split: [path / f"{word}{SUFFIX}" for word in words] for split, words in files.items()}
    missing = [file.name for split in paths.values() for file in split if not file.is_file()]
    if missing:
        expected = f"train{SUFFIX} and test{SUFFIX}{f', and extra{SUFFIX}' if extra else ''}"
        raise DataError(f"{path}: {' and '.join(missing)} not there; expected {expected}")
    return {split: partial(read, some) for split, some in paths.items()}


def read(files: Sequence[Path]) -> Raw:
    """Images (N, 32, 32, 3) uint8 and labels 0 to 9; the files write the digit 0 as 10."""
    parts = [_read(file) for file in files]
    images, labels = (np.concatenate(arrays) if len(parts) > 1 else arrays[0] for arrays in zip(*parts, strict=True))
    return Raw(images, labels, " and ".join(map(str, files)))


def _read(file: Path) -> tuple[np.ndarray, np.ndarray]:
    content = read_mat(file, ("X", "y"))
    images, labels = content["X"], content["y"].ravel()
    if images.ndim != 4 or images.shape[:3] != (32, 32, 3) or images.dtype != np.uint8:
        raise DataError(f"{file}: X is {images.dtype}, shape {images.shape}; expected uint8, (32, 32, 3, N)")
    if labels.shape != images.shape[3:] or not np.isin(labels, np.arange(1, 11)).all():
        raise DataError(
            f"{file}: y has {len(labels)} labels for {images.shape[3]} images, "
            f"values {', '.join(map(str, np.unique(labels)[:12]))}; expected one an image, 1 to 10 (10 is the digit 0)"
        )
    return images.transpose(3, 0, 1, 2), labels.astype(np.int64) % 10

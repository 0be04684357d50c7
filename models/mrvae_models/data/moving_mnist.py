"""Moving MNIST as published (Srivastava et al., 2015): mnist_test_seq.npy, 10,000 clips of 20 frames, 64 by 64, grey.

The file has the frames before the clips, (20, 10000, 64, 64) uint8. It is the test set of its paper, whose training
clips are made without end; here it is one undivided set. "moving-digits" makes clips of the kind.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np

from . import arrays
from .checks import DataError, Raw
from .splits import Sets

FILE = "mnist_test_seq.npy"


def found(path: Path) -> bool:
    return path.name == FILE if path.is_file() else (path / FILE).is_file()


def sets(path: Path) -> Sets:
    return {"all": partial(_raw, path / FILE if path.is_dir() else path)}


def _raw(path: Path) -> Raw:
    frames = arrays.read(path)
    if not isinstance(frames, np.ndarray) or frames.ndim != 4 or frames.dtype != np.uint8:
        found = f"{frames.dtype}, shape {frames.shape}" if isinstance(frames, np.ndarray) else "several arrays"
        raise DataError(f"{path}: {found}; expected uint8, (T, N, 64, 64), frames before clips: download it again")
    return Raw(np.swapaxes(frames, 0, 1), None, str(path), layout="NTHW")

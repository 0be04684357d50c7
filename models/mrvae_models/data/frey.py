"""Frey Face: frey_rawface.mat, 1,965 grey images of 20 by 28 pixels of one face, the frames of a video in their order.

No split is published. Neighbouring frames hardly differ, so a test frame drawn at random would have been trained on but
for a blink, and its likelihood would say nothing of other frames. Here the video is cut into 20 blocks of 98 or 99
frames in a row, and the seed draws 2 of them for test, 2 for validation and 16 for train: what is tested on is at most
at a block's ends next to what was trained on. Results on random splits, as most papers have them, are better and not
comparable.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np

from .checks import DataError, Raw
from .matlab import read_mat
from .splits import Sets

FILE = "frey_rawface.mat"
HEIGHT, WIDTH = 28, 20
BLOCKS = 20


def found(path: Path) -> bool:
    return path.name == FILE if path.is_file() else (path / FILE).is_file()


def sets(path: Path) -> Sets:
    """The images (N, 28, 20) uint8 of the file, or of a folder with it: one undivided set, in blocks."""
    return {"all": partial(_raw, path / FILE if path.is_dir() else path)}


def _raw(path: Path) -> Raw:
    columns = read_mat(path, ("ff",))["ff"]
    if columns.ndim != 2 or len(columns) != HEIGHT * WIDTH or columns.dtype != np.uint8:
        raise DataError(f"{path}: ff is {columns.dtype}, shape {columns.shape}; expected uint8, ({HEIGHT * WIDTH}, N)")
    n = columns.shape[1]
    return Raw(columns.T.reshape(n, HEIGHT, WIDTH), None, str(path), groups=np.arange(n) * BLOCKS // max(1, n))

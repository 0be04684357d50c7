"""MPI3D (Gondal et al., 2019) with its factors, and any other .npz of an image for every combination of factors.

    whole = load("mpi3d-toy", "all")         # 1,036,800 images in the order of the grid (6, 6, 2, 3, 3, 40, 40)
    whole.factors, whole.factor_names, whole.factor_sizes

An .npz as published has one array, `images`, (N, 64, 64, 3) uint8, in the order of the grid. The grids are told apart
by N: 1,036,800 of toy, realistic and real, 460,800 of real with complex shapes. Another grid says what it is by an
array `factor_sizes`, whole numbers whose product is N, and may name its factors, `factor_names`. One undivided set.

An array that the .npz holds uncompressed, as numpy.savez writes it, is not read as a whole, 12.7 GB, but mapped into
memory, and each image is read when it is drawn. A compressed one is read as a whole, and is refused where it does not
fit. mpi3d-toy:4 is a thinner grid, every 4th place along the axes; see grid.py.
"""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from . import arrays
from .checks import DataError, Raw
from .grid import Every, parse_every, thinned
from .mapped import MappedRows
from .memory import check_memory
from .splits import Sets

NAMES = (
    "object_color",
    "object_shape",
    "object_size",
    "camera_height",
    "background_color",
    "horizontal_axis",
    "vertical_axis",
)
SIZES = (6, 6, 2, 3, 3, 40, 40)
COMPLEX = (4, 4, 2, 3, 3, 40, 40)
WHOLE = 5
"""Factors that one number of `every` leaves alone."""

KEY, SIZES_KEY, NAMES_KEY = "images", "factor_sizes", "factor_names"


class Published(NamedTuple):
    """One of the sets: its file, and the sizes of its factors."""

    file: str
    sizes: tuple[int, ...] = SIZES

    def found(self, path: Path) -> bool:
        return (path / self.file).is_file()

    def sets(self, path: Path, every: Every | None = None) -> Sets:
        return sets(path / self.file, every)

    def variant(self, text: str) -> dict[str, Any]:
        return {"every": parse_every(text, NAMES, self.sizes, WHOLE)}


TOY = Published("mpi3d_toy.npz")
REALISTIC = Published("mpi3d_realistic.npz")
REAL = Published("mpi3d_real.npz")
REAL_COMPLEX = Published("real3d_complicated_shapes_ordered.npz", COMPLEX)


def found(path: Path) -> bool:
    """An .npz that says what its factors are, or one of the published ones, by its only array."""
    if path.suffix.lower() != ".npz" or not path.is_file():
        return False
    keys = arrays.read(path)
    if {KEY, SIZES_KEY} <= set(keys):
        return True
    shape, _ = arrays.header(path, KEY) if keys == [KEY] else ((), None)
    return len(shape) == 4 and shape[1:] == (64, 64, 3) and shape[0] in (math.prod(SIZES), math.prod(COMPLEX))


def sets(path: Path, every: Every | None = None) -> Sets:
    return {"all": partial(_raw, path, every)}


def _raw(path: Path, every: Every | None) -> Raw:
    shape, dtype = arrays.header(path, KEY)
    names, sizes = _factors(path, shape)
    if len(shape) != 4 or dtype != np.uint8 or shape[0] != math.prod(sizes):
        raise DataError(
            f"{path} [{KEY}]: {dtype}, shape {shape}; expected uint8, ({math.prod(sizes)}, height, width, channels), "
            f"an image for each combination of {' x '.join(map(str, sizes))} factors"
        )
    places, factors = thinned(names, sizes, every or (1,) * len(sizes))
    images = arrays.mapped(path, KEY)
    if images is None:
        remedy = f"write it uncompressed, numpy.savez({path.name!r}, images=images), which is not read as a whole"
        check_memory(math.prod(shape), str(path), remedy)
        whole = np.moveaxis(arrays.read(path, KEY), -1, 1)
        return Raw(whole if every is None else whole[places], None, f"{path} [{KEY}]", factors, layout="NCHW")
    return Raw(MappedRows(np.moveaxis(images, -1, 1), places), None, f"{path} [{KEY}]", factors, layout="NCHW")


def _factors(path: Path, shape: tuple[int, ...]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    keys = arrays.read(path)
    if SIZES_KEY not in keys:
        return NAMES, COMPLEX if shape[:1] == (math.prod(COMPLEX),) else SIZES
    sizes = arrays.read(path, SIZES_KEY)
    if sizes.ndim != 1 or sizes.dtype.kind not in "iu" or len(sizes) == 0 or sizes.min() < 1:
        raise DataError(f"{path} [{SIZES_KEY}]: {sizes.tolist()}; expected whole numbers of at least 1, one a factor")
    names = arrays.read(path, NAMES_KEY) if NAMES_KEY in keys else np.arange(len(sizes)).astype(str)
    if names.shape != sizes.shape or names.dtype.kind != "U":
        raise DataError(f"{path} [{NAMES_KEY}]: {names.tolist()}; expected {len(sizes)} texts, one a factor")
    return tuple(map(str, names)), tuple(map(int, sizes))

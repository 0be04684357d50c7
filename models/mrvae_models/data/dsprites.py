"""dSprites (Matthey et al., 2017) with its factors: the original .npz, or images drawn by sprites.py.

    whole = load("dsprites", "all")          # 737,280 images in the order of the grid (3, 6, 40, 32, 32)
    whole.factors, whole.factor_names, whole.factor_sizes

`every` thins out the grid: (1, 2, 4, 4, 4) keeps every second scale and every fourth orientation and position; its
factors are numbered anew, from 0. One undivided set, of which `load` takes a tenth each for validation and test; train
on "all" (`mrvae train --train-on all`) for the set-up of Chen et al. (2018), which the MR-VAE paper follows.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np

from . import arrays
from .checks import DataError, Raw
from .grid import Every, parse_every, thinned
from .memory import check_memory
from .splits import Sets
from .sprites import NAMES, SIZES, Sprites

FILE = "dsprites_ndarray_co1sh3sc6or40x32y32_64x64.npz"
ALL: Every = (1, 1, 1, 1, 1)
WHOLE = 2
"""Factors that one number of `every` leaves alone: shapes and scales."""


def variant(text: str) -> dict[str, Every]:
    """The options of what follows a colon, "4" or "1,2,4,4,4"."""
    return {"every": parse_every(text, NAMES, SIZES, WHOLE)}


def found(path: Path) -> bool:
    """The .npz itself, by its arrays, or a folder with it under its own name."""
    if path.is_dir():
        return (path / FILE).is_file()
    if path.suffix.lower() != ".npz" or not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as content:
        return {"imgs.npy", "latents_classes.npy"} <= set(content.namelist())


def sets(path: Path, every: Every = ALL) -> Sets:
    """The original's images and factors. Its entry `metadata` is a pickle, which could run code: it is never read."""
    file = path / FILE if path.is_dir() else path
    return {"all": lambda: _original(file, every)}


def generated(every: Every = ALL) -> Sets:
    """The images that sprites.py draws, in the same order and with the same factors."""
    places, factors = thinned(NAMES, SIZES, every)
    classes = np.stack(np.unravel_index(places, SIZES), 1)
    return {"all": lambda: Raw(Sprites(classes), None, "dsprites-generated", factors)}


def _original(path: Path, every: Every) -> Raw:
    try:
        with zipfile.ZipFile(path) as content:
            unpacked = content.getinfo("imgs.npy").file_size
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: cannot be read, damaged or cut short ({error}); download it again") from error
    check_memory(unpacked, str(path), "use dsprites-generated, which is drawn as it is needed")
    images, classes = arrays.read(path, "imgs"), arrays.read(path, "latents_classes")
    if images.ndim != 3 or images.dtype != np.uint8:
        raise DataError(f"{path} [imgs]: {images.dtype}, shape {images.shape}; expected uint8, (N, 64, 64)")
    if classes.shape != (len(images), 1 + len(NAMES)) or classes.dtype.kind not in "iu":
        raise DataError(
            f"{path} [latents_classes]: {classes.dtype}, shape {classes.shape}; expected whole numbers, "
            f"({len(images)}, {1 + len(NAMES)}): color and {', '.join(NAMES)}"
        )
    return gridded(images, classes[:, 1:], str(path), every)


def gridded(images: np.ndarray, classes: np.ndarray, origin: str, every: Every = ALL) -> Raw:
    """Images (N, ...) and their classes (N, 5), which must be those of a whole grid in its order."""
    sizes = tuple(int(size) for size in classes.max(0) + 1)
    if classes.min() < 0 or np.prod(sizes) != len(images):
        raise DataError(f"{origin}: {len(images)} images; expected {np.prod(sizes)}, each of {sizes} classes once")
    place = np.ravel_multi_index(tuple(classes.T), sizes)
    if not np.array_equal(place, np.arange(len(images))):
        wrong = int((place != np.arange(len(images))).argmax())
        raise DataError(
            f"{origin}: image {wrong} has the classes {classes[wrong].tolist()}; expected the order of the grid "
            f"{sizes}, the last factor varying fastest"
        )
    places, factors = thinned(NAMES, sizes, every)
    return Raw(images if every == ALL else images[places], None, origin, factors)

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
from .checks import DataError, Factors, Raw
from .memory import check_memory
from .splits import Sets
from .sprites import NAMES, SIZES, Sprites

FILE = "dsprites_ndarray_co1sh3sc6or40x32y32_64x64.npz"
Every = tuple[int, int, int, int, int]
ALL: Every = (1, 1, 1, 1, 1)


def parse_every(text: str) -> Every:
    """(1, 1, 4, 4, 4) from "4", which leaves shapes and scales alone, or five numbers from "1,2,4,4,4"."""
    words = text.split(",")
    numbers = tuple(int(word) if word.strip().isdecimal() else 0 for word in words)
    if len(numbers) == 1:
        numbers = (1, 1, *numbers * 3)
    if len(numbers) != len(SIZES) or any(not 1 <= n <= size for n, size in zip(numbers, SIZES, strict=True)):
        raise DataError(
            f"every is {text!r}; expected one number, of orientations and positions, or five, of {', '.join(NAMES)}, "
            f"each from 1 to {', '.join(map(str, SIZES))}"
        )
    return numbers[0], numbers[1], numbers[2], numbers[3], numbers[4]


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
    grid, sizes = _grid(SIZES, every)
    classes = np.stack(np.unravel_index(grid, SIZES), 1)
    factors = Factors(_renumbered(classes, every), NAMES, sizes)
    return {"all": lambda: Raw(Sprites(classes), None, "dsprites-generated", factors)}


def _grid(sizes: tuple[int, ...], every: Every) -> tuple[np.ndarray, tuple[int, ...]]:
    """Indices in the whole grid of what `every` keeps, and the sizes of that."""
    kept = np.arange(np.prod(sizes)).reshape(sizes)[tuple(slice(None, None, step) for step in every)]
    return kept.ravel(), kept.shape


def _renumbered(classes: np.ndarray, every: Every) -> np.ndarray:
    return np.ascontiguousarray(classes // np.array(every), np.int64)


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
    grid, kept_sizes = _grid(sizes, every)
    if every != ALL:
        images, classes = images[grid], classes[grid]
    return Raw(images, None, origin, Factors(_renumbered(classes, every), NAMES, kept_sizes))

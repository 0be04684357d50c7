"""Omniglot (Lake et al., 2015), 28 by 28, the ink 1: as Burda et al. (2016) distribute it, or from the original images.

chardata.mat: 24,345 train and 8,070 test images, grey; an image is a column of 784 values, column by column. The
original: images_background (19,280, here train) and images_evaluation (13,180, here test), 105 by 105, ink black;
inverted and resized with Pillow's antialiased bicubic filter; labels are characters, numbered over both, of which those
of images_background come first. The two are not the same split: the tables of the
literature, and of the MR-VAE paper's set-up, are of chardata.mat. Those train with binarize="dynamic" and test on one
draw, "fixed", of a seed; `mrvae train --binarize dynamic` does so.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np

from . import folder
from .archive import Archive, beside
from .checks import DataError, Raw
from .matlab import read_mat
from .splits import Sets

CHARDATA = "chardata.mat"
IMAGES = {"train": "images_background", "test": "images_evaluation"}
SIDE = 28


def found(path: Path) -> bool:
    if path.is_file():
        return path.name == CHARDATA
    return (path / CHARDATA).is_file() or any(beside(path, name) for name in IMAGES.values())


def sets(path: Path, resize: int | tuple[int, int] | None = None) -> Sets:
    """Train and test of chardata.mat (a file, or in a folder), else of the folders of images or their zips."""
    chardata = path if path.is_file() else path / CHARDATA
    if chardata.is_file():
        if resize is not None:
            raise DataError(f"{chardata}: resize={resize} is for image files; this file holds {SIDE} by {SIDE} arrays")
        return {
            "train": partial(_of_chardata, chardata, "data", "target"),
            "test": partial(_of_chardata, chardata, "testdata", "testtarget"),
        }
    places: list[Path] = []
    for name in IMAGES.values():
        place = beside(path, name)
        if place is None:
            raise DataError(f"{path}: {name} not there; expected {' and '.join(IMAGES.values())}, or their .zip")
        places.append(place)
    return {split: partial(_of_images, places[: i + 1], resize) for i, split in enumerate(IMAGES)}


def _of_chardata(path: Path, key: str, label_key: str) -> Raw:
    content = read_mat(path, (key,), (label_key,))
    columns = content[key]
    if columns.ndim != 2 or columns.shape[0] != SIDE * SIDE or columns.dtype.kind not in "fub":
        raise DataError(
            f"{path} [{key}]: {columns.dtype}, shape {columns.shape}; expected numbers in [0, 1], ({SIDE * SIDE}, N)"
        )
    images = columns.T.reshape(-1, SIDE, SIDE).transpose(0, 2, 1)
    one_hot = content.get(label_key)  # (50, N): the alphabet
    labels = None if one_hot is None or one_hot.shape[1:] != columns.shape[1:] else one_hot.argmax(0)
    return Raw(images, labels, f"{path} [{key}]")


def _of_images(places: list[Path], resize: int | tuple[int, int] | None) -> Raw:
    """The images of the last place; no character of one place is in another, so its numbers go on from theirs."""
    *before, place = places
    archive = Archive(place)
    files = archive.files
    if not files:
        raise DataError(f"{place}: no images; expected alphabet/character/name.png: download it again")
    ink_black = folder.decode(archive.encoded(files), SIDE if resize is None else resize)
    if ink_black.ndim != 3:
        raise DataError(f"{place}: images with colour; expected black on white: are these Omniglot's images?")
    first = sum(len({file.parent for file in Archive(other).files}) for other in before)
    characters = [str(file.parent) for file in files]
    numbers = {name: number for number, name in enumerate(sorted(set(characters)), first)}
    return Raw(255 - ink_black, np.array([numbers[name] for name in characters]), str(place))

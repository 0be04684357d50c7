"""Public sets by name, through Hugging Face `datasets`."""

from __future__ import annotations

import io
from functools import partial
from typing import Any

import numpy as np

from . import celeba, dsprites, folder
from .checks import DataError, Raw
from .grid import Every
from .splits import NAMES, Sets

SPRITE_COLUMNS = ("label_shape", "label_scale", "label_orientation", "label_x_position", "label_y_position")


def sets(name: str, resize: int | tuple[int, int] | None, **decoding: Any) -> Sets:
    """The train, validation and test sets of "NAME" or "NAME:CONFIG"; other splits of it are left out.

    Colour and size are the same in all three. decoding: `crop` and `filter` of folder.decode.
    """
    loaded = _loaded(name)
    found: dict[str, tuple[Any, str]] = {}
    for word, split in NAMES.items():
        if word in loaded and split not in found:
            found[split] = (loaded[word], f"hf:{name} [{word}]")
    if not found:
        raise DataError(f"hf:{name}: its splits are {', '.join(loaded)}; expected train, validation or test among them")
    return {split: partial(_raw, found, split, resize, decoding) for split in found}


def faces(name: str, resize: int | tuple[int, int] | None) -> Sets:
    """CelebA as celeba.py has it, of a repository that holds the aligned images whole."""
    side = celeba.SIDE if resize is None else resize
    return sets(name, side, crop=celeba.CROP, filter="BILINEAR")


def sprites(name: str, resize: int | tuple[int, int] | None, every: Every = dsprites.ALL) -> Sets:
    """dSprites with the classes of its factors as columns, put into the order of the grid."""
    if resize is not None:
        raise DataError(f"resize={resize} would blur hf:{name}, whose images are 0 and 1: leave it out")
    rows, origin = _loaded(name)["train"], f"hf:{name} [train]"

    def read() -> Raw:
        missing = [column for column in SPRITE_COLUMNS if column not in rows.features]
        if missing:
            raise DataError(f"{origin}: has no column {missing[0]}; expected {', '.join(SPRITE_COLUMNS)}")
        classes = np.stack([np.asarray(rows[column], np.int64) for column in SPRITE_COLUMNS], 1)
        order = np.lexsort(classes.T[::-1])
        images = _raw({"all": (rows, origin)}, "all", None, {}).images > 0
        return dsprites.gridded(images[order].view(np.uint8), classes[order], origin, every)

    return {"all": read}


def _loaded(name: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise DataError(
            f"hf:{name} needs the package datasets, which is not installed: run `pip install datasets`, or put the "
            "images in a folder or an .npz file and give its path"
        ) from None
    repository, _, config = name.partition(":")
    arguments = f"'{repository}'" + (f", '{config}'" if config else "")
    try:
        return datasets.load_dataset(repository, config or None)
    except Exception as error:  # network, hub, cache and parser each raise classes of their own
        raise DataError(
            f"hf:{name} could not be loaded ({type(error).__name__}: {error}). Check the name and the network. For a "
            f'machine without one: run `python -c "import datasets; datasets.load_dataset({arguments})"` on a '
            "connected machine and copy its folder ~/.cache/huggingface here (or to the path in HF_HOME); or put the "
            "images in a folder or an .npz file and give its path"
        ) from error


def _raw(
    found: dict[str, tuple[Any, str]], split: str, resize: int | tuple[int, int] | None, decoding: dict[str, Any]
) -> Raw:
    """One of the splits `found`, of which each is its rows and what errors call them."""
    rows, origin = found[split]
    files = _encoded(rows, origin)
    if len(rows) == 0:
        raise DataError(f"{origin}: the set is empty; expected at least one image")
    others = [_encoded(*other) for name, other in found.items() if name != split]
    images = folder.decode(files, resize, others=others, **decoding)
    label = _column(rows, "ClassLabel")
    return Raw(images, None if label is None else np.asarray(rows[label]), origin)


def _column(rows: Any, kind: str) -> str | None:
    """The first column of this type."""
    return next((column for column, feature in rows.features.items() if type(feature).__name__ == kind), None)


def _encoded(rows: Any, origin: str) -> folder.Encoded:
    image = _column(rows, "Image")
    if image is None:
        kinds = {column: type(feature).__name__ for column, feature in rows.features.items()}
        raise DataError(f"{origin}: its columns are {kinds}; expected one of type Image")
    # As files in memory, not decoded: sizes are compared from the headers first.
    cells = rows.select_columns([image]).cast_column(image, type(rows.features[image])(decode=False))
    names = [f"{origin} row {i}" for i in range(len(rows))]
    return folder.Encoded(names, lambda i: _open(cells[i][image]))


def _open(cell: dict[str, Any]) -> Any:
    from PIL import Image

    return Image.open(cell["path"] if cell["bytes"] is None else io.BytesIO(cell["bytes"]))

"""Public sets by name, through Hugging Face `datasets`."""

from __future__ import annotations

import io
from typing import Any

import numpy as np

from . import folder
from .checks import DataError, Raw
from .splits import NAMES, Sets


def sets(name: str, resize: int | tuple[int, int] | None) -> Sets:
    """The train, validation and test sets of "NAME" or "NAME:CONFIG"; other splits of it are left out."""
    try:
        import datasets
    except ImportError:
        raise DataError(
            f"hf:{name} needs the package datasets, which is not installed: run `pip install datasets`, or put the "
            "images in a folder or an .npz file and give its path"
        ) from None
    repository, _, config = name.partition(":")
    try:
        loaded = datasets.load_dataset(repository, config or None)
    except Exception as error:  # network, hub, cache and parser each raise classes of their own
        raise DataError(
            f"hf:{name} could not be loaded ({type(error).__name__}: {error}). Check the name and the network. For a "
            f"machine without one: run `python -c \"import datasets; datasets.load_dataset('{repository}')\"` on a "
            "connected machine and copy its folder ~/.cache/huggingface here (or to the path in HF_HOME); or put the "
            "images in a folder or an .npz file and give its path"
        ) from error
    found: Sets = {}
    for word, split in NAMES.items():
        if word in loaded and split not in found:
            found[split] = lambda rows=loaded[word], origin=f"hf:{name} [{word}]": _raw(rows, origin, resize)  # type: ignore[misc]
    if not found:
        raise DataError(f"hf:{name}: its splits are {', '.join(loaded)}; expected train, validation or test among them")
    return found


def _raw(rows: Any, origin: str, resize: int | tuple[int, int] | None) -> Raw:
    kinds = {column: type(feature).__name__ for column, feature in rows.features.items()}
    image = next((column for column, kind in kinds.items() if kind == "Image"), None)
    if image is None:
        raise DataError(f"{origin}: its columns are {kinds}; expected one of type Image")
    if len(rows) == 0:
        raise DataError(f"{origin}: the set is empty; expected at least one image")
    label = next((column for column, kind in kinds.items() if kind == "ClassLabel"), None)
    # As files in memory, not decoded: sizes are compared from the headers first.
    encoded = rows.select_columns([image]).cast_column(image, type(rows.features[image])(decode=False))
    names = [f"{origin} row {i}" for i in range(len(rows))]
    images = folder.decode(names, lambda i: _open(encoded[i][image]), resize)
    return Raw(images, None if label is None else np.asarray(rows[label]), origin)


def _open(cell: dict[str, Any]) -> Any:
    from PIL import Image

    return Image.open(cell["path"] if cell["bytes"] is None else io.BytesIO(cell["bytes"]))

"""Folders of image files, and the decoding of images."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .checks import DataError, Raw
from .memory import check_memory
from .splits import NAMES, Sets

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".pgm", ".ppm"}
GREY = {"1", "L", "LA"}


def sets(root: Path, resize: int | tuple[int, int] | None) -> Sets:
    """Sub-folders named train, validation (valid, val) and test are the sets; without them all images are one set."""
    found: Sets = {}
    for child in sorted(root.iterdir()):
        split = NAMES.get(child.name.lower())
        if child.is_dir() and split:
            found[split] = lambda child=child: _raw(child, resize)  # type: ignore[misc]
    return found or {"all": lambda: _raw(root, resize)}


def _raw(root: Path, resize: int | tuple[int, int] | None) -> Raw:
    files = sorted(
        path
        for path in root.rglob("*")
        if path.suffix.lower() in SUFFIXES and path.is_file() and not path.name.startswith(".")
    )
    if not files:
        raise DataError(
            f"{root}: no images; expected files ending in {', '.join(sorted(SUFFIXES))}, or IDX files "
            "(train-images-idx3-ubyte.gz); for .npz and .npy give the file itself"
        )
    images = decode([str(file) for file in files], lambda i: opened(files[i]), resize)
    classes = [file.relative_to(root).parts[0] if file.parent != root else "" for file in files]
    names = sorted(set(classes))
    labels = None if "" in names else np.array([names.index(name) for name in classes])
    return Raw(images, labels, str(root))


def opened(path: Path) -> Any:
    """A file as a PIL image, not decoded yet."""
    from PIL import Image

    return Image.open(path)


def decode(
    names: Sequence[str],
    opened: Callable[[int], Any],
    resize: int | tuple[int, int] | None,
    crop: int | None = None,
    filter: str = "BICUBIC",
) -> np.ndarray:
    """uint8 images (N, H, W), all grey, or (N, H, W, 3); `opened(i)` gives the i-th as a PIL image, `names` names it.

    crop: only the middle square of this side is taken, before `filter` of Pillow's (antialiased) resizes.

    Where any image has colour, all become RGB; transparency is dropped. Sizes are compared from the headers, before
    anything is decoded. Raises DataError for sizes that differ without `resize`, for an image smaller than `crop`, for
    a file that cannot be decoded, and where memory would run out.
    """
    from PIL import Image

    size = _target(resize)
    colour = False
    for i, name in enumerate(names):
        with _naming(name), opened(i) as image:
            if image.mode.startswith(("I", "F")):
                raise DataError(f"{name}: pixels of mode {image.mode}; expected 8 bits a channel: convert the image")
            colour = colour or image.mode not in GREY
            if crop is not None and min(image.size) < crop:
                raise DataError(
                    f"{name}: {image.size[0]}x{image.size[1]} pixels; expected at least {crop}x{crop}, of which the "
                    "middle is taken: are these the original images?"
                )
            if size is None:
                size = image.size if crop is None else (crop, crop)
            if resize is None and crop is None and image.size != size:
                raise DataError(
                    f"{name}: {image.size[0]}x{image.size[1]} pixels, and {names[0]} has {size[0]}x{size[1]}; expected "
                    "one size for all: pass --resize SIDE, in Python resize=SIDE or resize=(HEIGHT, WIDTH)"
                )
    assert size is not None
    shape = (len(names), size[1], size[0]) + ((3,) if colour else ())
    check_memory(math.prod(shape), f"{len(names)} images, {names[0]} and so on", "resize them to a smaller side")
    images = np.empty(shape, np.uint8)
    for i, name in enumerate(names):
        with _naming(name), opened(i) as image:
            pixels = image.convert("RGB" if colour else "L")
            if crop is not None:
                left, top = (round((side - crop) / 2) for side in pixels.size)
                pixels = pixels.crop((left, top, left + crop, top + crop))
            images[i] = pixels if pixels.size == size else pixels.resize(size, Image.Resampling[filter])
    return images


def resized(images: np.ndarray, resize: int | tuple[int, int], filter: str = "BICUBIC") -> np.ndarray:
    """Grey uint8 images (..., H, W) at another size, by one of Pillow's (antialiased) filters."""
    from PIL import Image

    height, width = height_and_width(resize)
    made = np.empty((math.prod(images.shape[:-2]), height, width), np.uint8)
    for i, image in enumerate(images.reshape(-1, *images.shape[-2:])):
        made[i] = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling[filter]))
    return made.reshape(*images.shape[:-2], height, width)


def height_and_width(resize: int | tuple[int, int]) -> tuple[int, int]:
    """Of a side, or of both; DataError for less than a pixel."""
    height, width = (resize, resize) if isinstance(resize, int) else resize
    if height < 1 or width < 1:
        raise DataError(f"resize is {resize}; expected a side, or (height, width), of at least 1 pixel")
    return height, width


def _target(resize: int | tuple[int, int] | None) -> tuple[int, int] | None:
    """(width, height), as PIL has it."""
    if resize is None:
        return None
    height, width = height_and_width(resize)
    return width, height


class _naming:
    """Turns whatever a decoder raises into a DataError that names the file; decoders have no common error class."""

    def __init__(self, name: str):
        self.name = name

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if isinstance(error, Exception) and not isinstance(error, DataError):
            raise DataError(
                f"{self.name}: cannot be decoded ({error}); expected a whole image file: repair or remove it"
            ) from error

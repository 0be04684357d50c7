"""Folders of image files, and the decoding of images."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import numpy as np

from .checks import DataError, Raw
from .memory import check_memory
from .splits import NAMES, Sets

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".pgm", ".ppm"}
GREY = {"1", "L", "LA"}
ORIENTATION = 0x112
TURNS = {
    2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE", 6: "ROTATE_270", 7: "TRANSVERSE", 8: "ROTATE_90",
}  # fmt: skip
"""What brings an image of this EXIF orientation upright, of Pillow's transpositions; from 5 on they swap the sides.

Not by ImageOps.exif_transpose: that writes the EXIF anew, and fails where any other tag of it is damaged.
"""


class Encoded(NamedTuple):
    """Image files that are not decoded yet: opened(i) is the i-th as a PIL image, names[i] what errors call it."""

    names: Sequence[str]
    opened: Callable[[int], Any]


def sets(root: Path, resize: int | tuple[int, int] | None) -> Sets:
    """Sub-folders named train, validation (valid, val) and test are the sets; without them all images are one set.

    Labels number the folders in a set, in the alphabetical order of those of all sets; None where images lie in the
    set's folder itself. Colour and size are the same in all sets, too; see `decode`.
    """
    parts = parts_of(root)
    return {split: partial(_raw, parts, split, resize) for split in parts}


def parts_of(root: Path) -> dict[str, Path]:
    """The sub-folders called as splits, by split; {"all": root} where there is none. DataError for two of one split."""
    found: dict[str, Path] = {}
    for child in sorted(root.iterdir()):
        split = NAMES.get(child.name.lower())
        if split is None or not child.is_dir():
            continue
        if split in found:
            raise DataError(f"{child} and {found[split]} are both the {split} set; expected one folder a split")
        found[split] = child
    return found or {"all": root}


def image_files(root: Path) -> list[Path]:
    """Those anywhere in a folder, sorted."""
    return sorted(path for path in root.rglob("*") if is_image(path.relative_to(root)) and path.is_file())


def is_image(path: PurePath) -> bool:
    """By the end of its name. What is hidden, such as .ipynb_checkpoints, and what a Mac adds to a zip, is none.

    path: relative to the root of the set, which may lie in a hidden folder.
    """
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in path.parts)
    return path.suffix.lower() in SUFFIXES and not hidden


def _raw(parts: dict[str, Path], split: str, resize: int | tuple[int, int] | None) -> Raw:
    files = {name: image_files(part) for name, part in parts.items()}
    if not files[split]:
        raise DataError(
            f"{parts[split]}: no images; expected files ending in {', '.join(sorted(SUFFIXES))}, or IDX files "
            "(train-images-idx3-ubyte.gz); for .npz and .npy give the file itself"
        )
    others = [encoded(some) for name, some in files.items() if name != split]
    images = decode(encoded(files[split]), resize, others=others)
    classes = {name: [_class(file, parts[name]) for file in some] for name, some in files.items()}
    return Raw(images, _labels(classes, split), str(parts[split]))


def _class(file: Path, part: Path) -> str:
    """The folder below the split's that an image lies in; "" for none."""
    return "" if file.parent == part else file.relative_to(part).parts[0]


def _labels(classes: dict[str, list[str]], split: str) -> np.ndarray | None:
    """Classes as numbers, in alphabetical order of all that occur in any of the splits: one has the same in each."""
    if "" in classes[split]:
        return None
    names = sorted({name for some in classes.values() if "" not in some for name in some})
    numbers = {name: number for number, name in enumerate(names)}
    return np.array([numbers[name] for name in classes[split]])


def encoded(files: Sequence[Path]) -> Encoded:
    from PIL import Image

    return Encoded([str(file) for file in files], lambda i: Image.open(files[i]))


def decode(
    files: Encoded,
    resize: int | tuple[int, int] | None,
    crop: int | None = None,
    filter: str = "BICUBIC",
    others: Sequence[Encoded] = (),
) -> np.ndarray:
    """uint8 images (N, H, W), all grey, or (N, H, W, 3), each as a viewer shows it on a white page.

        turned by its EXIF orientation, then c = (a v + (255 - a) 255) / 255, rounded      v its value, a its alpha

    crop: only the middle square of this side is taken, before `filter` of Pillow's (antialiased) resizes. others: the
    images of the other splits, which are to have the same shape.

    Where any image has colour, of `others` too, all become RGB. Colour and sizes are compared from the headers, before
    anything is decoded, and an EXIF behind the pixels, as a PNG may have it, is not read. Raises DataError for sizes
    that differ without `resize`, for an image smaller than `crop`, for a file that cannot be decoded, and where memory
    would run out.
    """
    from PIL import Image

    colour, size = _form(files, others, resize, crop)
    names = files.names
    shape = (len(names), size[1], size[0]) + ((3,) if colour else ())
    check_memory(math.prod(shape), f"{len(names)} images, {names[0]} and so on", "resize them to a smaller side")
    images = np.empty(shape, np.uint8)
    for i, name in enumerate(names):
        with _naming(name), files.opened(i) as image:
            turn = TURNS.get(_orientation(image))
            pixels = _on_white(image, "RGB" if colour else "L")
            if turn is not None:
                pixels = pixels.transpose(Image.Transpose[turn])
            if crop is not None:
                left, top = (round((side - crop) / 2) for side in pixels.size)
                pixels = pixels.crop((left, top, left + crop, top + crop))
            images[i] = pixels if pixels.size == size else pixels.resize(size, Image.Resampling[filter])
    return images


def _form(
    files: Encoded, others: Sequence[Encoded], resize: int | tuple[int, int] | None, crop: int | None
) -> tuple[bool, tuple[int, int]]:
    """Whether the images become RGB, and their (width, height), from the headers; DataError as `decode` says."""
    colour, size = False, _target(resize)
    if size is None and crop is not None:
        size = (crop, crop)
    any_size = size is not None
    for part in (files, *others):
        for i, name in enumerate(part.names):
            if part is not files and colour and any_size:
                break  # the others decide nothing any more
            with _naming(name), part.opened(i) as image:
                if image.mode.startswith(("I", "F")):
                    raise DataError(
                        f"{name}: pixels of mode {image.mode}; expected 8 bits a channel: convert the image"
                    )
                colour = colour or image.mode not in GREY
                width, height = image.size[::-1] if _orientation(image) >= 5 else image.size
            if crop is not None and min(width, height) < crop:
                raise DataError(
                    f"{name}: {width}x{height} pixels; expected at least {crop}x{crop}, of which the middle is taken: "
                    "are these the original images?"
                )
            size = size or (width, height)
            if not any_size and (width, height) != size:
                raise DataError(
                    f"{name}: {width}x{height} pixels, and {files.names[0]} has {size[0]}x{size[1]}; expected one size "
                    "for all: pass --resize SIDE, in Python resize=SIDE or resize=(HEIGHT, WIDTH)"
                )
    assert size is not None
    return colour, size


def _orientation(image: Any) -> int:
    """1 to 8, as EXIF has it, of an image that is not decoded yet; 1, upright, where it has none."""
    from PIL import Image

    if image.format == "TIFF":  # Pillow turns it itself, and has its size upright
        return 1
    try:
        # not the PNG's own getexif(), which decodes the whole file where its header has none
        found = Image.Image.getexif(image).get(ORIENTATION)
    except Exception:  # a damaged EXIF raises whatever its bytes lead to, and the pixels can be whole
        return 1
    return found if found in TURNS else 1


def _on_white(image: Any, mode: str) -> Any:
    """An image in the mode "RGB" or "L", what is transparent being white; opaque pixels keep their values."""
    from PIL import Image

    if not image.has_transparency_data:
        return image.convert(mode)
    page = Image.new("RGBA", image.size, "white")
    page.alpha_composite(image.convert("RGBA"))
    return page.convert(mode)


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

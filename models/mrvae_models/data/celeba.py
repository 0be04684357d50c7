"""CelebA, aligned and cropped (Liu et al., 2015), at 64 by 64.

The middle 148 by 148 pixels of each 178 by 218 image (15 columns off on the left and right, 35 rows at the top and the
bottom), resized to 64 by 64 with Pillow's antialiased bilinear filter: torchvision's CenterCrop(148) and Resize(64), as
the papers on 64 by 64 faces have it. Parts by list_eval_partition.txt: 162,770 train, 19,867 validation, 19,962 test.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from . import folder
from .archive import Archive, beside
from .checks import DataError, Raw
from .splits import SPLITS, Sets

IMAGES = "img_align_celeba"
PARTITION = "list_eval_partition.txt"
CROP, SIDE = 148, 64


def found(path: Path) -> bool:
    return path.is_dir() and beside(path, IMAGES) is not None


def sets(path: Path, resize: int | tuple[int, int] | None = None) -> Sets:
    """The three parts of a folder that holds img_align_celeba, or its .zip, and list_eval_partition.txt."""
    images = beside(path, IMAGES)
    if images is None or not (path / PARTITION).is_file():
        missing = IMAGES if images is None else PARTITION
        raise DataError(f"{path}: {missing} not there; expected {IMAGES}, or its .zip, and {PARTITION}")
    return {split: partial(_raw, path, images, split, resize) for split in SPLITS}


def _raw(root: Path, images: Path, split: str, resize: int | tuple[int, int] | None) -> Raw:
    wanted = read_partition(root / PARTITION)[split]
    archive = Archive(images)
    by_name = {file.name: file for file in archive.files}
    missing = [name for name in wanted if name not in by_name]
    if missing:
        raise DataError(
            f"{images}: {missing[0]} and {len(missing) - 1} more images of {split} are not there; expected all that "
            f"{PARTITION} names: download or unpack it again"
        )
    files = [by_name[name] for name in wanted]
    pixels = folder.decode(
        archive.encoded(files),
        SIDE if resize is None else resize,
        crop=CROP,
        filter="BILINEAR",
        others=[archive.encoded(archive.files)],  # of all parts
    )
    return Raw(pixels, None, f"{images} [{split}]")


def read_partition(path: Path) -> dict[str, list[str]]:
    """Split -> names of its images, from lines such as "000001.jpg 0"; 0 train, 1 validation, 2 test."""
    parts: dict[str, list[str]] = {split: [] for split in SPLITS}
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        words = line.split()
        if not words:
            continue
        if len(words) != 2 or words[1] not in ("0", "1", "2"):
            raise DataError(f"{path}: line {number} is {line!r}; expected an image's name and 0, 1 or 2")
        parts[SPLITS[int(words[1])]].append(words[0])
    empty = [split for split, names in parts.items() if not names]
    if empty:
        raise DataError(f"{path}: names no image of {', '.join(empty)}; expected some of each: download it again")
    return parts

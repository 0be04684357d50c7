"""Videos as folders of frames: a folder a clip, its frames image files with a number at the end of their names.

    ROOT/train/.../CLIP/0.png, 1.png, ...      ROOT/test/...        sub-folders train, validation, test are the splits

Frames are in the order of their numbers, of which none may be left out. Clips of several lengths are cut to the
shortest's, their first frames being kept.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

from . import folder
from .checks import DataError, Raw
from .splits import NAMES, Sets


def sets(root: Path, resize: int | tuple[int, int] | None = None) -> Sets:
    """The sets of a folder; one undivided set where it has no sub-folders called as splits."""
    found = {
        split: partial(_raw, child, resize)
        for child in sorted(root.iterdir())
        if child.is_dir() and (split := NAMES.get(child.name.lower()))
    }
    return dict(found) or {"all": partial(_raw, root, resize)}


def _raw(root: Path, resize: int | tuple[int, int] | None) -> Raw:
    clips = [clip for _, clip in sorted(clips_of(root).items())]
    if not clips:
        raise DataError(f"{root}: no frames; expected a folder for each clip, with images 0.png, 1.png and so on")
    length = min(map(len, clips))
    files = [frame for clip in clips for frame in clip[:length]]
    images = folder.decode([str(file) for file in files], lambda i: folder.opened(files[i]), resize)
    layout = "NTHW" if images.ndim == 3 else "NTHWC"
    return Raw(images.reshape(len(clips), length, *images.shape[1:]), None, str(root), layout=layout)


def clips_of(root: Path) -> dict[tuple[int | str, ...], list[Path]]:
    """Each clip's frames in their order, by its folder, in which "2" is before "10"."""
    clips: dict[Path, list[Path]] = {}
    for path in root.rglob("*"):
        if path.suffix.lower() in folder.SUFFIXES and not path.name.startswith(".") and path.is_file():
            clips.setdefault(path.parent, []).append(path)
    return {_natural(clip.relative_to(root)): _in_order(clip, files) for clip, files in clips.items()}


def _natural(path: Path) -> tuple[int | str, ...]:
    """Texts and numbers in turn, so that any two of them compare."""
    return tuple(int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", path.as_posix())))


def _in_order(clip: Path, files: list[Path]) -> list[Path]:
    numbers: dict[int, Path] = {}
    for file in sorted(files):
        digits = re.search(r"(\d+)$", file.stem)
        if digits is None:
            raise DataError(f"{file}: no number at the end of its name; expected frames such as 0.png or frame_01.png")
        number = int(digits.group())
        if number in numbers:
            raise DataError(f"{file}: frame {number} a second time, beside {numbers[number].name}; keep one of them")
        numbers[number] = file
    first, last = min(numbers), max(numbers)
    missing = next((number for number in range(first, last) if number not in numbers), None)
    if missing is not None:
        raise DataError(
            f"{clip}: frame {missing} is missing from {first} to {last}; expected every one: repair or remove the clip"
        )
    return [numbers[number] for number in sorted(numbers)]

"""Videos as folders of frames: a folder a clip, its frames image files with a number at the end of their names.

    ROOT/train/.../CLIP/0.png, 1.png, ...      ROOT/test/...        sub-folders train, validation, test are the splits

Frames are in the order of their numbers, of which none may be left out. Clips of several lengths are cut to the
shortest's of their split, their first frames being kept. Colour and size are the same in all splits.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

from . import folder
from .checks import DataError, Header, Raw
from .splits import Sets


def sets(root: Path, resize: int | tuple[int, int] | None = None) -> Sets:
    """The sets of a folder; one undivided set where it has no sub-folders called as splits."""
    parts = folder.parts_of(root)
    return {split: partial(_raw, parts, split, resize) for split in parts}


def _raw(parts: dict[str, Path], split: str, resize: int | tuple[int, int] | None) -> Raw:
    clips = {name: _cut(part) for name, part in parts.items()}
    root = parts[split]
    if not clips[split]:
        raise DataError(f"{root}: no frames; expected a folder for each clip, with images 0.png, 1.png and so on")
    files = {name: folder.encoded([frame for clip in some for frame in clip]) for name, some in clips.items()}
    images = folder.decode(files.pop(split), resize, others=list(files.values()))
    layout = "NTHW" if images.ndim == 3 else "NTHWC"
    shapes = {name: (len(some), len(some[0]), *images.shape[1:]) for name, some in clips.items() if some}
    test = Header(shapes["test"], str(parts["test"]), layout) if "test" in shapes else None
    return Raw(images.reshape(shapes[split]), None, str(root), layout=layout, test=test)


def _cut(root: Path) -> list[list[Path]]:
    """The frames of the clips in order, of each as many as the shortest has."""
    clips = clips_of(root)
    length = min(map(len, clips), default=0)
    return [clip[:length] for clip in clips]


def clips_of(root: Path) -> list[list[Path]]:
    """Each clip's frames in their order; clips in the order of their folders, in which "2" is before "10"."""
    clips: dict[Path, list[Path]] = {}
    for path in folder.image_files(root):
        clips.setdefault(path.parent, []).append(path)
    return [_in_order(clip, clips[clip]) for clip in sorted(clips, key=lambda clip: _natural(clip.relative_to(root)))]


def _natural(path: Path) -> tuple[tuple[int | str, ...], str]:
    """Texts and numbers in turn, so that any two of them compare; then the name, as clip1 and clip01 are two."""
    name = path.as_posix()
    return tuple(int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", name))), name


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

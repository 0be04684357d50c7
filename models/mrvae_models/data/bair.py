"""BAIR's robot pushing set (Ebert et al., 2017): 43,264 train and 256 test clips of 30 frames, colour, 64 by 64.

    softmotion30_44k/train/traj_0_to_255.tfrecords, ...       as published: TFRecord files
    processed_data/train/traj_0_to_255/1/0.png, ...           as SVG's converter (Denton and Fergus, 2018) leaves it

A record is a clip, a tf.train.Example with the raw bytes of frame t as `t/CAMERA/encoded`. Of several cameras it is
image_aux1, as in that converter; actions and positions are not read. Other TFRecord files of that form are read, too.
All clips are held as bytes, 16 GB of train, and as many again while they are put into their order.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from . import frame_folders, tfrecord
from .checks import DataError, Header, Raw
from .memory import check_memory
from .splits import NAMES, Sets

FOLDERS = ("softmotion30_44k", "processed_data")
CAMERA = "image_aux1"
FRAME = re.compile(r"(\d+)/(.+)/encoded")


def found(path: Path) -> bool:
    """A TFRecord file, a folder of such, or one of BAIR's folders, or what holds one."""
    return path.suffix.lower() in tfrecord.SUFFIXES if path.is_file() else _root(path) is not None


def sets(path: Path, resize: int | tuple[int, int] | None = None) -> Sets:
    """The sets by sub-folders train, validation and test, or one undivided set of a file or a folder of files."""
    root = path if path.is_file() else _root(path)
    assert root is not None
    by_split = {"all": _files(root)}
    if not by_split["all"]:
        parts = [child for child in root.iterdir() if child.is_dir() and child.name.lower() in NAMES]
        by_split = {NAMES[part.name.lower()]: files for part in parts if (files := _files(part))}
    if not by_split:
        return frame_folders.sets(root, resize)
    if resize is not None:
        raise DataError(f"resize={resize} is for image files, and {path} holds TFRecord files: leave it out")
    return {split: partial(_raw, files, by_split.get("test", ())) for split, files in by_split.items()}


def _root(path: Path) -> Path | None:
    """The folder itself, or the one of FOLDERS in it, that holds TFRecord files or BAIR's folders of frames."""
    for root in (path, *(path / name for name in FOLDERS)):
        if not root.is_dir():
            continue
        parts = [child for child in root.iterdir() if child.is_dir() and child.name.lower() in NAMES]
        if _files(root) or any(_files(part) or any(part.glob("traj_*")) for part in parts):
            return root
    return None


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path] if path.suffix.lower() in tfrecord.SUFFIXES else []
    return sorted(file for file in path.iterdir() if file.suffix.lower() in tfrecord.SUFFIXES and file.is_file())


def _raw(files: Sequence[Path], test: Sequence[Path]) -> Raw:
    n = sum(map(tfrecord.count, files))
    origin = f"{files[0]}{f' and {len(files) - 1} more' * (len(files) > 1)}"
    clips, row = np.empty(0, np.uint8), 0
    for file in files:
        for example in tfrecord.records(file):
            clip = _clip(example, f"{file}, clip {row}")
            if row == 0:
                check_memory(n * math.prod(clip.shape), origin, "give fewer files")
                clips = np.empty((n, *clip.shape), np.uint8)
            if clip.shape != clips.shape[1:]:
                raise DataError(f"{file}, clip {row}: shape {clip.shape}; expected {clips.shape[1:]}, as of the first")
            clips[row] = clip
            row += 1
    return Raw(clips, None, origin, layout="NTHWC" if n else None, test=_header(test))


def _header(files: Sequence[Path]) -> Header | None:
    """The shape of clips by the first one, of which all are to have the shape; None without any."""
    for file in files:
        for example in tfrecord.records(file):
            origin = f"{file}, clip 0"
            return Header((1, *_clip(example, origin).shape), origin, "NTHWC")
    return None


def _clip(example: bytes, origin: str) -> np.ndarray:
    """(T, side, side, 3) uint8."""
    try:
        features = tfrecord.byte_features(example)
    except ValueError as error:
        raise DataError(f"{origin}: no tf.train.Example: {error}; expected one a record") from error
    cameras: dict[str, dict[int, memoryview]] = {}
    for name, content in features.items():
        if match := FRAME.fullmatch(name):
            cameras.setdefault(match[2], {})[int(match[1])] = content
    camera = CAMERA if CAMERA in cameras or len(cameras) != 1 else next(iter(cameras))
    steps = cameras.get(camera, {})
    if not steps or sorted(steps) != list(range(len(steps))):
        raise DataError(
            f"{origin}: frames {', '.join(map(str, sorted(steps)[:40])) or 'of none'} of {camera}, of the features "
            f"{', '.join(sorted(features)[:6]) or 'none'}; expected 0/{CAMERA}/encoded, 1/{CAMERA}/encoded and so on"
        )
    side = math.isqrt(len(steps[0]) // 3)
    if side == 0 or any(len(content) != 3 * side * side for content in steps.values()):
        sizes = ", ".join(map(str, sorted({len(content) for content in steps.values()})[:4]))
        raise DataError(
            f"{origin}: frames of {sizes} bytes; expected 12288, the raw bytes of 64 x 64 x 3, or of another square"
        )
    pixels = np.stack([np.frombuffer(steps[t], np.uint8) for t in range(len(steps))])
    return pixels.reshape(len(steps), side, side, 3)

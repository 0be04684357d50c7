"""Moving digits: clips of digits that fly through a square and bounce off its walls, made from the embedded digits.

The stochastic moving MNIST of Denton and Fergus (2018), after Srivastava et al. (2015): frames of 64 by 64, digits
scaled to 32 by 32 (Pillow's bilinear filter), the pixels of two that overlap added and cut at 255. A digit's upper left
corner p, in pixels down and to the right, moves by its velocity v,

    p_0 ~ U{0, ..., 31}^2,  v_0 ~ U{-4, ..., 4}^2,  p_t = p_(t-1) + v_(t-1),  v_t = v_(t-1)

but where p_t < 0 or p_t > 31 along an axis, first down and then to the right, p_t becomes 0 or 31 there, and

    stochastic        v_t along this axis ~ U{1, ..., 4}, away from the wall, and along the other ~ U{-4, ..., 4}
    deterministic     v_t = -v_t along this axis

Train clips are of the train digits that load("digits") gives for the same seed, validation and test of theirs: no digit
is in two splits. Clips are drawn from the seed alone, so a seed means the same clips everywhere. What is not the
original: 6,000 digits instead of 70,000, and a fixed number of clips instead of new ones without end.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from . import arrays, folder
from .checks import DataError, Raw
from .splits import SPLITS, Sets, choose

SIDE, DIGIT = 64, 32
LAST = SIDE - DIGIT - 1
"""The greatest position: 31, one less than would fit, as in the original."""

FASTEST = 4
DIGITS_A_CLIP = 2
CLIPS, FRAMES = 2000, 20
"""Of train; validation and test have a tenth of the clips each. As bytes they take 164 MB."""

DRAWN = 64
"""Clips drawn at a time: 5 MB of frames."""


def parse_variant(text: str) -> dict[str, Any]:
    """{"stochastic": False, "clips": 500} from "deterministic,clips=500"; also "frames=30". DataError for others."""
    options: dict[str, Any] = {}
    for word in text.split(","):
        name, sign, value = word.strip().partition("=")
        if word.strip() == "deterministic":
            options["stochastic"] = False
        elif name in ("clips", "frames") and sign and value.isdecimal() and int(value) > 0:
            options[name] = int(value)
        else:
            raise DataError(
                f"{word!r} is no variant of moving-digits; expected deterministic, clips=N (of train) or frames=N, as "
                "in moving-digits:deterministic,clips=500"
            )
    return options


def sets(
    resize: int | tuple[int, int] | None = None,
    seed: int = 0,
    stochastic: bool = True,
    clips: int = CLIPS,
    frames: int = FRAMES,
) -> Sets:
    """The three sets of a seed. resize: of whole frames, after they were drawn at 64 by 64."""
    sizes = {"train": clips, "validation": max(1, clips // 10), "test": max(1, clips // 10)}
    return {split: partial(_raw, split, sizes[split], frames, stochastic, resize, seed) for split in SPLITS}


def _raw(split: str, clips: int, frames: int, stochastic: bool, resize: int | tuple[int, int] | None, seed: int) -> Raw:
    digits, kept, _ = choose(arrays.sets(arrays.DIGITS), split, seed, "digits")
    random = np.random.RandomState([seed, SPLITS.index(split)])
    which = kept[random.randint(len(kept), size=(clips, DIGITS_A_CLIP))]
    positions = trajectories(random, (clips, DIGITS_A_CLIP), frames, stochastic)
    return Raw(MovingDigits(digits.images, which, positions, resize), None, f"moving-digits [{split}]")


def trajectories(
    random: np.random.RandomState, shape: tuple[int, ...], frames: int, stochastic: bool = True
) -> np.ndarray:
    """Positions (*shape, frames, 2), int64 from 0 to 31, down and to the right."""
    p = random.randint(0, LAST + 1, (*shape, 2))
    v = random.randint(-FASTEST, FASTEST + 1, (*shape, 2))
    path = np.empty((*shape, frames, 2), np.int64)
    for t in range(frames):
        for axis in (0, 1):
            low, high = p[..., axis] < 0, p[..., axis] > LAST
            p[..., axis] = p[..., axis].clip(0, LAST)
            if stochastic:  # drawn whether there is a wall or not: what follows does not depend on it
                away, along = random.randint(1, FASTEST + 1, shape), random.randint(-FASTEST, FASTEST + 1, shape)
                v[..., axis] = np.where(low, away, np.where(high, -away, v[..., axis]))
                v[..., 1 - axis] = np.where(low | high, along, v[..., 1 - axis])
            else:
                v[..., axis] = np.where(low | high, -v[..., axis], v[..., axis])
        path[..., t, :] = p
        p = p + v
    return path


class MovingDigits:
    """The clips (N, T, 1, H, W), uint8, drawn when they are indexed by an array, and no memory before that.

    digits: (n, 28, 28) uint8; which: (N, k) indices of them; positions: (N, k, T, 2).
    """

    dtype = np.dtype(np.uint8)
    ndim = 5

    def __init__(
        self,
        digits: np.ndarray,
        which: np.ndarray,
        positions: np.ndarray,
        resize: int | tuple[int, int] | None = None,
    ):
        self.used, places = np.unique(which, return_inverse=True)
        self.digits = folder.resized(digits[self.used], DIGIT, "BILINEAR")
        self.which, self.positions, self.resize = places.reshape(which.shape), positions, resize
        height, width = (SIDE, SIDE) if resize is None else folder.height_and_width(resize)
        self.shape = (len(which), positions.shape[2], 1, height, width)

    def __len__(self) -> int:
        return len(self.which)

    def min(self) -> int:
        return 0

    def max(self) -> int:
        return 255

    def __getitem__(self, indices: Any) -> np.ndarray:
        which, positions = self.which[indices], self.positions[indices]
        clips = np.empty((len(which), *self.shape[1:]), np.uint8)
        for start in range(0, len(which), DRAWN):
            some = slice(start, start + DRAWN)
            frames = draw(self.digits, which[some], positions[some])
            clips[some, :, 0] = frames if self.resize is None else folder.resized(frames, self.resize)
        return clips


def draw(digits: np.ndarray, which: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Frames (N, T, 64, 64) uint8 of digits (n, 32, 32), the k of each clip by `which` (N, k), at (N, k, T, 2)."""
    frames = np.zeros((len(which), positions.shape[2], SIDE, SIDE), np.uint8)
    squares = np.lib.stride_tricks.sliding_window_view(frames, (DIGIT, DIGIT), (2, 3), writeable=True)
    clip, time = np.ogrid[: frames.shape[0], : frames.shape[1]]
    for k in range(which.shape[1]):
        place = (clip, time, positions[:, k, :, 0], positions[:, k, :, 1])
        below = squares[place]
        squares[place] = below + np.minimum(digits[which[:, k], None], 255 - below)
    return frames

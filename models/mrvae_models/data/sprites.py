"""dSprites' images drawn from the definition of their factors, 64 by 64, each pixel 0 or 1, no anti-aliasing.

A pixel is 1 where its centre lies in the shape. With (dx, dy) from the sprite's centre to the pixel's, in pixels, dy
downwards, scale s and orientation t,

    u = (cos t dx + sin t dy) / s,  v = (cos t dy - sin t dx) / s          the shape turns clockwise as displayed
    square    |u| <= 9 and |v| <= 9                                         area 324 s^2
    ellipse   (u / 12)^2 + (v / 7)^2 <= 1                                   area 84 pi s^2 = 263.9 s^2
    heart     (p^2 + q^2 - 1)^3 <= p^2 q^3, p = u / 10, q = -v / 10         area 366.2 s^2, point down at t = 0

Factors as in dSprites (Matthey et al., 2017), the last one varying fastest: 3 shapes (square, ellipse, heart); 6 scales
from 0.5 to 1; 40 orientations from 0 to 2 pi, both included, so that the first and the last are the same; 32 x and 32 y
positions from 0 to 1, here the centre at 16 + 32 x pixels from the left and 16 + 32 y from the top: every sprite lies
in the image as a whole, and neighbouring positions are 1.03 pixels apart.

What is not the original: the number, order and values of the factors are published, how the sprites were drawn is not.
Sizes in pixels, the ellipse's axes, the heart's outline, the pivot it turns about, the sense of turning, the range of
centres and the pixels along the edges are this module's own. Results on these images are on a data set of the same
structure and difficulty, not on dSprites; do not report them as such.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

SIDE = 64
NAMES = ("shape", "scale", "orientation", "position_x", "position_y")
SIZES = (3, 6, 40, 32, 32)
SCALES = np.linspace(0.5, 1, SIZES[1])
ORIENTATIONS = np.linspace(0, 2 * math.pi, SIZES[2])
POSITIONS = np.linspace(0, 1, SIZES[3])
MARGIN, SPAN = 16, 32
"""Pixels from the border to the outermost centres, and between those."""

DRAWN = 256
"""Images drawn at a time: 4 MB an array, which a processor's cache holds."""


def square(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.maximum(np.abs(u), np.abs(v)) <= 9


def ellipse(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return (u / 12) ** 2 + (v / 7) ** 2 <= 1


def heart(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    p, q = u * u / 100, v / -10
    excess = p + q * q - 1
    return excess * excess * excess <= p * q * q * q


SHAPES: tuple[Callable[[np.ndarray, np.ndarray], np.ndarray], ...] = (square, ellipse, heart)


def draw(shape: int, scale: np.ndarray, orientation: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(n, 64, 64) uint8 of 0 and 1: sprites of one shape (0 square, 1 ellipse, 2 heart); the others (n,), as above."""
    centres = np.arange(SIDE) + 0.5
    dx = centres - (MARGIN + SPAN * x)[:, None]
    dy = centres - (MARGIN + SPAN * y)[:, None]
    cosine, sine = (np.cos(orientation) / scale)[:, None], (np.sin(orientation) / scale)[:, None]
    # float32 halves the memory moved; what is rounded away is 1e-6 of a pixel
    u = (cosine * dx).astype(np.float32)[:, None, :] + (sine * dy).astype(np.float32)[:, :, None]
    v = (cosine * dy).astype(np.float32)[:, :, None] - (sine * dx).astype(np.float32)[:, None, :]
    return SHAPES[shape](u, v).view(np.uint8)


class Sprites:
    """The images (N, 1, 64, 64), uint8 of 0 and 1, of an array of classes (N, 5), drawn when they are indexed.

    They take no memory before that; all 737,280 would be 3.0 GB as bytes, and are 378 MB packed by storage.pack.
    """

    dtype = np.dtype(np.uint8)
    ndim = 4

    def __init__(self, classes: np.ndarray):
        self.classes = classes
        self.shape = (len(classes), 1, SIDE, SIDE)

    def __len__(self) -> int:
        return len(self.classes)

    def min(self) -> int:
        return 0

    def max(self) -> int:
        return 1

    def __getitem__(self, indices: np.ndarray) -> np.ndarray:
        classes = self.classes[indices]
        images = np.empty((len(classes), SIDE, SIDE), np.uint8)
        for shape in range(len(SHAPES)):
            rows = np.flatnonzero(classes[:, 0] == shape)
            for some in np.split(rows, range(DRAWN, len(rows), DRAWN)):
                _, scale, orientation, x, y = classes[some].T
                images[some] = draw(shape, SCALES[scale], ORIENTATIONS[orientation], POSITIONS[x], POSITIONS[y])
        return images[:, None]

"""Sets with an image for every combination of factors, in the order of a grid, the last factor varying fastest."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from .checks import DataError, Factors

Every = tuple[int, ...]
"""Of each factor every how many-th value is kept: (1, 2, 4, 4, 4) thins out a grid of five."""


def parse_every(text: str, names: Sequence[str], sizes: Sequence[int], whole: int) -> Every:
    """(1, 1, 4, 4, 4) from "4", which leaves the first `whole` factors alone, or a number each from "1,2,4,4,4"."""
    words = text.split(",")
    numbers = tuple(int(word) if word.strip().isdecimal() else 0 for word in words)
    if len(numbers) == 1:
        numbers = (1,) * whole + numbers * (len(sizes) - whole)
    if len(numbers) != len(sizes) or any(not 1 <= n <= size for n, size in zip(numbers, sizes, strict=True)):
        raise DataError(
            f"every is {text!r}; expected one number, of {', '.join(names[whole:])}, or {len(sizes)}, of "
            f"{', '.join(names)}, each from 1 to {', '.join(map(str, sizes))}"
        )
    return numbers


def thinned(names: Sequence[str], sizes: Sequence[int], every: Every) -> tuple[np.ndarray, Factors]:
    """Places in the whole grid of what `every` keeps, (N,), and their factors, which are numbered anew from 0."""
    places = np.arange(math.prod(sizes)).reshape(tuple(sizes))[tuple(slice(None, None, step) for step in every)]
    classes = np.stack(np.unravel_index(np.arange(places.size), places.shape), 1)
    return places.ravel(), Factors(np.ascontiguousarray(classes, np.int64), tuple(names), places.shape)

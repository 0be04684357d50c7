"""What data must be for a likelihood: ValueErrors that say what was found, what was expected and what to do."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import torch
from torch import Tensor

from ..data.mapped import Mapped
from ..data.storage import PACKING, Chunks, Compact, Rows, at_once
from .numerics import HIGHEST

LEVEL_TOLERANCE = 1e-3
"""Largest distance of 255 x from a whole number: 255 * (i / 255) in float32 is off by 3e-5 at most; bfloat16 has no
levels."""


def _parts(x: Rows) -> Iterator[Tensor]:
    x = getattr(x, "clips", x)  # of videos, whatever frames are taken of them
    size = at_once(x.shape[1:], PACKING)
    if isinstance(x, (Compact, Mapped)):  # bytes or bits, which cannot be anything else: a part shows which
        x = x[:: -(-len(x) // size)]
    yield from Chunks(x, size)


def _floats(x: Rows, name: str, remedy: str) -> None:
    dtype = x.dtype
    if not dtype.is_floating_point:
        first = next(_parts(x))
        raise ValueError(
            f"the data are {dtype} with values {first.min().item()} to {first.max().item()}; likelihood {name} "
            f"expected floats{remedy}: x.float() / 255 for 8-bit images, or data.load(array)"
        )


def _ends(x: Rows) -> tuple[float, float]:
    ends = torch.stack([torch.stack(part.aminmax()) for part in _parts(x)])  # a NaN comes through
    return ends[:, 0].min().item(), ends[:, 1].max().item()


def check_unit_interval(x: Rows, name: str) -> None:
    """ValueError unless x are floats in [0, 1]."""
    _floats(x, name, " in [0, 1]")
    low, high = _ends(x)
    if low >= 0 and high <= 1:
        return
    remedy = "scale them, (x - x.min()) / (x.max() - x.min()), or take a gaussian likelihood"
    if low >= 0 and high <= HIGHEST:
        remedy = "divide by 255"
    elif low >= -1 and high <= 1:
        remedy = "map them with (x + 1) / 2"
    raise ValueError(f"the data go from {low:g} to {high:g}; likelihood {name} expected values in [0, 1]: {remedy}")


def check_levels(x: Rows, name: str) -> None:
    """ValueError unless x are 256 levels, floats level / 255; a warning where there are only 0 and 1.

    Zeros and ones are two of the levels, and their probabilities are right; a Bernoulli is the same with one number.
    """
    check_unit_interval(x, name)
    between = False
    for part in _parts(x):
        scaled = part * HIGHEST
        off = (scaled - scaled.round()).abs()
        if (worst := off.max().item()) > LEVEL_TOLERANCE:
            value = part.flatten()[off.argmax()].item()
            raise ValueError(
                f"the data hold {value:.6g}, {worst:.2g} of a level from the nearest of 256; likelihood {name} is of "
                "8-bit data, expected x * 255 to be whole: give uint8 images, round them ((x * 255).round() / 255), or "
                "take a density: --likelihood gaussian-optimal, say"
            )
        between = between or bool(((part > 0) & (part < 1)).any())
    if not between:
        warnings.warn(
            f"the data hold 0 and 1 only; likelihood {name} gives each value 256 levels, where --likelihood bernoulli "
            "says the same with one number",
            stacklevel=3,
        )


def check_scaled(x: Rows, name: str) -> None:
    """ValueError unless x are finite floats that are not the numbers 0 to 255 of 8-bit images.

    A density takes any scale; but at sigma = 1 a price on the scale of 0 to 255 is 65,025 times that on [0, 1].
    """
    _floats(x, name, ", of 8-bit images in [0, 1]")
    low, high = _ends(x)
    if not (low > -torch.inf and high < torch.inf):
        raise ValueError(f"the data go from {low:g} to {high:g}; likelihood {name} expected finite numbers")
    if low >= 0 and 1 < high <= HIGHEST and all(bool((part == part.round()).all()) for part in _parts(x)):
        raise ValueError(
            f"the data are whole numbers from {low:g} to {high:g}, as of 8-bit images; likelihood {name} expected them "
            "in [0, 1], where sigma and beta mean what they do elsewhere: divide by 255"
        )

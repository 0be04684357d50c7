"""Block sizes of the matrix-product kernels: a small table by architecture, operation, precision and shape class."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from .device import architecture


class Tiles(NamedTuple):
    """A kernel's configuration: the tile computed by a program is m x n, its reduction advances by k."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


OPERATIONS = (
    "linear", "linear_input_gradient", "linear_weight_gradient", "convolution", "convolution_weight_gradient",
)
PRECISIONS = ("ieee", "tf32", "half")
"""float32 by exact products, float32 by TF32's, float16 and bfloat16."""


def precision_class(dtype: torch.dtype, input_precision: str) -> str:
    """One of PRECISIONS."""
    return "half" if dtype in (torch.float16, torch.bfloat16) else input_precision


def choose(
    operation: str, device: torch.device, precision: str, m: int, n: int, k: int,
    launch: Callable[[Tiles], object] | None = None,
) -> Tiles:
    """The tiles for a product of m x n results, each a sum of k terms.

    launch(tiles) runs the kernel once with the given tiles, for the autotuner, where the user asked for it.
    """
    del launch
    if architecture(device) == "interpreter":
        return Tiles(32, 32, 16, 4, 1)
    large = 64 if precision == "ieee" else 128
    return Tiles(large if m > 64 else 64, 64, 16 if precision == "ieee" else 32, 4, 3)

"""Short cuts to the operators for the hot path of an eager step: the same operators, without torch.ops reading arguments.

On a layer of 16 x 32 the product and its gate take 6 us through torch.ops and half as much overhead less through here; under
torch.compile they are invisible, so nothing there may use them.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ._load import require


@functools.cache
def bank(sizes: tuple[int, ...], kinds: tuple[int, ...]) -> Any:
    """The gates of a model with these slices: `.gates(weight, bias, eta)` and `.gates_at(weight, bias, eta: float)`."""
    require()
    return importlib.import_module("mrvae_kernels._C").Bank(sizes, kinds)


@functools.cache
def scaled_linear() -> Callable[[Tensor, Tensor, Tensor | None, Tensor, Tensor | None], Tensor]:
    """The function (x, weight, bias, gate, shift) -> g (x W^T + b) + t, by the epilogue strategy."""
    require()
    return importlib.import_module("mrvae_kernels._C").scaled_linear

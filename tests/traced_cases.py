"""Small gated networks for the tests of what torch.compile traces."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from helpers import randomize
from torch import Tensor, nn

import mrvae_kernels as mk

X, BETA = torch.randn(3, 4, dtype=torch.float64), torch.tensor(0.5)
EACH = torch.tensor([0.02, 0.5, 9.0])


def network(layers: int) -> nn.Sequential:
    return nn.Sequential(*(layer for _ in range(layers) for layer in (nn.Linear(4, 4), nn.ReLU()))).double()


def gated(layers: int = 2) -> mk.MultiRate:
    return randomize(mk.multirate(network(layers), "softplus"))


def compiled(call: Callable[..., Tensor]) -> Any:
    return torch.compile(call, backend="eager", fullgraph=True)

"""Networks, reference formulas and checks that several test files use."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

RANGE = (0.01, 10.0)


class ConvolutionalVAE(nn.Module):
    """An encoder and decoder of the usual layers for (N, 1, 8, 8); with_norm adds a batch norm and a group norm."""

    def __init__(self, with_norm: bool = False) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, 6, 3, 2, 1), *([nn.BatchNorm2d(6)] if with_norm else []), nn.ReLU(),
            nn.Conv2d(6, 8, 3, 2, 1, bias=False), nn.Tanh(), nn.Flatten(), nn.Linear(32, 5),
        )
        self.decoder = nn.Sequential(
            nn.Linear(5, 32), nn.ELU(), nn.Unflatten(1, (8, 2, 2)), nn.ConvTranspose2d(8, 6, 4, 2, 1),
            *([nn.GroupNorm(2, 6)] if with_norm else []), nn.ReLU(), nn.ConvTranspose2d(6, 1, 4, 2, 1),
        )

    def encode(self, x: Tensor) -> Tensor:
        return self.encoder(x)

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(z)

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x))


def rows(call: Callable[[Tensor, float], Tensor], x: Tensor, beta: Sequence[float], dim: int = 0) -> Tensor:
    """Each sample run alone, at its own beta: what one beta a sample must equal."""
    return torch.cat([call(x.narrow(dim, i, 1), float(b)) for i, b in enumerate(beta)], dim)


def subsets(count: int) -> list[tuple[bool, ...]]:
    """Every non-empty choice of which of `count` inputs need a gradient."""
    return [wanted for wanted in itertools.product((False, True), repeat=count) if any(wanted)]


def relative_error(value: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected magnitude."""
    return ((value - expected).abs().max() / expected.abs().max().clamp(min=1e-300)).item()


def randomize(module: nn.Module) -> nn.Module:
    """Shake all parameters off their initial zeros and ones, so that no test passes because a term vanishes."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module


def gradients(output: Tensor, inputs: Sequence[Tensor], grad_output: Tensor | None = None) -> tuple[Any, ...]:
    """Gradients of <output, grad_output>, grad_output a fixed pattern by default."""
    if grad_output is None:
        grad_output = torch.linspace(-1, 2, output.numel(), dtype=output.dtype).view(output.shape).cos()
    return torch.autograd.grad(output, list(inputs), grad_output)

"""Networks, reference formulas and checks that several test files use."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn

import mrvae_kernels as mk

RANGE = (0.01, 10.0)
BETA = [0.02, 0.3, 1.0, 4.0, 9.0]
"""One beta for each of the five samples of most tests."""


class ConvolutionalVAE(nn.Module):
    """An encoder and decoder of the usual layers for (N, 1, 8, 8); with_norm adds a batch norm and a group norm."""

    def __init__(self, with_norm: bool = False) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, 6, 3, 2, 1),
            *([nn.BatchNorm2d(6)] if with_norm else []),
            nn.ReLU(),
            nn.Conv2d(6, 8, 3, 2, 1, bias=False),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(32, 5),
        )
        self.decoder = nn.Sequential(
            nn.Linear(5, 32),
            nn.ELU(),
            nn.Unflatten(1, (8, 2, 2)),
            nn.ConvTranspose2d(8, 6, 4, 2, 1),
            *([nn.GroupNorm(2, 6)] if with_norm else []),
            nn.ReLU(),
            nn.ConvTranspose2d(6, 1, 4, 2, 1),
        )

    def encode(self, x: Tensor) -> Tensor:
        return self.encoder(x)

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(z)

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x))


def images(count: int = 5) -> Tensor:
    """Input of ConvolutionalVAE, always the same."""
    return torch.randn(count, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def build_network(gates: Any = None, with_norm: bool = False, **options: Any) -> mk.MultiRate:
    """A gated ConvolutionalVAE in float64, always the same, with no parameter at its initial value."""
    torch.manual_seed(0)
    model = mk.multirate(ConvolutionalVAE(with_norm).double(), gates, **options)
    randomize(model)
    return model


def parameter_gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    """The gradient of each parameter; 0 for those that the loss does not depend on."""
    parameters = list(model.parameters())
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


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


OPERATORS = {
    "linear": (mk.gated_linear, (3, 4), (5, 4), 5, {}),
    "linear, 3 axes": (mk.gated_linear, (3, 2, 4), (5, 4), 5, {}),
    "conv1d": (mk.gated_conv1d, (3, 4, 6), (4, 2, 3), 4, {"padding": 1, "groups": 2}),
    "conv2d": (mk.gated_conv2d, (3, 2, 5, 4), (3, 2, 3, 2), 3, {"stride": 2, "padding": "valid"}),
    "conv3d": (mk.gated_conv3d, (3, 1, 3, 4, 3), (2, 1, 2, 2, 2), 2, {"dilation": (1, 2, 1)}),
    "conv_transpose1d": (
        mk.gated_conv_transpose1d,
        (3, 4, 4),
        (4, 2, 3),
        4,
        {"stride": 2, "output_padding": 1, "groups": 2},
    ),
    "conv_transpose2d": (mk.gated_conv_transpose2d, (3, 2, 3, 2), (2, 3, 3, 3), 3, {"stride": 2, "padding": 1}),
    "conv_transpose3d": (mk.gated_conv_transpose3d, (3, 2, 2, 2, 2), (2, 1, 2, 2, 2), 1, {}),
}
WAYS = [("fold", False), ("epilogue", False), ("epilogue", True)]


def operands(name: str, per_sample: bool, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """x, weight, bias, gate and shift for a case of OPERATORS."""
    _, shape, weight, c, _ = OPERATORS[name]
    rows = (shape[0], c) if per_sample else (c,)
    gate = torch.rand(rows, dtype=torch.float64) + 0.2
    values = [torch.randn(shape), torch.randn(weight), torch.randn(c), gate, torch.randn(rows)]
    return [v.to(dtype).requires_grad_() for v in values]


def operate(name: str, inputs: list[Tensor], strategy: str, activation: str | None = "silu") -> Tensor:
    """The operator of this case on such operands."""
    function, *_, options = OPERATORS[name]
    return function(*inputs, **options, activation=activation, strategy=strategy)


def check_gradient_with_a_tangent(result: Tensor, leaf_of_it: Tensor, name: str) -> None:
    """A gradient with a forward-mode tangent is refused: its node would drop the tangent, or hand on a wrong one."""
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(torch.ones_like(result), torch.ones_like(result))
        with pytest.raises(NotImplementedError, match=f"forward AD with {name}.*override.backend=.reference"):
            torch.autograd.grad((result * dual).square().sum(), leaf_of_it)

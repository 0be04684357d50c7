"""Gated products, and their formulas in plain PyTorch, for the tests of their node."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from op_checks import leaf
from torch import Tensor

from mrvae_kernels import ops, reference

WAYS = [("fold", False), ("epilogue", False), ("epilogue", True)]
GEOMETRY = ([2, 1], [1, 0], [1, 1], False, [0, 0], 1)
GROUPED = ([2, 1], [1, 0], [1, 1], False, [0, 0], 3)
TRANSPOSED = ([2, 1], [1, 0], [1, 1], True, [1, 0], 1)
PRODUCTS = {
    "linear": (ops.gated_linear, reference.gated_linear, (5, 4), (3, 4), ()),
    "convolution": (ops.gated_convolution, reference.gated_convolution, (5, 4, 6, 5), (3, 4, 3, 2), GEOMETRY),
    # results large enough to be kept no more: dW tells the gates' gradients
    "large linear": (ops.gated_linear, reference.gated_linear, (1400, 4), (3, 4), ()),
    "large convolution": (ops.gated_convolution, reference.gated_convolution, (120, 4, 6, 5), (3, 4, 3, 2), GEOMETRY),
    "large grouped": (ops.gated_convolution, reference.gated_convolution, (120, 3, 6, 5), (3, 1, 3, 2), GROUPED),
    "large transposed": (ops.gated_convolution, reference.gated_convolution, (40, 4, 6, 5), (4, 3, 3, 2), TRANSPOSED),
}
LINEAR = ("linear", "large linear")


def tensors_for(product: str, per_sample: bool, shift: bool = False, dtype: torch.dtype = torch.float64) -> list:
    *_, x, weight, _ = PRODUCTS[product]
    c = weight[1] if product == "large transposed" else weight[0]
    rows = (x[0], c) if per_sample else (c,)
    values = [torch.randn(x), torch.randn(weight), torch.randn(c), torch.rand(rows) + 0.2]
    return [v.to(dtype) for v in values] + [torch.randn(rows).to(dtype) if shift else None]


def layer(product: str, activation: str, strategy: str) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """The operator, and the formula."""
    run, formula, *_, options = PRODUCTS[product]
    return (
        lambda *tensors: run(*tensors, *options, activation, strategy),
        lambda *tensors: formula(*tensors, *options, activation, "epilogue"),
    )


def grads_of(run: Callable[..., Tensor], tensors: Sequence[Tensor | None]) -> list[Tensor]:
    """The result, and the gradient of each tensor."""
    leaves = [None if t is None else leaf(t) for t in tensors]
    y = run(*leaves)
    pattern = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape).cos()
    return [y.detach().clone(), *torch.autograd.grad(y, [t for t in leaves if t is not None], pattern)]


def same(found: Sequence[Tensor], expected: Sequence[Tensor], **tolerance: float) -> None:
    for value, other in zip(found, expected, strict=True):
        torch.testing.assert_close(value, other.to(value.dtype), **tolerance or {"rtol": 1e-10, "atol": 1e-12})

"""Shapes of the fused products' results and gradients, and what they keep for the backward pass: for every backend."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

NEEDS_ARGUMENT = ("silu", "gelu")
"""Activations whose slope cannot be had from their result."""

Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""Of x, weight, bias, gate and shift."""


def fake_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor, shift: Tensor | None, activation: str, keep: bool
) -> tuple[Tensor, Tensor]:
    """Tensors like the result and what is kept."""
    y = x.new_empty((*x.shape[:-1], weight.shape[0]))
    return y, fake_kept(y, gate, activation, keep)


def fake_linear_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor, shift: Tensor | None, y: Tensor | None,
    kept: Tensor, activation: str, mask: Sequence[bool],
) -> Gradients:
    """See fake_gradients."""
    return fake_gradients(x, weight, bias, gate, shift, mask)


def fake_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor, shift: Tensor | None, stride: Sequence[int],
    padding: Sequence[int], dilation: Sequence[int], transposed: bool, output_padding: Sequence[int], groups: int,
    activation: str, keep: bool,
) -> tuple[Tensor, Tensor]:
    """As fake_linear."""
    shape = torch.ops.aten.convolution(
        x, weight, None, stride, padding, dilation, transposed, output_padding, groups
    ).shape
    # the kernels' own rule: channels_last where x is, whatever the library would choose
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    y = torch.empty(
        shape, dtype=x.dtype, device=x.device,
        memory_format=torch.channels_last if last else torch.contiguous_format,
    )
    return y, fake_kept(y, gate, activation, keep)


def fake_convolution_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor, shift: Tensor | None, y: Tensor | None,
    kept: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], transposed: bool,
    output_padding: Sequence[int], groups: int, activation: str, mask: Sequence[bool],
) -> Gradients:
    """See fake_gradients."""
    return fake_gradients(x, weight, bias, gate, shift, mask)


def fake_kept(y: Tensor, gate: Tensor, activation: str, keep: bool) -> Tensor:
    """A tensor like what backward needs beyond y: u for a gate a sample, z for SiLU and GELU, otherwise nothing."""
    if keep and (gate.dim() == 2 or activation in NEEDS_ARGUMENT):
        return torch.empty_like(y)
    return y.new_empty((0,))


def fake_gradients(
    x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor, shift: Tensor | None, mask: Sequence[bool]
) -> Gradients:
    """Like x and weight themselves, contiguous for the others; (0,) for one that is absent or unwanted."""
    dx, dw = (
        torch.empty_like(value) if wanted else value.new_empty((0,))
        for value, wanted in zip((x, weight), mask[:2], strict=True)
    )
    pairs = zip((bias, gate, shift), (weight, gate, gate), mask[2:], strict=True)
    db, dg, dt = (fake_contiguous(value if wanted else None, default) for value, default, wanted in pairs)
    return dx, dw, db, dg, dt


def fake_contiguous(value: Tensor | None, default: Tensor) -> Tensor:
    """A contiguous tensor of the value's shape and dtype; (0,) in the default's dtype where there is none."""
    return default.new_empty((0,)) if value is None else value.new_empty(value.shape)

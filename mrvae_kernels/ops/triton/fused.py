"""What the fused products share: what they keep for the backward pass, and the shapes of gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...triton_kernels.activations import NEEDS_ARGUMENT

Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""Of x, weight, bias, gate and shift."""


def fake_kept(y: Tensor, gate: Tensor, activation: str, keep: bool) -> Tensor:
    """A tensor like what backward needs beyond y: u for a gate a sample, z for SiLU and GELU, otherwise nothing."""
    if keep and (gate.dim() == 2 or activation in NEEDS_ARGUMENT):
        return torch.empty_like(y)
    return y.new_empty((0,))


def result_for_backward(y: Tensor, gate: Tensor, activation: str) -> Tensor | None:
    """y where its backward pass reads it, so that an activation that needs nothing keeps nothing."""
    needed = gate.dim() == 1 and activation != "none" and activation not in NEEDS_ARGUMENT
    return y if needed else None


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

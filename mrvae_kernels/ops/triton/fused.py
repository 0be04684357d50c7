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
    """Like the tensors themselves; (0,) for one that is absent or unwanted."""
    pairs = zip((x, weight, bias, gate, shift), (x, weight, weight, gate, gate), mask, strict=True)
    dx, dw, db, dg, dt = (
        torch.empty_like(value) if wanted and value is not None else default.new_empty((0,))
        for value, default, wanted in pairs
    )
    return dx, dw, db, dg, dt

"""What the fused products keep for the backward pass; their shapes are those of mrvae_kernels.ops.fused_shapes."""

from __future__ import annotations

from torch import Tensor

from ..fused_shapes import NEEDS_ARGUMENT


def result_for_backward(y: Tensor, gate: Tensor, activation: str) -> Tensor | None:
    """y where its backward pass reads it, so that an activation that needs nothing keeps nothing."""
    needed = gate.dim() == 1 and activation != "none" and activation not in NEEDS_ARGUMENT
    return y if needed else None

"""The gates of all layers multiplied into their weights (being written: the signature below is final)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def finish_weight_gradient(
    partial: Tensor, sums: Tensor | None, weight: Tensor, bias: Tensor | None, gate: Tensor | None, groups: int,
    mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dW, db, dg, dt) from the partial sums of dW', where W' = g W and b' = g b + t: one launch.

    partial: (splits, *weight.shape), contiguous, float32 (float64 for a float64 weight): dW' = the sum over splits, in
    their order. Memory order is that of the contiguous weight, whatever the strides of `weight` itself.
    sums: (C,), the dtype of `partial`: db' = dt, the sum of dy over everything but the channel; None counts as zeros.
    weight, bias, gate: as in `fold`; gate None stands for gates of 1, and has no gradient. groups: as in `fold`.
    mask: which of dW, db, dg, dt to compute; the others are empty, (0,).

    dW = g dW', contiguous, in the weight's dtype; db = g db', in the bias's dtype; dg = <dW', W> + db' b per channel
    and dt = db', in the gate's dtype (that of `partial` without a gate).
    """
    want_weight, want_bias, want_gate, want_shift = mask
    total = partial.sum(0)
    channels = weight.shape[0] if groups == 0 else weight.shape[1] * groups
    dt = partial.new_zeros(channels) if sums is None else sums
    dtype = partial.dtype if gate is None else gate.dtype
    g = partial.new_ones(channels) if gate is None else gate.to(partial.dtype)
    ones = [1] * (weight.dim() - 1)
    if groups == 0:
        scale = g.reshape(-1, *ones)
        product = (total * weight).reshape(channels, -1).sum(1)
    else:
        scale = g.reshape(groups, 1, -1).expand(groups, weight.shape[0] // groups, -1).flatten(0, 1)
        scale = scale.reshape(weight.shape[0], -1, *ones[1:])
        product = (total * weight).unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1).flatten(1).sum(1)
    dw = (total * scale).to(weight.dtype) if want_weight else weight.new_empty(0)
    db = (g * dt).to(bias.dtype) if want_bias and bias is not None else weight.new_empty(0)
    dg = product + (0 if bias is None else dt * bias.to(partial.dtype))
    return (
        dw, db, dg.to(dtype) if want_gate else torch.empty(0, dtype=dtype, device=weight.device),
        dt.to(dtype, copy=True) if want_shift else torch.empty(0, dtype=dtype, device=weight.device),
    )

"""torch.ops.mrvae.fold: the gates of all layers multiplied into their weights, in one operator."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._load import fake, require


def fold(
    weights: Sequence[Tensor], biases: Sequence[Tensor | None], gates: Sequence[Tensor],
    shifts: Sequence[Tensor | None], groups: Sequence[int],
) -> tuple[list[Tensor], list[Tensor]]:
    """W' = g W and b' = g b + t for every layer.

    groups: 0 where the output channel is axis 0 of the weight; the number of groups for a transposed convolution's
    weight (C_in, C_out / groups, ...). gates, biases, shifts: (C_out,). W' has the weight's dtype and strides, b' its
    dtype; b' is empty, (0,), where a layer has neither bias nor shift. Gradients: dW = g dW', db = g db', dt = db',
    dg = <dW', W> + db' b per channel, in one pass over the weights. ValueError for shapes that do not fit.
    """
    require()
    return torch.ops.mrvae.fold.default(weights, biases, gates, shifts, groups)


@fake("fold")
def fake_fold(
    weights: Sequence[Tensor], biases: Sequence[Tensor | None], gates: Sequence[Tensor],
    shifts: Sequence[Tensor | None], groups: Sequence[int],
) -> tuple[list[Tensor], list[Tensor]]:
    folded, folded_biases = [], []
    for weight, bias, gate, shift, group in zip(weights, biases, gates, shifts, groups, strict=True):
        channels = weight.shape[0] if group == 0 else weight.shape[1] * group
        for value in (gate, bias, shift):
            if value is not None:
                if value.dim() != 1:
                    raise ValueError(f"fold: got a gate, bias or shift of shape {tuple(value.shape)}; expected (C,)")
                torch._check(value.shape[0] == channels)
        folded.append(torch.empty_like(weight))
        folded_biases.append(weight.new_empty((0,) if bias is None and shift is None else (channels,)))
    return folded, folded_biases


@fake("fold_backward")
def fake_fold_backward(
    grad_weights: Sequence[Tensor | None], grad_biases: Sequence[Tensor | None], weights: Sequence[Tensor],
    biases: Sequence[Tensor | None], gates: Sequence[Tensor], shifts: Sequence[Tensor | None], groups: Sequence[int],
    mask: Sequence[bool],
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    results: tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]] = ([], [], [], [])
    for i, layer in enumerate(zip(weights, biases, gates, shifts, strict=True)):
        # what nobody asked for has the dtype of the weight (its bias) or of the gate (its shift)
        defaults = (layer[0], layer[0], layer[2], layer[2])
        for result, value, default, wanted in zip(results, layer, defaults, mask[4 * i : 4 * i + 4], strict=True):
            result.append(torch.empty_like(value) if wanted and value is not None else default.new_empty((0,)))
    return results

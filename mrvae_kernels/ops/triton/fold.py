"""torch.ops.mrvae_triton.fold: all weights and biases of a model scaled in one launch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...triton_kernels import fold as kernels
from ..fold import fake_fold, fake_fold_backward
from ..once import once_differentiable
from .define import LIBRARY, define, recording, traced

Optional = Sequence[Tensor | None]

# torch.library's autograd takes lists of tensors, not of optional ones: through the operator an empty tensor (0,)
# stands for a bias or a shift that a layer does not have


def _given(values: Sequence[Tensor]) -> list[Tensor | None]:
    return [value if value.numel() else None for value in values]


def _stand_ins(values: Optional, like: Sequence[Tensor]) -> list[Tensor]:
    return [other.new_empty((0,)) if value is None else value for value, other in zip(values, like, strict=True)]


def _fold(
    weights: Sequence[Tensor], biases: Sequence[Tensor], gates: Sequence[Tensor], shifts: Sequence[Tensor],
    groups: Sequence[int],
) -> tuple[list[Tensor], list[Tensor]]:
    return kernels.fold(weights, _given(biases), gates, _given(shifts), groups)


def _fake(
    weights: Sequence[Tensor], biases: Sequence[Tensor], gates: Sequence[Tensor], shifts: Sequence[Tensor],
    groups: Sequence[int],
) -> tuple[list[Tensor], list[Tensor]]:
    return fake_fold(weights, _given(biases), gates, _given(shifts), groups)


FOLD = define(
    "fold(Tensor[] weights, Tensor[] biases, Tensor[] gates, Tensor[] shifts, int[] groups) -> (Tensor[], Tensor[])",
    _fold, _fake, tables=True,
)
FOLD_BACKWARD = define(
    "fold_backward(Tensor?[] grad_weights, Tensor?[] grad_biases, Tensor[] weights, Tensor?[] biases, Tensor[] gates, "
    "Tensor?[] shifts, int[] groups, bool[] mask) -> (Tensor[], Tensor[], Tensor[], Tensor[])",
    kernels.fold_backward, fake_fold_backward, tables=True,
)


def fold(
    weights: Sequence[Tensor], biases: Optional, gates: Sequence[Tensor], shifts: Optional, groups: Sequence[int]
) -> tuple[list[Tensor], list[Tensor]]:
    """W' = g W and b' = g b + t for every layer, in their own dtypes; as mrvae_kernels.ops.fold.

    Also under autocast: the product that takes W' casts it, or does not, where autocast is off.
    """
    if traced():
        return FOLD(weights, _stand_ins(biases, weights), gates, _stand_ins(shifts, gates), groups)
    if recording(*weights, *biases, *gates, *shifts):
        count = len(weights)
        results = _Fold.apply(count, tuple(groups), *weights, *biases, *gates, *shifts)
        return list(results[:count]), list(results[count:])
    return kernels.fold(weights, biases, gates, shifts, groups)


def _gradients(
    ctx: Any, grad_weights: Optional, grad_biases: Optional, tensors: Sequence[Any], wanted: Sequence[bool]
) -> tuple[list[Tensor | None], ...]:
    """Gradients of weights, biases, gates and shifts; `tensors` and `wanted` list the four one after the other."""
    count = len(ctx.groups)
    weights, biases, gates, shifts = (tensors[i * count : (i + 1) * count] for i in range(4))
    mask = [wanted[part * count + layer] for layer in range(count) for part in range(4)]
    run = FOLD_BACKWARD if traced() else kernels.fold_backward
    results = run(list(grad_weights), list(grad_biases), weights, biases, gates, shifts, ctx.groups, mask)
    return tuple(
        [grad if wanted[part * count + layer] else None for layer, grad in enumerate(result)]
        for part, result in enumerate(results)
    )


class _Fold(torch.autograd.Function):
    @staticmethod
    def forward(count: int, groups: tuple[int, ...], *tensors: Any) -> tuple[Tensor, ...]:
        weights, biases, gates, shifts = (tensors[i * count : (i + 1) * count] for i in range(4))
        folded, folded_biases = kernels.fold(weights, biases, gates, shifts, groups)
        return (*folded, *folded_biases)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        count, ctx.groups = inputs[:2]
        ctx.save_for_backward(*inputs[2:])
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(bias for bias in output[count:] if bias.numel() == 0))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        count = len(ctx.groups)
        lists = _gradients(ctx, grads[:count], grads[count:], ctx.saved_tensors, ctx.needs_input_grad[2:])
        return (None, None, *(grad for part in lists for grad in part))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    weights, biases, gates, shifts, ctx.groups = inputs
    tensors = (*weights, *_given(biases), *gates, *_given(shifts))
    ctx.wanted = [value is not None and value.requires_grad for value in tensors]
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad_weights: Optional, grad_biases: Optional) -> tuple[Any, ...]:
    return (*_gradients(ctx, grad_weights, grad_biases, ctx.saved_tensors, ctx.wanted), None)


torch.library.register_autograd(
    "mrvae_triton::fold", once_differentiable(_backward), setup_context=_setup, lib=LIBRARY
)

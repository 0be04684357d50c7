"""torch.ops.mrvae_triton.gates: all gates of a model in one launch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...triton_kernels import gates as kernels
from ..gates import fake_gates, fake_gates_backward
from ..once import once_differentiable
from .define import LIBRARY, define, recording, traced


def _separate(weight: Tensor, bias: Tensor, eta: Tensor, sizes: Sequence[int], kinds: Sequence[int]) -> list[Tensor]:
    return kernels.gates(weight, bias, eta, sizes, kinds, separate=True)


GATES = define(
    "gates(Tensor weight, Tensor bias, Tensor eta, int[] sizes, int[] kinds) -> Tensor[]",
    _separate, fake_gates, tables=True,
)
GATES_BACKWARD = define(
    "gates_backward(Tensor?[] grads, Tensor weight, Tensor bias, Tensor eta, int[] sizes, int[] kinds, "
    "bool eta_needs_grad) -> (Tensor, Tensor, Tensor)", kernels.gates_backward, fake_gates_backward, tables=True,
)


def gates(weight: Tensor, bias: Tensor, eta: Tensor, sizes: Sequence[int], kinds: Sequence[int]) -> list[Tensor]:
    """g_i = act_i(w_i eta + c_i) for slices i of one flat w and c; as mrvae_kernels.ops.gates."""
    if traced():
        return GATES(weight, bias, eta, sizes, kinds)
    if recording(weight, bias, eta):
        return list(_Gates.apply(weight, bias, eta, tuple(sizes), tuple(kinds)))
    return kernels.gates(weight, bias, eta, sizes, kinds)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    weight, bias, eta, ctx.sizes, ctx.kinds = inputs
    ctx.save_for_backward(weight, bias, eta)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    weight, bias, eta = ctx.saved_tensors
    run = GATES_BACKWARD if traced() else kernels.gates_backward
    dw, dc, deta = run(list(grads), weight, bias, eta, ctx.sizes, ctx.kinds, ctx.needs_input_grad[2])
    return dw, dc, deta if ctx.needs_input_grad[2] else None, None, None


class _Gates(torch.autograd.Function):
    @staticmethod
    def forward(
        weight: Tensor, bias: Tensor, eta: Tensor, sizes: tuple[int, ...], kinds: tuple[int, ...]
    ) -> tuple[Tensor, ...]:
        return tuple(_separate(weight, bias, eta, sizes, kinds))

    setup_context = staticmethod(_setup)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return _backward(ctx, grads)


torch.library.register_autograd(
    "mrvae_triton::gates", once_differentiable(_backward), setup_context=_setup, lib=LIBRARY
)

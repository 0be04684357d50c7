"""torch.ops.mrvae_triton.linear: product, bias, gate, shift and activation in one launch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...triton_kernels import linear as kernels
from ..fused_shapes import fake_linear, fake_linear_backward
from ..once import once_differentiable
from .define import LIBRARY, autocast, define, recording, traced, unwanted
from .fused import result_for_backward

LINEAR = define(
    "linear(Tensor x, Tensor weight, Tensor? bias, Tensor gate, Tensor? shift, str activation, bool keep) "
    "-> (Tensor, Tensor)", kernels.linear, fake_linear,
)
LINEAR_BACKWARD = define(
    "linear_backward(Tensor grad, Tensor x, Tensor weight, Tensor? bias, Tensor gate, Tensor? shift, Tensor? y, "
    "Tensor kept, str activation, bool[5] mask) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    kernels.linear_backward, fake_linear_backward, tables=True,
)


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor, shift: Tensor | None, activation: str
) -> Tensor:
    """y = act(g (x W^T + b) + t) in one kernel; x and weight take autocast's dtype."""
    x, weight = autocast(x), autocast(weight)
    keep = recording(x, weight, bias, gate, shift)
    if traced():
        return LINEAR(x, weight, bias, gate, shift, activation, keep)[0]
    if keep:
        return _Linear.apply(x, weight, bias, gate, shift, activation, True)[0]
    return kernels.linear(x, weight, bias, gate, shift, activation, False)[0]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, gate, shift, ctx.activation, _ = inputs
    y, kept = output
    ctx.mark_non_differentiable(kept)
    ctx.set_materialize_grads(False)  # else each backward pass fills a tensor of kept's size with zeros
    ctx.save_for_backward(x, weight, bias, gate, shift, result_for_backward(y, gate, ctx.activation), kept)


def _backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
    if grads[0] is None:
        return (None,) * 7
    mask = list(ctx.needs_input_grad[:5])
    run = LINEAR_BACKWARD if traced() else kernels.linear_backward
    results = run(*(grads[0], *ctx.saved_tensors, ctx.activation, mask))
    return (*map(unwanted, results, mask), None, None)


class _Linear(torch.autograd.Function):
    forward = staticmethod(kernels.linear)
    setup_context = staticmethod(_setup)
    backward = staticmethod(once_differentiable(_backward))


torch.library.register_autograd(
    "mrvae_triton::linear", once_differentiable(_backward), setup_context=_setup, lib=LIBRARY
)

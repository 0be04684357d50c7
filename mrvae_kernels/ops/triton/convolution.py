"""torch.ops.mrvae_triton.convolution: a 2-d convolution, transposed or not, with everything after it in one launch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...triton_kernels.conv2d import conv2d, conv2d_backward
from ...triton_kernels.conv_transpose2d import conv_transpose2d, conv_transpose2d_backward
from ..fused_shapes import Gradients, fake_convolution, fake_convolution_backward
from ..once import once_differentiable
from .define import LIBRARY, autocast, define, recording, traced, unwanted
from .fused import result_for_backward

Geometry = tuple[Sequence[int], Sequence[int], Sequence[int], bool, Sequence[int], int]
"""stride, padding, dilation, transposed, output_padding, groups: the order of aten::convolution."""


def _convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor, shift: Tensor | None, stride: Sequence[int],
    padding: Sequence[int], dilation: Sequence[int], transposed: bool, output_padding: Sequence[int], groups: int,
    activation: str, keep: bool,
) -> tuple[Tensor, Tensor]:
    if transposed:
        return conv_transpose2d(
            x, weight, bias, gate, shift, stride, padding, output_padding, dilation, groups, activation, keep
        )
    return conv2d(x, weight, bias, gate, shift, stride, padding, dilation, groups, activation, keep)


def _convolution_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor, shift: Tensor | None, y: Tensor | None,
    kept: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], transposed: bool,
    output_padding: Sequence[int], groups: int, activation: str, mask: Sequence[bool],
) -> Gradients:
    tensors = (grad, x, weight, bias, gate, shift, y, kept)
    if transposed:
        return conv_transpose2d_backward(
            *tensors, stride, padding, output_padding, dilation, groups, activation, mask
        )
    return conv2d_backward(*tensors, stride, padding, dilation, groups, activation, mask)


_GEOMETRY = "int[] stride, int[] padding, int[] dilation, bool transposed, int[] output_padding, int groups, "
CONVOLUTION = define(
    "convolution(Tensor x, Tensor weight, Tensor? bias, Tensor gate, Tensor? shift, " + _GEOMETRY
    + "str activation, bool keep) -> (Tensor, Tensor)", _convolution, fake_convolution,
)
CONVOLUTION_BACKWARD = define(
    "convolution_backward(Tensor grad, Tensor x, Tensor weight, Tensor? bias, Tensor gate, Tensor? shift, Tensor? y, "
    "Tensor kept, " + _GEOMETRY + "str activation, bool[5] mask) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _convolution_backward, fake_convolution_backward, tables=True,
)


def convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor, shift: Tensor | None, geometry: Geometry,
    activation: str,
) -> Tensor:
    """y = act(g (conv(x, W) + b) + t) in one kernel, transposed or not; x and weight take autocast's dtype."""
    x, weight = autocast(x), autocast(weight)
    keep = recording(x, weight, bias, gate, shift)
    if traced():
        return CONVOLUTION(x, weight, bias, gate, shift, *geometry, activation, keep)[0]
    if keep:
        arguments = (x, weight, bias, gate, shift, *geometry, activation, True)
        return _Convolution.apply(*arguments)[0]
    return _convolution(x, weight, bias, gate, shift, *geometry, activation, False)[0]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.geometry, ctx.activation = inputs[5:11], inputs[11]
    y, kept = output
    ctx.mark_non_differentiable(kept)
    ctx.set_materialize_grads(False)  # else each backward pass fills a tensor of kept's size with zeros
    ctx.save_for_backward(*inputs[:5], result_for_backward(y, inputs[3], ctx.activation), kept)


def _backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
    if grads[0] is None:
        return (None,) * 13
    mask = list(ctx.needs_input_grad[:5])
    run = CONVOLUTION_BACKWARD if traced() else _convolution_backward
    results = run(*(grads[0], *ctx.saved_tensors, *ctx.geometry, ctx.activation, mask))
    return (*map(unwanted, results, mask), *(None,) * 8)


class _Convolution(torch.autograd.Function):
    forward = staticmethod(_convolution)
    setup_context = staticmethod(_setup)
    backward = staticmethod(once_differentiable(_backward))


torch.library.register_autograd(
    "mrvae_triton::convolution", once_differentiable(_backward), setup_context=_setup, lib=LIBRARY
)

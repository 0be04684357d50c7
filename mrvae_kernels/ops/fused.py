"""Shape inference of torch.ops.mrvae.fused_linear and fused_convolution: what strategy "fused" of gated_linear and
gated_convolution runs, with schema and autograd of their own, so that a tracer sees one operator."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ._load import fake
from .fused_shapes import Gradients, fake_convolution, fake_gradients, fake_linear


@fake("fused_linear")
def _fused_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor, shift: Tensor | None, activation: str, keep: bool
) -> tuple[Tensor, Tensor]:
    return fake_linear(x, weight, gate, activation, keep)


@fake("fused_linear_backward")
def _fused_linear_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor, shift: Tensor | None, y: Tensor | None,
    kept: Tensor, activation: str, mask: Sequence[bool],
) -> Gradients:
    return fake_gradients(x, weight, bias, gate, shift, mask)


@fake("fused_convolution")
def _fused_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor, shift: Tensor | None, stride: Sequence[int],
    padding: Sequence[int], dilation: Sequence[int], transposed: bool, output_padding: Sequence[int], groups: int,
    activation: str, keep: bool,
) -> tuple[Tensor, Tensor]:
    return fake_convolution(
        x, weight, gate, stride, padding, dilation, transposed, output_padding, groups, activation, keep
    )


@fake("fused_convolution_backward")
def _fused_convolution_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor, shift: Tensor | None, y: Tensor | None,
    kept: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], transposed: bool,
    output_padding: Sequence[int], groups: int, activation: str, mask: Sequence[bool],
) -> Gradients:
    return fake_gradients(x, weight, bias, gate, shift, mask)

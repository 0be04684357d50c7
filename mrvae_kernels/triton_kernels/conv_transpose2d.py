"""A gated transposed 2-d convolution and its gradients: host functions on the kernels of implicit_gemm.py and
weight_gradient.py.

    y = act(g (conv_transpose2d(x, W) + b) + t)       one launch, a result's taps by its phase
    dx = conv2d(g act'(.) dy, W)                      one launch
    dW' = sum over positions of x act'(.) dy          one launch in parts; then dW = g dW', db, dg, dt in one
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from . import convolution
from .convolution import Gradients
from .convolution_variants import variants
from .geometry import Geometry, geometry, refusal

__all__ = ["conv_transpose2d", "conv_transpose2d_backward", "conv_transpose2d_refusal", "variants"]


def _layer(
    stride: Sequence[int], padding: Sequence[int], output_padding: Sequence[int], dilation: Sequence[int], groups: int
) -> Geometry:
    return geometry(stride, padding, dilation, True, output_padding, groups)


def conv_transpose2d_refusal(
    x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], output_padding: Sequence[int],
    dilation: Sequence[int], groups: int,
) -> str | None:
    """Why `conv_transpose2d` cannot compute this convolution, as a sentence, or None where it can."""
    return refusal(x, weight, _layer(stride, padding, output_padding, dilation, groups))


def conv_transpose2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor, shift: Tensor | None, stride: Sequence[int],
    padding: Sequence[int], output_padding: Sequence[int], dilation: Sequence[int], groups: int, activation: str,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """(y, kept) with y = act(g (conv_transpose(x, W) + b) + t): as conv2d, with weight (C_in, C_out / groups, R, S).

    output_padding: rows and columns added at the end of y, fewer than stride or dilation.
    """
    layer = _layer(stride, padding, output_padding, dilation, groups)
    return convolution.forward("conv_transpose2d", x, weight, bias, gate, shift, layer, activation, keep)


def conv_transpose2d_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor, shift: Tensor | None, y: Tensor | None,
    kept: Tensor, stride: Sequence[int], padding: Sequence[int], output_padding: Sequence[int], dilation: Sequence[int],
    groups: int, activation: str, mask: Sequence[bool],
) -> Gradients:
    """(dx, dW, db, dg, dt), each like its tensor, or empty, (0,), where absent or not wanted: as conv2d_backward."""
    layer = _layer(stride, padding, output_padding, dilation, groups)
    return convolution.backward(
        "conv_transpose2d_backward", grad, x, weight, bias, gate, shift, y, kept, layer, activation, mask
    )

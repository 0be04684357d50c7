"""A gated 2-d convolution and its gradients: host functions on the kernels of implicit_gemm.py and weight_gradient.py.

    y = act(g (conv2d(x, W) + b) + t)                 one launch
    dx = conv_transpose2d(g act'(.) dy, W)            one launch
    dW' = sum over positions of act'(.) dy x          one launch in parts; then dW = g dW', db, dg, dt in one
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from . import convolution
from .convolution import Gradients
from .convolution_variants import variants
from .geometry import Geometry, geometry, refusal

__all__ = ["conv2d", "conv2d_backward", "conv2d_refusal", "variants"]


def _layer(stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int) -> Geometry:
    return geometry(stride, padding, dilation, False, (0, 0), groups)


def conv2d_refusal(
    x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int
) -> str | None:
    """Why `conv2d` cannot compute this convolution, as a sentence, or None where it can."""
    return refusal(x, weight, _layer(stride, padding, dilation, groups))


def conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor, shift: Tensor | None, stride: Sequence[int],
    padding: Sequence[int], dilation: Sequence[int], groups: int, activation: str, keep: bool,
) -> tuple[Tensor, Tensor]:
    """(y, kept) with y = act(g (conv(x, W) + b) + t), channels_last where x is, else contiguous.

    x (N, C_in, H, W) and weight (C_out, C_in / groups, R, S): both float32, bfloat16 or float16, any strides; bias
    (C_out,) of any floating dtype; gate and shift (C_out,) or (N, C_out), float32. Padded with zeros.

    kept, with `keep`: u = conv(x, W) for one gate a sample, z = g (u + b) + t for one gate for all with silu and gelu;
    otherwise empty, (0,). ValueError for shapes that do not fit and for what conv2d_refusal names, TypeError for dtypes
    of bias, gate and shift, RuntimeError for devices.
    """
    layer = _layer(stride, padding, dilation, groups)
    return convolution.forward("conv2d", x, weight, bias, gate, shift, layer, activation, keep)


def conv2d_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor, shift: Tensor | None, y: Tensor | None,
    kept: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int, activation: str,
    mask: Sequence[bool],
) -> Gradients:
    """(dx, dW, db, dg, dt), each like its tensor, or empty, (0,), where it is absent or not wanted.

    grad: dy, of any strides. y: the result, which relu, tanh, leaky_relu and elu need with one gate for all; kept as
    conv2d gave it. mask: which of the five to compute. The same bits each time.
    """
    layer = _layer(stride, padding, dilation, groups)
    return convolution.backward(
        "conv2d_backward", grad, x, weight, bias, gate, shift, y, kept, layer, activation, mask
    )

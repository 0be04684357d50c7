"""torch.ops.mrvae.gated_convolution: a gated convolution, transposed or not, as one autograd node."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._load import fake, require


def gated_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor, shift: Tensor | None, stride: Sequence[int],
    padding: Sequence[int], dilation: Sequence[int], transposed: bool, output_padding: Sequence[int], groups: int,
    activation: str, strategy: str,
) -> Tensor:
    """y = activation(g (conv(x, W) + b) + t) in 1, 2 or 3 dimensions.

    x (N, C_in, ...); weight (C_out, C_in / groups, ...), transposed (C_in, C_out / groups, ...); bias (C_out,); gate
    and shift (C_out,) or (N, C_out). stride, padding, dilation and output_padding: one number a spatial axis. strategy
    as in gated_linear, "fused" in 2 dimensions. ValueError for shapes that do not fit, TypeError for dtypes.
    """
    require()
    return torch.ops.mrvae.gated_convolution.default(
        x, weight, bias, gate, shift, stride, padding, dilation, transposed, output_padding, groups, activation,
        strategy,
    )


@fake("gated_convolution")
def _gated_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor, shift: Tensor | None, stride: Sequence[int],
    padding: Sequence[int], dilation: Sequence[int], transposed: bool, output_padding: Sequence[int], groups: int,
    activation: str, strategy: str,
) -> Tensor:
    return torch.ops.aten.convolution(
        x, weight, None, stride, padding, dilation, transposed, output_padding, groups
    )

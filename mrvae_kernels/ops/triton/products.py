"""Gated products by strategy: the library's product with Triton's fold or epilogue, or everything in one kernel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ...reference import activate
from .convolution import convolution
from .define import autocast
from .epilogue import epilogue
from .fold import fold
from .linear import linear


def gated_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor, shift: Tensor | None, activation: str, strategy: str
) -> Tensor:
    """y = activation(g (x W^T + b) + t); strategy "fold", "epilogue" or "fused"; as mrvae_kernels.ops.gated_linear."""
    if strategy == "fused":
        return linear(x, weight, bias, gate, shift, activation)
    if strategy == "fold":
        return activate(F.linear(x, *_folded(weight, bias, gate, shift, 0)), activation)
    u = F.linear(autocast(x), autocast(weight))
    return epilogue(u, bias, gate, shift, u.dim() - 1, activation, u_is_free=True)


def gated_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor, shift: Tensor | None, stride: Sequence[int],
    padding: Sequence[int], dilation: Sequence[int], transposed: bool, output_padding: Sequence[int], groups: int,
    activation: str, strategy: str,
) -> Tensor:
    """y = activation(g (conv(x, W) + b) + t); as mrvae_kernels.ops.gated_convolution, and "fused" in 2 dimensions."""
    geometry = (stride, padding, dilation, transposed, output_padding, groups)
    if strategy == "fused":
        return convolution(x, weight, bias, gate, shift, geometry, activation)
    if strategy == "fold":
        folded, folded_bias = _folded(weight, bias, gate, shift, groups if transposed else 0)
        folded_bias = None if folded_bias is None else autocast(folded_bias)
        # autocast knows torch's conv2d and its kin on every device, torch.convolution on some
        return activate(torch.convolution(autocast(x), autocast(folded), folded_bias, *geometry), activation)
    u = torch.convolution(autocast(x), autocast(weight), None, *geometry)
    return epilogue(u, bias, gate, shift, 1, activation, u_is_free=True)


def _folded(
    weight: Tensor, bias: Tensor | None, gate: Tensor, shift: Tensor | None, groups: int
) -> tuple[Tensor, Tensor | None]:
    weights, biases = fold([weight], [bias], [gate], [shift], [groups])
    return weights[0], None if bias is None and shift is None else biases[0]

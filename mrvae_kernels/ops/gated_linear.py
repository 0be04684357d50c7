"""torch.ops.mrvae.gated_linear: a gated linear layer as one autograd node."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._load import fake, require


def gated_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor, shift: Tensor | None, activation: str, strategy: str
) -> Tensor:
    """y = activation(g (x W^T + b) + t).

    x (..., K), weight (C, K), bias (C,), gate and shift (C,), or (N, C) with x (N, ..., K); y (..., C). strategy "fold"
    computes with W' = g W, b' = g b + t (one beta a batch only), "epilogue" scales the product's result, "fused" does
    all in one kernel (CUDA tensors in float32, bfloat16 or float16). Under autocast x and weight take its dtype.
    ValueError for shapes that do not fit, TypeError for dtypes, RuntimeError for "fused" without CUDA kernels.
    """
    require()
    return torch.ops.mrvae.gated_linear.default(x, weight, bias, gate, shift, activation, strategy)


@fake("gated_linear")
def _gated_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor, shift: Tensor | None, activation: str, strategy: str
) -> Tensor:
    return F.linear(x, weight)

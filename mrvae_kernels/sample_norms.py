"""Batch norms with an affine a sample, in the passes that the norm makes anyway.

    z = S x_hat + T,   x_hat = (x - mu) rstd,   S and T (N, C)

Normalising first and scaling then is one more pass over the activations, and one more tensor for the backward pass: in
the small NVAE 27 % of a step's memory (`python -m bench.overhead --cases nvae-small --modes eager`). Here the epilogue
does both, of x itself, and the backward pass needs x, which a norm keeps in any case (csrc/sample_norm.h has its
formulas). S and T being tensors of N C numbers, this is for x of many positions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .ops.shortcuts import core
from .strategy import choose_backend

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
"""Not SyncBatchNorm, whose statistics are other processes' too."""

LEAST_POSITIONS = 4
"""Of a sample and channel. With 1, (128, 256), S and T are as large as x, and this takes 0.99 to 1.29 of two operators'
time. From 4 on it takes 0.61 to 0.86 of theirs: forward and backward pass of x from (16, 8, 4, 4) to (128, 8, 28, 28),
gates included, interleaved on 2 cores."""


def takes(layer: Any, x: Tensor, scale: Tensor, offset: Tensor | None) -> bool:
    """Whether `batch_norm` does what this norm does to x, and is worth it: eager float32 and float64 on the CPU.

    scale and offset: its gate and shift. Elsewhere, when traced, under a transform or a dispatch mode, and where torch
    has an error to raise, the norm and the epilogue stay two operators.
    """
    return (
        layer.plain in BATCH_NORMS
        and not torch.compiler.is_compiling()
        and type(x) is Tensor
        and x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.float64)
        and x.dim() >= 2
        and scale.shape == x.shape[:2]
        and x.numel() > x.shape[1]  # of one element a channel torch says why it has no variance
        and x.numel() >= LEAST_POSITIONS * scale.numel()
        and _fits(layer, x, scale, offset)
        and not torch._C._are_functorch_transforms_active()
        and not torch.jit.is_tracing()
        and choose_backend(x.device, x.dtype, "epilogue") == "cpp"
        and core().ordinary([x, scale, offset, *layer._parameters.values(), *layer._buffers.values()])
    )


def _fits(layer: Any, x: Tensor, scale: Tensor, offset: Tensor | None) -> bool:
    """Whether parameters and running statistics are of x's dtype and (C,): torch's operator does not look itself, and
    writes C statistics into a buffer of fewer."""
    buffers, parameters = layer._buffers, layer._parameters
    mean, variance = buffers["running_mean"], buffers["running_var"]
    if (mean is None) != (variance is None) or scale.dtype != x.dtype:
        return False
    if offset is not None and (offset.dtype != x.dtype or offset.shape != scale.shape):
        return False
    if "weight" not in parameters or "bias" not in parameters:  # pruned since, and computed in a hook
        return False
    size = x.shape[1:2]
    of_channels = (mean, variance, parameters["weight"], parameters["bias"])
    return all(tensor is None or (tensor.dtype == x.dtype and tensor.shape == size) for tensor in of_channels)


def batch_norm(
    layer: Any, x: Tensor, gate: Tensor, shift: Tensor | None, weight: Tensor | None, bias: Tensor | None
) -> Tensor:
    """gate (weight x_hat + bias) + shift, x_hat as the batch norm `layer` normalises x, (N, C, ...).

    gate and shift (N, C), weight and bias (C,); None for 0, 1 and 0. Running statistics are updated as by the layer's
    own forward. For what `takes` says yes to; ValueError for an x of more or fewer axes than the layer is for.
    Differentiable once in all five.
    """
    layer._check_input_dim(x)
    buffers, training, momentum = layer._buffers, layer.training, layer.momentum
    counted = training and layer.track_running_stats
    if counted and (batches := buffers["num_batches_tracked"]) is not None:
        batches.add_(1)
        momentum = 1.0 / float(batches) if momentum is None else momentum
    mean, variance = buffers["running_mean"], buffers["running_var"]
    of_batch = training or mean is None
    if of_batch and not counted:
        mean = variance = None
    momentum = 0.0 if momentum is None else momentum
    return core().sample_batch_norm(x, gate, shift, weight, bias, mean, variance, of_batch, momentum, layer.eps)

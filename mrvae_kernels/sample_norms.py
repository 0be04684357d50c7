"""Batch norms with an affine a sample, in the passes that the norm makes anyway.

    z = S x_hat + T,   x_hat = (x - mu) rstd,   S and T (N, C)

Normalising first and scaling then is one more pass over the activations, and one more tensor for the backward pass: in
the small NVAE 27 % of a step's memory (`python -m bench.overhead --cases nvae-small --modes eager`). Here the epilogue
does both, of x itself, and the backward pass needs x, which a norm keeps in any case:

    dT = sum dz,   dS = rstd sum dz (x - mu)                                     over the positions of a sample
    dx = S rstd dz - rstd / M (sum_n S dT + rstd (x - mu) sum_n S dS)            M elements of each channel

and dx = S rstd dz alone where mu and rstd are running statistics. S and T being tensors of N C numbers, this is for x
of many positions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import ops
from .ops.once import once_differentiable
from .strategy import choose_backend

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
"""Not SyncBatchNorm, whose statistics are other processes' too."""

LEAST_POSITIONS = 16
"""Of a sample and channel. With 1, (128, 256), two operators take 0.6 of the time: S and T are as large as x."""

LEAST_ELEMENTS = 1 << 16
"""Of x. Here a norm keeps 0.3 MB less, for 0.2 ms more of a forward and a backward pass in Python; from 2^18 elements
on it is faster too: 0.85 of the time for (128, 64, 7, 7), 0.6 for (128, 64, 32, 32), interleaved on 2 cores."""


def takes(layer: Any, x: Tensor, scale: Tensor) -> bool:
    """Whether `batch_norm` does what this norm does to x, and is worth it: eager float32 and float64 on the CPU.

    Elsewhere, when traced, under a transform, and where torch has an error to raise, the norm and the epilogue stay two
    operators.
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
        and x.numel() >= max(LEAST_ELEMENTS, LEAST_POSITIONS * scale.numel())
        and _fits(layer, x, scale)
        and not torch._C._are_functorch_transforms_active()
        and not torch.jit.is_tracing()
        and choose_backend(x.device, x.dtype, "epilogue") == "cpp"
    )


def _fits(layer: Any, x: Tensor, scale: Tensor) -> bool:
    """Whether parameters and running statistics are of x's dtype and (C,): torch's operator does not look itself, and
    writes C statistics into a buffer of fewer."""
    buffers, parameters = layer._buffers, layer._parameters
    mean, variance = buffers["running_mean"], buffers["running_var"]
    if (mean is None) != (variance is None) or scale.dtype != x.dtype:
        return False
    size = x.shape[1:2]
    of_channels = (mean, variance, parameters["weight"], parameters["bias"])
    return all(tensor is None or (tensor.dtype == x.dtype and tensor.shape == size) for tensor in of_channels)


def batch_norm(layer: Any, x: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """scale x_hat + offset, (N, C) each, x_hat as the batch norm `layer` normalises x, (N, C, ...).

    Running statistics are updated as by the layer's own forward. For what `takes` says yes to; ValueError for an x of
    more or fewer axes than the layer is for. Differentiable once in x, scale and offset.
    """
    layer._check_input_dim(x)
    return _SampleNorm.apply(x, scale, offset, layer)


def _statistics(layer: Any, x: Tensor) -> tuple[Tensor, Tensor, bool]:
    """-mu and rstd, (C,), tensors of their own, and whether they are of x: as torch.nn's batch norms choose and count.

    Not the running mean itself: a later step changes it, and tells no version counter.
    """
    buffers, training, momentum = layer._buffers, layer.training, layer.momentum
    counted = training and layer.track_running_stats
    if counted and buffers["num_batches_tracked"] is not None:
        buffers["num_batches_tracked"].add_(1)
        momentum = 1.0 / float(buffers["num_batches_tracked"]) if momentum is None else momentum
    running_mean, running_variance = buffers["running_mean"], buffers["running_var"]
    if not training and running_mean is not None:
        return -running_mean, (running_variance + layer.eps).rsqrt_(), False
    if not counted:
        running_mean = running_variance = None
    mean, variance = torch.batch_norm_update_stats(
        x, running_mean, running_variance, 0.0 if momentum is None else momentum
    )
    return mean.neg_(), variance.add_(layer.eps).rsqrt_(), True


class _SampleNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, offset: Tensor, layer: Any) -> Tensor:
        minus, rstd, ctx.of_batch = _statistics(layer, x)
        gain = scale * rstd
        ctx.save_for_backward(x, scale, minus, rstd, gain)
        return ops.epilogue(x, minus, gain, offset, 1, "none")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, minus, rstd, gain = ctx.saved_tensors
        _, _, by_scale, by_offset = torch.ops.mrvae.epilogue_backward(
            grad, x, minus, gain, gain, 1, "none", [False, False, True, True]
        )
        by_scale.mul_(rstd)
        of_x = None
        if ctx.needs_input_grad[0] and ctx.of_batch:
            part = rstd * (-x.shape[1] / x.numel())
            slope = torch.linalg.vecdot(scale, by_scale, dim=0) * part * rstd
            constant = torch.linalg.vecdot(scale, by_offset, dim=0) * part
            of_x = ops.epilogue(x, minus, slope, constant, 1, "none")
            of_x.addcmul_(grad, gain.reshape(*gain.shape, *[1] * (x.dim() - 2)))
        elif ctx.needs_input_grad[0]:
            of_x = ops.epilogue(grad, None, gain, None, 1, "none")
        return of_x, by_scale, by_offset, None

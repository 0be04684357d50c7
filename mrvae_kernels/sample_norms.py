"""Batch norms with an affine a sample, in the passes that the norm makes anyway.

    z = S x_hat + T,   x_hat = (x - mu) rstd,   S and T (N, C)

Normalising first and scaling then is one more pass over the activations, and one more tensor for the backward pass:
27 % of a step's memory in a small NVAE with 31 gated norms. Here the epilogue does both, of x itself, and the backward
pass needs x, which a norm keeps in any case:

    dT = sum dz,   dS = rstd sum dz (x - mu)                                     over the positions of a sample
    dx = S rstd dz - rstd / M (sum_n S dT + rstd (x - mu) sum_n S dS)            M elements of each channel

and dx = S rstd dz alone where mu and rstd are running statistics.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from . import ops
from .strategy import choose_backend

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
"""Not SyncBatchNorm, whose statistics are other processes' too."""


def takes(layer: Any, x: Tensor, scale: Tensor) -> bool:
    """Whether `batch_norm` can do what this norm does to x, eagerly on the CPU; elsewhere and when traced, or under a
    transform, the norm and the epilogue are two operators that every tracer knows."""
    return (
        layer.plain in BATCH_NORMS
        and scale.dim() == 2
        and not torch.compiler.is_compiling()
        and type(x) is Tensor
        and x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.float64)
        and scale.dtype == x.dtype
        and x.dim() >= 2
        and scale.shape == x.shape[:2]
        and x.numel() > x.shape[1]  # of one element a channel torch says why it has no variance
        and not torch._C._are_functorch_transforms_active()
        and not torch.jit.is_tracing()  # type: ignore[no-untyped-call]
        and choose_backend(x.device, x.dtype, "epilogue") == "cpp"
    )


def batch_norm(layer: Any, x: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """scale x_hat + offset, (N, C) each, x_hat as the batch norm `layer` normalises x, (N, C, ...); its running
    statistics are updated as its own forward would. For what `takes` says yes to."""
    layer._check_input_dim(x)
    mean, rstd, of_batch = _statistics(layer, x.detach())
    return _SampleNorm.apply(x, scale, offset, mean, rstd, of_batch)  # type: ignore[no-any-return]


@torch.no_grad()
def _statistics(layer: Any, x: Tensor) -> tuple[Tensor, Tensor, bool]:
    """mu and rstd, (C,), and whether they are those of x: as torch.nn's batch norms choose and count."""
    momentum = 0.0 if layer.momentum is None else layer.momentum
    if layer.training and layer.track_running_stats and layer.num_batches_tracked is not None:
        layer.num_batches_tracked.add_(1)
        if layer.momentum is None:
            momentum = 1.0 / float(layer.num_batches_tracked)
    running = layer.running_mean, layer.running_var
    if not layer.training and None not in running:
        return running[0].to(x.dtype), (running[1].to(x.dtype) + layer.eps).rsqrt(), False
    kept, kept_variance = running if layer.training and layer.track_running_stats else (None, None)
    mean, variance = torch.batch_norm_update_stats(x, kept, kept_variance, momentum)
    return mean, (variance + layer.eps).rsqrt(), True


class _SampleNorm(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, scale: Tensor, offset: Tensor, mean: Tensor, rstd: Tensor, of_batch: bool
    ) -> Tensor:
        ctx.save_for_backward(x, scale, mean, rstd)
        ctx.of_batch = of_batch
        return ops.epilogue(x, -mean, scale * rstd, offset, 1, "none")

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, scale, mean, rstd = ctx.saved_tensors
        gain, minus = scale * rstd, -mean
        _, _, by_scale, by_offset = torch.ops.mrvae.epilogue_backward(
            grad, x, minus, gain, gain, 1, "none", [False, False, True, True]
        )
        by_scale = by_scale * rstd
        of_x = None
        if ctx.needs_input_grad[0] and ctx.of_batch:
            part = rstd * (x.shape[1] / x.numel())
            slope, constant = part * rstd * (scale * by_scale).sum(0), part * (scale * by_offset).sum(0)
            of_x = ops.epilogue(x, minus, -slope, -constant, 1, "none")
            of_x.addcmul_(grad, gain.reshape(*gain.shape, *[1] * (x.dim() - 2)))
        elif ctx.needs_input_grad[0]:
            of_x = ops.epilogue(grad, None, gain, None, 1, "none")
        return of_x, by_scale, by_offset, None, None, None

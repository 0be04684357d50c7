"""Conditional batch normalisation: the affine of the norm depends on beta (Brock et al., 2018; in the paper's CNNs).

    y = (w + s(eta)) x_hat + (b + t(eta)),   s and t each an MLP 1-64-C of eta

Table 1 of the paper counts it (2.04 % more parameters for the MNIST CNN, against 0.03 % for gates alone).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import functional, reference, sample_norms
from .adapters import holding
from .gates import DEFAULT_BETA_RANGE, Beta, BetaRange, GateNetwork, standardize
from .layers import Recorded, _one


def conditional_norm(layer: Any, weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    """weight x_hat + bias, x_hat as the batch norm `layer` normalises x; weight and bias are (C,), or (N, C)."""
    if sample_norms.takes(layer, x, weight, bias):
        return sample_norms.batch_norm(layer, x, weight, bias, None, None)
    shared = weight.dim() == 1
    with holding(layer, {"weight": weight, "bias": bias} if shared else {"weight": None, "bias": None}) as holder:
        y = layer.plain.forward(holder, x)
    if shared:
        return y
    dtype = reference.gate_dtype(y.dtype)
    return functional.epilogue(y, None, weight.to(dtype), bias.to(dtype), 1)


class ConditionalBatchNorm(Recorded):
    """What the 1-d, 2-d and 3-d classes share; s and t start at 0, so that the layer starts as the plain one."""

    plain: type[nn.Module]
    weight: Tensor
    bias: Tensor

    def __init__(
        self, num_features: int, *args: Any, hidden: Sequence[int] = (64,),
        beta_range: Sequence[float] = DEFAULT_BETA_RANGE, **kwargs: Any,
    ) -> None:
        super().__init__(num_features, *args, **kwargs)
        if self._parameters["weight"] is None or self._parameters["bias"] is None:
            raise ValueError(
                f"{type(self).__name__} needs affine=True and its bias: the affine is what depends on beta"
            )
        self.beta_range = BetaRange.of(beta_range)
        like = self.weight
        self.scale = GateNetwork(hidden, [num_features], ["identity"]).to(device=like.device, dtype=like.dtype)
        self.shift = GateNetwork(hidden, [num_features], ["identity"]).to(device=like.device, dtype=like.dtype)

    def scale_and_shift(self, beta: Beta) -> tuple[Tensor, Tensor]:
        """w + s(eta) and b + t(eta): (C,), or (N, C) for one beta a sample."""
        like = self.weight
        eta = standardize(beta, self.beta_range, device=like.device, dtype=reference.gate_dtype(like.dtype))
        eta = eta.to(like.dtype)
        return self.weight + self.scale(eta), self.bias + self.shift(eta)

    def forward(self, x: Tensor, beta: Beta) -> Tensor:
        """x (N, C, ...); beta a number, 0-d, or one a sample."""
        return conditional_norm(self, *self.scale_and_shift(beta), x)

    def _gate_state(self) -> dict[str, Any]:
        return {"beta_range": list(self.beta_range)}

    def to_plain(self, beta: Beta) -> nn.Module:
        """The plain norm at one beta, running statistics included."""
        assert isinstance(self, nn.modules.batchnorm._BatchNorm)
        layer = self.plain(
            self.num_features, self.eps, self.momentum, True, self.track_running_stats,
            device=self.weight.device, dtype=self.weight.dtype,
        )
        with torch.no_grad():
            values = zip(("weight", "bias"), self.scale_and_shift(_one(beta)), strict=True)
            layer.load_state_dict({**{n: b for n, b in self._buffers.items() if b is not None}, **dict(values)})
        return layer.train(self.training)


class ConditionalBatchNorm1d(ConditionalBatchNorm, nn.BatchNorm1d):
    """nn.BatchNorm1d with an affine that depends on beta."""

    plain = nn.BatchNorm1d


class ConditionalBatchNorm2d(ConditionalBatchNorm, nn.BatchNorm2d):
    """nn.BatchNorm2d with an affine that depends on beta."""

    plain = nn.BatchNorm2d


class ConditionalBatchNorm3d(ConditionalBatchNorm, nn.BatchNorm3d):
    """nn.BatchNorm3d with an affine that depends on beta."""

    plain = nn.BatchNorm3d

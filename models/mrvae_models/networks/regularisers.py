"""Regularisers of deep hierarchies: the spectral norms of convolutions, and the scales of batch norms.

Vahdat and Kautz (2020), Section 3.2: without them the KL terms of a deep hierarchy can grow without bound.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mrvae_kernels as mk

from ..likelihoods import full_precision

ITERATIONS = 4


class SpectralNorms(nn.Module):
    """The sum of the largest singular values of weights, (rows, ...) each, taken as matrices (rows, columns).

    Power iteration from the right singular vectors of the last call, which are buffers: u <- W v / |W v|,
    v <- W^T u / |W^T u|, and sigma = u^T W v, through which gradients flow to W. A value is a lower bound that grows to
    the singular value within some calls. Weights of one shape are one batch. In eval mode the buffers stay.
    """

    def __init__(self, weights: Sequence[Tensor], iterations: int = ITERATIONS) -> None:
        super().__init__()
        self.iterations = iterations
        self.batches: dict[tuple[int, int], list[int]] = {}
        for i, weight in enumerate(weights):
            self.batches.setdefault((len(weight), weight[0].numel()), []).append(i)
        for (rows, columns), members in self.batches.items():
            start = torch.randn(len(members), columns, device=weights[members[0]].device)
            self.register_buffer(f"right_{rows}x{columns}", F.normalize(start, dim=1))

    def forward(self, weights: Sequence[Tensor]) -> Tensor:
        """The sum, a scalar. weights: those it was made for, in their order."""
        with torch.autocast(weights[0].device.type, enabled=False):  # its products have 8 bits: 1 % too little
            return self._sum(weights)

    def _sum(self, weights: Sequence[Tensor]) -> Tensor:
        total = full_precision(weights[0]).new_zeros(())
        for (rows, columns), members in self.batches.items():
            matrices = torch.stack([full_precision(weights[i]).flatten(1) for i in members])
            kept = self.get_buffer(f"right_{rows}x{columns}")
            with torch.no_grad():
                right, fixed = kept.to(matrices.dtype).unsqueeze(2), matrices.detach()
                for _ in range(self.iterations):
                    left = F.normalize(fixed @ right, dim=1)
                    right = F.normalize(fixed.mT @ left, dim=1)
                if self.training:
                    kept.copy_(right.squeeze(2))
            total = total + (left * (matrices @ right)).sum()
        return total


def convolution_weights(network: nn.Module) -> list[Tensor]:
    """The weights that the network's convolutions compute with, before any gate, weight norm applied."""
    return [
        module.effective_weight() if isinstance(module, mk.WeightNormConv2d) else module.weight
        for module in network.modules() if isinstance(module, nn.Conv2d)
    ]


def norm_scales(network: nn.Module) -> Tensor:
    """sum max|gamma| over the batch norms, a scalar: what bounds each norm's output."""
    norms = [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    return torch.stack([full_precision(module.weight).abs().max() for module in norms]).sum()

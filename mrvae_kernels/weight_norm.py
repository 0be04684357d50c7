"""A convolution whose weight norm is part of the layer, so that it can be gated and baked."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class WeightNormConv2d(nn.Conv2d):
    """nn.Conv2d with W_i = gain_i v_i / |v_i| for filter i (Salimans and Kingma, 2016).

    `weight` is the direction v, shaped as nn.Conv2d's; `gain`, (out_channels,), starts as |v_i|, so that the layer
    starts as the nn.Conv2d of the same seed. A filter with v_i = 0 is 0. torch's own weight_norm replaces the parameter
    by a computed one, which `multirate` cannot gate.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.gain = nn.Parameter(_norms(self.weight.detach()))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if "gain" in self._parameters:  # nn.Conv2d's constructor calls this before there is one
            self.settle()

    def effective_weight(self) -> Tensor:
        """gain_i v_i / |v_i|, differentiable in both."""
        norms = _norms(self.weight)
        scale = self.gain / norms.clamp_min(torch.finfo(norms.dtype).tiny)
        scale = scale.where(norms > 0, 0)  # gain / tiny overflows, and inf * 0 is NaN
        return self.weight * scale[:, None, None, None]

    def settle(self) -> None:
        """Set the gains so that the effective weight is `weight` as it stands."""
        with torch.no_grad():
            self.gain.copy_(_norms(self.weight))

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.effective_weight(), self.bias)


def _norms(weight: Tensor) -> Tensor:
    return torch.linalg.vector_norm(weight, dim=(1, 2, 3))

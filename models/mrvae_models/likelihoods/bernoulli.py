"""The Bernoulli likelihood."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.storage import Rows
from .base import Beta, Likelihood
from .data_checks import check_unit_interval
from .numerics import full_precision


class Bernoulli(Likelihood):
    """Independent Bernoulli pixels; `parameters` are logits l, p = sigmoid(l).

    distortion = -sum_i [x_i log p_i + (1 - x_i) log(1 - p_i)]

    A decoder for it ends without a sigmoid. Targets are 0 or 1; any real x in [0, 1] is accepted too, and then this is
    the usual continuous relaxation (cross-entropy against x), which is not the log of a normalised density.
    """

    name = "bernoulli"
    measure = "2 levels"

    def distortion(self, parameters: Tensor, x: Tensor, beta: Beta | None = None) -> Tensor:
        self._check(parameters, x)
        logits = full_precision(parameters)
        losses = F.binary_cross_entropy_with_logits(logits, x.to(logits.dtype), reduction="none")
        return losses.flatten(1).sum(1)

    def mean(self, parameters: Tensor) -> Tensor:
        return torch.sigmoid(full_precision(parameters))

    def sample(
        self, parameters: Tensor, generator: torch.Generator | None = None, beta: Beta | None = None
    ) -> Tensor:
        return torch.bernoulli(self.mean(parameters), generator=generator)

    def check_data(self, x: Rows) -> None:
        check_unit_interval(x, self.name)

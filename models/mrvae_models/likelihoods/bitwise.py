"""The bitwise categorical likelihood (sigma-VAE, Appendix E)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.storage import Rows
from .base import LEVELS_256, Beta, Likelihood
from .data_checks import check_levels
from .numerics import HIGHEST, full_precision, levels_of

BITS = 8


class Bitwise(Likelihood):
    """A value's level as 8 independent bits; `parameters` are 8 logits a value: C channels for the highest bit, ...

        distortion = -sum_i sum_b [bit_ib log p_ib + (1 - bit_ib) log(1 - p_ib)],  p = sigmoid(l)

    (sigma-VAE, Appendix E.) A probability of the 256 levels, with 8 numbers a value in place of 256. Independent bits
    cannot say "127 or 128", which have no bit in common.
    """

    name = "bitwise"
    measure = LEVELS_256
    numbers = BITS

    def distortion(self, parameters: Tensor, x: Tensor, beta: Beta | None = None) -> Tensor:
        self._check(parameters, x)
        logits = self._logits(parameters)
        levels = levels_of(x, logits.dtype).long().unsqueeze(1)
        bits = (levels >> _places(levels)) & 1
        return F.binary_cross_entropy_with_logits(logits, bits.to(logits.dtype), reduction="none").flatten(1).sum(1)

    def mean(self, parameters: Tensor) -> Tensor:
        return _value(torch.sigmoid(self._logits(parameters)))

    def sample(
        self, parameters: Tensor, generator: torch.Generator | None = None, beta: Beta | None = None
    ) -> Tensor:
        return _value(torch.bernoulli(torch.sigmoid(self._logits(parameters)), generator=generator))

    def check_data(self, x: Rows) -> None:
        check_levels(x, self.name)

    def _logits(self, parameters: Tensor) -> Tensor:
        """(N, 8, *shape of x), the highest bit first."""
        return full_precision(torch.stack(self._numbers(parameters), 1))


def _places(like: Tensor) -> Tensor:
    """7 to 0 along the second axis of `like`, which has one entry there."""
    return torch.arange(BITS - 1, -1, -1, device=like.device).view(1, BITS, *[1] * (like.dim() - 2))


def _value(bits: Tensor) -> Tensor:
    """sum_b 2^b bit_b / 255 of (N, 8, ...)."""
    return (bits * (2 ** _places(bits[:, :1])).to(bits.dtype)).sum(1) / HIGHEST

"""The Student-t likelihood (Takahashi et al., 2018)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .base import Beta
from .gaussian import Continuous, check_minimum, standard_normal
from .numerics import MAX_LOG_SIGMA, MIN_LOG_SIGMA, log_gamma_ratio, soft_clip


class StudentT(Continuous):
    """Student-t pixels; `parameters` are C channels of locations m, C of log scales and C of log degrees of freedom.

        distortion = -sum_i [log Gamma((v + 1) / 2) - log Gamma(v / 2) - 1/2 log(pi v) - log s
                             - (v + 1) / 2 log(1 + (x - m)^2 / (v s^2))]
        log s = soft_clip(raw, min_log_scale, 6),  log v = soft_clip(raw, 0, 6)

    (Takahashi et al., "Student-t Variational Autoencoder for Robust Density Estimation", 2018, Eq. 8 and 9, where v is
    any positive number.) Here v is above 1, where the tails of a Cauchy distribution end: so there is a mean, m.
    """

    name = "student-t"
    numbers = 3

    def __init__(self, min_log_scale: float = MIN_LOG_SIGMA):
        super().__init__()
        self.min_log_scale = check_minimum("min_log_scale", min_log_scale)

    def distortion(self, parameters: Tensor, x: Tensor, beta: Beta | None = None) -> Tensor:
        self._check(parameters, x)
        location, log_scale, log_freedom = self._split(parameters)
        freedom = log_freedom.exp()
        z = (x.to(location.dtype) - location) * torch.exp(-log_scale)
        constant = 0.5 * (math.log(math.pi) + log_freedom) - log_gamma_ratio(0.5 * freedom)
        losses = constant + log_scale + 0.5 * (freedom + 1) * torch.log1p(z.square() / freedom)
        return losses.flatten(1).sum(1)

    def mean(self, parameters: Tensor) -> Tensor:
        return self._numbers(parameters)[0]

    def sample(
        self, parameters: Tensor, generator: torch.Generator | None = None, beta: Beta | None = None
    ) -> Tensor:
        location, log_scale, log_freedom = self._split(parameters)
        freedom = log_freedom.exp()
        chi_square = 2 * torch._standard_gamma(0.5 * freedom, generator=generator)
        tiny = torch.finfo(freedom.dtype).tiny
        ratio = (freedom / chi_square.clamp_min(tiny)).sqrt()
        return location + log_scale.exp() * standard_normal(location, generator) * ratio

    def _split(self, parameters: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        location, log_scale, log_freedom = self._numbers(parameters)
        return (
            location,
            soft_clip(log_scale, self.min_log_scale, MAX_LOG_SIGMA),
            soft_clip(log_freedom, 0.0, MAX_LOG_SIGMA),
        )

    def extra_repr(self) -> str:
        return f"min_log_scale={self.min_log_scale}"

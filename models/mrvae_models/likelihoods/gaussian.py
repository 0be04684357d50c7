"""Gaussian likelihoods whose sigma is given, or comes from the decoder for every value."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..data.storage import Rows
from .base import CONTINUOUS, Beta, Likelihood
from .data_checks import check_scaled
from .numerics import LEAST_LOG_SIGMA, MAX_LOG_SIGMA, MIN_LOG_SIGMA, full_precision, is_number, soft_clip


class Continuous(Likelihood):
    """A density of x on its own scale."""

    measure = CONTINUOUS

    def check_data(self, x: Rows) -> None:
        check_scaled(x, self.name)


class Gaussian(Continuous):
    """Independent Gaussian pixels with one fixed standard deviation; `parameters` are the means.

    distortion = 1/2 sum_i (x_i - mean_i)^2 / sigma^2 + d/2 log(2 pi sigma^2),    d = dimensions of an example

    Convention: half the squared error. With sigma = 1, minimising distortion + beta * rate is minimising the negative
    ELBO of a decoder with sigma^2 = beta (up to the factor beta and a constant). Code that leaves out the 1/2 reaches
    the same point at twice this beta.

    sigma: positive and finite; anything else raises ValueError.
    """

    name = "gaussian"

    def __init__(self, sigma: float = 1.0):
        super().__init__()
        if not (math.isfinite(sigma) and sigma > 0):
            raise ValueError(f"sigma is {sigma}; expected a positive, finite standard deviation, e.g. 1.0")
        self.sigma = float(sigma)

    def distortion(self, parameters: Tensor, x: Tensor, beta: Beta | None = None) -> Tensor:
        self._check(parameters, x)
        squared_error = squared_errors(parameters, x)
        constant = 0.5 * math.prod(x.shape[1:]) * math.log(2 * math.pi * self.sigma**2)
        return 0.5 * squared_error / self.sigma**2 + constant

    def mean(self, parameters: Tensor) -> Tensor:
        return full_precision(parameters)

    def sample(
        self, parameters: Tensor, generator: torch.Generator | None = None, beta: Beta | None = None
    ) -> Tensor:
        mean = full_precision(parameters)
        return mean + self.sigma * standard_normal(mean, generator)

    def extra_repr(self) -> str:
        return f"sigma={self.sigma}"


class GaussianPixel(Continuous):
    """Gaussian pixels, each with a sigma of its own; `parameters` are C channels of means m and C of logarithms l.

        distortion = sum_i [1/2 (x_i - m_i)^2 / sigma_i^2 + log sigma_i + 1/2 log(2 pi)]
        log sigma_i = soft_clip(l_i, min_log_sigma, 6)

    (sigma-VAE, Section 3.1, per-pixel; without the clip a pixel that is the same in all images has no least cost.)
    """

    name = "gaussian-pixel"
    numbers = 2

    def __init__(self, min_log_sigma: float = MIN_LOG_SIGMA):
        super().__init__()
        self.min_log_sigma = check_minimum("min_log_sigma", min_log_sigma)

    def distortion(self, parameters: Tensor, x: Tensor, beta: Beta | None = None) -> Tensor:
        self._check(parameters, x)
        mean, log_sigma = self._split(parameters)
        z = (x.to(mean.dtype) - mean) * torch.exp(-log_sigma)
        return (0.5 * z.square() + log_sigma + 0.5 * math.log(2 * math.pi)).flatten(1).sum(1)

    def mean(self, parameters: Tensor) -> Tensor:
        return self._numbers(parameters)[0]

    def sigma_of(self, parameters: Tensor) -> Tensor:
        """sigma of every value, of x's shape."""
        return torch.exp(self._split(parameters)[1])

    def sample(
        self, parameters: Tensor, generator: torch.Generator | None = None, beta: Beta | None = None
    ) -> Tensor:
        mean, log_sigma = self._split(parameters)
        return mean + torch.exp(log_sigma) * standard_normal(mean, generator)

    def _split(self, parameters: Tensor) -> tuple[Tensor, Tensor]:
        mean, raw = self._numbers(parameters)
        return mean, soft_clip(raw, self.min_log_sigma, MAX_LOG_SIGMA)

    def extra_repr(self) -> str:
        return f"min_log_sigma={self.min_log_sigma}"


def squared_errors(mean: Tensor, x: Tensor) -> Tensor:
    """|x - mean|^2 of each example, (N,)."""
    mean = full_precision(mean)
    return (x.to(mean.dtype) - mean).square().flatten(1).sum(1)


def standard_normal(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Noise of the shape, dtype and device of `like`."""
    return torch.randn(like.shape, dtype=like.dtype, device=like.device, generator=generator)


def check_minimum(name: str, value: float) -> float:
    """The least logarithm of a scale as a float; ValueError where it is not from LEAST_LOG_SIGMA to MAX_LOG_SIGMA."""
    if not (is_number(value) and LEAST_LOG_SIGMA <= value < MAX_LOG_SIGMA):
        raise ValueError(
            f"{name} is {value!r}; expected a number from {LEAST_LOG_SIGMA} to less than {MAX_LOG_SIGMA}, e.g. "
            f"{MIN_LOG_SIGMA}"
        )
    return float(value)

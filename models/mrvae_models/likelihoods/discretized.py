"""Likelihoods of 256 levels by the mass that a continuous distribution gives to each level's bin."""

from __future__ import annotations

import abc
import copy
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..data.storage import Rows
from .base import LEVELS_256, Beta, Likelihood
from .data_checks import check_levels
from .gaussian import check_minimum, standard_normal
from .numerics import (
    HIGHEST,
    MAX_LOG_SIGMA,
    MIN_LOG_SCALE,
    MIN_LOG_SIGMA,
    full_precision,
    levels_of,
    log_logistic_mass,
    log_normal_mass,
    soft_clip,
    softplus,
)
from .sigma_of_beta import KNOTS, Knots, LearnedLogSigma

SCALES = ("shared", "value")


class Discretized(Likelihood):
    """Each value's level by the mass of its bin, [(i - 1/2) / 255, (i + 1/2) / 255], the ends taking the tails.

    scale "shared": one number for all values, learned from `sigma` on (default: 1), as in sigma-VAE's Table 4,
    `parameters` being the locations; in a multi-rate network it is a function of beta, with `knots` numbers. "value":
    one a value, `parameters` being C channels of locations and C of logarithms of scales, soft_clip(raw, min_log_scale,
    6); ValueError for a sigma or knots, which nothing would start from or have.
    """

    measure = LEVELS_256
    least: float

    def __init__(
        self, scale: str = "shared", sigma: float | None = None, min_log_scale: float | None = None,
        knots: int | None = None, beta_range: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        if scale not in SCALES:
            raise ValueError(f"scale is {scale!r}; expected one of {', '.join(SCALES)}")
        for name, value in (("sigma", sigma), ("knots", knots)):
            if scale == "value" and value is not None:
                raise ValueError(
                    f"{name} is {value!r}; expected none with scale='value', where the decoder gives every value a "
                    f"scale of its own: leave out {name}, or choose scale='shared'"
                )
        self.min_log_scale = check_minimum("min_log_scale", self.least if min_log_scale is None else min_log_scale)
        self.knots = Knots(beta_range, KNOTS if knots is None else knots)
        self.numbers = 2 if scale == "value" else 1
        self.shared = None
        if scale == "shared":
            self.shared = LearnedLogSigma(self.knots, 1.0 if sigma is None else sigma, self.min_log_scale)

    @abc.abstractmethod
    def _log_mass(self, levels: Tensor, location: Tensor, log_scale: Tensor) -> Tensor: ...

    @abc.abstractmethod
    def _standard(self, like: Tensor, generator: torch.Generator | None) -> Tensor:
        """Draws at location 0 and scale 1."""

    @abc.abstractmethod
    def _area(self, z: Tensor) -> Tensor:
        """The integral of the distribution function up to z."""

    @property
    def depends_on_beta(self) -> bool:
        return self.shared is not None and self.knots.beta_range is not None

    def at(self, beta: float) -> Discretized:
        if not self.depends_on_beta:
            return self
        one = copy.deepcopy(self)
        assert one.shared is not None
        one.shared.keep(beta)
        one.knots = Knots(None, self.knots.count)
        return one

    @torch.no_grad()
    def scale_at(self, beta: Beta | None = None) -> Tensor:
        """The shared scale: 0-d, or (N,) for one beta an example. ValueError where every value has its own."""
        if self.shared is None:
            raise ValueError("every value has a scale of its own here, from the decoder; expected scale='shared'")
        return self.knots.shaped(self.shared(beta, self.shared.log_sigma).exp(), beta)

    def distortion(self, parameters: Tensor, x: Tensor, beta: Beta | None = None) -> Tensor:
        self._check(parameters, x)
        location, log_scale = self._split(parameters, beta)
        return -self._log_mass(levels_of(x, location.dtype), location, log_scale).flatten(1).sum(1)

    def mean(self, parameters: Tensor) -> Tensor:
        """E[x | z], see clipped_mean(). With a shared scale the median, the location kept within [0, 1]: like the mean
        of the Gaussian likelihoods it depends on the decoder alone, and it is the mean but near the ends.
        """
        if self.shared is not None:
            return full_precision(parameters).clamp(0, 1)
        return clipped_mean(*self._split(parameters, None), self._area)

    def sample(
        self, parameters: Tensor, generator: torch.Generator | None = None, beta: Beta | None = None
    ) -> Tensor:
        location, log_scale = self._split(parameters, beta)
        return to_levels(location + log_scale.exp() * self._standard(location, generator))

    def check_data(self, x: Rows) -> None:
        check_levels(x, self.name)

    def _split(self, parameters: Tensor, beta: Beta | None) -> tuple[Tensor, Tensor]:
        if self.shared is not None:
            location = full_precision(parameters)
            return location, self.shared(beta, location).reshape(-1, *[1] * (location.dim() - 1))
        location, raw = self._numbers(parameters)
        return location, soft_clip(raw, self.min_log_scale, MAX_LOG_SIGMA)

    def extra_repr(self) -> str:
        return f"scale={'value' if self.shared is None else 'shared'!r}, min_log_scale={self.min_log_scale}"


class DiscretizedGaussian(Discretized):
    """Masses of a normal distribution; the scale is its sigma. See numerics.log_normal_mass for the formula."""

    name = "discretized-gaussian"
    least = MIN_LOG_SIGMA

    def _log_mass(self, levels: Tensor, location: Tensor, log_scale: Tensor) -> Tensor:
        return log_normal_mass(levels, location, log_scale)

    def _standard(self, like: Tensor, generator: torch.Generator | None) -> Tensor:
        return standard_normal(like, generator)

    def _area(self, z: Tensor) -> Tensor:
        """z Phi(z) + phi(z)."""
        return z * torch.special.ndtr(z) + torch.exp(-0.5 * z.square()) / math.sqrt(2 * math.pi)


class DiscretizedLogistic(Discretized):
    """Masses of a logistic distribution (Kingma et al., 2016); its standard deviation is pi / sqrt(3) = 1.8 scales.

    See numerics.log_logistic_mass for the formula.
    """

    name = "discretized-logistic"
    least = MIN_LOG_SCALE

    def _log_mass(self, levels: Tensor, location: Tensor, log_scale: Tensor) -> Tensor:
        return log_logistic_mass(levels, location, log_scale)

    def _standard(self, like: Tensor, generator: torch.Generator | None) -> Tensor:
        return standard_logistic(like, generator)

    def _area(self, z: Tensor) -> Tensor:
        return softplus(z)


def clipped_mean(location: Tensor, log_scale: Tensor, area: Callable[[Tensor], Tensor]) -> Tensor:
    """The mean of y kept within [0, 1], y of a continuous distribution of this location m and scale s.

        s [A(m / s) - A((m - 1) / s)],  A the integral of its distribution function

    Rounding y to levels moves the mean by half a level, 1 / 510, at most. Where the scale is a level or more, that is
    1e-6 of a level inside the range, and at an end a 24th of the mass of its bin.
    """
    scale = torch.exp(log_scale)
    return (scale * (area(location / scale) - area((location - 1) / scale))).clamp(0, 1)


def to_levels(y: Tensor) -> Tensor:
    """The nearest of the 256 levels, as level / 255: the ends take what lies beyond."""
    return (y.clamp(0, 1) * HIGHEST).round() / HIGHEST


def standard_logistic(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draws log u - log(1 - u) of the shape, dtype and device of `like`; u is never 0 or 1."""
    u = torch.rand(like.shape, dtype=like.dtype, device=like.device, generator=generator)
    return torch.logit(u, eps=torch.finfo(like.dtype).eps / 2)

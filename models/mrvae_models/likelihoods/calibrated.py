"""Gaussian likelihoods that learn their sigma: shared, optimal and per image (sigma-VAE, Sections 3.1 and 4)."""

from __future__ import annotations

import abc
import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .base import Beta
from .gaussian import Continuous, check_minimum, squared_errors, standard_normal
from .numerics import MIN_LOG_SIGMA, full_precision
from .sigma_of_beta import DECAY, KNOTS, Knots, LearnedLogSigma, RunningVariance, at_knots, best_variances


class CalibratedGaussian(Continuous):
    """Gaussian pixels with one variance s for all of an example; `parameters` are the means.

        distortion = d/2 log(2 pi s) + |x - mean|^2 / (2 s),    d = dimensions of an example

    `sigma` is the number there is now, `sigma_at(beta)` the function of beta of one that has `knots` over a
    `beta_range`, as a multi-rate network needs it (without a range all its betas share one sigma); `at(beta)` is a copy
    with the one sigma of a beta. Where D + R is minimised, sigma^2 is the beta at which D + beta R with sigma = 1
    weighs the two alike: the operating point of the method.
    """

    knots: Knots

    @abc.abstractmethod
    def sigma_at(self, beta: Beta | None = None) -> Tensor:
        """The standard deviation that a sample has: 0-d, or (N,) for one beta an example. No gradient."""

    @abc.abstractmethod
    def _keep(self, beta: float) -> None:
        """Become the likelihood of this one beta."""

    @abc.abstractmethod
    def _set(self, sigma: float) -> None:
        """Have this sigma, which is one number."""

    def set_sigma(self, sigma: float) -> None:
        """Have this one standard deviation from now on, e^min_log_sigma at least (gaussian-image: in samples).

        ValueError where it is not positive and finite, or sigma is a function of beta: take at(beta).
        """
        if self.depends_on_beta:
            raise ValueError(f"sigma is {sigma}, one number, and a function of beta here: set that of at(beta)")
        if not (math.isfinite(sigma) and sigma > 0):
            raise ValueError(f"sigma is {sigma}; expected a positive, finite standard deviation, e.g. 0.1")
        self._set(sigma)

    @property
    def sigma(self) -> float:
        """The standard deviation now. ValueError where it is a function of beta: sigma_at(beta)."""
        return self.sigma_at().item()

    @property
    def depends_on_beta(self) -> bool:
        return self.knots.beta_range is not None

    def at(self, beta: float) -> CalibratedGaussian:
        if not self.depends_on_beta:
            return self
        one = copy.deepcopy(self)
        one._keep(beta)
        one.knots = Knots(None, self.knots.count)
        return one

    def at_likeliest(self, distortion: Tensor, dimensions: int) -> Tensor:
        """What a mean distortion, which is one at `sigma`, would be at the likeliest sigma for the same examples:

            d/2 (log(2 pi MSE) + 1),    MSE = sigma^2 (2 distortion / d - log(2 pi sigma^2))
        """
        variance = max(self.sigma, 1e-30) ** 2
        mse = variance * (2 * distortion / dimensions - math.log(2 * math.pi * variance))
        return 0.5 * dimensions * ((2 * math.pi * mse.clamp_min(1e-60)).log() + 1)

    def mean(self, parameters: Tensor) -> Tensor:
        return full_precision(parameters)

    def sample(
        self, parameters: Tensor, generator: torch.Generator | None = None, beta: Beta | None = None
    ) -> Tensor:
        mean = full_precision(parameters)
        sigma = self.sigma_at(beta).to(mean)
        return mean + sigma.reshape(-1, *[1] * (mean.dim() - 1)) * standard_normal(mean, generator)

    def _errors(self, parameters: Tensor, x: Tensor) -> tuple[Tensor, int]:
        """|x - mean|^2 of each example, (N,), and d."""
        self._check(parameters, x)
        return squared_errors(parameters, x), math.prod(x.shape[1:])


def nats(squared_error: Tensor, dimensions: int, variance: Tensor) -> Tensor:
    """d/2 log(2 pi s) + squared_error / (2 s)."""
    return 0.5 * (dimensions * (2 * math.pi * variance).log() + squared_error / variance)


class GaussianShared(CalibratedGaussian):
    """One sigma for all pixels and images, a parameter (sigma-VAE, Eq. 6, shared).

    log sigma = soft_clip(l, min_log_sigma); training starts from `sigma`.
    """

    name = "gaussian-shared"

    def __init__(
        self, sigma: float = 1.0, min_log_sigma: float = MIN_LOG_SIGMA, knots: int = KNOTS,
        beta_range: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.knots = Knots(beta_range, knots)
        self.scale = LearnedLogSigma(self.knots, sigma, check_minimum("min_log_sigma", min_log_sigma))

    def distortion(self, parameters: Tensor, x: Tensor, beta: Beta | None = None) -> Tensor:
        squared_error, dimensions = self._errors(parameters, x)
        return nats(squared_error, dimensions, torch.exp(2 * self.scale(beta, squared_error)))

    @torch.no_grad()
    def sigma_at(self, beta: Beta | None = None) -> Tensor:
        return self.knots.shaped(self.scale(beta, self.scale.log_sigma).exp(), beta)

    def _keep(self, beta: float) -> None:
        self.scale.keep(beta)

    def _set(self, sigma: float) -> None:
        self.scale.set(sigma)

    def extra_repr(self) -> str:
        return f"min_log_sigma={self.scale.minimum}"


class _Analytic(CalibratedGaussian):
    """A sigma that is computed, and its running average."""

    def __init__(
        self, min_log_sigma: float = MIN_LOG_SIGMA, decay: float = DECAY, knots: int = KNOTS,
        beta_range: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.min_log_sigma = check_minimum("min_log_sigma", min_log_sigma)
        self.knots = Knots(beta_range, knots)
        self.running = RunningVariance(self.knots, decay, self.least_variance)

    @property
    def least_variance(self) -> float:
        return math.exp(2 * self.min_log_sigma)

    @torch.no_grad()
    def sigma_at(self, beta: Beta | None = None) -> Tensor:
        return self.knots.shaped(self.running.at(beta, self.running.total).sqrt(), beta)

    def _keep(self, beta: float) -> None:
        self.running.keep(beta)

    def _set(self, sigma: float) -> None:
        self.running.set(sigma**2)

    def extra_repr(self) -> str:
        return f"min_log_sigma={self.min_log_sigma}"


class GaussianOptimal(_Analytic):
    """One sigma for all pixels and images, computed instead of learned (sigma-VAE, Eq. 8, optimal).

        training    sigma*^2 = MSE(x, mean) over the batch and all dimensions, at least e^(2 min_log_sigma)
        evaluation  the running average of that (also what a sample has, in either mode)

    In training the batch's mean distortion is d/2 (log(2 pi MSE) + 1), and gradients flow through sigma* as well. With
    knots sigma*^2 is log-linear between its values there, which best_variances() brings near to the likeliest for the
    batch: means of MSE_i over examples with betas near the knot, corrected for what changes between knots. With one
    beta a batch that is the MSE of the batch again. With one an example it takes several examples a knot; with few,
    sigma* nears the examples' own.
    The least variance is a plain maximum: a soft clip would move sigma* by 5 % at sigma = 0.05.
    """

    name = "gaussian-optimal"

    def distortion(self, parameters: Tensor, x: Tensor, beta: Beta | None = None) -> Tensor:
        squared_error, dimensions = self._errors(parameters, x)
        if self.training and len(x):
            mse, weights = squared_error / dimensions, self.knots.weights(beta, squared_error)
            self.running.update(mse.detach(), weights)
            variance = torch.exp(at_knots(weights, best_variances(mse, weights, self.least_variance).log()))
        else:
            variance = self.running.at(beta, squared_error)
        return nats(squared_error, dimensions, variance)


class GaussianImage(_Analytic):
    """One sigma for each image, computed (sigma-VAE, Section 4, per-image optimal; Beta-Sigma VAE's too).

        sigma_i^2 = MSE(x_i, mean_i) over the dimensions of example i, at least e^(2 min_log_sigma)
        distortion = d/2 (log(2 pi sigma_i^2) + 1)

    in training and evaluation alike. sigma_i is made of x_i: this is log p at its best sigma, above that of any sigma
    fixed beforehand, and no density of x (`normalised` is False). A sample, which has no x, takes the root of the
    running average of MSE_i in training.
    """

    name = "gaussian-image"
    normalised = False

    def distortion(self, parameters: Tensor, x: Tensor, beta: Beta | None = None) -> Tensor:
        squared_error, dimensions = self._errors(parameters, x)
        mse = squared_error / dimensions
        if self.training and len(x):
            self.running.update(mse.detach(), self.knots.weights(beta, mse))
        return nats(squared_error, dimensions, mse.clamp_min(self.least_variance))

    def at_likeliest(self, distortion: Tensor, dimensions: int) -> Tensor:
        """The same: every image has its own."""
        return distortion



"""Where a method that learns sigma or beta lands on the curve of a multi-rate network of the same data.

The curve is that of D + beta R with a Gaussian decoder of fixed sigma_0, D = SSE / (2 sigma_0^2) + constant. A decoder
of variance v at a KL weight b has the minimum of the curve's beta = b v / sigma_0^2 (conventions.py), so that

    sigma-VAE   (v = MSE, b = 1)                    lands where  beta sigma_0^2 = MSE(beta)
    L-VAE       (beta = s0^2 / s1^2, s_i^4 = L_i)   lands where  beta = sqrt(E(beta) / R(beta)), E = SSE / (2 sigma_0^2)

MSE and E being those of the curve at beta. Each is a stationary point of the loss with its sigmas put in: along an
optimal curve dD = -beta dR, so that d/2 log MSE + R has d/dR = 1 - beta sigma_0^2 / MSE, and sqrt(E) + sqrt(R)
likewise. Where the equation has several solutions, training goes to one with a lower loss.

`FIXED_POINTS` are solved without training anything; `landing()` is where a run that was trained has landed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import mrvae_kernels as mk

from .baking import source_config
from .config import TrainConfig
from .conventions import unit_beta
from .curve import Measurement
from .likelihoods import CalibratedGaussian, Gaussian, GaussianPixel
from .run import load_model, plain_network
from .vae import dimensions_of

LEAST_RATE = 1e-12
"""Nats, below which a rate is taken for this: its logarithm and its root stay finite. Of single draws, as a hierarchy
has it, it may be negative."""


@dataclass(frozen=True)
class FixedPoint:
    """A method's own beta as a function of the curve: of E = SSE / (2 sigma_0^2) and R, means in nats, and d.

    own(error, rate, dimensions)    the beta that its sigmas have on a network of this error and rate
    loss(error, rate, dimensions)   its loss there, up to constants
    """

    title: str
    own: Callable[[float, float, int], float]
    loss: Callable[[float, float, int], float]

    def excess(self, beta: float, error: float, rate: float, dimensions: int) -> float:
        """log(own beta / beta): 0 where it lands."""
        return math.log(self.own(error, rate, dimensions) / beta)


FIXED_POINTS = {
    "sigma-vae": FixedPoint(
        "sigma-VAE",
        lambda error, rate, d: 2 * error / d,
        lambda error, rate, d: 0.5 * d * math.log(2 * error / d) + rate,
    ),
    "l-vae": FixedPoint(
        "L-VAE",
        lambda error, rate, d: math.sqrt(error / rate),
        lambda error, rate, d: 2 * math.sqrt(error) + 2 * math.sqrt(rate),
    ),
}
"""By the names of the objectives, those OF_ONE_BETA; L-VAE with a reconstruction loss of sums (--lvae-form sum)."""


def curves_own(model: nn.Module, wanted: str) -> Gaussian:
    """The likelihood of a multi-rate model on whose curve a variance has a place; ValueError for another."""
    own = plain_network(model).likelihood
    if isinstance(own, Gaussian):
        return own
    learns = isinstance(own, CalibratedGaussian)
    there = ", which learns sigma at every beta: its sigma-VAE is beta = 1, mrvae bake --beta 1" if learns else ""
    raise ValueError(
        f"{wanted} is looked for on the curve of a Gaussian of fixed sigma, and this run's likelihood is "
        f"{own.name}{there}; train with --likelihood gaussian"
    )


@dataclass(frozen=True)
class OwnBeta:
    """A FixedPoint on the curve of one model: what is solved for in log beta."""

    point: FixedPoint
    likelihood: Gaussian
    dimensions: int

    @property
    def quantity(self) -> str:
        """What is 0 at the beta that is looked for."""
        return f"log of {self.point.title}'s own beta over beta"

    def excess(self, beta: float, measured: Measurement, rows: Tensor | None = None) -> float:
        """FixedPoint.excess() of what was measured at beta, of some of its examples or of all."""
        return self.point.excess(beta, *self._means(measured, rows), self.dimensions)

    def loss(self, measured: Measurement) -> float:
        return self.point.loss(*self._means(measured, None), self.dimensions)

    def check_reach(self, betas: Sequence[float], excesses: Sequence[float]) -> None:
        """ValueError, saying on which side, where the own beta lies outside the range at all betas of it."""
        if min(excesses) <= 0 <= max(excesses):
            return
        side, end, i = ("above", "higher", -1) if excesses[0] > 0 else ("below", "lower", 0)
        own = betas[i] * math.exp(excesses[i])
        raise ValueError(
            f"{self.point.title} lands {side} the range, {betas[0]:g} to {betas[-1]:g}: at beta = {betas[i]:g} its own "
            f"beta would be {own:.3g}; train for a --beta-range with a {end} end"
        )

    def _means(self, measured: Measurement, rows: Tensor | None) -> tuple[float, float]:
        distortion, rate = (part if rows is None else part[rows] for part in measured[:2])
        constant = 0.5 * self.dimensions * math.log(2 * math.pi * self.likelihood.sigma**2)
        return distortion.mean().item() - constant, max(rate.mean().item(), LEAST_RATE)


def own_beta(model: nn.Module, name: str) -> OwnBeta:
    """The fixed point of that name on a multi-rate model's curve; ValueError for one of no Gaussian of fixed sigma."""
    point = FIXED_POINTS[name]
    return OwnBeta(point, curves_own(model, point.title), dimensions_of(plain_network(model)))


@dataclass(frozen=True)
class Landing:
    """A trained run at one beta: its KL weight, and the variance of its decoder, None where that is no Gaussian."""

    name: str  # of the method
    beta: float
    variance: float | None
    likelihood: str

    def __str__(self) -> str:
        """In words, with what the beta on a curve is made of."""
        decoder = self.likelihood if self.variance is None else f"variance {self.variance:.4g} in training"
        return f"{self.name}, beta = {self.beta:.4g}, {decoder}"

    @property
    def unit_beta(self) -> float:
        """Its beta on the curve of Gaussian(sigma=1). ValueError without a variance."""
        if self.variance is None:
            raise ValueError(f"{self.name} has likelihood {self.likelihood}, no Gaussian, and so no place on its curve")
        return unit_beta(self.beta, self.variance)

    def on(self, model: nn.Module) -> float:
        """The beta of a multi-rate model's curve that has the same minimum; ValueError where there is none."""
        own = plain_network(model).likelihood
        if self.variance is None:
            if own.name == self.likelihood:
                return self.beta
            raise ValueError(
                f"{self.name} has likelihood {self.likelihood} and the curve {own.name}; expected the same, or "
                "Gaussians on both sides"
            )
        return self.unit_beta / curves_own(model, self.name).sigma ** 2


def landing(directory: str | Path) -> Landing:
    """Where the run in a directory landed: a beta-VAE, sigma-VAE, L-VAE or BS-VAE, or a baked model.

    The variance is sigma^2 as learned, by which training weighed distortion against rate, whatever sigma the run has
    from validation; of per-image ones the mean over training, so that beta sigma^2 is the mean of the images' own; of
    per-pixel ones the mean over the run's training images. ValueError for a multi-rate run.
    """
    return landing_of(*load_model(directory), Path(directory))


def landing_of(model: nn.Module, document: Mapping[str, Any], directory: Path) -> Landing:
    """landing() of a run that load_model() has read."""
    if isinstance(model, mk.MultiRate):
        raise ValueError(f"{directory} has gates, and so many betas; expected a run at one beta, or a baked model")
    config = source_config(dict(document))
    network = plain_network(model)
    own = network.likelihood
    beta = float(document["model"]["beta"])
    name = "baked" if "baked" in document else method(config, beta)
    trained_with = document.get("learned", {}).get("sigma")
    variance = _variance(network, config, directory) if trained_with is None else trained_with**2
    return Landing(name, beta, variance, own.name)


def _variance(network: Any, config: TrainConfig, directory: Path) -> float | None:
    own = network.likelihood
    if isinstance(own, (Gaussian, CalibratedGaussian)):
        return own.sigma**2
    if isinstance(own, GaussianPixel):
        from .metrics.calibration import mean_variance
        from .report import dataset_for

        return mean_variance(network, dataset_for(network, config, "train", directory), 1.0)
    return None


def method(config: TrainConfig, beta: float) -> str:
    """What a plain run is called in pictures and tables: "sigma-VAE, optimal", "BS-VAE, beta = 10", "L-VAE", ..."""
    kind = (config.likelihood or "").removeprefix("gaussian-")
    words = {"image": "per image", "pixel": "per pixel"}.get(kind, kind)
    if config.objective == "l-vae":
        return "L-VAE"
    if kind in ("shared", "optimal", "image", "pixel"):
        if beta == 1:
            return f"sigma-VAE, {words}"
        return f"BS-VAE, beta = {beta:g}" if kind == "image" else f"sigma-VAE, {words}, beta = {beta:g}"
    return f"{config.objective.removesuffix('-vae')}-VAE, beta = {beta:g}"


def learned_sigma(model: nn.Module) -> float | None:
    """sigma of a plain model's decoder that learns one, as it is now; None for any other."""
    own = plain_network(model).likelihood
    return own.sigma if isinstance(own, CalibratedGaussian) and not own.depends_on_beta else None

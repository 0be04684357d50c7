"""Calibration of a decoder's variance: what p(x | z) says of the spread of x around its mean, against what there is.

    z ~ q(z | x),  m = E[x | z],  v = Var[x | z] of every value,  e = (x - m)^2

    ratio      sum v / sum e, 1 where the predicted variance is the mean squared error; above 1 it is too wide
    bins       of equal numbers of values by rising v: mean v, mean e, and their ratio in each (what a decoder says
               about one value and another, as in reliability diagrams; Guo et al., 2017)
    coverage   of the central interval of probability p of p(x | z): the part of the values that lie in it, p where the
               decoder is calibrated (Dawid, 1982)

A likelihood of one variance has one bin. Per-image variances are computed from the x that they are the variances of
(sigma-VAE, Appendix D), so their overall ratio is 1 by construction; their coverage is not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..curve import Examples, check_finite
from ..likelihoods import CalibratedGaussian, Gaussian, GaussianImage, GaussianPixel, Likelihood
from ..scored import scored_as
from .posteriors import example_batches, ready, vae_of

LEVELS = (0.5, 0.8, 0.9, 0.95, 0.99)
BINS = 10


@dataclass(frozen=True)
class Bin:
    """Values of near predicted variances: how many, and the means of v and e over them."""

    values: int
    predicted: float
    empirical: float

    @property
    def ratio(self) -> float:
        return self.predicted / self.empirical if self.empirical else math.inf


@dataclass(frozen=True)
class Calibration:
    """Of a whole set; variances on x's own scale squared."""

    predicted: float  # mean v
    empirical: float  # mean e
    bins: tuple[Bin, ...]
    coverage: tuple[tuple[float, float], ...]  # (level, part of the values within)

    @property
    def ratio(self) -> float:
        return self.predicted / self.empirical if self.empirical else math.inf

    @property
    def bin_error(self) -> float:
        """mean over bins, weighted by their values, of |log(v / e)|: 0 where calibrated, log 2 where off by two."""
        total = sum(each.values for each in self.bins)
        return sum(each.values * abs(math.log(each.ratio)) for each in self.bins) / total

    @property
    def coverage_error(self) -> float:
        """mean over levels of |coverage - level|."""
        return sum(abs(found - level) for level, found in self.coverage) / len(self.coverage)


def calibrate(
    model: nn.Module,
    dataset: Examples,
    beta: float,
    variance: float | None = None,
    levels: Sequence[float] = LEVELS,
    bins: int = BINS,
    batch_size: int = 500,
    seed: int = 0,
    calibration: Tensor | None = None,
) -> Calibration:
    """Predicted against empirical variance of all values of a set at one beta, one draw of z an example.

    variance: of a Gaussian around the decoder's means, in place of its own likelihood: beta for the variance that the
    KL weight of a beta-VAE with sigma = 1 implies. ValueError for a likelihood that is no Gaussian, without it; for a
    network without one Gaussian latent vector, an empty set, and levels outside (0, 1).
    Values are binned by their own v in float64; memory of two numbers a value.
    """
    vae_of(model, "the calibration of a decoder's variance")
    if bins < 1 or not levels or not all(0 < level < 1 for level in levels):
        raise ValueError(f"bins is {bins} and levels {tuple(levels)}; expected at least one, and levels within (0, 1)")
    if variance is not None:
        with scored_as(model, Gaussian(math.sqrt(variance))):
            return _calibrate(model, dataset, beta, levels, bins, batch_size, seed, calibration)
    return _calibrate(model, dataset, beta, levels, bins, batch_size, seed, calibration)


def _calibrate(
    model: nn.Module,
    dataset: Examples,
    beta: float,
    levels: Sequence[float],
    bins: int,
    batch_size: int,
    seed: int,
    calibration: Tensor | None,
) -> Calibration:
    parts = [*_values(model, dataset, beta, batch_size, seed, calibration)]
    predicted, empirical = zip(*parts, strict=True)
    v, e = torch.cat(predicted), torch.cat(empirical)
    inside = [(level, (e <= _quantile(level) ** 2 * v).double().mean().item()) for level in levels]
    return Calibration(v.mean().item(), e.mean().item(), binned(v, e, bins), tuple(inside))


def _values(
    model: nn.Module, dataset: Examples, beta: float, batch_size: int, seed: int, calibration: Tensor | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """v and e of the values of each batch, float64 on the CPU, (batch * d,) each."""
    generator = torch.Generator()
    with ready(model, beta, calibration) as network:
        for number, x in enumerate(example_batches(model, dataset, batch_size)):
            generator.manual_seed(seed * 1_000_003 + number * batch_size)
            mean, log_variance = network.encode(x)
            noise = torch.randn(mean.shape, generator=generator).to(mean)
            parameters = network.decode(mean + torch.exp(0.5 * log_variance) * noise)
            squares = (x - network.likelihood.mean(parameters)).double().square()
            variance = variances(network.likelihood, parameters, x, beta).double().expand_as(squares)
            check_finite("the decoder's variance", variance, beta)
            check_finite("the squared error of the decoder's mean", squares, beta)
            yield variance.flatten().cpu(), squares.flatten().cpu()


def mean_variance(
    model: nn.Module,
    dataset: Examples,
    beta: float,
    batch_size: int = 500,
    seed: int = 0,
    calibration: Tensor | None = None,
) -> float:
    """Calibration.predicted alone, in the memory of one batch: of training sets of any size."""
    vae_of(model, "the mean of a decoder's variance")
    total = count = 0.0
    for variance, _ in _values(model, dataset, beta, batch_size, seed, calibration):
        total, count = total + variance.sum().item(), count + len(variance)
    return total / count


def variances(likelihood: Likelihood, parameters: Tensor, x: Tensor, beta: float) -> Tensor:
    """Var[x | z] of a Gaussian likelihood, of a shape that broadcasts to x's; ValueError for another likelihood."""
    likelihood = getattr(likelihood, "density", likelihood)
    first = (-1, *[1] * (x.dim() - 1))
    if isinstance(likelihood, Gaussian):
        return torch.full((1,), likelihood.sigma**2, dtype=torch.float64, device=x.device).reshape(first)
    if isinstance(likelihood, GaussianImage):
        errors = (x - likelihood.mean(parameters)).square().flatten(1).mean(1)
        return errors.clamp_min(likelihood.least_variance).reshape(first)
    if isinstance(likelihood, CalibratedGaussian):
        return likelihood.sigma_at(beta).square().reshape(first)
    if isinstance(likelihood, GaussianPixel):
        return likelihood.sigma_of(parameters).square()
    raise ValueError(
        f"the calibration is of a Gaussian decoder's variance, and the likelihood is {likelihood.name}; expected a "
        "gaussian one, or give variance=, of a Gaussian around its means"
    )


def _quantile(level: float) -> float:
    """Half the width of a standard normal's central interval of this probability."""
    return math.sqrt(2) * torch.erfinv(torch.tensor(level, dtype=torch.float64)).item()


def binned(v: Tensor, e: Tensor, bins: int) -> tuple[Bin, ...]:
    """Bins of equal numbers of values by rising v, as many as there are different v at most; v, e: (n,)."""
    low, high = v.aminmax()
    if low == high:
        return (Bin(len(v), v.mean().item(), e.mean().item()),)
    order = v.argsort(stable=True)
    edges = [round(i * len(v) / bins) for i in range(bins + 1)]
    parts = [order[first:last] for first, last in zip(edges[:-1], edges[1:], strict=True) if last > first]
    return tuple(Bin(len(part), v[part].mean().item(), e[part].mean().item()) for part in parts)


def of_calibration(quantity: str) -> Callable[..., float]:
    """A metric: one number of a Calibration by its decoder's own likelihood."""

    def measured(
        model: nn.Module,
        dataset: Examples,
        beta: float,
        batch_size: int = 500,
        seed: int = 0,
        calibration: Tensor | None = None,
    ) -> float:
        found = calibrate(model, dataset, beta, batch_size=batch_size, seed=seed, calibration=calibration)
        return getattr(found, quantity)

    return measured

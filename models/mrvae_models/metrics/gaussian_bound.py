"""Bounds on -log p(x) of a decoder's means as a Gaussian of one constant variance, in nats, lower being better.

A beta-VAE with sigma = 1 is trained for another decoder than it is scored by, unless it is scored as the Gaussian whose
variance its KL weight stands for. So sigma-VAE's Table 1 has it, on single samples of z:

    -log p < E[ d/2 log(2 pi v) + |x - mean|^2 / (2 v) ] + R,        v the variance that beta implies

with sigma^2 = beta / 2 there, beta in this project's convention (conventions.py, where the table's numbers say so). Any
v that was fixed before the test examples were seen gives a bound; the lowest on a set is at v = MSE of that set, where
the first term is d/2 [log(2 pi MSE) + 1]. `train` is the set whose MSE is taken.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from ..curve import Examples, evaluate
from ..likelihoods import LEVELS_256, DiscretizedGaussian, Gaussian
from ..likelihoods.numerics import MIN_LOG_SIGMA
from ..run import plain_network
from ..scored import gaussian_nats, likeliest_sigma, scored_as, squared_errors
from ..vae import dimensions_of
from .bound import DRAWS, importance_weighted_bound


def implied_variance(model: nn.Module, beta: float) -> float:
    """beta sigma_0^2: what a KL weight means as the variance of a decoder trained with Gaussian(sigma_0).

    ValueError for another likelihood: one that learns its variance has its own bound, the ELBO.
    """
    own = plain_network(model).likelihood
    if not isinstance(own, Gaussian):
        raise ValueError(
            f"likelihood {own.name} has no fixed sigma, which beta would stand for the variance beside; expected "
            "gaussian: of one that learns its variance the metric elbo is the bound, or take nll_optimal"
        )
    return beta * own.sigma**2


def bound_at(
    model: nn.Module,
    dataset: Examples,
    beta: float,
    variance: float | None = None,
    train: Examples | None = None,
    batch_size: int = 500,
    samples: int = 1,
    seed: int = 0,
    calibration: Tensor | None = None,
) -> float:
    """The bound above at one variance; None: that of the mean squared error on `train`, or on `dataset` itself."""
    settings: dict[str, Any] = dict(batch_size=batch_size, samples=samples, seed=seed, calibration=calibration)
    if variance is None:
        variance = best_sigma(model, dataset, beta, train, **settings) ** 2
    measured = squared_errors(model, dataset, beta, **settings)
    dimensions = dimensions_of(plain_network(model))
    return gaussian_nats(measured.distortion.mean().item(), dimensions, variance) + measured.rate.mean().item()


def nll_implied(
    model: nn.Module,
    dataset: Examples,
    beta: float,
    batch_size: int = 500,
    samples: int = 1,
    seed: int = 0,
    calibration: Tensor | None = None,
) -> float:
    """The bound at the variance that beta implies: how sigma-VAE's Table 1 scores beta-VAEs."""
    variance = implied_variance(model, beta)
    return bound_at(model, dataset, beta, variance, None, batch_size, samples, seed, calibration)


def nll_optimal(
    model: nn.Module,
    dataset: Examples,
    beta: float,
    train: Examples | None = None,
    batch_size: int = 500,
    samples: int = 1,
    seed: int = 0,
    calibration: Tensor | None = None,
) -> float:
    """The bound at the best constant variance of the training examples."""
    return bound_at(model, dataset, beta, None, train, batch_size, samples, seed, calibration)


def nll_optimal_weighted(
    model: nn.Module,
    dataset: Examples,
    beta: float,
    train: Examples | None = None,
    draws: int = DRAWS,
    batch_size: int = 500,
    seed: int = 0,
    calibration: Tensor | None = None,
) -> float:
    """The same with the importance-weighted bound of `draws` draws, at the variance that is best for one."""
    settings: dict[str, Any] = dict(batch_size=batch_size, seed=seed, calibration=calibration)
    with scored_as(model, Gaussian(best_sigma(model, dataset, beta, train, **settings))):
        return -importance_weighted_bound(model, dataset, beta, draws, **settings)


def nll_discretised(
    model: nn.Module,
    dataset: Examples,
    beta: float,
    train: Examples | None = None,
    batch_size: int = 500,
    samples: int = 1,
    seed: int = 0,
    calibration: Tensor | None = None,
) -> float:
    """The single-sample bound on -log P of 256 levels (sigma-VAE, Table 4): for densities and probabilities alike.

    A likelihood of 256 levels is taken as it is. A density's means are those of a Gaussian of the best constant
    variance, whose mass over a level's bin counts. ValueError for data that are not 256 levels.
    """
    settings: dict[str, Any] = dict(batch_size=batch_size, samples=samples, seed=seed, calibration=calibration)
    own = plain_network(model).likelihood
    if own.measure == LEVELS_256:
        return -evaluate(model, dataset, [beta], **settings).points[0].elbo
    sigma = best_sigma(model, dataset, beta, train, **settings)
    density = DiscretizedGaussian(sigma=sigma, min_log_scale=min(MIN_LOG_SIGMA, math.log(sigma) - 1))
    density.check_data(dataset.examples)
    with scored_as(model, density.to(next(model.parameters()))):
        return -evaluate(model, dataset, [beta], **settings).points[0].elbo


def best_sigma(model: nn.Module, dataset: Examples, beta: float, train: Examples | None, **settings: Any) -> float:
    """The root of the mean squared error on `train`, or on `dataset` without it."""
    return likeliest_sigma(model, dataset if train is None else train, beta, **settings)

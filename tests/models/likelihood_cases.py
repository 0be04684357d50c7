"""One of each likelihood, with parameters for it: what the tests of likelihoods share."""

from __future__ import annotations

import math

import torch
from mrvae_models.likelihoods import LIKELIHOODS, likelihood

OF_LEVELS = [name for name, kind in LIKELIHOODS.items() if kind.measure == "256 levels"]
DENSITIES = [name for name, kind in LIKELIHOODS.items() if kind.measure == "continuous" and kind.normalised]

CASES = {name: {} for name in LIKELIHOODS} | {
    "gaussian": {"sigma": 0.3},
    "gaussian-shared": {"sigma": 0.2},
    "discretized-gaussian": {"sigma": 0.02},
    "discretized-logistic": {"sigma": 0.02},
    "logistic-mixture": {"components": 3},
}


def made(name, **options):
    """The likelihood of this name, in float64 and eval mode; one with a computed sigma has seen one batch."""
    usual = {} if options.get("scale") == "value" else CASES.get(name, {})  # where there is no sigma to start from
    model = likelihood(name, **{**usual, **options}).double().eval()
    if hasattr(model, "running"):
        model.train()
        model.distortion(torch.full((2, 3), 0.5).double(), torch.tensor([[0.4, 0.7, 0.5], [0.2, 0.5, 0.6]]).double())
        model.eval()
    return model


def parameters_for(model, shape, n=1, seed=0, spread=0.3):
    """Parameters of n examples: locations within data, scales of some levels, logits about 0."""
    generator = torch.Generator().manual_seed(seed)
    raw = spread * torch.randn(n, *model.parameter_shape(shape), dtype=torch.float64, generator=generator)
    if model.name in ("bernoulli", "bitwise", "categorical"):
        return 3 * raw
    if model.name == "logistic-mixture":
        channels = shape[0] if len(shape) >= 3 else 1
        each = raw.unflatten(1, (model.components * (1 + 2 * channels), -1))
        each[:, model.components * (1 + channels) :] -= 4  # log scales
        each[:, model.components : model.components * (1 + channels)] += 0.5
        return each.flatten(1, 2)
    parts = raw.unflatten(1, (model.numbers, -1))
    parts[:, 0] += 0.5
    if model.numbers > 1:
        parts[:, 1] -= 3.5
    if model.numbers > 2:
        parts[:, 2] += 1  # Student's t: e^softplus(1) = 4 degrees of freedom
    return parts.flatten(1, 2)


def levels():
    """All 256 levels as data, (256,)."""
    return torch.arange(256, dtype=torch.float64) / 255


def log_integral(log_density, grid):
    """log of the integral of exp(log_density) over an even grid, by the trapezoidal rule."""
    weights = torch.full_like(grid, (grid[1] - grid[0]).item())
    weights[[0, -1]] /= 2
    return torch.logsumexp(log_density + weights.log(), 0).item()


def chi_square_bound(degrees):
    """What a chi-square statistic exceeds with probability of about 1e-6, by Wilson and Hilferty's approximation."""
    return degrees * (1 - 2 / (9 * degrees) + 4.75 * math.sqrt(2 / (9 * degrees))) ** 3

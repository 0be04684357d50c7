"""A decoder's means scored as those of one Gaussian: what makes models of different likelihoods comparable.

    with scored_as(model, Gaussian(0.1)):
        evaluate(model, dataset, [0.5])         # rate, and -log N(x; mean(z), 0.01 I)

beta-VAEs with sigma = 1, sigma-VAEs, L-VAEs and BS-VAEs all decode to means. On one plane of rate and distortion they
are what they are with the same Gaussian around these means; as bounds on log p they are valid with any that was fixed
before.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .curve import Examples, Measurement, measure_all
from .likelihoods import Gaussian, Likelihood
from .run import plain_network
from .vae import dimensions_of


class Means(Likelihood):
    """p(x | z) = density(x; E[x | z] by `own`); `parameters` are those of `own`."""

    def __init__(self, own: Likelihood, density: Likelihood) -> None:
        super().__init__()
        self.own, self.density = own, density
        self.name, self.measure = density.name, density.measure
        self.normalised = density.normalised

    def parameter_shape(self, input_shape: Sequence[int]) -> tuple[int, ...]:
        return self.own.parameter_shape(input_shape)

    def distortion(self, parameters: Tensor, x: Tensor, beta: float | Tensor | None = None) -> Tensor:
        return self.density.distortion(self.own.mean(parameters), x, beta)

    def mean(self, parameters: Tensor) -> Tensor:
        return self.own.mean(parameters)

    def sample(
        self, parameters: Tensor, generator: torch.Generator | None = None, beta: float | Tensor | None = None
    ) -> Tensor:
        return self.density.sample(self.own.mean(parameters), generator, beta)

    def check_data(self, x: Any) -> None:
        self.density.check_data(x)


@contextlib.contextmanager
def scored_as(model: nn.Module, density: Likelihood) -> Iterator[None]:
    """A block in which the network's decoder is one of `density`, a likelihood of means, around its own E[x | z].

    ValueError for a network of text, whose expected x is no value of x.
    """
    network = plain_network(model)
    own = network.likelihood
    if own.measure == "tokens":
        raise ValueError(f"a {own.name} likelihood is of tokens, which no density is around; expected one of images")
    network.likelihood = Means(own, density)
    try:
        yield
    finally:
        network.likelihood = own


BARE = Gaussian(1 / math.sqrt(2 * math.pi))
"""Whose constant d/2 log(2 pi sigma^2) is 0: its distortion is pi |x - mean|^2, and nothing cancels."""


def squared_errors(model: nn.Module, dataset: Examples, beta: float, **settings: Any) -> Measurement:
    """measure_all() with the mean squared error |x - E[x|z]|^2 / d of each example in place of its distortion, (N,).

    settings: batch_size, samples, seed and calibration, as there.
    """
    dimensions = dimensions_of(plain_network(model))
    with scored_as(model, BARE):
        measured = measure_all(model, dataset, beta, **settings)
    return measured._replace(distortion=measured.distortion / (math.pi * dimensions))


def likeliest_sigma(model: nn.Module, dataset: Examples, beta: float, **settings: Any) -> float:
    """The one sigma of a Gaussian around the decoder's means at which these examples are likeliest: the root of their
    mean squared error a dimension (sigma-VAE, Eq. 8). settings as squared_errors() has them."""
    return math.sqrt(squared_errors(model, dataset, beta, **settings).distortion.mean().item())


def gaussian_nats(mse: Tensor | float, dimensions: int, variance: float) -> Any:
    """d/2 [log(2 pi v) + MSE / v]: -log p of a Gaussian of variance v by the mean squared error, in nats."""
    return 0.5 * dimensions * (math.log(2 * math.pi * variance) + mse / variance)

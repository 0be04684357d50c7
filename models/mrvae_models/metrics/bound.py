"""The importance-weighted bound on log p(x) (Burda et al., 2016)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..curve import Examples, distortion_of
from ..total_correlation import log_normal
from .posteriors import example_batches, ready, vae_of

DRAWS = 100


def log_likelihoods(
    model: nn.Module,
    dataset: Examples,
    beta: float,
    draws: int = DRAWS,
    batch_size: int = 500,
    seed: int = 0,
    calibration: Tensor | None = None,
) -> Tensor:
    """L_K of each example, (N,), nats, float64 on the CPU:

        L_K = log 1/K sum_k p(x | z_k) p(z_k) / q(z_k | x),    z_k ~ q(z | x)

    L_1 is the ELBO's estimate; in expectation L_K rises with K and tends to log p(x). The sum is taken in float64, draw
    by draw: memory does not grow with K. For a Bernoulli likelihood log p(x) is one only of data of 0 and 1.
    ValueError for K below 1, for a network without one Gaussian latent vector, and for a likelihood that is no density.
    """
    if draws < 1:
        raise ValueError(f"draws is {draws}; expected a positive integer")
    likelihood = vae_of(model, "the importance-weighted bound").likelihood
    if not likelihood.normalised:
        raise ValueError(
            f"likelihood {likelihood.name} makes its sigma of x and is no density of x, so that no bound on log p(x) "
            "comes of it; expected one such as gaussian-optimal: leave this metric out for it"
        )
    generator = torch.Generator()
    bounds = []
    with ready(model, beta, calibration) as network:
        for number, x in enumerate(example_batches(model, dataset, batch_size)):
            generator.manual_seed(seed * 1_000_003 + number * batch_size)
            mean, log_variance = network.encode(x)
            total = torch.full((len(x),), -math.inf, dtype=torch.float64, device=mean.device)
            for _ in range(draws):
                noise = torch.randn(mean.shape, generator=generator).to(mean)
                z = mean + torch.exp(0.5 * log_variance) * noise
                distortion = distortion_of(network, z, x, beta).double()
                # of the z that was decoded, with its rounding: not of the noise that it was made from
                ratio = log_normal(z.double(), 0.0, 0.0) - log_normal(z.double(), mean.double(), log_variance.double())
                total = torch.logaddexp(total, ratio.sum(1) - distortion)
            bounds.append(total.cpu() - math.log(draws))
    return torch.cat(bounds)


def importance_weighted_bound(
    model: nn.Module,
    dataset: Examples,
    beta: float,
    draws: int = DRAWS,
    batch_size: int = 500,
    seed: int = 0,
    calibration: Tensor | None = None,
) -> float:
    """The mean of log_likelihoods() over the set, nats an example."""
    return log_likelihoods(model, dataset, beta, draws, batch_size, seed, calibration).mean().item()

"""The posteriors of a whole set at one beta: what most metrics are made of."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..curve import Examples, at, calibrated, check_finite, evaluating
from ..networks.lstm import SentenceVAE
from ..run import plain_network
from ..vae import VAE


class Posteriors(NamedTuple):
    """q(z | x_n) = N(mean_n, diag exp(log_variance_n)) of N examples; float64, on the model's device."""

    mean: Tensor  # (N, k)
    log_variance: Tensor  # (N, k)

    def draw(self, seed: int = 0) -> Tensor:
        """One z a posterior, (N, k); the same noise at every beta for one seed and one N."""
        noise = torch.randn(self.mean.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return self.mean + torch.exp(0.5 * self.log_variance) * noise.to(self.mean.device)

    def take(self, rows: Tensor) -> Posteriors:
        return Posteriors(self.mean[rows], self.log_variance[rows])


def vae_of(model: nn.Module, wanted_by: str) -> VAE:
    """The VAE inside; ValueError, naming the network, where there is no single Gaussian latent vector, and for text."""
    network = plain_network(model)
    if isinstance(network, SentenceVAE):
        raise ValueError(
            f"{wanted_by} is of images, and the network {type(network).__name__} is one of text: leave this metric out "
            "for it"
        )
    _check_latent(network, wanted_by)
    return network


def _check_latent(network: nn.Module, wanted_by: str) -> None:
    if not isinstance(network, (VAE, SentenceVAE)):
        raise ValueError(
            f"{wanted_by} needs one Gaussian latent vector, q(z|x) = N(mean, diag(variance)), and the network "
            f"{type(network).__name__} has none; expected a VAE, such as mlp or cnn: leave this metric out for it"
        )


@contextlib.contextmanager
def ready(model: nn.Module, beta: float, calibration: Tensor | None = None) -> Iterator[Any]:
    """A block in which the plain network inside runs at this beta: eval mode, batch statistics, no gradients."""
    if not 0 < beta < float("inf"):
        raise ValueError(f"beta is {beta}; expected a positive, finite KL weight")
    with torch.no_grad(), evaluating(model), calibrated(model, calibration, beta), at(model, beta):
        yield plain_network(model)


def example_batches(model: nn.Module, dataset: Examples, batch_size: int) -> Iterator[Tensor]:
    """The set in batches on the model's device and, where they are no whole numbers, in its dtype."""
    examples = dataset.examples
    if len(examples) == 0:
        raise ValueError("the dataset is empty; expected at least one example")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; expected a positive integer")
    like = next(plain_network(model).parameters())
    for start in range(0, len(examples), batch_size):
        x = examples[start : start + batch_size]
        yield x.to(device=like.device, dtype=like.dtype if x.is_floating_point() else None)


def posteriors(
    model: nn.Module,
    dataset: Examples,
    beta: float,
    batch_size: int = 500,
    calibration: Tensor | None = None,
    wanted_by: str = "this metric",
) -> Posteriors:
    """q(z | x) of all examples, images or sentences, at beta, in batches; memory of N k numbers.

    ValueError for a network without one Gaussian latent vector (`wanted_by` names the metric), for an empty set, and
    for numbers that are not finite.
    """
    _check_latent(plain_network(model), wanted_by)
    with ready(model, beta, calibration) as network:
        parts = [network.encode(x) for x in example_batches(model, dataset, batch_size)]
    mean, log_variance = (torch.cat(part).double() for part in zip(*parts, strict=True))
    check_finite("the posterior mean", mean, beta)
    check_finite("the posterior's log variance", log_variance, beta)
    return Posteriors(mean, log_variance)

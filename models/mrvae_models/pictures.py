"""Images along beta: reconstructions and samples with the same noise at every beta, of images and of videos."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .curve import Examples, at, calibrated, evaluating, seeded
from .networks.svg import SVG
from .run import plain_network
from .vae import VAE


class Pictures(NamedTuple):
    """Images along beta, in [0, 1] for likelihoods of such data; b betas, n examples, m draws from the prior.

    Of videos they are the frames of one: its own, those of its reconstruction, and a prediction from its first `given`.
    """

    betas: list[float]
    originals: Tensor  # (n, C, H, W)
    reconstructions: Tensor  # (b, n, C, H, W), from z ~ q(z | x) with the same noise at every beta
    samples: Tensor  # (b, m, C, H, W), the same z ~ N(0, I) at every beta; of a hierarchy the same noise
    given: int | None = None  # of videos: first frames of `samples` that are its own; of reconstructions the first is


def pictures(
    model: nn.Module,
    dataset: Examples,
    betas: Sequence[float],
    count: int = 8,
    seed: int = 0,
    calibration: Tensor | None = None,
) -> Pictures:
    """Reconstructions of `count` examples, drawn by `seed`, and as many samples from the prior, at each of `betas`."""
    network = plain_network(model)
    video = isinstance(network, SVG)
    count = 1 if video else count
    generator = torch.Generator().manual_seed(seed)
    chosen = dataset.examples[torch.randperm(len(dataset.examples), generator=generator)[:count]]
    parameter = next(network.parameters())
    x = chosen.to(parameter)
    reconstructions, drawn = [], []
    draw = _draw_vae if isinstance(network, VAE) else _draw_video if video else _draw_whole
    state = generator.get_state()
    with torch.no_grad(), evaluating(model):
        for beta in betas:
            with calibrated(model, calibration, beta), at(model, beta):
                generator.set_state(state)
                reconstruction, sample = draw(network, x, count, generator)
                reconstructions.append(reconstruction.float().cpu())
                drawn.append(sample.float().cpu())
    originals = chosen[0] if video else chosen
    given = network.n_past if video else None
    return Pictures(list(betas), originals.cpu(), torch.stack(reconstructions), torch.stack(drawn), given)


def _draw_vae(network: VAE, x: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Reconstructions of x, and `count` samples."""
    noise = torch.randn(2, count, network.latent, generator=generator).to(x)
    mean, log_variance = network.encode(x)
    z = mean + torch.exp(0.5 * log_variance) * noise[0, : len(x)]
    return network.likelihood.mean(network.decode(z)), network.likelihood.mean(network.decode(noise[1]))


def _draw_whole(network: Any, x: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The same of a network that draws its noise itself."""
    with seeded(x.device, generator):
        return network.likelihood.mean(network(x).parameters), network.sample(count)


def _draw_video(network: SVG, x: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The frames of one video, each predicted from the true one before it, and of one that goes on by itself."""
    with seeded(x.device, generator):
        return network.video(x, network(x).parameters)[0], network.predict(x)[0]

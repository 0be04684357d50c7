"""The variational autoencoder: an encoder, a decoder, and the likelihood that gives the decoder's output a meaning."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from .likelihoods import Likelihood, full_precision


class Output(Protocol):
    """What a forward pass of any network gives, of one latent vector or of a hierarchy; N examples."""

    @property
    def parameters(self) -> Tensor:
        """Of the likelihood, as its `distortion(parameters, x, beta)` takes them."""

    @property
    def mean(self) -> Tensor:
        """(N, k): the posterior's mean, less the prior's where that is learned; a unit is active where it varies."""

    @property
    def rates(self) -> Tensor:
        """(N, k) or (N, groups): the KL divergence by latent dimension or group, in nats; their sum is the rate."""


def target_of(network: Any, x: Tensor) -> Tensor:
    """What of x a network's output is a distribution of: its `target(x)` where it has one (a video's later frames)."""
    target = getattr(network, "target", None)
    return x if target is None else target(x)


def dimensions_of(network: Any) -> int:
    """Dimensions of what an example's distortion is of: of target_of() it."""
    return target_of(network, torch.empty(1, *network.input_shape)).numel()


class VAEOutput(NamedTuple):
    """What one forward pass gives; N examples, k latent dimensions."""

    parameters: Tensor  # (N, *likelihood.parameter_shape(input_shape)): logits, means, ...
    mean: Tensor  # (N, k), of q(z | x)
    log_variance: Tensor  # (N, k), of q(z | x)
    z: Tensor  # (N, k), the draw that was decoded

    @property
    def rates(self) -> Tensor:
        """KL(q(z_i | x) || N(0, 1)) of each latent dimension, (N, k), in nats."""
        return kl_divergences(self.mean, self.log_variance)


def kl_divergences(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(mean_i, exp(log_variance_i)) || N(0, 1)) by dimension, in nats: (N, k), (N, k) -> (N, k).

    1/2 [mean_i^2 + exp(log_variance_i) - 1 - log_variance_i]
    """
    mean, log_variance = full_precision(mean), full_precision(log_variance)
    return 0.5 * (mean.square() + torch.expm1(log_variance) - log_variance)


class Encoder(nn.Module):
    """q(z | x) = N(mean, diag(exp(log_variance))): a body that ends in (N, features), and two linear heads."""

    def __init__(self, body: nn.Module, features: int, latent: int):
        super().__init__()
        self.body = body
        self.mean = nn.Linear(features, latent)
        self.log_variance = nn.Linear(features, latent)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body(x)
        return self.mean(features), self.log_variance(features)


def reparameterise(mean: Tensor, log_variance: Tensor) -> Tensor:
    """A draw z = mean + exp(log_variance / 2) * noise, noise ~ N(0, I), through which gradients flow."""
    return mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean)


class VAE(nn.Module):
    """A variational autoencoder; `networks.build` makes the standard ones.

    encoder(x) -> (mean, log_variance), each (N, latent); decoder(z) -> parameters of the likelihood, (N, *shape), shape
    being likelihood.parameter_shape(input_shape).
    The prior is N(0, I). The noise of z comes from torch's global generator, in train and in eval mode alike.
    ungated: names of the layers that the MR-VAE authors' runs leave without a gate (`--gated paper`), () if not known.
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        likelihood: Likelihood,
        latent: int,
        input_shape: tuple[int, ...],
        ungated: tuple[str, ...] = (),
    ):
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.likelihood = likelihood
        self.latent = latent
        self.input_shape = tuple(input_shape)
        self.ungated = ungated

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(mean, log_variance) of q(z | x). x: (N, *input_shape); another shape raises ValueError."""
        if x.shape[1:] != self.input_shape:
            expected = ", ".join(["N", *map(str, self.input_shape)])
            raise ValueError(
                f"x has shape {tuple(x.shape)}; this network was built for ({expected}): "
                "reshape the data, or build the network with build(name, dataset.input_shape)"
            )
        return self.encoder(x)

    def decode(self, z: Tensor) -> Tensor:
        """Parameters of p(x | z), (N, *likelihood.parameter_shape(input_shape)), for z (N, latent); else ValueError."""
        if z.dim() != 2 or z.shape[1] != self.latent:
            raise ValueError(f"z has shape {tuple(z.shape)}; expected (N, {self.latent}), one latent vector a row")
        return self.decoder(z)

    def forward(self, x: Tensor) -> VAEOutput:
        mean, log_variance = self.encode(x)
        z = reparameterise(mean, log_variance)
        return VAEOutput(self.decode(z), mean, log_variance, z)

    def reconstruct(self, x: Tensor) -> Tensor:
        """E[x | z] at the mean of q(z | x), (N, *input_shape), in data space: no noise."""
        return self.likelihood.mean(self.decode(self.encode(x)[0]))

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """E[x | z] for n draws z from the prior, (n, *input_shape), in data space.

        The means, as the field's figures show; `likelihood.sample(vae.decode(z))` adds the pixels' own noise.
        """
        like = next(self.decoder.parameters())
        z = torch.randn(n, self.latent, generator=generator, dtype=like.dtype, device=like.device)
        return self.likelihood.mean(self.decode(z))

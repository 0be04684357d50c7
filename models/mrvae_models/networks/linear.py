"""The two-layer linear VAE, whose best rate and distortion at every beta are known in closed form."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..data import Chunks, Rows
from ..likelihoods import Gaussian, Likelihood
from ..vae import VAE
from .parts import check_shape, check_sizes

PART = 4096
"""Examples that the mean is taken of at a time."""


class Centre(nn.Module):
    """x + sign * mu, mu of the shape of one example: a parameter without a gate, being the same for every beta."""

    def __init__(self, shape: tuple[int, ...], sign: int):
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(shape))
        self.sign = sign

    def forward(self, x: Tensor) -> Tensor:
        return x + self.sign * self.mean

    @torch.no_grad()
    def start_from(self, images: Rows) -> None:
        # summed in float64: exact to the last bit of float32, whatever the number of parts
        total = torch.stack([part.sum(0, dtype=torch.float64) for part in Chunks(images, PART)]).sum(0)
        self.mean.copy_(total / len(images))


class LinearEncoder(nn.Module):
    """q(z | x) = N(E2 E1 (x - mu), diag(C)), C the same for every x.

    C is |weight| of a Linear from the constant 1, so that gating it scales the variances themselves: with a sigmoid
    gate and weight 1 that is the best C at every beta, beta / (|d_i|^2 + beta) for decoder columns d_i (MR-VAE,
    Appendix A.2, Eqn. 31).
    """

    def __init__(self, shape: tuple[int, ...], latent: int):
        super().__init__()
        self.centre = Centre(shape, -1)
        self.first = nn.Linear(math.prod(shape), latent, bias=False)
        self.second = nn.Linear(latent, latent, bias=False)
        self.variance = nn.Linear(1, latent, bias=False)
        nn.init.constant_(self.variance.weight, 0.02)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean = self.second(self.first(self.centre(x).flatten(1)))
        variance = self.variance(x.new_ones(x.shape[0], 1)).abs()
        return mean, variance.clamp_min(torch.finfo(variance.dtype).tiny).log()


def linear(input_shape: Sequence[int], latent: int = 32, likelihood: Likelihood | None = None) -> VAE:
    """Encoder E2 E1 (x - mu), decoder D2 D1 z + mu, and one diagonal covariance C for all x (MR-VAE, Eqn. 9).

    Eqn. 9 writes every weight as a product of two, so that its gates can be the exact response to beta (Theorem 1).
    E1 takes the data to the latent dimension k and E2 is k by k, as the proof (Appendix A.2) has it: the gates of E1's
    rows then act on the principal directions. D1 is k by k, D2 takes k to the data. The layers have no bias: mu stands
    outside the gates. `networks.start_from` sets mu to the data's mean, its best value; training finds it otherwise.
    E1 and E2 start with orthonormal rows and D1 and D2 as their transposes, so that every latent dimension is in use;
    from torch's own initialisation some never are.

    likelihood: Gaussian with sigma 1 unless given, for which the closed form holds; of one number a value.
    """
    shape = check_shape(input_shape)
    (latent,) = check_sizes("latent", [latent])
    if latent > math.prod(shape):
        raise ValueError(f"latent is {latent}; a linear VAE of data of {math.prod(shape)} values has no use for more")
    likelihood = likelihood or Gaussian()
    if likelihood.parameter_shape(shape) != shape:
        raise ValueError(
            f"likelihood {likelihood.name!r} takes {likelihood.parameter_shape(shape)} numbers for data of {shape}; a "
            "linear VAE makes one a value: use gaussian, gaussian-shared or gaussian-optimal, or the network 'mlp'"
        )
    encoder = LinearEncoder(shape, latent)
    first, second = nn.Linear(latent, latent, bias=False), nn.Linear(latent, math.prod(shape), bias=False)
    for down, up in ((encoder.first, second), (encoder.second, first)):
        nn.init.orthogonal_(down.weight)
        with torch.no_grad():
            up.weight.copy_(down.weight.T)
    decoder = nn.Sequential(first, second, nn.Unflatten(1, shape), Centre(shape, +1))
    return VAE(encoder, decoder, likelihood, latent, shape)

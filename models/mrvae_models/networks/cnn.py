"""The convolutional network of the MR-VAE paper's image experiments, and the same idea for any image size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from torch import nn

from ..likelihoods import Bernoulli, Likelihood
from ..vae import VAE, Encoder
from .parts import activation_called, check_shape, check_sizes, norm_layers

Pair = tuple[int, int]


class Up(NamedTuple):
    """One transposed convolution of a decoder."""

    channels: int
    kernel: int
    stride: int
    padding: int
    output_padding: int | Pair


class Published(NamedTuple):
    """A decoder as published: the latent size, the sides of the map that the first Linear makes, and the layers."""

    latent: int
    start: Pair
    layers: list[Up]


CHANNELS = (128, 256, 512, 1024)
PUBLISHED = {
    (1, 28, 28): Published(32, (4, 4), [Up(512, 3, 2, 1, 0), Up(256, 3, 2, 1, 1), Up(1, 3, 2, 1, 1)]),
    (3, 32, 32): Published(256, (8, 8), [Up(512, 4, 2, 1, 0), Up(256, 4, 2, 1, 1), Up(3, 4, 1, 2, 0)]),
    (3, 64, 64): Published(
        64, (8, 8), [Up(512, 5, 2, 2, 0), Up(256, 5, 2, 1, 0), Up(128, 5, 2, 2, 1), Up(3, 5, 1, 1, 0)]
    ),
}
DEFAULT_LATENT = 32


def cnn(
    input_shape: Sequence[int],
    latent: int | None = None,
    channels: Sequence[int] = CHANNELS,
    norm: str = "batch",
    activation: str = "relu",
    likelihood: Likelihood | None = None,
) -> VAE:
    """Encoder: one [Conv k4 s2 p1, norm, activation] for each of `channels`, then the heads; decoder: its way back.

    With the default channels, images of 1x28x28 (MNIST), 3x32x32 (CIFAR) and 3x64x64 (CelebA) get the paper's network
    to the parameter (Table 1: 17,526,977, 40,462,723 and 34,594,563 with the default latents 32, 256 and 64; SVHN is
    3x32x32 with latent=32: 23,947,203). The paper ends the decoder in a sigmoid; here it ends in logits, which changes
    no count. Any other size or `channels` gets the encoder mirrored: ConvTranspose k4 s2 p1, output padding 1 wherever
    halving had dropped a row or column, so that the output has the input's shape; latent 32 unless given.

    norm: "batch", "group" or "none". likelihood: Bernoulli unless given.
    Raises ValueError where an image is too small to be halved len(channels) times.
    """
    shape = check_shape(input_shape, dimensions=3)
    channels = check_sizes("channels", channels)
    if not channels:
        raise ValueError("channels is empty; expected one number a stage, e.g. (32, 64)")
    published = PUBLISHED.get((shape[0], shape[1], shape[2])) if channels == CHANNELS else None
    if latent is None:
        latent = published.latent if published else DEFAULT_LATENT
    (latent,) = check_sizes("latent", [latent])

    sides = _halved(shape, len(channels))
    start = published.start if published else sides[-1]
    layers = published.layers if published else _mirror(shape[0], channels, sides)
    features = channels[-1] * math.prod(sides[-1])
    act = activation_called(activation)

    down: list[nn.Module] = []
    for before, after in pairwise((shape[0], *channels)):
        down += [nn.Conv2d(before, after, 4, stride=2, padding=1), *norm_layers(norm, after), act()]

    up: list[nn.Module] = [nn.Linear(latent, channels[-1] * math.prod(start)), nn.Unflatten(1, (channels[-1], *start))]
    for i, layer in enumerate(layers):
        up.append(nn.ConvTranspose2d(layers[i - 1].channels if i else channels[-1], *layer))
        if layer is not layers[-1]:
            up += [*norm_layers(norm, layer.channels), act()]

    encoder = Encoder(nn.Sequential(*down, nn.Flatten()), features, latent)
    return VAE(encoder, nn.Sequential(*up), likelihood or Bernoulli(), latent, shape)


def _halved(shape: tuple[int, ...], stages: int) -> list[Pair]:
    """Height and width before the first stage and after each; k4 s2 p1 takes a side s to floor(s / 2)."""
    sides = [(shape[1] >> i, shape[2] >> i) for i in range(stages + 1)]
    if min(sides[-1]) < 1:
        possible = min(shape[1:]).bit_length() - 1
        raise ValueError(
            f"images of {shape[1]}x{shape[2]} cannot be halved {stages} times, once for each of `channels`; "
            + (f"give at most {possible}, e.g. channels={CHANNELS[:possible]}" if possible else "use the network 'mlp'")
        )
    return sides


def _mirror(data_channels: int, channels: tuple[int, ...], sides: list[Pair]) -> list[Up]:
    """The encoder's stages backwards. k4 s2 p1 takes a side s to 2 s; the output padding adds the odd one."""
    widths = (data_channels, *channels)
    return [
        Up(widths[i], 4, 2, 1, (sides[i][0] - 2 * sides[i + 1][0], sides[i][1] - 2 * sides[i + 1][1]))
        for i in reversed(range(len(channels)))
    ]

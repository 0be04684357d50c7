"""The convolutional network of the MR-VAE paper's image experiments, and the same idea for any image size."""

from __future__ import annotations

from collections.abc import Sequence

from ..likelihoods import Likelihood
from ..vae import VAE
from .parts import check_shape, check_sizes
from .stack import described_vae, doublings, halvings, map_of

CHANNELS = (128, 256, 512, 1024)
DECODERS: dict[tuple[int, ...], list[str]] = {
    (1, 28, 28): ["linear 1024x4x4 bare", "convt 512 k3 s2 p1", "convt 256 k3 s2 p1 op1", "convt 1 k3 s2 p1 op1 bare"],
    (3, 32, 32): ["linear 1024x8x8 bare", "convt 512 k4 s2 p1", "convt 256 k4 s2 p1 op1", "convt 3 k4 s1 p2 bare"],
    (3, 64, 64): [
        "linear 1024x8x8 bare", "convt 512 k5 s2 p2", "convt 256 k5 s2 p1", "convt 128 k5 s2 p2 op1",
        "convt 3 k5 s1 p1 bare",
    ],
}
"""As published, by the shape of the images: MNIST, CIFAR and CelebA."""
LATENTS: dict[tuple[int, ...], int] = {(1, 28, 28): 32, (3, 32, 32): 256, (3, 64, 64): 64}
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
    published = channels == CHANNELS and shape in DECODERS
    if latent is None:
        latent = LATENTS[shape] if published else DEFAULT_LATENT
    (latent,) = check_sizes("latent", [latent])
    back = [f"linear {map_of(shape, channels)} bare", *doublings(shape, channels)]
    decoder = DECODERS[shape] if published else back
    return described_vae(shape, latent, halvings(channels), decoder, norm, activation, likelihood=likelihood)

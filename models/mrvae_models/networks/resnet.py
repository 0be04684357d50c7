"""The residual network of the MR-VAE paper's image experiments, without norms, and the same idea for any image size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ..likelihoods import Likelihood
from ..vae import VAE
from .parts import check_shape, check_sizes
from .stack import described_vae, doublings, halvings, map_of


class Published(NamedTuple):
    """A network as published: its latent size and its stages."""

    latent: int
    encoder: list[str]
    decoder: list[str]


CHANNELS = (64, 128, 128)
BLOCKS = 2
PUBLISHED: dict[tuple[int, ...], Published] = {
    (1, 28, 28): Published(
        32,
        ["conv 64 k4 s2 p1", "conv 128 k4 s2 p1", "conv 128 k3 s2 p1", "block 128 x2"],
        [
            "linear 128x4x4 bare", "convt 128 k3 s2 p1", "block 128 x2", "convt 64 k3 s2 p1 op1",
            "convt 1 k3 s2 p1 op1 bare",
        ],
    ),
    (3, 32, 32): Published(
        256,
        ["conv 64 k4 s2 p1", "conv 128 k4 s2 p1", "conv 128 k3 s1 p1", "block 128 x2"],
        ["linear 128x8x8 bare", "block 128 x2", "convt 64 k4 s2 p1", "convt 3 k4 s2 p1 bare"],
    ),
    (3, 64, 64): Published(
        64,
        ["conv 64 k4 s2 p1", "conv 128 k4 s2 p1", "conv 128 k3 s2 p1 x2", "block 128 x2"],
        [
            "linear 128x4x4 bare", "convt 128 k3 s2 p1", "block 128 x2", "convt 128 k5 s2 p1", "convt 64 k5 s2 p1 op1",
            "convt 3 k4 s2 p1 bare",
        ],
    ),
}
"""By the shape of the images: MNIST, CIFAR (SVHN too, with latent=32) and CelebA."""
DEFAULT_LATENT = 32


def resnet(
    input_shape: Sequence[int],
    latent: int | None = None,
    channels: Sequence[int] = CHANNELS,
    blocks: int = BLOCKS,
    activation: str = "relu",
    likelihood: Likelihood | None = None,
) -> VAE:
    """Convolutions that make the image smaller, `blocks` residual blocks, the heads; decoder: its way back.

    A block is x + Conv3x3(relu(Conv3x3(x))); an activation follows every convolution and every block.
    With the default channels and blocks, images of 1x28x28 (MNIST), 3x32x32 (CIFAR) and 3x64x64 (CelebA) get the
    paper's network to the parameter (Table 1: 1,881,217, 7,896,963 and 2,770,819 with the default latents 32, 256 and
    64; SVHN is 3x32x32 with latent=32: 2,391,491). It ends in logits, the paper's in a sigmoid. Any other size,
    `channels` or `blocks` gets Conv k4 s2 p1 for each of `channels` and the same mirrored, as the network 'cnn' does;
    latent 32 unless given.

    likelihood: Bernoulli unless given.
    Raises ValueError where an image is too small to be halved len(channels) times.
    """
    shape = check_shape(input_shape, dimensions=3)
    channels = check_sizes("channels", channels)
    if not channels:
        raise ValueError("channels is empty; expected one number a stage, e.g. (32, 64)")
    (blocks,) = check_sizes("blocks", [blocks])
    published = PUBLISHED.get(shape) if (channels, blocks) == (CHANNELS, BLOCKS) else None
    if published is None:
        residual = f"block {channels[-1]} x{blocks}"
        published = Published(
            DEFAULT_LATENT,
            [*halvings(channels), residual],
            [f"linear {map_of(shape, channels)} bare", residual, *doublings(shape, channels)],
        )
    (latent,) = check_sizes("latent", [published.latent if latent is None else latent])
    return described_vae(
        shape, latent, published.encoder, published.decoder, activation=activation, likelihood=likelihood
    )

"""The residual networks of the Beta-Sigma VAE paper, for images of any size."""

from __future__ import annotations

from collections.abc import Sequence

from ..likelihoods import GaussianImage, Likelihood
from ..vae import VAE
from .parts import check_shape, check_sizes
from .stack import described_vae

LARGE = 64
"""From this side on, the network of CelebA; below, that of MNIST."""
CHANNELS, SMALL_CHANNELS = (32, 64, 128, 256), (32, 64, 128)


def bs_vae(
    input_shape: Sequence[int],
    latent: int | None = None,
    channels: Sequence[int] | None = None,
    likelihood: Likelihood | None = None,
) -> VAE:
    """Encoder: for each of `channels` a residual block that halves the image and one that does not, then Linear to 2 k,
    the heads; decoder: Linear to the smallest map, a residual block, a transposed convolution for each of `channels`.

    Kim and Lee, Beta-Sigma VAE, as in the authors' public code: batch norm and LeakyReLU after everything but the heads
    and the output, which is linear. Sides are halved rounding up, as their convolutions k3 s2 p1 do.
    channels and latent: 32, 64, 128, 256 and 64 for sides of 64 and more (CelebA), 32, 64, 128 and 32 for smaller ones
    (MNIST). likelihood: the Gaussian of each image's optimal variance unless given.
    """
    shape = check_shape(input_shape, dimensions=3)
    large = min(shape[1:]) >= LARGE
    if channels is None:
        channels = CHANNELS if large else SMALL_CHANNELS
    channels = check_sizes("channels", channels)
    if not channels:
        raise ValueError("channels is empty; expected one number a stage, e.g. (32, 64)")
    (latent,) = check_sizes("latent", [(64 if large else 32) if latent is None else latent])
    likelihood = GaussianImage() if likelihood is None else likelihood
    sides = [shape[1:]]
    for _ in channels:
        sides.append(tuple((side + 1) // 2 for side in sides[-1]))
    height, width = sides[-1]
    encoder = [words for out in channels for words in (f"res {out} s2", f"res {out}")]
    decoder = [f"linear {channels[-1]}x{height}x{width} each", f"res {channels[-1]}"]
    for i in reversed(range(len(channels))):
        odd = "x".join(str(before - 2 * after + 1) for before, after in zip(sides[i], sides[i + 1], strict=True))
        decoder.append(f"convt {channels[max(i - 1, 0)]} k3 s2 p1 op{odd}")
    decoder.append(f"convt {shape[0]} k3 p1 bare")
    return described_vae(
        shape, latent, [*encoder, f"linear {2 * latent} each"], decoder, "batch", "leaky_relu", likelihood=likelihood
    )

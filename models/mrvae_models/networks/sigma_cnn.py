"""The small convolutional network of the sigma-VAE paper's SVHN experiment, for images of any size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..likelihoods import GaussianOptimal, Likelihood
from ..vae import VAE
from .parts import check_shape, check_sizes, squash
from .stack import described_vae, halved


def sigma_cnn(
    input_shape: Sequence[int], latent: int = 20, channels: int = 32, likelihood: Likelihood | None = None
) -> VAE:
    """Three convolutions to C, 2 C and 4 C channels, the last two halving the image, the heads; decoder: its way back.

    Rybkin, Daniilidis and Levine, "Simple and Effective VAE Training with Calibrated Decoders", Appendix B: ReLU, no
    norms. For 3x28x28 and a likelihood with one parameter a value 992,427 parameters. `channels` is C. Sides of other
    sizes are halved rounding down, and the decoder puts back the row or column that was dropped.

    likelihood: the optimal Gaussian unless given (their sigma-VAE). Where the output is the mean of x itself it ends in
    a sigmoid, as theirs; for logits and for more parameters a value it does not.
    Raises ValueError where an image is too small to be halved twice.
    """
    shape = check_shape(input_shape, dimensions=3)
    latent, channels = check_sizes("latent and channels", [latent, channels])
    likelihood = GaussianOptimal() if likelihood is None else likelihood
    sides = halved(shape, 2, by_channels=False)
    even = "x".join(str(2 - side % 2) for side in sides[1])  # padding of 1 makes a kernel of 5 round an odd side down
    lost = ["x".join(str(a - 2 * b) for a, b in zip(*pair, strict=True)) for pair in (sides[:2], sides[1:])]
    height, width = sides[2]
    encoder = [f"conv {channels} k3 p1", f"conv {2 * channels} k4 s2 p1", f"conv {4 * channels} k5 s2 p{even}"]
    decoder = [
        f"linear {4 * channels}x{height}x{width}",
        f"convt {2 * channels} k6 s2 p2 op{lost[1]}",
        f"convt {channels} k6 s2 p2 op{lost[0]}",
        f"convt {shape[0]} k5 p2 bare",
    ]
    vae = described_vae(shape, latent, encoder, decoder, likelihood=likelihood)
    decoding: Any = vae.decoder
    decoding.extend(squash(likelihood, shape))
    return vae

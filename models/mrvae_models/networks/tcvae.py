"""The two networks of the beta-TCVAE paper, for images of 64x64 such as dSprites and faces.

Chen, Li, Grosse, Duvenaud: "Isolating Sources of Disentanglement in Variational Autoencoders", 2018. Layers as in the
authors' public code, github.com/rtqichen/beta-tcvae, vae_quant.py; there the posterior's mean and log variance are one
layer of twice the width, here two heads with the same parameters.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..likelihoods import Likelihood
from ..vae import VAE
from .parts import check_shape, check_sizes
from .stack import described_vae

SIDES = (64, 64)
CONV_ENCODER = [
    "conv 32 k4 s2 p1 x2", "conv 64 k4 s2 p1 x2",  # 32x32, 16x16, 8x8, 4x4
    "conv 512 k4",  # 1x1
]
CONV_DECODER = [
    "linear 512x1x1", "convt 64 k4", "convt 64 k4 s2 p1", "convt 32 k4 s2 p1 x2",  # 1x1, 4x4, 8x8, 16x16, 32x32
]  # and the data's channels, of 64x64


def tcvae_mlp(
    input_shape: Sequence[int], latent: int = 10, width: int = 1200, likelihood: Likelihood | None = None
) -> VAE:
    """Encoder x -> 1200 -> 1200 -> heads with ReLU, decoder z -> 1200 -> 1200 -> 1200 -> x with Tanh.

    For images of 64x64 and one channel, 14,196,516 parameters; any other shape is taken too. width: of the hidden
    layers. likelihood: Bernoulli unless given.
    """
    shape = check_shape(input_shape)
    latent, width = check_sizes("latent and width", [latent, width])
    pixels = "x".join(map(str, shape))
    return described_vae(
        shape, latent, [f"linear {width} x2"], [f"linear {width} x3", f"linear {pixels} bare"],
        decoder_activation="tanh", likelihood=likelihood,
    )


def tcvae_conv(
    input_shape: Sequence[int], latent: int = 10, norm: str = "batch", likelihood: Likelihood | None = None
) -> VAE:
    """Encoder: Conv k4 s2 p1 to 32, 32, 64, 64 channels, Conv k4 to 512 at 1x1, the heads; decoder: mirrored.

    A norm and ReLU follow each layer but the heads and the last. norm: "batch" (the authors'), "group" or "none".
    likelihood: Bernoulli unless given. ValueError for images other than 64x64.
    """
    shape = check_shape(input_shape, dimensions=3)
    if shape[1:] != SIDES:
        raise ValueError(
            f"input_shape is {shape}; this network takes images of 64x64: resize them (--resize 64), or use 'cnn'"
        )
    (latent,) = check_sizes("latent", [latent])
    decoder = [*CONV_DECODER, f"convt {shape[0]} k4 s2 p1 bare"]
    return described_vae(shape, latent, CONV_ENCODER, decoder, norm, likelihood=likelihood)

"""The hierarchical VAE of the sigma-VAE paper: BIVA's baseline of 15 latent layers (Maaloe et al., 2019).

    encoder   stages from the bottom, each some gated blocks on the draw of z below (the image in the first) with a skip
              from the stage below, and the posterior's head: z_1 ~ q(z_1 | x), z_2 ~ q(z_2 | z_1, x), ...
    decoder   stages from the top, each some gated blocks on z with skips from the stage above, and the prior's head on
              what the stage above has left; then a 1x1 convolution to the likelihood's parameters

The posterior goes bottom-up, "without the top-down and bottom-up connections" that BIVA adds (sigma-VAE, Appendix B).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mrvae_kernels as mk

from ..likelihoods import GaussianOptimal, Likelihood
from .gated_resnet import GatedBlock, centred_convolution
from .hierarchy import Hierarchy, Normal, Raw
from .parts import check_flag, check_shape, check_sizes, margins

LATENTS = tuple(range(38, 8, -2))
HALVE = (1, 11, 15)
LARGEST_HEAD = 16
BOTTOM_KERNEL, KERNEL = 5, 3
"""Of the blocks of the first stage and of all others."""


class EncoderStage(nn.Module):
    """Blocks, the last of which halves the sides where `halve`, and the head of q(z_l | z_below, x).

    bottom: it takes the image, without a skip and with larger kernels.
    """

    def __init__(
        self, below: int, channels: int, latent: int, blocks: int, halve: bool, bottom: bool, skip: bool,
        head: Sequence[int],
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            GatedBlock(
                channels if i else below, channels, BOTTOM_KERNEL if bottom else KERNEL,
                "halve" if halve and i == blocks - 1 else "keep", "beside" if skip and not bottom else "none",
                raw=bottom and not i,
            )
            for i in range(blocks)
        )
        self.head = centred_convolution(channels, 2 * latent, head)

    def forward(self, x: Tensor, skip: Tensor | None) -> Tensor:
        for block in self.blocks:
            x = block(x, skip)
        return x

    def posterior(self, features: Tensor) -> Normal:
        return Raw.of(self.head(F.elu(features))).normal()


class DecoderStage(nn.Module):
    """The head of p(z_l | z_above), but for the top, and blocks on z, the first of which doubles where `double`."""

    def __init__(
        self, channels: int, latent: int, blocks: int, double: bool, bottom: bool, top: bool, skip: bool,
        head: Sequence[int],
    ) -> None:
        super().__init__()
        self.head = None if top else centred_convolution(channels, 2 * latent, head)
        self.blocks = nn.ModuleList(
            GatedBlock(
                channels if i else latent, channels, BOTTOM_KERNEL if bottom else KERNEL,
                "double" if double and not i else "keep",
                ("above" if double and i else "beside") if skip and not top else "none", raw=not i,
            )
            for i in range(blocks)
        )

    def prior(self, above: Sequence[Tensor] | None, like: Tensor) -> Normal:
        """N(0, I) at the top, of the shape of `like`."""
        if self.head is None or above is None:
            return Normal(torch.zeros_like(like), torch.ones_like(like))
        return Raw.of(self.head(F.elu(above[-1]))).normal()

    def forward(self, z: Tensor, above: Sequence[Tensor] | None) -> list[Tensor]:
        """The output of each block; above: those of the stage above."""
        made = []
        for i, block in enumerate(self.blocks):
            z = block(z, None if above is None else above[i])
            made.append(z)
        return made


class Decoder(nn.Module):
    """Stages from the top, and the output convolution."""

    def __init__(self, stages: Sequence[DecoderStage], channels: int, parameters: int) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.output = mk.WeightNormConv2d(channels, parameters, 1)

    def forward(self, features: Tensor) -> Tensor:
        return self.output(F.elu(features))


class HVAE(Hierarchy):
    """See `hvae`."""

    def __init__(
        self, encoder: Sequence[EncoderStage], decoder: Decoder, likelihood: Likelihood, input_shape: Sequence[int],
        group_shapes: Sequence[tuple[int, ...]], margins: tuple[int, int, int, int],
    ) -> None:
        super().__init__(likelihood, input_shape, group_shapes)
        self.encoder = nn.ModuleList(encoder)
        self.decoder = decoder
        self.margins = margins  # left, right, top and bottom

    def ascend(self, x: Tensor) -> Tensor:
        """The image as the encoder takes it: draws belong to this network's way up, so that it begins in descend()."""
        return F.pad(2 * x - 1, self.margins, value=-1.0)

    def descend(self, features: Any, noise: Sequence[Tensor]) -> tuple[Tensor, list[tuple[Normal, Normal]]]:
        posteriors = None if features is None else self._infer(features, noise)
        pairs: list[tuple[Normal, Normal]] = []
        made: list[Tensor] | None = None
        for group, (stage, part) in enumerate(zip(self.decoder.stages, noise, strict=True)):
            assert isinstance(stage, DecoderStage)
            prior = stage.prior(made, part)
            posterior = prior if posteriors is None else posteriors[group]
            pairs.append((posterior, prior))
            made = stage(posterior.draw(part), made)
        assert made is not None
        return F.pad(self.decoder(made[-1]), [-margin for margin in self.margins]), pairs

    def _infer(self, x: Tensor, noise: Sequence[Tensor]) -> list[Normal]:
        """The posteriors, from the top, each given the draw below it."""
        posteriors: list[Normal] = []
        skip: Tensor | None = None
        for stage, part in zip(self.encoder, reversed(noise), strict=True):
            assert isinstance(stage, EncoderStage)
            skip = stage(x, skip)
            posteriors.append(stage.posterior(skip))
            x = posteriors[-1].draw(part)
        return posteriors[::-1]

    def divergence(self, posterior: Normal, prior: Normal, noise: Tensor) -> Tensor:
        """log q(z | .) - log p(z | .) at the draw: its mean is the KL divergence.

        q(z_l) depends on the draw below and p(z_l) on the draw above, which depends on z_l itself, so that no z_l can
        be integrated out by itself: the closed form for given neighbours would be the divergence of another model.
        """
        return posterior.log_ratio(prior, noise)

    def balance(self, rates: Tensor) -> Tensor:
        """1 for every group: weights by rate are NVAE's, and a rate from one draw may be negative."""
        return torch.ones_like(rates[0])


def hvae(
    input_shape: Sequence[int],
    latent: int | None = None,
    channels: int = 96,
    latents: Sequence[int] = LATENTS,
    halve: Sequence[int] = HALVE,
    blocks: int = 3,
    skips: bool = True,
    head_kernel: int | None = None,
    likelihood: Likelihood | None = None,
) -> HVAE:
    """The hierarchical VAE for images (N, C, H, W), by default the paper's for CIFAR and CelebA at 32x32.

    latents      latent channels of each stage, from the bottom: 38, 36, ... 10; as many stages as numbers
    latent       latent channels of every stage, in place of those (the network's `latent` counts all variables)
    channels     of the blocks' maps
    halve        stages that halve the sides, counted from 1 at the bottom
    blocks       gated residual blocks of a stage; kernels of 5 in the first stage, 3 in the others
    skips        skip connections between stages of the encoder, and of the decoder
    head_kernel  kernel of the heads; None: as large as the map, 16 at most, so that each latent sees all of it (the
                 paper's; more than half of all parameters)
    likelihood   the optimal Gaussian unless given; the paper has others, also a mixture of 10 logistics

    With these defaults 54.4 M parameters at (3, 32, 32). x in [0, 1] enters as 2 x - 1, padded with -1 to sides that
    can be halved; the parameters are cropped. Standard deviations are NVAE's, exp(soft clamp) + 0.01, in place of
    theirs, which are at least 1. No dropout. ValueError for sizes that cannot work.
    """
    shape = check_shape(input_shape, dimensions=3)
    latents, halve = ((sizes,) if isinstance(sizes, int) else tuple(sizes) for sizes in (latents, halve))
    latents = check_sizes("latents", latents)
    check_flag("skips", skips)
    if not latents:
        raise ValueError("latents is empty; expected the latent channels of each stage, e.g. (8, 6, 4)")
    if latent is not None:
        latents = check_sizes("latent", [latent]) * len(latents)
    sizes = {"channels": channels, "blocks": blocks, "head_kernel": 1 if head_kernel is None else head_kernel}
    for name, size in sizes.items():
        check_sizes(name, [size])
    for stage in halve:
        if stage not in range(1, len(latents) + 1):
            raise ValueError(
                f"halve names stage {stage!r}; expected stages from 1 to {len(latents)}, as many as latents"
                + (": --set halve=1,2 halves at two" if len(latents) > 1 else "")
            )
    likelihood = GaussianOptimal() if likelihood is None else likelihood
    around = margins(shape, 2 ** len(set(halve)))
    side = (shape[1] + around[2] + around[3], shape[2] + around[0] + around[1])
    encoder, decoder, group_shapes = [], [], []
    for i, size in enumerate(latents):
        halving, bottom, top = i + 1 in halve, i == 0, i + 1 == len(latents)
        side = (side[0] // 2, side[1] // 2) if halving else side
        head = tuple(min(length, LARGEST_HEAD) if head_kernel is None else head_kernel for length in side)
        below = latents[i - 1] if i else shape[0]
        encoder.append(EncoderStage(below, channels, size, blocks, halving, bottom, skips, head))
        decoder.append(DecoderStage(channels, size, blocks, halving, bottom, top, skips, head))
        group_shapes.append((size, *side))
    whole = Decoder(decoder[::-1], channels, likelihood.parameter_shape(shape)[0])
    return HVAE(encoder, whole, likelihood, shape, group_shapes[::-1], around)

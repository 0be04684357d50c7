"""NVAE, the hierarchical VAE of the MR-VAE paper's binary images (Vahdat and Kautz, 2020), for images of any size.

    encoder    stem, pre-process cells that halve the image, a tower of cells over the latent scales with one feature
               map a group; each posterior's head reads its map plus what the decoder has made of the groups above
    decoder    a learned start, and for each group cells, the prior's head and a 1x1 convolution that takes z in; then
               post-process cells that double the image, and the output convolution
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mrvae_kernels as mk

from ..likelihoods import Bernoulli, Likelihood
from ..likelihoods.numerics import is_number
from .cells import DecoderCell, EncoderCell
from .hierarchy import Hierarchy, Normal, Raw
from .parts import check_flag, check_shape, check_sizes, margins
from .regularisers import SpectralNorms, convolution_weights, norm_scales

EXPANSION = 6
POSTPROCESS_EXPANSION = 3

PAPER_GATING: dict[str, tuple[str, ...]] = {
    "include": ("encoder.*", "decoder.*"),
    "exclude": ("*norm?", "decoder.output"),
}
"""For multirate(): the gates that the paper's count of 8,950,118 parameters has. Every convolution and every Linear but
the output layer has one, 48,436 features; norms have none. multirate()'s own choice gates the norms instead of the
convolutions right before them, whose gate a batch norm cancels in training where the batch has one beta. On the command
line: --gated paper"""


def conv1x1(channels: int, channels_out: int) -> nn.Module:
    return mk.WeightNormConv2d(channels, channels_out, 1)


class Encoder(nn.Module):
    """The bottom-up network, and the posteriors' heads; `merge` and `heads` by group from the top.

    widths: the channels of each group's features from the bottom, which double from one latent scale to the next.
    """

    def __init__(
        self, colours: int, channels: int, blocks: int, block_cells: int, widths: Sequence[int], cells: int, latent: int
    ) -> None:
        super().__init__()
        self.stem = mk.WeightNormConv2d(colours, channels, 3, padding=1)
        self.preprocess = nn.Sequential()
        for width in (channels * 2**block for block in range(blocks)):
            self.preprocess.extend([EncoderCell(width, halve=i == block_cells - 1) for i in range(block_cells)])
        self.tower = nn.ModuleList()
        below = widths[0]
        for width in widths:
            halving = [EncoderCell(below, halve=True)] if width > below else []
            self.tower.append(nn.Sequential(*halving, *(EncoderCell(width) for _ in range(cells))))
            below = width
        self.top = conv1x1(below, below)
        self.merge = nn.ModuleList(conv1x1(width, width) for width in widths[-2::-1])  # not for the first group
        self.heads = nn.ModuleList(mk.WeightNormConv2d(width, 2 * latent, 3, padding=1) for width in widths[::-1])

    def forward(self, x: Tensor) -> list[Tensor]:
        """Features by group from the top."""
        x = self.preprocess(self.stem(x))
        features = []
        for step in self.tower:
            x = step(x)
            features.append(x)
        features[-1] = F.elu(self.top(F.elu(x)))
        return features[::-1]

    def posterior(self, group: int, features: Tensor, above: Tensor) -> Raw:
        """The posterior of a group, relative to its prior."""
        if group:
            features = features + self.merge[group - 1](above)
        return Raw.of(self.heads[group](features))


class Decoder(nn.Module):
    """The top-down network, and the priors' heads; lists by group from the top, without the first group's cells and
    prior, which is N(0, I). widths: the channels of each group from the top."""

    def __init__(
        self, colours: int, blocks: int, block_cells: int, widths: Sequence[int], cells: int, latent: int,
        side: tuple[int, int],
    ) -> None:
        super().__init__()
        self.start = nn.Parameter(torch.randn(widths[0], *side))
        self.steps, self.heads, self.join = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        above = widths[0]
        for width in widths[1:]:
            doubling = [DecoderCell(above, EXPANSION, double=True)] if width < above else []
            self.steps.append(nn.Sequential(*doubling, *(DecoderCell(width, EXPANSION) for _ in range(cells))))
            self.heads.append(conv1x1(width, 2 * latent))
            above = width
        self.join.extend(conv1x1(width + latent, width) for width in widths)
        self.postprocess = nn.Sequential()
        for _ in range(blocks):
            self.postprocess.append(DecoderCell(above, POSTPROCESS_EXPANSION, double=True))
            above //= 2
            self.postprocess.extend([DecoderCell(above, POSTPROCESS_EXPANSION) for _ in range(block_cells - 1)])
        self.output = mk.WeightNormConv2d(above, colours, 3, padding=1)

    def begin(self, n: int) -> Tensor:
        """The first group's features, (n, C, H, W)."""
        return self.start.expand(n, *self.start.shape)

    def step(self, group: int, x: Tensor) -> Tensor:
        """A further group's features from what the groups above have left."""
        return self.steps[group - 1](x)

    def prior(self, group: int, x: Tensor) -> Raw:
        """The prior of a further group."""
        return Raw.of(self.heads[group - 1](F.elu(x)))

    def take_in(self, group: int, x: Tensor, z: Tensor) -> Tensor:
        return self.join[group](torch.cat([x, z], 1))

    def forward(self, x: Tensor) -> Tensor:
        """The likelihood's parameters from the last group's features."""
        return self.output(F.elu(self.postprocess(x)))


class NVAE(Hierarchy):
    """See `nvae`. `penalty()` is what the trainer adds to the loss."""

    gated_alone = PAPER_GATING["include"]
    ungated = PAPER_GATING["exclude"]

    def __init__(
        self, encoder: Encoder, decoder: Decoder, likelihood: Likelihood, input_shape: Sequence[int],
        group_shapes: Sequence[tuple[int, ...]], margins: tuple[int, int, int, int], regularisation: float,
    ) -> None:
        super().__init__(likelihood, input_shape, group_shapes)
        self.encoder = encoder
        self.decoder = decoder
        self.margins = margins  # left, right, top and bottom
        self.regularisation = regularisation
        if regularisation:
            self.spectral_norms = SpectralNorms(convolution_weights(self))

    def ascend(self, x: Tensor) -> list[Tensor]:
        return self.encoder(F.pad(2 * x - 1, self.margins, value=-1.0))

    def descend(self, features: Any, noise: Sequence[Tensor]) -> tuple[Tensor, list[tuple[Normal, Normal]]]:
        x, pairs = self.decoder.begin(noise[0].shape[0]), []
        for group, part in enumerate(noise):
            if group:
                x = self.decoder.step(group, x)
                raw = self.decoder.prior(group, x)
                prior = raw.normal()
            else:
                raw = Raw(torch.zeros_like(part), torch.zeros_like(part))
                prior = Normal(raw.mu, torch.ones_like(part))
            if features is None:
                posterior = prior
            else:
                posterior = raw.residual(self.encoder.posterior(group, features[group], x))
            pairs.append((posterior, prior))
            x = self.decoder.take_in(group, x, posterior.draw(part))
        return F.pad(self.decoder(x), [-margin for margin in self.margins]), pairs

    def penalty(self) -> Tensor:
        """regularisation * (sum of the spectral norms of all convolutions + sum of max|gamma| of all batch norms).

        Of the network's own weights, without gates. In training mode it takes the power iteration further.
        """
        if not self.regularisation:
            return self.decoder.start.new_zeros(())
        return self.regularisation * (self.spectral_norms(convolution_weights(self)) + norm_scales(self))


def nvae(
    input_shape: Sequence[int],
    latent: int = 20,
    channels: int = 16,
    scales: int = 2,
    groups: int = 10,
    adaptive: bool = True,
    cells: int = 2,
    process_blocks: int = 2,
    process_cells: int = 3,
    regularisation: float = 1e-2,
    likelihood: Likelihood | None = None,
) -> NVAE:
    """The NVAE of `channels` for images (N, C, H, W), by default the paper's for MNIST and Omniglot.

    latent          latent channels of each group (the network's `latent` counts all latent variables)
    scales, groups  latent scales, each half as large as the one below with twice the channels, and groups a scale;
                    adaptive: half as many at each further scale, so that 10 and 2 scales make 10 below and 5 on top
    cells           residual cells before each group, in encoder and decoder
    process_blocks  how often the image is halved before the first scale, by `process_cells` cells each, the last of
                    which halves it; and doubled likewise after the last
    regularisation  factor of the spectral norms and of the batch norms' scales in `penalty()`; 0 for none
    likelihood      Bernoulli unless given

    With these defaults and (1, 28, 28): 8,853,246 parameters, and 8,950,118 with gates by PAPER_GATING, as in Table 1.
    x in [0, 1] enters as 2 x - 1, padded with -1 on all sides to the next multiple of 2^(process_blocks + scales - 1)
    (28 to 32); the parameters are cropped to the input's shape. ValueError for sizes that cannot work.
    """
    shape = check_shape(input_shape, dimensions=3)
    sizes = {"latent": latent, "channels": channels, "scales": scales, "groups": groups, "cells": cells}
    for name, size in (sizes | {"process_blocks": process_blocks, "process_cells": process_cells}).items():
        check_sizes(name, [size])
    if channels % 2:
        raise ValueError(f"channels is {channels}; expected an even number, as a halving skip has four parts of C / 2")
    check_flag("adaptive", adaptive)
    if not (is_number(regularisation) and regularisation >= 0):
        raise ValueError(f"regularisation is {regularisation!r}; expected a finite number of at least 0, e.g. 0.01")
    multiple = 2 ** (process_blocks + scales - 1)
    around = margins(shape, multiple)
    height, width = shape[1] + around[2] + around[3], shape[2] + around[0] + around[1]

    counts = [max(groups // 2**scale, 1) if adaptive else groups for scale in range(scales)]
    levels = [process_blocks + scale for scale, count in enumerate(counts) for _ in range(count)]  # from the bottom
    widths = [channels * 2**level for level in levels]
    group_shapes = [(latent, height >> level, width >> level) for level in reversed(levels)]
    encoder = Encoder(shape[0], channels, process_blocks, process_cells, widths, cells, latent)
    likelihood = likelihood or Bernoulli()
    colours = likelihood.parameter_shape(shape)[0]
    decoder = Decoder(colours, process_blocks, process_cells, widths[::-1], cells, latent, group_shapes[0][1:])
    return NVAE(encoder, decoder, likelihood, shape, group_shapes, around, regularisation)

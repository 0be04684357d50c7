"""Encoders and decoders of single video frames, with skips between them: DCGAN's and VGG's (Denton and Fergus, 2018).

The halvings of a square image, 4x4 in the end, each with a map that goes to the decoder's stage of that size too. For
64x64 they are the networks dcgan_64 and vgg_64 of the SVG paper; another power of two has more stages or fewer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .stack import Shape, stack

LEAST_SIDE = 16
SMALLEST_MAP = 4
WIDEST = 8
"""Stages have width, 2 width, 4 width, 8 width and no more channels."""
ACTIVATION = "leaky_relu_0.2"


class FrameStages(NamedTuple):
    """Stages in the words of `stack`, one list for each map that is skipped across, from the largest."""

    encoder: list[list[str]]
    last: list[str]  # to the features, before tanh
    first: list[str]  # from the features
    decoder: list[list[str]]  # each on what is below and the skipped map, from the largest: run backwards


def dcgan(colours: int, features: int, widths: Sequence[int]) -> FrameStages:
    """Convolutions k4 s2 p1, and transposed ones."""
    below = [colours, *widths[:-1]]
    return FrameStages(
        [[f"conv {width} k4 s2 p1"] for width in widths],
        [f"conv {features} k4"],
        [f"convt {widths[-1]} k4"],
        [[f"convt {out} k4 s2 p1" + ("" if i else " bare")] for i, out in enumerate(below)],
    )


def vgg(colours: int, features: int, widths: Sequence[int]) -> FrameStages:
    """Two convolutions k3 of each of the first two sizes and three of the others, max-pooling, and nearest doubling."""
    counts = [2 if i < 2 else 3 for i in range(len(widths))]
    encoder = [
        (["pool"] if i else []) + [f"conv {width} k3 p1 x{count}"]
        for i, (width, count) in enumerate(zip(widths, counts, strict=True))
    ]
    decoder = [
        [f"conv {width} k3 p1" + (f" x{count - 1}" if count > 2 else "")]
        + ([f"conv {widths[i - 1]} k3 p1", "up"] if i else [f"convt {colours} k3 p1 bare"])
        for i, (width, count) in enumerate(zip(widths, counts, strict=True))
    ]
    return FrameStages(encoder, ["pool", f"conv {features} k4"], [f"convt {widths[-1]} k4", "up"], decoder)


BACKBONES = {"dcgan": dcgan, "vgg": vgg}


def widths_of(side: int, width: int) -> list[int]:
    """Channels of the stages for images of side x side; ValueError unless it is a power of two of at least 16."""
    if side < LEAST_SIDE or side & (side - 1):
        raise ValueError(
            f"frames are {side}x{side}; expected a power of two of at least {LEAST_SIDE}, such as 64: resize them"
        )
    halvings = (side // SMALLEST_MAP).bit_length() - 1
    return [width * min(2**i, WIDEST) for i in range(halvings)]


class FrameEncoder(nn.Module):
    """(N, C, S, S) -> features (N, g), within (-1, 1), and the maps to skip across, from the largest."""

    def __init__(self, stages: FrameStages, shape: Shape) -> None:
        super().__init__()
        self.stages = nn.ModuleList()
        self.maps: list[Shape] = []
        for words in stages.encoder:
            layers, shape = stack(words, shape, "batch", ACTIVATION)
            self.stages.append(layers)
            self.maps.append(shape)
        self.last, _ = stack(stages.last, shape, "batch", "tanh")

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        skips = []
        for stage in self.stages:
            x = stage(x)
            skips.append(x)
        return self.last(x).flatten(1), skips


class FrameDecoder(nn.Module):
    """Features (N, g) and the encoder's maps -> (N, C, S, S), by `last` in the end."""

    def __init__(
        self, stages: FrameStages, features: int, maps: Sequence[Shape], last: Sequence[nn.Module] = ()
    ) -> None:
        super().__init__()
        self.first, shape = stack(stages.first, (features, 1, 1), "batch", ACTIVATION)
        made = []
        for words, skipped in zip(reversed(stages.decoder), reversed(maps), strict=True):
            layers, shape = stack(words, (shape[0] + skipped[0], *shape[1:]), "batch", ACTIVATION)
            made.append(layers)
        made[-1].extend(last)
        self.stages = nn.ModuleList(made)

    def forward(self, features: Tensor, skips: Sequence[Tensor]) -> Tensor:
        x = self.first(features[:, :, None, None])
        for stage, skip in zip(self.stages, reversed(skips), strict=True):
            x = stage(torch.cat([x, skip], 1))
        return x

"""Layers of the published networks, with the sizes that they see (MR-VAE, Appendix; NVAE; beta-TCVAE; SVG-LP)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from mrvae_kernels.adapters import ADAPTERS
from mrvae_kernels.functional import convolution_output_numel


class Case(NamedTuple):
    """A layer by its torch.nn class and arguments, the input's shape without the batch, and the activation after it."""

    network: str
    kind: type[nn.Module]
    arguments: tuple[int, ...]
    options: dict[str, int]
    shape: tuple[int, ...]
    activation: str

    @property
    def name(self) -> str:
        """Such as "Conv2d(128, 256, 4, 2, 1) 14x14"; of an LSTM with the number of steps."""
        arguments = ", ".join((*map(str, self.arguments), *(f"{key}={value}" for key, value in self.options.items())))
        sizes = self.shape[:1] if self.kind is nn.LSTM else self.shape[1:]
        return f"{self.kind.__name__}({arguments}) {'x'.join(map(str, sizes))}".rstrip()

    def layer(self, device: torch.device | str = "meta", dtype: torch.dtype = torch.float32) -> nn.Module:
        """The plain layer."""
        return self.kind(*self.arguments, **self.options, device=device, dtype=dtype)

    def operations(self, batch: int) -> int:
        """Floating-point operations of the forward product: two for each multiplication and addition.

        Taps that fall on padding (transposed: outside of the output) are none.
        """
        layer: Any = self.layer()
        if self.kind is nn.Linear:
            return 2 * batch * layer.weight.numel()
        pairs = layer.weight.shape[0] * layer.weight.shape[1]
        y = layer(torch.empty((batch, *self.shape), device="meta"))
        # a transposed convolution meets its output where the convolution of the same geometry meets its input
        places, reached = (self.shape[1:], y.shape[2:]) if layer.transposed else (y.shape[2:], self.shape[1:])
        geometry = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
        taps = math.prod(_taps(*axis) for axis in zip(places, reached, *geometry, strict=True))
        return int(2 * batch * pairs * taps)

    def outputs(self, batch: int) -> int:
        """Elements of y."""
        layer: Any = self.layer()
        if self.kind is nn.Linear:
            return int(batch * layer.out_features)
        geometry = (layer.stride, layer.padding, layer.dilation, layer.transposed, layer.output_padding, layer.groups)
        return convolution_output_numel(torch.empty((batch, *self.shape), device="meta"), layer.weight, *geometry)

    def least_bytes(self, batch: int, item: int, backward: bool) -> int:
        """Bytes that the gated layer moves at least, with elements of `item` bytes: forward reads x and W, writes y;
        backward reads dy, x and W, and y for the activation's slope, and writes dx and dW."""
        layer: Any = self.layer()
        x, weight, y = batch * math.prod(self.shape), layer.weight.numel(), self.outputs(batch)
        return item * (x + weight + y + (y + y + x + weight + x + weight if backward else 0))

    def features(self) -> int:
        """Gate features."""
        return ADAPTERS[self.kind].features(self.layer())


def _taps(places: int, reached: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """Pairs of a place i < places and a tap t < kernel with 0 <= i stride + t dilation - padding < reached."""
    found = 0
    for tap in range(kernel):
        offset = tap * dilation - padding
        first, last = max(0, -(offset // stride)), min(places - 1, (reached - 1 - offset) // stride)
        found += max(0, last - first + 1)
    return found


def in_turn(cases: Sequence[Case]) -> list[Case]:
    """The cases with the networks taking turns, so that a run which is cut short has met all of them."""
    networks: dict[str, list[Case]] = {}
    for case in cases:
        networks.setdefault(case.network, []).append(case)
    return [case for turn in itertools.zip_longest(*networks.values()) for case in turn if case is not None]


def largest(cases: Sequence[Case], count: int) -> list[Case]:
    """The `count` layers of each network with the most operations."""
    ranked = sorted(cases, key=lambda case: case.operations(1), reverse=True)
    return [
        case for network in dict.fromkeys(case.network for case in cases)
        for case in [other for other in ranked if other.network == network][:count]
    ]


Row = tuple[type[nn.Module], tuple[int, ...], tuple[int, ...]]


def _layers(network: str, activation: str, rows: list[Row]) -> list[Case]:
    return [Case(network, kind, arguments, {}, shape, activation) for kind, arguments, shape in rows]


CONV, TRANSPOSED, LINEAR = nn.Conv2d, nn.ConvTranspose2d, nn.Linear

CASES: list[Case] = [
    # MNIST CNN (Table 1), then two layers of its CelebA form
    *_layers("cnn", "relu", [
        (CONV, (1, 128, 4, 2, 1), (1, 28, 28)),
        (CONV, (128, 256, 4, 2, 1), (128, 14, 14)),
        (CONV, (256, 512, 4, 2, 1), (256, 7, 7)),
        (CONV, (512, 1024, 4, 2, 1), (512, 3, 3)),
        (LINEAR, (1024, 32), (1024,)),
        (LINEAR, (32, 16384), (32,)),
        (TRANSPOSED, (1024, 512, 3, 2, 1), (1024, 4, 4)),
        (TRANSPOSED, (512, 256, 3, 2, 1, 1), (512, 7, 7)),
        (TRANSPOSED, (256, 1, 3, 2, 1, 1), (256, 14, 14)),
        (CONV, (128, 256, 4, 2, 1), (128, 32, 32)),
        (TRANSPOSED, (512, 256, 5, 2, 1), (512, 15, 15)),
    ]),
    # MNIST ResNet, then a block of its CIFAR form
    *_layers("resnet", "relu", [
        (CONV, (64, 128, 4, 2, 1), (64, 14, 14)),
        (CONV, (128, 128, 3, 2, 1), (128, 7, 7)),
        (CONV, (128, 128, 3, 1, 1), (128, 4, 4)),
        (LINEAR, (32, 2048), (32,)),
        (TRANSPOSED, (128, 64, 3, 2, 1, 1), (128, 7, 7)),
        (TRANSPOSED, (64, 1, 3, 2, 1, 1), (64, 14, 14)),
        (CONV, (128, 128, 3, 1, 1), (128, 8, 8)),
    ]),
    # NVAE, 16 channels: encoder cells, and the inverted residual of the decoder with its depthwise middle
    *_layers("nvae", "silu", [
        (CONV, (16, 16, 3, 1, 1), (16, 32, 32)),
        (CONV, (32, 32, 3, 1, 1), (32, 16, 16)),
        (CONV, (64, 64, 3, 1, 1), (64, 8, 8)),
        (CONV, (32, 192, 1), (32, 16, 16)),
        (CONV, (192, 32, 1), (192, 16, 16)),
        (CONV, (64, 384, 1), (64, 8, 8)),
    ]),
    Case("nvae", CONV, (192, 192, 5, 1, 2), {"groups": 192}, (192, 16, 16), "silu"),
    # the MLP of the examples, and beta-TCVAE's
    *_layers("mlp", "relu", [
        (LINEAR, (784, 300), (784,)),
        (LINEAR, (300, 32), (300,)),
        (LINEAR, (16, 300), (16,)),
        (LINEAR, (300, 784), (300,)),
        (LINEAR, (4096, 1200), (4096,)),
        (LINEAR, (1200, 1200), (1200,)),
        (LINEAR, (1200, 4096), (1200,)),
    ]),
]
BATCHES = (128, 16, 1024)
"""In order of interest."""

FOLDING: list[Case] = [
    # norms of the MNIST CNN and of NVAE; batch_first, so that the batch is the first axis of every case
    *_layers("cnn", "relu", [
        (nn.BatchNorm2d, (128,), (128, 14, 14)),
        (nn.BatchNorm2d, (256,), (256, 7, 7)),
        (nn.BatchNorm2d, (1024,), (1024, 1, 1)),
    ]),
    *_layers("nvae", "silu", [(nn.BatchNorm2d, (16,), (16, 32, 32)), (nn.BatchNorm2d, (192,), (192, 16, 16))]),
    # SVG-LP's predictor is a step at a time; the text model reads sentences
    Case("svg", nn.LSTM, (256, 256), {"batch_first": True}, (1, 256), "none"),
    Case("lstm", nn.LSTM, (256, 256), {"batch_first": True}, (16, 256), "none"),
    Case("lstm", nn.LSTM, (512, 256), {"batch_first": True}, (32, 512), "none"),
]
"""Layers without a choice of strategy for one beta a batch."""

SIZES: dict[str, tuple[str, ...]] = {
    "small": (
        "Linear(16, 300)", "Conv2d(16, 16, 3, 1, 1) 32x32", "ConvTranspose2d(64, 1, 3, 2, 1, 1) 14x14",
        "BatchNorm2d(1024) 1x1", "LSTM(256, 256, batch_first=True) 1",
    ),
    "middle": (
        "Linear(784, 300)", "Conv2d(64, 128, 4, 2, 1) 14x14", "ConvTranspose2d(128, 64, 3, 2, 1, 1) 7x7",
        "BatchNorm2d(256) 7x7", "LSTM(256, 256, batch_first=True) 16",
    ),
    "large": (
        "Linear(1200, 1200)", "Conv2d(256, 512, 4, 2, 1) 7x7", "ConvTranspose2d(512, 256, 3, 2, 1, 1) 7x7",
        "BatchNorm2d(192) 16x16", "LSTM(512, 256, batch_first=True) 32",
    ),
}
"""One layer of each kind, by name."""


def named(name: str) -> Case:
    """The case of that name. ValueError where there is none."""
    for case in (*CASES, *FOLDING):
        if case.name == name:
            return case
    raise ValueError(f"there is no layer {name!r}; expected one of {', '.join(c.name for c in (*CASES, *FOLDING))}")

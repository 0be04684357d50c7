"""Residual cells of NVAE: x + 0.1 SE(f(x)), f a stack of batch norms, Swish and convolutions.

Vahdat and Kautz (2020), Section 3.1 and Figure 3. All cells take and give (N, C, H, W). Layers are registered in the
order in which they run, and batch norms are called norm1, norm2 and so on, so that gates can be chosen by name.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mrvae_kernels as mk

RESIDUAL_SCALE = 0.1
NORM_MOMENTUM = 0.05
NEIGHBOURS = ((0, 0), (1, 1), (0, 1), (1, 0))
"""Offsets (down, right) of the pixels that a halving skip reads, each by a quarter of its channels."""


def norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, momentum=NORM_MOMENTUM)


class SqueezeExcite(nn.Module):
    """x * sigmoid(W2 relu(W1 mean_HW(x))), with max(C/16, 4) hidden units (Hu et al., 2018)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(channels // 16, 4)
        self.squeeze = nn.Linear(channels, hidden)
        self.excite = nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3))))))
        return x * scale[:, :, None, None]


class HalvingSkip(nn.Module):
    """Swish, then four 1x1 convolutions of stride 2, each on another of every 2x2 pixels, side by side.

    So every pixel is read, at the cost of one 1x1 convolution of the smaller map. `channels_out` divides by 4 and H and
    W by 2.
    """

    def __init__(self, channels: int, channels_out: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(mk.WeightNormConv2d(channels, channels_out // 4, 1, stride=2) for _ in NEIGHBOURS)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(x)
        parts = [conv(x[:, :, down:, right:]) for conv, (down, right) in zip(self.convs, NEIGHBOURS, strict=True)]
        return torch.cat(parts, 1)


class DoublingSkip(nn.Module):
    """A 1x1 convolution, then bilinear interpolation to twice the height and width.

    The paper's order is the other. The two commute, as the weights of an interpolated pixel sum to 1, and so does a
    gate on the convolution's channels; this way round there are a quarter of the pixels to convolve.
    """

    def __init__(self, channels: int, channels_out: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        return double_bilinear(self.conv(x))


def double_bilinear(x: Tensor) -> Tensor:
    """F.interpolate(x, scale_factor=2, mode="bilinear"): a pixel is 3/4 of its nearest and 1/4 of the next one, along
    either axis; the border's next one is itself.

    For torch.compile it is written out: Inductor (torch 2.13, CPU) gave all that comes before two cells in a row, each
    with an interpolation, a gradient of 0.
    """
    if not torch.compiler.is_compiling():
        return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
    for axis in (2, 3):
        size = x.shape[axis]
        before = torch.cat([x.narrow(axis, 0, 1), x.narrow(axis, 0, size - 1)], axis)
        after = torch.cat([x.narrow(axis, 1, size - 1), x.narrow(axis, size - 1, 1)], axis)
        pairs = torch.stack([0.75 * x + 0.25 * before, 0.75 * x + 0.25 * after], axis + 1)
        x = pairs.flatten(axis, axis + 1)
    return x


class EncoderCell(nn.Module):
    """skip(x) + 0.1 SE(f(x)), f = BN, Swish, Conv3, BN, Swish, Conv3 with weight norm.

    halve: the first convolution has stride 2 and twice the channels.
    """

    def __init__(self, channels: int, halve: bool = False) -> None:
        super().__init__()
        out, stride = (2 * channels, 2) if halve else (channels, 1)
        self.norm1 = norm(channels)
        self.conv1 = mk.WeightNormConv2d(channels, out, 3, stride=stride, padding=1)
        self.norm2 = norm(out)
        self.conv2 = mk.WeightNormConv2d(out, out, 3, padding=1)
        self.scale = SqueezeExcite(out)
        self.skip = HalvingSkip(channels, out) if halve else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        return self.skip(x) + RESIDUAL_SCALE * self.scale(y)


class DecoderCell(nn.Module):
    """skip(x) + 0.1 SE(f(x)), f = BN, Conv1 to e C, BN, Swish, depthwise Conv5, BN, Swish, Conv1, BN.

    A batch norm follows each of its convolutions, so that they have neither bias nor weight norm. double: f starts by
    doubling height and width (nearest neighbour) and ends with half the channels.
    """

    def __init__(self, channels: int, expansion: int, double: bool = False) -> None:
        super().__init__()
        out, wide = channels // 2 if double else channels, expansion * channels
        self.enlarge = nn.Upsample(scale_factor=2) if double else nn.Identity()
        self.norm1 = norm(channels)
        self.expand = nn.Conv2d(channels, wide, 1, bias=False)
        self.norm2 = norm(wide)
        self.depthwise = nn.Conv2d(wide, wide, 5, padding=2, groups=wide, bias=False)
        self.norm3 = norm(wide)
        self.project = nn.Conv2d(wide, out, 1, bias=False)
        self.norm4 = norm(out)
        self.scale = SqueezeExcite(out)
        self.skip = DoublingSkip(channels, out) if double else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.expand(self.norm1(self.enlarge(x)))
        y = self.depthwise(F.silu(self.norm2(y)))
        y = self.norm4(self.project(F.silu(self.norm3(y))))
        return self.skip(x) + RESIDUAL_SCALE * self.scale(y)

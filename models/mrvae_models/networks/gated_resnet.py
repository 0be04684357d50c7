"""The gated residual blocks of BIVA and of its baselines (Maaloe et al., 2019), all convolutions with weight norm."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mrvae_kernels as mk


class GatedBlock(nn.Module):
    """x + a sigmoid(b),    (a, b) = Conv(elu(Conv(elu(x)) + Skip(elu(s)))), of (N, C, H, W).

    resize   what the second convolution does to the sides: "keep", "halve" or "double"
    skip     "none", or where s is from: "beside", of x's own sides (a 1x1 convolution), or "above", of half of them
             (doubled, then a convolution of the block's own kernel)
    raw      x is an image or a draw of z and enters as it is: without the first ELU, and without the sum
    There is no sum either where channels change or sides double. Doubling repeats pixels before a convolution,
    where theirs is a transposed convolution of the same parameters: the gates know weight norm of the former only.
    """

    def __init__(
        self, channels: int, out: int, kernel: int, resize: str = "keep", skip: str = "none", raw: bool = False
    ) -> None:
        super().__init__()
        self.raw = raw
        self.residual = channels == out and resize != "double" and not raw
        self.conv1 = mk.WeightNormConv2d(channels, out, kernel, padding=kernel // 2)
        if skip == "beside":
            self.skip: nn.Module | None = mk.WeightNormConv2d(out, out, 1)
        elif skip == "above":
            conv = mk.WeightNormConv2d(out, out, kernel, padding=kernel // 2)
            self.skip = nn.Sequential(nn.Upsample(scale_factor=2), conv)
        else:
            self.skip = None
        self.enlarge = nn.Upsample(scale_factor=2) if resize == "double" else nn.Identity()
        stride = 2 if resize == "halve" else 1
        self.conv2 = mk.WeightNormConv2d(out, 2 * out, kernel, stride, padding=kernel // 2)
        self.shortcut = nn.AvgPool2d(3, 2, padding=1) if resize == "halve" else nn.Identity()

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        y = self.conv1(x if self.raw else F.elu(x))
        if self.skip is not None and skip is not None:
            y = y + self.skip(F.elu(skip))
        value, gate = self.conv2(self.enlarge(F.elu(y))).chunk(2, dim=1)
        y = value * torch.sigmoid(gate)
        return self.shortcut(x) + y if self.residual else y


def centred_convolution(channels: int, out: int, kernel: Sequence[int]) -> nn.Sequential:
    """A convolution with weight norm that keeps the sides, for kernels (height, width) of any size, even ones too."""
    height, width = kernel
    around = ((width - 1) // 2, width // 2, (height - 1) // 2, height // 2)
    return nn.Sequential(nn.ZeroPad2d(around), mk.WeightNormConv2d(channels, out, (height, width)))

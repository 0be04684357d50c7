"""NVAE's cells: each against its formula, written out in plain PyTorch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from mrvae_models.networks.cells import (
    DecoderCell,
    DoublingSkip,
    EncoderCell,
    HalvingSkip,
    SqueezeExcite,
    double_bilinear,
)
from torch import Tensor, nn

from tests.helpers import randomize


def weight(conv) -> Tensor:
    return torch._weight_norm(conv.weight, conv.gain[:, None, None, None], 0)


def normalised(norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    x = (x - x.mean((0, 2, 3), keepdim=True)) / (x.var((0, 2, 3), unbiased=False, keepdim=True) + 1e-5).sqrt()
    return x * norm.weight[:, None, None] + norm.bias[:, None, None]


def excited(scale: SqueezeExcite, x: Tensor) -> Tensor:
    hidden = (x.mean((2, 3)) @ scale.squeeze.weight.T + scale.squeeze.bias).clamp_min(0)
    return x * torch.sigmoid(hidden @ scale.excite.weight.T + scale.excite.bias)[:, :, None, None]


@pytest.fixture
def x() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(3, 8, 6, 4, dtype=torch.float64)


@pytest.mark.parametrize("halve", [False, True])
def test_encoder_cell(x, halve):
    cell = randomize(EncoderCell(8, halve).double())
    y = F.conv2d(F.silu(normalised(cell.norm1, x)), weight(cell.conv1), cell.conv1.bias, 2 if halve else 1, 1)
    y = F.conv2d(F.silu(normalised(cell.norm2, y)), weight(cell.conv2), cell.conv2.bias, 1, 1)
    skip = cell.skip(x) if halve else x
    torch.testing.assert_close(cell(x), skip + 0.1 * excited(cell.scale, y))
    assert cell(x).shape == ((3, 16, 3, 2) if halve else x.shape)
    assert cell.norm1.momentum == 0.05


@pytest.mark.parametrize("double", [False, True])
def test_decoder_cell(x, double):
    cell = randomize(DecoderCell(8, 3, double).double())
    y = x.repeat_interleave(2, 2).repeat_interleave(2, 3) if double else x
    y = F.conv2d(normalised(cell.norm1, y), cell.expand.weight)
    y = F.conv2d(F.silu(normalised(cell.norm2, y)), cell.depthwise.weight, padding=2, groups=24)
    y = F.conv2d(F.silu(normalised(cell.norm3, y)), cell.project.weight)
    skip = cell.skip(x) if double else x
    torch.testing.assert_close(cell(x), skip + 0.1 * excited(cell.scale, normalised(cell.norm4, y)))
    assert cell(x).shape == ((3, 4, 12, 8) if double else x.shape)
    assert cell.expand.bias is None and cell.depthwise.weight.shape == (24, 1, 5, 5)


def test_a_halving_skip_reads_every_pixel_once(x):
    skip = randomize(HalvingSkip(8, 16).double())
    pixels = F.silu(x)
    corners = [pixels[:, :, ::2, ::2], pixels[:, :, 1::2, 1::2], pixels[:, :, ::2, 1::2], pixels[:, :, 1::2, ::2]]
    expected = [F.conv2d(part, weight(conv), conv.bias) for part, conv in zip(corners, skip.convs, strict=True)]
    torch.testing.assert_close(skip(x), torch.cat(expected, 1))


def test_a_doubling_skip_interpolates(x):
    skip = randomize(DoublingSkip(8, 4).double())
    constant = torch.ones_like(x) * torch.arange(8, dtype=torch.float64)[:, None, None]
    torch.testing.assert_close(skip(constant), skip.conv(constant).repeat_interleave(2, 2).repeat_interleave(2, 3))
    ramp = torch.arange(4, dtype=torch.float64).expand(1, 8, 6, 4)
    expected = torch.tensor([0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3], dtype=torch.float64).expand(1, 8, 12, 8)
    torch.testing.assert_close(skip(ramp), skip.conv(expected))


def test_a_doubling_skip_is_the_papers(x):
    skip = randomize(DoublingSkip(8, 4).double())
    expected = skip.conv(F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False))
    torch.testing.assert_close(skip(x), expected)


@pytest.mark.parametrize("height, width", [(1, 1), (1, 5), (4, 3)])
def test_bilinear_doubling_written_out_for_torch_compile(monkeypatch, height, width):
    x = torch.randn(2, 3, height, width, dtype=torch.float64, requires_grad=True)
    expected = double_bilinear(x)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    found = double_bilinear(x)
    torch.testing.assert_close(found, expected)
    numbers = torch.rand_like(found)
    for a, b in zip(*(torch.autograd.grad((y * numbers).sum(), x) for y in (found, expected)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.slow
def test_two_doubling_cells_compiled_have_their_gradients():
    torch.manual_seed(0)
    cells = nn.Sequential(DecoderCell(16, 3, double=True), DecoderCell(8, 3, double=True))
    x = torch.randn(4, 16, 7, 7, requires_grad=True)
    found = []
    for run in (cells, torch.compile(cells, fullgraph=True)):
        y = run(x)
        numbers = torch.linspace(-1, 1, y.numel()).reshape(y.shape)
        found.append(torch.autograd.grad((y * numbers).sum(), [x, *cells.parameters()]))
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-3, atol=1e-4)


def test_squeeze_and_excite_has_at_least_four_hidden_units():
    assert [SqueezeExcite(channels).squeeze.out_features for channels in (4, 64, 80, 128)] == [4, 4, 5, 8]

"""Conditional batch normalisation: (w + s(eta)) x_hat + (b + t(eta)), the paper's parameter count, its errors."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from helpers import randomize
from torch import nn

import mrvae_kernels as mk

CASES = {
    1: (mk.ConditionalBatchNorm1d, nn.BatchNorm1d, (5, 4)),
    2: (mk.ConditionalBatchNorm2d, nn.BatchNorm2d, (5, 4, 3, 2)),
    3: (mk.ConditionalBatchNorm3d, nn.BatchNorm3d, (5, 4, 2, 2, 2)),
}
BETA = [0.02, 0.3, 1.0, 4.0, 9.0]


def build(d: int) -> tuple[nn.Module, torch.Tensor]:
    layer = CASES[d][0](4, dtype=torch.float64)
    return randomize(layer), torch.randn(CASES[d][2], dtype=torch.float64)


@pytest.mark.parametrize("d", CASES)
def test_it_starts_as_torchs_own_and_keeps_its_names(backend, d):
    gated, plain, shape = CASES[d]
    layer, x = gated(4), torch.randn(shape)
    expected = plain(4)
    torch.testing.assert_close(layer(x, 0.5), expected(x))
    torch.testing.assert_close(layer(x, BETA), expected(x))
    assert isinstance(layer, plain) and set(expected.state_dict()) <= set(layer.state_dict())
    assert all(torch.equal(buffer, layer.get_buffer(name)) for name, buffer in expected.named_buffers())


@pytest.mark.parametrize("d", CASES)
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("beta", [0.3, BETA], ids=["shared", "per sample"])
def test_the_formula(backend, d, mode, beta):
    layer, x = build(d)
    layer(x, 0.5)
    layer.train(mode == "train")
    before = (layer.running_mean.clone(), layer.running_var.clone())
    y = layer(x, beta)
    axes = [0, *range(2, x.dim())]
    mean, variance = (x.mean(axes), x.var(axes, correction=0)) if mode == "train" else before
    along = (-1, 4, *[1] * (x.dim() - 2))
    normal = (x - mean.view(along)) / (variance.view(along) + layer.eps).sqrt()
    eta = mk.standardize(beta, dtype=torch.float64)
    expected = (layer.weight + layer.scale(eta)).view(along) * normal + (layer.bias + layer.shift(eta)).view(along)
    torch.testing.assert_close(y, expected)
    assert layer.weight is layer._parameters["weight"] and isinstance(layer.weight, nn.Parameter)


@pytest.mark.parametrize("d", CASES)
def test_to_plain_at_one_beta(backend, d):
    layer, x = build(d)
    layer(x, 0.5)
    layer.eval()
    plain = layer.to_plain(0.3)
    assert type(plain) is CASES[d][1] and not plain.training
    torch.testing.assert_close(plain(x), layer(x, 0.3))
    for bad in ([0.3], torch.tensor([0.3, 1.0]), 0.0):
        with pytest.raises(ValueError, match="beta is"):
            layer.to_plain(bad)


@pytest.mark.parametrize("d", CASES)
@pytest.mark.parametrize("per_sample", [False, True])
def test_gradcheck(backend, d, per_sample):
    layer, x = build(d)
    layer.track_running_stats = False
    layer.running_mean = layer.running_var = None
    names, values = zip(*layer.named_parameters(), strict=True)
    beta = torch.tensor(BETA if per_sample else 0.3, dtype=torch.float64, requires_grad=True)

    def run(x, beta, *parameters):
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x, beta))

    assert torch.autograd.gradcheck(run, (x.requires_grad_(), beta, *values), fast_mode=True)


def test_it_counts_as_table_1_of_the_paper_does():
    """MNIST CNN: norms of 128, 256, 512, 1024, 512 and 256 features take s and t of 1-64-C each."""
    added = 0
    for features in (128, 256, 512, 1024, 512, 256):
        layer = mk.ConditionalBatchNorm2d(features)
        added += sum(p.numel() for p in layer.parameters()) - 2 * features
        assert added and layer.scale.hidden[0].out_features == 64
    assert added == 2 * sum(64 + 64 + 64 * c + c for c in (128, 256, 512, 1024, 512, 256))


def test_an_error_inside_restores_the_parameters():
    layer = mk.ConditionalBatchNorm2d(4)
    weight = layer.weight
    for beta in (0.5, [0.5] * 5):
        with pytest.raises(ValueError):
            layer(torch.randn(5, 4), beta)
        assert layer.weight is weight


@pytest.mark.parametrize("count", [1, 3, 6])
def test_a_wrong_number_of_betas_is_a_value_error(backend, count):
    layer, x = build(2)
    with pytest.raises(ValueError, match="expected"):
        layer(x, [0.5] * count)


def test_saved_refused_and_copied():
    layer, x = build(2)
    layer.eval()
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = mk.ConditionalBatchNorm2d(4, dtype=torch.float64).eval()
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(x, 0.3), layer(x, 0.3)) and torch.equal(copy.deepcopy(layer)(x, 0.3), layer(x, 0.3))
    narrow = mk.ConditionalBatchNorm2d(4, beta_range=(0.1, 1.0), dtype=torch.float64)
    before = copy.deepcopy(narrow.state_dict())
    with pytest.raises(ValueError, match=r"made with beta_range = \[0.01, 10.0\]"):
        narrow.load_state_dict(layer.state_dict())
    assert all(torch.equal(before[key], value) for key, value in narrow.state_dict().items())
    for options in ({"affine": False}, {"bias": False}):
        with pytest.raises(ValueError, match="needs affine=True"):
            mk.ConditionalBatchNorm2d(4, **options)

"""The regularisers of hierarchies, against the singular values of torch.linalg."""

from __future__ import annotations

import copy

import pytest
import torch
from mrvae_models.networks import build
from mrvae_models.networks.regularisers import SpectralNorms, convolution_weights, norm_scales
from torch import nn

import mrvae_kernels as mk
from tests.helpers import randomize

TINY = {"latent": 2, "channels": 4, "groups": 2, "cells": 1, "process_cells": 1}


def tiny(**options) -> nn.Module:
    torch.manual_seed(0)
    network = build("nvae", (1, 6, 6), **{**TINY, **options})
    return randomize(network)


def exact(weights) -> float:
    return sum(torch.linalg.matrix_norm(weight.flatten(1), 2) for weight in weights)


def test_the_sum_comes_to_the_largest_singular_values_and_stays_there():
    torch.manual_seed(0)
    shapes = ((6, 3, 3, 3), (4, 2, 1, 1), (6, 3, 3, 3), (1, 5, 1, 1))
    weights = [torch.randn(*shape, dtype=torch.float64) for shape in shapes]
    norms = SpectralNorms(weights).double()
    assert {tuple(buffer.shape) for buffer in norms.buffers()} == {(2, 27), (1, 2), (1, 5)}
    values = [norms(weights).item() for _ in range(60)]
    assert values[0] < exact(weights) * (1 - 1e-6), "four iterations from a random start are not there yet"
    assert all(a <= b * (1 + 1e-12) for a, b in zip(values, values[1:], strict=False))
    assert values[-1] == pytest.approx(exact(weights).item(), rel=1e-6)
    norms.eval()
    before = copy.deepcopy(norms.state_dict())
    norms([weight + 1 for weight in weights])
    assert all(torch.equal(value, norms.state_dict()[name]) for name, value in before.items())


def test_the_gradient_is_the_outer_product_of_the_singular_vectors():
    torch.manual_seed(0)
    weight = torch.randn(5, 2, 3, 1, dtype=torch.float64, requires_grad=True)
    norms = SpectralNorms([weight], iterations=200).double()
    (ours,) = torch.autograd.grad(norms([weight]), weight)
    (theirs,) = torch.autograd.grad(exact([weight]), weight)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)


def test_the_penalty_of_nvae_is_of_all_its_convolutions_and_batch_norms():
    network = tiny(regularisation=0.5)
    weights = [
        torch._weight_norm(m.weight, m.gain[:, None, None, None], 0) if isinstance(m, mk.WeightNormConv2d) else m.weight
        for m in network.modules() if isinstance(m, nn.Conv2d)
    ]
    scales = [max(m.weight.abs().tolist()) for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(weights) == len(convolution_weights(network)) > 20 and len(scales) > 10
    torch.testing.assert_close(norm_scales(network), torch.tensor(sum(scales)))
    for _ in range(60):
        penalty = network.penalty()
    assert penalty.item() == pytest.approx(0.5 * (exact(weights).item() + sum(scales)), rel=1e-3)
    penalty.backward()
    assert all(m.weight.grad is not None for m in network.modules() if isinstance(m, (nn.Conv2d, nn.BatchNorm2d)))


def test_autocast_leaves_the_norms_as_they_are():
    weights = [torch.randn(16, 16, 3, 3, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    norms = SpectralNorms(weights).eval()
    expected = norms(weights)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(norms(weights), expected)


def test_gating_and_copying_leave_the_penalty_as_it_is():
    network = tiny()
    for _ in range(3):
        network.penalty()
    network.eval()
    expected = network.penalty().item()
    model = mk.multirate(network)
    assert model.network.penalty().item() == expected == copy.deepcopy(model).network.penalty().item()


def test_without_regularisation_there_is_no_penalty_and_no_buffer():
    network = tiny(regularisation=0.0)
    assert network.penalty().item() == 0
    assert not [name for name in network.state_dict() if "spectral" in name]

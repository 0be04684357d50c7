"""Data that a likelihood is not of, and batches that memory has no room for: refused, with what to do."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from likelihood_cases import CASES, OF_LEVELS
from mrvae_models.curve import evaluate
from mrvae_models.data import ImageDataset, load
from mrvae_models.data.storage import pack
from mrvae_models.likelihoods import LIKELIHOODS, Categorical256, TextCategorical, categorical, likelihood
from mrvae_models.networks import build

GRAINS = torch.arange(256).view(4, 1, 8, 8).float() / 255
REAL = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
DENSITIES = [name for name, kind in LIKELIHOODS.items() if kind.measure == "continuous"]


@pytest.mark.parametrize("name", CASES)
def test_images_of_8_bits_are_data_for_each(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        likelihood(name).check_data(GRAINS)
        likelihood(name).check_data(pack(np.arange(256, dtype=np.uint8).reshape(4, 1, 8, 8), np.arange(4), 255))
        likelihood(name).check_data(load((255 * REAL).byte().numpy(), split="all").examples)


@pytest.mark.parametrize("name", OF_LEVELS)
def test_continuous_data_are_refused_by_likelihoods_of_levels(name):
    with pytest.raises(ValueError, match=rf"of a level.*{name}.*round them.*gaussian-optimal"):
        likelihood(name).check_data(REAL)
    with pytest.raises(ValueError, match=rf"from 0 to 255; likelihood {name}.*divide by 255"):
        likelihood(name).check_data(GRAINS * 255)
    one = GRAINS.clone()
    one[3, 0, 7, 0] += 0.5 / 255  # a single value
    with pytest.raises(ValueError, match="0.5 of a level"):
        likelihood(name).check_data(one)
    likelihood(name).check_data((REAL * 255).round() / 255)


@pytest.mark.parametrize("name", OF_LEVELS)
def test_zeros_and_ones_pass_as_levels_with_a_hint(name):
    with pytest.warns(UserWarning, match="0 and 1 only.*--likelihood bernoulli"):
        likelihood(name).check_data(REAL.round())


@pytest.mark.parametrize("name", DENSITIES)
def test_the_numbers_of_8_bit_images_are_refused_by_densities(name):
    for data in (GRAINS * 255, (GRAINS * 255).byte(), (GRAINS * 255).long()):
        with pytest.raises(ValueError, match=rf"0 to 255.*likelihood {name}.*255"):
            likelihood(name).check_data(data)
    likelihood(name).check_data(REAL.round())
    likelihood(name).check_data(6 * REAL - 3)  # any scale of its own
    with pytest.raises(ValueError, match="finite"):
        likelihood(name).check_data(torch.tensor([[0.0, torch.nan]]))


def test_bernoulli_takes_the_unit_interval_only():
    model = likelihood("bernoulli")
    model.check_data(REAL)
    for data, message in (
        (2 * REAL - 1, r"map them with \(x \+ 1\) / 2"),
        (GRAINS * 255, "divide by 255"),
        (5 * REAL - 2.5, "scale them"),
        ((GRAINS * 255).byte(), "torch.uint8"),
        (torch.full((2, 3), torch.nan), "from nan"),
    ):
        with pytest.raises(ValueError, match=message):
            model.check_data(data)


def test_text_takes_whole_numbers():
    TextCategorical().check_data(torch.ones(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="whole numbers"):
        TextCategorical().check_data(REAL)


def test_evaluating_looks_at_the_data_first():
    network = build("mlp", (1, 8, 8), 2, hidden=(3,), likelihood="bitwise")
    with pytest.raises(ValueError, match="of a level"):
        evaluate(network, ImageDataset(REAL), [1.0])
    assert len(evaluate(network, ImageDataset(GRAINS), [1.0]).points) == 1


def test_memory_of_a_categorical_is_refused_before_it_is_taken(monkeypatch):
    model = likelihood("categorical", memory_limit=0.1)
    # 128 images of 3x32x32: 4 * 128 * 3072 * 256 * 4 bytes = 1.61 GB
    with pytest.raises(ValueError, match="needs 1.61 GB.*memory_limit is 0.1 GB.*bitwise"):
        model.check_memory(128, (3, 32, 32))
    model.check_memory(7, (3, 32, 32))
    parameters = torch.zeros(8, 256 * 3, 32, 32, requires_grad=True)
    with pytest.raises(ValueError, match="needs 0.101 GB"):
        model.distortion(parameters, torch.zeros(8, 3, 32, 32))
    assert model.distortion(parameters.detach(), torch.zeros(8, 3, 32, 32)).shape == (8,)  # without gradients, half
    monkeypatch.setattr(categorical, "available", lambda: 10**9)
    with pytest.raises(ValueError, match="needs 1.61 GB.* 1 GB are free on cpu, of which it may take 90%"):
        Categorical256().check_memory(128, (3, 32, 32))
    Categorical256().check_memory(70, (3, 32, 32))
    monkeypatch.setattr(categorical, "available", lambda: None)
    Categorical256().check_memory(10**9, (3, 32, 32))  # what is not known refuses nothing


def test_memory_stated_is_what_a_step_holds():
    """Bytes that autograd and the backward pass of one distortion hold, counted."""
    held = []
    parameters = torch.randn(2, 256, 16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t) or t, lambda t: t):
        Categorical256().distortion(parameters.flatten(1, 2), torch.zeros(2, 16))
    large = {tensor.data_ptr() for tensor in held if tensor.numel() == parameters.numel()}
    assert len(large) == categorical.COPIES - 3  # the log-softmax; beside it the logits and two gradients

"""Likelihoods against torch.distributions, and their shapes, precision and errors."""

from __future__ import annotations

import math

import pytest
import torch
from mrvae_models.likelihoods import Bernoulli, Gaussian, likelihood
from torch import distributions


def test_bernoulli_distortion_is_the_negative_log_probability():
    logits = 3 * torch.randn(5, 2, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = (torch.rand(logits.shape, generator=torch.Generator().manual_seed(1)) < 0.5).double()
    expected = -distributions.Bernoulli(logits=logits).log_prob(x).sum((1, 2, 3))
    torch.testing.assert_close(Bernoulli().distortion(logits, x), expected, rtol=1e-12, atol=0)


def test_bernoulli_takes_real_targets_and_is_least_where_p_is_x():
    x = torch.tensor([[0.2, 0.7]], dtype=torch.float64)
    at = Bernoulli().distortion(torch.logit(x), x)
    entropy = -(x * x.log() + (1 - x) * (1 - x).log()).sum()
    torch.testing.assert_close(at[0], entropy)
    assert Bernoulli().distortion(torch.logit(x) + 0.1, x) > at


def test_bernoulli_with_extreme_logits_is_finite():
    logits = torch.tensor([[1e30, -1e30]])
    assert Bernoulli().distortion(logits, torch.tensor([[1.0, 0.0]])).item() == 0
    assert torch.isfinite(Bernoulli().distortion(logits, torch.tensor([[0.0, 1.0]]))).all()


@pytest.mark.parametrize("sigma", [0.1, 1.0, 3.0])
def test_gaussian_distortion_is_the_negative_log_density(sigma):
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(4, 1, 3, 3, dtype=torch.float64, generator=generator)
    x = torch.rand(4, 1, 3, 3, dtype=torch.float64, generator=generator)
    expected = -distributions.Normal(mean, sigma).log_prob(x).sum((1, 2, 3))
    torch.testing.assert_close(Gaussian(sigma).distortion(mean, x), expected, rtol=1e-12, atol=1e-12)


def test_unit_gaussian_is_half_the_squared_error():
    x, mean = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    without_constant = Gaussian().distortion(mean, x) - math.log(2 * math.pi)
    torch.testing.assert_close(without_constant, torch.tensor([2.5]))


@pytest.mark.parametrize("model", [Bernoulli(), Gaussian(0.5)])
def test_half_precision_is_summed_in_float32(model):
    parameters = torch.randn(2, 1, 64, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    x = torch.rand(2, 1, 64, 64, generator=torch.Generator().manual_seed(1))
    got = model.distortion(parameters, x)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, model.distortion(parameters.float(), x))


def test_samples_have_the_mean_and_spread_of_the_likelihood():
    logits = torch.tensor([[-1.0, 0.0, 2.0]]).expand(20_000, 3)
    drawn = Bernoulli().sample(logits, torch.Generator().manual_seed(0))
    assert set(drawn.unique().tolist()) == {0.0, 1.0}
    torch.testing.assert_close(drawn.mean(0), torch.sigmoid(logits[0]), rtol=0, atol=0.02)
    drawn = Gaussian(0.5).sample(logits, torch.Generator().manual_seed(0))
    torch.testing.assert_close(drawn.mean(0), logits[0], rtol=0, atol=0.02)
    torch.testing.assert_close(drawn.std(0), torch.full((3,), 0.5), rtol=0, atol=0.02)


@pytest.mark.parametrize("model", [Bernoulli(), Gaussian()])
def test_target_of_another_shape_is_refused_rather_than_broadcast(model):
    with pytest.raises(ValueError, match=r"\(2, 3, 4, 4\).*\(2, 1, 4, 4\)"):
        model.distortion(torch.zeros(2, 3, 4, 4), torch.zeros(2, 1, 4, 4))


@pytest.mark.parametrize("sigma", [0.0, -1.0, math.inf, math.nan])
def test_sigma_that_is_no_deviation_is_refused(sigma):
    with pytest.raises(ValueError, match=f"sigma is {sigma}"):
        Gaussian(sigma)


def test_by_name():
    assert isinstance(likelihood("bernoulli"), Bernoulli)
    assert likelihood("gaussian", 0.3).sigma == 0.3
    with pytest.raises(ValueError, match="'poisson'.*'bernoulli'"):
        likelihood("poisson")
    with pytest.raises(ValueError, match="sigma=0.5"):
        likelihood("bernoulli", 0.5)

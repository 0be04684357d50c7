"""Rate, the beta-VAE objective and the sampling of beta."""

from __future__ import annotations

import math

import pytest
import torch
from mrvae_models.likelihoods import Bernoulli
from mrvae_models.objectives import beta_vae, rate, sample_beta
from mrvae_models.vae import VAEOutput
from torch import distributions


def output(n: int = 4, k: int = 3, d: int = 5) -> tuple[VAEOutput, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=generator)  # noqa: E731
    made = VAEOutput(draw(n, d), draw(n, k), draw(n, k), draw(n, k))
    return made, (draw(n, d) > 0).double()


def test_rate_is_the_divergence_from_the_prior():
    out, _ = output()
    q = distributions.Normal(out.mean, torch.exp(out.log_variance / 2))
    expected = distributions.kl_divergence(q, distributions.Normal(0.0, 1.0)).sum(1)
    torch.testing.assert_close(rate(out.mean, out.log_variance), expected, rtol=1e-12, atol=1e-12)


def test_rate_is_zero_at_the_prior_and_positive_beside_it():
    zeros = torch.zeros(2, 7)
    assert rate(zeros, zeros).tolist() == [0.0, 0.0]
    assert (rate(zeros, zeros + 1e-2) > 0).all() and (rate(zeros, zeros - 1e-2) > 0).all()


def test_rate_of_half_precision_is_float32():
    mean = torch.full((2, 100), 3.0, dtype=torch.bfloat16)
    got = rate(mean, torch.zeros_like(mean))
    assert got.dtype == torch.float32 and got.tolist() == [450.0, 450.0]


@pytest.mark.parametrize("beta", [0.5, torch.tensor(0.5), torch.full((4,), 0.5), torch.tensor([0.1, 1.0, 3.0, 10.0])])
def test_loss_is_the_mean_of_distortion_plus_beta_rate(beta):
    out, x = output()
    loss, distortion, rates = beta_vae(out, x, beta, Bernoulli())
    betas = torch.as_tensor(beta, dtype=torch.float64).expand(4)
    expected = sum(distortion[i] + betas[i] * rates[i] for i in range(4)) / 4
    torch.testing.assert_close(loss, expected, rtol=1e-7, atol=0)
    assert distortion.shape == rates.shape == (4,) and loss.dim() == 0


@pytest.mark.parametrize("shape", [(3,), (5,), (1,), (4, 1)])
def test_beta_of_another_length_is_refused(shape):
    out, x = output()
    with pytest.raises(ValueError, match=r"beta has shape \(.*\(4,\)"):
        beta_vae(out, x, torch.ones(shape), Bernoulli())


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_beta_that_is_not_positive_and_finite_is_refused(bad):
    out, x = output()
    for beta in (bad, torch.tensor(bad), torch.tensor([1.0, 1.0, bad, 1.0])):
        with pytest.raises(ValueError, match=f"beta (is|holds) {bad}"):
            beta_vae(out, x, beta, Bernoulli())


def test_empty_batch_is_refused():
    out, x = output()
    with pytest.raises(ValueError, match="batch is empty"):
        beta_vae(VAEOutput(*(part[:0] for part in out)), x[:0], 1.0, Bernoulli())


def test_objective_compiles_whole():
    out, x = output()
    compiled = torch.compile(beta_vae, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(out, x, torch.ones(4), Bernoulli())[0], beta_vae(out, x, 1.0, Bernoulli())[0])


@pytest.mark.parametrize("stratified", [False, True])
def test_betas_are_log_uniform_on_the_range(stratified):
    betas = sample_beta(40_000, (0.1, 10.0), stratified=stratified, generator=torch.Generator().manual_seed(0))
    assert betas.shape == (40_000,) and betas.dtype == torch.float32
    assert 0.1 <= betas.min().item() * (1 + 1e-6) and betas.max().item() <= 10
    uniform = (betas.log() - math.log(0.1)) / math.log(100)
    fractions = torch.histc(uniform, 10, 0, 1) / 40_000
    torch.testing.assert_close(fractions, torch.full((10,), 0.1), rtol=0, atol=1e-4 if stratified else 0.01)


def test_stratified_betas_fall_one_in_each_slice_in_random_order():
    betas = sample_beta(16, (0.01, 10.0), stratified=True, generator=torch.Generator().manual_seed(0))
    slices = ((betas.log() - math.log(0.01)) / math.log(1000) * 16).floor().tolist()
    assert sorted(slices) == list(range(16)) and slices != sorted(slices)


def test_mode_step_is_one_beta_and_a_generator_repeats_it():
    first, second = (sample_beta(8, mode="step", generator=torch.Generator().manual_seed(5)) for _ in range(2))
    assert first.shape == () and first == second
    assert sample_beta(8, mode="step", generator=torch.Generator().manual_seed(6)) != first


def test_range_of_one_value():
    torch.testing.assert_close(sample_beta(3, (0.7, 0.7)), torch.full((3,), 0.7))


@pytest.mark.parametrize("beta_range", [(0.0, 1.0), (-1.0, 1.0), (2.0, 1.0), (0.1, math.inf), (math.nan, 1.0)])
def test_range_that_cannot_be_sampled_is_refused(beta_range):
    with pytest.raises(ValueError, match="beta_range is"):
        sample_beta(3, beta_range)


def test_mode_errors():
    with pytest.raises(ValueError, match="'batch'.*'example'"):
        sample_beta(3, mode="batch")
    with pytest.raises(ValueError, match="stratified"):
        sample_beta(3, mode="step", stratified=True)

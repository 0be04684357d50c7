"""Rate, the beta-VAE objective and the sampling of beta."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from mrvae_models.likelihoods import Bernoulli
from mrvae_models.objectives import Terms, annealing_factor, beta_vae, beta_vae_terms, check_beta, rate, sample_beta
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


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_a_bad_beta_is_found_wherever_it_is(bad, place):
    beta = torch.ones(3)
    beta[place] = bad
    with pytest.raises(ValueError, match=f"beta holds {bad}"):
        check_beta(beta, 3)


def test_betas_whose_sum_overflows_are_finite():
    beta = torch.full((3,), 1e308, dtype=torch.float64)
    assert check_beta(beta, 3) is beta


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


RATES = torch.tensor([[0.1, 2.0], [0.3, 4.0], [0.2, 0.0], [0.2, 6.0]], dtype=torch.float64)  # means 0.2 and 3


class Groups(NamedTuple):
    """What a hierarchy gives: rates by group, and no one latent vector."""

    parameters: torch.Tensor
    mean: torch.Tensor
    rates: torch.Tensor


def test_free_bits_hold_each_group_up_to_lambda_on_batch_means():
    out, x = output()
    groups = Groups(out.parameters, out.mean, RATES)
    distortion = Bernoulli().distortion(out.parameters, x).mean()
    for free_bits, expected in ((0.0, 3.2), (0.1, 3.2), (0.5, 3.5), (4.0, 8.0)):
        loss, _, rates = beta_vae(groups, x, 2.0, Bernoulli(), free_bits)
        torch.testing.assert_close(loss, distortion + 2.0 * expected)
        torch.testing.assert_close(rates, RATES.sum(1))


def test_free_bits_with_one_beta_a_sample_compare_prices():
    out, x = output()
    beta = torch.tensor([0.1, 1.0, 3.0, 10.0], dtype=torch.float64)
    loss = beta_vae(Groups(out.parameters, out.mean, RATES), x, beta, Bernoulli(), 0.5).loss
    paid = [sum(beta[i] * RATES[i, g] for i in range(4)) / 4 for g in range(2)]
    free = 0.5 * beta.mean()
    assert paid[0] < free < paid[1]
    torch.testing.assert_close(loss, Bernoulli().distortion(out.parameters, x).mean() + free + paid[1])
    same = beta_vae(Groups(out.parameters, out.mean, RATES), x, torch.full((4,), 2.0), Bernoulli(), 0.5).loss
    torch.testing.assert_close(same, beta_vae(Groups(out.parameters, out.mean, RATES), x, 2.0, Bernoulli(), 0.5).loss)


def test_free_bits_stop_the_gradient_of_the_groups_below_lambda_only():
    rates = RATES.clone().requires_grad_()
    terms = Terms(torch.zeros(4, dtype=torch.float64), rates, 2.0, 0.5)
    terms.loss(torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)).backward()
    assert rates.grad[:, 0].tolist() == [0.0] * 4
    torch.testing.assert_close(rates.grad[:, 1], torch.tensor([0.5, 1.0, 1.5, 2.0], dtype=torch.float64))


@pytest.mark.parametrize("free_bits", [0.0, 1e-9])
def test_weights_multiply_each_example(free_bits):
    distortion, weights = torch.rand(4, dtype=torch.float64), torch.tensor([1.0, 2.0, 0.5, 0.0], dtype=torch.float64)
    beta = torch.tensor([[0.1], [1.0], [3.0], [10.0]], dtype=torch.float64)
    loss = Terms(distortion, RATES, beta, free_bits).loss(weights)
    torch.testing.assert_close(loss, (weights * (distortion + beta[:, 0] * RATES.sum(1))).mean())


def test_annealing_multiplies_beta_and_nothing_else():
    out, x = output()
    beta = torch.tensor([0.1, 1.0, 3.0, 10.0], dtype=torch.float64)
    whole, half, none = (beta_vae_terms(out, x, beta, Bernoulli(), annealing=a).loss() for a in (1.0, 0.5, 0.0))
    torch.testing.assert_close(none, Bernoulli().distortion(out.parameters, x).mean())
    torch.testing.assert_close(half - none, (whole - none) / 2)


def test_linear_annealing_reaches_the_whole_after_its_part_of_the_run():
    factors = [annealing_factor(step, 100, 0.3) for step in range(101)]
    assert factors[0] == 0.0 and factors[15] == pytest.approx(0.5) and factors[29] < 1.0
    assert factors[30:] == [1.0] * 71
    assert {annealing_factor(step, 100, 0.0) for step in range(100)} == {1.0}
    assert annealing_factor(99, 100, 1.0) == pytest.approx(0.99)


def test_cyclical_annealing_repeats_the_rise_in_every_cycle():
    factors = [annealing_factor(step, 120, 0.5, 4) for step in range(120)]
    assert factors[:30] == factors[30:60] == factors[90:]
    assert factors[0] == 0.0 and factors[14] == pytest.approx(14 / 15) and factors[15:30] == [1.0] * 15
    odd = [annealing_factor(step, 100, 0.5, 3) for step in range(100)]  # a cycle of 33 1/3 steps
    assert [step for step in range(1, 100) if odd[step] < odd[step - 1]] == [34, 67]

"""Information over a whole set, and the importance-weighted bound, against known answers."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from metric_cases import Hierarchy, coded, normal
from mrvae_models.likelihoods import Gaussian
from mrvae_models.metrics import METRICS, bound, information
from mrvae_models.metrics.posteriors import Posteriors, posteriors
from mrvae_models.networks import build
from mrvae_models.objectives import rate
from mrvae_models.total_correlation import decompose
from mrvae_models.vae import VAE
from torch import distributions, nn

import mrvae_kernels as mk


def gaussian_set(n=1500):
    """Means N(0, S), constant variances: q(z) = N(0, S + diag v)."""
    covariance = torch.tensor([[1.0, 0.6], [0.6, 0.8]], dtype=torch.float64)
    variances = torch.tensor([0.3, 0.5], dtype=torch.float64)
    noise = normal(n, 2, seed=1000)  # apart from the seeds of the draws
    noise = noise - noise.mean(0)
    noise = noise @ torch.linalg.inv(torch.linalg.cholesky(noise.T @ noise / n)).T  # exactly of covariance I
    mean = noise @ torch.linalg.cholesky(covariance).T
    return mean, variances.log(), covariance + torch.diag(variances)


def test_gaussian_set_has_the_known_answers():
    mean, log_variance, total = gaussian_set()
    model, data = coded(mean, log_variance)
    diagonal, log_determinant = total.diagonal(), torch.logdet(total)
    expected = {
        "mi": 0.5 * (log_determinant - log_variance.sum()),
        "marginal_kl": 0.5 * (diagonal.sum() - 2 - log_determinant),
        "tc": 0.5 * (diagonal.log().sum() - log_determinant),
        "dimension_wise_kl": 0.5 * (diagonal - 1 - diagonal.log()).sum(),
    }
    for name, value in expected.items():
        found = [METRICS[name](model, data, 1.0, seed=seed) for seed in range(4)]
        assert sum(found) / 4 == pytest.approx(value.item(), abs=0.03), name
    assert expected["mi"] > 1 and expected["tc"] > 0.09  # the tolerance tells them apart


def test_parts_add_up_to_the_rate():
    mean, log_variance = normal(300, 4, seed=1000), 0.5 * normal(300, 4, seed=1) - 1
    model, data = coded(mean, log_variance)
    analytic = rate(mean, log_variance)
    found = information.information(posteriors(model, data, 1.0))
    assert found.mutual_information + found.marginal_kl == pytest.approx(found.rate, rel=1e-12)
    assert found.total_correlation + found.dimension_wise_kl == pytest.approx(found.marginal_kl, rel=1e-12)
    sampled = [information.information(Posteriors(mean, log_variance), seed) for seed in range(30)]
    sums = torch.tensor([one.mutual_information + one.marginal_kl for one in sampled])
    assert abs(sums.mean() - analytic.mean()) < 4 * sums.std() / math.sqrt(30)


def test_mutual_information_is_between_none_and_log_n():
    alike, data = coded(torch.ones(50, 2), 0.0)
    assert METRICS["mi"](alike, data, 1.0) == pytest.approx(0.0, abs=1e-12)
    apart, data = coded(100.0 * torch.arange(50.0)[:, None].expand(50, 2), -4.0)
    for name in ("mi", "marginal_kl"):
        with pytest.warns(UserWarning, match=r"is 3\.91 nats, and 3\.91, the log of the 50 examples, is the most"):
            found = METRICS[name](apart, data, 1.0)
        assert name != "mi" or found == pytest.approx(math.log(50))


@pytest.mark.filterwarnings("error")
def test_a_set_large_enough_is_measured_without_a_word():
    model, data = coded(normal(200, 1, seed=1000), 0.0)
    assert 0 < METRICS["mi"](model, data, 1.0) < 1


@pytest.mark.parametrize("broken", ["mean", "log variance"])
def test_codes_that_are_not_finite_are_no_number(broken):
    mean, log_variance = normal(30, 2), torch.zeros(30, 2, dtype=torch.float64)
    (mean if broken == "mean" else log_variance)[3, 1] = math.nan
    model, data = coded(mean, log_variance)
    for name in ("mi", "marginal_kl", "tc"):
        with pytest.raises(ValueError, match=f"posterior.* {broken} at beta = 1 has NaN or infinite .* diverged"):
            METRICS[name](model, data, 1.0)


@pytest.mark.parametrize("name", ["active_units", "rate", "elbo"])
def test_a_network_that_has_diverged_is_no_number(name):
    network, data = build("mlp", (5,), 2, hidden=(4,)), SimpleNamespace(examples=torch.rand(9, 5))
    with torch.no_grad():
        next(network.parameters()).fill_(math.nan)
    with pytest.raises(ValueError, match="at beta = 1 has NaN or infinite values: .* --clip"):
        METRICS[name](network, data, 1.0)


def test_chunks_and_batches_change_nothing(monkeypatch):
    over = Posteriors(normal(60, 3), 0.3 * normal(60, 3, seed=1))
    whole = information.information(over)
    parts = decompose(over.draw(), *over)
    assert whole.total_correlation == pytest.approx(parts.total_correlation.mean().item())
    assert whole.mutual_information_se == pytest.approx(parts.mutual_information.std().item() / math.sqrt(60))
    monkeypatch.setattr(information, "PAIRS", 130)
    chunked = information.information(over)
    assert chunked.mutual_information == pytest.approx(whole.mutual_information, rel=1e-12)
    assert chunked.dimension_wise_kl == pytest.approx(whole.dimension_wise_kl, rel=1e-12)
    model, data = coded(*over)
    assert METRICS["mi"](model, data, 1.0, batch_size=7) == METRICS["mi"](model, data, 1.0)


def linear_gaussian(scale=1.0, n=40):
    """p(x | z) = N(W z, sigma^2), W of orthogonal columns: the exact posterior is diagonal, and log p(x) known."""
    k, d, sigma = 2, 6, 0.7
    columns, _ = torch.linalg.qr(normal(d, k))
    weight = columns * torch.tensor([2.0, 1.0], dtype=torch.float64)
    precision = weight.square().sum(0) / sigma**2 + 1

    class Exact(nn.Module):
        def forward(self, x):
            mean = x @ weight / sigma**2 / precision
            return mean, (scale / precision).log().expand_as(mean)

    decoder = nn.Linear(k, d, bias=False).double()
    with torch.no_grad():
        decoder.weight.copy_(weight)
    covariance = weight @ weight.T + sigma**2 * torch.eye(d, dtype=torch.float64)
    x = normal(n, d, seed=2) @ torch.linalg.cholesky(covariance).T
    log_p = distributions.MultivariateNormal(torch.zeros(d, dtype=torch.float64), covariance).log_prob(x)
    return VAE(Exact(), decoder, Gaussian(sigma), k, (d,)), SimpleNamespace(examples=x), log_p


@pytest.mark.parametrize("draws", [1, 7])
def test_bound_with_the_exact_posterior_is_log_p(draws):
    model, data, log_p = linear_gaussian()
    found = bound.log_likelihoods(model, data, 1.0, draws, batch_size=16)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, log_p, rtol=1e-5, atol=1e-5)  # the noise is float32


def test_bound_of_another_posterior_rises_to_log_p():
    model, data, log_p = linear_gaussian(scale=2.0, n=1000)
    one, ten, many = (bound.log_likelihoods(model, data, 1.0, draws=k) - log_p for k in (1, 10, 1000))
    kl = 2 * 0.5 * (2 - 1 - math.log(2))  # of both dimensions: what one draw loses
    assert abs(one.mean() + kl) < 4 * one.std() / math.sqrt(1000)
    assert one.mean() < ten.mean() < many.mean() < 0.005
    assert abs(many.mean()) < 0.005


def test_bound_does_not_underflow_and_repeats():
    torch.manual_seed(0)
    model = mk.multirate(build("mlp", (1, 28, 28), 4, hidden=(12,)))
    data = SimpleNamespace(examples=torch.rand(9, 1, 28, 28))
    first, second = (METRICS["iwae"](model, data, 0.5, draws=5, batch_size=4) for _ in range(2))
    assert first == second and -800 < first < -400  # exp(-500) is 0 in float32
    assert METRICS["iwae"](model, data, 0.5, draws=5, seed=1) != first
    assert METRICS["iwae"](model, data, 5.0, draws=5, batch_size=4) != first


NEED_A_VAE = ("mi", "marginal_kl", "tc", "dimension_wise_kl", "iwae", "mig", "mig_discretised", "beta_vae_score")


@pytest.mark.parametrize("name", (*NEED_A_VAE, "probe"))
def test_networks_of_no_single_latent_vector_are_named(name):
    factors = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]] * 3)
    data = SimpleNamespace(examples=torch.rand(12, 2), factors=factors, labels=factors[:, 0])
    with pytest.raises(ValueError, match="needs one Gaussian latent vector.*Hierarchy has none"):
        METRICS[name](Hierarchy(), data, 1.0)


def test_wrong_calls_are_refused():
    model, data = coded(normal(5, 2), 0.0)
    with pytest.raises(ValueError, match="draws is 0"):
        METRICS["iwae"](model, data, 1.0, draws=0)
    with pytest.raises(ValueError, match="batch_size is 0"):
        METRICS["mi"](model, data, 1.0, batch_size=0)
    with pytest.raises(ValueError, match="beta is -1"):
        METRICS["mi"](model, data, -1.0)
    with pytest.raises(ValueError, match="dataset is empty"):
        METRICS["mi"](model, SimpleNamespace(examples=torch.zeros(0, 4)), 1.0)
    with pytest.raises(TypeError, match="drawz"):
        METRICS["iwae"](model, data, 1.0, drawz=3)

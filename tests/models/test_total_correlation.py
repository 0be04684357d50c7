"""The three parts of the rate: against brute force, against Gaussians with known answers, and in an objective."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from mrvae_models.likelihoods import Bernoulli
from mrvae_models.objectives import beta_vae
from mrvae_models.total_correlation import Decomposition, beta_tcvae, beta_tcvae_terms, decompose, log_weights
from mrvae_models.vae import VAEOutput
from torch import distributions


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def posteriors(n=7, k=3):
    mean, log_variance = draw(n, k), 0.5 * draw(n, k, seed=1)
    return mean + torch.exp(log_variance / 2) * draw(n, k, seed=2), mean, log_variance


def sampled_kl(z, mean, log_variance):
    q = distributions.Normal(mean, torch.exp(log_variance / 2))
    return (q.log_prob(z) - distributions.Normal(0.0, 1.0).log_prob(z)).sum(1)


@pytest.mark.parametrize(("size", "sampling"), [(None, "weighted"), (50, "weighted"), (50, "stratified")])
def test_parts_add_up_to_the_sampled_kl(size, sampling):
    parts = decompose(*posteriors(), size, sampling)
    torch.testing.assert_close(sum(parts), sampled_kl(*posteriors()), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(("size", "sampling"), [(None, "weighted"), (50, "weighted"), (50, "stratified")])
def test_parts_are_their_formulas_written_out(size, sampling):
    z, mean, log_variance = posteriors()
    n, k = z.shape
    got = decompose(z, mean, log_variance, size, sampling)

    def density(i, j, d):
        return math.exp(distributions.Normal(mean[j, d], torch.exp(log_variance[j, d] / 2)).log_prob(z[i, d]))

    for i in range(n):
        weights = [1 / n if size is None else 1 / (size * n)] * n
        if sampling == "stratified":
            weights = [1 / size if j == i else (size - 1) / (size * (n - 1)) for j in range(n)]
        joint = sum(w * math.prod(density(i, j, d) for d in range(k)) for j, w in enumerate(weights))
        marginals = [sum(w * density(i, j, d) for j, w in enumerate(weights)) for d in range(k)]
        own = math.prod(density(i, i, d) for d in range(k))
        prior = math.exp(distributions.Normal(0.0, 1.0).log_prob(z[i]).sum())
        assert got.mutual_information[i].item() == pytest.approx(math.log(own / joint))
        assert got.total_correlation[i].item() == pytest.approx(math.log(joint / math.prod(marginals)))
        assert got.dimension_wise[i].item() == pytest.approx(math.log(math.prod(marginals) / prior))


def test_stratified_weights_are_unbiased_over_all_batches_that_hold_the_example():
    """Brute force: 6 examples, every batch of 3 with example 0 in it."""
    density = torch.rand(6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))  # q(z_0 | x_n)
    weights = log_weights(3, 6, "stratified", torch.float64).exp()
    torch.testing.assert_close(weights.sum(1), torch.ones(3, dtype=torch.float64))
    for place in range(3):
        estimates = []
        for others in itertools.permutations(range(1, 6), 2):
            batch = list(others)
            batch.insert(place, 0)
            estimates.append(weights[place] @ density[batch])
        torch.testing.assert_close(torch.stack(estimates).mean(), density.mean())


def test_weighted_estimate_of_the_whole_set_differs_by_the_sizes_alone():
    whole, batch = decompose(*posteriors()), decompose(*posteriors(), 50)
    torch.testing.assert_close(batch.mutual_information, whole.mutual_information + math.log(50))
    torch.testing.assert_close(batch.total_correlation, whole.total_correlation + 2 * math.log(50))  # k - 1 = 2


def test_gaussian_data_have_the_known_mutual_information_and_total_correlation():
    """Means N(0, S), constant variances: q(z) = N(0, S + diag v), every part in closed form."""
    covariance = torch.tensor([[1.0, 0.6], [0.6, 0.8]], dtype=torch.float64)
    variances = torch.tensor([0.3, 0.5], dtype=torch.float64)
    mean = draw(3000, 2) @ torch.linalg.cholesky(covariance).T
    log_variance = variances.log().expand(3000, 2)
    parts = decompose(mean + variances.sqrt() * draw(3000, 2, seed=1), mean, log_variance)
    total = covariance + torch.diag(variances)
    diagonal, log_determinant = total.diagonal(), torch.logdet(total)
    expected = Decomposition(
        0.5 * (log_determinant - variances.log().sum()),
        0.5 * (diagonal.log().sum() - log_determinant),
        0.5 * (diagonal - 1 - diagonal.log()).sum(),
    )
    for got, want in zip(parts, expected, strict=True):
        assert got.mean().item() == pytest.approx(want.item(), abs=0.02)
    assert expected.total_correlation > 0.09 and expected.mutual_information > 1  # the tolerance tells them apart


@pytest.mark.parametrize("beta", [2.0, torch.tensor(2.0), torch.tensor([0.1, 1.0, 3.0, 10.0, 2.0, 2.0, 2.0])])
def test_objective_weighs_the_parts(beta):
    z, mean, log_variance = posteriors()
    out, x = VAEOutput(draw(7, 5, seed=3), mean, log_variance, z), (draw(7, 5, seed=4) > 0).double()
    got = beta_tcvae(out, x, beta, Bernoulli(), 50, alpha=0.5, gamma=3.0)
    parts = decompose(z, mean, log_variance, 50)
    distortion = Bernoulli().distortion(out.parameters, x)
    expected = distortion + 0.5 * parts[0] + torch.as_tensor(beta).double() * parts[1] + 3.0 * parts[2]
    torch.testing.assert_close(got.loss, expected.mean())
    torch.testing.assert_close(got.rate, sampled_kl(z, mean, log_variance))
    for one, other in zip(got[3:], parts, strict=True):
        torch.testing.assert_close(one, other)
    annealed = beta_tcvae_terms(out, x, beta, Bernoulli(), 50, 0.5, 3.0, annealing=0.25).loss()
    torch.testing.assert_close(annealed, (distortion + 0.25 * (expected - distortion)).mean())


def test_with_equal_weights_it_is_the_beta_vae_in_expectation():
    mean, log_variance = draw(4, 2), 0.3 * draw(4, 2, seed=1)
    x, parameters = (draw(4, 5, seed=2) > 0).double(), draw(4, 5, seed=3)
    losses = []
    for seed in range(2000):
        z = mean + torch.exp(log_variance / 2) * draw(4, 2, seed=10 + seed)
        out = VAEOutput(parameters, mean, log_variance, z)
        losses.append(beta_tcvae(out, x, 2.0, Bernoulli(), 50, alpha=2.0, gamma=2.0).loss)
    losses = torch.stack(losses)
    expected = beta_vae(VAEOutput(parameters, mean, log_variance, mean), x, 2.0, Bernoulli()).loss
    assert abs(losses.mean() - expected) < 4 * losses.std() / math.sqrt(2000)


def test_half_precision_is_computed_in_float32():
    parts = decompose(*(part.bfloat16() for part in posteriors()), 50)
    assert {part.dtype for part in parts} == {torch.float32}


def test_wrong_calls_are_refused():
    z, mean, log_variance = posteriors()
    with pytest.raises(ValueError, match="sampling is 'exact'; expected one of weighted, stratified"):
        decompose(z, mean, log_variance, 50, "exact")
    with pytest.raises(ValueError, match="dataset_size is 3; .*at least 7"):
        decompose(z, mean, log_variance, 3)
    with pytest.raises(ValueError, match="batch of 1"):
        decompose(z[:1], mean[:1], log_variance[:1], 50, "stratified")
    with pytest.raises(ValueError, match="shapes"):
        decompose(z[:, :2], mean, log_variance)
    groups = SimpleNamespace(parameters=z, mean=mean, rates=mean)
    with pytest.raises(ValueError, match="one Gaussian latent vector"):
        beta_tcvae(groups, z, 1.0, Bernoulli(), 50)
    out = VAEOutput(draw(7, 5), mean, log_variance, z)
    with pytest.raises(ValueError, match="beta is 0"):
        beta_tcvae(out, draw(7, 5), 0.0, Bernoulli(), 50)
    with pytest.raises(ValueError, match="batch is empty"):
        beta_tcvae(VAEOutput(*(part[:0] for part in out)), draw(0, 5), 1.0, Bernoulli(), 50)

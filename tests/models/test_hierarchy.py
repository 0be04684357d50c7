"""Hierarchies: the prior and posterior arithmetic against torch.distributions in float64, balancing, what a hierarchy
gives for given noise."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mrvae_models.likelihoods import Bernoulli
from mrvae_models.networks.hierarchy import Hierarchy, Normal, Raw, soft_clamp
from mrvae_models.objectives import beta_vae, beta_vae_terms
from torch import nn
from torch.distributions import kl_divergence


def raw(scale: float = 1.0) -> Raw:
    return Raw(*(scale * torch.randn(2, 5, 3, 2, 2, dtype=torch.float64)).unbind(0))


def of_torch(normal: Normal) -> torch.distributions.Normal:
    return torch.distributions.Normal(normal.mean, normal.sigma)


class Chain(Hierarchy):
    """Two groups of a number each: p(z1) = N(0, 1), p(z2 | z1) = N(a z1, s), posteriors relative to them by a number
    of x; the output is z1 + 2 z2."""

    def __init__(self) -> None:
        super().__init__(Bernoulli(), (1,), [(1,), (1,)])
        self.a = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))

    def ascend(self, x):
        return x

    def descend(self, features, noise):
        zero = torch.zeros_like(noise[0])
        first, pairs = Normal(zero, zero + 1), []
        q = first if features is None else Raw(zero, zero).residual(Raw(0.3 * features, features))
        z1 = q.draw(noise[0])
        pairs.append((q, first))
        prior = Raw(self.a * z1, zero - 0.7)
        q = prior.normal() if features is None else prior.residual(Raw(-features, 0.2 * features))
        pairs.append((q, prior.normal()))
        return z1 + 2 * q.draw(noise[1]), pairs


@pytest.mark.parametrize("scale", [0.1, 1.0, 4.0, 1e4])
def test_the_residual_posteriors_kl_is_that_of_torch(scale):
    torch.manual_seed(0)
    prior, relative = raw(scale), raw(scale)
    p, q = prior.normal(), prior.residual(relative)
    clamp = torch.nn.Hardtanh(-5, 5) if scale == 1e4 else soft_clamp
    torch.testing.assert_close(q.mean, clamp(prior.mu + relative.mu))
    torch.testing.assert_close(q.sigma, clamp(prior.log_sigma + relative.log_sigma).exp() + 0.01)
    kl = q.kl_from(p)
    assert kl.isfinite().all() and (kl >= 0).all()
    torch.testing.assert_close(kl, kl_divergence(of_torch(q), of_torch(p)), rtol=1e-12, atol=1e-12)


def test_the_kl_is_zero_at_the_prior_and_its_gradient_that_of_torch():
    torch.manual_seed(0)
    prior = raw()
    zero = torch.zeros_like(prior.mu)
    assert prior.residual(Raw(zero, zero)).kl_from(prior.normal()).sum() == 0
    heads = [torch.randn(4, 6, 2, 2, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    prior, relative = map(Raw.of, heads)
    assert prior.mu.shape == (4, 3, 2, 2) and torch.equal(torch.cat(prior, 1), heads[0])
    q, p = prior.residual(relative), prior.normal()
    ours = torch.autograd.grad(q.kl_from(p).sum(), heads, retain_graph=True)
    theirs = torch.autograd.grad(kl_divergence(of_torch(q), of_torch(p)).sum(), heads)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_small_kls_have_the_digits_of_float32():
    """A group that is all but collapsed: r^2 - 1 and log r cancel to the second order."""
    log_ratio = 1e-4 * torch.linspace(-1, 1, 1001, dtype=torch.float64)
    zero, one = torch.zeros(1001), torch.ones(1001)
    q = Normal(zero, log_ratio.exp().float())
    expected = Normal(zero.double(), q.sigma.double()).kl_from(Normal(zero.double(), one.double())).sum()
    assert q.kl_from(Normal(zero, one)).sum().item() == pytest.approx(expected.item(), rel=1e-4)


def test_half_precision_kls_are_computed_in_float32():
    kl = Normal(torch.ones(3).half(), torch.full((3,), 0.01).half()).kl_from(
        Normal(torch.zeros(3).half(), torch.ones(3).half())
    )
    assert kl.dtype == torch.float32
    assert kl[0].item() == pytest.approx(0.5 * (1 + 1e-4 - 1) - math.log(0.01), rel=1e-3)


def test_a_chain_gives_what_its_formulas_say():
    torch.manual_seed(0)
    chain = Chain().double()
    x, noise = torch.rand(6, 1, dtype=torch.float64), torch.randn(6, 2, dtype=torch.float64)
    out = chain(x, noise)
    z1 = soft_clamp(0.3 * x) + (soft_clamp(x).exp() + 0.01) * noise[:, :1]
    mean2 = soft_clamp(0.5 * z1 - x)
    sigma2 = soft_clamp(0.2 * x - 0.7).exp() + 0.01
    torch.testing.assert_close(out.parameters, z1 + 2 * (mean2 + sigma2 * noise[:, 1:]))
    torch.testing.assert_close(out.mean, torch.cat([soft_clamp(0.3 * x), mean2 - soft_clamp(0.5 * z1)], 1))
    assert out.rates.shape == (6, 2) and torch.equal(out.noise, noise)
    torch.testing.assert_close(chain.decode(noise)[:, 0], decoded(noise))
    torch.testing.assert_close(chain.reconstruct(x), torch.sigmoid(chain(x, 0 * noise).parameters))
    torch.manual_seed(3)
    drawn = chain(x)
    assert torch.equal(chain(x, drawn.noise).parameters, drawn.parameters)
    assert beta_vae(drawn, x, 2.0, chain.likelihood).rate.shape == (6,)


def decoded(noise: torch.Tensor) -> torch.Tensor:
    z1, sigma = noise[:, 0], soft_clamp(torch.tensor(-0.7, dtype=torch.float64)).exp() + 0.01
    return z1 + 2 * (soft_clamp(0.5 * z1) + sigma * noise[:, 1])


def test_samples_follow_the_generator_and_the_temperature():
    chain = Chain().double()

    def samples(**options):
        return chain.sample(4, torch.Generator().manual_seed(1), **options)

    noise = torch.randn(4, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(samples()[:, 0], decoded(noise).sigmoid())
    torch.testing.assert_close(samples(temperature=0.3)[:, 0], decoded(0.3 * noise).sigmoid())
    assert torch.equal(samples(temperature=0.0), torch.full((4, 1), 0.5, dtype=torch.float64))
    for wrong in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"temperature is {wrong}"):
            samples(temperature=wrong)


def test_what_does_not_fit_is_refused():
    chain = Chain().double()
    with pytest.raises(ValueError, match=r"x has shape \(3, 2\).*\(N, 1\)"):
        chain(torch.rand(3, 2))
    for noise in (torch.randn(3, 3), torch.randn(2)):
        with pytest.raises(ValueError, match=r"noise has shape.*\(N, 2\)"):
            chain.decode(noise)


def test_balancing_weighs_groups_by_their_rate_a_variable_until_annealing_is_over():
    chain = Chain()
    chain.group_shapes = ((2, 1, 1), (2, 3, 2))
    rates = torch.tensor([[1.0, 2.0], [3.0, 8.0]], requires_grad=True)
    weights = chain.balance(rates)
    densities = torch.tensor([2.0 / 2, 5.0 / 12])
    torch.testing.assert_close(weights, densities / densities.mean())
    torch.testing.assert_close(chain.balance(torch.tensor([[1.0, 6.0]])), torch.ones(2))  # used alike by their size
    assert not weights.requires_grad
    output: Any = SimpleNamespace(parameters=torch.zeros(2, 3), rates=rates)
    x, beta = torch.ones(2, 3), torch.tensor([0.5, 2.0])
    terms = beta_vae_terms(output, x, beta, Bernoulli(), balance=chain.balance)
    torch.testing.assert_close(terms.rate, rates.sum(1))
    torch.testing.assert_close(terms.loss(), (terms.distortion + beta * (rates * weights).sum(1)).mean())
    assert torch.equal(chain.balance(torch.zeros(3, 2)), torch.ones(2))

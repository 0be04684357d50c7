"""Objectives of rate and distortion, in nats, summed over dimensions and averaged over examples."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mrvae_kernels.gates import all_positive

from .likelihoods import Likelihood
from .vae import Output, kl_divergences


class Objective(NamedTuple):
    loss: Tensor  # scalar: mean over the batch of distortion + beta * rate
    distortion: Tensor  # (N,), nats
    rate: Tensor  # (N,), nats


class Terms(NamedTuple):
    """What an objective is made of, before it is averaged: N examples, G divergences with a price each.

    A beta-VAE pays beta for each nat of its rate; a beta-TCVAE has three divergences, with a price each.
    """

    distortion: Tensor  # (N,), nats
    divergences: Tensor  # (N, G), nats; their sum over G is the rate
    prices: Tensor | float  # (N, G), or of a shape that broadcasts to it
    free_bits: float = 0.0  # nats of each divergence, as a mean over the batch, that cost no more than they would

    @property
    def rate(self) -> Tensor:
        return self.divergences.sum(1)

    def loss(self, weights: Tensor | None = None) -> Tensor:
        """mean_i w_i D_i + sum_g max(lambda mean_i w_i price_ig, mean_i w_i price_ig KL_ig), a scalar.

        weights: (N,), or None for ones. Without free bits lambda this is mean_i w_i (D_i + sum_g price_ig KL_ig).
        """
        prices = self.prices
        if not self.free_bits:
            examples = self.distortion + (prices * self.divergences).sum(1)
            return (examples if weights is None else weights * examples).mean()
        prices = torch.as_tensor(prices, dtype=self.divergences.dtype, device=self.divergences.device)
        prices = prices.expand_as(self.divergences)
        distortion = self.distortion
        if weights is not None:
            prices, distortion = weights.unsqueeze(1) * prices, weights * distortion
        paid = torch.maximum(self.free_bits * prices.mean(0), (prices * self.divergences).mean(0))
        return distortion.mean() + paid.sum()


def rate(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(mean, diag(exp(log_variance))) || N(0, I)) in nats: (N, k), (N, k) -> (N,)."""
    return kl_divergences(mean, log_variance).flatten(1).sum(1)


def beta_vae(
    output: Output, x: Tensor, beta: float | Tensor, likelihood: Likelihood, free_bits: float = 0.0
) -> Objective:
    """The beta-VAE objective, mean over the batch of D + beta R (MR-VAE, Eqn. 1 and 3).

    beta: a positive number, a 0-d tensor, or one a sample, shape (N,); the likelihood gets it too, as its sigma may
    depend on it. Raises ValueError for an empty batch, a beta of another length, and a beta that is not positive and
    finite. Values of a tensor on a GPU, or under torch.compile, are not looked at: that would wait for the device at
    every step.

    free_bits lambda, in nats (Kingma et al., 2016): mean D + beta sum_g max(lambda, mean_i KL_ig), g the
    latent dimensions or groups of `output.rates`; below lambda a latent variable costs no less, so nothing pushes it
    out. With one beta a sample, what is compared is the price: max(lambda mean_i beta_i, mean_i beta_i KL_ig).
    """
    terms = beta_vae_terms(output, x, beta, likelihood, free_bits)
    return Objective(terms.loss(), terms.distortion, terms.rate)


def beta_vae_terms(
    output: Output,
    x: Tensor,
    beta: float | Tensor,
    likelihood: Likelihood,
    free_bits: float = 0.0,
    annealing: float = 1.0,
    balance: Callable[[Tensor], Tensor] | None = None,
) -> Terms:
    """What beta_vae() averages; `annealing`, from 0 to 1, multiplies beta in the prices.

    balance: rates by group, (N, G) -> weights of their prices, (G,), as NVAE has them while its KL weight is annealed
    (Vahdat and Kautz, 2020, Appendix A). The rate that is reported stays the unweighted one.
    """
    prices = column(check_beta(beta, x.shape[0]))
    prices = prices if annealing == 1 else annealing * prices
    distortion = likelihood.distortion(output.parameters, x, beta=beta)
    rates = output.rates.flatten(1)
    if balance is not None:
        prices = prices * balance(rates)
    elif not free_bits:  # one divergence: its gradient is one number an example instead of one a latent dimension
        rates = rates.sum(1, keepdim=True)
    return Terms(distortion, rates, prices, free_bits)


def annealing_factor(step: int, steps: int, part: float, cycles: int = 1) -> float:
    """What the KL weight is multiplied by in step 0, 1, ... of `steps`: min(1, tau / part), tau the place in the cycle.

    The run is cut into `cycles` equal cycles; in each the weight rises linearly from 0 over the first `part` of it and
    stays (Fu et al., 2019; one cycle is the usual linear annealing). part = 0: always 1.
    """
    if not part:
        return 1.0
    tau = step * cycles % steps / steps if step < steps else 1.0  # in whole numbers: a cycle starts at 0, not beside it
    return min(1.0, tau / part)


def column(beta: float | Tensor) -> float | Tensor:
    """(N,) as (N, 1); a single number as it is."""
    return beta.unsqueeze(1) if isinstance(beta, Tensor) and beta.dim() == 1 else beta


def check_beta(beta: float | Tensor, n: int) -> float | Tensor:
    """beta, after making sure that it fits a batch of n and is positive and finite; ValueError otherwise."""
    if n == 0:
        raise ValueError("the batch is empty, so its mean loss is not defined; expected at least one example")
    if not isinstance(beta, Tensor):
        if not (math.isfinite(beta) and beta > 0):
            raise ValueError(f"beta is {beta}; expected a positive, finite number")
        return beta
    if beta.dim() != 0 and beta.shape != (n,):
        raise ValueError(
            f"beta has shape {tuple(beta.shape)}; expected a single number or one a sample, ({n},) for this batch"
        )
    if beta.device.type == "cpu" and not torch.compiler.is_compiling() and not all_positive(beta):
        bad = next(value for value in beta.flatten().tolist() if not 0 < value < math.inf)
        raise ValueError(f"beta holds {bad}; expected positive, finite numbers")
    return beta


def sample_beta(
    n: int,
    beta_range: tuple[float, float] = (0.01, 10.0),
    mode: str = "example",
    stratified: bool = False,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Betas for a batch of n, log-uniform on [a, b], float32 (MR-VAE, Algorithm 1: log beta ~ U(log a, log b)).

    mode "example": one a sample, shape (n,). mode "step": one for the batch, 0-d.
    stratified (mode "example" only): one draw from each of n equal slices of [log a, log b], in random order, so that a
    batch covers the range evenly; each beta alone is still log-uniform.
    Raises ValueError for another mode, and for a range that is not 0 < a <= b, both finite.
    """
    a, b = beta_range
    if not (0 < a <= b and math.isfinite(b)):
        raise ValueError(f"beta_range is ({a}, {b}); expected 0 < a <= b, both finite, e.g. (0.01, 10.0)")
    if mode not in ("example", "step"):
        raise ValueError(f"mode is {mode!r}; expected 'example' (one beta a sample) or 'step' (one for the batch)")
    if stratified and mode == "step":
        raise ValueError("stratified=True spreads the betas of a batch, and mode='step' draws only one: use 'example'")
    shape = (n,) if mode == "example" else ()
    source = generator.device if generator is not None else device
    uniform = torch.rand(shape, generator=generator, device=source)
    if stratified:
        uniform = (torch.randperm(n, generator=generator, device=source) + uniform) / n
    beta = torch.exp(math.log(a) + uniform * (math.log(b) - math.log(a)))
    beta = beta.clamp(a, b)  # exp and log may step past an end by rounding
    return beta if device is None else beta.to(device)

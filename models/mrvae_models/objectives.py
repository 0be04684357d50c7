"""Objectives of rate and distortion, in nats, summed over dimensions and averaged over examples."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .likelihoods import Likelihood
from .vae import Output, kl_divergences


class Objective(NamedTuple):
    loss: Tensor  # scalar: mean over the batch of distortion + beta * rate
    distortion: Tensor  # (N,), nats
    rate: Tensor  # (N,), nats


def rate(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(mean, diag(exp(log_variance))) || N(0, I)) in nats: (N, k), (N, k) -> (N,)."""
    return kl_divergences(mean, log_variance).flatten(1).sum(1)


def beta_vae(output: Output, x: Tensor, beta: float | Tensor, likelihood: Likelihood) -> Objective:
    """The beta-VAE objective, mean over the batch of D + beta R (MR-VAE, Eqn. 1 and 3).

    beta: a positive number, a 0-d tensor, or one a sample, shape (N,). Raises ValueError for an empty batch, a beta of
    another length, and a beta that is not positive and finite. Values of a tensor on a GPU, or under torch.compile, are
    not looked at: that would wait for the device at every step.
    """
    n = x.shape[0]
    if n == 0:
        raise ValueError("the batch is empty, so its mean loss is not defined; expected at least one example")
    beta = _check_beta(beta, n)
    distortion = likelihood.distortion(output.parameters, x)
    rates = output.rates.flatten(1).sum(1)
    return Objective((distortion + beta * rates).mean(), distortion, rates)


def _check_beta(beta: float | Tensor, n: int) -> float | Tensor:
    if not isinstance(beta, Tensor):
        if not (math.isfinite(beta) and beta > 0):
            raise ValueError(f"beta is {beta}; expected a positive, finite number")
        return beta
    if beta.dim() != 0 and beta.shape != (n,):
        raise ValueError(
            f"beta has shape {tuple(beta.shape)}; expected a single number or one a sample, ({n},) for this batch"
        )
    if beta.device.type == "cpu" and beta.numel() > 0 and not torch.compiler.is_compiling():
        low, high = beta.detach().aminmax()  # one pass, and a NaN comes through: 4 us in place of 16 a step
        if not (low.item() > 0 and high.item() < math.inf):
            bad = ~(torch.isfinite(beta) & (beta > 0))
            raise ValueError(f"beta holds {beta[bad].flatten()[0].item()}; expected positive, finite numbers")
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


def balanced_rates(network: Any, rates: Tensor, annealed: float) -> Tensor:
    """The rates to put into the loss while the KL weight is annealed: w_l R_l by group, (N, groups) -> (N, groups).

    annealed: how much of its final value the KL weight has, from 0 to 1; at 1, and for a network without a method
    `balance(rates) -> weights (groups,)`, they are the rates themselves (NVAE, Appendix A). The rate that is reported
    stays the unweighted one.
    """
    balance = getattr(network, "balance", None)
    return rates if balance is None or annealed >= 1 else rates * balance(rates)

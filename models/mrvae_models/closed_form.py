"""The best that any linear VAE can do: reverse water-filling on the eigenvalues of the data's covariance.

For a Gaussian decoder with identity covariance, k latent variables and eigenvalues l_1 >= l_2 >= ... (Lucas et al.,
2019; MR-VAE, Appendix A.1), in nats an example and without the constant d/2 log 2 pi of the distortion:

    R = 1/2 sum_{i<=k} max(0, log(l_i / beta))        D = 1/2 [sum_{i<=k} min(l_i, beta) + sum_{i>k} l_i]
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Optimum(NamedTuple):
    """Rate and distortion of the best linear VAE at one beta, nats an example, without d/2 log 2 pi."""

    rate: float
    distortion: float


def eigenvalues(data: Tensor) -> Tensor:
    """Eigenvalues of the covariance (divided by N) of data (N, ...), largest first, in float64."""
    flat = data.flatten(1).double()
    centred = flat - flat.mean(0)
    return torch.linalg.eigvalsh(centred.T @ centred / len(flat)).flip(0).clamp(min=0)


def linear_optimum(spectrum: Tensor, latent: int, beta: float) -> Optimum:
    """Reverse water-filling at one beta over the `latent` largest of the eigenvalues (largest first).

    ValueError for beta <= 0 and for latent outside 1 to the number of eigenvalues.
    """
    if not 0 < beta < math.inf:
        raise ValueError(f"beta is {beta}; expected a positive, finite KL weight")
    if not 1 <= latent <= len(spectrum):
        raise ValueError(f"latent is {latent}; expected 1 to {len(spectrum)}, the number of eigenvalues")
    kept, lost = spectrum[:latent], spectrum[latent:]
    used = kept[kept > beta]
    rate = 0.5 * torch.log(used / beta).sum()
    return Optimum(rate.item(), 0.5 * (kept.clamp(max=beta).sum() + lost.sum()).item())


def expected_linear(mean: Tensor, log_variance: Tensor, decoder_weight: Tensor, offset: Tensor, x: Tensor) -> Tensor:
    """Distortion (N,) of a linear decoder z W^T + offset in expectation over z ~ N(mean, diag(exp log_variance)).

    D = 1/2 |x - mean W^T - offset|^2 + 1/2 sum_k exp(log_variance_k) |w_k|^2, nats, without d/2 log 2 pi.
    mean, log_variance (N, k), decoder_weight (d, k), offset (d,), x (N, d).
    """
    residual = x - mean @ decoder_weight.T - offset
    return 0.5 * (residual.square().sum(1) + log_variance.exp() @ decoder_weight.square().sum(0))

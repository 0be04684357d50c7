"""Mutual information, marginal KL, total correlation and dimension-wise KL over a whole set, in nats.

    q(z) = 1/N sum_n q(z | x_n): log q(z_i) = logsumexp_j log q(z_i | x_j) - log N, j = i among them
    rate               = mean_i [log q(z_i | x_i) - log p(z_i)]      = mutual information + marginal KL
    mutual information = mean_i [log q(z_i | x_i) - log q(z_i)]      (Hoffman and Johnson, 2016), at most log N
    marginal KL        = mean_i [log q(z_i) - log p(z_i)]            = total correlation + dimension-wise KL
    total correlation  = mean_i [log q(z_i) - sum_d log q(z_id)]     (Chen et al., 2018)
    dimension-wise KL  = mean_i sum_d [log q(z_id) - log p(z_id)]

One draw z_i ~ q(z | x_i) an example. A mutual information near log N says that the set is too small to measure it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..curve import Examples
from ..total_correlation import log_normal
from .posteriors import Posteriors, posteriors

PAIRS = 4_000_000
"""Pairs (i, j) at a time: 32 MB of float64."""


@dataclass(frozen=True)
class Information:
    """Nats, means over the set; the last two are None where they were not asked for."""

    rate: float
    mutual_information: float
    mutual_information_se: float  # std / sqrt(N) over the examples
    marginal_kl: float
    total_correlation: float | None
    dimension_wise_kl: float | None


def log_aggregate(z: Tensor, over: Posteriors, dimensions: bool = False) -> tuple[Tensor, Tensor | None]:
    """log q(z) (n,) and, where asked, log q(z_d) (n, k), of the mixture of `over` (N, k) at z (n, k).

    N n k work and PAIRS numbers of memory: a dimension at a time, rows in chunks.
    """
    n, k = len(over.mean), z.shape[1]
    joints, marginals = [], []
    for rows in z.split(max(1, PAIRS // n)):
        total = rows.new_zeros(len(rows), n)
        alone = []
        for d in range(k):
            pairs = log_normal(rows[:, d, None], over.mean[:, d], over.log_variance[:, d])  # (rows, N)
            total += pairs
            if dimensions:
                alone.append(torch.logsumexp(pairs, 1))
        joints.append(torch.logsumexp(total, 1))
        marginals += [torch.stack(alone, 1)] if dimensions else []
    return torch.cat(joints) - math.log(n), torch.cat(marginals) - math.log(n) if dimensions else None


def information(over: Posteriors, seed: int = 0, dimensions: bool = True) -> Information:
    """All of them from the posteriors of a whole set; dimensions=False leaves out the last two, and half the work."""
    z = over.draw(seed)
    joint, marginals = log_aggregate(z, over, dimensions)
    conditional = log_normal(z, over.mean, over.log_variance).sum(1)
    prior = log_normal(z, 0.0, 0.0).sum(1)
    gain = conditional - joint
    return Information(
        (conditional - prior).mean().item(),
        gain.mean().item(),
        gain.std().item() / math.sqrt(len(z)) if len(z) > 1 else math.nan,
        (joint - prior).mean().item(),
        None if marginals is None else (joint - marginals.sum(1)).mean().item(),
        None if marginals is None else (marginals.sum(1) - prior).mean().item(),
    )


def mutual_information(
    model: nn.Module,
    dataset: Examples,
    beta: float,
    batch_size: int = 500,
    seed: int = 0,
    calibration: Tensor | None = None,
) -> float:
    """I_q(x; z), nats."""
    over = posteriors(model, dataset, beta, batch_size, calibration, "mutual information")
    return information(over, seed, dimensions=False).mutual_information


def marginal_kl(
    model: nn.Module,
    dataset: Examples,
    beta: float,
    batch_size: int = 500,
    seed: int = 0,
    calibration: Tensor | None = None,
) -> float:
    """KL(q(z) || p(z)), nats."""
    over = posteriors(model, dataset, beta, batch_size, calibration, "marginal KL")
    return information(over, seed, dimensions=False).marginal_kl


def total_correlation(
    model: nn.Module,
    dataset: Examples,
    beta: float,
    batch_size: int = 500,
    seed: int = 0,
    calibration: Tensor | None = None,
) -> float:
    """KL(q(z) || prod_d q(z_d)), nats."""
    over = posteriors(model, dataset, beta, batch_size, calibration, "total correlation")
    found = information(over, seed).total_correlation
    assert found is not None
    return found


def dimension_wise_kl(
    model: nn.Module,
    dataset: Examples,
    beta: float,
    batch_size: int = 500,
    seed: int = 0,
    calibration: Tensor | None = None,
) -> float:
    """sum_d KL(q(z_d) || p(z_d)), nats."""
    over = posteriors(model, dataset, beta, batch_size, calibration, "dimension-wise KL")
    found = information(over, seed).dimension_wise_kl
    assert found is not None
    return found

"""Mutual information, marginal KL, total correlation and dimension-wise KL over a whole set, in nats.

    q(z) = 1/N sum_n q(z | x_n): log q(z_i) = logsumexp_j log q(z_i | x_j) - log N, j = i among them
    rate               = mean_i [log q(z_i | x_i) - log p(z_i)]      = mutual information + marginal KL
    mutual information = mean_i [log q(z_i | x_i) - log q(z_i)]      (Hoffman and Johnson, 2016), at most log N
    marginal KL        = mean_i [log q(z_i) - log p(z_i)]            = total correlation + dimension-wise KL
    total correlation  = mean_i [log q(z_i) - sum_d log q(z_id)]     (Chen et al., 2018)
    dimension-wise KL  = mean_i sum_d [log q(z_id) - log p(z_id)]

One draw z_i ~ q(z | x_i) an example. A mutual information near log N says that the set is too small to measure it: what
is found is a lower bound then, and the marginal KL an upper one. The metrics mi and marginal_kl warn of it.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..curve import Examples
from ..total_correlation import log_normal
from .posteriors import Posteriors, posteriors

PAIRS = 4_000_000
"""Pairs (i, j) at a time: 32 MB of float64."""

NEAR_THE_LIMIT = 0.5
"""Nats below log N from where on a mutual information is told to be as much as N examples can show."""


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


def _measurable(model: nn.Module, dataset: Examples, beta: float, seed: int, name: str, **how: Any) -> Information:
    """information() of a set without the parts by dimension; a warning where the set is too small for it."""
    found = information(posteriors(model, dataset, beta, wanted_by=name, **how), seed, dimensions=False)
    limit = math.log(len(dataset.examples))
    if found.mutual_information > limit - NEAR_THE_LIMIT:
        warnings.warn(
            f"at beta = {beta:.4g} the mutual information is {found.mutual_information:.3g} nats, and {limit:.3g}, the "
            f"log of the {len(dataset.examples)} examples, is the most that so many can show: it is a lower bound "
            "here, and marginal_kl an upper one; measure on more examples",
            stacklevel=3,
        )
    return found


def mutual_information(
    model: nn.Module,
    dataset: Examples,
    beta: float,
    batch_size: int = 500,
    seed: int = 0,
    calibration: Tensor | None = None,
) -> float:
    """I_q(x; z), nats; a warning where it is near the log of the number of examples, the most that they can show."""
    how = {"batch_size": batch_size, "calibration": calibration}
    return _measurable(model, dataset, beta, seed, "mutual information", **how).mutual_information


def marginal_kl(
    model: nn.Module,
    dataset: Examples,
    beta: float,
    batch_size: int = 500,
    seed: int = 0,
    calibration: Tensor | None = None,
) -> float:
    """KL(q(z) || p(z)), nats; a warning where the set is too small, and this an upper bound."""
    how = {"batch_size": batch_size, "calibration": calibration}
    return _measurable(model, dataset, beta, seed, "marginal KL", **how).marginal_kl


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

"""The rate in three parts, and the beta-TCVAE objective that weighs them apart (Chen et al., 2018).

    E_x KL(q(z|x) || p(z)) = I_q(x; z) + KL(q(z) || prod_d q(z_d)) + sum_d KL(q(z_d) || p(z_d))
                             mutual      total correlation            dimension-wise KL
                             information

q(z) = 1/N sum_n q(z | x_n) is the aggregate posterior over the N examples of a data set, of which a batch shows M.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .likelihoods import Likelihood, full_precision
from .objective_options import TCVAE_SAMPLING
from .objectives import Terms, check_beta
from .vae import Output, VAEOutput


class Decomposition(NamedTuple):
    """The sampled KL log q(z_i | x_i) - log p(z_i) of each example, as the sum of three; each (N,), in nats."""

    mutual_information: Tensor
    total_correlation: Tensor
    dimension_wise: Tensor


def log_normal(z: Tensor, mean: Tensor | float, log_variance: Tensor | float) -> Tensor:
    """log N(z; mean, exp(log_variance)), elementwise; the three broadcast."""
    log_variance = torch.as_tensor(log_variance, dtype=z.dtype, device=z.device)
    return -0.5 * (math.log(2 * math.pi) + log_variance + (z - mean).square() * torch.exp(-log_variance))


def log_weights(
    batch: int, dataset_size: int | None, sampling: str, dtype: torch.dtype, device: torch.device | str | None = None
) -> Tensor:
    """(M, M): log of the weight that estimates q(z_i) = 1/N sum_n q(z_i | x_n) gives to q(z_i | x_j) of the batch.

    dataset_size N = None: the batch is the whole set, every weight is 1 / M and q(z_i) is exact.
    "weighted" (Chen et al., Eqn. 3): 1 / (N M) everywhere. Biased low: its expectation leaves out the batches
    without x_i.
    "stratified" (their appendix): x_i, from which z_i was drawn, weighs 1 / N as it does in q(z_i); the other M - 1
    share (N - 1) / N. Unbiased over batches drawn without replacement, given x_i. The paper gives one of the others a
    weight of its own; here all are alike, the mean over the choice of that one: the same expectation, less variance.
    """
    if sampling not in TCVAE_SAMPLING:
        raise ValueError(f"sampling is {sampling!r}; expected one of {', '.join(TCVAE_SAMPLING)}")
    if dataset_size is None:
        return torch.full((batch, batch), -math.log(batch), dtype=dtype, device=device)
    if dataset_size < batch:
        raise ValueError(f"dataset_size is {dataset_size}; expected the size of the training set, at least {batch}")
    if sampling == "weighted":
        return torch.full((batch, batch), -math.log(dataset_size * batch), dtype=dtype, device=device)
    if batch < 2:
        raise ValueError("stratified sampling of a batch of 1 says nothing of the other examples; expected 2 or more")
    other = math.log((dataset_size - 1) / (dataset_size * (batch - 1)))
    weights = torch.full((batch, batch), other, dtype=dtype, device=device)
    return weights.fill_diagonal_(-math.log(dataset_size))


def decompose(
    z: Tensor, mean: Tensor, log_variance: Tensor, dataset_size: int | None = None, sampling: str = "weighted"
) -> Decomposition:
    """Mutual information, total correlation and dimension-wise KL of a batch, which add up to its sampled KL.

    z, mean, log_variance: (M, k), z_i drawn from q(z | x_i). dataset_size and sampling: see log_weights().

        log q(z_i)    = logsumexp_j [log w_ij + sum_d log q(z_id | x_j)]
        log q(z_id)   = logsumexp_j [log w_ij + log q(z_id | x_j)]
        mutual information log q(z_i | x_i) - log q(z_i), total correlation log q(z_i) - sum_d log q(z_id),
        dimension-wise sum_d log q(z_id) - log p(z_i)

    M^2 k numbers are held at once. ValueError for an empty batch and for shapes that differ.
    """
    if not z.shape == mean.shape == log_variance.shape or z.dim() != 2 or len(z) == 0:
        raise ValueError(
            f"z, mean and log_variance have shapes {tuple(z.shape)}, {tuple(mean.shape)} and "
            f"{tuple(log_variance.shape)}; expected the same (M, k), M at least 1"
        )
    z, mean, log_variance = full_precision(z), full_precision(mean), full_precision(log_variance)
    pairs = log_normal(z.unsqueeze(1), mean.unsqueeze(0), log_variance.unsqueeze(0))  # (M, M, k)
    weights = log_weights(len(z), dataset_size, sampling, z.dtype, z.device)
    joint = torch.logsumexp(weights + pairs.sum(2), 1)
    product = torch.logsumexp(weights.unsqueeze(2) + pairs, 1).sum(1)
    conditional = log_normal(z, mean, log_variance).sum(1)
    prior = log_normal(z, 0.0, 0.0).sum(1)
    return Decomposition(conditional - joint, joint - product, product - prior)


class TCObjective(NamedTuple):
    """What beta_tcvae() returns; N examples, nats."""

    loss: Tensor  # scalar
    distortion: Tensor  # (N,)
    rate: Tensor  # (N,), sampled: log q(z_i | x_i) - log p(z_i), the sum of the next three
    mutual_information: Tensor  # (N,)
    total_correlation: Tensor  # (N,)
    dimension_wise: Tensor  # (N,)


def beta_tcvae(
    output: VAEOutput,
    x: Tensor,
    beta: float | Tensor,
    likelihood: Likelihood,
    dataset_size: int,
    alpha: float = 1.0,
    gamma: float = 1.0,
    sampling: str = "weighted",
) -> TCObjective:
    """The beta-TCVAE objective, mean of D + alpha MI + beta TC + gamma DWKL (Chen et al., 2018, Eqn. 4).

    beta: a positive number, a 0-d tensor, or one a sample, (N,); it weighs the total correlation. With alpha = beta =
    gamma it is the beta-VAE with a sampled rate. dataset_size: of the training set. The mixture q(z) is that of the
    batch as it is: posteriors made at one beta a sample mix betas, and then no part is that of any one beta; a
    multi-rate network draws one beta a batch.
    ValueError for an output of no single Gaussian latent vector and as beta_vae() and decompose() say.
    """
    terms = beta_tcvae_terms(output, x, beta, likelihood, dataset_size, alpha, gamma, sampling)
    return TCObjective(terms.loss(), terms.distortion, terms.rate, *terms.divergences.unbind(1))


def beta_tcvae_terms(
    output: Output,
    x: Tensor,
    beta: float | Tensor,
    likelihood: Likelihood,
    dataset_size: int | None,
    alpha: float = 1.0,
    gamma: float = 1.0,
    sampling: str = "weighted",
    annealing: float = 1.0,
) -> Terms:
    """What beta_tcvae() averages; `annealing`, from 0 to 1, multiplies all three weights.

    All three, because it is their sum, the rate, under whose weight latent variables collapse early in training.
    """
    if not isinstance(output, VAEOutput):
        raise ValueError(
            f"the network's output is a {type(output).__name__}; the beta-TCVAE objective needs one Gaussian latent "
            "vector (mean, log variance and z), as a VAE has: train this network with the beta-VAE's"
        )
    price = check_beta(beta, x.shape[0])
    parts = torch.stack(decompose(output.z, output.mean, output.log_variance, dataset_size, sampling), 1)
    price = torch.as_tensor(price, dtype=parts.dtype, device=parts.device)
    prices = torch.stack([alpha * torch.ones_like(price), price, gamma * torch.ones_like(price)], -1)  # (3,) or (N, 3)
    return Terms(likelihood.distortion(output.parameters, x, beta=beta), parts, annealing * prices)

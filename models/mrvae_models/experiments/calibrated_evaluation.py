"""The numbers of `calibrated`: what Gaussian decoders of any variance have in common, of one run at its betas.

    rate, distortion, objective, elbo, ...   of the decoder's means with sigma = 1, on the test split: the shared plane
    own_beta        the beta of that plane's curve where the run has landed: beta sigma^2 of training, or learned
    nll             bound on -log p at the run's own variance: sigma^2 as the run has it, of per-image ones their mean,
                    and own_beta of those trained with sigma = 1, as sigma-VAE's Table 1 has it
    nll_train       the same on training examples
    nll_best        the first at the best constant variance of validation examples
    mse, mse_train, mse_validation  mean squared error a dimension on test, training and validation examples
    error_train, rate_train         E = SSE / 2 and R on training examples
    mi, marginal_kl                 the rate's two parts (sigma-VAE, Figure 3)
    variance_ratio, bin_error, coverage_50, coverage_95      of the decoder's own variance
    s0, s1          of L-VAE, and s0_fixed, s1_fixed, where s^4 = L on the training examples
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import mrvae_kernels as mk

from ..config import TrainConfig
from ..curve import evaluate, tokens_of
from ..l_vae import Scale
from ..likelihoods import Gaussian
from ..metrics.calibration import calibrate
from ..metrics.information import information
from ..metrics.posteriors import posteriors
from ..operating import landing
from ..report import calibration_for, dataset_for, training_examples
from ..run import plain_network, read_description
from ..scored import gaussian_nats, scored_as, squared_errors
from ..selection import call_metric, metric_called
from ..vae import dimensions_of
from .plan import Evaluation

EXAMPLES = 1000
"""Of the training and of the validation split, at most."""

UNIT = Gaussian(1.0)


def calibrated_columns(
    config: TrainConfig, model: nn.Module, betas: Sequence[float], evaluation: Evaluation, directory: Path
) -> dict[str, list[float]]:
    """The columns above, a value a beta; `metric` too where the evaluation names one."""
    test_set = dataset_for(model, config, "test", directory)
    if tokens_of(test_set) is not None:
        raise ValueError(f"{config.data} holds text; expected images, for whose decoders there is a variance")
    others = [_some(dataset_for(model, config, split, directory)) for split in ("train", "validation")]
    rows = [_row(config, model, beta, evaluation, directory, test_set, *others) for beta in betas]
    return {name: [row[name] for row in rows] for name in rows[0]}


def _some(dataset: Any) -> Any:
    """The same EXAMPLES of a set at every beta and in every run."""
    order = torch.randperm(len(dataset.examples), generator=torch.Generator().manual_seed(0))
    part = copy.copy(dataset)
    part.examples = dataset.examples[order[:EXAMPLES].sort().values]
    return part


def _row(
    config: TrainConfig,
    model: nn.Module,
    beta: float,
    evaluation: Evaluation,
    directory: Path,
    test_set: Any,
    train_set: Any,
    validation_set: Any,
) -> dict[str, float]:
    network = plain_network(model)
    dimensions = dimensions_of(network)
    batch_norms = calibration_for(model, config)
    fixed = isinstance(network.likelihood, Gaussian)
    if isinstance(model, mk.MultiRate):
        own_beta = variance = beta
    else:
        own_beta = landing(directory).unit_beta
        # sigma = 1 is no variance that a beta-VAE means; those that learn theirs have one
        variance = own_beta if fixed else network.likelihood.sigma ** 2
    with scored_as(model, UNIT):
        curve = evaluate(model, test_set, [own_beta], samples=evaluation.draws, calibration=batch_norms)
    (point,) = curve.points
    row = {name: getattr(point, name) for name in curve.quantities if name != "beta"}
    mse = 2 * point.distortion / dimensions - math.log(2 * math.pi)
    trained = squared_errors(model, train_set, own_beta, calibration=batch_norms)
    mse_train, rate_train = trained.distortion.mean().item(), trained.rate.mean().item()
    held_out = squared_errors(model, validation_set, own_beta, calibration=batch_norms)
    mse_validation = held_out.distortion.mean().item()
    over = posteriors(model, test_set, own_beta, calibration=batch_norms, wanted_by="mutual information")
    parts = information(over, dimensions=False)
    found = calibrate(
        model, test_set, own_beta, variance if fixed else None, levels=(0.5, 0.95), calibration=batch_norms
    )
    row |= {
        "own_beta": own_beta,
        "nll": gaussian_nats(mse, dimensions, variance) + point.rate,
        "nll_train": gaussian_nats(mse_train, dimensions, variance) + rate_train,
        "nll_best": gaussian_nats(mse, dimensions, mse_validation) + point.rate,
        "mse": mse,
        "mse_train": mse_train,
        "mse_validation": mse_validation,
        "error_train": 0.5 * dimensions * mse_train,
        "rate_train": rate_train,
        "mi": parts.mutual_information,
        "marginal_kl": parts.marginal_kl,
        "variance_ratio": found.ratio,
        "bin_error": found.bin_error,
        "coverage_50": found.coverage[0][1],
        "coverage_95": found.coverage[1][1],
    }
    if config.objective == "l-vae":
        learned = read_description(directory)["learned"]
        unit = Scale(network.likelihood, dimensions, config.lvae_form).unit
        row |= {"s0": learned["s0"], "s1": learned["s1"]}
        row |= {"s0_fixed": (row["error_train"] / unit) ** 0.25, "s1_fixed": rate_train**0.25}
    if evaluation.metric is not None:
        metric = metric_called(evaluation.metric)
        fitted = training_examples([metric], model, config, "test", directory)
        row["metric"] = float(call_metric(metric, model, test_set, own_beta, batch_norms, **fitted))
    return row

"""The numbers of one trained run, by what an experiment asks for: columns of one value a beta."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..closed_form import eigenvalues, expected_linear, linear_optimum
from ..config import TrainConfig
from ..curve import at, evaluate
from ..data import TextDataset
from ..objectives import rate
from ..pictures import pictures
from ..report import calibration_for, dataset_for, training_examples
from ..run import load_split, plain_network, replace_file
from ..selection import call_metric, metric_called
from .calibrated_evaluation import calibrated_columns
from .plan import Evaluation

Columns = dict[str, list[float]]

SAMPLES = "samples.npy"
"""Of a run's directory: (betas, pictures, C, H, W), by kind "samples"."""


def evaluated(
    config: TrainConfig, model: nn.Module, betas: Sequence[float], evaluation: Evaluation, directory: Path
) -> Columns:
    """The columns of one run: for each, a value at every one of `betas`, in their order."""
    if evaluation.kind not in EVALUATIONS:
        raise ValueError(f"evaluation {evaluation.kind!r} is not known; expected one of {', '.join(EVALUATIONS)}")
    trained_on_gpu = config.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    model = model.to("cuda" if trained_on_gpu else "cpu")
    return EVALUATIONS[evaluation.kind](config, model, betas, evaluation, directory)


def curve_columns(
    config: TrainConfig, model: nn.Module, betas: Sequence[float], evaluation: Evaluation, directory: Path
) -> Columns:
    """Every quantity of a curve, on the test split."""
    calibration = calibration_for(model, config)
    dataset = dataset_for(model, config, "test", directory)
    curve = evaluate(model, dataset, betas, samples=evaluation.draws, calibration=calibration)
    return {name: curve.column(name) for name in curve.quantities if name != "beta"}


def _with_metric(
    config: TrainConfig, model: nn.Module, betas: Sequence[float], evaluation: Evaluation, directory: Path
) -> Columns:
    metric = metric_called(evaluation.metric or "")
    calibration, split = calibration_for(model, config), "test"
    dataset = dataset_for(model, config, split, directory)
    if evaluation.split == "all" and getattr(dataset, "factors", None) is not None:
        split = "all"
        dataset = dataset_for(model, config, split, directory)
    fitted = training_examples([metric], model, config, split, directory)
    values = [call_metric(metric, model, dataset, beta, calibration, **fitted) for beta in betas]
    columns = curve_columns(config, model, betas, evaluation, directory)
    counts = [float(len(dataset))] * len(betas)
    return {**columns, "metric": [float(value) for value in values], "metric_examples": counts}


def _with_samples(
    config: TrainConfig, model: nn.Module, betas: Sequence[float], evaluation: Evaluation, directory: Path
) -> Columns:
    columns = curve_columns(config, model, betas, evaluation, directory)
    drawn = pictures(
        model,
        dataset_for(model, config, "test", directory),
        betas,
        evaluation.pictures,
        calibration=calibration_for(model, config),
    ).samples.numpy()

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:  # by a name numpy would add its ending
            np.save(file, drawn)

    replace_file(directory / SAMPLES, write)
    return columns


def _linear(
    config: TrainConfig, model: nn.Module, betas: Sequence[float], evaluation: Evaluation, directory: Path
) -> Columns:
    """Rate, distortion in expectation over z, D + beta R and what the best linear VAE has, on the training images.

    Without the constant d/2 log 2 pi, as the closed form; in float64.
    """
    images = load_split(config, "train").examples[:]  # a tensor, where large sets are packed in memory
    spectrum = eigenvalues(images)
    model = model.cpu().double()  # a float64 covariance of all images: no work for a GPU
    vae: Any = plain_network(model)
    names = ("rate", "distortion", "objective", "optimal_rate", "optimal_distortion", "optimal_objective")
    columns: Columns = {name: [] for name in names}
    for beta in betas:
        with torch.no_grad(), at(model, beta):
            mean, log_variance = vae.encode(images.double())
            offset = vae.decode(torch.zeros(1, vae.latent).double()).flatten(1)
            weight = (vae.decode(torch.eye(vae.latent).double()).flatten(1) - offset).T
            distortion = expected_linear(
                mean, log_variance, weight, offset[0], images.double().flatten(1)
            ).mean().item()
            nats = rate(mean, log_variance).mean().item()
        best = linear_optimum(spectrum, vae.latent, beta)
        found = (nats, distortion, distortion + beta * nats, *best, best.distortion + beta * best.rate)
        for name, value in zip(names, found, strict=True):
            columns[name].append(value)
    return columns


EVALUATIONS: Mapping[str, Callable[..., Columns]] = {
    "curve": curve_columns,
    "metric": _with_metric,
    "samples": _with_samples,
    "linear": _linear,
    "calibrated": calibrated_columns,
}


def check_evaluation(evaluation: Evaluation, configs: Sequence[TrainConfig]) -> None:
    """What can be wrong with an evaluation whatever the data, asked before anything is trained: ValueError for a metric
    that is not known and for a network without a closed form, ModuleNotFoundError or FileNotFoundError for what a
    metric needs."""
    if evaluation.metric is not None:
        metric_called(evaluation.metric)
    if evaluation.kind != "linear":
        return
    for config in configs:
        plain = config.likelihood in (None, "gaussian") and config.sigma in (None, 1.0)
        if config.network != "linear" or not plain:
            raise ValueError(
                f"network {config.network}, likelihood {config.likelihood or 'its own'}, sigma {config.sigma or 1:g}: "
                "expected --network linear with a gaussian of sigma 1, of which the closed form is known"
            )


OF_DATA = [entry.name for entry in dataclasses.fields(TrainConfig) if entry.metadata["group"] == "data"]


def check_test_split(evaluation: Evaluation, configs: Sequence[TrainConfig]) -> None:
    """What an evaluation asks of the data, asked before anything is trained: DataError where they have no test split,
    ValueError where it lacks what is evaluated, such as images or factors. Each data set is read once."""
    if evaluation.kind == "linear":  # on the training images
        return
    alike = {json.dumps([getattr(config, name) for name in OF_DATA]): config for config in configs}
    for config in alike.values():
        dataset = load_split(config, "test")
        if evaluation.kind in ("samples", "calibrated") and isinstance(dataset, TextDataset):
            raise ValueError(
                f"{config.data} holds text, and the evaluation {evaluation.kind!r} is of images; give such --data"
            )
        if evaluation.metric is not None:
            metric: Any = metric_called(evaluation.metric)
            getattr(metric, "accepts", lambda dataset: None)(dataset)


def check_columns(columns: Columns, name: str) -> None:
    """ValueError where a value is not finite: a mean over it would hide which run it was. Errors of one may be NaN."""
    for column, values in columns.items():
        if not column.endswith("_se") and not all(map(math.isfinite, values)):
            raise ValueError(f"{column} of run {name} is {values}; expected finite numbers")

"""Choosing beta after training: the KL weight at which a multi-rate model has what is wanted of it.

    chosen = select_beta(model, load("digits", split="validation"), "rate", 25.0)
    chosen.beta, chosen.interval                        # where R(beta) = 25 nats, and its 95 % interval

A quantity q is evaluated on a grid of betas, log-spaced over the range that the model was trained for; between two of
them the beta with q(beta) = target is found by Brent's method in log beta, and the beta of the best q by Brent's
bounded search. Every beta sees the same examples and the same noise, so that q is one smooth function of beta.

A method that learns its beta has one of its own on the curve: select_beta(model, data, "sigma-vae"), see operating.py.

Along the optimal curve R falls with beta and D rises (MR-VAE, Section 2: -dD/dR = beta); a model that does otherwise is
told of in `notes`.
"""

from __future__ import annotations

import copy
import functools
import importlib
import importlib.util
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

import mrvae_kernels as mk

from .curve import ACTIVE_VARIANCE, Measurement, Point, calibrated, check, measure_all, point_of, tokens_of
from .operating import FIXED_POINTS, OwnBeta, own_beta
from .response import RESAMPLES, Response, crossing, monotonicity, optimum, plateau, uncertainty
from .spacing import log_spaced

BY_EXAMPLE: dict[str, Callable[[Measurement], Tensor]] = {
    "rate": lambda measured: measured.rate,
    "distortion": lambda measured: measured.distortion,
    "elbo": lambda measured: -(measured.distortion + measured.rate),
}
"""Quantities that are means over examples: (N,) of what was measured, in nats."""

COUNTED = "active_units"

GRID = 13
"""Betas of the first look: four a decade for the default range."""

Metric = Callable[..., float]


@dataclass(frozen=True)
class Selection:
    """A chosen beta. Quantities in nats an example where they are rates, distortions or ELBOs."""

    quantity: str
    target: float | None  # None where the best was looked for
    best: str | None  # "min" or "max" then
    beta: float
    interval: tuple[float, float] | None  # of beta: 95 % over resampled examples; of a count, the betas that have it
    value: float  # of the quantity at beta
    standard_error: float | None  # of it over examples
    reach: tuple[float, float]  # lowest and highest value found over the range
    point: Point  # the whole point of the curve at beta, on the same examples
    notes: tuple[str, ...]  # what to know before trusting it


def select_beta(
    model: nn.Module,
    dataset: Any,
    quantity: str | Metric,
    target: float | None = None,
    best: str | None = None,
    *,
    beta_range: tuple[float, float] | None = None,
    grid: int = GRID,
    resamples: int | None = None,
    samples: int = 1,
    batch_size: int = 500,
    seed: int = 0,
    calibration: Tensor | None = None,
    train: Any = None,
) -> Selection:
    """The beta at which a MultiRate model has `quantity` equal to `target`, or at its best.

    quantity    "rate", "distortion", "elbo" (nats an example), "active_units" (a count), the name of a metric, or a
                function(model, dataset, beta) -> number; or "sigma-vae" or "l-vae", whose target is their own
    target      None looks for the best: `best` is "max" or "min"; an ELBO's best is its highest
    beta_range  where to look, log-uniformly at `grid` betas first (default: the range that the model was trained for)
    resamples   of the examples, behind the interval; default RESAMPLES, for a metric 0: each costs an evaluation of the
                metric, on half of the examples, at every beta looked at
    train       for a metric that is fitted on training examples (its argument `train`): these; without it such a
                metric is fitted on a part of `dataset`, or on all of it
    samples, batch_size, seed, calibration: as in curve.evaluate

    A count has one value over an interval of betas: that is the interval, and beta its geometric middle. Where q
    crosses the target more than once, the crossing with the highest ELBO is taken, and `notes` names the others.
    Intervals are of the examples' noise alone: another training run has another curve.
    ValueError for a plain model, for a target out of reach (the message has the interval within reach), for a count
    that no beta has, and for a quantity that is not finite.
    """
    if not isinstance(model, mk.MultiRate):
        raise ValueError("the model has no gates: it is one point of a curve, and there is no beta to choose")
    named = quantity if isinstance(quantity, str) else getattr(quantity, "__name__", "the metric")
    target, best = _wanted(named, target, best)
    low, high = beta_range or model.beta_range
    check(model, dataset.examples, [low, high], batch_size, samples)
    if not low < high or grid < 3:
        raise ValueError(f"beta_range is ({low:g}, {high:g}) and grid {grid}; expected low < high and at least 3")
    settings: dict[str, Any] = dict(batch_size=batch_size, samples=samples, seed=seed, calibration=calibration)
    method = own_beta(model, named) if named in FIXED_POINTS else None
    measured = functools.lru_cache(4)(lambda beta: measure_all(model, dataset, beta, **settings))
    of_metric = settings if train is None else {**settings, "train": train}
    evaluation = _evaluation(model, dataset, quantity, measured, of_metric, method)
    of_means = quantity in BY_EXAMPLE or method is not None
    response = Response(named if method is None else method.quantity, evaluation, len(dataset.examples), of_means)
    betas = log_spaced(low, high, grid)
    values = [response(beta) for beta in betas]
    if method is not None:
        method.check_reach(betas, values)
    notes = monotonicity(response, betas, seed)
    interval: tuple[float, float] | None
    error: float | None = None
    also: list[str] = []
    if all(isinstance(value, int) for value in values):
        count = target if target is not None else (min if best == "min" else max)(values)
        beta, interval, more = plateau(response, betas, count)
    else:
        if method is not None:
            beta, more = crossing(response, betas, 0.0, lambda b: -method.loss(measured(b)), "the lower loss")
        elif target is not None:
            beta, more = crossing(response, betas, target, lambda b: BY_EXAMPLE["elbo"](measured(b)).mean().item())
        else:
            beta, more = optimum(response, betas, best or "max")
        draws = (RESAMPLES if of_means else 0) if resamples is None else resamples
        interval, error, also = uncertainty(response, beta, target, best, draws, seed, (low, high))
    notes = [*notes, *more, *also]
    reach = (min(response.found.values()), max(response.found.values()))
    point = point_of(beta, measured(beta), tokens_of(dataset))
    return Selection(
        named, target, best, beta, interval, response(beta), error, reach, point, tuple(notes)
    )


def landed(
    model: nn.Module, dataset: Any, beta: float, named: str, notes: Sequence[str] = (), **settings: Any
) -> Selection:
    """A Selection of the beta of a run that was trained, with the point of the curve there; nothing is solved for.

    settings as in curve.evaluate. ValueError for a beta outside the range that the model was trained for.
    """
    if not isinstance(model, mk.MultiRate):
        raise ValueError("the model has no gates: it is one point of a curve, and there is no beta to choose")
    low, high = model.beta_range
    if not low <= beta <= high:
        raise ValueError(
            f"{named} has beta = {beta:.4g} on this curve, outside its range, {low:g} to {high:g}; train for a "
            "--beta-range that holds it"
        )
    point = point_of(beta, measure_all(model, dataset, beta, **settings), tokens_of(dataset))
    return Selection(named, None, None, beta, None, beta, None, (low, high), point, tuple(notes))


def _wanted(quantity: str, target: float | None, best: str | None) -> tuple[float | None, str | None]:
    """The target or the direction, of which there is one."""
    if target is None and best is None and quantity == "elbo":
        best = "max"
    if quantity in FIXED_POINTS:
        if target not in (None, 0.0) or best is not None:
            raise ValueError(f"{quantity} has a beta of its own: expected no target ({target}) and no best ({best!r})")
        target = 0.0
    if (target is None) == (best is None):
        raise ValueError(f"for {quantity} target is {target} and best {best!r}; expected one of the two")
    if best is not None and best not in ("min", "max"):
        raise ValueError(f"best is {best!r}; expected 'min' or 'max'")
    if target is not None and not math.isfinite(target):
        raise ValueError(f"the target of {quantity} is {target}; expected a finite number")
    return target, best


def metric_called(name: str) -> Metric:
    """The function of "file.py:function", or the metric of that name.

    ValueError when there is none; ModuleNotFoundError or FileNotFoundError where what the metric needs is not there.
    """
    file, colon, function = name.rpartition(":")
    if colon:
        path = Path(file).expanduser()
        specification = importlib.util.spec_from_file_location(path.stem, path) if path.exists() else None
        if specification is None or specification.loader is None:
            raise ValueError(f"{file!r} of metric {name!r} is no file of Python; expected file.py:function")
        module = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(module)
        if not callable(getattr(module, function, None)):
            raise ValueError(f"{file} has no function {function!r}; expected function(model, dataset, beta) -> number")
        return getattr(module, function)
    try:
        known: dict[str, Any] = importlib.import_module(".metrics", __package__).METRICS
    except ModuleNotFoundError as error:
        if error.name != f"{__package__}.metrics":
            raise
        known = {}
    if name not in known:
        raise ValueError(
            f"metric {name!r} is not known; expected one of {', '.join(sorted(known)) or '(none is installed)'}, or a "
            "function of your own as file.py:function"
        )
    known[name].check()
    return known[name]


def _evaluation(
    model: nn.Module,
    dataset: Any,
    quantity: str | Metric,
    measured: Callable[[float], Measurement],
    settings: Any,
    method: OwnBeta | None = None,
) -> Callable[[float, Tensor | None], float]:
    """(beta, rows or None) -> the quantity on those examples."""
    if method is not None:
        found = functools.cache(lambda beta: Measurement(*measured(beta)[:2], Tensor()))  # the means are not needed
        return lambda beta, rows: method.excess(beta, found(beta), rows)
    if quantity in BY_EXAMPLE:
        values = functools.cache(lambda beta: BY_EXAMPLE[str(quantity)](measured(beta)))
        return lambda beta, rows: (values(beta) if rows is None else values(beta)[rows]).mean().item()
    if quantity == COUNTED:
        return lambda beta, rows: _active(measured(beta).mean if rows is None else measured(beta).mean[rows])
    metric = metric_called(quantity) if isinstance(quantity, str) else quantity
    return lambda beta, rows: call_metric(
        metric, model, dataset if rows is None else _rows_of(dataset, rows), beta, **settings
    )


def call_metric(
    metric: Metric, model: nn.Module, dataset: Any, beta: float, calibration: Tensor | None = None, **settings: Any
) -> float:
    """metric(model, dataset, beta) with those of the settings that it takes: batch_size, samples, seed, train, and
    calibration.

    A metric that takes no calibration is called with the running statistics of this beta already set. A number of torch
    or numpy comes back as Python's, a count as an int; ValueError for what is no single number.
    """
    accepted = inspect.signature(metric).parameters
    further = {name: value for name, value in settings.items() if name in accepted}
    if "calibration" in accepted:
        value: Any = metric(model, dataset, beta, calibration=calibration, **further)
    else:
        with calibrated(model, calibration, beta):
            value = metric(model, dataset, beta, **further)
    if isinstance(value, (Tensor, np.generic, np.ndarray)) and value.ndim == 0:
        value = value.item()
    if not isinstance(value, (int, float)):
        found = f"{type(value).__name__} {value!r}" if isinstance(value, (str, type(None))) else type(value).__name__
        name = getattr(metric, "__name__", "the metric")
        raise ValueError(f"{name} gave {found} at beta = {beta:.4g}; expected a single number")
    return value


def _active(mean: Tensor) -> int:
    return int((mean.var(0, correction=0) > ACTIVE_VARIANCE).sum())


def _rows_of(dataset: Any, rows: Tensor) -> Any:
    """The data set with these examples, and their labels, lengths and factors where it has any."""
    part = copy.copy(dataset)
    for name in ("examples", "labels", "lengths", "factors"):
        of_each = getattr(dataset, name, None)
        if of_each is not None:
            setattr(part, name, of_each[rows.to(of_each.device)])
    return part

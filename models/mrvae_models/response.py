"""A quantity along beta and what is solved on it: crossings of a target, the best value, and how sure they are.

Searches run in log beta. Every beta sees the same examples and the same noise, and a resample the same draws of them,
so that the response is one function of beta, and each resample's another.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from scipy.optimize import brentq, minimize_scalar
from torch import Tensor

GROWS = {"rate": -1, "distortion": 1}
"""Where along the optimal curve a quantity only falls or only rises with beta."""

RESAMPLES = 200
"""Resamples of the examples behind an interval: its ends then have a standard error of some 10 % of its width."""

TOLERANCE = 1e-4
"""Of log beta, at which a root is accepted: 0.01 % of beta, far below what the examples leave open."""

COARSE_TOLERANCE = 1e-3
"""The same for a maximum and for the ends of a count's interval."""


class Response:
    """A quantity along beta. `evaluate(beta, rows)` gives it on the examples `rows`, on all of them for None.

    of_means: whether it is made of means over examples, which may count one twice; see `resampled`.
    """

    def __init__(
        self, name: str, evaluate: Callable[[float, Tensor | None], float], examples: int, of_means: bool = True
    ) -> None:
        self.name = name
        self.evaluate = evaluate
        self.examples = examples
        self.of_means = of_means
        self.found: dict[float, float] = {}

    def __call__(self, beta: float) -> float:
        if beta not in self.found:
            value = self.evaluate(beta, None)
            if not math.isfinite(value):
                raise ValueError(f"{self.name} at beta = {beta:.4g} is {value}; expected a finite number")
            self.found[beta] = value
        return self.found[beta]

    def resampled(self, betas: Sequence[float], resamples: int, seed: int) -> np.ndarray:
        """(resamples, betas): the quantity on other examples, the same draws at every beta.

        Of means, as many examples drawn with replacement. Any other quantity is of halves of the examples (of a mean
        over half of them, drawn without replacement, the variance is that over all), moved so that their mean is the
        value on all: of examples that are there twice mutual information is too small by up to 0.6 nats, a classifier
        is tested on what it was fitted to, and of fewer examples such quantities are others altogether.
        """
        generator = torch.Generator().manual_seed(seed)
        n = self.examples
        if self.of_means:
            draws = [torch.randint(n, (n,), generator=generator) for _ in range(resamples)]
            return np.array([[self.evaluate(beta, rows) for beta in betas] for rows in draws])
        halves = [torch.randperm(n, generator=generator)[: n // 2].sort().values for _ in range(resamples)]
        table = np.array([[self.evaluate(beta, rows) for beta in betas] for rows in halves])
        return table - table.mean(0) + [self(beta) for beta in betas]


def monotonicity(response: Response, betas: list[float], seed: int) -> list[str]:
    """A note where a quantity that should only fall, or only rise, does otherwise; noise is over resampled examples."""
    sign = GROWS.get(response.name)
    values = np.array([response(beta) for beta in betas])
    if sign is None or not (wrong := np.flatnonzero(sign * np.diff(values) < 0)).size:
        return []
    errors = np.diff(response.resampled(betas, RESAMPLES, seed), axis=1).std(axis=0, ddof=1)
    beyond = [i for i in wrong if abs(values[i + 1] - values[i]) > 2 * errors[i]]
    i = max(beyond or wrong, key=lambda i: abs(values[i + 1] - values[i]))
    verdict = "beyond noise (two standard errors)" if beyond else "within noise (two standard errors)"
    return [
        f"{response.name} should only {'fall' if sign < 0 else 'rise'} with beta, and goes from {values[i]:.4g} to "
        f"{values[i + 1]:.4g} between beta = {betas[i]:.4g} and {betas[i + 1]:.4g}, {verdict}"
    ]


def _check_reach(response: Response, betas: Sequence[float], target: float) -> None:
    values = [response(beta) for beta in betas]
    if not min(values) <= target <= max(values):
        raise ValueError(
            f"{response.name} = {target:g} is out of reach: over beta from {betas[0]:g} to {betas[-1]:g} it lies "
            f"between {min(values):.4g} and {max(values):.4g} on these examples; choose a target between them, or "
            "train for another --beta-range"
        )


def crossing(
    response: Response,
    betas: Sequence[float],
    target: float,
    better: Callable[[float], float],
    better_by: str = "the highest ELBO",
) -> tuple[float, list[str]]:
    """The beta where the response equals the target; of several, the one where `better` is highest, and a note.

    better_by: what that one has, for the note. ValueError for a target that is not met between the betas.
    """
    _check_reach(response, betas, target)

    def excess(log_beta: float) -> float:
        return response(_beta(log_beta)) - target

    found = [beta for beta in betas if response(beta) == target]
    for low, high in zip(betas[:-1], betas[1:], strict=True):
        if (response(low) - target) * (response(high) - target) < 0:
            found.append(_beta(brentq(excess, math.log(low), math.log(high), xtol=TOLERANCE)))
    if len(found) == 1:
        return found[0], []
    chosen = max(found, key=better)
    others = ", ".join(f"{beta:.4g}" for beta in sorted(found) if beta != chosen)
    return chosen, [f"{response.name} = {target:g} is met at beta = {others} too; this one has {better_by}"]


def optimum(response: Response, betas: list[float], best: str) -> tuple[float, list[str]]:
    """The beta of the lowest or highest response: the best of the grid, and a search between its neighbours."""
    sign = 1 if best == "min" else -1
    top = min(range(len(betas)), key=lambda i: sign * response(betas[i]))
    bounds = [math.log(betas[max(0, top - 1)]), math.log(betas[min(len(betas) - 1, top + 1)])]
    minimize_scalar(
        lambda log_beta: sign * response(_beta(log_beta)),
        bounds=bounds,
        method="bounded",
        options={"xatol": COARSE_TOLERANCE},
    )
    beta = min(response.found, key=lambda beta: sign * response(beta))
    at_end = [f"the best {response.name} lies at the end of the range, beta = {beta:.4g}"]
    return beta, at_end if beta in (betas[0], betas[-1]) else []


def plateau(
    response: Response, betas: list[float], target: float
) -> tuple[float, tuple[float, float], list[str]]:
    """The betas at which a count is the target: (their geometric middle, first and last, notes)."""
    _check_reach(response, betas, target)
    known = list(betas)
    if not any(response(beta) == target for beta in known):
        known = sorted({*known, *_between(response, betas, target)})
    runs: list[list[int]] = []
    for i, beta in enumerate(known):
        if response(beta) == target:
            if runs and runs[-1][-1] == i - 1:
                runs[-1].append(i)
            else:
                runs.append([i])
    widest = max(runs, key=lambda run: known[run[-1]] / known[run[0]])
    notes = []
    if len(runs) > 1:
        spans = " and ".join(f"{known[run[0]]:.4g} to {known[run[-1]]:.4g}" for run in runs)
        notes.append(f"{response.name} = {target:g} at betas apart from each other, {spans}: the widest is taken")
    first, last = widest[0], widest[-1]
    low = _edge(response, target, known[first], known[first - 1]) if first > 0 else known[first]
    high = _edge(response, target, known[last], known[last + 1]) if last + 1 < len(known) else known[last]
    middle = math.sqrt(low * high)
    if response(middle) != target:  # a count that comes and goes: the nearest beta that is known to have it
        middle = min(known[first : last + 1], key=lambda beta: abs(math.log(beta / middle)))
    return middle, (low, high), notes


def _edge(response: Response, target: float, inside: float, outside: float) -> float:
    """The last beta that has the count, by bisection in log beta between one that has and one that has not."""
    while abs(math.log(outside / inside)) > COARSE_TOLERANCE:
        middle = math.sqrt(inside * outside)
        inside, outside = (middle, outside) if response(middle) == target else (inside, middle)
    return inside


def _between(response: Response, betas: list[float], target: float) -> list[float]:
    """A beta that has the count, where neighbours of the grid step over it; ValueError where there is none."""
    steps = [
        (low, high)
        for low, high in zip(betas[:-1], betas[1:], strict=True)
        if (response(low) - target) * (response(high) - target) < 0
    ]
    for low, high in steps:
        while math.log(high / low) > COARSE_TOLERANCE:
            middle = math.sqrt(low * high)
            if response(middle) == target:
                return [middle]
            low, high = (middle, high) if (response(low) - target) * (response(middle) - target) > 0 else (low, middle)
    raise ValueError(
        f"no beta from {betas[0]:g} to {betas[-1]:g} has {response.name} = {target:g}: it goes from {response(low):g} "
        f"to {response(high):g} at beta = {low:.4g}; choose one of those"
    )


def uncertainty(
    response: Response,
    beta: float,
    target: float | None,
    best: str | None,
    resamples: int,
    seed: int,
    bounds: tuple[float, float],
) -> tuple[tuple[float, float] | None, float | None, list[str]]:
    """(95 % interval of beta, standard error of the quantity at beta, notes), by resampling the examples.

    On each resample the response is linear in log beta between the betas evaluated, and the target is solved for again;
    the best is the top of the parabola through the best and its neighbours. The examples are the same at all betas.
    """
    if resamples < 2:
        return None, None, [f"no interval: give --resamples, each an evaluation of {response.name} at every beta"]
    error = float(response.resampled([beta], resamples, seed).std(ddof=1))
    if target is not None and error > 0:
        for other in _around(response, beta, error, bounds):
            response(other)
    betas = sorted(response.found)
    logs = np.log(betas)
    table = response.resampled(betas, resamples, seed)
    if target is not None:
        found = [_nearest_crossing(logs, row - target, math.log(beta)) for row in table]
    else:
        found = [_top(logs, row if best == "max" else -row) for row in table]
    outside = sum(math.isinf(value) for value in found)
    solved = np.clip(found, logs[0], logs[-1])
    low, high = (_beta(value) for value in np.quantile(solved, (0.025, 0.975)))
    notes = []
    if outside:
        share = 100 * outside / resamples
        notes.append(
            f"on {share:.0f} % of the resampled sets of examples the target is out of reach within the range: the "
            "interval ends there"
        )
    return (low, high), error, notes


def _around(response: Response, beta: float, error: float, bounds: tuple[float, float]) -> list[float]:
    """Betas some two standard errors to either side, by the slope there, so that the resamples are solved near them."""
    known = sorted(response.found)
    i = known.index(beta)
    below, above = known[max(0, i - 1)], known[min(len(known) - 1, i + 1)]
    slope = abs(response(above) - response(below)) / math.log(above / below)
    if slope == 0:
        return []
    step = 2 * error / slope
    return [min(max(_beta(math.log(beta) + side * step), bounds[0]), bounds[1]) for side in (-1, 1)]


def _nearest_crossing(logs: np.ndarray, excess: np.ndarray, near: float) -> float:
    """Where the piecewise linear excess is zero, nearest to `near`; -inf or inf, by the nearer end, where nowhere."""
    i = np.flatnonzero(excess[:-1] * excess[1:] <= 0)
    if not i.size:
        return -math.inf if abs(excess[0]) < abs(excess[-1]) else math.inf
    steps = excess[i + 1] - excess[i]
    parts = np.divide(-excess[i], steps, out=np.zeros(len(i)), where=steps != 0)
    roots = logs[i] + parts * (logs[i + 1] - logs[i])
    return float(roots[np.abs(roots - near).argmin()])


def _top(logs: np.ndarray, values: np.ndarray) -> float:
    """Where the parabola through the highest value and its neighbours is highest; an end where that is the highest."""
    i = int(values.argmax())
    if i in (0, len(values) - 1):
        return float(logs[i])
    (x0, x1, x2), (y0, y1, y2) = logs[i - 1 : i + 2], values[i - 1 : i + 2]
    left, right = (y1 - y0) / (x1 - x0), (y2 - y1) / (x2 - x1)
    if left == right:
        return float(x1)
    # the slope is `left` at the middle of the first step and `right` at the middle of the second
    a, b = (x0 + x1) / 2, (x1 + x2) / 2
    return float(np.clip(a + left / (left - right) * (b - a), x0, x2))


def _beta(log_beta: float) -> float:
    return float(math.exp(log_beta))

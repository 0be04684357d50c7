"""The area under a rate-distortion curve, to compare whole curves by one number, in nats^2."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

BOOTSTRAP = 200
"""Resamples behind a standard error, whose own relative error is then about 5 %."""


class Area(NamedTuple):
    """An area and its standard error by resampling the examples, nats^2."""

    value: float
    error: float


def common_interval(*rates: Sequence[float]) -> tuple[float, float]:
    """The rates that all curves reach: from the largest of their lowest to the smallest of their highest.

    ValueError where they have none in common.
    """
    if not rates or any(len(curve) == 0 for curve in rates):
        raise ValueError("no rates given; expected those of at least one curve")
    low, high = max(min(curve) for curve in rates), min(max(curve) for curve in rates)
    if not low < high:
        raise ValueError(
            f"the curves have no interval of rates in common: the largest of their lowest rates is {low:g} nats, the "
            f"smallest of their highest {high:g}; expected curves that overlap: evaluate them at more betas"
        )
    return low, high


def lower_hull(rates: Any, distortions: Any) -> tuple[Any, Any]:
    """The points of the lower convex hull, by rate: what mixing the models of several betas reaches."""
    hull: list[tuple[float, float]] = []
    for point in sorted(zip(rates, distortions, strict=True)):
        while len(hull) > 1 and _turn(hull[-2], hull[-1], point) <= 0:
            hull.pop()
        hull.append(point)
    return np.array([point[0] for point in hull]), np.array([point[1] for point in hull])


def _turn(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> float:
    return (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])


def area_under_curve(
    rates: Sequence[float],
    distortions: Sequence[float],
    interval: tuple[float, float] | None = None,
    hull: bool = False,
) -> float:
    """The integral of distortion over rate, by the trapezoidal rule between the points; nats^2, lower is better.

    rates, distortions: one a beta, nats, in any order. interval: of rates, within those of the curve; without one the
    whole curve. Curves compare over one interval only: common_interval(). hull: of the lower convex hull of the points.
    Of points with one rate the lowest distortion counts.
    ValueError for fewer than two rates, lengths that differ, what is not finite, and an interval that is not reached.
    """
    x, y = np.asarray(rates, dtype=np.float64), np.asarray(distortions, dtype=np.float64)
    if x.shape != y.shape or x.ndim != 1:
        raise ValueError(f"{x.shape} rates and {y.shape} distortions; expected one of each at every beta")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("rates or distortions are not finite; expected numbers in nats")
    order = np.lexsort((y, x))
    x, first = np.unique(x[order], return_index=True)
    y = y[order][first]
    if len(x) < 2:
        raise ValueError(f"{len(x)} different rates; expected at least two points to have a curve between")
    if hull:
        x, y = lower_hull(x, y)
    low, high = (x[0], x[-1]) if interval is None else interval
    if not x[0] <= low < high <= x[-1]:
        raise ValueError(
            f"interval is ({low:g}, {high:g}); expected low < high within the curve's rates, {x[0]:g} to {x[-1]:g}: "
            "common_interval() of the curves to compare"
        )
    inner = x[(x > low) & (x < high)]
    at = np.concatenate([[low], inner, [high]])
    heights = np.interp(at, x, y)
    return float((np.diff(at) * (heights[1:] + heights[:-1]) / 2).sum())


def area_with_error(
    rates: Tensor,
    distortions: Tensor,
    interval: tuple[float, float] | None = None,
    hull: bool = False,
    seed: int = 0,
) -> Area:
    """The area under the curve of means, and its standard error by resampling the examples, the same at all betas.

    rates, distortions: (betas, N), of each example, nats. A resample whose curve ends within the interval is read up to
    its own ends there, its area scaled to the interval's length. ValueError as area_under_curve() says.
    """
    if rates.shape != distortions.shape or rates.dim() != 2 or rates.shape[1] < 2:
        raise ValueError(
            f"rates have shape {tuple(rates.shape)} and distortions {tuple(distortions.shape)}; expected the same "
            "(betas, N), two examples at least"
        )
    rates, distortions = rates.double().cpu(), distortions.double().cpu()
    value = area_under_curve(rates.mean(1).tolist(), distortions.mean(1).tolist(), interval, hull)
    means = rates.mean(1)
    low, high = interval or (means.min().item(), means.max().item())
    generator = torch.Generator().manual_seed(seed)
    n = rates.shape[1]
    areas = []
    for _ in range(BOOTSTRAP):
        rows = torch.randint(n, (n,), generator=generator)
        x, y = rates[:, rows].mean(1).tolist(), distortions[:, rows].mean(1).tolist()
        start, end = max(low, min(x)), min(high, max(x))
        if start < end:
            areas.append(area_under_curve(x, y, (start, end), hull) * (high - low) / (end - start))
    return Area(value, float(np.std(areas, ddof=1)) if len(areas) > 1 else math.nan)

"""The statistics of the regression check: how far a median ratio moved between two runs, and how sure that is."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

DRAWS = 1000
RUN_TO_RUN = 0.005
"""Standard deviation of a median log ratio between two runs of the same code, over what their rounds show: where memory
lies differs by process. At least so much is assumed."""
CONTROLS = 4
"""Fewest of the others' variants from which it is estimated."""


class Difference(NamedTuple):
    """d, the variance that resampling the rounds gives it, Student's degrees of freedom, and the entries behind it."""

    value: float
    variance: float
    freedom: int
    entries: int = 1


def difference(before: np.ndarray, after: np.ndarray) -> Difference:
    """The median of `after` less that of `before`, the log ratios of a variant's rounds."""
    generator = np.random.default_rng(0)
    variance = sum(
        float(np.median(generator.choice(values, (DRAWS, len(values))), axis=1).var()) for values in (before, after)
    )
    return Difference(float(np.median(after) - np.median(before)), variance, min(len(before), len(after)) - 1)


def mean(parts: Sequence[Difference]) -> Difference:
    """Of several entries."""
    variance = sum(part.variance for part in parts) / len(parts) ** 2
    freedom = sum(part.freedom for part in parts)
    return Difference(statistics.fmean(part.value for part in parts), variance, freedom, len(parts))


def run_to_run(controls: Sequence[Difference]) -> float:
    """Variance that a difference has because there were two runs, whatever their rounds say.

    Controls are variants that this package's code has no part in: their ratios should not have moved. What they moved
    (1.4826 times the median, which a few that did change do not matter to), over what their rounds explain, is noise
    that ours have too: as when another program had the cores in one of the runs.
    """
    least = 2 * RUN_TO_RUN**2
    if len(controls) < CONTROLS:
        return least
    moved = (1.4826 * statistics.median(abs(control.value) for control in controls)) ** 2
    return max(least, moved - statistics.median(control.variance for control in controls))


def reach(found: Difference, between: float, probability: float) -> float:
    """Half the length of d's interval: that much above d, it lies with this probability. `between`: of run_to_run."""
    return student((1 + probability) / 2, found.freedom) * math.sqrt(
        found.variance + between / found.entries
    )


def student(probability: float, freedom: int) -> float:
    """Student's quantile, from the normal one (Abramowitz and Stegun, 26.7.5); within 10 % from 4 degrees on."""
    z, n = statistics.NormalDist().inv_cdf(probability), freedom
    return (
        z + (z**3 + z) / (4 * n) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3)
    )

"""Micro-benchmarks: one layer by every variant of layer_variants.py, beside the plain layer: `pytest bench/`.

A group holds what is comparable: one layer of the bundled networks in the same numbers, forward, or forward and
backward. A variant whose numbers are wrong fails instead of getting a time; one that cannot run is skipped with the
reason. A timed step ends when the device has done it. `python -m bench.layers` interleaves the variants, and is what
ratios are taken from.
"""

from __future__ import annotations

from typing import Any

import pytest

from .gpu_timing import synchronize
from .layer_checks import CheckedCase
from .layers import Job


def step_of(checked: CheckedCase, variant: str, backward: bool) -> Any:
    """The variant's step, done when it returns. Fails for wrong numbers, skips for what cannot run."""
    if fault := checked.fault(variant):
        pytest.fail(f"{variant}: {fault}", pytrace=False)
    if variant in checked.refused:
        pytest.skip(checked.refused[variant])
    run = checked.gated.steps(variant, backward)

    def step() -> None:
        run()
        synchronize(checked.device)

    return step


@pytest.mark.benchmark(min_rounds=5, max_time=0.05, warmup=False)
def test_layer(benchmark: Any, checked: CheckedCase, job: Job, direction: str, variant: str) -> None:
    step = step_of(checked, variant, direction == "both")
    benchmark.group = f"{job.case.name}, batch {checked.batch}, {job.dtype}, {direction}"
    benchmark.name = variant  # the group says the rest
    benchmark.extra_info.update(layer=job.case.name, batch=checked.batch, dtype=job.dtype, variant=variant)
    benchmark(step)

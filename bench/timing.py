"""Interleaved timing in one process: the machine's drift hits every variant alike; ratios are taken round by round."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

Step = Callable[[], object]

SECOND_STEP = "second step"


class Ratio(NamedTuple):
    """A variant's time over the baseline's: the median of the rounds' ratios and its 95 % bootstrap interval."""

    median: float
    low: float
    high: float


def keep_memory() -> None:
    """Tell glibc to keep freed memory: handing it back and faulting it in again costs either variant hundreds of
    microseconds a step, at random (the backward pass of the MLP at batch 16: 0.4 or 0.75 ms). Other C libraries do
    nothing here."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        for parameter, value in ((-1, 2**31 - 1), (-3, 2**30), (-2, 2**26)):  # M_TRIM_, M_MMAP_THRESHOLD, M_TOP_PAD
            libc.mallopt(parameter, value)


def interleave(
    variants: dict[str, Step], rounds: int, seconds: float = 0.02, warmup: int = 3
) -> dict[str, list[float]]:
    """Seconds a step of every variant in every round.

    A round runs all variants, in an order drawn anew, each for as many steps as `seconds` takes (one at least).
    """
    repeats = {}
    for name, step in variants.items():
        for _ in range(warmup):
            step()
        start = time.perf_counter()
        step()
        repeats[name] = max(1, round(seconds / (time.perf_counter() - start)))
    times: dict[str, list[float]] = {name: [] for name in variants}
    order = list(variants)
    shuffle = random.Random(0).shuffle
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            shuffle(order)
            for name in order:
                step, count = variants[name], repeats[name]
                start = time.perf_counter()
                for _ in range(count):
                    step()
                times[name].append((time.perf_counter() - start) / count)
    finally:
        gc.enable()
    return times


def ratio(times: dict[str, list[float]], variant: str, baseline: str) -> Ratio:
    """The variant's time over the baseline's."""
    ratios = [a / b for a, b in zip(times[variant], times[baseline], strict=True)]
    draw = random.Random(0).choices
    medians = sorted(statistics.median(draw(ratios, k=len(ratios))) for _ in range(1000))
    return Ratio(statistics.median(ratios), medians[25], medians[974])


def peak_memory(step: Step) -> int:
    """Bytes of gradients, activations and temporaries at a step's peak, as torch's CPU allocator reports.

    The second of two steps is measured: the profiler does not see the end of what was there before it, the gradients.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
        with torch.profiler.record_function(SECOND_STEP):
            step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    begin = next(event["ts"] for event in events if event.get("name") == SECOND_STEP)
    held = peak = 0
    for event in sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held) if event["ts"] >= begin else 0
    return peak

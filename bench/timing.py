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
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .gpu_timing import synchronize

Step = Callable[[], object]

CPU = torch.device("cpu")
SECOND_STEP = "second step"
LEAST_ROUNDS = 5
"""So many are measured whatever they take: the interval of fewer is the range of what was seen."""


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
    variants: Mapping[str, Step], rounds: int, seconds: float = 0.02, warmup: int = 3, limit: float | None = None,
    device: torch.device = CPU,
) -> dict[str, list[float]]:
    """Seconds a step of every variant in every round; a GPU's work is waited for.

    A round runs all variants, in an order drawn anew, each for as many steps as `seconds` takes (one at least).
    limit: no round begins later than so many seconds after the first, LEAST_ROUNDS excepted.
    """

    def run(step: Step, count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            step()
        synchronize(device)
        return (time.perf_counter() - start) / count

    repeats = {}
    for name, step in variants.items():
        run(step, max(warmup, 1))
        repeats[name] = max(1, round(seconds / run(step, 1)))
    times: dict[str, list[float]] = {name: [] for name in variants}
    order = list(variants)
    shuffle = random.Random(0).shuffle
    gc.collect()
    gc.disable()
    begin = time.perf_counter()
    try:
        for done in range(rounds):
            if limit is not None and done >= LEAST_ROUNDS and time.perf_counter() - begin > limit:
                break
            shuffle(order)
            for name in order:
                times[name].append(run(variants[name], repeats[name]))
    finally:
        gc.enable()
    return times


def ratio(times: Mapping[str, list[float]], variant: str, baseline: str) -> Ratio:
    """The variant's time over the baseline's."""
    ratios = [a / b for a, b in zip(times[variant], times[baseline], strict=True)]
    draw = random.Random(0).choices
    medians = sorted(statistics.median(draw(ratios, k=len(ratios))) for _ in range(1000))
    return Ratio(statistics.median(ratios), medians[25], medians[974])


def _trace(steps: Step, device: torch.device, memory: bool = False) -> list[dict[str, Any]]:
    """The profiler's events of a call, in the order of their begin."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities, profile_memory=memory) as profile:
        steps()
        synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    return sorted((event for event in events if "ts" in event), key=lambda event: event["ts"])


def launched(step: Step, device: torch.device = CPU) -> list[str]:
    """Names of the kernels that a call launches on a GPU, copies and fills left out; of the operators on a CPU."""
    wanted = "kernel" if device.type == "cuda" else "cpu_op"
    return [event["name"] for event in _trace(step, device) if event.get("cat") == wanted]


def peak_memory(step: Step, device: torch.device = CPU) -> int:
    """Bytes of gradients, activations and temporaries at a step's peak, as torch's allocator reports.

    The second of two steps is measured, which begins with the first one's gradients. What was there before them does
    not count: on a CPU the profiler tells its end only where an earlier profile saw its beginning. On a GPU drop
    gradients before.
    """
    if device.type == "cuda":
        synchronize(device)
        held = torch.cuda.memory_allocated(device)
        step()
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - held

    def twice() -> None:
        step()
        with torch.profiler.record_function(SECOND_STEP):
            step()

    events = _trace(twice, device, memory=True)
    begin = next(event["ts"] for event in events if event.get("name") == SECOND_STEP)
    held = peak = 0
    blocks: set[int] = set()
    for event in events:
        if event.get("name") != "[memory]":
            continue
        address, size = event["args"]["Addr"], event["args"]["Bytes"]
        if size > 0:
            blocks.add(address)
        elif address in blocks:
            blocks.remove(address)
        else:
            continue
        held += size
        peak = max(peak, held) if event["ts"] >= begin else 0
    return peak

"""Triton's kernels compiled in parallel: processes that run every case once, sharing the folder of Triton's cache."""

from __future__ import annotations

import concurrent.futures
import concurrent.futures.process
import multiprocessing
import time
from collections.abc import Sequence

import torch

import mrvae_kernels as mk

from .gpu_correctness import NUMBERS
from .gpu_timing import float32_precision
from .layer_variants import GatedCase, ours
from .shapes import Case

Task = tuple[Case, int, str]
"""A case, its batch and its precision."""


def prepare(tasks: Sequence[Task], device: torch.device, seconds: float, processes: int = 8) -> int:
    """Run each task's strategies on Triton once, in spawned processes, until the time is up; the tasks that were run.

    Triton writes what it compiled to TRITON_CACHE_DIR, where the processes after this one find it. Errors are left to
    the run that reports them.
    """
    if seconds <= 0:
        return 0
    deadline, done = time.monotonic() + seconds, 0
    pool = concurrent.futures.ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"))
    try:
        futures = [pool.submit(run_once, *task, str(device)) for task in tasks]
        for future in concurrent.futures.as_completed(futures, max(0.0, deadline - time.monotonic())):
            done += future.exception() is None
    except (concurrent.futures.TimeoutError, concurrent.futures.process.BrokenProcessPool):
        pass
    finally:
        pool.shutdown(wait=True, cancel_futures=True)  # what still runs would disturb the timings
    return done


def run_once(case: Case, batch: int, precision: str, device: str) -> None:
    """Forward without gradients, and forward with backward, by each strategy that takes the layer on Triton."""
    with float32_precision(precision), mk.override():
        where = torch.device(device)
        gated = GatedCase(case, batch, NUMBERS[precision], where)
        for name in ours(where, ("triton",)):
            try:
                gated.steps(name, False)()
                gated.steps(name, True)()
            except ValueError:
                continue  # a strategy that refuses this layer

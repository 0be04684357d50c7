"""One gated layer's times by every variant whose numbers are right, and what they are held against."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import Any

import torch

import mrvae_kernels as mk

from .gpu_correctness import NUMBERS
from .gpu_timing import Step, cache_bytes, device_times, failure, float32_precision, host_times, recorded
from .layer_checks import Comparison
from .layer_variants import OURS, GatedCase
from .shapes import Case

MOST_COPIES = 8
"""Inputs that the calls of one recording cycle through at most."""


def time_case(
    case: Case, batch: int, precision: str, device: torch.device, tops: dict[str, float], rounds: int, compiled: bool,
    known: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """GPU and host milliseconds of every variant, forward and forward + backward; why a variant is not among them.

    wrong: those whose y or gradients at this batch are not float64's, besides `known`, which are wrong at another.
    """
    dtype = NUMBERS[precision]
    item = torch.empty((), dtype=dtype).element_size()
    x_bytes, beyond = item * batch * math.prod(case.shape), 2 * cache_bytes(device)
    copies = max(1, min(MOST_COPIES, beyond // max(1, x_bytes) + 1))
    result: dict[str, Any] = {
        "case": case.name, "network": case.network, "batch": batch, "precision": precision, "copies": copies,
        "cached": copies * x_bytes <= beyond, "refused": {}, "failed": {},
        "wrong": dict(known or {}),
    }

    def note(name: str, error: Exception) -> None:
        refused = isinstance(error, ValueError) and name in OURS
        result["refused" if refused else "failed"][name] = str(error) if refused else failure(error, device)

    def out(name: str) -> bool:
        """Whether the variant gets no time."""
        return any(name in result[why] for why in ("refused", "failed", "wrong"))

    with float32_precision(precision), mk.override():
        gated = GatedCase(case, batch, dtype, device, copies)
        names = [name for name in gated.names if compiled or not name.endswith(" compiled")]
        comparison = Comparison(gated, precision)
        for name in names:
            try:
                if not out(name) and (fault := comparison.fault(name)):
                    result["wrong"][name] = fault
            except Exception as error:
                note(name, error)
        del comparison  # float64's tensors, the largest here
        for kind in ("forward", "both"):
            backward = kind == "both"
            steps: dict[str, Step] = {}
            runs: dict[str, Step] = {}
            for name in names:
                if out(name):
                    continue
                try:
                    step = gated.steps(name, backward)
                    step()
                    steps[name], runs[name] = step, recorded(step, copies, device)
                except Exception as error:
                    steps.pop(name, None)
                    note(name, error)
            gpu = device_times(runs, device, copies, rounds)
            host = host_times(steps, device, max(1, rounds // 3), 10 if device.type == "cuda" else 1)
            floor = 1e3 * max(
                case.least_bytes(batch, item, backward) / tops["bytes"],
                case.operations(batch) * (3 if backward else 1) / tops[precision],
            )
            compared = list(gpu) if "library" in gpu else []
            result[kind] = {
                "gpu_ms": gpu, "host_ms": host, "floor_ms": floor,
                "ratio": {name: _ratio(gpu[name], gpu["library"]) for name in compared},
                "host_ratio": {name: _ratio(host[name], host["library"]) for name in compared},
                "roofline": {name: floor / statistics.median(times) for name, times in gpu.items()},
            }
    return result


def _ratio(times: list[float], baseline: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(times, baseline, strict=True))

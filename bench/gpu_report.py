"""What the GPU benchmark makes of its timings: tables for people, and the record that `measurements` keeps."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from mrvae_kernels import measurements
from mrvae_kernels.adapters import ADAPTERS
from mrvae_kernels.strategy import STRATEGIES

from .layer_variants import BACKENDS, OURS, VARIANTS
from .shapes import CASES, Case

NEAR = 0.1
"""How much longer than the library's a fused product may take where it is chosen."""


def table(results: list[dict[str, Any]], kind: str = "both") -> str:
    """Markdown: GPU time over the library's, one row a layer, losing shapes included; then geometric means.

    A mean covers the layers that every variant of its row ran, so that its columns compare; compiled variants, which
    few layers have, get a row of their own. Layers whose inputs fit into the cache bear a star. A variant that no layer
    ran has no column.
    """
    ran = set().union(*(result[kind]["ratio"] for result in results))
    columns = [name for name in VARIANTS if name != "library" and name in ran]
    lines = ["| network | layer | batch | precision | " + " | ".join(columns) + " | best of ours, host | roofline |"]
    lines.append("|---" * (len(columns) + 6) + "|")
    for result in results:
        part = result[kind]
        ratios = part["ratio"]
        ours = [name for name in OURS if name in ratios]
        last = "| |"
        if ours:
            best = min(ours, key=ratios.__getitem__)
            last = f"| {part['host_ratio'][best]:.2f} | {part['roofline'][best]:.2f} |"
        cells = [f"{ratios[name]:.3f}" if name in ratios else "" for name in columns]
        name = result["case"] + (" *" if result["cached"] else "")
        row = (result["network"], name, result["batch"], result["precision"], *cells)
        lines.append(f"| {' | '.join(map(str, row))} {last}")
    everywhere = [name for name in columns if not name.endswith(" compiled")]
    for chosen in (everywhere, columns) if everywhere != columns else (columns,):
        common = [result[kind]["ratio"] for result in results if set(chosen) <= set(result[kind]["ratio"])]
        means = {name: f"{statistics.geometric_mean(r[name] for r in common):.3f}" for name in chosen if common}
        cells = [means.get(name, "") for name in columns]
        label = f"geometric mean of the {len(common)} that ran {'all but compiled' if chosen is everywhere else 'all'}"
        lines.append(f"| all | {label} | | | {' | '.join(cells)} | | |")
    return "\n".join(lines)


def side_by_side(results: list[dict[str, Any]]) -> str:
    """Markdown: the compiled core's time over Triton's, geometric means over the layers that both ran.

    The host's time is of a call in the eager mode, Python, autograd and launches; one row a kind and strategy.
    """
    lines = ["| kind | strategy | layers | GPU time, cpp over triton | host time, cpp over triton |", "|---" * 5 + "|"]
    for kind in ("forward", "both"):
        pairs: dict[str, list[tuple[float, float]]] = {}
        for result in results:
            part = result[kind]
            for strategy in STRATEGIES:
                cpp, triton = (f"{strategy} {backend}" for backend in BACKENDS)
                if cpp in part["ratio"] and triton in part["ratio"]:
                    gpu, host = (_over(part[times][cpp], part[times][triton]) for times in ("gpu_ms", "host_ms"))
                    pairs.setdefault(strategy, []).append((gpu, host))
        if pairs:
            pairs["all"] = [pair for found in pairs.values() for pair in found]
        for strategy, found in pairs.items():
            gpu, host = (statistics.geometric_mean(values) for values in zip(*found, strict=True))
            lines.append(f"| {kind} | {strategy} | {len(found)} | {gpu:.3f} | {host:.3f} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def _over(times: Sequence[float], others: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(times, others, strict=True))


def fused_where_chosen(results: list[dict[str, Any]]) -> list[str]:
    """A line for each backend: how its fused kernels compare with the library's layer where they are the fastest of
    ours, forward + backward, and would be chosen."""
    lines = []
    for backend in BACKENDS:
        name = f"fused {backend}"
        chosen = []
        for result in results:
            part = result["both"]
            times = {other: step_time(part, other) for other in OURS if other in part["ratio"]}
            if name in times and times[name] == min(times.values()):
                label = f"{result['case']} batch {result['batch']} {result['precision']}"
                chosen.append((part["ratio"][name], label))
        ran = sum(name in result["both"]["ratio"] for result in results)
        if not ran:
            continue
        line = f"{name}: the fastest of ours in {len(chosen)} of {ran}"
        if chosen:
            near = sum(ratio <= 1 + NEAR for ratio, _ in chosen)
            slowest, where = max(chosen)
            line += f", {near} of these within {NEAR:.0%} of the library's GPU time; the slowest {slowest:.3f}, {where}"
        lines.append(line)
    return lines


def step_time(part: Mapping[str, Any], name: str) -> float:
    """Of an eager step: the larger of what the GPU and what the host needs for it."""
    return max(statistics.median(part["gpu_ms"][name]), statistics.median(part["host_ms"][name]))


def record(
    results: list[dict[str, Any]], backends: dict[str, measurements.Times], cases: Sequence[Case] = CASES
) -> measurements.Record:
    """What `measurements` keeps: times over the library's by shape class, forward + backward, and the backends.

    A strategy's time is that of its faster backend, an eager step's (`step_time`).
    """
    strategies: dict[str, measurements.Times] = {}
    classes: dict[str, list[measurements.Times]] = {}
    for result in results:
        case = next(case for case in cases if case.name == result["case"] and case.network == result["network"])
        part = result["both"]
        times: dict[str, float] = {}
        for name in part["ratio"]:
            strategy = name.partition(" ")[0] if name in OURS else name
            times[strategy] = min(step_time(part, name), times.get(strategy, math.inf))
        key = shape_class(case, result["batch"], result["precision"])
        classes.setdefault(key, []).append({n: times[n] / times["library"] for n in STRATEGIES if n in times})
    for key, found in classes.items():
        common = set.intersection(*(set(times) for times in found))
        if common:
            strategies[key] = {n: statistics.geometric_mean(times[n] for times in found) for n in sorted(common)}
    return {"backends": backends, "strategies": strategies}


def shape_class(case: Case, batch: int, precision: str) -> str:
    """The case's class in `measurements`, for one beta a batch."""
    x = torch.empty((batch, *case.shape), device="meta")
    product = ADAPTERS[case.kind].measured_product(case.layer(), x, torch.device("cpu"))
    assert product is not None
    numbers = "float32" if precision == "ieee" else precision
    return measurements.shape_class(
        product.operation, numbers, False, product.rows, product.columns, product.terms
    )

"""What the GPU benchmark makes of its timings: tables for people, and the record that `measurements` keeps."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import torch

from mrvae_kernels import measurements
from mrvae_kernels.adapters import ADAPTERS

from .layer_variants import OURS, VARIANTS
from .shapes import CASES, Case


def table(results: list[dict[str, Any]], kind: str = "both") -> str:
    """Markdown: GPU time over the library's, one row a layer, losing shapes included; then geometric means.

    A mean covers the layers that every variant of its row ran, so that its columns compare; compiled variants, which
    few layers have, get a row of their own. Layers whose inputs fit into the cache bear a star.
    """
    columns = [name for name in VARIANTS if name != "library"]
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
    for chosen in (everywhere, columns):
        common = [result[kind]["ratio"] for result in results if set(chosen) <= set(result[kind]["ratio"])]
        means = {name: f"{statistics.geometric_mean(r[name] for r in common):.3f}" for name in chosen if common}
        cells = [means.get(name, "") for name in columns]
        label = f"geometric mean of the {len(common)} that ran {'all' if chosen is columns else 'all but compiled'}"
        lines.append(f"| all | {label} | | | {' | '.join(cells)} | | |")
    return "\n".join(lines)


def record(
    results: list[dict[str, Any]], backends: dict[str, measurements.Times], cases: Sequence[Case] = CASES
) -> measurements.Record:
    """What `measurements` keeps: times over the library's by shape class, forward + backward, and the backends.

    The time of an eager step is the larger of what the GPU and what the host needs for it.
    """
    strategies: dict[str, measurements.Times] = {}
    classes: dict[str, list[measurements.Times]] = {}
    for result in results:
        case = next(case for case in cases if case.name == result["case"] and case.network == result["network"])
        part = result["both"]
        times = {
            name: max(statistics.median(part["gpu_ms"][name]), statistics.median(part["host_ms"][name]))
            for name in part["ratio"]
        }
        key = shape_class(case, result["batch"], result["precision"])
        classes.setdefault(key, []).append({n: times[n] / times["library"] for n in OURS if n in times})
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

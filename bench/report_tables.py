"""Tables and lists that the report makes of overhead and layer results: ratios, means, losing cases, memory, inference.

Every ratio is a step's time over that of the ungated network in the same mode and numbers (or over the library's
layer): a median with its 95 % interval. A case lost where the median is above 1.05, the bound that the MR-VAE paper
names.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .overhead_networks import ONE_A_SAMPLE

Entry = Mapping[str, Any]
Results = Sequence[Entry]
Column = tuple[str, str, str]
"""A column's heading, mode and variant."""

LOSING = 1.05
MEMORY = 1.02
"""Peak memory may be so many times the ungated network's, plus the gates."""
OURS = ("gated", "per-sample", "recipe", "baked")
GOALS = {
    ("cpu", "eager", "gated"): (1.02, 1.05), ("cpu", "compiled", "gated"): (1.02, 1.05),
    ("cpu", "eager", "per-sample"): (None, 1.08), ("cpu", "compiled", "per-sample"): (None, 1.08),
    ("cuda", "eager", "gated"): (1.05, None), ("cuda", "compiled", "gated"): (1.02, None),
    ("cuda", "graph", "gated"): (1.01, None),
}
"""(device, mode, variant) -> what the geometric mean and the worst case are to stay within."""

README_COLUMNS: tuple[Column, ...] = (
    ("gated", "eager", "gated"), ("per-sample", "eager", "per-sample"), ("recipe", "eager", "recipe"),
    ("gated, compiled", "compiled", "gated"), ("recipe, compiled", "compiled", "recipe"),
    ("listing1", "eager", "listing1"), ("listing1, compiled", "compiled", "listing1"),
    ("plain-fold", "eager", "plain-fold"),
)


def interval(value: Entry) -> str:
    """1.032 (1.011 to 1.065)."""
    return f"{value['median']:.3f} ({value['low']:.3f} to {value['high']:.3f})"


def markdown(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table."""
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(map(str, row))} |" for row in rows)])


def geometric_mean(ratios: Sequence[float]) -> str:
    """1.022 (11): the mean, and of how many; empty where there is no ratio."""
    return f"{statistics.geometric_mean(ratios):.3f} ({len(ratios)})" if ratios else ""


# ---- training steps --------------------------------------------------------------------------------------------------


def training(results: Results) -> list[Entry]:
    """The entries of training steps that were timed."""
    return [entry for entry in results if entry.get("mode") not in (None, "inference") and entry.get("ratio")]


def modes(results: Results) -> list[tuple[str, str]]:
    """(mode, numbers) of all training steps, in order."""
    return list(dict.fromkeys((entry["mode"], entry["numbers"]) for entry in training(results)))


def all_columns(results: Results, numbers: str) -> list[Column]:
    """Every variant of every mode that was timed in these numbers, but the ungated ones."""
    found = dict.fromkeys(
        (mode, variant) for mode, kind in modes(results) if kind == numbers
        for entry in training(results) if (entry["mode"], entry["numbers"]) == (mode, kind)
        for variant in entry["ratio"] if variant != "ungated"
    )
    return [(variant if mode == "eager" else f"{variant}, {mode}", mode, variant) for mode, variant in found]


def explained(columns: Sequence[Column]) -> str:
    """What the headings of `overhead` do not say, in words: which of their variants take one beta an example."""
    variants = dict.fromkeys(variant for _, _, variant in columns)
    each, one = ([f"`{name}`" for name in variants if (name in ONE_A_SAMPLE) is many] for many in (True, False))
    parts = [f"one beta {of} {', '.join(names)}" for of, names in (("a step", one), ("an example", each)) if names]
    return f"With {', with '.join(parts)}. In brackets after a mean is the number of networks and batches behind it."


def overhead(results: Results, columns: Sequence[Column], numbers: str = "float32") -> str:
    """A row a network and batch; the last has the geometric means of the columns' medians, and of how many each is."""
    found = {(e["case"], e["batch"], e["mode"]): e for e in training(results) if e["numbers"] == numbers}
    places = list(dict.fromkeys(key[:2] for key in found))
    rows: list[list[object]] = []
    eager = [found.get((*place, "eager"), {}) for place in places]
    peaks = {variant: [memory_ratio(entry, variant) for entry in eager] for variant in OURS[:-1]}
    peaks = {variant: shares for variant, shares in peaks.items() if variant == "gated" or any(shares)}
    ratios: dict[str, list[float]] = {heading: [] for heading, _, _ in columns}
    for i, place in enumerate(places):
        cells: list[object] = [*place]
        for heading, mode, variant in columns:
            value = found.get((*place, mode), {}).get("ratio", {}).get(variant)
            cells.append("" if value is None else interval(value))
            if value is not None:
                ratios[heading].append(value["median"])
        rows.append([*cells, *("" if shares[i] is None else f"{shares[i]:.3f}" for shares in peaks.values())])
    of_peaks = ([share for share in shares if share is not None] for shares in peaks.values())
    rows.append(["geometric mean", "", *map(geometric_mean, (*ratios.values(), *of_peaks))])
    headings = [*(heading for heading, _, _ in columns), *(f"peak memory, {variant}" for variant in peaks)]
    return markdown(["network", "batch", *headings], rows)


def means(results: Results, device: str) -> str:
    """Markdown: geometric means and worst cases of the gated and the per-sample network by mode, beside their goals."""
    rows = []
    for mode, numbers in modes(results):
        mine = [e for e in training(results) if (e["mode"], e["numbers"]) == (mode, numbers)]
        for variant in OURS[:-1]:
            timed = [entry for entry in mine if variant in entry["ratio"]]
            if timed:
                worst = max(timed, key=lambda entry: entry["ratio"][variant]["median"])
                mean = f"{statistics.geometric_mean(e['ratio'][variant]['median'] for e in timed):.3f}"
                goals = GOALS.get((device, mode, variant), (None, None))
                where = f"{worst['case']} batch {worst['batch']}"
                rows.append([
                    mode, numbers, variant, len(timed), mean, _goal(goals[0], float(mean)),
                    f"{interval(worst['ratio'][variant])}, {where}",
                    _goal(goals[1], worst["ratio"][variant]["median"]),
                ])
    columns = ["mode", "numbers", "variant", "networks and batches", "geometric mean", "goal", "worst", "goal"]
    return markdown(columns, rows)


def _goal(goal: float | None, ratio: float) -> str:
    if goal is None:
        return ""
    return f"{goal:.2f}: {'met' if ratio <= goal else '**missed**'}"


def losing(results: Results) -> list[str]:
    """Each of our ratios above LOSING, by name, the worst first."""
    found = []
    for entry in (e for e in results if e.get("ratio")):
        for variant in OURS:
            value = entry["ratio"].get(variant)
            if value is not None and value["median"] > LOSING:
                label = f"{entry['case']} batch {entry['batch']}, {variant} {entry['mode']} {entry['numbers']}"
                found.append((value["median"], f"{label}: {interval(value)}"))
    return [line for _, line in sorted(found, key=lambda pair: -pair[0])]


# ---- memory, parameters, launches, inference -------------------------------------------------------------------------


def memory_ratio(entry: Entry, variant: str) -> float | None:
    """Peak bytes over the ungated network's."""
    peaks = entry.get("peak_bytes") or {}
    return peaks[variant] / peaks["ungated"] if peaks.get("ungated") and variant in peaks else None


def memory(results: Results) -> str:
    """Markdown: peak memory beside its bound, MEMORY times the ungated network's plus the gates; empty for none."""
    rows = []
    for entry in training(results):
        for variant in OURS[:-1]:
            share = memory_ratio(entry, variant)
            if share is not None:
                peaks = entry["peak_bytes"]
                bound = MEMORY + entry["gate_bytes"] / peaks["ungated"]
                rows.append([
                    entry["case"], entry["batch"], entry["mode"], entry["numbers"], variant,
                    f"{peaks['ungated'] / 1e6:.2f}", f"{share:.3f}", f"{bound:.3f}",
                    "yes" if share <= bound else "**no**",
                ])
    columns = ["network", "batch", "mode", "numbers", "variant", "ungated, MB", "ratio", "bound", "within"]
    return markdown(columns, rows) if rows else ""


def counts(results: Results) -> str:
    """Markdown: parameters, and on a GPU kernels launched and the host's time a step; a row a network and batch."""
    rows = []
    for entry in training(results):
        numbers = entry.get("parameters") or {}
        launches, host = entry.get("launches") or {}, entry.get("host_seconds") or {}
        added = numbers["gated"] - numbers["ungated"] if {"gated", "ungated"} <= set(numbers) else None
        cells = [
            entry["case"], entry["batch"], entry["mode"], entry["numbers"],
            f"{numbers['ungated']:,}" if "ungated" in numbers else "",
            "" if added is None else f"{added:,} ({added / numbers['ungated']:.2%})",
        ]
        cells.append(", ".join(f"{name} {count}" for name, count in launches.items()))
        cells.append(", ".join(f"{name} {statistics.median(times) * 1e3:.3f}" for name, times in host.items()))
        rows.append(cells)
    columns = ["network", "batch", "mode", "numbers", "parameters", "added by gates", "kernels a step", "host, ms"]
    filled = [i for i in range(len(columns)) if any(row[i] for row in rows)]
    return markdown([columns[i] for i in filled], ([row[i] for i in filled] for row in rows)) if rows else ""


def inference(results: Results) -> str:
    """Markdown: a baked network's forward pass over the ungated one's; empty where none was measured."""
    rows = [
        [e["case"], e["batch"], e["numbers"], interval(e["ratio"]["baked"]), "yes" if e["same_kernels"] else "**no**"]
        for e in results if e.get("mode") == "inference" and e.get("ratio")
    ]
    return markdown(["network", "batch", "numbers", "baked over plain", "same kernels"], rows) if rows else ""


# ---- layers ----------------------------------------------------------------------------------------------------------


def losing_layers(results: Results, ours: Sequence[str] = ("fold", "epilogue", "fused")) -> list[str]:
    """The layers of which even the fastest of our variants is above LOSING, the worst first."""
    found = []
    for entry in (e for e in results if e.get("ratio")):
        mine = {name: value for name, value in entry["ratio"].items() if name.partition(" ")[0] in ours}
        if mine:
            best = min(mine, key=lambda name: mine[name]["median"])
            if mine[best]["median"] > LOSING:
                label = f"{entry['layer']} batch {entry['batch']} {entry['dtype']} {entry['direction']}"
                found.append((mine[best]["median"], f"{label}: {best} {interval(mine[best])}"))
    return [line for _, line in sorted(found, key=lambda pair: -pair[0])]

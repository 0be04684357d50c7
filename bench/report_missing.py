"""Which figures a benchmark of one kind of machine is to have, and which of them its result files lack."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .growth import SERIES
from .overhead import BATCHES, CASES
from .records import Record
from .report_tables import Entry

MODES = {"cpu": ("eager", "compiled"), "cuda": ("eager", "compiled", "graph")}
NUMBERS = {"cpu": ("float32", "bfloat16"), "cuda": ("float32", "tf32", "bfloat16")}
VARIANTS = {
    "eager": ("gated", "per-sample", "listing1", "plain-fold"), "compiled": ("gated", "per-sample", "listing1"),
    "graph": ("gated", "per-sample"),
}
"""What a mode is to time besides the ungated network."""
NAMES = {"cpu": "CPU", "cuda": "GPU"}


def missing(found: Sequence[Record], device: str) -> list[str]:
    """A line for each figure that the records of one kind, "cpu" or "cuda", do not have."""
    results = {what: [e for r in found if r.what == what for e in r.results] for what in (
        "overhead", "growth", "curve-cost", "layers"
    )}
    return [
        *_overhead(results["overhead"], device), *_growth(results["growth"], device),
        *(["the cost of a curve (bench.curve_cost)"] if not results["curve-cost"] else []),
        *(["the layers by themselves (bench.layers)"] if not results["layers"] else []),
    ]


def _overhead(entries: Sequence[Entry], device: str) -> list[str]:
    timed = {(e["mode"], e["numbers"], e["case"], e["batch"], name) for e in entries for name in e.get("ratio") or {}}
    places = [(case, batch) for case in CASES for batch in BATCHES]
    lines = []
    for mode in MODES[device]:
        by_lack: dict[tuple[tuple[str, int], ...], list[str]] = {}
        for variant in VARIANTS[mode]:
            lacking = tuple(place for place in places if (mode, "float32", *place, variant) not in timed)
            by_lack.setdefault(lacking, []).append(variant)
        for lacking, variants in by_lack.items():
            lines += _line(f"train step, {mode} float32, {', '.join(variants)}", lacking, len(places))
    for numbers in NUMBERS[device][1:]:
        lacking = tuple(
            place for place in places if not any((mode, numbers, *place, "gated") in timed for mode in MODES[device])
        )
        lines += _line(f"train step, {numbers}, gated", lacking, len(places))
    baked = {(e["case"], e["batch"]) for e in entries if e["mode"] == "inference" and e.get("ratio")}
    lines += _line("inference of a baked network", [place for place in places if place not in baked], len(places))
    wanted = {"peak memory": "peak_bytes"}
    if device == "cuda":
        wanted |= {"kernels launched a step": "launches", "host time a step": "host_seconds"}
    for label, key in wanted.items():
        there = {(e["case"], e["batch"]) for e in entries if e["mode"] == "eager" and e.get(key)}
        lines += _line(f"{label}, eager", [place for place in places if place not in there], len(places))
    return lines


def _growth(entries: Sequence[Entry], device: str) -> list[str]:
    timed = {(e["case"], e["axis"]) for e in entries if e.get("ratio")}
    lacking: dict[str, list[str]] = {}
    for series in SERIES:
        if (series.case, series.axis) not in timed:
            lacking.setdefault(series.case, []).append(series.axis)
    lines = [f"growth of {case} along {', '.join(axes)}" for case, axes in lacking.items()]
    if device == "cuda" and not any(entry.get("launches") for entry in entries if entry["axis"] == "depth"):
        lines.append("kernels launched a step along depth")
    return lines


def _line(label: str, lacking: Iterable[tuple[str, int]], of: int) -> list[str]:
    places = [f"{case} batch {batch}" for case, batch in lacking]
    if not places:
        return []
    return [f"{label}: {'every network and batch' if len(places) == of else ', '.join(places)}"]

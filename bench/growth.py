"""Overhead as a network grows: depth, width, batch and image size, one at a time: `python -m bench.growth`.

Each series starts from a small MLP or CNN and doubles one size. At every size the training steps of the ungated, the
gated (one beta a step) and the per-sample network run interleaved in one process; figures are medians of the rounds'
ratios with 95 % bootstrap intervals, and peak memory. Series take turns, so that all get as far as the time allows. A
series ends where the next size would not fit into memory, where its step or its measurement would take longer than
there is time, or where the network cannot be built; the last row says which. The result file is written after every
size. On a GPU the kernels launched a step are counted along depth: gating's share of them must not grow.
"""

from __future__ import annotations

import argparse
import gc
import math
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from mrvae_models.networks import build

from . import plots, records
from .arguments import EachOnce, interrupted, out_file, result_file
from .overhead_check import refusal
from .overhead_measure import Effort, train
from .report_tables import interval
from .timing import LEAST_ROUNDS, keep_memory
from .variants import DRAWS, TrainingStep, precision, training_step

WHAT = "growth"
VARIANTS = ("ungated", "gated", "per-sample")
MODES = ("eager", "compiled", "graph")
STEP_SECONDS = 4.0
ROUNDS = 15
SHARE = 40
"""One size's rounds take a fortieth of the time at most: there are seven series, of five to ten sizes each."""
CHECKED = 4
"""Sizes of a series that are held against float64: it takes ten times as long, and deep networks' gradients vanish."""
PART = 0.8
"""Of the free memory that a size may be expected to take."""


class Setting(NamedTuple):
    """A network, its data's shape, the batch and the network's options."""

    network: str
    shape: tuple[int, ...]
    batch: int
    options: dict[str, Any]


class Series(NamedTuple):
    """One axis of one base network: the setting at a value, and the first value."""

    case: str
    axis: str
    first: int
    setting: Callable[[int], Setting]


IMAGE = (1, 28, 28)
BATCH = 16


def _cnn(*channels: int) -> dict[str, Any]:
    return {"channels": channels, "norm": "none"}


SERIES = (
    Series("mlp", "depth", 1, lambda n: Setting("mlp", IMAGE, BATCH, {"hidden": (300,) * n})),
    Series("mlp", "width", 64, lambda n: Setting("mlp", IMAGE, BATCH, {"hidden": (n, n)})),
    Series("mlp", "batch", 1, lambda n: Setting("mlp", IMAGE, n, {"hidden": (300,)})),
    Series("cnn", "depth", 1, lambda n: Setting("cnn", (1, 64, 64), BATCH, _cnn(*(32,) * n))),
    Series("cnn", "width", 8, lambda n: Setting("cnn", IMAGE, BATCH, _cnn(n, 2 * n))),
    Series("cnn", "batch", 1, lambda n: Setting("cnn", IMAGE, n, _cnn(32, 64))),
    Series("cnn", "image", 8, lambda n: Setting("cnn", (1, n, n), BATCH, _cnn(32, 64))),
)
"""Depth: hidden layers of 300, stages of 32 channels. Width: two hidden layers of n, two stages of n and 2 n channels.
Image: the side in pixels."""


def free_memory(device: torch.device) -> int:
    """Bytes that a process may still take, as the system or the GPU's driver reports them."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and limit.read_text().strip().isdigit():
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return free


class Growing:
    """A series in one mode while it grows: what it measured, the value that comes next, and why it ended."""

    def __init__(self, series: Series, mode: str) -> None:
        self.series, self.mode, self.value = series, mode, series.first
        self.ended: str | None = None
        self.steps: list[float] = []  # seconds of a gated step, by size
        self.bytes: list[int] = []
        self.seconds: list[float] = []  # that measuring a size took

    def reason(self, left: float, step_seconds: float, free: int) -> str | None:
        """Why the next size is not begun, if it should not be: an extrapolation of the last doubling's growth."""
        if not self.seconds:
            return None if left > 0 else records.TIME_UP
        if (size := _next(self.bytes)) > PART * free:
            return f"memory: it would take about {size / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
        if (step := _next(self.steps)) > step_seconds:
            return f"a step would take about {step:.3g} s; the limit is {step_seconds:g} s"
        if (needed := _next(self.seconds)) > left:
            return f"{records.TIME_UP}: it would take about {needed:.0f} s, {max(left, 0):.0f} s are left"
        return None

    def entry(self, **found: Any) -> dict[str, Any]:
        """An entry of the result file."""
        blank: dict[str, Any] = {
            "seconds": {}, "ratio": {}, "peak_bytes": {}, "launches": None, "refused": {}, "ended": None
        }
        place = {"axis": self.series.axis, "value": self.value, "case": self.series.case, "mode": self.mode}
        return {**place, "numbers": "float32", **blank, **found}


def _next(values: Sequence[float]) -> float:
    """The value after a further doubling: the last growth, twofold at least and fourfold at most, once more."""
    growth = values[-1] / values[-2] if len(values) > 1 else 2.0
    return values[-1] * min(max(growth, 2.0), 4.0)


def measure(growing: Growing, device: torch.device, rounds: int, limit: float) -> dict[str, Any]:
    """The entry of the series' next size; its rounds take `limit` seconds at most.

    ValueError where there is no such network, MemoryError where it does not fit. At a series' first sizes a variant
    that computes something else than its gates say is refused a time, as in bench.overhead.
    """
    began = time.monotonic()
    series, mode = growing.series, growing.mode
    network, shape, batch, options = series.setting(growing.value)
    with torch.device("meta"):
        build(network, shape, **options)

    def make(variant: str) -> TrainingStep:
        return training_step(
            variant, network, shape, batch, mode == "compiled", graph=mode == "graph", device=device, **options
        )

    check = refusal if len(growing.steps) < CHECKED else unchecked
    with precision("float32", device):
        found = train(make, VARIANTS, Effort(rounds, limit=limit), check=check)
    lacking = [why for why in found["refused"].values() if out_of_memory(why)]
    if lacking or "ungated" not in found["ratio"]:
        raise MemoryError(*lacking) if lacking else RuntimeError(found["refused"]["ungated"])
    growing.steps.append(max(map(statistics.median, found["seconds"].values())))
    inputs = DRAWS * batch * math.prod(shape) * 4 * len(VARIANTS)
    growing.bytes.append(sum(found["peak_bytes"].values()) + inputs)
    growing.seconds.append(time.monotonic() - began)
    return growing.entry(**{name: found[name] for name in ("seconds", "ratio", "peak_bytes", "launches", "refused")})


def unchecked(step: TrainingStep, references: object) -> None:
    """In place of `refusal`: a step, for the optimiser's state to be there."""
    step()


def out_of_memory(reason: str) -> bool:
    """Whether an allocator, torch's or Python's, had too little."""
    return any(sign in reason for sign in ("out of memory", "OutOfMemoryError", "MemoryError", "can't allocate memory"))


def grow(
    series: Sequence[Series], modes: Sequence[str], device: torch.device, seconds: float, step_seconds: float,
    rounds: int, clock: Callable[[], float] = time.monotonic,
    done: Callable[[list[dict[str, Any]]], object] = lambda results: None,
) -> list[dict[str, Any]]:
    """Every series in every mode, turn by turn; the results in the order of the series. The last of each says why it
    `ended`. `done` gets the results so far after each."""
    deadline = clock() + seconds
    every = [Growing(one, mode) for mode in modes for one in series]
    found: dict[int, list[dict[str, Any]]] = {i: [] for i in range(len(every))}
    while growing := [(i, one) for i, one in enumerate(every) if one.ended is None]:
        for i, one in growing:
            one.ended = one.reason(deadline - clock(), step_seconds, free_memory(device))
            if one.ended is None:
                try:
                    found[i].append(measure(one, device, rounds, seconds / SHARE))
                except (ValueError, RuntimeError, MemoryError) as error:
                    memory, said = out_of_memory(f"{type(error).__name__}: {error}"), re.split("[;\n]", str(error))[0]
                    if not memory and not isinstance(error, ValueError):
                        raise
                    one.ended = f"{'memory' if memory else 'the network'}: {said}"
            if one.ended is None:
                print(line(found[i][-1]), flush=True)
                one.value *= 2
            else:
                found[i].append(one.entry(ended=one.ended))
                print(line(found[i][-1]), flush=True)
            done(_in_order(found))
            torch._dynamo.reset()
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    return _in_order(found)


def _in_order(found: dict[int, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    return [entry for entries in found.values() for entry in entries]


# ---- what people read ------------------------------------------------------------------------------------------------


def line(entry: dict[str, Any]) -> str:
    """One entry in a line, as the run goes along."""
    label = f"{entry['case']} {entry['axis']} {entry['value']} {entry['mode']}"
    if entry["ended"]:
        return f"{label}: not measured: {entry['ended']}"
    cells = [f"{name} {_cell(entry, name)}" for name in VARIANTS[1:]]
    return f"{label}: {statistics.median(entry['seconds']['ungated']) * 1e3:.3f} ms, " + ", ".join(cells)


def _cell(entry: dict[str, Any], variant: str) -> str:
    if variant in entry["ratio"]:
        return interval(entry["ratio"][variant])
    return f"refused a time: {entry['refused'].get(variant, 'it was not measured')}"


def table(results: Sequence[dict[str, Any]]) -> str:
    """Markdown: a row a size; the last of each series says why it ended."""
    launched = any(entry["launches"] for entry in results)
    columns = ["network", "axis", "value", "mode", "ungated, ms", *VARIANTS[1:], "peak memory, gated"]
    columns += ["launches: ungated, gated, per-sample"] * launched
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for entry in results:
        cells = [entry["case"], entry["axis"], str(entry["value"]), entry["mode"]]
        if entry["ended"]:
            cells += [f"not measured: {entry['ended']}", *[""] * (len(columns) - 5)]
        else:
            peak = entry["peak_bytes"]
            cells += [
                f"{statistics.median(entry['seconds']['ungated']) * 1e3:.3f}",
                *(_cell(entry, name) for name in VARIANTS[1:]),
                f"{peak['gated'] / peak['ungated']:.3f}" if "gated" in peak else "",
            ]
            if launched:
                cells.append(", ".join(str((entry["launches"] or {}).get(name, "")) for name in VARIANTS))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 1 where a variant was refused a time, 130 where it was interrupted."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.growth", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--axes", nargs="+", choices=sorted({one.axis for one in SERIES}), help="default: all")
    parser.add_argument("--cases", nargs="+", choices=sorted({one.case for one in SERIES}), help="default: all")
    parser.add_argument("--modes", nargs="+", action=EachOnce, choices=MODES, default=["eager"],
                        help="default: eager")
    parser.add_argument("--device", default="cpu", help="such as cuda (default cpu)")
    parser.add_argument("--seconds", type=float, default=120, help="begin no size that would end later (default 120)")
    parser.add_argument("--step-seconds", type=float, default=STEP_SECONDS,
                        help=f"longest training step of one network, in seconds (default {STEP_SECONDS:g})")
    parser.add_argument("--rounds", type=int, default=ROUNDS,
                        help=f"interleaved rounds a size, {LEAST_ROUNDS} at least (default {ROUNDS})")
    parser.add_argument("--out", type=out_file, help="write a JSON result file there")
    parser.add_argument("--plot", type=out_file, help="draw a PNG there")
    parser.add_argument("--table", type=result_file(WHAT), metavar="FILE",
                        help="print the table of a result file and stop")
    options = parser.parse_args(arguments)
    if options.table:
        print(table(options.table.results))
        return 0
    for name, least in (("seconds", 0), ("step_seconds", 0), ("rounds", LEAST_ROUNDS)):
        if not getattr(options, name) >= least:
            parser.error(f"--{name.replace('_', '-')} is {getattr(options, name)}; expected at least {least}")
    chosen = [
        one for one in SERIES
        if (not options.axes or one.axis in options.axes) and (not options.cases or one.case in options.cases)
    ]
    if not chosen:
        parser.error(f"no series has a case of {options.cases} and an axis of {options.axes}")
    try:
        device = torch.device(options.device)
    except RuntimeError as error:
        parser.error(f"--device is {options.device!r}: {error}")
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device is {options.device!r}, and torch finds no GPU")
    if "graph" in options.modes and device.type != "cuda":
        parser.error("--modes has graph: a CUDA graph needs an NVIDIA GPU; give --device cuda or leave it out")
    keep_memory()
    written: Path | None = None

    def write(results: list[dict[str, Any]]) -> None:
        nonlocal written
        if options.out:
            records.write(options.out, WHAT, results, device)
            written = options.out

    try:
        results = grow(chosen, options.modes, device, options.seconds, options.step_seconds, options.rounds, done=write)
    except KeyboardInterrupt:
        return interrupted("growth", written)
    print("\n" + table(results))
    if written:
        print(f"written: {written}")
    if options.plot:
        plots.growth(results, options.plot, f"{records.machine(device)['kind']}: train step over the ungated network's")
        print(f"written: {options.plot}")
    return 1 if any(entry["refused"] for entry in results) else 0


if __name__ == "__main__":
    sys.exit(main())

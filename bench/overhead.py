"""What gating costs a training step, in time and memory: `python -m bench.overhead`.

A step is forward, loss, backward and fused Adam. All variants of one network and batch (bench/overhead_networks.py) run
interleaved in one process; a figure is the median of the rounds' ratios to the ungated network in the same mode and
numbers, with a 95 % bootstrap interval. Before that each variant's outputs and gradients are held against the formula
in float64 (bench/overhead_check.py); one that is wrong, or fails, is refused a time and named. What cannot be measured
here, and what there is no time for, is left out and listed. The exit code is 1 where something is wrong or failed, or
nothing was measured.

Modes: "eager"; "compiled", torch.compile of the model; "graph", the whole step replayed from a CUDA graph;
"inference", the forward pass of a baked network over the ungated one's. On a GPU the kernels launched a step and the
host's time are measured too, and how the launches grow with depth.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from . import records
from . import report_tables as tables
from .arguments import EachOnce, interrupted, out_file, result_file
from .gpu_timing import failure
from .overhead_check import baked_refusal
from .overhead_measure import BAKED_BETA, Effort, Entry, baked, empty, extra_launches, infer, launches_by_depth, train
from .overhead_networks import CUBIC, RECIPE, VARIANTS
from .timing import keep_memory
from .variants import NUMBERS, TrainingStep, precision, training_step

WHAT = "overhead"
CASES: dict[str, tuple[str, tuple[int, ...], dict[str, Any]]] = {
    "linear": ("linear", (1, 28, 28), {}),
    "mlp": ("mlp", (1, 28, 28), {}),
    "cnn-small": ("cnn", (1, 28, 28), {"channels": (32, 64), "norm": "none"}),
    "resnet": ("resnet", (1, 28, 28), {}),
    "nvae-small": (
        "nvae", (1, 28, 28), {"latent": 8, "channels": 8, "groups": 2, "cells": 1, "process_cells": 1},
    ),
    "cnn": ("cnn", (1, 28, 28), {}),
}
"""Name -> network, data shape, options. "cnn" and "resnet" are the paper's, "mlp" 784-300-16, "cnn-small" two stages
without norms, "nvae-small" three latent groups on two scales, its gates on batch norms, convolutions and
squeeze-and-excite."""

TABLE_1 = {"resnet": (1_881_217, 1_884_289), "cnn": (17_526_977, 17_885_377)}
"""Parameters of the paper's plain and multi-rate networks, the exponents of its Table 1 corrected."""

OTHER_GATES = {
    "resnet": "which gates neither the heads nor the decoder's first and last layer",
    "cnn": "which counts conditional batch norms too",
}
"""Why the gates here are others than those of Table 1."""

BATCHES = (16, 128)
MODES = ("eager", "inference", "graph", "compiled")
DEFAULT_MODES = {"cpu": ("eager", "inference", "compiled"), "cuda": MODES}
"""Networks, batches and modes are measured in the order of these tables, whatever the arguments': what takes longest
last."""
DEFAULT_SECONDS = {"cpu": 480.0, "cuda": 300.0}
DEFAULT_NUMBERS = {"cpu": ("float32",), "cuda": NUMBERS}
COMPILED = ("ungated", "gated", "per-sample", RECIPE, "listing1")
"""Compiling is what takes the time of a run; plain folding, which Inductor fuses as it does ours, is for --variants."""


def measure(
    case: str, batch: int, mode: str, numbers: str, device: torch.device, effort: Effort,
    variants: Sequence[str] | None = None,
) -> Entry:
    """One entry; `left_out` says why where nothing could be measured, and `failed` too where it was to be."""
    if why := impossible(mode, numbers, device):
        return empty(case, batch, mode, numbers, why)
    network, shape, options = CASES[case]

    def make(variant: str) -> TrainingStep:
        return training_step(
            variant, network, shape, batch, mode == "compiled", graph=mode == "graph", numbers=numbers, device=device,
            **options,
        )

    try:
        with precision(numbers, device):
            if mode == "inference":
                step = make("gated")
                inputs = [draw.x for draw in step.inputs]
                network = baked(step)
                wrong = baked_refusal(step, network, inputs[-1], BAKED_BETA)
                found = empty("", 0, "inference", "") if wrong else infer(
                    step.plain, network, inputs, effort, numbers == "bfloat16"
                )
                found["refused"] = {"baked": wrong} if wrong else {}
            else:
                found = train(make, variants or (COMPILED if mode == "compiled" else VARIANTS), effort)
    except Exception as error:
        reason = failure(error, device).partition("\n")[0]
        found = {**empty(case, batch, mode, numbers, f"it failed: {reason}"), "failed": reason}
    finally:
        torch._dynamo.reset()  # or the next case would be compiled for any size, as a second size of this one
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return {**found, "case": case, "batch": batch, "mode": mode, "numbers": numbers}


def impossible(mode: str, numbers: str, device: torch.device) -> str | None:
    """Why nothing can be measured in this mode and these numbers on this device, or None."""
    if mode == "graph" and device.type != "cuda":
        return f"CUDA graphs need an NVIDIA GPU; the device is {device}"
    try:
        with precision(numbers, device):
            return None
    except ValueError as error:
        return str(error)


def depth_entry(device: torch.device) -> Entry:
    """The kernels launched a step by MLPs of growing depth, as an entry of mode "launches"."""
    counts = launches_by_depth(device)
    extra = {name: extra_launches(counts, name) for name in counts}
    return {**empty("mlp", 128, "launches", "float32"), "by_depth": counts, "extra": extra}


def run(
    cases: Sequence[str], batches: Sequence[int], modes: Sequence[str], numbers: Sequence[str], device: torch.device,
    effort: Effort, seconds: float, variants: Sequence[str] | None = None,
    done: Callable[[list[Entry]], object] = lambda results: None, clock: Callable[[], float] = time.monotonic,
) -> list[Entry]:
    """Every entry, in the order numbers, mode, case, batch, of which the last three go from short to long. All end
    within `seconds`: one is begun only if what the longest of its network took is left, and given up where the rest of
    it would end later. What is left out has an entry that says so. `done` gets the entries after each."""
    deadline = clock() + seconds
    effort = effort._replace(until=time.monotonic() + seconds)
    cases, modes, batches = sorted(cases, key=list(CASES).index), sorted(modes, key=MODES.index), sorted(batches)
    took = dict.fromkeys(cases, 0.0)
    results: list[Entry] = []
    if device.type == "cuda" and "eager" in modes:
        results.append(depth_entry(device))
    for kind, mode, case, batch in itertools.product(numbers, modes, cases, batches):
        began = clock()
        if began + took[case] > deadline:
            results.append(empty(case, batch, mode, kind, f"the {seconds:g} seconds were up"))
        else:
            results.append(measure(case, batch, mode, kind, device, effort, variants))
            took[case] = max(took[case], clock() - began)
        print(line(results[-1]), flush=True)
        done(results)
    return results


# ---- what people read ------------------------------------------------------------------------------------------------


def label(entry: Entry) -> str:
    """Which entry."""
    return f"{entry['case']} batch {entry['batch']} {entry['mode']} {entry['numbers']}"


def line(entry: Entry) -> str:
    """One entry in a line, as the run goes along."""
    if entry["left_out"]:
        return f"{label(entry)}: left out: {entry['left_out']}"
    ratios = [f"{name} {tables.interval(value)}" for name, value in entry["ratio"].items() if name != "ungated"]
    return f"{label(entry)}: " + ", ".join([*ratios, *(f"{name} refused" for name in entry["refused"])])


def table(results: Sequence[Entry]) -> str:
    """Markdown: time and memory by numbers, parameters, inference, launches by depth, and what has no time and why."""
    parts = []
    for numbers in dict.fromkeys(kind for _, kind in tables.modes(results)):
        found = tables.overhead(results, tables.all_columns(results, numbers), numbers)
        parts.append(f"Training steps in {numbers}, time over the ungated network's\n\n{found}")
    for title, found in (
        ("Peak memory", tables.memory(results)), ("Parameters, launches, host time", tables.counts(results)),
        ("Inference", tables.inference(results)), ("Kernels a step launches, by hidden layers", by_depth(results)),
    ):
        if found:
            parts.append(f"{title}\n\n{found}")
    for title, lines in (
        ("Parameters beside Table 1 of the paper", beside_table_1(results)), ("Refused a time", refused(results)),
        ("Left out", [f"{label(e)}: {e['left_out']}" for e in results if e["left_out"]]),
    ):
        if lines:
            parts.append(f"{title}\n\n" + "\n".join(f"- {text}" for text in lines))
    return "\n\n".join(parts)


def refused(results: Sequence[Entry]) -> list[str]:
    """A line for each variant that is wrong or failed."""
    return [f"{label(e)}, {name}: {why}" for e in results for name, why in e["refused"].items()]


def failed(results: Sequence[Entry]) -> list[str]:
    """A line for each entry that has no measurements because something broke."""
    return [f"{label(e)}: {e['failed']}" for e in results if e.get("failed")]


def by_depth(results: Sequence[Entry]) -> str:
    """Markdown; empty where no launches were counted by depth."""
    rows = [
        [name, *counts.values(), ", ".join(map(str, entry["extra"][name]))]
        for entry in results if entry["mode"] == "launches" for name, counts in entry["by_depth"].items()
    ]
    depths = next((list(counts) for e in results for counts in e.get("by_depth", {}).values()), [])
    return tables.markdown(["variant", *map(str, depths), "more than ungated"], rows) if rows else ""


def beside_table_1(results: Sequence[Entry]) -> list[str]:
    """A line for each network of the paper whose parameters were counted."""
    lines = {}
    for entry in results:
        counts = entry.get("parameters") or {}
        if entry["case"] in TABLE_1 and {"ungated", "gated"} <= set(counts):
            plain, gated, (base, multirate) = counts["ungated"], counts["gated"], TABLE_1[entry["case"]]
            lines[entry["case"]] = (
                f"{entry['case']}: {plain:,} (Table 1: {base:,}), gates add {gated - plain:,}, {gated / plain - 1:.2%} "
                f"(Table 1, {OTHER_GATES[entry['case']]}: {multirate - base:,}, {multirate / base - 1:.2%})"
            )
    return list(lines.values())


def _asked(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """The arguments' options, over those of the command that made the file of --like, where it wrote to excepted."""
    options = parser.parse_args(arguments)
    if options.like is None:
        return options
    where = argparse.ArgumentParser(add_help=False)
    where.add_argument("--out")
    before = _asked(parser, where.parse_known_args(options.like.command)[1])
    before.like = None
    return parser.parse_args(arguments, before)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command's options; ends with a message and code 2 where one cannot be."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.overhead", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--like", type=result_file(WHAT), metavar="FILE",
                        help="measure what that result file's command did, for as long, but for the arguments given "
                        "here; it is not written to")
    parser.add_argument("--cases", nargs="+", action=EachOnce, choices=list(CASES), default=list(CASES),
                        help="networks (default all)")
    parser.add_argument("--batch", nargs="+", action=EachOnce, type=int, default=list(BATCHES),
                        help="examples (default 16 128)")
    parser.add_argument("--modes", nargs="+", action=EachOnce, choices=MODES,
                        help="default: on a CPU all but graph, on a GPU all")
    parser.add_argument("--numbers", nargs="+", action=EachOnce, choices=NUMBERS,
                        help="float32 products, TF32's on a GPU, bfloat16 by autocast (default: on a CPU float32, on a "
                        "GPU all)")
    parser.add_argument("--variants", nargs="+", choices=(*VARIANTS, *CUBIC),
                        help="besides ungated (default all but the cubic ones; compiled: nor plain-fold)")
    parser.add_argument("--device", default="cpu", help="such as cuda (default cpu)")
    parser.add_argument("--rounds", type=int, default=Effort().rounds,
                        help=f"interleaved rounds, fewer where they take longer than {Effort().limit:g} s "
                        f"(default {Effort().rounds})")
    parser.add_argument("--seconds", type=float,
                        help="leave out what would end later (default: on a CPU {cpu:g}, on a GPU {cuda:g})"
                        .format(**DEFAULT_SECONDS))
    parser.add_argument("--out", type=out_file, help="write a JSON result file there")
    parser.add_argument("--table", type=result_file(WHAT), metavar="FILE",
                        help="print the tables of a result file and stop")
    options = _asked(parser, arguments)
    if wrong := [batch for batch in options.batch if batch < 1]:
        parser.error(f"--batch holds {wrong[0]}; expected at least 1")
    if options.rounds < 1:
        parser.error(f"--rounds is {options.rounds}; expected at least 1")
    if options.seconds is not None and not 0 < options.seconds < float("inf"):
        parser.error(f"--seconds is {options.seconds}; expected a positive number of seconds")
    try:
        options.device = torch.device(options.device)
    except RuntimeError:
        parser.error(f"--device is {options.device!r}; expected cpu or cuda")
    if options.device.type not in DEFAULT_MODES:
        parser.error(f"--device is {str(options.device)!r}; expected cpu or cuda")
    if options.device.type == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device is {str(options.device)!r}, and torch finds no GPU")
    if options.variants:
        options.variants = ["ungated", *(name for name in dict.fromkeys(options.variants) if name != "ungated")]
    options.modes = options.modes or DEFAULT_MODES[options.device.type]
    options.numbers = options.numbers or DEFAULT_NUMBERS[options.device.type]
    options.seconds = options.seconds or DEFAULT_SECONDS[options.device.type]
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 1 where a variant was refused a time, an entry failed or none was measured, 130 where it was
    interrupted."""
    options = parse(arguments)
    if options.table:
        print(table(options.table.results))
        return 0
    keep_memory()
    written: Path | None = None

    def write(results: list[Entry]) -> None:
        nonlocal written
        if options.out:
            records.write(options.out, WHAT, results, options.device)
            written = options.out

    try:
        results = run(
            options.cases, options.batch, options.modes, options.numbers, options.device, Effort(options.rounds),
            options.seconds, options.variants, write,
        )
    except KeyboardInterrupt:
        return interrupted("overhead", written)
    print("\n" + table(results))
    measured = any(entry["ratio"] for entry in results)
    if not measured:
        print("\nnothing was measured")
    if written:
        print(f"\nwritten: {written}")
    return 1 if refused(results) or failed(results) or not measured else 0


if __name__ == "__main__":
    sys.exit(main())

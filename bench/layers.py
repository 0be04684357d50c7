"""Time of single layers by every variant over the plain layer's: `python -m bench.layers`.

Each layer in each of the numbers, forward (no gradients) and both (forward and backward): the variants of
layer_variants.py take turns in one process, on inputs that rotate. A time is that of the layer, its gate and its
activation, with a gate that is ready and whose gradient the backward pass gives. Only listing1 also computes its gate
from beta, as the paper prints it; "separate per-sample" is the same with a ready gate, which our per-sample variants
are to be held against. A variant whose y or gradients are wrong against float64 gets no time, and the command ends with
code 1; one that cannot run is listed with the reason.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

import mrvae_kernels as mk

from .arguments import EachOnce, interrupted, out_file
from .layer_checks import DTYPES, CheckedCase, dtypes
from .layer_variants import EVERY
from .records import write
from .shapes import CASES, FOLDING, SIZES, Case, in_turn, named
from .timing import interleave, keep_memory, ratio

DIRECTIONS = ("forward", "both")
LONGEST_TURN = 0.05
"""Seconds of a variant's turn in a round, where there is time for more."""
INCLUDED = (
    "A layer's time, with its gate and activation, over that of the library's layer with its activation. Every variant "
    "is handed a ready gate and gives its gradient, except for `listing1`, which computes its gate from beta, forward "
    "and backward. So hold the `per-sample` variants against `separate per-sample`, which is Listing 1 with a ready "
    "gate, and the others, of one beta a batch, against `separate` and `plain-fold`."
)
"""What the table's times are of, for those who read it elsewhere."""


class Job(NamedTuple):
    """A layer in some numbers, with torch.compile's variant or without."""

    case: Case
    dtype: str
    compiled: bool

    def layer(self, batch: int, device: torch.device) -> CheckedCase:
        """Its variants on the device."""
        return CheckedCase(self.case, batch, self.dtype, device, self.compiled)


def chosen(numbers: Sequence[str], all_shapes: bool) -> list[Job]:
    """A small, a middle and a large layer of each kind, torch.compile for the middle ones in float32; or everything."""
    if all_shapes:
        return [Job(case, dtype, True) for case in in_turn([*CASES, *FOLDING]) for dtype in numbers]
    return [
        Job(named(name), dtype, size == "middle" and dtype == "float32")
        for size in ("middle", "small", "large") for name in SIZES[size] for dtype in numbers
    ]


def device_named(name: str) -> torch.device:
    """The device. ValueError where it is not there."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"there is no device {name!r} here ({str(error).splitlines()[0]})") from None
    if device.type == "meta":
        raise ValueError("'meta' computes nothing; expected cpu or cuda")
    return device


def measure(checked: CheckedCase, rounds: int, seconds: float) -> list[dict[str, Any]]:
    """An entry of the result file for each direction, in at most about so many seconds, without what checks take."""
    faults = {name: fault for name in EVERY if (fault := checked.fault(name))}
    entries = []
    for direction in DIRECTIONS:
        steps = {name: checked.gated.steps(name, direction == "both") for name in EVERY if checked.timed(name)}
        share = seconds / len(DIRECTIONS)
        turn = min(LONGEST_TURN, share / (2 * rounds * max(1, len(steps))))
        times = interleave(steps, rounds, turn, 2, limit=share, device=checked.device)
        compared = times if "library" in times else ()
        entries.append({
            "layer": checked.case.name, "network": checked.case.network, "batch": checked.batch,
            "dtype": checked.dtype, "device": checked.device.type, "direction": direction, "seconds": times,
            "ratio": {name: ratio(times, name, "library")._asdict() for name in compared},
            "refused": checked.refused, "wrong": faults,
        })
    return entries


def table(entries: Sequence[dict[str, Any]]) -> str:
    """Markdown: the plain layer's milliseconds and every variant's ratio to it; a dash for what did not run. Below, the
    geometric means over the layers that a variant ran."""
    variants = [name for name in EVERY if name != "library" and any(name in e["ratio"] for e in entries)]
    lines = ["| layer | batch | numbers | direction | library, ms |" + "".join(f" {name} |" for name in variants)]
    lines.append("|---|---|---|---|---|" + "---|" * len(variants))
    for e in entries:
        if "library" not in e["ratio"]:
            continue
        cells = [f"{e['ratio'][name]['median']:.3f}" if name in e["ratio"] else "-" for name in variants]
        plain = statistics.median(e["seconds"]["library"]) * 1e3
        row = [e["layer"], str(e["batch"]), e["dtype"], e["direction"], f"{plain:.3f}", *cells]
        lines.append(f"| {' | '.join(row)} |")
    for dtype, direction in itertools.product(DTYPES, DIRECTIONS):
        own = [e for e in entries if (e["dtype"], e["direction"]) == (dtype, direction) and "library" in e["ratio"]]
        if own:
            means = [_geometric_mean([e["ratio"][v]["median"] for e in own if v in e["ratio"]]) for v in variants]
            lines.append(f"| geometric mean | | {dtype} | {direction} | | {' | '.join(means)} |")
    return "\n".join(lines)


def lacking(entries: Sequence[dict[str, Any]]) -> list[str]:
    """The variants that the entries say nothing of: the benchmark had none of them when they were measured."""
    known = {name for e in entries for part in ("ratio", "refused", "wrong") for name in e.get(part, ())}
    return [name for name in EVERY if name not in known]


def _geometric_mean(values: Sequence[float]) -> str:
    return f"{math.exp(statistics.fmean(map(math.log, values))):.3f} ({len(values)})" if values else "-"


def main(argv: list[str] | None = None) -> int:
    """The command; 0, 1 where a variant's numbers are wrong or nothing was measured, 130 where it was interrupted."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.layers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", help="where the layers run, such as cuda (default cpu)")
    parser.add_argument("--batch", nargs="+", action=EachOnce, type=int, default=[16],
                        help="examples a step (default 16)")
    parser.add_argument("--numbers", nargs="+", action=EachOnce, choices=list(DTYPES),
                        help="float32, tf32, bfloat16 or float16 (default float32 and bfloat16 on a CPU, else all)")
    parser.add_argument("--all-shapes", action="store_true",
                        help="every layer of bench/shapes.py, and torch.compile for each")
    parser.add_argument("--rounds", type=int, default=11, help="interleaved rounds, if there is time (default 11)")
    parser.add_argument("--seconds", type=float, default=120, help="start no layer after so many seconds (default 120)")
    parser.add_argument("--out", type=out_file, help="write a JSON result file there, after every layer")
    options = parser.parse_args(argv)
    try:
        device = device_named(options.device)
    except ValueError as error:
        parser.error(f"--device: {error}")
    if min(options.batch) < 1:
        parser.error(f"--batch is {min(options.batch)}; expected positive numbers")
    if not 0 < options.seconds < math.inf:
        parser.error(f"--seconds is {options.seconds}; expected a positive number")
    if options.rounds < 1:
        parser.error(f"--rounds is {options.rounds}; expected a positive number")
    numbers = options.numbers or dtypes(device)
    if wrong := sorted(set(numbers) - set(dtypes(device))):
        known = ", ".join(dtypes(device))
        parser.error(f"--numbers has {', '.join(wrong)}; on a device of type {device.type} expected {known}")
    return run([(job, batch) for batch in options.batch for job in chosen(numbers, options.all_shapes)], device,
               options.rounds, options.seconds, options.out)


def run(
    jobs: Sequence[tuple[Job, int]], device: torch.device, rounds: int, seconds: float, out: Path | None = None
) -> int:
    """Measure the layers that the time allows, write them where asked to, print the table; the exit code."""
    keep_memory()
    end = time.monotonic() + seconds
    entries: list[dict[str, Any]] = []
    left_out = []
    for done, (job, batch) in enumerate(jobs):
        label = f"{job.case.name} batch {batch} {job.dtype}"
        left = end - time.monotonic()
        if left <= 0:
            left_out.append(label)
            continue
        try:
            checked = job.layer(batch, device)
            with checked.precision(), mk.override():
                # half of what is left: making, checking and compiling take the other
                entries += measure(checked, rounds, left / (len(jobs) - done) / 2)
        except KeyboardInterrupt:
            return interrupted("layers", out if entries else None)
        print(f"{done + 1}/{len(jobs)} {label}", flush=True)
        if out:
            write(out, "layers", entries, device)
    print(f"\n{table(entries)}")
    both = [e for e in entries if e["direction"] == "both"]
    faults = [f"{e['layer']} {e['dtype']} {name}: {why}" for e in both for name, why in e["wrong"].items()]
    if reasons := {(name, why) for e in both for name, why in e["refused"].items()}:
        print("\nnot timed:", *(f"{name}: {why}" for name, why in sorted(reasons)), sep="\n  ")
    if faults:
        print("\nwrong, and without a time:", *faults, sep="\n  ")
    if left_out:
        print("\nleft out for lack of time:", *left_out, sep="\n  ")
    if not entries:
        print("\nnothing was measured")
    elif out:
        print(f"\nwritten: {out}")
    return 1 if faults or not entries else 0


if __name__ == "__main__":
    sys.exit(main())

"""Correctness, timings and a profile of the GPU kernels in one run: `python -m bench.gpu --out FOLDER`.

Correctness: every strategy of every layer in bench/shapes.py by Triton's kernels and by the compiled core's, y and all
gradients, against float64 on the same GPU. Of a backend that is not there the report says why; the other is measured.
A variant that is wrong there gets no time in those numbers, nor does one that is wrong at the batch that is timed, by
the same comparison; where anything is wrong no record is written, from which strategies would be chosen.
Timings: each layer by each variant of bench/layer_variants.py at batch 128, 16 and 1024, forward and forward +
backward; GPU time from CUDA graphs, host time by the clock, medians of interleaved rounds, as ratios to the library's
layer followed by its activation. The fraction of the roofline takes the bytes and operations that the gated layer needs
at least over ceilings measured in the same run. Calls cycle through up to 8 inputs; where those fit into twice the
last-level cache all the same, the entry says `cached`, and its times are those of warm inputs. torch.compile takes
part at the first batch, in TF32, for the layers of each network with the most operations. Gates, folds and epilogues of
large tensors are held against the copy's bandwidth (bench/gpu_memory.py). A time budget stops the run between layers;
what was left out is listed, and so is what failed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from mrvae_models.networks import build

import mrvae_kernels as mk
from mrvae_kernels import measurements
from mrvae_kernels.measuring import inputs_of_layers, time_backends

from . import gpu_memory
from .arguments import EachOnce
from .gpu_correctness import LIMITS, NUMBERS, checked, errors, failures, faults
from .gpu_layers import time_case
from .gpu_prepare import prepare
from .gpu_report import fused_where_chosen, record, side_by_side, table
from .gpu_timing import ceilings, failure, synchronize
from .layer_variants import BACKENDS, GatedCase, absent, ours
from .records import machine
from .shapes import BATCHES, CASES, Case, in_turn, largest

BACKEND_NAMES = {"cpp": "compiled core's CUDA kernels", "triton": "Triton kernels"}


def backends_of_a_network(device: torch.device, rounds: int, failures: list[str]) -> dict[str, measurements.Times]:
    """Milliseconds of a whole network's gates, folds, epilogues and fused products on each backend: the MNIST CNN,
    batch 128. What fails on one of them goes to `failures`."""
    model = mk.multirate(build("cnn", (1, 28, 28))).to(device)
    inputs = inputs_of_layers(model, (torch.rand(128, 1, 28, 28, device=device),), {"beta": 0.5})
    return time_backends(model, inputs, 0.5, rounds, failures)


def profile(device: torch.device) -> str:
    """torch.profiler's table of the kernels of one layer's forward and backward by each of our variants."""
    gated = GatedCase(CASES[1], 128, torch.float32, device)
    with mk.override():
        steps = []
        for name in ours(device):
            step = gated.steps(name, True)
            try:
                step()
            except ValueError:
                continue  # a strategy that refuses this layer
            steps.append(step)
        activities = [torch.profiler.ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        with torch.profiler.profile(activities=activities) as events:
            for step in steps:
                step()
            synchronize(device)
    order = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    return events.key_averages().table(sort_by=order, row_limit=40)


# ---- the run ---------------------------------------------------------------------------------------------------------


class Run:
    """One run's report, written after every case, and what went wrong in it."""

    def __init__(self, cases: list[Case], device: torch.device, options: argparse.Namespace) -> None:
        self.cases, self.device, self.options = in_turn(cases), device, options
        self.deadline = time.monotonic() + options.seconds
        self.name = measurements.device_name(device)
        self.versions = measurements.installed_versions()
        self.absent = absent(device)
        self.known: dict[tuple[str, str, str], dict[str, str]] = {}  # network, layer, numbers -> what is wrong
        core = {} if "cpp" in self.absent else {"core": mk.ops.build_facts()}
        self.report: dict[str, Any] = {
            "machine": {**machine(device), "device": self.name, **self.versions, **core}, "command": sys.argv[1:],
            "absent": self.absent, "seconds": {}, "correctness": [], "results": [], "memory": [], "left_out": [],
            "failed": [], "wrong": [],
        }
        stem = measurements.file_name(self.name).removesuffix(".json")
        self.path = options.out / f"{stem}-{self.report['machine']['date']}.json"

    def write(self) -> None:
        """The report as it is, whole or not at all."""
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.report))
        os.replace(part, self.path)

    @contextmanager
    def part(self, name: str, guarded: bool = False) -> Iterator[None]:
        """Notes the seconds that a part takes; guarded: and that it failed, which does not end the run."""
        start = time.monotonic()
        try:
            yield
        except Exception as error:
            if not guarded:
                self.report["failed"].append(f"{name}: {type(error).__name__}: {error}")
                raise
            self.report["failed"].append(f"{name}: {failure(error, self.device)}")
            print(self.report["failed"][-1], flush=True)
        finally:
            self.report["seconds"][name] = round(time.monotonic() - start, 1)
            self.write()
            print(f"[{self.report['seconds'][name]:.1f} s] {name}", flush=True)

    def late(self, label: str) -> bool:
        """Whether the time is up, in which case the label is listed as left out."""
        if time.monotonic() > self.deadline:
            self.report["left_out"].append(label)
            return True
        return False

    def prepare(self) -> None:
        """Compile Triton's kernels of what follows, in that order, for a third of the time at most."""
        options = self.options
        smallest = [] if options.no_correctness else [min(options.batch)]
        todo = [(case, batch, precision) for batch in smallest for precision in LIMITS for case in self.cases]
        for batch in () if options.no_timing else options.batch:
            if batch not in smallest:
                todo += [(case, batch, precision) for case in self.cases for precision in options.precision]
        seconds = min(options.seconds / 3, self.deadline - time.monotonic())
        done = prepare(todo, self.device, seconds, options.prepare)
        print(f"compiled ahead: {done} of {len(todo)}", flush=True)

    def correctness(self) -> None:
        """What is wrong; exact products first, at the smallest batch."""
        for precision in LIMITS:
            for case in self.cases:
                if self.late(f"correctness: {case.name} {precision}"):
                    continue
                found = errors(case, min(self.options.batch), precision, self.device)
                self.report["correctness"].append(found)
                self.known[case.network, case.name, precision] = faults(found)
                label = f"{case.name} batch {found['batch']} {precision}"
                self.wrong([f"{label} {name}: {why}" for name, why in faults(found).items()])
                self.failed([f"{label} {name}: {why}" for name, why in failures(found).items()])
                self.write()
        compared, wrong = len(self.report["correctness"]), sum(map(len, self.known.values()))
        print(f"correctness: {compared} layers and precisions, {wrong} wrong", flush=True)

    def memory(self) -> None:
        """The memory-bound operators' share of the copy bandwidth."""
        if self.late("memory-bound operators"):
            return
        bandwidth, numel = self.report["ceilings"]["bytes"], gpu_memory.largest_tensor(self.device)
        self.report["memory"], failed = gpu_memory.share_of_bandwidth(self.device, bandwidth, numel)
        self.failed(failed)

    def failed(self, lines: list[str]) -> None:
        self.report["failed"] += lines
        print(*lines, sep="\n", end="\n" if lines else "", flush=True)

    def wrong(self, lines: list[str]) -> None:
        self.report["wrong"] += lines
        print(*(f"wrong: {line}" for line in lines), sep="\n", end="\n" if lines else "", flush=True)

    def timings(self) -> None:
        """Every case in every precision, batch by batch."""
        options = self.options
        compiled = [] if options.no_compile else largest(self.cases, options.compiled)
        with_compiled = (options.batch[0], "tf32" if "tf32" in options.precision else options.precision[0])
        for batch in options.batch:
            for case in self.cases:
                for precision in options.precision:
                    label = f"{case.name} batch {batch} {precision}"
                    if self.late(label):
                        continue
                    known = self.known.get((case.network, case.name, precision), {})
                    try:
                        result = time_case(
                            case, batch, precision, self.device, self.report["ceilings"], options.rounds,
                            case in compiled and (batch, precision) == with_compiled, known,
                        )
                        self.report["results"].append(result)
                        found = {name: why for name, why in result["wrong"].items() if name not in known}
                        self.wrong([f"{label} {name}: {why}" for name, why in found.items()])
                        failed = [f"{label} {name}: {text}" for name, text in result["failed"].items()]
                    except Exception as error:
                        failed = [f"{label}: {failure(error, self.device)}"]
                    self.failed(failed)
                    torch._dynamo.reset()
                    torch.get_device_module(self.device).empty_cache() if self.device.type != "cpu" else None
                    self.write()


def run(cases: list[Case], device: torch.device, options: argparse.Namespace, size: int = 8192) -> int:
    """Everything, and the exit code: 1 if something is wrong, failed, or was asked for and not reached at all."""
    options.out.mkdir(parents=True, exist_ok=True)
    this = Run(cases, device, options)
    report = this.report
    with this.part("ceilings"):
        report["ceilings"] = ceilings(device, max(1, size // 4), size)
    print(", ".join(f"{key} {value:.4g}/s" for key, value in report["ceilings"].items()), flush=True)
    missing = [f"left out, the {BACKEND_NAMES[backend]}: {why}" for backend, why in this.absent.items()]
    print(*missing, sep="\n", end="\n" if missing else "", flush=True)
    if options.prepare and "triton" not in this.absent:
        with this.part("compiling ahead", guarded=True):
            this.prepare()
    if not options.no_correctness:
        with this.part("correctness"):
            this.correctness()
    if not options.no_timing:
        with this.part("memory-bound operators", guarded=True):
            this.memory()
        with this.part("timings"):
            this.timings()
    results = [found for found in report["results"] if all("library" in found[k]["ratio"] for k in ("forward", "both"))]
    if results:
        with this.part("backends", guarded=True):
            failures: list[str] = []
            report["backends"] = backends_of_a_network(device, options.rounds, failures)
            this.failed([f"backends: {line}" for line in failures])
        if not report["wrong"]:
            measured = record(results, report.get("backends", {}), this.cases)
            measurements.write(options.out / measurements.file_name(this.name), this.name, this.versions, measured)
        with this.part("profile", guarded=True):
            (options.out / "profile.txt").write_text(profile(device))
        for kind in ("forward", "both"):
            print(f"\n{kind}: GPU time over the library's\n{table(results, kind)}")
        if compared := side_by_side(results):
            print(f"\nthe backends side by side, geometric means\n{compared}")
        print("", *fused_where_chosen(results), sep="\n")
    if report["memory"]:
        print(f"\nmemory-bound operators: share of the copy bandwidth\n{gpu_memory.table(report['memory'])}")
    print("", *missing, sep="\n", end="\n" if missing else "")
    if report["left_out"]:
        print(f"\nleft out for lack of time: {len(report['left_out'])}", *report["left_out"], sep="\n  ")
    if report["wrong"]:
        print("\nwrong, and without a time; so no record was written that strategies would be chosen by",
              *report["wrong"], sep="\n  ")
    unreached = [
        part for part, asked, reached in (
            ("correctness", not options.no_correctness, any(map(checked, report["correctness"]))),
            ("timings", not options.no_timing, bool(results)),
        ) if asked and not reached
    ]
    print(f"\nwritten: {this.path}" + "".join(f"; nothing came of {part}" for part in unreached))
    return 1 if report["wrong"] or report["failed"] or unreached else 0


def main(argv: list[str] | None = None) -> int:
    """The command; 0, 1 for a kernel that is wrong or nothing reached, 2 where nothing can be measured."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the result files")
    parser.add_argument("--networks", nargs="+", action=EachOnce, choices=sorted({case.network for case in CASES}),
                        help="the networks whose layers are measured (default all)")
    parser.add_argument("--batch", nargs="+", action=EachOnce, type=int, default=list(BATCHES),
                        help="batch sizes, in this order; correctness takes the smallest "
                        f"(default {' '.join(map(str, BATCHES))})")
    parser.add_argument("--precision", nargs="+", action=EachOnce, choices=list(NUMBERS), default=list(NUMBERS),
                        help="of the timings: exact float32 products, TF32's, bfloat16 (default all)")
    parser.add_argument("--rounds", type=int, default=15,
                        help="interleaved rounds whose median is taken (default 15); the host's time takes a third")
    parser.add_argument("--prepare", nargs="?", type=int, const=8, default=0, metavar="PROCESSES",
                        help="compile Triton's kernels in so many processes first (8), for a third of the time at most")
    parser.add_argument("--compiled", type=int, default=1, metavar="N",
                        help="torch.compile takes part in N layers a network (default 1)")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
    parser.add_argument("--no-correctness", action="store_true", help="timings only")
    parser.add_argument("--no-timing", action="store_true", help="correctness only")
    parser.add_argument("--seconds", type=float, default=540, help="start nothing new after this long (default 540)")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("bench.gpu: torch finds no GPU; this benchmark measures one", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    reasons = absent(device)
    if not set(BACKENDS) - set(reasons):
        print(f"bench.gpu: {'; '.join(f'{backend}: {why}' for backend, why in reasons.items())}", file=sys.stderr)
        return 2
    cases = [case for case in CASES if not options.networks or case.network in options.networks]
    return run(cases, device, options)


if __name__ == "__main__":
    sys.exit(main())

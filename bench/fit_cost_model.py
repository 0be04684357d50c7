"""Fit the cost model of fold and epilogue to this machine's CPU: `python -m bench.fit_cost_model`.

Networks of one or four equal layers side by side are trained plain, folded and by the epilogue, interleaved in one
process, by the compiled core with one beta a batch. What gating adds to a step is fitted, for each strategy and each
kind of product, as

    step + layers (layer + weight W + output Y)

with W and Y the elements of a layer's weight and output: non-negative least squares on the medians of the rounds'
differences, in units of the plain step's time, which is what overhead is a share of. `step`, what a gated network costs
once, is the same whatever is chosen and left out of the model. bfloat16 is measured as networks are trained in it,
float32 weights under autocast.

Printed are the fit's errors, how often the model picks the faster strategy, and the regret: the time lost by its wrong
picks, over the plain step's, on the networks that it was fitted to, and held out: each layer's picks by a fit to all
other layers. Where the regret held out is no less than that of always taking the epilogue, the model of that kind and
numbers always takes it. --install writes the coefficients to the user's cache folder, where they win over the
package's, or into the package itself (mrvae_kernels/measured/cost_model.json) for whoever develops it.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import itertools
import math
import random
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

import mrvae_kernels as mk
from mrvae_kernels import cost_model, measurements, ops
from mrvae_kernels.cost_model import KINDS, NUMBERS

from .arguments import EachOnce, out_file
from .cost_fit import STRATEGIES, Point, fit_all, table
from .records import machine, write
from .shapes import CONV, LINEAR, TRANSPOSED, Case
from .timing import interleave, keep_memory

COPIES = 4
MOST_OPERATIONS = 3e8
"""Of a layer's forward: beside larger products what gating adds drowns in the noise of the plain step."""
MOST_ELEMENTS = 1_500_000
"""Of a weight or an output that is measured four times in one network; larger ones stand alone."""
LATE = 2.5
"""Times --seconds, after which no network is begun: a quiet machine takes twice as long, warming up included."""
BATCHES = (16, 128)
GRID: list[tuple[Case, int]] = [
    (Case("grid", kind, arguments, {}, shape, "none"), batch)
    for kind, rows in (
        (LINEAR, (
            ((16, 300), (16,)), ((300, 32), (300,)), ((784, 300), (784,)), ((300, 784), (300,)), ((1024, 32), (1024,)),
            ((32, 2048), (32,)), ((1200, 1200), (1200,)), ((32, 16384), (32,)), ((1200, 4096), (1200,)),
        )),
        (CONV, (
            ((1, 32, 4, 2, 1), (1, 28, 28)), ((32, 64, 4, 2, 1), (32, 14, 14)), ((64, 64, 3, 1, 1), (64, 8, 8)),
            ((16, 16, 3, 1, 1), (16, 16, 16)), ((64, 384, 1), (64, 8, 8)), ((128, 256, 4, 2, 1), (128, 14, 14)),
            ((128, 256, 3, 2, 1), (128, 4, 4)), ((256, 512, 4, 2, 1), (256, 3, 3)),
            ((512, 1024, 4, 2, 1), (512, 3, 3)),
        )),
        (TRANSPOSED, (
            ((64, 32, 4, 2, 1), (64, 7, 7)), ((32, 1, 4, 2, 1), (32, 14, 14)), ((256, 128, 3, 2, 1, 1), (256, 4, 4)),
        )),
    )
    for arguments, shape in rows for batch in BATCHES
]
"""Small and large weights with small and large outputs; those of more than MOST_OPERATIONS are left out."""


class Side(nn.Module):
    """Copies of a layer side by side."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, *inputs: torch.Tensor) -> list[torch.Tensor]:
        return [layer(x) for layer, x in zip(self.layers, inputs, strict=True)]


def steps(case: Case, batch: int, layers: int, numbers: str) -> dict[str, Callable[[], object]]:
    """Forward and backward of the plain network, folded, and by the epilogue, on inputs that take turns."""
    torch.manual_seed(0)
    plain = Side([case.layer("cpu") for _ in range(layers)])
    inputs = [
        [torch.randn(batch, *case.shape, requires_grad=True) for _ in range(layers)] for _ in range(4)
    ]
    dtype = NUMBERS[numbers]
    cast = torch.autocast("cpu", dtype) if dtype != torch.float32 else contextlib.nullcontext()
    with cast:
        grads = [torch.randn_like(y) for y in plain(*inputs[0])]

    def step_of(model: nn.Module, strategy: str, **beta: float) -> Callable[[], object]:
        parameters, turns = list(model.parameters()), itertools.cycle(inputs)

        def step() -> object:
            xs = next(turns)
            with mk.override(strategy, "cpp"):  # around the plain network too, for its microseconds
                with cast:
                    outputs = model(*xs, **beta)
                return torch.autograd.grad(outputs, [*xs, *parameters], grads)

        return step

    gated = mk.multirate(copy.deepcopy(plain), gates="sigmoid")
    return {
        "plain": step_of(plain, "fold"),
        **{name: step_of(copy.deepcopy(gated), name, beta=0.5) for name in STRATEGIES},
    }


def measure(case: Case, batch: int, layers: int, numbers: str, seconds: float, rounds: int) -> Point:
    """The network's times, taking about so many seconds."""
    weights = case.layer().get_parameter("weight").numel()
    kind = KINDS[case.kind is not LINEAR]
    turn = seconds / (3 * rounds)
    times = interleave(steps(case, batch, layers, numbers), rounds, turn, 1, limit=2 * seconds)
    return Point(case.name, kind, numbers, batch, layers, weights, case.outputs(batch), times)


def networks() -> list[tuple[Case, int, int]]:
    """The grid's layers, batches and copies. The smallest stand alone and together, which tells what a layer costs
    from what a step costs."""
    found = []
    for case, batch in GRID:
        largest = max(case.layer().get_parameter("weight").numel(), case.outputs(batch))
        if case.operations(batch) <= MOST_OPERATIONS:
            alone = largest > MOST_ELEMENTS or batch == BATCHES[0]
            found += [(case, batch, 1)] * alone + [(case, batch, COPIES)] * (largest <= MOST_ELEMENTS)
    return found


# ---- the command -----------------------------------------------------------------------------------------------------


def entry(point: Point) -> dict[str, Any]:
    """A point as an entry of the result file."""
    extra = {name: point.extra(name) for name in STRATEGIES}
    return {**point._asdict(), "extra": extra, "faster": min(extra, key=extra.__getitem__), "noise": point.noise}


def main(argv: list[str] | None = None) -> int:
    """The command; 0, 1 where the machine was too busy, 2 without a compiled core or a folder to write to."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.fit_cost_model", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--numbers", nargs="+", action=EachOnce, choices=list(NUMBERS), default=list(NUMBERS),
                        help="float32, bfloat16 by autocast (default both)")
    parser.add_argument("--seconds", type=float, default=40,
                        help="of measuring, all networks together (default 40); warming up takes as long again, and "
                        "after 2.5 times as long nothing is begun")
    parser.add_argument("--rounds", type=int, default=11, help="interleaved rounds a network, 2 at least (default 11)")
    parser.add_argument("--out", type=out_file, help="write a JSON result file with the raw timings and the fit there")
    parser.add_argument("--install", choices=("user", "package"),
                        help="write the coefficients to the user's cache folder (MRVAE_CACHE), or into the package")
    options = parser.parse_args(argv)
    if not 0 < options.seconds < math.inf:
        parser.error(f"--seconds is {options.seconds}; expected a positive number")
    if options.rounds < 2:
        parser.error(f"--rounds is {options.rounds}; expected 2 or more, for a spread to be seen")
    if not ops.EXTENSION:
        print(f"bench.fit_cost_model: there is nothing to fit: {ops.EXTENSION_ERROR}", file=sys.stderr)
        return 2
    target = cost_model.user_file() if options.install == "user" else measurements.SHIPPED / cost_model.FILE
    if options.install and target is None:
        print("bench.fit_cost_model: there is no home folder; set MRVAE_CACHE to a folder that can be written",
              file=sys.stderr)
        return 2
    keep_memory()
    started, jobs = time.monotonic(), [(*job, numbers) for job in networks() for numbers in options.numbers]
    random.Random(0).shuffle(jobs)  # what another program disturbs, and what there is no time for, is of every kind
    points: list[Point] = []
    for number, (case, batch, layers, numbers) in enumerate(jobs):
        if time.monotonic() - started > LATE * options.seconds:
            print(f"the time is up: {len(jobs) - number} networks are left out")
            break
        points.append(measure(case, batch, layers, numbers, options.seconds / len(jobs), options.rounds))
        p = points[-1]
        extra = ", ".join(f"{name} {p.extra(name) / p.plain:+.3f}" for name in STRATEGIES)
        print(f"{number + 1}/{len(jobs)} {layers} x {p.name} batch {batch} {numbers}: {p.plain * 1e3:.2f} ms, {extra}",
              flush=True)
    try:
        models, fits = fit_all(points, machine()["kind"])
    except ValueError as error:
        print(f"bench.fit_cost_model: {error}", file=sys.stderr)
        return 1
    print(f"\n{table(fits)}\n\n{time.monotonic() - started:.0f} s")
    if options.out:
        write(options.out, "cost-model", [*map(entry, points), *fits])
        print(f"written: {options.out}")
    if options.install:
        assert target is not None
        try:
            cost_model.write(target, models)
        except OSError as error:
            print(f"bench.fit_cost_model: {target} cannot be written ({error}); set MRVAE_CACHE to a folder that can",
                  file=sys.stderr)
            return 2
        print(f"installed: {target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

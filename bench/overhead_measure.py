"""What is measured of one network and batch: seconds, peak memory, launches and host time a step, and inference.

An entry of the result file. One of training steps has

    case, batch, mode, numbers      which; mode is "eager", "compiled" or "graph"
    seconds      variant -> raw seconds a step, one a round
    ratio        variant -> its time over the ungated network's: median, low, high
    peak_bytes   variant -> weights, Adam's moments, gradients, activations and temporaries at a step's peak
    gate_bytes   of those, what gates, their moments and their gradients take
    host_seconds variant -> raw seconds until a step is launched, of a GPU's; None on a CPU
    launches     variant -> kernels a step, of a GPU's; None on a CPU
    parameters   variant -> trained numbers
    refused      variant -> why it has no time
    left_out     why nothing was measured, or None

One of inference (mode "inference") has seconds and ratio of "plain" and "baked", and `same_kernels` and `kernels`.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import mrvae_kernels as mk

from .gpu_timing import failure, host_times
from .overhead_check import References, refusal
from .overhead_networks import OURS
from .timing import LEAST_ROUNDS, Step, interleave, launched, ratio
from .variants import Network, TrainingStep, parameter_count, step_bytes, training_step

BASELINE = "ungated"
WAITING_LAUNCHES = 512
"""A GPU's queue holds about a thousand launches; with more in it the host waits, and its time is the GPU's."""

DEPTHS = (2, 4, 8)
Entry = dict[str, Any]


class Effort(NamedTuple):
    """rounds: at most; seconds: that a variant runs in a round; limit: of an entry's rounds together, in seconds, of
    inference half as many; until: the time.monotonic() by which an entry has ended, measured or given up."""

    rounds: int = 40
    seconds: float = 0.02
    limit: float = 12.0
    until: float = math.inf

    def rounds_limit(self, part: float = 1.0) -> float:
        """Seconds that the rounds may take now."""
        return max(0.0, min(self.limit * part, self.until - time.monotonic()))


def too_long(variants: int, steps: int, seconds: float, step_seconds: float, effort: Effort) -> str | None:
    """Why an entry is given up after some of its variants, if it is: what is left would end too late.

    variants: how many must still be checked, each taking `seconds`; steps: how many will take part in the rounds, at
    `step_seconds` each: LEAST_ROUNDS, and two to warm up.
    """
    needed = variants * seconds + steps * (LEAST_ROUNDS + 2) * step_seconds
    if (left := effort.until - time.monotonic()) >= needed:
        return None
    return f"the time is up: it would take about {needed:.0f} s more, {max(left, 0):.0f} s are left"


def empty(case: str, batch: int, mode: str, numbers: str, left_out: str | None = None) -> Entry:
    """An entry without measurements, and why."""
    return {
        "case": case, "batch": batch, "mode": mode, "numbers": numbers, "left_out": left_out, "seconds": {},
        "ratio": {}, "peak_bytes": {}, "gate_bytes": 0, "host_seconds": None, "launches": None, "parameters": {},
        "refused": {},
    }


def train(
    make: Callable[[str], TrainingStep], variants: Iterable[str], effort: Effort,
    check: Callable[[TrainingStep, References], str | None] = refusal,
) -> Entry:
    """The measurements of the variants' steps, which `make` makes; those that are wrong or fail are refused a time.

    A step may be anything with TrainingStep's attributes. Ratios are to "ungated": where that is refused nothing is
    timed. Nor is where the variants so far took so long that the rest would end after `effort.until`.
    """
    references = References()
    entry = empty("", 0, "", "")
    steps: dict[str, TrainingStep] = {}
    names = list(variants)
    checked = stepped = 0.0  # seconds that the slowest variant took, and its step
    for done, name in enumerate(names):
        if why := too_long(len(names) - done, len(names), checked, stepped, effort):
            return {**empty("", 0, "", "", why), "refused": entry["refused"]}
        step, began = None, time.monotonic()
        try:
            step = make(name)
            entry["parameters"][name] = parameter_count(step.model)
            reason = check(step, references)
            if reason is None:
                twice = time.monotonic()
                entry["peak_bytes"][name] = step_bytes(step)
                stepped = max(stepped, (time.monotonic() - twice) / 2)
        except Exception as error:
            reason = failure(error, torch.device("cpu") if step is None else step.device).partition("\n")[0]
        if reason is None:
            assert step is not None
            steps[name] = step
        else:
            entry["refused"][name] = reason
            entry["peak_bytes"].pop(name, None)
        checked = max(checked, time.monotonic() - began)
    if BASELINE not in steps:
        why = entry["refused"].get(BASELINE, "it was not asked for")
        entry["left_out"] = f"there is no {BASELINE} step to hold the others against: {why}"
        return entry
    references.known.clear()
    device = next(iter(steps.values())).device
    entry["gate_bytes"] = gate_bytes(steps)
    entry["seconds"] = interleave(steps, effort.rounds, effort.seconds, 1, effort.rounds_limit(), device)
    entry["ratio"] = {name: ratio(entry["seconds"], name, BASELINE)._asdict() for name in steps}
    if device.type == "cuda":
        entry["launches"] = {name: len(launched(step, device)) for name, step in steps.items()}
        calls = max(1, WAITING_LAUNCHES // max(1, *entry["launches"].values()))
        times = host_times(steps, device, effort.rounds, calls)
        entry["host_seconds"] = {name: [ms / 1e3 for ms in values] for name, values in times.items()}
    return entry


def gate_bytes(steps: Mapping[str, TrainingStep]) -> int:
    """Bytes of a gated variant's gates, their gradients and two moments; 0 where none of ours is there."""
    for name in OURS:
        if name in steps:
            gates = steps[name].gates(lambda parameter: parameter.detach()).values()
            return 4 * sum(value.numel() * value.element_size() for pair in gates for value in pair)
    return 0


# ---- inference -------------------------------------------------------------------------------------------------------


BAKED_BETA = 0.5


def baked(step: TrainingStep, beta: float = BAKED_BETA) -> Network:
    """The gated step's network at one beta, baked, with its statistics from the step's first batches."""
    network: Any = mk.bake(step.model, beta, [draw.x for draw in step.inputs[:2]])  # type: ignore[arg-type]
    return network


def infer(
    plain: nn.Module, other: nn.Module, inputs: Sequence[Tensor], effort: Effort, autocast: bool = False
) -> Entry:
    """Times of two networks' forward passes without gradients, in eval mode, "plain" and "baked" (`other`).

    same_kernels: whether both launch the same kernels, on a CPU the same operators, in the same order.
    """
    device = inputs[0].device
    entry = empty("", 0, "inference", "")

    def forward(network: nn.Module) -> Step:
        network = copy.deepcopy(network).eval()
        count = 0

        @torch.no_grad()
        def run() -> None:
            nonlocal count
            count += 1
            with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
                network(inputs[count % len(inputs)])

        return run

    steps = {"plain": forward(plain), "baked": forward(other)}
    for run in steps.values():
        run()
    entry["kernels"] = {name: launched(run, device) for name, run in steps.items()}
    entry["same_kernels"] = entry["kernels"]["plain"] == entry["kernels"]["baked"]
    entry["seconds"] = interleave(steps, effort.rounds, effort.seconds, 3, effort.rounds_limit(1 / 2), device)
    entry["ratio"] = {"baked": ratio(entry["seconds"], "baked", "plain")._asdict()}
    return entry


# ---- launches --------------------------------------------------------------------------------------------------------


def launches_by_depth(
    device: torch.device, variants: Sequence[str] = ("ungated", "gated", "per-sample"),
    depths: Sequence[int] = DEPTHS, width: int = 256, batch: int = 128,
) -> dict[str, dict[int, int]]:
    """Variant -> hidden layers on either side -> kernels a training step launches, of an MLP; on a CPU operators.

    What gating adds does not grow with depth where the differences to "ungated" are the same.
    """
    counts: dict[str, dict[int, int]] = {name: {} for name in variants}
    for name in variants:
        for depth in depths:
            step = training_step(name, "mlp", (1, 28, 28), batch, device=device, hidden=(width,) * depth)
            for _ in range(3):
                step()
            counts[name][depth] = len(launched(step, device))
    return counts


def extra_launches(counts: Mapping[str, Mapping[int, int]], variant: str) -> list[int]:
    """What the variant launches more than the ungated network, by growing depth."""
    return [counts[variant][depth] - counts[BASELINE][depth] for depth in sorted(counts[variant])]

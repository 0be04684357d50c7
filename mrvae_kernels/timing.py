"""Steps of a model or an operator: which of them run, how long they take, and what they leave as it was."""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.utils._pytree import tree_leaves

from .measurements import Times

Step = Callable[[], object]


def running(steps: Mapping[str, Step], label: str, failures: list[str] | None) -> dict[str, Step]:
    """The steps that run; the others' errors go to `failures`, or are raised where that is None."""
    found = {}
    for name, step in steps.items():
        try:
            step()
        except Exception as error:
            if isinstance(error, torch.AcceleratorError):
                raise  # the device is lost to this process: not a matter of the step
            if name == "fused" and isinstance(error, ValueError):
                continue  # the kernels' own refusal of a layer
            if failures is None:
                raise
            failures.append(f"{label} by {name}: {type(error).__name__}: {error}")
        else:
            found[name] = step
    return found


def medians(
    steps: Mapping[str, Step], device: torch.device, rounds: int, label: str, failures: list[str] | None
) -> Times:
    """Median milliseconds of each step that runs."""
    times: dict[str, list[float]] = {}

    def measure() -> None:
        times.update(interleaved(steps, device, rounds))

    running({" and ".join(steps): measure} if steps else {}, label, failures)
    return {name: statistics.median(taken) for name, taken in times.items()}


def interleaved(steps: Mapping[str, Step], device: torch.device, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each step in each round; a round runs all of them, so that drift hits them alike.

    By events around five steps on a GPU, by the clock elsewhere. Nothing keeps the queue filled: a step whose kernels
    take less time than Python's launches of them costs what the launches cost, as it does in the user's eager loop. In
    a CUDA graph, where launches cost next to nothing, another one may be faster.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(_milliseconds(step, device))
    return times


def _milliseconds(step: Step, device: torch.device) -> float:
    if device.type == "cpu":
        start = time.perf_counter()
        step()
        return (time.perf_counter() - start) * 1e3
    module = torch.get_device_module(device)
    with module.device(device):
        begin, end = module.Event(enable_timing=True), module.Event(enable_timing=True)
        begin.record()
        for _ in range(5):
            step()
        end.record()
        end.synchronize()
    return float(begin.elapsed_time(end)) / 5


def tensors(value: Any, seen: set[int] | None = None) -> Iterator[Tensor]:
    """All tensors in nested containers, and in the attributes of dataclasses and of torch's distributions."""
    seen = set() if seen is None else seen
    for leaf in tree_leaves(value):
        if id(leaf) in seen:
            continue
        seen.add(id(leaf))
        if isinstance(leaf, Tensor):
            yield leaf
        elif dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            yield from tensors([getattr(leaf, field.name, None) for field in dataclasses.fields(leaf)], seen)
        elif isinstance(leaf, Distribution):
            yield from tensors(list(vars(leaf).values()), seen)


def backward(outputs: Any, leaves: Sequence[Tensor]) -> None:
    results = [out for out in tensors(outputs) if out.requires_grad]
    if results and leaves:
        torch.autograd.grad(results, leaves, [torch.ones_like(out) for out in results], allow_unused=True)


@contextlib.contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Buffers and random states are put back."""
    buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
    devices = [d.index or 0 for d in {b.device for b in model.parameters()} if d.type == "cuda"]
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            with torch.no_grad():
                for name, buffer in model.named_buffers():
                    buffer.copy_(buffers[name])

"""Compiling kernels ahead of a run, and measuring on the user's own device which strategy and backend win.

    warm_up(model, x, beta=0.5)      every kernel that a step needs is compiled; nothing else changes
    tune(model, x, beta=0.5)         block sizes, backends and strategies are timed for this model's shapes, and kept

Both run the model's forward and backward on the inputs given and leave gradients, buffers and random states alone.
Without them nothing is measured: strategy.py then keeps to its cost model and to plain PyTorch on a GPU.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from . import functional, measurements
from .adapters import FoldJob, fold_layers
from .gates import Beta
from .measurements import Record, Times
from .multirate import MultiRate
from .strategy import STRATEGIES, override, triton_refusals

Step = Callable[[], object]


def warm_up(model: nn.Module, *args: Any, **kwargs: Any) -> None:
    """Run model(*args, **kwargs) forward and, where something requires a gradient, backward.

    Triton compiles a kernel when it is first launched with new dtypes, block sizes or alignments, which takes a second
    or more: do this before timing, and before recording a CUDA graph. `.grad`, buffers (running statistics) and random
    states are as before afterwards.
    """
    with _preserved(model):
        _step(model, args, kwargs)()


def tune(model: MultiRate, *args: Any, beta: Beta, rounds: int = 20, **kwargs: Any) -> Record:
    """Time what a gated network can run for these inputs, keep the results, and return them.

    model(*args, beta=beta, **kwargs) is run as in training. Timed on the model's device, forward and backward, in
    interleaved rounds: each backend for the gates and the folds of all layers and for each layer's epilogue, then each
    strategy for each product layer. Block sizes of fused kernels are tuned first (triton_kernels.tuning.autotune). The
    record goes to `measurements.cache_folder()`, and strategy.py follows it from then on, here and in later processes,
    for every layer of the same shape class. Times are in milliseconds. Takes minutes, most of them Triton's compiler.

    RuntimeError where Triton's kernels do not run: on CPU tensors there is nothing to choose.
    """
    like = next(model.parameters())
    if refusals := triton_refusals(like.device, like.dtype):
        raise RuntimeError(f"tune measures Triton's kernels against plain PyTorch: {'; '.join(refusals)}")
    from .triton_kernels.tuning import autotune

    found: Record = {"backends": {}, "strategies": {}}
    with _preserved(model):
        inputs = inputs_of_layers(model, args, {**kwargs, "beta": beta})
        found["backends"] = time_backends(model, inputs, beta, rounds)
        best = {name: min(times, key=times.__getitem__) for name, times in found["backends"].items()}
        for i, x in inputs.items():
            with autotune():
                for step in _candidates(model, i, x, beta, best).values():
                    step()
            times = interleaved(_candidates(model, i, x, beta, best), like.device, rounds)
            layer, adapter = model._hosts()[i], model._entries[i].adapter
            product = adapter.measured_product(layer, x, x.device)
            if product is not None:
                key = product.key(model._gates(beta)[i].gate.dim() == 2)
                found["strategies"][key] = {name: statistics.median(taken) for name, taken in times.items()}
    name = measurements.device_name(like.device)
    versions = {"torch": torch.__version__, "triton": importlib.metadata.version("triton")}
    measurements.write(measurements.cache_folder() / measurements.file_name(name), name, versions, found)
    return found


def interleaved(steps: Mapping[str, Step], device: torch.device, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each step in each round; a round runs all of them, so that drift hits them alike.

    On a GPU by events around the launches, long enough that the queue does not run dry; elsewhere by the clock.
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
    begin, end = module.Event(enable_timing=True), module.Event(enable_timing=True)
    begin.record()
    for _ in range(5):
        step()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 5


def _step(model: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> Step:
    parameters = [p for p in model.parameters() if p.requires_grad]

    def step() -> None:
        _backward(model(*args, **kwargs), parameters)

    return step


def _backward(outputs: Any, leaves: Sequence[Tensor]) -> None:
    results = [out for out in tree_leaves(outputs) if isinstance(out, Tensor) and out.requires_grad]
    if results and leaves:
        torch.autograd.grad(results, leaves, [torch.ones_like(out) for out in results], allow_unused=True)


@contextlib.contextmanager
def _preserved(model: nn.Module) -> Iterator[None]:
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


def inputs_of_layers(model: MultiRate, args: Any, kwargs: Mapping[str, Any]) -> dict[int, Tensor]:
    """The first input that each product layer sees in a forward pass, by the layer's index; without its gradient."""
    seen: dict[int, Tensor] = {}

    def note(index: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
            seen.setdefault(index, inputs[0].detach())

        return hook

    hosts = zip(model._hosts(), model._entries, strict=True)
    handles = [
        layer.register_forward_pre_hook(note(i)) for i, (layer, entry) in enumerate(hosts) if entry.adapter.product
    ]
    try:
        with torch.no_grad():
            model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def time_backends(model: MultiRate, inputs: dict[int, Tensor], beta: Beta, rounds: int) -> dict[str, Times]:
    """Milliseconds of each operator on each backend: the gates and folds of all layers, and all layers' epilogues."""
    gates = [g.gate.detach().requires_grad_() for g in model._gates(beta)]
    own = [p for p in model.gate_parameters() if p.requires_grad]
    device = gates[0].device
    jobs = [
        FoldJob(layer, entry.adapter, gate if gate.dim() == 1 else gate[0], None)
        for layer, entry, gate in zip(model._hosts(), model._entries, gates, strict=True)
    ]
    outputs = {}
    for i, x in inputs.items():
        u = model._entries[i].adapter.run(model._hosts()[i], torch.ones_like(jobs[i].gate), None, None, "fold", x)
        outputs[i] = u.detach().requires_grad_()

    def all_gates() -> None:
        _backward([g.gate for g in model._gates(beta)], own)

    def all_folds() -> None:
        folded = [w for layer in fold_layers(jobs) for w in layer.values() if w is not None]
        _backward(folded, [p for p in model.network_parameters() if p.requires_grad])

    def all_epilogues() -> None:
        for i, u in outputs.items():
            dim = u.dim() - 1 if isinstance(model._hosts()[i], nn.Linear) else 1
            _backward(functional.epilogue(u, None, gates[i], None, dim), [u, gates[i]])

    operators = {"gates": all_gates, "fold": all_folds, "epilogue": all_epilogues}
    found = {}
    for name, step in operators.items():
        times = interleaved({b: _with_backend(step, b) for b in ("reference", "triton")}, device, rounds)
        found[name] = {backend: statistics.median(taken) for backend, taken in times.items()}
    return found


def _with_backend(step: Step, backend: str) -> Step:
    def run() -> None:
        with override(backend=backend):
            step()

    return run


def _candidates(
    model: MultiRate, index: int, x: Tensor, beta: Beta, backends: Mapping[str, str]
) -> dict[str, Step]:
    """Forward and backward of one layer by each strategy that can run it."""
    layer, adapter = model._hosts()[index], model._entries[index].adapter
    gate = model._gates(beta)[index].gate.detach().requires_grad_()
    x = x.detach().requires_grad_(x.is_floating_point())
    leaves = [x, gate, *(p for p in layer.parameters(recurse=False) if p.requires_grad)]

    def step(name: str) -> Step:
        def run() -> None:
            with override(backend=backends.get(name)):
                _backward(adapter.run(layer, gate, None, None, name, x), leaves)

        return run

    found = {}
    for name in STRATEGIES:
        if name == "fold" and gate.dim() == 2:
            continue
        if name == "fused" and triton_refusals(x.device, x.dtype, name):
            continue
        with contextlib.suppress(ValueError):  # a kernel that refuses this layer is no candidate
            step(name)()
            found[name] = step(name)
    return found

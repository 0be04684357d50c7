"""Compiling kernels ahead of a run, and measuring on the user's own device which strategy and backend win.

    warm_up(model, x, beta=0.5)      every kernel that a step needs is compiled; nothing else changes
    tune(model, x, beta=0.5)         block sizes, backends and strategies are timed for this model's shapes, and kept

Both run the model's forward and backward on the inputs given and leave gradients, buffers and random states alone.
Without them nothing is measured: strategy.py then keeps to its cost model and to plain PyTorch on a GPU.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from . import functional, measurements, strategy
from .adapters import FoldJob, fold_layers
from .backends import BACKENDS, refusals
from .gates import Beta
from .measurements import Record, Times
from .multirate import MultiRate
from .strategy import STRATEGIES, override
from .timing import Step, backward, medians, preserved, running, tensors

PURPOSE = "tune measures GPU kernels against plain PyTorch"
INTERPRETER_TOO = False
"""Whether `tune` measures Triton's interpreter, on CPU tensors: for its own tests."""


def warm_up(model: nn.Module, *args: Any, **kwargs: Any) -> None:
    """Run model(*args, **kwargs) forward and, where something requires a gradient, backward; twice, since a MultiRate's
    first call for new shapes makes the plan that the second follows, with other kernels.

    Triton compiles a kernel when it is first launched with new dtypes, block sizes or alignments, which takes a second
    or more: do this before timing, and before recording a CUDA graph. `.grad`, buffers (running statistics) and random
    states are as before afterwards. ValueError where parameters require a gradient and nothing in the output does.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    with preserved(model):
        for _ in range(2):
            outputs = model(*args, **kwargs)
            if parameters and torch.is_grad_enabled() and not any(t.requires_grad for t in tensors(outputs)):
                raise ValueError(
                    f"the model's output, a {type(outputs).__name__}, holds no tensor that requires a gradient, and "
                    f"{len(parameters)} parameters do: return what the loss is computed from, or call warm_up under "
                    "torch.no_grad() for the forward alone"
                )
            backward(outputs, parameters)


def tune(model: MultiRate, *args: Any, beta: Beta, rounds: int = 20, **kwargs: Any) -> Record:
    """Time what a gated network can run for these inputs, keep the results, and return them.

    model(*args, beta=beta, **kwargs) is run as in training. Timed on the model's device, forward and backward, in
    interleaved rounds: each backend for the gates and the folds of all layers and for each layer's epilogue, then each
    strategy for each product layer. Block sizes of fused kernels are tuned first (triton_kernels.tuning.autotune). The
    record goes to `measurements.cache_folder()`, layer by layer, and strategy.py follows it from then on, here and in
    later processes. Times are in milliseconds. Takes minutes, most of them Triton's compiler.

    Strategies are kept by shape class, for every layer of that class. Backends are kept by device and operator: the
    network tuned last decides for all networks on the device. `override` and MRVAE_STRATEGY do not count meanwhile.

    TypeError for anything but a MultiRate. RuntimeError where neither Triton's nor the compiled core's kernels run: on
    CPU tensors there is nothing to choose. Warnings for what failed or could not be written; what was measured is
    returned all the same.
    """
    if not isinstance(model, MultiRate):
        raise TypeError(f"tune takes the MultiRate that multirate() returned, not a {type(model).__name__}")
    like = next(model.parameters())
    why = {backend: refusals(backend, like.device, like.dtype) for backend in BACKENDS}
    if like.device.type == "cpu" and not INTERPRETER_TOO:
        raise RuntimeError(f"{PURPOSE}: the model is on the CPU; move it and its inputs to the GPU")
    if why["cpp"] and why["triton"]:
        raise RuntimeError(f"{PURPOSE}: {'; '.join([*why['cpp'], *why['triton']])}")
    tuned: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext
    if not why["triton"]:
        from .triton_kernels.tuning import autotune as tuned

    found: Record = {"backends": {}, "strategies": {}}
    failures: list[str] = []
    with preserved(model), _no_override(), torch.enable_grad():
        inputs = inputs_of_layers(model, args, {**kwargs, "beta": beta})
        found["backends"] = time_backends(model, inputs, beta, rounds, failures)
        best = {name: measurements.winner(times) for name, times in found["backends"].items()}
        writable = _keep(found, like.device)
        for i, x in inputs.items():
            layer, entry = model._hosts()[i], model._entries[i]
            label = f"layer {entry.name!r}"
            product = entry.adapter.measured_product(layer, x, x.device)
            if product is None:
                continue
            with tuned():
                steps = running(_candidates(model, i, x, beta, best), label, failures)
            times = medians(steps, like.device, rounds, label, failures)
            if times:
                found["strategies"][product.key(model._gates(beta)[i].gate.dim() == 2)] = times
                writable = writable and _keep(found, like.device)
    if failures:
        warnings.warn("tune could not run everything:\n  " + "\n  ".join(failures), stacklevel=2)
    return found


def _keep(found: Record, device: torch.device) -> bool:
    """Into the user's record; False, with a warning, where it cannot be written."""
    name, folder = measurements.device_name(device), measurements.cache_folder()
    try:
        if folder is None:
            raise OSError("there is no home folder; set MRVAE_CACHE to a folder that can be written")
        measurements.write(folder / measurements.file_name(name), name, {}, found)
    except OSError as error:
        warnings.warn(f"what tune measures is not kept, and not followed: {error}", stacklevel=3)
        return False
    return True


@contextlib.contextmanager
def _no_override() -> Iterator[None]:
    """Without what the user asked for, which `override` can change but not clear: all candidates are to run."""
    before = strategy._override
    strategy._override = strategy.Override()
    try:
        yield
    finally:
        strategy._override = before


def inputs_of_layers(model: MultiRate, args: Any, kwargs: Mapping[str, Any]) -> dict[int, Tensor]:
    """The first input that each product layer sees in a forward pass, by the layer's index; without its gradient."""
    seen: dict[int, Tensor] = {}

    def note(index: int) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def hook(layer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            seen.setdefault(index, (inputs[0] if inputs else named["input"]).detach())

        return hook

    hosts = zip(model._hosts(), model._entries, strict=True)
    handles = [
        layer.register_forward_pre_hook(note(i), with_kwargs=True)
        for i, (layer, entry) in enumerate(hosts) if entry.adapter.product
    ]
    try:
        with torch.no_grad():
            model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def time_backends(
    model: MultiRate, inputs: dict[int, Tensor], beta: Beta, rounds: int, failures: list[str] | None = None
) -> dict[str, Times]:
    """Milliseconds of each operator on each backend that takes it: the gates and folds of all layers, and all layers'
    epilogues and fused products.

    Without those that the network does not run: gates that are networks of their own have no operator, one beta a
    sample folds nothing, and norms and recurrent layers have no product for an epilogue. Errors go to `failures`; None
    raises them.
    """
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
        backward([g.gate for g in model._gates(beta)], own)

    def all_folds() -> None:
        folded = [w for layer in fold_layers(jobs) for w in layer.values() if w is not None]
        backward(folded, [p for p in model.network_parameters() if p.requires_grad])

    def all_epilogues() -> None:
        for i, u in outputs.items():
            dim = u.dim() - 1 - getattr(model._entries[i].adapter, "spatial", 0)  # also without a batch axis
            backward(functional.epilogue(u, None, gates[i], None, dim), [u, gates[i]])

    fusible = {i: x for i, x in inputs.items() if not model._entries[i].adapter.fused_refusal(model._hosts()[i], x)}

    def all_fused() -> None:
        for i, x in fusible.items():
            layer = model._hosts()[i]
            y = model._entries[i].adapter.run(layer, gates[i], None, None, "fused", x)
            backward(y, [gates[i], *(p for p in layer.parameters(recurse=False) if p.requires_grad)])

    operators: dict[str, Step] = {}
    if model.gate_networks is None:
        operators["gates"] = all_gates
    if gates[0].dim() == 1:
        operators["fold"] = all_folds
    if outputs:
        operators["epilogue"] = all_epilogues
    if fusible:
        operators["fused"] = all_fused
    found = {}
    for name, step in operators.items():
        able = [b for b in BACKENDS if not refusals(b, device, next(model.parameters()).dtype, name)]
        steps = running({b: _with_backend(step, b) for b in able}, name, failures)
        if times := medians(steps, device, rounds, name, failures):
            found[name] = times
    return found


def _with_backend(step: Step, backend: str) -> Step:
    def run() -> None:
        with override(backend=backend):
            step()

    return run


def _candidates(
    model: MultiRate, index: int, x: Tensor, beta: Beta, backends: Mapping[str, str | None]
) -> dict[str, Step]:
    """Forward and backward of one layer by each strategy that may run it."""
    layer, adapter = model._hosts()[index], model._entries[index].adapter
    gate = model._gates(beta)[index].gate.detach().requires_grad_()
    x = x.detach().requires_grad_(x.is_floating_point())
    leaves = [x, gate, *(p for p in layer.parameters(recurse=False) if p.requires_grad)]

    def step(name: str) -> Step:
        def run() -> None:
            with override(backend=backends.get(name)):
                backward(adapter.run(layer, gate, None, None, name, x), leaves)

        return run

    refused = {"fold": gate.dim() == 2, "fused": all(refusals(b, x.device, x.dtype, "fused") for b in BACKENDS)}
    return {name: step(name) for name in STRATEGIES if not refused.get(name)}

"""How a gated product is computed: the cost model, what was measured, the overrides, and the reasons.

Three strategies compute the same y = act(g (W x + b) + t):

    fold       W' = g W, then the library's product: costs passes over the weights. One beta a batch only.
    epilogue   the library's product, then one pass over the outputs, and one in backward. Any beta.
    fused      one kernel for the product with bias, gate, shift and activation. Any beta; Linear, Conv2d and
               ConvTranspose2d, on GPUs.

by three backends (`backends`): "cpp", "triton" and "reference", which is also what torch.compile gets, so that it can
fuse the gate into its neighbours. Precedence: argument, then `override(...)`, then MRVAE_STRATEGY and MRVAE_BACKEND,
then what was measured on this very device for this shape class (`measurements`), then the cost model (`cost_model`),
with the compiled core on the CPU and plain PyTorch elsewhere. An explicit choice that cannot be honoured raises; the
automatic one falls back, and `explain` says so.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from . import cost_model, measurements, ops
from .backends import BACKENDS, CPU_DTYPES, HOW_TO_INTERPRET, NO_TRITON, TRITON_INSTALLED, inside_transform, refusals
from .triton_kernels.device import float32_precision

STRATEGIES = ("fold", "epilogue", "fused")
HOW_TO_MEASURE = "mrvae_kernels.tune(model, ...) measures, and keeps the result"
NO_REFERENCE = "strategy 'fused' has kernels in the compiled core and in Triton only"


@dataclass(frozen=True)
class Override:
    """What the user asked for; None leaves it to the cost model."""

    strategy: str | None = None
    backend: str | None = None

    def __post_init__(self) -> None:
        for name, value, known in (("strategy", self.strategy, STRATEGIES), ("backend", self.backend, BACKENDS)):
            if value is not None and value not in known:
                raise ValueError(f"{name} is {value!r}; expected one of {', '.join(known)}")
        if self.backend == "cpp" and not ops.EXTENSION:
            raise RuntimeError(f"backend 'cpp' was asked for, but {ops.EXTENSION_ERROR}")
        if self.backend == "triton" and not TRITON_INSTALLED:
            raise RuntimeError(f"backend 'triton' was asked for, but {NO_TRITON}")
        if self.strategy == "fused" and self.backend == "reference":
            raise ValueError(f"{NO_REFERENCE}; backend is {self.backend!r}")


class Product(NamedTuple):
    """A product as measurements know it: `operation` ("linear", "conv2d", "conv_transpose2d") with rows x columns
    results of `terms` terms each, of tensors on this device and of this dtype."""

    operation: str
    device: torch.device
    dtype: torch.dtype
    rows: int
    columns: int
    terms: int

    def key(self, per_sample: bool) -> str:
        """The shape class, under torch's present TF32 setting."""
        numbers = str(self.dtype).removeprefix("torch.")
        if self.dtype == torch.float32 and float32_precision(self.device, self.operation != "linear") == "tf32":
            numbers = "tf32"
        return measurements.shape_class(
            self.operation, numbers, per_sample, self.rows, self.columns, self.terms
        )


_override = Override()


def _from_environment() -> Override:
    try:
        return Override(os.environ.get("MRVAE_STRATEGY") or None, os.environ.get("MRVAE_BACKEND") or None)
    except (ValueError, RuntimeError) as error:
        raise type(error)(f"in the environment variables MRVAE_STRATEGY and MRVAE_BACKEND: {error}") from None


@contextmanager
def override(strategy: str | None = None, backend: str | None = None) -> Iterator[None]:
    """Within the block, gated layers use this strategy ("fold", "epilogue", "fused") and backend ("cpp", "triton",
    "reference").

    Nested blocks add up; the innermost wins. Process-wide, as torch's own backend flags are. ValueError for an unknown
    name, RuntimeError for a backend that is not installed.
    """
    global _override
    before = _override
    changes = {name: value for name, value in (("strategy", strategy), ("backend", backend)) if value is not None}
    _override = replace(before, **changes)
    try:
        yield
    finally:
        _override = before


def current() -> Override:
    """The override in force, hashable."""
    return _override


def choose_backend(device: torch.device, dtype: torch.dtype, operator: str = "epilogue") -> str:
    """The backend for "gates", "fold", "epilogue" or "fused"; RuntimeError if the one asked for refuses the tensors."""
    asked = _override.backend
    if asked is None:
        if operator == "fused":
            return _fused_backend(device, dtype)
        if torch.compiler.is_compiling():
            return "reference"
        if device.type == "cpu":  # the hot path: without the list of reasons
            return "cpp" if ops.EXTENSION and dtype in CPU_DTYPES and not inside_transform() else "reference"
        best = measurements.best_backend(device, operator)
        return best if best and not refusals(best, device, dtype, operator) else "reference"
    if asked == "reference" and operator == "fused":
        raise ValueError(f"{NO_REFERENCE}; backend {asked!r} was asked for")
    if reasons := refusals(asked, device, dtype, operator):
        advice = f". {HOW_TO_INTERPRET}" if asked == "triton" and device.type == "cpu" and TRITON_INSTALLED else ""
        what = f"strategy 'fused' on backend {asked!r}" if operator == "fused" else f"backend {asked!r}"
        raise RuntimeError(f"{what} was asked for: {'; '.join(reasons)}{advice}")
    return asked


def _fused_backend(device: torch.device, dtype: torch.dtype) -> str:
    """The faster of those that have fused kernels, where both were measured, else the compiled core's: its launches
    take less of the host's time. RuntimeError where neither takes these tensors."""
    reasons = {backend: refusals(backend, device, dtype, "fused") for backend in ("cpp", "triton")}
    possible = [backend for backend, why in reasons.items() if not why]
    if not possible:
        told = "; ".join(f"{backend}: {'; '.join(why)}" for backend, why in reasons.items())
        advice = f". {HOW_TO_INTERPRET}" if device.type == "cpu" and TRITON_INSTALLED else ""
        raise RuntimeError(f"strategy 'fused' was asked for: {told}{advice}")
    best = None if torch.compiler.is_compiling() else measurements.best_backend(device, "fused")
    return best if best in possible else possible[0]


def choose_strategy(
    weight_numel: int, output_numel: int, per_sample: bool, asked: str | None = None, product: Product | None = None,
    fused_refused: bool = False, *, kind: str = "linear", device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> str:
    """"fold", "epilogue" or "fused": what is asked for, else what was measured for `product` (where it was), else by
    the cost model of a `kind` ("linear", "convolution") on `device` (None: unknown) for products in `dtype`; ValueError
    if the one asked for cannot be done. fused_refused: the fused kernels do not take it."""
    asked = asked or _override.strategy
    if asked is None:
        if product is not None and (times := _measured(product, per_sample, fused_refused)):
            return min(times, key=times.__getitem__)
        if per_sample:
            return "epilogue"
        # one program for every batch size: comparing them would pin the exported one's
        if torch.compiler.is_exporting():
            return "fold"
        return costs(kind, device, dtype).cheaper(weight_numel, output_numel)
    if asked not in STRATEGIES:
        raise ValueError(f"strategy is {asked!r}; expected one of {', '.join(STRATEGIES)}")
    if asked == "fold" and per_sample:
        raise ValueError(
            "strategy 'fold' was asked for, but beta has one value a sample, and folding needs one weight for the "
            "whole batch: use strategy 'epilogue', or one beta"
        )
    return asked


def costs(kind: str, device: torch.device | None, dtype: torch.dtype) -> cost_model.CostModel:
    """The cost model of a product: fitted for the compiled core on the CPU, elsewhere by bytes moved."""
    compiled_core = (
        device is not None and device.type == "cpu" and ops.EXTENSION and _override.backend in (None, "cpp")
        and not torch.compiler.is_compiling() and not inside_transform()
    )
    return cost_model.fitted(kind, dtype) if compiled_core else cost_model.BYTES_MOVED


def _measured(product: Product, per_sample: bool, fused_refused: bool = False) -> measurements.Times:
    """Times of the strategies that can run, where they were measured on this device for this shape class."""
    if product.device.type == "cpu" or torch.compiler.is_compiling():
        return {}
    if not measurements.records(product.device)["strategies"]:
        return {}  # without the key, which takes 7 us to make
    times = measurements.strategy_times(product.device, product.key(per_sample))
    fused = not fused_refused and not _fused_refusals(product.device, product.dtype)
    possible = {"epilogue", *([] if per_sample else ["fold"]), *(["fused"] if fused else [])}
    return {name: time for name, time in times.items() if name in possible}


def _fused_refusals(device: torch.device, dtype: torch.dtype) -> list[str]:
    """Why no backend that is allowed has fused kernels for these tensors; empty if one has."""
    reasons: list[str] = []
    for backend in ("cpp", "triton") if _override.backend is None else (_override.backend,):
        found = refusals(backend, device, dtype, "fused")
        if not found:
            return []
        reasons += found
    return reasons


@dataclass(frozen=True)
class Choice:
    """A decision and why: strategy, backend, the reason, and what was rejected for which reason."""

    strategy: str
    backend: str
    reason: str
    rejected: tuple[str, ...]


def explain(
    weight_numel: int, output_numel: int, per_sample: bool = False, device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32, product: Product | None = None, fused_refusal: str | None = None,
    kind: str = "linear",
) -> Choice:
    """What would run for a layer of that kind with that many weights and outputs, and why not the others (for doctor).

    fused_refusal: why the fused kernels do not take this very layer. ValueError if they are asked for all the same.
    """
    device = torch.device(device)
    strategy = choose_strategy(
        weight_numel, output_numel, per_sample, None, product, fused_refusal is not None, kind=kind, device=device,
        dtype=dtype,
    )
    if strategy == "fused" and fused_refusal:
        raise ValueError(fused_refused(fused_refusal))
    backend = choose_backend(device, dtype, strategy)
    times = {} if product is None or _override.strategy else _measured(product, per_sample, fused_refusal is not None)
    if _override.strategy:
        reason = "asked for by override or MRVAE_STRATEGY"
    elif times:
        reason = f"fastest of those measured on {measurements.device_name(device)} for this shape class"
    elif per_sample:
        reason = "one beta a sample"
    else:
        reason = costs(kind, device, dtype).told(weight_numel, output_numel)
    rejected = []
    for other in STRATEGIES:
        refused = _fused_refusals(device, dtype) if other == "fused" else []
        refused += [fused_refusal] if other == "fused" and fused_refusal else []
        if other == strategy:
            continue
        if other == "fold" and per_sample:
            why = "needs one beta for the batch"
        elif refused:
            why = "; ".join(refused)
        elif _override.strategy:
            why = f"{strategy} was asked for"
        elif other in times:
            why = f"measured {times[other] / times[strategy]:.2f} times slower"
        else:
            why = _unmeasured(device, False) if other == "fused" else reason
        rejected.append(f"{other}: {why}")
    for other in ("cpp", "triton"):
        if other == backend:
            continue
        refused = refusals(other, device, dtype, strategy)
        if not refused and _override.backend is None:
            refused = [_unmeasured(device, measurements.best_backend(device, strategy) is not None)]
        rejected.append(f"{other}: {'; '.join(refused) or 'asked for by override or MRVAE_BACKEND'}")
    return Choice(strategy, backend, reason, tuple(rejected))


def fused_refused(reason: str) -> str:
    """The message for a layer that the fused kernels do not take."""
    return f"strategy 'fused' was asked for, but {reason}: use strategy 'epilogue' for it, or leave the choice open"


def _unmeasured(device: torch.device, slower: bool) -> str:
    if device.type == "cpu":
        return "on CPU tensors it is interpreted, for tests"
    if slower:
        return f"measured slower on {measurements.device_name(device)}"
    return f"not measured on {measurements.device_name(device)}; {HOW_TO_MEASURE}"


_override = _from_environment()

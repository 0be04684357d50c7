"""How a gated product is computed: the cost model, what was measured, the overrides, and the reasons.

Three strategies compute the same y = act(g (W x + b) + t):

    fold       W' = g W, then the library's product. Moves the weights about five times (read and write in forward; read
               two and write one in backward). One beta a batch only.
    epilogue   the library's product, then one pass over the outputs. Moves the outputs about four times more than the
               ungated layer, whose bias gradient reads them once anyway. Any beta.
    fused      one kernel for the product with bias, gate, shift and activation. Any beta; Linear, Conv2d and
               ConvTranspose2d, by Triton.

and three backends: "cpp" (the compiled operators, CPU), "triton" (GPUs, and CPU tensors in Triton's interpreter) and
"reference" (plain PyTorch; what torch.compile gets, so that it can fuse the gate into its neighbours). Precedence:
argument, then `override(...)`, then MRVAE_STRATEGY and MRVAE_BACKEND, then what was measured on this very device for
this shape class (`measurements`), then the cost model with plain PyTorch. An explicit choice that cannot be honoured
raises; the automatic one falls back, and `explain` says so.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from . import measurements, ops
from .triton_kernels.device import DEVICE_TYPES as TRITON_DEVICE_TYPES
from .triton_kernels.device import float32_precision

STRATEGIES = ("fold", "epilogue", "fused")
BACKENDS = ("cpp", "triton", "reference")
CPP_DTYPES = (torch.float32, torch.bfloat16, torch.float64)
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
HOW_TO_MEASURE = "mrvae_kernels.tune(model, ...) measures, and keeps the result"
NO_TRITON = "triton is not installed; run: pip install 'triton>=3.6,<3.8'"

FOLD_PASSES = 5
EPILOGUE_PASSES = 4


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
        if self.strategy == "fused" and self.backend not in (None, "triton"):
            raise ValueError(f"strategy 'fused' has kernels in Triton only; backend is {self.backend!r}")


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
    if operator == "fused":
        if asked not in (None, "triton"):
            raise ValueError(f"strategy 'fused' has kernels in Triton only; backend {asked!r} was asked for")
        asked = "triton"
    elif asked == "reference" or (asked is None and torch.compiler.is_compiling()):
        return "reference"
    if asked != "triton" and ops.EXTENSION and device.type == "cpu" and dtype in CPP_DTYPES:
        return "cpp"
    if asked is None:
        wins = device.type != "cpu" and measurements.best_backend(device, operator) == "triton"
        return "triton" if wins and not triton_refusals(device, dtype) else "reference"
    refusals = triton_refusals(device, dtype, operator) if asked == "triton" else _cpp_refusals(device, dtype)
    if refusals:
        what = "strategy 'fused'" if operator == "fused" else f"backend {asked!r}"
        advice = ""
        if asked == "triton" and device.type == "cpu" and TRITON_INSTALLED:
            advice = (
                ". Move the tensors to a GPU, or set TRITON_INTERPRET=1 before Python starts to run the kernels in "
                "Triton's interpreter, slowly"
            )
        raise RuntimeError(f"{what} was asked for: {'; '.join(refusals)}{advice}")
    return asked


def choose_strategy(
    weight_numel: int, output_numel: int, per_sample: bool, asked: str | None = None, product: Product | None = None,
    fused_refused: bool = False,
) -> str:
    """"fold", "epilogue" or "fused": what is asked for, else what was measured for `product` (where it was), else by
    bytes moved; ValueError if the one asked for cannot be done. fused_refused: the fused kernels do not take it."""
    asked = asked or _override.strategy
    if asked is None:
        if product is not None and (times := _measured(product, per_sample, fused_refused)):
            return min(times, key=times.__getitem__)
        if per_sample:
            return "epilogue"
        # one program for every batch size: comparing them would pin the exported one's
        if torch.compiler.is_exporting():
            return "fold"
        return "epilogue" if output_numel * EPILOGUE_PASSES < weight_numel * FOLD_PASSES else "fold"
    if asked not in STRATEGIES:
        raise ValueError(f"strategy is {asked!r}; expected one of {', '.join(STRATEGIES)}")
    if asked == "fold" and per_sample:
        raise ValueError(
            "strategy 'fold' was asked for, but beta has one value a sample, and folding needs one weight for the "
            "whole batch: use strategy 'epilogue', or one beta"
        )
    return asked


def _measured(product: Product, per_sample: bool, fused_refused: bool = False) -> measurements.Times:
    """Times of the strategies that can run, where they were measured on this device for this shape class."""
    if product.device.type == "cpu" or torch.compiler.is_compiling():
        return {}
    if not measurements.records(product.device)["strategies"]:
        return {}  # without the key, which takes 7 us to make
    times = measurements.strategy_times(product.device, product.key(per_sample))
    fused = not fused_refused and _override.backend in (None, "triton") and not triton_refusals(
        product.device, product.dtype, "fused"
    )
    possible = {"epilogue", *([] if per_sample else ["fold"]), *(["fused"] if fused else [])}
    return {name: time for name, time in times.items() if name in possible}


def triton_refusals(device: torch.device, dtype: torch.dtype, operator: str = "epilogue") -> list[str]:
    """Why Triton's kernels do not take these tensors; empty if they do."""
    reasons = []
    if not TRITON_INSTALLED:
        reasons.append(NO_TRITON)
    if torch._C._functorch.peek_interpreter_stack() is not None:
        reasons.append("Triton's kernels do not run inside torch.func's transforms")
    if device.type not in TRITON_DEVICE_TYPES:
        taken = " and ".join(TRITON_DEVICE_TYPES)
        reasons.append(f"Triton takes {taken} tensors, this one is on {device}")
    if dtype not in TRITON_DTYPES or (operator == "fused" and dtype == torch.float64):
        wide = "" if operator == "fused" else ", float64"
        reasons.append(f"its kernels take float32{wide}, bfloat16 and float16, this one is {dtype}")
    return reasons


def _cpp_refusals(device: torch.device, dtype: torch.dtype) -> list[str]:
    reasons = []
    if not ops.EXTENSION:
        reasons.append(str(ops.EXTENSION_ERROR))
    if device.type != "cpu":
        reasons.append(f"it takes CPU tensors, this one is on {device}")
    if dtype not in CPP_DTYPES:
        reasons.append(f"it takes float32, bfloat16 and float64, this one is {dtype}")
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
) -> Choice:
    """What would run for a layer with that many weights and outputs, and why not the others (for doctor).

    fused_refusal: why the fused kernels do not take this very layer. ValueError if they are asked for all the same.
    """
    device = torch.device(device)
    strategy = choose_strategy(weight_numel, output_numel, per_sample, None, product, fused_refusal is not None)
    if strategy == "fused" and fused_refusal:
        raise ValueError(fused_refused(fused_refusal))
    backend = choose_backend(device, dtype, strategy)
    times = {} if product is None or _override.strategy else _measured(product, per_sample, fused_refusal is not None)
    fold_cost, epilogue_cost = weight_numel * FOLD_PASSES, output_numel * EPILOGUE_PASSES
    if _override.strategy:
        reason = "asked for by override or MRVAE_STRATEGY"
    elif times:
        reason = f"fastest of those measured on {measurements.device_name(device)} for this shape class"
    elif per_sample:
        reason = "one beta a sample"
    else:
        reason = f"fold moves {fold_cost:,} elements, epilogue {epilogue_cost:,}"
    rejected = []
    for other in STRATEGIES:
        refusals = triton_refusals(device, dtype, "fused") if other == "fused" else []
        refusals += [fused_refusal] if other == "fused" and fused_refusal else []
        if other == strategy:
            continue
        if other == "fold" and per_sample:
            why = "needs one beta for the batch"
        elif refusals:
            why = "; ".join(refusals)
        elif _override.strategy:
            why = f"{strategy} was asked for"
        elif other in times:
            why = f"measured {times[other] / times[strategy]:.2f} times slower"
        else:
            why = _unmeasured(device, False) if other == "fused" else reason
        rejected.append(f"{other}: {why}")
    if backend != "cpp":
        refusals = ["fused kernels are Triton's"] if strategy == "fused" else _cpp_refusals(device, dtype)
        rejected.append(f"cpp: {'; '.join(refusals) or 'asked for by override or MRVAE_BACKEND'}")
    if backend != "triton":
        refusals = triton_refusals(device, dtype)
        if not refusals and _override.backend is None:
            refusals = [_unmeasured(device, measurements.best_backend(device, strategy) is not None)]
        rejected.append(f"triton: {'; '.join(refusals) or 'asked for by override or MRVAE_BACKEND'}")
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

"""How a gated product is computed: the cost model, the overrides, and the reasons.

Two strategies compute the same y = act(g (W x + b) + t):

    fold       W' = g W, then the library's product. Moves the weights about five times (read and write in forward; read
               two and write one in backward). One beta a batch only.
    epilogue   the library's product, then one pass over the outputs. Moves the outputs about four times more than the
               ungated layer, whose bias gradient reads them once anyway. Any beta.

and two backends: "cpp" (the compiled operators) and "reference" (plain PyTorch; what torch.compile gets, so that it can
fuse the gate into its neighbours). Precedence: argument, then `override(...)`, then MRVAE_STRATEGY and MRVAE_BACKEND,
then the cost model. An explicit choice that cannot be honoured raises; the automatic one falls back, and `explain`
says so.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from . import ops

STRATEGIES = ("fold", "epilogue")
BACKENDS = ("cpp", "reference")
CPP_DTYPES = (torch.float32, torch.bfloat16, torch.float64)

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


_override = Override()


def _from_environment() -> Override:
    return Override(os.environ.get("MRVAE_STRATEGY") or None, os.environ.get("MRVAE_BACKEND") or None)


@contextmanager
def override(strategy: str | None = None, backend: str | None = None) -> Iterator[None]:
    """Within the block, gated layers use this strategy ("fold", "epilogue") and backend ("cpp", "reference").

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


def choose_backend(device: torch.device, dtype: torch.dtype) -> str:
    """The backend for a tensor; RuntimeError if the one asked for does not take it."""
    asked = _override.backend
    if asked == "reference" or (asked is None and torch.compiler.is_compiling()):
        return "reference"
    if ops.EXTENSION and device.type == "cpu" and dtype in CPP_DTYPES:
        return "cpp"
    if asked is None:
        return "reference"
    raise RuntimeError(f"backend 'cpp' was asked for: {'; '.join(_cpp_refusals(device, dtype))}")


def choose_strategy(weight_numel: int, output_numel: int, per_sample: bool, asked: str | None = None) -> str:
    """"fold" or "epilogue" by bytes moved; ValueError if the one asked for cannot be done."""
    asked = asked or _override.strategy
    if asked is None:
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
    dtype: torch.dtype = torch.float32,
) -> Choice:
    """What would run for a layer with that many weights and outputs, and why not the others (for doctor)."""
    device = torch.device(device)
    strategy = choose_strategy(weight_numel, output_numel, per_sample)
    backend = choose_backend(device, dtype)
    fold_cost, epilogue_cost = weight_numel * FOLD_PASSES, output_numel * EPILOGUE_PASSES
    if _override.strategy:
        reason = "asked for by override or MRVAE_STRATEGY"
    elif per_sample:
        reason = "one beta a sample"
    else:
        reason = f"fold moves {fold_cost:,} elements, epilogue {epilogue_cost:,}"
    rejected = []
    if strategy == "fold":
        rejected.append(f"epilogue: {reason}")
    else:
        rejected.append("fold: needs one beta for the batch" if per_sample else f"fold: {reason}")
    if backend == "reference":
        asked = "asked for by override or MRVAE_BACKEND" if _override.backend else None
        rejected.append(f"cpp: {asked or '; '.join(_cpp_refusals(device, dtype))}")
    return Choice(strategy, backend, reason, tuple(rejected))


_override = _from_environment()

"""Variants of a gated layer, let to the clock only where their numbers are right."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .gpu_correctness import LIMITS, NUMBERS, relative_error
from .gpu_timing import float32_precision
from .layer_variants import EVERY, PER_SAMPLE, ExactCase, GatedCase, refusal
from .shapes import Case

COPIES = 8
"""Inputs that the steps of a variant take in turn, so that none is found in the caches."""

DTYPES = {"float32": "ieee", "tf32": "tf32", "bfloat16": "bfloat16", "float16": "float16"}
"""The names of result files, and the numbers of `gpu_correctness` or more."""
TENSORS = {**NUMBERS, "float16": torch.float16}
MOST = {**LIMITS, "float16": 2e-3}
RECURRENCE = 4
"""An LSTM's rounding errors go round: it is allowed so many times the limit."""
EXAMPLES = 16
"""What float32's limit is for: rounding errors of sums over more examples grow with the root of their number."""


def dtypes(device: torch.device) -> tuple[str, ...]:
    """The numbers that are measured on a device."""
    return ("float32", "bfloat16") if device.type == "cpu" else tuple(DTYPES)


class CheckedCase:
    """A layer's variants on a device, in the numbers of `DTYPES`: `refused` holds those that are not timed and why.

    `fault` says what is wrong with the numbers of one that is. Use it within `mk.override()` and `precision()`.
    """

    def __init__(
        self, case: Case, batch: int, dtype: str, device: torch.device, compiled: bool = True,
        variants: Sequence[str] = EVERY,
    ) -> None:
        self.case, self.batch, self.dtype, self.device = case, batch, dtype, device
        tensors = TENSORS[DTYPES[dtype]]
        self.refused = {
            name: why for name in variants
            if (why := refusal(name, case, device, tensors) or _not_compiled(name, compiled)) is not None
        }
        torch._dynamo.reset()  # it compiles one piece of code for a few layers only, and then runs it as it is
        runs = [name for name in variants if name not in self.refused]
        self.gated = GatedCase(case, batch, tensors, device, COPIES, runs)
        self._compared = Comparison(self.gated, DTYPES[dtype])
        self._faults: dict[str, str | None] = {}

    def precision(self) -> float32_precision:
        """The block in which float32 products are what the name of the numbers says."""
        return float32_precision(DTYPES[self.dtype])

    def fault(self, name: str) -> str | None:
        """What is wrong in a variant's y, with and without gradients, and in its gradients, against float64; None for
        nothing. Its first call also finds out whether the variant refuses the layer: see `refused` then."""
        if name not in self._faults and name not in self.refused:
            try:
                self._faults[name] = self._compared.fault(name)
            except ValueError as error:
                self.refused[name] = str(error)
            except Exception as error:
                self._faults[name] = f"{type(error).__name__}: {error}"
        return self._faults.get(name)

    def timed(self, name: str) -> bool:
        """Whether the variant gets a time: it runs, and its numbers are right."""
        return self.fault(name) is None and name not in self.refused


class Comparison:
    """A gated case's variants against float64, in the numbers of `gpu_correctness` or "float16"."""

    def __init__(self, gated: GatedCase, numbers: str) -> None:
        self.gated, self.numbers = gated, numbers
        self._exact: dict[str, ExactCase] = {}
        self._gradients: dict[Any, tuple[Tensor, ...]] = {}

    def fault(self, name: str) -> str | None:
        """What is wrong in the variant's y, with and without gradients, and in its gradients; None for nothing. Raises
        what the variant does."""
        case, x = self.gated.case, self.gated.inputs[0]
        y, *gradients = self.gated.both(name, x)
        with torch.no_grad():
            alone = self.gated.forward(name, x)
        gate = next((kind for kind in ("library", "listing1", PER_SAMPLE) if kind in name), "shared")
        if gate not in self._exact:
            self._exact[gate] = self.gated.exact(x, name)
        exact = self._exact[gate]
        signs = hash((y > 0).cpu().numpy().tobytes()) if case.activation == "relu" else 0
        if (gate, signs) not in self._gradients:
            self._gradients[gate, signs] = exact.gradients(y)
        own = [f"d{parameter}" for parameter, _ in self.gated.layer.named_parameters()]
        labels = ["y", "y without gradients", "dx", *own]
        labels += [f"dgate{i}" for i in range(len(gradients) + 2 - len(labels))]
        values, wanted = (y, alone, *gradients), (exact.y, exact.y, *self._gradients[gate, signs])
        errors = dict(zip(labels, map(relative_error, values, wanted), strict=True))
        for label, want in zip(labels, wanted, strict=True):
            if label.startswith("dgate") and (norm := want.norm().item()) > 0:
                errors[label] *= norm / max(norm, _terms(exact, gate))
        limit = MOST[self.numbers] * (RECURRENCE if case.kind is nn.LSTM else 1)
        sums = limit * math.sqrt(max(1, len(x) / EXAMPLES)) if self.numbers == "ieee" else limit
        allowed = dict.fromkeys(labels, sums) | dict.fromkeys(("y", "y without gradients", "dx"), limit)
        bad = [f"{label} {error:.2g}" for label, error in errors.items() if not error <= allowed[label]]
        return f"relative errors against float64, at most {limit:.2g} allowed: {', '.join(bad)}" if bad else None


def _terms(exact: ExactCase, gate: str) -> float:
    """The norm of all that a gate's gradient, sum dz product, is a sum of: its rounding errors are in proportion to
    this, also where the sum cancels. Listing 1's go through its sigmoid, whose slope is 1/4 at most."""
    if exact.product is None:
        return 0.0
    (dz,) = torch.autograd.grad(exact.y, exact.z, exact.grad, retain_graph=True)
    return (dz * exact.product).norm().item() * (0.25 if gate == "listing1" else 1.0)


def _not_compiled(name: str, compiled: bool) -> str | None:
    if compiled or not name.endswith(" compiled"):
        return None
    return "torch.compile takes part in the middle shapes in float32, unless --all-shapes"

"""Every strategy of a layer on every backend against float64 on its device: y and all gradients, by error in norm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import mrvae_kernels as mk

from .gpu_timing import failure, float32_precision
from .layer_variants import GatedCase, ours
from .shapes import Case

LIMITS = {"ieee": 1e-5, "tf32": 1e-3, "bfloat16": 1e-2}
"""Largest relative error, in norm, by precision."""
NUMBERS = {"ieee": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16}
LABELS = ("y", "dx", "dweight", "dbias", "dgate")


def errors(case: Case, batch: int, precision: str, device: torch.device) -> dict[str, Any]:
    """Each of our variants' relative errors in y and the gradients, why it refuses the layer, or how it failed."""
    found: dict[str, Any] = {}
    with float32_precision(precision), mk.override():
        gated = GatedCase(case, batch, NUMBERS[precision], device)
        x, exact = gated.inputs[0], None
        for name in ours(device):
            try:
                got = gated.both(name, x)
                exact = exact or gated.exact(x)
                pairs = zip(LABELS, got, (exact.y, *exact.gradients(got[0])), strict=True)
                found[name] = {label: relative_error(a, b) for label, a, b in pairs}
            except ValueError as refusal:
                found[name] = {"refused": str(refusal)}
            except Exception as error:
                found[name] = {"failed": failure(error, device)}
    return {"case": case.name, "network": case.network, "batch": batch, "precision": precision, "errors": found}


def relative_error(got: Tensor, exact: Tensor) -> float:
    """|got - exact| / |exact|, in norm; the error itself where exact is 0."""
    error, scale = (got.double() - exact).norm().item(), exact.norm().item()
    return error / scale if scale > 0 else error


def faults(found: dict[str, Any]) -> dict[str, str]:
    """Each variant that exceeds its limit in what `errors` gave, and by which errors."""
    limit, wrong = LIMITS[found["precision"]], {}
    for name, values in found["errors"].items():
        bad = [f"{label} {values[label]:.2g}" for label in LABELS if label in values and not values[label] <= limit]
        if bad:
            wrong[name] = f"relative errors against float64, at most {limit:.2g} allowed: {', '.join(bad)}"
    return wrong


def failures(found: dict[str, Any]) -> dict[str, str]:
    """Each variant that failed in what `errors` gave, and how."""
    return {name: values["failed"] for name, values in found["errors"].items() if "failed" in values}


def checked(found: dict[str, Any]) -> bool:
    """Whether a variant was compared at all."""
    return any("y" in values for values in found["errors"].values())

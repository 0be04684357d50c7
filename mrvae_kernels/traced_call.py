"""A MultiRate's call as torch.compile and torch.export see it: all gates in one node, then the network; see `traced`.

All that is looked at, Dynamo guards every call: so few methods, and the layout as one string.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import reference, strategy, traced
from .gates import Beta
from .traced import SampledGate, TracedGates

if TYPE_CHECKING:
    from .multirate import MultiRate

Layout = tuple[tuple[int, ...], tuple[str, ...], tuple[bool, ...], bool, bool]


def described(
    sizes: Sequence[int], kinds: Sequence[str], linear: Sequence[bool], flat_parameters: bool, conditional: bool
) -> str:
    """Sizes and kinds of the slices of a network's gates, and which are gates or shifts of a Linear; whether they are
    in the flat parameters, and whether there are conditional norms."""
    return json.dumps([list(sizes), list(kinds), list(linear), flat_parameters, conditional])


@traced.asked_once
def layout_of(description: str) -> Layout:
    """The same, read from what `described` gives."""
    sizes, kinds, linear, flat_parameters, conditional = json.loads(description)
    return tuple(sizes), tuple(kinds), tuple(linear), flat_parameters, conditional


def run(model: MultiRate, beta: Beta, args: Any, kwargs: Any) -> Any:
    """The network's output at this beta."""
    override = strategy.current()
    if override.backend not in (None, "reference") or override.strategy == "fused":
        with model._lend_norms(beta):
            return model._call(beta, None, args, kwargs)
    model._check_layers()
    layout = layout_of(model._traced_layout)
    flat, values = _bank(model, layout, beta, formulas=override.backend == "reference")
    *_, conditional = layout
    if conditional:
        values = [*values, *model._norm_values(beta)]
    exporting = torch.compiler.is_exporting()
    model._calls.append(TracedGates(values, None if exporting else flat, override.strategy, exporting))
    try:
        return model.network(*args, **kwargs)
    finally:
        model._calls.pop()


def _bank(
    model: MultiRate, layout: Layout, beta: Beta, formulas: bool
) -> tuple[Tensor | None, Sequence[Tensor | SampledGate]]:
    """All gates and shifts, in one piece where they are, and one by one; formulas: not by operators of the core."""
    sizes, kinds, linear, flat_parameters, _ = layout
    if not flat_parameters:
        return None, model._bank(beta)
    weight, bias = model.gate_weight, model.gate_bias
    assert weight is not None and bias is not None
    low, high = model.beta_range
    if not isinstance(beta, Tensor):
        if isinstance(beta, bool) or not isinstance(beta, (int, float)):
            return None, model._bank(beta)
        beta = torch.scalar_tensor(beta, dtype=reference.gate_dtype(weight.dtype), device=weight.device)
    if beta.dim() == 1:
        return None, traced.sampled_gates(weight, bias, beta, low, high, sizes, kinds, linear, formulas)
    flat, *values = traced.bank(weight, bias, beta, low, high, sizes, kinds)
    return flat, values

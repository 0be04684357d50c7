"""What torch.compile sees of a gated network: a few calls, each one node of Dynamo's graph.

Dynamo guards every Python object that it looks at, each time the compiled network is called: traced through
`functional` and `strategy`, a network of five layers had 354 guarded objects where the plain one has 76, and an eager
step was faster. These functions are opaque to Dynamo and transparent to AOTAutograd, which traces the formulas of
`reference` in them for Inductor to fuse. What they depend on besides tensors is an argument, and so is guarded.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from . import functional, reference
from .cost_model import TRACED
from .gates import BetaRange, standardize
from .strategy import choose_strategy

Function = TypeVar("Function", bound=Callable[..., Any])


def asked_once(function: Function) -> Function:
    """Called when Dynamo traces, its result a constant that is not guarded: what torch.compiler.assume_constant_result
    says of a function, without the import of Dynamo, which takes a second and imports Triton."""
    vars(function)["_dynamo_marked_constant"] = True
    return function


def announce() -> None:
    """Tell Dynamo of the functions here: when it traces a network, and is imported."""
    for function in (gate_bank, gated_linear, gated_convolution):
        torch.compiler.allow_in_graph(function)


def gate_bank(
    weight: Tensor, bias: Tensor, beta: Tensor, low: float, high: float, sizes: tuple[int, ...], kinds: tuple[str, ...]
) -> list[Tensor]:
    """All gates and shifts of a network at beta; see `functional.gate_bank`."""
    dtype = reference.gate_dtype(weight.dtype)
    eta = standardize(beta, BetaRange(low, high), device=weight.device, dtype=dtype)
    return reference.gate_bank(weight, bias, eta, sizes, kinds)


def gated_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor, shift: Tensor | None, asked: str | None,
    exporting: bool,
) -> Tensor:
    """See `functional.gated_linear`; asked: the strategy of an override, or None."""
    gate, shift = functional.check_linear(x, weight, bias, gate, shift)
    how = _strategy(weight, math.prod(x.shape[:-1]) * weight.shape[0], gate, asked, exporting)
    return reference.gated_linear(x, weight, bias, gate, shift, "none", how)


def gated_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor, shift: Tensor | None, stride: tuple[int, ...],
    padding: tuple[int, ...], dilation: tuple[int, ...], transposed: bool, output_padding: tuple[int, ...], groups: int,
    asked: str | None, exporting: bool,
) -> Tensor:
    """A batch's convolution; see `functional.gated_conv2d`."""
    geometry = (stride, padding, dilation, transposed, output_padding, groups)
    gate, shift = functional.check_convolution(x, weight, bias, gate, shift, transposed, groups, len(stride))
    outputs = functional.convolution_output_numel(x, weight, *geometry)
    how = _strategy(weight, outputs, gate, asked, exporting)
    return reference.gated_convolution(x, weight, bias, gate, shift, *geometry, "none", how)


def _strategy(weight: Tensor, outputs: int, gate: Tensor, asked: str | None, exporting: bool) -> str:
    if asked is not None or gate.dim() == 2:
        return choose_strategy(0, 0, gate.dim() == 2, asked)
    # one program for every batch size: comparing them would pin the exported one's
    return "fold" if exporting else TRACED.cheaper(weight.numel(), outputs)


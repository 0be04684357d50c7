"""What torch.compile sees of a gated network: a few calls, each one node of Dynamo's graph.

Dynamo guards every Python object that it looks at, each time the compiled network is called: traced through
`functional` and `strategy`, a network of five layers had 354 guarded objects where the plain one has 76, and an eager
step was faster. These functions are opaque to Dynamo and transparent to AOTAutograd, which traces the formulas in them
for Inductor to fuse. What they depend on besides tensors is an argument, and so is guarded.

The formulas are those of `reference`, with backward passes of their own (`traced_epilogue`) that keep y alone. With
one beta a sample on a CPU, operators of the core stand in the graph for gates and, but for small ones, for the
epilogues of Linears, which beside a shift keep u: Inductor evaluates a gate anew for every element that it scales.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from . import functional, reference
from .cost_model import TRACED
from .gates import KINDS, BetaRange, standardize
from .ops import EXTENSION
from .reference import Geometry
from .strategy import choose_strategy
from .traced_epilogue import Bank, CoreEpilogue, Epilogue, Fold, FoldedProduct, SampledEpilogue

Function = TypeVar("Function", bound=Callable[..., Any])

USUAL_BATCH = 64
LEAST_SAMPLED, LEAST_SHIFTED = 32768, 1024
"""Elements from which on a Linear is the core's, without a shift and with one: a step of the linear network took 1.15
with the operators and 1.11 by Inductor's loops at 12,544 elements, 1.19 and 1.20 at 100,352; an MLP's with shifts 1.16
where those of 4,800 elements are the core's too, 1.21 where they are not (2 cores of a Xeon)."""


class SampledGate(NamedTuple):
    """A gate or shift at one beta a sample, by what it is made of: act(weight eta + bias), weight (C,) or (degree, C),
    bias (C,), eta (N,); flat_weight and flat_bias are the whole network's, where it begins at `start`. core: whether
    the compiled core may compute with it."""

    weight: Tensor
    bias: Tensor
    eta: Tensor
    flat_weight: Tensor
    flat_bias: Tensor
    kind: str
    start: int
    core: bool


@dataclass(frozen=True)
class TracedGates:
    """What torch.compile hands the layers of a call: all gates and shifts, and what else depends on the call."""

    values: Sequence[Tensor | SampledGate]
    flat: Tensor | None  # the values of one beta in one piece
    asked: str | None  # the strategy of an override
    exporting: bool

    def value(self, i: int) -> Tensor:
        """The gate's or shift's value, (C,) or (N, C)."""
        found = self.values[i]
        return gates(found.weight, found.bias, found.eta, found.kind) if isinstance(found, SampledGate) else found


class Calls(list[TracedGates]):
    """The calls of a network that are being traced, innermost last: one object, of the network and all its layers.

    A class of its own, which pytree takes for a leaf: torch.export puts copies in place of the lists that modules hold.
    """


def asked_once(function: Function) -> Function:
    """Called when Dynamo traces, its result a constant that is not guarded: what torch.compiler.assume_constant_result
    says of a function, without the import of Dynamo, which takes a second and imports Triton."""
    vars(function)["_dynamo_marked_constant"] = True
    return function


def announce() -> None:
    """Tell Dynamo of the functions here: when it traces a network, and is imported."""
    for function in (bank, bank_parts, gates, gated_linear, sampled_linear, gated_convolution):
        torch.compiler.allow_in_graph(function)


def sampled_gates(
    weight: Tensor, bias: Tensor, beta: Tensor, low: float, high: float, sizes: tuple[int, ...],
    kinds: tuple[str, ...], linear: tuple[bool, ...], formulas: bool,
) -> list[Tensor | SampledGate]:
    """All gates and shifts of a network at one beta a sample; those of `linear`, which have as many numbers as results,
    not yet evaluated, and none where there is no compiled core or `formulas` alone are asked for."""
    core = EXTENSION and weight.device.type == "cpu" and not (formulas or torch.compiler.is_exporting())
    now = tuple(i for i in range(len(sizes)) if core and not linear[i])
    count = len(sizes)
    eta, *pieces = bank_parts(weight, bias, beta, low, high, sizes, kinds, now)
    found: list[Tensor | SampledGate] = []
    start = 0
    for i, size in enumerate(sizes):
        if i in now:
            found.append(pieces[2 * count + now.index(i)])
        else:
            found.append(SampledGate(pieces[i], pieces[count + i], eta, weight, bias, kinds[i], start, core))
        start += size
    return found


def bank(
    weight: Tensor, bias: Tensor, beta: Tensor, low: float, high: float, sizes: tuple[int, ...], kinds: tuple[str, ...]
) -> list[Tensor]:
    """All gates and shifts of a network at one beta, in one piece, and its slices; see `functional.gate_bank`."""
    eta = _eta(weight, beta, low, high)
    # in one piece Inductor keeps them: apart, each gate is evaluated anew for every element that it scales
    if _own_backward():
        return list(Bank.apply(weight, bias, eta, sizes, kinds))
    flat = torch.cat(reference.gate_bank(weight, bias, eta, sizes, kinds))
    return [flat.detach(), *flat.split(sizes)]


def bank_parts(
    weight: Tensor, bias: Tensor, beta: Tensor, low: float, high: float, sizes: tuple[int, ...],
    kinds: tuple[str, ...], now: tuple[int, ...],
) -> list[Tensor]:
    """eta, then w of each gate, then c of each, then the values (N, C) of those of `now`, by the core: Inductor would
    evaluate each anew for every element that it scales."""
    eta = _eta(weight, beta, low, high)
    weights, biases = weight.split(sizes, -1), bias.split(sizes)
    if not _own_backward():
        return [eta, *weights, *biases, *(gates(weights[i], biases[i], eta, kinds[i]) for i in now)]
    values: list[Tensor] = []
    if now:
        w, c = (weight, bias) if len(now) == len(sizes) else (
            torch.cat([weights[i] for i in now], -1), torch.cat([biases[i] for i in now])
        )
        values = torch.ops.mrvae.gates(w, c, eta, [sizes[i] for i in now], [KINDS.index(kinds[i]) for i in now])
    return [eta, *weights, *biases, *values]


def gates(weight: Tensor, bias: Tensor, eta: Tensor, kind: str) -> Tensor:
    """See `reference.gates`."""
    return reference.gates(weight, bias, eta, kind)


def _own_backward() -> bool:
    """Whether the passes of `traced_epilogue` are taken: where a compiler traces them, which derives once.

    The formulas are autograd's where they run as they stand (a layer behind a break of the graph, backend="eager"),
    under torch.func's transforms, and in an exported program.
    """
    transforms = torch._C._dispatch_tls_is_dispatch_key_included(torch._C.DispatchKey.FuncTorchDynamicLayerFrontMode)
    return torch.compiler.is_compiling() and not torch.compiler.is_exporting() and not transforms


def _y_tells(dtype: torch.dtype) -> bool:
    """Whether y is kept, from which the backward pass has u. Not in float16, where y of a small gate is subnormal: the
    gradient of a gate of 1e-5 was off by 2e-3, of 1e-7 by 17 %."""
    return dtype != torch.float16 and _own_backward()


def _eta(weight: Tensor, beta: Tensor, low: float, high: float) -> Tensor:
    dtype = reference.gate_dtype(weight.dtype)
    return standardize(beta, BetaRange(low, high), device=weight.device, dtype=dtype)


def gated_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor, shift: Tensor | None, flat: Tensor | None, start: int,
    activation: str, asked: str | None, exporting: bool,
) -> Tensor:
    """See `functional.gated_linear`.

    flat, start: all gates in one piece, or None, and where this one begins in it; activation: none or relu; asked: an
    override's strategy, or None.
    """
    gate, shift = functional.check_linear(x, weight, bias, gate, shift)
    how = _strategy(weight, math.prod(x.shape[:-1]) * weight.shape[0], gate, asked, exporting)
    if how == "fold":
        return reference.activate(_folded(x, weight, bias, gate, shift, flat, start, 0, None), activation)
    return _epilogue(F.linear(x, weight), bias, gate, shift, flat, start, x.dim() - 1, activation)


def sampled_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, gate_weight: Tensor, gate_bias: Tensor, eta: Tensor,
    flat_weight: Tensor, flat_bias: Tensor, kind: str, start: int, core: bool, shift_weight: Tensor | None,
    shift_bias: Tensor | None, shift_start: int, activation: str, asked: str | None,
) -> Tensor:
    """A Linear with one beta a sample, by the SampledGate of its gate and what its shift is made of, or None and -1."""
    if x.dim() == 2 and x.shape[0] == eta.shape[0] and asked is None and _own_backward():
        flats = flat_weight.detach(), flat_bias.detach()
        u = F.linear(x, weight)
        if core and _by_core(u, bias, eta, flat_weight, flat_bias, shift_start >= 0):
            shift = shift_weight, shift_bias
            return CoreEpilogue.apply(
                u, bias, gate_weight, gate_bias, *shift, eta, *flats, start, shift_start, kind, activation
            )
        if shift_start < 0 and _y_tells(u.dtype):
            relu = activation == "relu"
            return SampledEpilogue.apply(u, bias, gate_weight, gate_bias, eta, *flats, start, kind, relu)
    value, shift_value = gates(gate_weight, gate_bias, eta, kind), None
    if shift_weight is not None and shift_bias is not None:
        shift_value = gates(shift_weight, shift_bias, eta, "identity")
    return gated_linear(x, weight, bias, value, shift_value, None, 0, activation, asked, False)


def _by_core(
    u: Tensor, bias: Tensor | None, eta: Tensor, flat_weight: Tensor, flat_bias: Tensor, shifted: bool
) -> bool:
    """Whether the core computes the epilogue of u (N, C), of enough elements to pay for a call of two operators."""
    if u.dtype == torch.float16 or eta.requires_grad:
        return False
    parts = [flat_weight, flat_bias, eta, *([] if bias is None else [bias])]
    if any(reference.gate_dtype(part.dtype) != reference.gate_dtype(u.dtype) for part in parts):
        return False
    samples, channels = u.shape
    if not isinstance(samples, int):  # of any batch size, where a question would be a guard, and another graph, a layer
        samples = USUAL_BATCH
    return samples * channels >= (LEAST_SHIFTED if shifted else LEAST_SAMPLED)


def gated_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor, shift: Tensor | None, flat: Tensor | None, start: int,
    geometry: Geometry, activation: str, asked: str | None, exporting: bool,
) -> Tensor:
    """A batch's convolution; see `functional.gated_conv2d` and gated_linear."""
    _, _, _, transposed, _, groups = geometry
    gate, shift = functional.check_convolution(x, weight, bias, gate, shift, transposed, groups, x.dim() - 2)
    outputs = functional.convolution_output_numel(x, weight, *geometry)
    how = _strategy(weight, outputs, gate, asked, exporting)
    if how == "fold":
        fold_groups = groups if transposed else 0
        return reference.activate(
            _folded(x, weight, bias, gate, shift, flat, start, fold_groups, geometry), activation
        )
    return _epilogue(reference.convolve(x, (weight, None), geometry), bias, gate, shift, flat, start, 1, activation)


def _folded(
    x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor, shift: Tensor | None, flat: Tensor | None, start: int,
    groups: int, geometry: Geometry | None,
) -> Tensor:
    own = shift is None and flat is not None and _own_backward()
    if own:
        folded = Fold.apply(weight, bias, gate, flat, start, groups)
    else:
        folded = reference.fold(weight, bias, gate, shift, groups)
    # autocast would give the product's backward pass x and W of another dtype than dy
    if own and x.dim() > 1 and not torch.is_autocast_enabled(x.device.type):
        return FoldedProduct.apply(x, *folded, weight, flat, start, groups, geometry)
    return F.linear(x, *folded) if geometry is None else reference.convolve(x, folded, geometry)


def _epilogue(
    u: Tensor, bias: Tensor | None, gate: Tensor, shift: Tensor | None, flat: Tensor | None, start: int, dim: int,
    activation: str,
) -> Tensor:
    if shift is not None or (flat is None and gate.dim() == 1) or not _y_tells(u.dtype):
        return reference.epilogue(u, bias, gate, shift, dim, activation)
    return Epilogue.apply(u, bias, gate, flat, start, dim, activation == "relu")


def _strategy(weight: Tensor, outputs: int, gate: Tensor, asked: str | None, exporting: bool) -> str:
    if asked is not None or gate.dim() == 2:
        return choose_strategy(0, 0, gate.dim() == 2, asked)
    # one program for every batch size: comparing them would pin the exported one's
    return "fold" if exporting else TRACED.cheaper(weight.numel(), outputs)

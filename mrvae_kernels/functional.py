"""Gated operators as functions: check the arguments, choose a strategy and a backend, run.

    y = activation(gate * (product(x, weight) + bias) + shift)

gate and shift are (C,) for one beta, or (N, C) for one beta a sample, in float32 (float64 for float64 networks; other
dtypes are converted). Each function is differentiable once in x, weight, bias, gate and shift.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import ops, reference
from .gates import DEFAULT_BETA_RANGE, GATE_KINDS, KINDS, MAX_DEGREE, Beta, BetaRange, standardize, standardize_number
from .ops.shortcuts import bank
from .reference import Geometry
from .strategy import Product, choose_backend, choose_strategy, current, fused_refused
from .triton_kernels import geometry as geometries

IntOrInts = int | Sequence[int]


def gate_values(
    weight: Tensor, bias: Tensor, beta: Beta, kind: str = "sigmoid", beta_range: Sequence[float] = DEFAULT_BETA_RANGE
) -> Tensor:
    """g = act(weight * eta + bias), eta = (log beta - mean) / std over `beta_range` (MR-VAE, Eqn. 6 and 7).

    weight, bias: (C,); or weight (degree, C) for gates that are polynomials of eta, see GateSpec. beta: a number or 0-d
    tensor, giving (C,), or shape (N,), giving (N, C). Result in float32, or float64 for float64 parameters. ValueError
    for a beta that is not positive and finite, and for an unknown kind.
    """
    if kind not in GATE_KINDS:
        raise ValueError(f"gate kind is {kind!r}; expected one of {', '.join(GATE_KINDS)}")
    several = weight.dim() == 2 and 1 <= len(weight) <= MAX_DEGREE
    if bias.dim() != 1 or not (weight.dim() == 1 or several) or weight.shape[-1] != len(bias):
        raise ValueError(
            f"gate weight and bias have shapes {tuple(weight.shape)} and {tuple(bias.shape)}; expected (C,) each, or "
            f"(degree, C) for the weight of gates of degree 1 to {MAX_DEGREE}"
        )
    eta = standardize(beta, beta_range, device=weight.device, dtype=reference.gate_dtype(weight.dtype))
    return gate_bank(weight, bias, eta, [len(bias)], [kind])[0]


def gate_bank(weight: Tensor, bias: Tensor, eta: Tensor, sizes: Sequence[int], kinds: Sequence[str]) -> list[Tensor]:
    """All gates (and shifts, kind "identity") of a model in one operator, from one flat weight and bias.

    weight: (C,) or (degree, C). sizes: features of each, their sum being the length of bias. eta from
    `gates.standardize`: 0-d or (N,). Returns (C_i,) or (N, C_i) each.
    """
    backend = choose_backend(weight.device, weight.dtype, "gates")
    if backend == "reference":
        return reference.gate_bank(weight, bias, eta, sizes, kinds)
    codes = _kind_codes(tuple(kinds))
    if backend == "cpp" and not torch.compiler.is_compiling():
        return bank(tuple(sizes), codes).gates(weight, bias, eta)
    return _operators(backend).gates(weight, bias, eta, sizes, codes)


def gate_bank_at(
    weight: Tensor, bias: Tensor, beta: float, beta_range: BetaRange, sizes: tuple[int, ...], kinds: tuple[str, ...]
) -> list[Tensor]:
    """The same for one number beta, standardised on the way: the hot path of a training step."""
    if not torch.compiler.is_compiling() and choose_backend(weight.device, weight.dtype, "gates") == "cpp":
        return bank(sizes, _kind_codes(kinds)).gates_at(weight, bias, standardize_number(beta, beta_range))
    eta = standardize(beta, beta_range, device=weight.device, dtype=reference.gate_dtype(weight.dtype))
    return gate_bank(weight, bias, eta, sizes, kinds)


@functools.cache
def _kind_codes(kinds: tuple[str, ...]) -> tuple[int, ...]:
    return tuple(KINDS.index(kind) for kind in kinds)


def fold(
    weights: Sequence[Tensor], biases: Sequence[Tensor | None], gates: Sequence[Tensor],
    shifts: Sequence[Tensor | None], groups: Sequence[int],
) -> tuple[list[Tensor], list[Tensor | None]]:
    """W' = g W, b' = g b + t for all layers in one operator. One beta a batch: gates (C_i,).

    groups: 0 where the output channel is axis 0 of the weight, the number of groups for a transposed convolution.
    A layer with neither bias nor shift gets None.
    """
    if any(weight.is_complex() for weight in weights):
        raise TypeError("a weight is complex; gated operators take real numbers")
    backend = choose_backend(weights[0].device, weights[0].dtype, "fold") if weights else "reference"
    if backend != "reference":
        folded, folded_biases = _operators(backend).fold(weights, biases, gates, shifts, groups)
        return folded, [
            None if bias is None and shift is None else out
            for bias, shift, out in zip(biases, shifts, folded_biases, strict=True)
        ]
    pairs = [reference.fold(*entry) for entry in zip(weights, biases, gates, shifts, groups, strict=True)]
    return [weight for weight, _ in pairs], [bias for _, bias in pairs]


def epilogue(
    u: Tensor, bias: Tensor | None, gate: Tensor, shift: Tensor | None = None, dim: int = 1,
    activation: str | None = None,
) -> Tensor:
    """y = act(g (u + b) + t) along channel axis `dim` of a library product's result u."""
    if not -u.dim() <= dim < u.dim():
        raise ValueError(f"dim is {dim}; u has {u.dim()} axes")
    dim = dim % u.dim()
    gate, shift = _check_gate(gate, shift, bias, u.shape[dim], u, u.shape[0] if dim > 0 else None)
    operators = _operators(choose_backend(u.device, u.dtype, "epilogue"))
    return operators.epilogue(u, bias, gate, shift, dim, activation or "none")


def _operators(backend: str) -> ModuleType:
    """The backend's operators; triton, which is slow to import, only when it is first needed."""
    if backend == "cpp":
        return ops
    if backend == "triton":
        from .ops import triton

        return triton
    return reference


def gated_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor, shift: Tensor | None = None,
    activation: str | None = None, *, strategy: str | None = None,
) -> Tensor:
    """y = act(g (x W^T + b) + t).

    x (..., K), weight (C, K), bias (C,) or None, gate and shift (C,), or (N, C) with x (N, ..., K); y (..., C).
    activation: None, relu, silu, gelu, tanh, leaky_relu or elu. strategy: None (measurements, then the
    cost model), "fold", "epilogue" or "fused".
    ValueError for shapes that do not fit and for fold with one beta a sample.
    """
    gate, shift = check_linear(x, weight, bias, gate, shift)
    how = linear_strategy(x, weight, gate.dim() == 2, strategy)
    operators = _operators(choose_backend(x.device, x.dtype, how))
    return operators.gated_linear(x, weight, bias, gate, shift, activation or "none", how)


def check_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor, shift: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """gate and shift in the gates' own dtype; ValueError for shapes that do not fit."""
    if weight.dim() != 2 or x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"x has shape {tuple(x.shape)} and weight {tuple(weight.shape)}; expected x (..., K) and weight (C, K)"
        )
    return _check_gate(gate, shift, bias, weight.shape[0], x, x.shape[0] if x.dim() > 1 else None)


def linear_strategy(x: Tensor, weight: Tensor, per_sample: bool, asked: str | None = None) -> str:
    """How x W^T is gated."""
    if asked:
        return choose_strategy(0, 0, per_sample, asked)
    product = None if x.device.type == "cpu" else linear_product(x, weight, x.device)
    outputs = math.prod(x.shape[:-1]) * weight.shape[0]
    return choose_strategy(
        weight.numel(), outputs, per_sample, None, product, device=x.device, dtype=_dtype_of_product(x)
    )


def linear_product(x: Tensor, weight: Tensor, device: torch.device) -> Product:
    """x W^T on this device as measurements know it."""
    return Product("linear", device, _dtype_of_product(x), math.prod(x.shape[:-1]), *weight.shape)


def _dtype_of_product(x: Tensor) -> torch.dtype:
    """x's, or autocast's where it casts x."""
    kind = x.device.type
    autocast = kind != "meta" and torch.is_autocast_enabled(kind) and x.dtype != torch.float64
    return torch.get_autocast_dtype(kind) if autocast else x.dtype


def gated_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor, shift: Tensor | None = None, stride: IntOrInts = 1,
    padding: IntOrInts | str = 0, dilation: IntOrInts = 1, groups: int = 1, activation: str | None = None,
    *, strategy: str | None = None,
) -> Tensor:
    """y = act(g (conv1d(x, W) + b) + t): x (N, C_in, L) or (C_in, L); see gated_conv2d."""
    return _gated_convolution(
        1, False, x, weight, bias, gate, shift, stride, padding, 0, groups, dilation, activation, strategy
    )


def gated_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor, shift: Tensor | None = None, stride: IntOrInts = 1,
    padding: IntOrInts | str = 0, dilation: IntOrInts = 1, groups: int = 1, activation: str | None = None,
    *, strategy: str | None = None,
) -> Tensor:
    """y = act(g (conv2d(x, W) + b) + t) (MR-VAE, Eqn. 40 and 41).

    Arguments as torch's conv2d: x (N, C_in, H, W) or (C_in, H, W), weight (C_out, C_in / groups, kH, kW), bias (C_out,)
    or None, padding a number, a pair, "same" or "valid". gate and shift (C_out,), or (N, C_out) for one beta a sample.
    activation: None, relu, silu, gelu, tanh, leaky_relu or elu. strategy: None (measurements, then the
    cost model), "fold", "epilogue" or "fused".
    """
    return _gated_convolution(
        2, False, x, weight, bias, gate, shift, stride, padding, 0, groups, dilation, activation, strategy
    )


def gated_conv3d(
    x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor, shift: Tensor | None = None, stride: IntOrInts = 1,
    padding: IntOrInts | str = 0, dilation: IntOrInts = 1, groups: int = 1, activation: str | None = None,
    *, strategy: str | None = None,
) -> Tensor:
    """y = act(g (conv3d(x, W) + b) + t): x (N, C_in, D, H, W) or (C_in, D, H, W); see gated_conv2d."""
    return _gated_convolution(
        3, False, x, weight, bias, gate, shift, stride, padding, 0, groups, dilation, activation, strategy
    )


def gated_conv_transpose1d(
    x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor, shift: Tensor | None = None, stride: IntOrInts = 1,
    padding: IntOrInts = 0, output_padding: IntOrInts = 0, groups: int = 1, dilation: IntOrInts = 1,
    activation: str | None = None, *, strategy: str | None = None,
) -> Tensor:
    """y = act(g (conv_transpose1d(x, W) + b) + t): x (N, C_in, L) or (C_in, L); see gated_conv_transpose2d."""
    return _gated_convolution(
        1, True, x, weight, bias, gate, shift, stride, padding, output_padding, groups, dilation, activation, strategy
    )


def gated_conv_transpose2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor, shift: Tensor | None = None, stride: IntOrInts = 1,
    padding: IntOrInts = 0, output_padding: IntOrInts = 0, groups: int = 1, dilation: IntOrInts = 1,
    activation: str | None = None, *, strategy: str | None = None,
) -> Tensor:
    """y = act(g (conv_transpose2d(x, W) + b) + t).

    Arguments as torch's conv_transpose2d: x (N, C_in, H, W) or (C_in, H, W), weight (C_in, C_out / groups, kH, kW),
    bias (C_out,) or None. gate, shift, activation and strategy as in gated_conv2d.
    """
    return _gated_convolution(
        2, True, x, weight, bias, gate, shift, stride, padding, output_padding, groups, dilation, activation, strategy
    )


def gated_conv_transpose3d(
    x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor, shift: Tensor | None = None, stride: IntOrInts = 1,
    padding: IntOrInts = 0, output_padding: IntOrInts = 0, groups: int = 1, dilation: IntOrInts = 1,
    activation: str | None = None, *, strategy: str | None = None,
) -> Tensor:
    """y = act(g (conv_transpose3d(x, W) + b) + t): x (N, C_in, D, H, W) or (C_in, D, H, W).

    See gated_conv_transpose2d.
    """
    return _gated_convolution(
        3, True, x, weight, bias, gate, shift, stride, padding, output_padding, groups, dilation, activation, strategy
    )


def convolution_output_numel(
    x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int],
    transposed: bool, output_padding: Sequence[int], groups: int,
) -> int:
    """Elements of the convolution's result, by torch's documented output sizes; x batched. ValueError for stride 0."""
    if 0 in stride:
        raise ValueError(f"stride is {tuple(stride)}; expected positive numbers")
    kernel = weight.shape[2:]
    channels = weight.shape[1] * groups if transposed else weight.shape[0]
    numel = x.shape[0] * channels
    for size, k, s, p, d, extra in zip(x.shape[2:], kernel, stride, padding, dilation, output_padding, strict=True):
        reach = d * (k - 1) + 1
        numel *= (size - 1) * s - 2 * p + reach + extra if transposed else (size + 2 * p - reach) // s + 1
    return numel


def _gated_convolution(
    spatial: int, transposed: bool, x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor, shift: Tensor | None,
    stride: IntOrInts, padding: IntOrInts | str, output_padding: IntOrInts, groups: int, dilation: IntOrInts,
    activation: str | None, strategy: str | None,
) -> Tensor:
    if x.dim() == spatial + 1 and weight.dim() == spatial + 2:
        per_sample = isinstance(gate, Tensor) and gate.dim() == 2
        if per_sample and gate.shape[0] == 1:
            gate, shift = gate[0], None if shift is None else shift[0]
        elif per_sample:
            raise ValueError(f"x has shape {tuple(x.shape)}, no batch axis; expected one beta, not {gate.shape[0]}")
        return _gated_convolution(
            spatial, transposed, x.unsqueeze(0), weight, bias, gate, shift, stride, padding, output_padding, groups,
            dilation, activation, strategy,
        ).squeeze(0)
    gate, shift = check_convolution(x, weight, bias, gate, shift, transposed, groups, spatial)
    stride, dilation, output_padding = (_ints(value, spatial) for value in (stride, dilation, output_padding))
    if isinstance(padding, str):
        if transposed:
            raise ValueError(f"padding is {padding!r}; a transposed convolution takes numbers only")
        x, padding = _pad(x, weight, stride, dilation, padding)
    else:
        padding = _ints(padding, spatial)
    geometry = (stride, padding, dilation, transposed, output_padding, groups)
    how = convolution_strategy(x, weight, geometry, gate.dim() == 2, strategy)
    operators = _operators(choose_backend(x.device, x.dtype, how))
    if how == "fused" and (reason := fused_refusal(x, weight, geometry)):
        raise ValueError(fused_refused(reason))
    return operators.gated_convolution(x, weight, bias, gate, shift, *geometry, activation or "none", how)


def check_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor, shift: Tensor | None, transposed: bool, groups: int,
    spatial: int,
) -> tuple[Tensor, Tensor | None]:
    """gate and shift in the gates' own dtype; ValueError for shapes that do not fit."""
    channels_in = weight.shape[0] if transposed else weight.shape[1] * groups
    if x.dim() != spatial + 2 or weight.dim() != spatial + 2 or x.shape[1] != channels_in:
        raise ValueError(
            f"x has shape {tuple(x.shape)} and weight {tuple(weight.shape)} with groups={groups}; "
            f"expected x (N, {channels_in}, ...) with {spatial} spatial axes"
        )
    channels = weight.shape[1] * groups if transposed else weight.shape[0]
    return _check_gate(gate, shift, bias, channels, x, x.shape[0])


def convolution_strategy(
    x: Tensor, weight: Tensor, geometry: Geometry, per_sample: bool, asked: str | None = None
) -> str:
    """How a convolution of a batch x is gated."""
    if asked:
        return choose_strategy(0, 0, per_sample, asked)
    outputs = convolution_output_numel(x, weight, *geometry)
    product = None if x.device.type == "cpu" else convolution_product(x, weight, outputs, geometry, x.device)
    choose = functools.partial(
        choose_strategy, weight.numel(), outputs, per_sample, None, product, kind="convolution", device=x.device,
        dtype=_dtype_of_product(x),
    )
    how = choose()
    if how == "fused" and current().strategy is None and fused_refusal(x, weight, geometry):
        how = choose(fused_refused=True)
    return how


def fused_refusal(x: Tensor, weight: Tensor, geometry: Geometry) -> str | None:
    """Why the fused kernels do not take this convolution, or None; x and weight may be meta tensors."""
    if x.dim() != 4:
        return f"its kernels are for Linear, Conv2d and ConvTranspose2d, this is a {x.dim() - 2}-d convolution"
    x, weight = (torch.empty_like(value, device="meta", dtype=_dtype_of_product(value)) for value in (x, weight))
    return geometries.refusal(x, weight, geometries.geometry(*geometry))


def convolution_product(
    x: Tensor, weight: Tensor, outputs: int, geometry: Geometry, device: torch.device
) -> Product | None:
    """A convolution with that many outputs on this device as measurements know it; None unless it has 2 dimensions."""
    if x.dim() != 4:
        return None
    *_, transposed, _, groups = geometry
    columns = weight.shape[1] if transposed else weight.shape[0] // groups
    rows, terms = (numel // max(1, columns * groups) for numel in (outputs, weight.numel()))
    operation = ("conv_transpose2d" if transposed else "conv2d") + (f"/{groups}" if groups > 1 else "")
    return Product(operation, device, _dtype_of_product(x), rows, columns, terms)


def _ints(value: IntOrInts, count: int) -> tuple[int, ...]:
    if isinstance(value, int):
        return (value,) * count
    values = tuple(value)
    if len(values) == 1:
        return values * count
    if len(values) != count:
        raise ValueError(f"got {values}; expected one number or {count}")
    return values


def _pad(
    x: Tensor, weight: Tensor, stride: Sequence[int], dilation: Sequence[int], padding: str
) -> tuple[Tensor, tuple]:
    """Padding "valid" and "same" as numbers; pads x itself where "same" needs one more element on the right."""
    if padding == "valid":
        return x, (0,) * len(stride)
    if padding != "same" or any(s != 1 for s in stride):
        raise ValueError(
            f"padding is {padding!r} with stride {tuple(stride)}; expected numbers, 'valid', or 'same' with stride 1"
        )
    total = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
    if any(t % 2 for t in total):
        x = F.pad(x, [side for t in reversed(total) for side in (0, t % 2)])
    return x, tuple(t // 2 for t in total)


def _check_gate(
    gate: Tensor, shift: Tensor | None, bias: Tensor | None, features: int, like: Tensor, batch: int | None
) -> tuple[Tensor, Tensor | None]:
    """Shapes against silent broadcasting, complex numbers against a lost imaginary part; the gates' own dtype."""
    if like.is_complex():
        raise TypeError(f"x has dtype {like.dtype}; gated operators take real numbers")
    dtype = reference.gate_dtype(like.dtype)
    if getattr(gate, "dtype", None) != dtype:
        gate = _converted("gate", gate, dtype)
    if shift is not None and getattr(shift, "dtype", None) != dtype:
        shift = _converted("shift", shift, dtype)
    if bias is not None and bias.shape != (features,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}; expected ({features},)")
    for name, value in (("gate", gate), ("shift", shift)):
        if value is None:
            continue
        shape = value.shape
        if shape[-1:] != (features,) or len(shape) > 2 or (len(shape) == 2 and (batch is None or shape[0] != batch)):
            rows = "" if batch is None else f", or ({batch}, {features}) for one beta a sample"
            betas = f"; beta has {shape[0]} values for {batch} samples" if len(shape) == 2 and shape[0] != batch else ""
            raise ValueError(f"{name} has shape {tuple(shape)}; expected ({features},){rows}{betas}")
    if shift is not None and shift.dim() != gate.dim():
        raise ValueError(f"gate has shape {tuple(gate.shape)} and shift {tuple(shift.shape)}; expected the same")
    return gate, shift


def _converted(name: str, value: Any, dtype: torch.dtype) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is {value!r}; expected a tensor, (C,) or (N, C), as gate_values() gives it")
    return value.to(dtype)

"""Bias, gate, shift and activation of a product's result u, in one pass; the backward pass is in epilogue_backward.py.

    y = act(z),  z = g (u + b) + t

b is (C,); g and t are (C,), or (N, C) with one row a sample. Arithmetic in float32 (float64 for float64).

Memory: u and y are addressed as strided [samples, channels, positions] arrays (views.py), whatever their layout;
tensors that have no such view are copied first.

Grid: tiles of channels x positions, the positions of all samples in one row, so that small images fill a tile too; one
division for each 16 bytes finds the sample. Bytes: reads u and writes y, each once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import ACTIVATIONS, NEEDS_ARGUMENT, activate, activation_code
from .device import on_device, processors
from .epilogue_backward import ARGUMENT, INPUT, REAL, RESULT
from .epilogue_plan import Wanted, backward
from .launch import INT32_LIMIT, TRITON_NAMES, Variant, accumulation_dtype, check_device, wide
from .views import (
    Layout,
    in_order,
    laid_out,
    layout,
    offsets,
    parameters,
    remembered,
    restored,
    result_of,
    sample_and_position,
    tile_of,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
TILE, SMALL_TILE = 4096, 1024
"""Elements a program computes; the small one where tensors are too small to give each processor a program."""
PARAMETERS = ["bias", "gate", "shift"]
"""Slices of one tensor may start anywhere; read once a tile, they are not worth kernels of their own."""
STRIDES = [f"{tensor}_{axis}" for tensor in "uy" for axis in ("sample", "channel", "position")]


@triton.jit(
    do_not_specialize=["channel_units", "position_units", "sample_units", "magic", "magic_shift"],
    do_not_specialize_on_alignment=[*STRIDES, *PARAMETERS],
)
def forward(
    u, bias, gate, shift, y,
    u_sample, u_channel, u_position, y_sample, y_channel, y_position,
    channel_units, position_units, sample_units, magic, magic_shift,
    CHANNEL_UNIT: tl.constexpr, LANES: tl.constexpr, U_UNIT: tl.constexpr, Y_UNIT: tl.constexpr,
    CHANNELS_FASTEST: tl.constexpr, ONE_SAMPLE: tl.constexpr, GATE_BY_SAMPLE: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_J: tl.constexpr, REAL: tl.constexpr, WIDE: tl.constexpr,
):
    program = tl.program_id(0)
    if WIDE:
        program = tl.cast(program, tl.int64)
    channels = channel_units * CHANNEL_UNIT
    tiles = tl.cdiv(channels, BLOCK_C)
    c = program % tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    j = program // tiles * BLOCK_J + tl.arange(0, BLOCK_J)
    n, m = sample_and_position(j, sample_units, magic, magic_shift, ONE_SAMPLE, WIDE)
    in_c = c < channels
    in_tile = in_c[:, None, None] & (j < position_units)[None, :, None]
    b, g, t = parameters(
        bias, gate, shift, c, m if ONE_SAMPLE else n, channels, in_c, in_tile, GATE_BY_SAMPLE, REAL
    )
    source = u + offsets(c, n, m, u_sample, u_channel, u_position, U_UNIT, LANES, CHANNELS_FASTEST)
    z = g * (tl.load(source, mask=in_tile, other=0.0).to(REAL) + b) + t
    target = y + offsets(c, n, m, y_sample, y_channel, y_position, Y_UNIT, LANES, CHANNELS_FASTEST)
    tl.store(target, activate(z, ACTIVATION).to(y.dtype.element_ty), mask=in_tile)


class Plan(NamedTuple):
    layout: Layout
    grid: tuple[int]
    numbers: tuple[int, ...]
    constants: dict[str, Any]
    dense: bool


def largest_tile(dtype: torch.dtype, is_wide: bool) -> int:
    """Numbers and offsets of 64 bits take two registers each."""
    return TILE // 2 if is_wide or dtype == torch.float64 else TILE


def make_plan(u: Tensor, axis: int, per_sample: bool, activation: int) -> Plan:
    found = layout(u, (), axis, per_sample)
    # u may be expanded, its result is not
    is_wide = wide(u, slack=2 * TILE) or u.numel() + 2 * TILE > INT32_LIMIT
    elements = largest_tile(u.dtype, is_wide) if u.numel() >= 2 * TILE * processors(u.device) else SMALL_TILE
    block_c, block_j = tile_of(found, elements, found.lanes)
    units_of = dict(zip(("U_UNIT", "Y_UNIT"), found.tensor_units, strict=True))
    constants = {
        "CHANNEL_UNIT": found.channel_unit, "LANES": found.lanes, **units_of,
        "CHANNELS_FASTEST": found.channels_fastest, "ONE_SAMPLE": found.view.samples == 1,
        "GATE_BY_SAMPLE": per_sample, "ACTIVATION": activation, "BLOCK_C": block_c, "BLOCK_J": block_j,
        "REAL": REAL[accumulation_dtype(u.dtype)], "WIDE": is_wide,
    }
    channels = found.view.channels
    grid = (triton.cdiv(channels, block_c) * triton.cdiv(found.position_units, block_j),)
    numbers = (
        *found.stride_arguments, channels // found.channel_unit, found.position_units, *found.division()
    )
    return Plan(found, grid, numbers, constants, u.stride() == found.strides[0])


def check(
    name: str, u: Tensor, bias: Tensor | None, gate: Tensor, shift: Tensor | None, dim: int
) -> tuple[int, bool]:
    """The channel axis and whether there are several samples with a gate each; errors where arguments do not fit."""
    if not -u.dim() <= dim < u.dim():
        raise ValueError(f"{name}: dim is {dim} for u of shape {tuple(u.shape)}; expected an axis of u")
    axis = dim % u.dim()
    channels = u.shape[axis]
    shared = gate.shape == (channels,)
    if not shared and not (axis > 0 and gate.shape == (u.shape[0], channels)):
        raise ValueError(
            f"{name}: gate has shape {tuple(gate.shape)} for u of shape {tuple(u.shape)}; expected (C,) with C = "
            f"{channels}, or (N, C) with one row a sample and the channels not in axis 0"
        )
    if bias is not None and bias.shape != (channels,):
        raise ValueError(f"{name}: bias has shape {tuple(bias.shape)}; expected ({channels},)")
    if shift is not None and shift.shape != gate.shape:
        raise ValueError(f"{name}: shift has shape {tuple(shift.shape)}; expected {tuple(gate.shape)}, that of gate")
    for what, tensor in (("u", u), ("bias", bias), ("gate", gate), ("shift", shift)):
        if tensor is not None and tensor.dtype not in DTYPES:
            raise TypeError(f"{name}: {what} has dtype {tensor.dtype}; expected float32, float64, bfloat16 or float16")
    check_device(name, u, bias, gate, shift)
    return axis, not shared and u.shape[0] != 1


def epilogue(
    u: Tensor, bias: Tensor | None, gate: Tensor, shift: Tensor | None, dim: int, activation: str,
    in_place: bool = False,
) -> Tensor:
    """y = act(g (u + b) + t) along channel axis `dim` of u.

    u of any strides in float32, bfloat16, float16 or float64; bias (C,); gate and shift (C,), or (N, C) with the
    samples in axis 0 of u. y has u's dtype and the strides of torch.empty_like(u). in_place: y is u itself,
    overwritten, where u is dense; where it is not, y is a new tensor and u stays as it is. ValueError for shapes,
    TypeError for dtypes, RuntimeError for devices.
    """
    axis, per_sample = check("epilogue", u, bias, gate, shift, dim)
    code = activation_code(activation)
    if u.numel() == 0:
        return u if in_place else torch.empty_like(u)
    key = ("forward", u.shape, u.stride(), u.dtype, u.device, axis, per_sample, code)
    plan: Plan = remembered(key, lambda: make_plan(u, axis, per_sample, code))
    in_place = in_place and plan.dense
    source = laid_out(u, plan.layout)
    y = source if in_place else result_of(u, plan.layout)
    with on_device(u):
        forward[plan.grid](
            source, contiguous(bias), contiguous(gate), contiguous(shift), y, *plan.numbers, **plan.constants
        )
    if in_place:
        return u if y is u else u.copy_(in_order(y, plan.layout))
    return restored(y, u, plan.layout)


def contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def epilogue_backward(
    grad: Tensor, u: Tensor, bias: Tensor | None, gate: Tensor, shift: Tensor | None, dim: int, activation: str,
    mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(du, db, dg, dt) for y = act(g (u + b) + t), from dy = grad, in one pass over grad and u.

    grad: of u's shape and any strides. The other arguments are those of `epilogue`. mask: which of du, db, dg and dt to
    compute; the others, and those of an absent bias or shift, are empty, (0,). du has u's dtype and the strides of
    torch.empty_like(u); db, dg and dt are contiguous, in the dtypes of bias, gate and shift. Sums are taken in a fixed
    order. With activation "none" and without dg the values of u do not matter. Errors as for `epilogue`.
    """
    axis, per_sample = check("epilogue_backward", u, bias, gate, shift, dim)
    code = activation_code(activation)
    check_gradient("epilogue_backward", grad, u)
    want_u, want_bias, want_gate, want_shift = mask
    wanted = Wanted(want_u, want_bias and bias is not None, want_gate, want_shift and shift is not None)
    db = torch.empty_like(bias, memory_format=torch.contiguous_format) if wanted.bias else None  # type: ignore[arg-type]
    dg = torch.empty_like(gate, memory_format=torch.contiguous_format) if wanted.gate else None
    dt = torch.empty_like(shift, memory_format=torch.contiguous_format) if wanted.shift else None  # type: ignore[arg-type]
    du = None
    if u.numel() == 0:
        du = torch.empty_like(u)
        for result in (db, dg, dt):
            if result is not None:
                result.zero_()
    elif any(wanted):
        du = backward(
            grad, u, contiguous(bias), contiguous(gate), contiguous(shift), axis, per_sample, code, INPUT.value,
            wanted, (db, dg, dt),
        )
    return (
        u.new_empty(0) if du is None or not wanted.u else du,
        (u if bias is None else bias).new_empty(0) if db is None else db,
        gate.new_empty(0) if dg is None else dg,
        gate.new_empty(0) if dt is None else dt,
    )


def channel_sums(grad: Tensor, saved: Tensor | None, dim: int, activation: str) -> Tensor:
    """The sum of s = act'(z) dy over every axis but the channel axis `dim`: (C,) in float32 (float64 for float64).

    grad: dy, of any strides. saved, of its shape: the result y = act(z), or the argument z for the activations in
    NEEDS_ARGUMENT; None for "none". Two launches at most, and the same bits each time. ValueError for shapes or a
    missing `saved`, TypeError for dtypes, RuntimeError for devices.
    """
    code = activation_code(activation)
    if saved is None and code != 0:
        raise ValueError(f"channel_sums: saved is None for activation {activation!r}; expected its result or argument")
    values = grad if saved is None else saved
    if not -values.dim() <= dim < values.dim():
        raise ValueError(f"channel_sums: dim is {dim} for grad of shape {tuple(grad.shape)}; expected an axis of it")
    check_gradient("channel_sums", grad, values)
    check_device("channel_sums", grad, saved)
    sums = grad.new_empty(values.shape[dim], dtype=accumulation_dtype(values.dtype))
    if grad.numel() == 0:
        return sums.zero_()
    kind = (ARGUMENT if activation in NEEDS_ARGUMENT else RESULT).value
    backward(
        grad, values, None, None, None, dim % values.dim(), False, code, kind, Wanted(False, False, False, True),
        (None, None, sums),
    )
    return sums


def check_gradient(name: str, grad: Tensor, like: Tensor) -> None:
    if grad.shape != like.shape:
        raise ValueError(f"{name}: grad has shape {tuple(grad.shape)}; expected {tuple(like.shape)}, that of u or y")
    if grad.dtype not in DTYPES:
        raise TypeError(f"{name}: grad has dtype {grad.dtype}; expected float32, float64, bfloat16 or float16")
    check_device(name, grad, like)


def variants(architecture: str = "sm_90") -> list[Variant]:
    """Each dtype in each layout, each activation once, and 64-bit offsets; on any architecture."""
    found: list[Variant] = []
    for dtype in DTYPES:
        for where in ("positions fastest", "channels fastest"):
            for by_sample in (False, True):
                code = len(found) % len(ACTIVATIONS)
                found.append(_variant(dtype, where, by_sample, code, wide=False))
    return [*found, _variant(torch.float32, "strided", True, 0, wide=True)]


def _variant(dtype: torch.dtype, where: str, by_sample: bool, code: int, wide: bool) -> Variant:
    name, real = TRITON_NAMES[dtype], accumulation_dtype(dtype)
    unit, tile = 1 if where == "strided" else 16 // dtype.itemsize, largest_tile(dtype, wide)
    channels_fastest = where == "channels fastest"
    fastest = {"strided": {}, "channels fastest": {"channel": 1}, "positions fastest": {"position": 1}}[where]
    constants: dict[str, Any] = {f"{tensor}_{axis}": value for tensor in "uy" for axis, value in fastest.items()}
    types = {"u": f"*{name}", "bias": f"*{name}", "y": f"*{name}"}
    types.update({tensor: f"*{TRITON_NAMES[real]}" for tensor in ("gate", "shift")})
    numbers = [*STRIDES, "channel_units", "position_units", "sample_units", "magic", "magic_shift"]
    types.update({name: "i64" if wide and name != "magic" else "i32" for name in numbers if name not in constants})
    constants.update(
        CHANNEL_UNIT=unit if channels_fastest else 1, LANES=1 if channels_fastest else unit, U_UNIT=unit, Y_UNIT=unit,
        CHANNELS_FASTEST=channels_fastest, ONE_SAMPLE=channels_fastest, GATE_BY_SAMPLE=by_sample, ACTIVATION=code,
        BLOCK_C=128 if channels_fastest else 8, BLOCK_J=tile // 128 if channels_fastest else tile // (8 * unit),
        REAL=REAL[real], WIDE=wide,
    )
    label = f"epilogue.forward {name} {where} {'by sample' if by_sample else 'shared'} {ACTIVATIONS[code]}"
    return Variant(label, forward, types, constants)

"""What conv2d and conv_transpose2d share on the host: plans of launches, the order of a backward pass.

The kernels are in implicit_gemm.py and weight_gradient.py. A convolution's input gradient is the other convolution,
with the same weight: so both operators call both.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .activations import NEEDS_ARGUMENT, activation_code
from .configurations import Tiles, choose, precision_class
from .device import float32_precision, on_device
from .epilogue import channel_sums, epilogue_backward
from .fold import finish_weight_gradient
from .geometry import FEW_CHANNELS, Geometry, Pair, output_size, refusal
from .implicit_gemm import (
    blocks,
    channels_in_units,
    convolve,
    innermost_width,
    reaches_beyond,
)
from .launch import check_device, divisor, dot_dtype, signed
from .weight_gradient import Layout, partial_weight_gradient

PACKING_PAYS = 2**31
"""Multiplications from which a weight whose taps are innermost is copied to channels_last before a product."""

Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


class Plan(NamedTuple):
    """All that a launch of `convolve` needs beside tensors and tiles; depends on shapes and strides only."""

    scalars: tuple[int, ...]
    units: dict[str, int]
    rows: int
    columns: int
    channels: int
    reach: int
    repeats: int
    flat: bool
    access: int
    x_rows_inner: bool
    y_rows_inner: bool
    wide: bool


@functools.lru_cache(maxsize=4096)
def plan(
    x: Layout, weight: Layout, y: Layout, saved: tuple[int, ...], stride: Pair, padding: Pair, dilation: Pair,
    groups: int, transposed: bool, itemsize: int,
) -> Plan:
    """saved: strides; zeros where there is none. The product reduces over axis 0 of the weight where transposed."""
    (samples, _, in_height, in_width), (_, out_channels, out_height, out_width) = x[0], y[0]
    phases = stride if transposed else (1, 1)
    lines, across = (-(-size // step) for size, step in zip(y[0][2:], phases, strict=True))
    common = [math.gcd(*pair) for pair in zip(stride, dilation, strict=True)]
    inverses = [
        pow(hop // factor, -1, step // factor)
        for hop, factor, step in zip(dilation, common, stride, strict=True)
    ]
    sizes = weight[0][0] // groups, weight[0][1]
    channels, columns = sizes if transposed else sizes[::-1]
    channel_step, column_step = weight[1][:2] if transposed else weight[1][1::-1]
    kernel = weight[0][2:]
    taps = [0 if size == 1 else step for size, step in zip(kernel, weight[1][2:], strict=True)]
    next_group = 0 if groups == 1 else sizes[0] * weight[1][0]
    most, flat = 16 // itemsize, channels < FEW_CHANNELS
    (x_n, x_c, x_h, x_w), x_unit = channels_in_units(*x, 1 if flat else most)
    (saved_n, saved_c, saved_h, saved_w), saved_unit = channels_in_units(x[0], saved, 1 if flat else most)
    (y_n, y_c, y_h, y_w), y_unit = channels_in_units(*y, most)
    weight_unit = 1
    if column_step == 1 or (channel_step == 1 and not flat):
        weight_unit = math.gcd(most, next_group, *taps, channel_step if column_step == 1 else column_step)
    units = {
        "CHANNEL_UNIT": 1 if flat else math.gcd(channels, most), "COLUMN_UNIT": math.gcd(columns, most),
        "X_UNIT": x_unit, "SAVED_UNIT": saved_unit, "Y_UNIT": y_unit,
        "WEIGHT_CHANNEL_UNIT": weight_unit if column_step == 1 else 1,
        "WEIGHT_COLUMN_UNIT": 1 if column_step == 1 else weight_unit,
    }
    beyond = sum(step * (2 * pad + size * hop + 2 * leap) for step, pad, size, hop, leap in zip(
        map(max, x[1][2:], saved[2:]), padding, kernel, dilation, stride, strict=True
    ))
    widths = min(y_unit, units["COLUMN_UNIT"]), most if flat else min(x_unit, units["CHANNEL_UNIT"])
    span = lines * across
    return Plan(
        (samples * span, span, *signed(divisor(span)), across, *signed(divisor(across)), in_height, in_width,
         out_height, out_width, *kernel, *stride, *padding, *dilation, *common, *inverses, out_channels,
         x_n, x_h, saved_n, saved_h, next_group // weight_unit, *(step // weight_unit for step in taps), y_n, y_h,
         channels // units["CHANNEL_UNIT"], columns // units["COLUMN_UNIT"], x_c, x_w, saved_c, saved_w,
         column_step // units["WEIGHT_COLUMN_UNIT"], channel_step // units["WEIGHT_CHANNEL_UNIT"], y_c, y_w),
        units, samples * span, columns, channels, channels * math.prod(kernel), groups * math.prod(phases),
        flat, min(widths) * itemsize, innermost_width(x[1]), innermost_width(y[1]),
        reaches_beyond((x, weight, y, (x[0], saved)), beyond),
    )


def product(
    x: Tensor, weight: Tensor, y: Tensor, layer: Geometry, transposed: bool, activation: str,
    saved: Tensor | None = None, bias: Tensor | None = None, gate: Tensor | None = None, shift: Tensor | None = None,
    kept: Tensor | None = None, backward: bool = False,
) -> None:
    """Writes y, and `kept`, which has the strides of y: see `convolve`."""
    if y.numel() == 0:
        return
    stride, padding, dilation, _, _, groups = layer
    gate, shift, bias = (None if value is None else value.contiguous() for value in (gate, shift, bias))

    def planned() -> Plan:
        return plan(
            (x.shape, x.stride()), (weight.shape, weight.stride()), (y.shape, y.stride()),
            (0, 0, 0, 0) if saved is None else saved.stride(), stride, padding, dilation, groups, transposed,
            x.element_size(),
        )

    known = planned()
    if known.rows * groups * known.columns * known.reach >= PACKING_PAYS and weight.stride(1) != 1:
        packed = weight.contiguous(memory_format=torch.channels_last)
        if packed is not weight:
            weight = packed
            known = planned()
    precision = float32_precision(x.device, True) if x.dtype == torch.float32 else "ieee"
    code, dot = activation_code(activation), dot_dtype(x.dtype)
    prologue = backward and (saved is not None or gate is not None)
    per_sample = not backward and gate is not None and gate.dim() == 2

    def launch(tiles: Tiles) -> None:
        block_m, block_n, block_k = blocks(
            tiles, known.rows, known.columns, known.channels, known.reach, known.x_rows_inner, prologue,
            known.access, activation,
        )
        programs = known.repeats * -(-known.rows // block_m) * -(-known.columns // block_n)
        with on_device(x):
            convolve[(programs,)](
                x, saved, weight, bias, gate, shift, y, kept, *known.scalars, **known.units,
                TRANSPOSED=transposed, BACKWARD=backward, PER_SAMPLE=per_sample, ACTIVATION=code, FLAT=known.flat,
                X_ROWS_INNER=known.x_rows_inner, Y_ROWS_INNER=known.y_rows_inner, WIDE=known.wide, PRECISION=precision,
                DOT=dot, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, num_warps=tiles.warps,
                num_stages=tiles.stages,
            )

    launch(choose(
        "convolution", x.device, precision_class(x.dtype, precision), known.rows * known.repeats // groups,
        known.columns, known.reach, launch,
    ))


def check_parameters(
    name: str, x: Tensor, bias: Tensor | None, gate: Tensor, shift: Tensor | None, channels: int
) -> None:
    """ValueError for shapes, TypeError for dtypes of bias, gate and shift of a layer with so many output channels."""
    if bias is not None:
        if bias.shape != (channels,):
            raise ValueError(f"{name}: bias has shape {tuple(bias.shape)}; expected ({channels},)")
        if not bias.is_floating_point():
            raise TypeError(f"{name}: bias has dtype {bias.dtype}; expected a floating-point dtype")
    if gate.shape != (channels,) and gate.shape != (x.shape[0], channels):
        raise ValueError(
            f"{name}: gate has shape {tuple(gate.shape)}; expected ({channels},), or ({x.shape[0]}, {channels}) with "
            "one row a sample"
        )
    if shift is not None and shift.shape != gate.shape:
        raise ValueError(f"{name}: shift has shape {tuple(shift.shape)}; expected {tuple(gate.shape)}, the gate's")
    for label, value in (("gate", gate), ("shift", shift)):
        if value is not None and value.dtype != torch.float32:
            raise TypeError(f"{name}: {label} has dtype {value.dtype}; expected torch.float32")


def forward(
    name: str, x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor, shift: Tensor | None, layer: Geometry,
    activation: str, keep: bool,
) -> tuple[Tensor, Tensor]:
    """(y, kept): see conv2d."""
    reason = refusal(x, weight, layer)
    if reason is not None:
        raise ValueError(f"{name}: {reason}")
    channels = weight.shape[1] * layer.groups if layer.transposed else weight.shape[0]
    check_parameters(name, x, bias, gate, shift, channels)
    check_device(name, x, weight, bias, gate, shift)
    y = torch.empty(
        (x.shape[0], channels, *output_size(x.shape, weight.shape, layer)), dtype=x.dtype, device=x.device,
        memory_format=torch.channels_last if is_channels_last(x) else torch.contiguous_format,
    )
    keeps = keep and (gate.dim() == 2 or activation in NEEDS_ARGUMENT)
    kept = torch.empty_like(y) if keeps else y.new_empty(0)
    product(
        x, weight, y, layer, layer.transposed, activation, bias=bias, gate=gate, shift=shift,
        kept=kept if keeps else None,
    )
    return y, kept


def backward(
    name: str, grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor, shift: Tensor | None,
    y: Tensor | None, kept: Tensor, layer: Geometry, activation: str, mask: Sequence[bool],
) -> Gradients:
    """(dx, dW, db, dg, dt): see conv2d_backward."""
    channels = weight.shape[1] * layer.groups if layer.transposed else weight.shape[0]
    expected = (x.shape[0], channels, *output_size(x.shape, weight.shape, layer))
    if grad.shape != expected:
        raise ValueError(f"{name}: grad has shape {tuple(grad.shape)}; expected {expected}, the result's")
    if grad.dtype != x.dtype:
        raise TypeError(f"{name}: grad has dtype {grad.dtype}; expected {x.dtype}, the result's")
    check_device(name, grad, x, weight, bias, gate, shift, y, kept)
    want_x, want_weight, want_bias, want_gate, want_shift = mask
    want_bias, want_shift = want_bias and bias is not None, want_shift and shift is not None
    per_sample = gate.dim() == 2
    db = (weight if bias is None else bias).new_empty(0)
    dg = dt = gate.new_empty(0)
    saved: Tensor | None = None
    if per_sample:
        wanted = (want_x or want_weight, want_bias, want_gate, want_shift)
        grad, db, dg, dt = epilogue_backward(grad, kept, bias, gate, shift, 1, activation, wanted)
        activation = "none"
    elif activation != "none":
        saved = kept if activation in NEEDS_ARGUMENT else y
        if saved is None or saved.shape != grad.shape:
            raise ValueError(
                f"{name}: activation {activation} needs {'kept' if activation in NEEDS_ARGUMENT else 'y'} from "
                f"forward, of shape {tuple(grad.shape)}; got {None if saved is None else tuple(saved.shape)}"
            )

    dx = torch.empty_like(x) if want_x else x.new_empty(0)
    if want_x:
        product(
            grad, weight, dx, layer, not layer.transposed, activation, saved=saved, gate=None if per_sample else gate,
            backward=True,
        )

    dw = weight.new_empty(0)
    want_sums = not per_sample and (want_bias or want_shift or (want_gate and bias is not None))
    sums = None
    partial = None
    # gates belong to axis 0 of conv2d's weight, which stays first when the others are taken in their order in memory
    taps_inner = layer.transposed or not is_channels_last(weight)
    if want_weight or (want_gate and not per_sample):
        a, b = (x, grad) if layer.transposed else (grad, x)
        partial, sums = partial_weight_gradient(
            a, b, saved, not layer.transposed, tuple(weight.shape), layer.stride, layer.padding, layer.dilation,
            layer.groups, activation, taps_inner, want_sums and not layer.transposed,
        )
    if want_sums and sums is None:
        sums = channel_sums(grad, saved, 1, activation)
    if partial is not None:
        folded = layer.groups if layer.transposed else 0
        stored = weight if taps_inner else weight.permute(0, 2, 3, 1)
        if per_sample:
            dw = finish_weight_gradient(partial, None, stored, None, None, folded, (True, False, False, False))[0]
        else:
            dw, db, dg, dt = finish_weight_gradient(
                partial, sums, stored, bias, gate, folded, (want_weight, want_bias, want_gate, want_shift)
            )
        if want_weight and not taps_inner:
            dw = dw.permute(0, 3, 1, 2)
        if want_weight and dw.stride() != weight.stride() and not weight.is_contiguous():
            dw = torch.empty_like(weight).copy_(dw)
    elif sums is not None:
        if want_bias and bias is not None:
            db = (gate * sums).to(bias.dtype)
        dt = sums.to(gate.dtype) if want_shift else dt
    return dx, dw, db, dg, dt

"""A gated linear layer in one kernel: the product with bias, gate, shift and activation where its results are stored.

    y = act(z),  z = g (u + b) + t,  u = x W^T

x (..., K) and W (C, K) of any strides, in float32, bfloat16 or float16; b (C,); g and t (C,), or (N, C) with x
(N, ..., K). Sums in float32; float32 products in TF32 where torch's settings allow it. Backward: linear_backward.py.

Memory: x is a matrix of M = N ... rows with two strides (a copy where its axes do not merge), y is contiguous.

Grid: a program for each tile of y, in groups that share rows of x in L2. Bytes: x once for each column of tiles, W once
for each row of tiles, mostly from L2; writes y, and u or z where the backward pass needs them. u is never read again.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import ACTIVATIONS, GELU, NEEDS_ARGUMENT, activate, activation_code
from .configurations import Tiles, choose, every, precision_class
from .device import float32_precision, on_device
from .launch import TRITON_NAMES, Variant, dot_dtype, wide
from .linear_backward import linear_backward
from .matrices import (
    COMPILED_DOT,
    as_matrix,
    blocks,
    check_linear,
    linear_refusal,
    narrowed,
    places,
    strides_of,
    tile_of_program,
    unit_of,
)
from .views import remembered

__all__ = ["linear", "linear_backward", "linear_refusal"]


@triton.jit(
    do_not_specialize=["rows", "channel_units", "inner_units"],
    do_not_specialize_on_alignment=["x_row", "bias", "gate", "shift"]
)
def forward(
    x, weight, bias, gate, shift, y, kept, rows, channel_units, inner_units, x_row, x_inner, w_channel, w_inner,
    rows_per_sample,
    CHANNEL_UNIT: tl.constexpr, INNER_UNIT: tl.constexpr, X_ROW: tl.constexpr, X_INNER: tl.constexpr,
    W_CHANNEL: tl.constexpr, W_INNER: tl.constexpr, GATE_BY_SAMPLE: tl.constexpr, ACTIVATION: tl.constexpr,
    EVEN_INNER: tl.constexpr, PRECISION: tl.constexpr, DOT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, WIDE: tl.constexpr,
):
    channels = channel_units * CHANNEL_UNIT
    inner = inner_units * INNER_UNIT
    tile_row, tile_column = tile_of_program(tl.program_id(0), tl.cdiv(rows, BLOCK_M), tl.cdiv(channels, BLOCK_N))
    row = tile_row * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tile_column * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    in_row = row < rows
    in_c = c < channels
    if WIDE:
        row, c, k = row.to(tl.int64), c.to(tl.int64), k.to(tl.int64)
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, inner, BLOCK_K):
        x_mask = in_row[:, None]
        w_mask = in_c[None, :]
        if not EVEN_INNER:
            x_mask = x_mask & (start + k < inner)[None, :]
            w_mask = w_mask & (start + k < inner)[:, None]
        x_places = places(row[:, None], (start + k)[None, :], x_row, x_inner, X_ROW, X_INNER)
        w_places = places(c[None, :], (start + k)[:, None], w_channel, w_inner, W_CHANNEL, W_INNER)
        left = tl.load(x + x_places, mask=x_mask, other=0.0).to(DOT)
        right = tl.load(weight + w_places, mask=w_mask, other=0.0).to(DOT)
        sums = tl.dot(left, right, sums, input_precision=PRECISION)
    target = row[:, None] * channels + c[None, :]
    mask = in_row[:, None] & in_c[None, :]
    if GATE_BY_SAMPLE:
        # the backward pass sees u in y's dtype: unrounded here, ReLU's slope there could be that of the other side
        sums = sums.to(y.dtype.element_ty).to(tl.float32)
    z = sums
    if bias is not None:
        z += tl.load(bias + c, mask=in_c, other=0.0).to(tl.float32)[None, :]
    if GATE_BY_SAMPLE:
        own = (row // rows_per_sample)[:, None] * channels + c[None, :]
        z *= tl.load(gate + own, mask=mask, other=0.0).to(tl.float32)
        if shift is not None:
            z += tl.load(shift + own, mask=mask, other=0.0).to(tl.float32)
        if kept is not None:
            tl.store(kept + target, sums.to(kept.dtype.element_ty), mask=mask)
    else:
        z *= tl.load(gate + c, mask=in_c, other=0.0).to(tl.float32)[None, :]
        if shift is not None:
            z += tl.load(shift + c, mask=in_c, other=0.0).to(tl.float32)[None, :]
        if kept is not None:
            tl.store(kept + target, z.to(kept.dtype.element_ty), mask=mask)
    tl.store(y + target, activate(z, ACTIVATION).to(y.dtype.element_ty), mask=mask)


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor, shift: Tensor | None, activation: str, keep: bool
) -> tuple[Tensor, Tensor]:
    """(y, kept) with y = act(g (x W^T + b) + t): x (..., K), weight (C, K), y (..., C) contiguous, in x's dtype.

    bias (C,); gate and shift (C,), or (N, C) with x (N, ..., K). kept: what linear_backward needs beside y, in x's
    dtype, where `keep`: u = x W^T for one gate a sample, else z for the activations in NEEDS_ARGUMENT; (0,) otherwise.
    ValueError for shapes, TypeError for dtypes (see linear_refusal), RuntimeError for devices.
    """
    check_linear("linear", x, weight, bias, gate, shift)
    code = activation_code(activation)
    by_sample = gate.dim() == 2
    channels, inner = weight.shape
    y = torch.empty((*x.shape[:-1], channels), dtype=x.dtype, device=x.device)
    keeps = keep and (by_sample or activation in NEEDS_ARGUMENT)
    kept = torch.empty_like(y) if keeps else x.new_empty(0)
    if y.numel() == 0:
        return y, kept
    matrix = as_matrix(x)
    rows = matrix.shape[0]
    rows_per_sample = rows // gate.shape[0] if by_sample else 1
    key = ("linear", matrix.shape, matrix.stride(), weight.shape, weight.stride(), x.dtype, by_sample, rows_per_sample)

    def make() -> tuple[tuple[int, ...], dict[str, Any], bool]:
        left, right = strides_of(matrix), strides_of(weight)
        units = unit_of(channels, x.dtype), unit_of(inner, x.dtype)
        numbers = (
            rows, channels // units[0], inner // units[1], *left.strides, *right.strides, rows_per_sample,
        )
        names = ("CHANNEL_UNIT", "INNER_UNIT", "X_ROW", "X_INNER", "W_CHANNEL", "W_INNER")
        constants: dict[str, Any] = dict(zip(names, (*units, *left.units, *right.units), strict=True))
        constants.update(GATE_BY_SAMPLE=by_sample, WIDE=wide(matrix, weight, y, slack=2**16), DOT=dot_dtype(x.dtype))
        return numbers, constants, left.units[0] == right.units[0] == units[1] == 16 // x.element_size()

    numbers, constants, whole = remembered(key, make)
    precision = float32_precision(x.device, convolution=False) if x.dtype == torch.float32 else "ieee"
    tensors = (
        matrix, weight, None if bias is None else bias.contiguous(), gate.contiguous(),
        None if shift is None else shift.contiguous(), y, kept if keeps else None,
    )

    def launch(tiles: Tiles) -> None:
        tiles = narrowed(tiles, whole)
        grid = (blocks(rows, tiles.m) * blocks(channels, tiles.n),)
        forward[grid](
            *tensors, *numbers, **constants, ACTIVATION=code, EVEN_INNER=inner % tiles.k == 0, PRECISION=precision,
            BLOCK_M=tiles.m, BLOCK_N=tiles.n, BLOCK_K=tiles.k, num_warps=tiles.warps, num_stages=tiles.stages,
        )

    with on_device(x):
        launch(choose("linear", x.device, precision_class(x.dtype, precision), rows, channels, inner, launch))
    return y, kept


def variants(architecture: str = "sm_90") -> list[Variant]:
    """Every tile of the table, GELU on each, then each activation and the other options once."""
    found: list[Variant] = []
    for operation, precision, tiles in every(architecture):
        if operation == "linear":
            for dtype in (torch.bfloat16, torch.float16) if precision == "half" else (torch.float32,):
                found.append(_variant(dtype, precision, tiles, len(found) % len(ACTIVATIONS), False, True))
            if precision == "half":
                for even, whole in ((True, True), (False, True), (False, False)):
                    found.append(_variant(torch.bfloat16, precision, tiles, GELU.value, False, even, whole))
    tiles = next(tiles for operation, _, tiles in every(architecture) if operation == "linear")
    for code in range(len(ACTIVATIONS)):
        found.append(_variant(torch.float32, "ieee", tiles, code, code % 2 == 0, False))
    return list({variant.label: variant for variant in found}.values())


def _variant(
    dtype: torch.dtype, precision: str, tiles: Tiles, code: int, by_sample: bool, even: bool, whole: bool = True
) -> Variant:
    name, unit = TRITON_NAMES[dtype], 16 // dtype.itemsize if whole else 1
    tiles = narrowed(tiles, whole)
    types = {tensor: f"*{name}" for tensor in ("x", "weight", "bias", "y", "kept")}
    types.update({tensor: "*fp32" for tensor in ("gate", "shift")})
    types.update({number: "i32" for number in ("rows", "channel_units", "inner_units", "x_row", "w_channel")})
    constants: dict[str, Any] = {
        "x_inner": 1, "w_inner": 1, "CHANNEL_UNIT": unit, "INNER_UNIT": unit, "X_ROW": unit, "X_INNER": 1,
        "W_CHANNEL": unit, "W_INNER": 1, "GATE_BY_SAMPLE": by_sample, "ACTIVATION": code, "EVEN_INNER": even,
        "PRECISION": "ieee" if precision == "half" else precision, "DOT": COMPILED_DOT[dtype],
        "BLOCK_M": tiles.m, "BLOCK_N": tiles.n, "BLOCK_K": tiles.k, "WIDE": False,
    }
    if by_sample:
        types["rows_per_sample"] = "i32"
    else:
        constants["rows_per_sample"] = 1
    label = f"linear.forward {name} {precision} {tuple(tiles)} {ACTIVATIONS[code]} by_sample={by_sample}"
    label += f" even={even} unit={unit}"
    return Variant(label, forward, types, constants, warps=tiles.warps, stages=tiles.stages)

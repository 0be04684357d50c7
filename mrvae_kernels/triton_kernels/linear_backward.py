"""Backward pass of a gated linear layer, y = act(z), z = g (u + b) + t, u = x W^T.

    s = act'(z) dy;  dx = (g s) W;  dW = g dW', dg = <dW', W> + b sum s, db = g sum s, dt = sum s, with dW' = s^T x

With one gate for all samples, s is formed as dy is loaded, from the saved y (z for silu and gelu), and u is not needed.
With one gate a sample, epilogue_backward gives du = g s, db, dg and dt from the saved u; then dx = du W, dW = du^T x.

Grid: dx has a program for each of its tiles. dW' has one for each tile of (C, K) and each part of the rows, as many
parts as two programs a processor take; a part's sums go to memory in float32, also those of s, which the programs of
the first column of tiles add up on their way; fold.finish_weight_gradient adds the parts in order and multiplies by g.

Bytes: dx reads dy, y and W and writes dx; dW' reads dy, y and x and writes its parts; shared tiles come from L2.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import ACTIVATIONS, GELU, NEEDS_ARGUMENT, RELU, activation_code
from .configurations import Tiles, choose, every, family, precision_class
from .device import architecture, float32_precision, on_device, processors, register_limit
from .epilogue import channel_sums, epilogue_backward
from .fold import finish_weight_gradient
from .launch import INT32_LIMIT, TRITON_NAMES, Variant, check_device, check_floating, dot_dtype, wide
from .matrices import (
    COMPILED_DOT,
    as_matrix,
    blocks,
    check_linear,
    narrowed,
    places,
    strides_of,
    through_activation,
    tile_of_program,
    unit_of,
)
from .views import remembered

MOST_PARTS = 16
STEPS_A_PART = 4
BEYOND = 2**16
"""Elements that the last tile's offsets may pass a tensor's end by."""
OF_INPUT = "linear_input_gradient"
STRIDES = ["d_row", "s_row", "w_channel", "x_row"]


@triton.jit(
    do_not_specialize=["rows", "channel_units", "inner_units"],
    do_not_specialize_on_alignment=[*STRIDES[:3], "gate"]
)
def input_gradient(
    grad, saved, gate, weight, grad_x, rows, channel_units, inner_units, d_row, d_channel, s_row, s_channel, w_channel,
    w_inner,
    CHANNEL_UNIT: tl.constexpr, INNER_UNIT: tl.constexpr, D_ROW: tl.constexpr, D_CHANNEL: tl.constexpr,
    S_ROW: tl.constexpr, S_CHANNEL: tl.constexpr, W_CHANNEL: tl.constexpr, W_INNER: tl.constexpr,
    ACTIVATION: tl.constexpr, EVEN_CHANNELS: tl.constexpr, PRECISION: tl.constexpr, DOT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, WIDE: tl.constexpr,
):
    """dx (rows, K) = (g s) W; gate None: s W."""
    channels = channel_units * CHANNEL_UNIT
    inner = inner_units * INNER_UNIT
    tile_row, tile_column = tile_of_program(tl.program_id(0), tl.cdiv(rows, BLOCK_M), tl.cdiv(inner, BLOCK_N))
    row = tile_row * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tile_column * BLOCK_N + tl.arange(0, BLOCK_N)
    lane = tl.arange(0, BLOCK_K)
    in_row = row < rows
    in_k = k < inner
    if WIDE:
        row, k, lane = row.to(tl.int64), k.to(tl.int64), lane.to(tl.int64)
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, channels, BLOCK_K):
        c = start + lane
        mask = in_row[:, None]
        w_mask = in_k[None, :]
        if not EVEN_CHANNELS:
            mask = mask & (c < channels)[None, :]
            w_mask = w_mask & (c < channels)[:, None]
        d_places = places(row[:, None], c[None, :], d_row, d_channel, D_ROW, D_CHANNEL)
        s_places = places(row[:, None], c[None, :], s_row, s_channel, S_ROW, S_CHANNEL)
        w_places = places(c[:, None], k[None, :], w_channel, w_inner, W_CHANNEL, W_INNER)
        dy = tl.load(grad + d_places, mask=mask, other=0.0)
        right = tl.load(weight + w_places, mask=w_mask, other=0.0).to(DOT)
        if ACTIVATION == 0 and gate is None:
            left = dy.to(DOT)
        else:
            s = through_activation(dy.to(tl.float32), saved, s_places, mask, ACTIVATION)
            if gate is not None:
                s *= tl.load(gate + c, mask=c < channels, other=0.0).to(tl.float32)[None, :]
            left = s.to(DOT)
        sums = tl.dot(left, right, sums, input_precision=PRECISION)
    target = grad_x + row[:, None] * inner + k[None, :]
    tl.store(target, sums.to(grad_x.dtype.element_ty), mask=in_row[:, None] & in_k[None, :])


@triton.jit(
    do_not_specialize=["rows", "channel_units", "inner_units", "steps"], do_not_specialize_on_alignment=STRIDES
)
def weight_gradient(
    grad, saved, x, partial, partial_sums, rows, channel_units, inner_units, steps, d_row, d_channel, s_row, s_channel,
    x_row, x_inner,
    CHANNEL_UNIT: tl.constexpr, INNER_UNIT: tl.constexpr, D_ROW: tl.constexpr, D_CHANNEL: tl.constexpr,
    S_ROW: tl.constexpr, S_CHANNEL: tl.constexpr, X_ROW: tl.constexpr, X_INNER: tl.constexpr,
    ACTIVATION: tl.constexpr, EVEN_ROWS: tl.constexpr, PRECISION: tl.constexpr, DOT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, WIDE: tl.constexpr,
):
    """partial[part] (C, K) = s^T x and, unless it is None, partial_sums[part] (C,) = sum of s, over the part's rows."""
    channels = channel_units * CHANNEL_UNIT
    inner = inner_units * INNER_UNIT
    tile_rows = tl.cdiv(channels, BLOCK_M)
    tile_columns = tl.cdiv(inner, BLOCK_N)
    part = tl.program_id(0) // (tile_rows * tile_columns)
    tile = tl.program_id(0) % (tile_rows * tile_columns)
    tile_row, tile_column = tile_of_program(tile, tile_rows, tile_columns)
    c = tile_row * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tile_column * BLOCK_N + tl.arange(0, BLOCK_N)
    first = part * steps * BLOCK_K + tl.arange(0, BLOCK_K)
    in_c = c < channels
    in_k = k < inner
    if WIDE:
        c, k, first, part = c.to(tl.int64), k.to(tl.int64), first.to(tl.int64), part.to(tl.int64)
    products = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    total = tl.zeros((BLOCK_K, BLOCK_M), tl.float32)
    for step in range(steps):
        row = first + step * BLOCK_K
        mask = in_c[None, :]
        x_mask = in_k[None, :]
        if not EVEN_ROWS:
            mask = mask & (row < rows)[:, None]
            x_mask = x_mask & (row < rows)[:, None]
        d_places = places(row[:, None], c[None, :], d_row, d_channel, D_ROW, D_CHANNEL)
        s_places = places(row[:, None], c[None, :], s_row, s_channel, S_ROW, S_CHANNEL)
        x_places = places(row[:, None], k[None, :], x_row, x_inner, X_ROW, X_INNER)
        dy = tl.load(grad + d_places, mask=mask, other=0.0)
        right = tl.load(x + x_places, mask=x_mask, other=0.0).to(DOT)
        if ACTIVATION == 0 and partial_sums is None:
            left = dy.to(DOT)
        else:
            s = through_activation(dy.to(tl.float32), saved, s_places, mask, ACTIVATION)
            left = s.to(DOT)
            if partial_sums is not None:
                total += s
        products = tl.dot(tl.trans(left), right, products, input_precision=PRECISION)
    target = partial + (part * channels + c[:, None]) * inner + k[None, :]
    tl.store(target, products, mask=in_c[:, None] & in_k[None, :])
    if partial_sums is not None:
        if tile_column == 0:
            tl.store(partial_sums + part * channels + c, tl.sum(total, 0), mask=in_c)


def matrix_constants(
    channels: int, inner: int, dtype: torch.dtype, **matrices: Tensor
) -> tuple[list[int], dict[str, Any], bool]:
    """Strides as kernels take them, their compile-time constants, and whether all accesses are 16 bytes wide."""
    strides: list[int] = []
    unit = 16 // dtype.itemsize
    constants: dict[str, Any] = {"CHANNEL_UNIT": unit_of(channels, dtype), "INNER_UNIT": unit_of(inner, dtype)}
    for names, matrix in matrices.items():
        found = strides_of(matrix)
        strides += found.strides
        unit = min(unit, found.units[0])  # 1 where columns are not neighbours in memory
        constants.update(zip(names.split("__"), found.units, strict=True))
    constants.update(DOT=dot_dtype(dtype), WIDE=wide(*matrices.values(), slack=BEYOND))
    whole = unit == 16 // dtype.itemsize == constants["CHANNEL_UNIT"] == constants["INNER_UNIT"]
    return strides, constants, whole and not constants["WIDE"]


def limit_of(operation: str, name: str, precision: str, warps: int) -> dict[str, int]:
    """`register_limit` on architecture `name`, or nothing where a kernel spills with it only.

    These are input gradients, in exact float32 (16 bytes on sm_100), and of eight warps where sums are in registers, on
    all but sm_100 and its like (60 bytes on sm_80).
    """
    without = operation == OF_INPUT and (precision == "ieee" or (warps > 4 and family(name) != "sm_100"))
    return {} if without else register_limit(name, warps)


def run_input_gradient(
    grad: Tensor, saved: Tensor | None, gate: Tensor | None, weight: Tensor, code: int, precision: str
) -> Tensor:
    """dx (rows, K) = (g act'(z) dy) W, contiguous, in the weight's dtype; matrices with any strides."""
    (rows, channels), inner = grad.shape, weight.shape[1]
    result = torch.empty((rows, inner), dtype=weight.dtype, device=weight.device)
    if channels == 0 or result.numel() == 0:
        return result.zero_()
    saved = grad if saved is None else saved
    key = ("dx", grad.shape, grad.stride(), saved.stride(), weight.shape, weight.stride(), weight.dtype, grad.dtype)
    strides, constants, whole = remembered(key, lambda: matrix_constants(
        channels, inner, weight.dtype, D_ROW__D_CHANNEL=grad, S_ROW__S_CHANNEL=saved, W_CHANNEL__W_INNER=weight
    ))
    wide_result = constants["WIDE"] or rows * inner + BEYOND > INT32_LIMIT
    kind = precision_class(weight.dtype, precision)

    def launch(tiles: Tiles) -> None:
        tiles = narrowed(tiles, whole, code)
        grid = (blocks(rows, tiles.m) * blocks(inner, tiles.n),)
        input_gradient[grid](
            grad, saved, gate, weight, result, rows, channels // constants["CHANNEL_UNIT"],
            inner // constants["INNER_UNIT"], *strides, **{**constants, "WIDE": wide_result}, ACTIVATION=code,
            EVEN_CHANNELS=channels % tiles.k == 0, PRECISION=precision, BLOCK_M=tiles.m, BLOCK_N=tiles.n,
            BLOCK_K=tiles.k, num_warps=tiles.warps, num_stages=tiles.stages,
            **limit_of(OF_INPUT, architecture(weight.device), kind, tiles.warps),
        )

    launch(choose(OF_INPUT, weight.device, kind, rows, inner, channels, launch))
    return result


@functools.lru_cache(maxsize=1024)
def parts_of(rows: int, tiles: int, step: int, device: torch.device) -> tuple[int, int]:
    """(parts, steps a part) of the rows, for about two programs a processor."""
    steps = blocks(rows, step)
    parts = max(1, min(MOST_PARTS, blocks(2 * processors(device), tiles), steps // STEPS_A_PART))
    steps = blocks(steps, parts)
    return blocks(rows, steps * step), steps


def run_weight_gradient(
    grad: Tensor, saved: Tensor | None, x: Tensor, code: int, want_sums: bool, precision: str
) -> tuple[Tensor, Tensor | None]:
    """(partial (parts, C, K) of s^T x, sum of s (C,) or None), in float32; matrices with any strides."""
    (rows, channels), inner = grad.shape, x.shape[1]
    saved = grad if saved is None else saved
    key = ("dW", grad.shape, grad.stride(), saved.stride(), x.shape, x.stride(), x.dtype, grad.dtype)
    strides, constants, whole = remembered(key, lambda: matrix_constants(
        channels, inner, x.dtype, D_ROW__D_CHANNEL=grad, S_ROW__S_CHANNEL=saved, X_ROW__X_INNER=x
    ))
    wide_results = constants["WIDE"] or (MOST_PARTS + 1) * channels * inner >= 2**31
    kind = precision_class(x.dtype, precision)

    def launch(tiles: Tiles) -> tuple[Tensor, Tensor | None]:
        tiles = narrowed(tiles, whole, code, sums=True)
        count = blocks(channels, tiles.m) * blocks(inner, tiles.n)
        parts, steps = parts_of(rows, count, tiles.k, x.device)
        partial = torch.empty((parts, channels, inner), dtype=torch.float32, device=x.device)
        sums = torch.empty((parts, channels), dtype=torch.float32, device=x.device) if want_sums else None
        weight_gradient[(count * parts,)](
            grad, saved, x, partial, sums, rows, channels // constants["CHANNEL_UNIT"],
            inner // constants["INNER_UNIT"], steps, *strides, **{**constants, "WIDE": wide_results}, ACTIVATION=code,
            EVEN_ROWS=rows == parts * steps * tiles.k, PRECISION=precision, BLOCK_M=tiles.m, BLOCK_N=tiles.n,
            BLOCK_K=tiles.k, num_warps=tiles.warps, num_stages=tiles.stages,
            **limit_of("linear_weight_gradient", architecture(x.device), kind, tiles.warps),
        )
        return partial, sums

    partial, sums = launch(choose("linear_weight_gradient", x.device, kind, channels, inner, rows, launch))
    return partial, None if sums is None else sums[0] if sums.shape[0] == 1 else sums.sum(0)


def linear_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor, shift: Tensor | None, y: Tensor | None,
    kept: Tensor, activation: str, mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dx, dW, db, dg, dt) of `linear`, from dy = grad (..., C) of any strides, its inputs, y and kept.

    y: not read, and may be None, with one gate a sample and for "none" and the activations in NEEDS_ARGUMENT.
    mask: which of them to compute; the others, and those of an absent bias or shift, are empty, (0,). dx has x's shape
    and dtype, dW the weight's, both the strides of torch.empty_like; db, dg and dt are contiguous, in the dtypes of
    bias, gate and shift. The same bits each time.
    With one gate a sample, and neither activation nor dg, kept may be empty. Errors as for `linear`.
    """
    code = activation_code(activation)
    want_x, want_weight, want_bias, want_gate, want_shift = mask
    want_bias, want_shift = want_bias and bias is not None, want_shift and shift is not None
    want = (want_bias, want_gate, want_shift)
    check_linear("linear_backward", x, weight, bias, gate, shift)
    channels, inner = weight.shape
    if grad.shape != (*x.shape[:-1], channels):
        raise ValueError(
            f"linear_backward: grad has shape {tuple(grad.shape)}; expected {(*x.shape[:-1], channels)}, that of y"
        )
    check_floating("linear_backward", grad=grad)
    check_device("linear_backward", grad, x, y, kept)
    precision = float32_precision(x.device, convolution=False) if x.dtype == torch.float32 else "ieee"
    dx, dw, db, dg, dt = x, weight, weight, gate, gate
    own_gate: Tensor | None = gate.contiguous()
    dy, saved = grad, kept if activation in NEEDS_ARGUMENT else y
    if gate.dim() == 2:
        u = grad if kept.shape != grad.shape and code == 0 and not want_gate else kept
        dy, db, dg, dt = epilogue_backward(
            grad, u, bias, gate, shift, grad.dim() - 1, activation,
            (want_x or want_weight, want_bias, want_gate, want_shift),
        )
        own_gate, code = None, 0
        want_bias = want_gate = want_shift = False
    rows = as_matrix(dy) if want_x or want_weight or want_gate else dy
    saved_rows = None
    if code != 0:
        if saved is None or saved.shape != grad.shape:
            raise ValueError(f"linear_backward: {activation} needs {'kept' if saved is kept else 'y'} of y's shape")
        saved_rows = as_matrix(saved)
    with on_device(x):
        if want_x:
            dx = run_input_gradient(rows, saved_rows, own_gate, weight, code, precision).view(x.shape)
        want_sums = want_bias or want_shift or (want_gate and bias is not None)
        if (want_weight or want_gate) and rows.numel() > 0 and inner > 0:
            partial, sums = run_weight_gradient(rows, saved_rows, as_matrix(x), code, want_sums, precision)
            dw, *rest = finish_weight_gradient(
                partial, sums, weight, bias, own_gate, 0, (want_weight, want_bias, want_gate, False)
            )
            if want_shift and shift is not None and sums is not None:
                rest[2] = sums.to(shift.dtype)
        else:
            dw = torch.zeros_like(weight, memory_format=torch.contiguous_format) if want_weight else dw
            rest = sum_gradients(grad, saved, bias, gate, shift, activation, (want_bias, want_gate, want_shift))
    if gate.dim() == 1:
        db, dg, dt = rest
    return (
        restored(dx, x) if want_x else x.new_empty(0), restored(dw, weight) if want_weight else weight.new_empty(0),
        db if want[0] else weight.new_empty(0), dg if want[1] else gate.new_empty(0),
        dt if want[2] else gate.new_empty(0),
    )


def restored(result: Tensor, like: Tensor) -> Tensor:
    """The contiguous result with the strides of torch.empty_like(like)."""
    if like.is_contiguous():
        return result
    target = torch.empty_like(like)
    return result if target.stride() == result.stride() else target.copy_(result)


def sum_gradients(
    grad: Tensor, saved: Tensor | None, bias: Tensor | None, gate: Tensor, shift: Tensor | None, activation: str,
    mask: Sequence[bool],
) -> list[Tensor]:
    """db, dg and dt where they do not depend on u, which is 0 or not asked for: g sum s, b sum s and sum s."""
    like = (gate if bias is None else bias, gate, gate if shift is None else shift)
    results = [tensor.new_empty(0) for tensor in like]
    if any(mask):
        sums = channel_sums(grad, saved if activation != "none" else None, grad.dim() - 1, activation)
        factors = (gate, 0.0 if bias is None else bias, 1.0)
        for i, (wanted, factor) in enumerate(zip(mask, factors, strict=True)):
            if wanted:
                results[i] = (sums * factor).to(like[i].dtype)
    return results


def variants(architecture: str = "sm_90") -> list[Variant]:
    """Each kernel with every tile of the table, each activation at least once, and what needs most registers: GELU."""
    found: list[Variant] = []
    for operation, precision, tiles in every(architecture):
        if operation in (OF_INPUT, "linear_weight_gradient"):
            for dtype in (torch.bfloat16, torch.float16) if precision == "half" else (torch.float32,):
                found.append(_variant(architecture, operation, dtype, precision, tiles, len(found) % len(ACTIVATIONS)))
            if precision == "half":
                for code, even, whole in (
                    (GELU.value, True, True), (GELU.value, False, True), (GELU.value, False, False),
                    (RELU.value, False, True), (RELU.value, False, False),
                ):
                    found.append(
                        _variant(architecture, operation, torch.bfloat16, precision, tiles, code, even, whole)
                    )
    return list({variant.label: variant for variant in found}.values())


def _variant(
    architecture: str, operation: str, dtype: torch.dtype, precision: str, tiles: Tiles, code: int, even: bool = True,
    whole: bool = True,
) -> Variant:
    name, unit, of_input = TRITON_NAMES[dtype], 16 // dtype.itemsize if whole else 1, operation == OF_INPUT
    tiles = narrowed(tiles, whole, code, sums=not of_input)
    kernel = input_gradient if of_input else weight_gradient
    types = {tensor: f"*{name}" for tensor in ("grad", "saved", *(("weight", "grad_x") if of_input else ("x",)))}
    types.update({tensor: "*fp32" for tensor in (("gate",) if of_input else ("partial", "partial_sums"))})
    other = "w_channel" if of_input else "x_row"
    numbers = ("rows", "channel_units", "inner_units", "d_row", "s_row", other)
    types.update({number: "i32" for number in (*numbers, *(() if of_input else ("steps",)))})
    constants: dict[str, Any] = {
        "d_channel": 1, "s_channel": 1, "w_inner" if of_input else "x_inner": 1, "CHANNEL_UNIT": unit,
        "INNER_UNIT": unit, "D_ROW": unit, "D_CHANNEL": 1, "S_ROW": unit, "S_CHANNEL": 1, other.upper(): unit,
        "W_INNER" if of_input else "X_INNER": 1, "ACTIVATION": code, "EVEN_CHANNELS" if of_input else "EVEN_ROWS": even,
        "PRECISION": "ieee" if precision == "half" else precision, "DOT": COMPILED_DOT[dtype],
        "BLOCK_M": tiles.m, "BLOCK_N": tiles.n, "BLOCK_K": tiles.k, "WIDE": False,
    }
    label = (
        f"linear_backward.{operation} {name} {precision} {tuple(tiles)} {ACTIVATIONS[code]} even={even} unit={unit}"
    )
    limit = limit_of(operation, architecture, precision, tiles.warps)
    return Variant(label, kernel, types, constants, warps=tiles.warps, stages=tiles.stages, limit=limit)

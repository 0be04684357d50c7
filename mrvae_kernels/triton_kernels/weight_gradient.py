"""The weight's gradient of both convolutions, as a product whose reduction runs over positions, in parts.

    dW'[o, i, r, s] = sum over n, p, q of a[n, p, q, o] b[n, p stride - padding + r dilation, ..., i]

conv2d: a = act'(.) dy, b = x. conv_transpose2d: a = x, b = act'(.) dy. The slope is multiplied in as dy is loaded; the
gate is not, since dW = g dW' and dg needs dW' itself (fold.finish_weight_gradient).

Rows of the product are the channels of a's group, columns are (r, s, channel of b's group): tiles of the channels at
one tap, or, with few channels (FLAT), tiles of all taps and channels, so that a tile is not mostly padding. The
positions are split among programs, about two a processor; each writes its float32 sum to (splits, *weight.shape), which
finish_weight_gradient adds up in order: the same bits each time. The sum of a, which conv2d's db and dt are, comes
along: programs of the first column of tiles write that of their channels and positions to (splits, channels).

Grid: groups x splits x column tiles x row tiles, along one axis; programs of one split are neighbours, and share a and
b in cache. Bytes moved: a once per column tile, b once per row tile and tap, both mostly from cache; splits float32
copies of the weight.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import NEEDS_ARGUMENT, activation_code
from .configurations import Tiles, choose, precision_class
from .device import architecture, float32_precision, on_device, processors, register_limit
from .geometry import FEW_CHANNELS
from .implicit_gemm import (
    SHORTEST_COPY,
    channels_in_units,
    innermost_width,
    outer,
    outer_and,
    reaches_beyond,
    slope_times,
    times,
)
from .launch import block, divide, divisor, dot_dtype, signed

SPLITS = 16
"""Parts of a reduction, at most, except for small weights."""

SMALL_PARTIALS = 2**20
LARGE_PARTIALS = 2**26
"""Elements of all partial sums together: more than SPLITS parts within the first, never more parts than the second
allows."""

STEPS_A_PART = 4
"""Blocks of positions that a program adds up, at least."""

GEOMETRY = (
    "positions", "chunk", "span", "span_magic", "span_shift", "across", "across_magic", "across_shift", "height",
    "width", "kernel_height", "kernel_width", "stride_height", "stride_width", "padding_height", "padding_width",
    "dilation_height", "dilation_width", "splits", "total", "a_n", "a_h", "b_n", "b_h", "saved_n", "saved_h",
)
SPECIALISED = ("a_channel_units", "b_channel_units", "a_c", "a_w", "b_c", "b_w", "saved_c", "saved_w")
"""See implicit_gemm.py."""


@triton.jit(do_not_specialize=list(GEOMETRY), do_not_specialize_on_alignment=list(SPECIALISED))
def convolve_weight(
    a, b, saved, partial, partial_sums,
    positions, chunk, span, span_magic, span_shift, across, across_magic, across_shift, height,
    width, kernel_height, kernel_width, stride_height, stride_width, padding_height, padding_width,
    dilation_height, dilation_width, splits, total, a_n, a_h, b_n, b_h, saved_n, saved_h,
    a_channel_units, b_channel_units, a_c, a_w, b_c, b_w, saved_c, saved_w,
    A_CHANNEL_UNIT: tl.constexpr, B_CHANNEL_UNIT: tl.constexpr, A_UNIT: tl.constexpr, B_UNIT: tl.constexpr,
    SAVED_UNIT: tl.constexpr,
    ACTIVATION: tl.constexpr, SLOPE_OF_A: tl.constexpr, FLAT: tl.constexpr, B_ROWS_INNER: tl.constexpr,
    TAPS_INNER: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, DOT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """One tile of one part: sums over `chunk` positions of a for BLOCK_M channels of a by BLOCK_N columns.

    positions = N * span, span = positions of one sample, across = those of one line; height and width are b's, channels
    those of a group, total the elements of the weight. `saved` has the shape of a (SLOPE_OF_A) or b, or is None.
    partial (splits, a's channels, b's, taps), with taps before b's channels unless TAPS_INNER; partial_sums (splits,
    a's channels), of a times its slope, or None.
    """
    a_channels = a_channel_units * A_CHANNEL_UNIT
    b_channels = b_channel_units * B_CHANNEL_UNIT
    a_n, a_h, a_w = times(a_n, A_UNIT, WIDE), times(a_h, A_UNIT, WIDE), times(a_w, A_UNIT, WIDE)
    b_n, b_h, b_w = times(b_n, B_UNIT, WIDE), times(b_h, B_UNIT, WIDE), times(b_w, B_UNIT, WIDE)
    program = tl.program_id(0)
    row_tiles = tl.cdiv(a_channels, BLOCK_M)
    row_tile = program % row_tiles
    program = program // row_tiles
    taps = kernel_height * kernel_width
    blocks = tl.cdiv(b_channels, BLOCK_N)
    column_tiles = tl.cdiv(taps * b_channels, BLOCK_N) if FLAT else taps * blocks
    column_tile = program % column_tiles
    program = program // column_tiles
    split = program % splits
    group = program // splits

    row = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = row < a_channels
    if FLAT:
        column = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
        column_mask = column < taps * b_channels
        tap = column // b_channels
        i = column - tap * b_channels
    else:
        tap = column_tile // blocks
        i = (column_tile - tap * blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
        column_mask = i < b_channels
    r = tap // kernel_width
    s = tap - r * kernel_width
    tap_h, tap_w = r * dilation_height - padding_height, s * dilation_width - padding_width
    if WIDE:
        group, split, row, i = tl.cast(group, tl.int64), tl.cast(split, tl.int64), row.to(tl.int64), i.to(tl.int64)
    a_channel = (group * a_channels + row) * a_c
    b_channel = (group * b_channels + i) * b_c
    if saved is not None:
        saved_n = times(saved_n, SAVED_UNIT, WIDE)
        saved_h, saved_w = times(saved_h, SAVED_UNIT, WIDE), times(saved_w, SAVED_UNIT, WIDE)
        if SLOPE_OF_A:
            saved_channel = (group * a_channels + row) * saved_c
        else:
            saved_channel = (group * b_channels + i) * saved_c

    result = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    sums = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    start = tl.cast(split, tl.int32) * chunk
    end = tl.minimum(start + chunk, positions)
    for first in range(start, end, BLOCK_K):
        position = first + tl.arange(0, BLOCK_K)
        valid = position < end
        position = tl.minimum(position, positions - 1)
        n = divide(position, span_magic, span_shift)
        position -= n * span
        p = divide(position, across_magic, across_shift)
        q = position - p * across
        h, w = p * stride_height, q * stride_width
        if FLAT:
            at_h, at_w = outer(h, tap_h, B_ROWS_INNER), outer(w, tap_w, B_ROWS_INNER)
            b_mask = (at_h >= 0) & (at_h < height) & (at_w >= 0) & (at_w < width)
            b_mask = b_mask & outer_and(valid, column_mask, B_ROWS_INNER)
        else:
            at_h, at_w = h + tap_h, w + tap_w
            inside = valid & (at_h >= 0) & (at_h < height) & (at_w >= 0) & (at_w < width)
            b_mask = outer_and(inside, column_mask, B_ROWS_INNER)
        # (M, K) whichever is innermost: a slope on the way to the product then leaves the loads asynchronous
        a_mask = row_mask[:, None] & valid[None, :]
        a_tile = tl.load(a + a_channel[:, None] + (n * a_n + p * a_h + q * a_w)[None, :], mask=a_mask, other=0.0)
        b_row = n * b_n + h * b_h + w * b_w
        b_tile = tl.load(
            b + outer(b_row, b_channel + tap_h * b_h + tap_w * b_w, B_ROWS_INNER), mask=b_mask, other=0.0
        )
        if saved is not None:
            if SLOPE_OF_A:
                saved_row = n * saved_n + p * saved_h + q * saved_w
                saved_tile = tl.load(saved + saved_channel[:, None] + saved_row[None, :], mask=a_mask, other=0.0)
                a_tile = slope_times(a_tile, saved_tile, ACTIVATION)
            else:
                saved_row = n * saved_n + h * saved_h + w * saved_w
                saved_column = saved_channel + tap_h * saved_h + tap_w * saved_w
                saved_tile = tl.load(saved + outer(saved_row, saved_column, B_ROWS_INNER), mask=b_mask, other=0.0)
                b_tile = slope_times(b_tile, saved_tile, ACTIVATION).to(b.dtype.element_ty)
        if partial_sums is not None:
            sums += a_tile.to(tl.float32)
        a_tile = a_tile.to(a.dtype.element_ty)
        if B_ROWS_INNER:
            b_tile = tl.trans(b_tile)
        result = tl.dot(a_tile.to(DOT), b_tile.to(DOT), result, input_precision=PRECISION)

    to_row = split * total + (group * a_channels + row) * b_channels * taps
    to_column = i * taps + tap if TAPS_INNER else tap * b_channels + i
    tl.store(partial + to_row[:, None] + to_column[None, :], result, mask=row_mask[:, None] & column_mask[None, :])
    if partial_sums is not None:
        if column_tile == 0:
            channel = group * a_channels + row
            to_sums = partial_sums + split * (total // (b_channels * taps)) + channel
            tl.store(to_sums, tl.sum(sums, 1), mask=row_mask)


class Plan(NamedTuple):
    """All that a launch needs beside tensors and tiles; depends on shapes and strides only."""

    before_chunk: int
    after_chunk: tuple[int, ...]
    after_splits: tuple[int, ...]
    units: dict[str, int]
    a_channels: int
    b_channels: int
    flat: bool
    narrow: bool
    b_rows_inner: bool
    wide: bool


Layout = tuple[tuple[int, ...], tuple[int, ...]]
"""Shape and strides."""


@functools.lru_cache(maxsize=4096)
def plan(
    a: Layout, b: Layout, saved: tuple[int, ...], weight: tuple[int, ...], stride: tuple[int, int],
    padding: tuple[int, int], dilation: tuple[int, int], groups: int, slope_of_a: bool, itemsize: int,
) -> Plan:
    """saved: strides; zeros where there is none. weight: its shape."""
    (samples, _, lines, across), (_, _, height, width) = a[0], b[0]
    span = lines * across
    reach = sum(step * (2 * pad + size * hop) for step, pad, size, hop in zip(
        b[1][2:], padding, weight[2:], dilation, strict=True
    ))
    a_channels, b_channels = weight[0] // groups, weight[1]
    most, flat = 16 // itemsize, b_channels < FEW_CHANNELS
    (a_n, a_c, a_h, a_w), a_unit = channels_in_units(*a, most)
    (b_n, b_c, b_h, b_w), b_unit = channels_in_units(*b, 1 if flat else most)
    (saved_n, saved_c, saved_h, saved_w), saved_unit = (
        channels_in_units(a[0], saved, most) if slope_of_a else channels_in_units(b[0], saved, 1 if flat else most)
    )
    units = {
        "A_CHANNEL_UNIT": math.gcd(a_channels, most), "B_CHANNEL_UNIT": 1 if flat else math.gcd(b_channels, most),
        "A_UNIT": a_unit, "B_UNIT": b_unit, "SAVED_UNIT": saved_unit,
    }
    widths = (a_unit, units["A_CHANNEL_UNIT"]) if flat else (*units.values(),)[:4]
    return Plan(
        samples * span,
        (span, *signed(divisor(span)), across, *signed(divisor(across)), height, width, *weight[2:], *stride, *padding,
         *dilation),
        (a_n, a_h, b_n, b_h, saved_n, saved_h, a_channels // units["A_CHANNEL_UNIT"],
         b_channels // units["B_CHANNEL_UNIT"], a_c, a_w, b_c, b_w, saved_c, saved_w),
        units, a_channels, b_channels, flat, min(widths) * itemsize < SHORTEST_COPY, innermost_width(b[1]),
        reaches_beyond((a, b, (a[0], saved), (b[0], saved)), reach),
    )


@functools.lru_cache(maxsize=4096)
def blocks(
    tiles: Tiles, a_channels: int, b_columns: int, flat: bool, b_rows_inner: bool, activation: str, narrow: bool
) -> tuple[int, int, int]:
    """BLOCK_M, BLOCK_N, BLOCK_K of `convolve_weight`: the tiles', less where registers would spill.

    b_columns: the channels of b's group, FLAT times the taps. Where b passes through registers, or a slope is taken
    from its argument, a step takes fewer positions, and fewer still with a slope of what is read in accesses too short
    to bypass the registers (`narrow`).
    """
    most = 32 if flat or b_rows_inner or narrow or activation in NEEDS_ARGUMENT else tiles.k
    if narrow and activation != "none":
        most = 16
    return block(a_channels, 16, min(tiles.m, 64)), block(b_columns, 16, tiles.n), min(tiles.k, most)


def parts(positions: int, tiles: int, elements: int, block_k: int, device: torch.device) -> tuple[int, int]:
    """(positions of a part, number of parts) for a result of so many tiles and elements."""
    most = min(max(SPLITS, SMALL_PARTIALS // elements), max(1, LARGE_PARTIALS // elements))
    splits = max(1, min(-(-2 * processors(device) // tiles), most, positions // (STEPS_A_PART * block_k)))
    chunk = -(-positions // (splits * block_k)) * block_k
    return chunk, -(-positions // chunk)


def partial_weight_gradient(
    a: Tensor, b: Tensor, saved: Tensor | None, slope_of_a: bool, weight: tuple[int, ...], stride: tuple[int, int],
    padding: tuple[int, int], dilation: tuple[int, int], groups: int, activation: str, taps_inner: bool = True,
    want_sums: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The sums dW' in parts, float32: (splits, *weight), or (splits, w[0], w[2], w[3], w[1]) unless taps_inner.

    With it, where want_sums, the sum of act'(.) a over all but its channels, (w[0],), float32, for slope_of_a or
    without an activation; None where not wanted, or where a or b is empty.

    a (N, weight[0], P, Q), b (N, weight[1] * groups, H, W), of one dtype and any strides. saved: the activation's
    result or argument, of the shape of a (slope_of_a) or b, or None without an activation.
    """
    shape = weight if taps_inner else (weight[0], *weight[2:], weight[1])
    if a.numel() == 0 or b.numel() == 0:
        return torch.zeros((1, *shape), dtype=torch.float32, device=a.device), None
    known = plan(
        (a.shape, a.stride()), (b.shape, b.stride()), (0, 0, 0, 0) if saved is None else saved.stride(), weight, stride,
        padding, dilation, groups, slope_of_a, a.element_size(),
    )
    a_channels, b_channels = known.a_channels, known.b_channels
    taps = weight[2] * weight[3]
    elements = weight[0] * weight[1] * taps
    b_columns = b_channels * taps if known.flat else b_channels
    precision = float32_precision(a.device, True) if a.dtype == torch.float32 else "ieee"
    code, dot = activation_code(activation), dot_dtype(a.dtype)

    def launch(tiles: Tiles) -> tuple[Tensor, Tensor | None]:
        block_m, block_n, block_k = blocks(
            tiles, a_channels, b_columns, known.flat, known.b_rows_inner, activation, known.narrow
        )
        columns = (1 if known.flat else taps) * -(-b_columns // block_n)
        programs = groups * columns * -(-a_channels // block_m)
        chunk, splits = parts(known.before_chunk, programs, elements, block_k, a.device)
        partial = torch.empty((splits, *shape), dtype=torch.float32, device=a.device)
        sums = torch.empty((splits, weight[0]), dtype=torch.float32, device=a.device) if want_sums else None
        with on_device(a):
            convolve_weight[(programs * splits,)](
                a, b, saved, partial, sums, known.before_chunk, chunk, *known.after_chunk, splits, elements,
                *known.after_splits, **known.units,
                ACTIVATION=code, SLOPE_OF_A=slope_of_a, FLAT=known.flat,
                B_ROWS_INNER=known.b_rows_inner, TAPS_INNER=taps_inner, WIDE=known.wide, PRECISION=precision, DOT=dot,
                BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, num_warps=tiles.warps, num_stages=tiles.stages,
                **register_limit(architecture(a.device), tiles.warps),
            )
        return partial, sums

    partial, sums = launch(choose(
        "convolution_weight_gradient", a.device, precision_class(a.dtype, precision), a_channels, b_channels * taps,
        known.before_chunk, launch,
    ))
    return partial, None if sums is None else sums[0] if sums.shape[0] == 1 else sums.sum(0)

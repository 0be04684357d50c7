"""Convolutions as matrix products without an im2col buffer: the kernel of both operators' results and input gradients.

    y[n, p, q, o] = epilogue( sum over r, s, i of prologue(x[n, h, w, i]) weight[o, i, r, s] )

    plain        h = p stride - padding + r dilation                           conv2d; conv_transpose2d's input gradient
    transposed   h = (p + padding - r dilation) / stride where that is whole   conv_transpose2d; conv2d's input gradient

and w likewise. Forward, the epilogue is act(g (u + b) + t). Backward, x is the gradient of y: the prologue multiplies
it by the activation's slope and by its channel's gate, as it is loaded, and the epilogue is nothing.

Transposed, the results of one phase (p mod stride, q mod stride) share their taps r, s: p = stride a + phase, and each
tap reads h = a + constant. So a program computes results of one phase with that phase's taps only, and no product is
spent on a tap that does not meet the input. Where stride and dilation have a common factor a phase may have no tap.

Rows of the product are results (n, a, b), columns are output channels of a group, the reduction runs over taps and then
blocks of channels. With fewer than FEW_CHANNELS channels a group, taps and channels are one axis (FLAT), so that the
reduction is not padded to a multiple of its size. Every tensor is read and written through its strides: with the
channels innermost (channels_last) accesses are as wide as the channels' number divides, up to 16 bytes, with the width
innermost (contiguous) neighbouring threads take neighbouring rows.

Triton sees that a run-time number is a multiple of 16, and of no less. So channels, columns and the slow strides of
tensors with the channels innermost come in units, which are compile-time constants: 36 channels are read 8 bytes at a
time. Whether they are a multiple of 16 changes nothing then, and makes no machine code of its own.

Grid: groups x blocks of rows x phases x blocks of output channels, along one axis; programs that share rows of x are
neighbours. Bytes moved: x about once per block of output channels, mostly from cache, the weight once per block of
rows, from cache, and y once, with a second tensor where the backward pass needs one.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable

import triton
import triton.language as tl

from .activations import (
    GELU,
    NEEDS_ARGUMENT,
    NONE,
    SILU,
    activate,
    activation_slope,
    activation_slope_of_result,
)
from .configurations import Tiles
from .geometry import FEW_CHANNELS
from .launch import INT32_LIMIT, block, divide


@triton.jit
def outer(rows, lanes, ROWS_INNER: tl.constexpr):
    """rows (M,) + lanes (K,) as (M, K); with ROWS_INNER (K, M), so that neighbouring threads take neighbouring rows."""
    if ROWS_INNER:
        return lanes[:, None] + rows[None, :]
    else:
        return rows[:, None] + lanes[None, :]


@triton.jit
def outer_and(rows, lanes, ROWS_INNER: tl.constexpr):
    if ROWS_INNER:
        return lanes[:, None] & rows[None, :]
    else:
        return rows[:, None] & lanes[None, :]


@triton.jit
def slope_times(grad, saved, ACTIVATION: tl.constexpr):
    """act'(.) grad in float32, from the activation's argument (silu, gelu) or its result (all others)."""
    saved = saved.to(tl.float32)
    if ACTIVATION == SILU or ACTIVATION == GELU:
        slope = activation_slope(saved, ACTIVATION)
    else:
        slope = activation_slope_of_result(saved, ACTIVATION)
    return grad.to(tl.float32) * slope


@triton.jit
def times(stride, UNIT: tl.constexpr, WIDE: tl.constexpr):
    """A stride in elements, from one in units; in 64 bits where it may need them."""
    if WIDE:
        return tl.cast(stride, tl.int64) * UNIT
    else:
        return stride * UNIT


@triton.jit
def phase_taps(phase, kernel, stride, padding, dilation, common, inverse):
    """The taps r of one phase along an axis: (first r, their distance, their number, input position of the first).

    common = gcd(stride, dilation), inverse = 1 / (dilation / common) modulo stride / common.
    """
    position = phase + padding
    distance = stride // common
    first = (position // common * inverse) % distance
    count = tl.where(position % common == 0, tl.maximum(kernel - first + distance - 1, 0) // distance, 0)
    return first, distance, count, (position - first * dilation) // stride


GEOMETRY = (
    "rows", "span", "span_magic", "span_shift", "across", "across_magic", "across_shift", "in_height", "in_width",
    "out_height", "out_width", "kernel_height", "kernel_width", "stride_height", "stride_width", "padding_height",
    "padding_width", "dilation_height", "dilation_width", "common_height", "common_width", "inverse_height",
    "inverse_width", "total", "x_n", "x_h", "saved_n", "saved_h", "weight_group", "weight_r", "weight_s", "y_n", "y_h",
)
"""Scalars of `convolve` that are never specialised: a layer of another geometry runs the same machine code."""

SPECIALISED = (
    "channel_units", "column_units", "x_c", "x_w", "saved_c", "saved_w", "weight_column", "weight_channel", "y_c",
    "y_w",
)
"""Scalars whose being 1 decides how wide the accesses are, or spares divisions; never whether 16 divides them."""

PARAMETERS = ("bias", "gate", "shift")
"""Often slices of one tensor with the parameters of many layers: any alignment, for which no code is compiled anew."""


@triton.jit(
    do_not_specialize=list(GEOMETRY), do_not_specialize_on_alignment=list(SPECIALISED + PARAMETERS),
)
def convolve(
    x, saved, weight, bias, gate, shift, y, kept,
    rows, span, span_magic, span_shift, across, across_magic, across_shift, in_height, in_width,
    out_height, out_width, kernel_height, kernel_width, stride_height, stride_width, padding_height,
    padding_width, dilation_height, dilation_width, common_height, common_width, inverse_height,
    inverse_width, total, x_n, x_h, saved_n, saved_h, weight_group, weight_r, weight_s, y_n, y_h,
    channel_units, column_units, x_c, x_w, saved_c, saved_w, weight_column, weight_channel, y_c, y_w,
    CHANNEL_UNIT: tl.constexpr, COLUMN_UNIT: tl.constexpr, X_UNIT: tl.constexpr, SAVED_UNIT: tl.constexpr,
    WEIGHT_CHANNEL_UNIT: tl.constexpr, WEIGHT_COLUMN_UNIT: tl.constexpr, Y_UNIT: tl.constexpr,
    TRANSPOSED: tl.constexpr, BACKWARD: tl.constexpr, PER_SAMPLE: tl.constexpr, ACTIVATION: tl.constexpr,
    FLAT: tl.constexpr, X_ROWS_INNER: tl.constexpr, Y_ROWS_INNER: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr, DOT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """One tile of y: BLOCK_M results of one phase by BLOCK_N output channels of one group.

    rows = N * span, span = rows of one sample, across = rows of one line; channels and columns are those of a group,
    total is the number of output channels of all groups.
    BACKWARD: x is dy, `saved` gives its activation's slope, gate (C,) belongs to the channels of x. Forward: bias,
    gate, shift belong to those of y, and `kept` receives the product (PER_SAMPLE) or the activation's argument.
    """
    channels = channel_units * CHANNEL_UNIT
    columns = column_units * COLUMN_UNIT
    x_n, x_h, x_w = times(x_n, X_UNIT, WIDE), times(x_h, X_UNIT, WIDE), times(x_w, X_UNIT, WIDE)
    y_n, y_h, y_w = times(y_n, Y_UNIT, WIDE), times(y_h, Y_UNIT, WIDE), times(y_w, Y_UNIT, WIDE)
    weight_group = times(weight_group, WEIGHT_CHANNEL_UNIT * WEIGHT_COLUMN_UNIT, WIDE)
    weight_r = times(weight_r, WEIGHT_CHANNEL_UNIT * WEIGHT_COLUMN_UNIT, WIDE)
    weight_s = times(weight_s, WEIGHT_CHANNEL_UNIT * WEIGHT_COLUMN_UNIT, WIDE)
    weight_channel = times(weight_channel, WEIGHT_CHANNEL_UNIT, WIDE)
    weight_column = times(weight_column, WEIGHT_COLUMN_UNIT, WIDE)
    program = tl.program_id(0)
    column_tiles = tl.cdiv(columns, BLOCK_N)
    column_tile = program % column_tiles
    program = program // column_tiles
    if TRANSPOSED:
        phase = program % (stride_height * stride_width)
        program = program // (stride_height * stride_width)
        phase_height = phase // stride_width
        phase_width = phase % stride_width
        first_r, step_r, taps_r, base_h = phase_taps(
            phase_height, kernel_height, stride_height, padding_height, dilation_height, common_height, inverse_height
        )
        first_s, step_s, taps_s, base_w = phase_taps(
            phase_width, kernel_width, stride_width, padding_width, dilation_width, common_width, inverse_width
        )
        tap_h = -(dilation_height // common_height)
        tap_w = -(dilation_width // common_width)
    else:
        first_r, step_r, taps_r, base_h, tap_h = 0, 1, kernel_height, -padding_height, dilation_height
        first_s, step_s, taps_s, base_w, tap_w = 0, 1, kernel_width, -padding_width, dilation_width
    row_tiles = tl.cdiv(rows, BLOCK_M)
    row_tile = program % row_tiles
    group = program // row_tiles

    row = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = row < rows
    row = tl.minimum(row, rows - 1)
    n = divide(row, span_magic, span_shift)
    row -= n * span
    a = divide(row, across_magic, across_shift)
    b = row - a * across
    if TRANSPOSED:
        h, w = a + base_h, b + base_w
        p, q = a * stride_height + phase_height, b * stride_width + phase_width
        row_mask = row_mask & (p < out_height) & (q < out_width)
    else:
        h, w = a * stride_height + base_h, b * stride_width + base_w
        p, q = a, b
    column = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    column_mask = column < columns
    lane = tl.arange(0, BLOCK_K)
    x_row = n * x_n + h * x_h + w * x_w
    if WIDE:
        group, column, lane = tl.cast(group, tl.int64), column.to(tl.int64), lane.to(tl.int64)
    x += group * channels * x_c
    weight += group * weight_group
    weight_columns = column * weight_column
    if BACKWARD and ACTIVATION != NONE:
        saved_n = times(saved_n, SAVED_UNIT, WIDE)
        saved_h, saved_w = times(saved_h, SAVED_UNIT, WIDE), times(saved_w, SAVED_UNIT, WIDE)
        saved += group * channels * saved_c
        saved_row = n * saved_n + h * saved_h + w * saved_w

    result = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    channel = 0
    r = 0
    s = 0
    reach = taps_r * taps_s * channels
    steps = tl.cdiv(reach, BLOCK_K) if FLAT else taps_r * taps_s * tl.cdiv(channels, BLOCK_K)
    for step in range(0, steps):
        if FLAT:
            k = step * BLOCK_K + lane
            lane_mask = k < reach
            tap = k // channels
            i = k - tap * channels
            tap_r = tap // taps_s
            tap_s = tap - tap_r * taps_s
            at_h = outer(h, (tap_r * tap_h).to(tl.int32), X_ROWS_INNER)
            at_w = outer(w, (tap_s * tap_w).to(tl.int32), X_ROWS_INNER)
            mask = (at_h >= 0) & (at_h < in_height) & (at_w >= 0) & (at_w < in_width)
            mask = mask & outer_and(row_mask, lane_mask, X_ROWS_INNER)
        else:
            k = tl.multiple_of(channel, BLOCK_K) + lane
            lane_mask = k < channels
            i = k
            tap_r, tap_s = tl.cast(r, lane.dtype), tl.cast(s, lane.dtype)
            at_h, at_w = h + r * tap_h, w + s * tap_w
            inside = row_mask & (at_h >= 0) & (at_h < in_height) & (at_w >= 0) & (at_w < in_width)
            mask = outer_and(inside, lane_mask, X_ROWS_INNER)
        x_lane = tap_r * tap_h * x_h + tap_s * tap_w * x_w + i * x_c
        tile = tl.load(x + outer(x_row, x_lane, X_ROWS_INNER), mask=mask, other=0.0)
        if BACKWARD:
            if ACTIVATION != NONE:
                saved_lane = tap_r * tap_h * saved_h + tap_s * tap_w * saved_w + i * saved_c
                result_tile = tl.load(saved + outer(saved_row, saved_lane, X_ROWS_INNER), mask=mask, other=0.0)
                tile = slope_times(tile, result_tile, ACTIVATION)
            if gate is not None:
                scale = tl.load(gate + group * channels + i, mask=lane_mask, other=0.0)
                tile = tile.to(tl.float32) * (scale[:, None] if X_ROWS_INNER else scale[None, :])
            tile = tile.to(x.dtype.element_ty)
        if X_ROWS_INNER:
            tile = tl.trans(tile)
        weight_lane = i * weight_channel + (first_r + tap_r * step_r) * weight_r + (first_s + tap_s * step_s) * weight_s
        factor = tl.load(
            weight + weight_lane[:, None] + weight_columns[None, :], mask=lane_mask[:, None] & column_mask[None, :],
            other=0.0,
        )
        result = tl.dot(tile.to(DOT), factor.to(DOT), result, input_precision=PRECISION)
        if not FLAT:
            channel += BLOCK_K
            ended = channel >= channels
            channel = tl.where(ended, 0, channel)
            s += tl.where(ended, 1, 0)
            ended = s >= taps_s
            s = tl.where(ended, 0, s)
            r += tl.where(ended, 1, 0)

    y_channel = group * columns + column
    y_row = n * y_n + p * y_h + q * y_w
    y_offsets = outer(y_row, y_channel * y_c, Y_ROWS_INNER)
    y_mask = outer_and(row_mask, column_mask, Y_ROWS_INNER)
    if not BACKWARD:
        if PER_SAMPLE:
            # the backward pass sees u in y's dtype: unrounded here, ReLU's slope there could be that of the other side
            result = result.to(y.dtype.element_ty).to(tl.float32)
        if kept is not None and PER_SAMPLE:
            product = tl.trans(result) if Y_ROWS_INNER else result
            tl.store(kept + y_offsets, product.to(y.dtype.element_ty), mask=y_mask)
        if bias is not None:
            result += tl.load(bias + y_channel, mask=column_mask, other=0.0).to(tl.float32)[None, :]
        if PER_SAMPLE:
            of_row = n * total
            if WIDE:
                of_row = n.to(tl.int64) * total
            of_sample = of_row[:, None] + y_channel[None, :]
            sample_mask = row_mask[:, None] & column_mask[None, :]
            result *= tl.load(gate + of_sample, mask=sample_mask, other=0.0)
            if shift is not None:
                result += tl.load(shift + of_sample, mask=sample_mask, other=0.0)
        else:
            result *= tl.load(gate + y_channel, mask=column_mask, other=0.0)[None, :]
            if shift is not None:
                result += tl.load(shift + y_channel, mask=column_mask, other=0.0)[None, :]
        if kept is not None and not PER_SAMPLE:
            argument = tl.trans(result) if Y_ROWS_INNER else result
            tl.store(kept + y_offsets, argument.to(y.dtype.element_ty), mask=y_mask)
        result = activate(result, ACTIVATION)
    if Y_ROWS_INNER:
        result = tl.trans(result)
    tl.store(y + y_offsets, result.to(y.dtype.element_ty), mask=y_mask)


@functools.lru_cache(maxsize=4096)
def blocks(
    tiles: Tiles, rows: int, columns: int, channels: int, reach: int, rows_inner: bool, prologue: bool, access: int,
    activation: str,
) -> tuple[int, int, int]:
    """BLOCK_M, BLOCK_N, BLOCK_K of `convolve`: the tiles', less where the product is small or registers would spill.

    256 columns leave no registers for the epilogue, nor do 128 where each result is stored by itself. A prologue, and x
    with its rows innermost, pass through registers, so that a block of x takes half of k, and with 64 columns in
    float32 no more than 64 rows; FLAT holds an address and a mask for each of the block's elements.
    access: bytes of the shortest accesses of x and y; where they are too short to bypass the registers, a thread takes
    8 elements of x, or 16 with x's rows innermost. silu and gelu, whose argument is
    kept, leave registers for 32 results a thread.
    """
    flat, narrow = channels < FEW_CHANNELS, access < SHORTEST_COPY
    most = 16 if flat else max(16, tiles.k // 2) if prologue or rows_inner else tiles.k
    tall, broad = tiles.m, 64 if rows_inner or narrow else 128
    if prologue and most <= 16 and tiles.n <= 64:
        tall = 64
    if narrow:
        tall, most = min(tall, 16 * tiles.warps), min(most, 32 if rows_inner and not prologue else 16)
        broad = 64 if rows_inner else min(64, 8 * tiles.warps)
    if activation in NEEDS_ARGUMENT and not prologue:
        broad = min(broad, 8 * tiles.warps)
    return (
        block(rows, 16, min(tiles.m, tall)), block(columns, 16, min(tiles.n, broad)),
        block(reach if flat else channels, 16, min(tiles.k, most)),
    )


SHORTEST_COPY = 4
"""Bytes: shorter accesses cannot go from global to shared memory directly."""


def channels_in_units(
    shape: tuple[int, ...], strides: tuple[int, ...], most: int
) -> tuple[tuple[int, int, int, int], int]:
    """((n, c, h, w) strides as kernels take them, their unit): n, h and w in units, c in elements.

    The unit is more than 1, up to `most`, where the channels are innermost. An axis of size 1 is not moved along: its
    stride is 0, whatever it was.
    """
    n, _, h, w = (0 if size == 1 else step for size, step in zip(shape, strides, strict=True))
    unit = math.gcd(most, n, h, w) if strides[1] == 1 else 1
    return (n // unit, strides[1], h // unit, w // unit), unit


def innermost_width(strides: tuple[int, ...]) -> bool:
    """True for a contiguous tensor's strides, False for channels_last and wherever neither axis is innermost."""
    return strides[3] == 1 and strides[1] != 1


def reaches_beyond(tensors: Iterable[tuple[tuple[int, ...], tuple[int, ...]]], slack: int) -> bool:
    """True where an offset into some tensor, given as (shape, strides), or `slack` elements beyond it, passes int32."""
    return max(
        1 + sum((size - 1) * step for size, step in zip(shape, strides, strict=True)) for shape, strides in tensors
    ) + slack > INT32_LIMIT

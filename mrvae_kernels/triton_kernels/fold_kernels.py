"""The device side of fold.py: the kernels, which read what differs between layers from tables."""

from __future__ import annotations

import triton
import triton.language as tl

from .fold_plan import LAYER_NUMBERS, PROGRAM_NUMBERS, TILES, VECTOR
from .launch import divide

FORWARD_POINTERS = tl.constexpr(6)  # W, b, g, t, W', b'
BACKWARD_POINTERS = tl.constexpr(9)  # dW', db', W, b, g, dW, db, dg, dt
NUMBERS = tl.constexpr(PROGRAM_NUMBERS)
OF_LAYER = tl.constexpr(LAYER_NUMBERS)
UNIT = tl.constexpr(VECTOR)
SHAPES = tl.constexpr(TILES)
CLASSES = tl.constexpr(len(TILES))


@triton.jit
def pointer(addresses, i, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    """The i-th address as a pointer; ALIGNED: to 16 bytes."""
    result = tl.load(addresses + i).to(tl.pointer_type(dtype))
    return tl.multiple_of(result, 16) if ALIGNED else result


@triton.jit
def scaled_tile(weight, folded, gate, offset, channel, mask):
    w = tl.load(weight + offset, mask=mask)
    g = tl.load(gate + channel, mask=mask)
    tl.store(folded + offset, w.to(g.dtype) * g, mask=mask)


@triton.jit
def fold_kernel(
    addresses, layers, programs,
    WEIGHT: tl.constexpr, BIAS: tl.constexpr, TILE: tl.constexpr, ALIGNED: tl.constexpr, WIDE: tl.constexpr,
):
    """One tile of one W', or of one b'. addresses: FORWARD_POINTERS a layer, 0 for what it lacks."""
    sums: tl.constexpr = tl.float64 if WEIGHT == tl.float64 else tl.float32
    program = programs + tl.program_id(0) * NUMBERS
    number = tl.load(program)
    tile = tl.load(program + 1)
    layer = layers + number * OF_LAYER
    addresses += number * FORWARD_POINTERS
    gate = pointer(addresses, 2, sums, False)
    if tl.load(program + 2) == 1:
        channel = tile * TILE + tl.arange(0, TILE)
        mask = channel < tl.load(layer + 1)
        bias = pointer(addresses, 1, BIAS, False)
        shift = pointer(addresses, 3, sums, False)
        y = tl.load(bias + channel, mask=mask & (tl.load(addresses + 1) != 0), other=0).to(sums)
        y *= tl.load(gate + channel, mask=mask, other=0)
        y += tl.load(shift + channel, mask=mask & (tl.load(addresses + 3) != 0), other=0)
        tl.store(pointer(addresses, 5, WEIGHT, False) + channel, y, mask=mask)
    else:
        levels = tl.load(layer + 2)
        row = divide(tl.load(program + 6) + tl.arange(0, TILE), tl.load(layer + 4), tl.load(layer + 5))
        channel = tl.load(program + 5) + row
        if levels > 0:
            width = tl.load(layer + 3).to(tl.int32)
            row = divide(channel, tl.load(layer + 6), tl.load(layer + 7))
            channel -= row * width
            if levels > 1:
                group = divide(tl.load(program + 4) + row, tl.load(layer + 8), tl.load(layer + 9))
                channel += (tl.load(program + 3) + group) * width
        first = tile.to(tl.int64) * TILE if WIDE else tile * TILE
        offset = first + tl.arange(0, TILE)
        elements = tl.load(layer)
        weight = pointer(addresses, 0, WEIGHT, ALIGNED)
        folded = pointer(addresses, 4, WEIGHT, ALIGNED)
        if first + TILE <= elements:  # without a mask, accesses can be wide
            scaled_tile(weight, folded, gate, offset, channel, None)
        else:
            scaled_tile(weight, folded, gate, offset, channel, offset < elements)


@triton.jit
def gradient_block(
    addresses, group, block, outer, width, inner, splits, split_stride,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, RUN: tl.constexpr, WIDE_ACCESS: tl.constexpr,
    WEIGHT: tl.constexpr, BIAS: tl.constexpr, GRAD: tl.constexpr, SPLIT: tl.constexpr, WIDE: tl.constexpr,
):
    """All gradients of CHANNELS channels, in tiles of [ROWS, CHANNELS, RUN] elements."""
    sums: tl.constexpr = tl.float64 if WEIGHT == tl.float64 else tl.float32
    grad = pointer(addresses, 0, GRAD, WIDE_ACCESS)
    weight = pointer(addresses, 2, WEIGHT, WIDE_ACCESS)
    gate = pointer(addresses, 4, sums, False)
    grad_weight = pointer(addresses, 5, WEIGHT, WIDE_ACCESS)
    given = tl.load(addresses) != 0
    weight_wanted = tl.load(addresses + 5) != 0
    gate_wanted = tl.load(addresses + 7) != 0
    if WIDE_ACCESS:  # tells the compiler what is known: a multiple
        if RUN == 1:
            width = width // UNIT * UNIT
        else:
            inner = inner // UNIT * UNIT
        split_stride = split_stride // UNIT * UNIT
    of_group = block * CHANNELS + tl.arange(0, CHANNELS)
    inside = of_group < width
    channel = group * width + of_group
    g = tl.load(gate + channel, mask=inside & (tl.load(addresses + 4) != 0), other=1)
    first = group.to(tl.int64) * outer if WIDE else group * outer
    dot = tl.zeros([ROWS, CHANNELS, RUN], sums)
    for row in range(0, outer, ROWS):
        rows = row + tl.arange(0, ROWS)
        columns = ((first + rows) * width)[:, None] + of_group[None, :]
        valid = (rows < outer)[:, None] & inside[None, :]
        for k in range(0, 1 if RUN == 1 else inner, RUN):
            if RUN == 1:
                offset = columns[:, :, None]
                mask = valid[:, :, None]
            else:
                run = k + tl.arange(0, RUN)
                offset = (columns * inner)[:, :, None] + run[None, None, :]
                mask = valid[:, :, None] & (run < inner)[None, None, :]
            d = tl.load(grad + offset, mask=mask & given, other=0).to(sums)
            if SPLIT:
                for split in range(1, splits):
                    d += tl.load(grad + split * split_stride + offset, mask=mask & given, other=0)
            w = tl.load(weight + offset, mask=mask & gate_wanted, other=0).to(sums)
            dot += d * w
            tl.store(grad_weight + offset, d * g[None, :, None], mask=mask & weight_wanted)
    grad_bias = tl.load(
        pointer(addresses, 1, GRAD, False) + channel, mask=inside & (tl.load(addresses + 1) != 0), other=0
    ).to(sums)
    b = tl.load(
        pointer(addresses, 3, BIAS, False) + channel, mask=inside & (tl.load(addresses + 3) != 0), other=0
    ).to(sums)
    total = tl.sum(tl.sum(dot, 2), 0) + grad_bias * b
    tl.store(pointer(addresses, 6, BIAS, False) + channel, g * grad_bias, mask=inside & (tl.load(addresses + 6) != 0))
    tl.store(pointer(addresses, 7, sums, False) + channel, total, mask=inside & gate_wanted)
    tl.store(pointer(addresses, 8, sums, False) + channel, grad_bias, mask=inside & (tl.load(addresses + 8) != 0))


@triton.jit(do_not_specialize=["splits", "split_stride"])  # one compilation serves every shape
def fold_backward_kernel(
    addresses, programs, splits, split_stride,
    WEIGHT: tl.constexpr, BIAS: tl.constexpr, GRAD: tl.constexpr, SPLIT: tl.constexpr, ALIGNED: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One block of channels. addresses: BACKWARD_POINTERS a layer, 0 for what is absent or unwanted.

    SPLIT: dW' is the sum of `splits` arrays, split_stride elements apart.
    """
    program = programs + tl.program_id(0) * NUMBERS
    addresses += tl.load(program) * BACKWARD_POINTERS
    kind = tl.load(program + 1)
    group = tl.load(program + 2)
    block = tl.load(program + 3)
    outer = tl.load(program + 4)
    width = tl.load(program + 5)
    inner = tl.load(program + 6)
    split_stride = tl.cast(split_stride, tl.int64)
    for i in tl.static_range(CLASSES):
        if kind == 2 * i:
            gradient_block(
                addresses, group, block, outer, width, inner, splits, split_stride,
                SHAPES[i][0], SHAPES[i][1], SHAPES[i][2], False, WEIGHT, BIAS, GRAD, SPLIT, WIDE,
            )
        elif kind == 2 * i + 1:
            gradient_block(
                addresses, group, block, outer, width, inner, splits, split_stride,
                SHAPES[i][0], SHAPES[i][1], SHAPES[i][2], ALIGNED, WEIGHT, BIAS, GRAD, SPLIT, WIDE,
            )

"""What the kernels of linear layers share: checks, matrices with two strides, the order of programs, wide accesses."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import (
    ACTIVATIONS,
    GELU,
    NEEDS_ARGUMENT,
    NONE,
    SILU,
    activation_slope,
    activation_slope_of_result,
)
from .configurations import Tiles
from .launch import check_device, check_floating

GROUP = tl.constexpr(8)
COMPILED_DOT = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
"""The dtype of tl.dot's operands outside of the interpreter."""
DTYPES = tuple(COMPILED_DOT)


def linear_refusal(x: Tensor, weight: Tensor) -> str | None:
    """Why these kernels do not take x and weight; None where they do."""
    if x.dtype != weight.dtype:
        return f"x has dtype {x.dtype} and weight {weight.dtype}; expected the same dtype"
    if x.dtype not in DTYPES:
        return f"x has dtype {x.dtype}; expected float32, bfloat16 or float16"
    return None


def check_linear(
    name: str, x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor, shift: Tensor | None
) -> None:
    """ValueError, TypeError or RuntimeError where the arguments do not fit; for the backward pass too."""
    refusal = linear_refusal(x, weight)
    if refusal is not None:
        raise TypeError(f"{name}: {refusal}")
    if weight.dim() != 2:
        raise ValueError(f"{name}: weight has shape {tuple(weight.shape)}; expected (C, K)")
    channels, inner = weight.shape
    if x.dim() < 1 or x.shape[-1] != inner:
        raise ValueError(f"{name}: x has shape {tuple(x.shape)}; expected (..., {inner}), the weight's input features")
    if gate.shape != (channels,) and not (x.dim() >= 2 and gate.shape == (x.shape[0], channels)):
        raise ValueError(
            f"{name}: gate has shape {tuple(gate.shape)} for x of shape {tuple(x.shape)}; expected (C,) with C = "
            f"{channels}, or (N, C) for x with N samples in axis 0"
        )
    if bias is not None and bias.shape != (channels,):
        raise ValueError(f"{name}: bias has shape {tuple(bias.shape)}; expected ({channels},)")
    if shift is not None and shift.shape != gate.shape:
        raise ValueError(f"{name}: shift has shape {tuple(shift.shape)}; expected {tuple(gate.shape)}, that of gate")
    check_floating(name, bias=bias, gate=gate, shift=shift)
    check_device(name, x, weight, bias, gate, shift)


def as_matrix(tensor: Tensor) -> Tensor:
    """(..., K) as (rows, K): a view where two strides are enough, else a copy."""
    if tensor.dim() == 2:
        return tensor
    return tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])


def blocks(size: int, block: int) -> int:
    """How many blocks cover `size`; triton.cdiv takes 10 us for it on the host."""
    return -(-size // block)


class Strides(NamedTuple):
    """As kernels take them: strides[i] * units[i] elements, where units are compile-time constants.

    Triton sees that a number is a multiple of 16, and of no less: with units the rows of matrices of 500 or 300 columns
    are read 16 or 8 bytes at a time too.
    """

    strides: tuple[int, int]
    units: tuple[int, int]


def strides_of(matrix: Tensor) -> Strides:
    (row, column), most = matrix.stride(), 16 // matrix.element_size()
    if column == 1:
        unit = math.gcd(row, most)
        return Strides((row // unit, column), (unit, 1))
    unit = math.gcd(column, most) if row == 1 else 1
    return Strides((row, column // unit), (1, unit))


def unit_of(size: int, dtype: torch.dtype) -> int:
    """What a size is a multiple of, up to 16 bytes of elements."""
    return math.gcd(size, 16 // dtype.itemsize) or 1


def narrowed(tiles: Tiles, whole: bool, code: int = 0, sums: bool = False) -> Tiles:
    """The tiles, or less of m and k where registers would spill.

    whole: accesses are 16 bytes wide; where they are not each element has an address of its own. code: of the
    activation whose slope is taken; from its argument it is a long formula. sums: a program also adds up m k numbers.
    """
    if not whole:
        return tiles._replace(m=min(tiles.m, 64), k=min(tiles.k, 16))
    if ACTIVATIONS[code] in NEEDS_ARGUMENT or (sums and tiles.m * tiles.k > 64 * 64):
        return tiles._replace(k=min(32, tiles.k if tiles.m * tiles.n < 128 * 128 else max(16, tiles.k // 2)))
    return tiles


@triton.jit
def tile_of_program(program, row_tiles, column_tiles):
    """(row, column) of a tile: programs next to each other share rows and columns, and so what L2 holds."""
    width = GROUP * column_tiles
    first = program // width * GROUP
    height = tl.minimum(row_tiles - first, GROUP)
    return first + program % width % height, program % width // height


@triton.jit
def places(rows, columns, row_stride, column_stride, ROW_UNIT: tl.constexpr, COLUMN_UNIT: tl.constexpr):
    """Offsets of a tile's elements; rows and columns broadcast; 64 bits where these have them."""
    if rows.dtype == tl.int64:
        row_stride, column_stride = tl.cast(row_stride, tl.int64), tl.cast(column_stride, tl.int64)
    return rows * (row_stride * ROW_UNIT) + columns * (column_stride * COLUMN_UNIT)


@triton.jit
def through_activation(dy, saved, at, mask, ACTIVATION: tl.constexpr):
    """s = act'(z) dy, from `saved` at the places `at`: z for silu and gelu, else the result y."""
    if ACTIVATION == NONE:
        return dy
    else:
        value = tl.load(saved + at, mask=mask, other=0.0).to(tl.float32)
        if ACTIVATION == SILU or ACTIVATION == GELU:
            return dy * activation_slope(value, ACTIVATION)
        else:
            return dy * activation_slope_of_result(value, ACTIVATION)

"""How the weights of a model lie in memory, and which program of a launch handles which part of them.

A dense weight is an array [groups, outer, width, inner]: channel group * width + c has the elements
((group * outer + r) * width + c) * inner + k. Weights with channels in axis 0 have groups = outer = 1, width = C and
the length of a row for inner. A transposed convolution's (C_in, C_out / groups, k...) has outer = C_in / groups and
inner = prod(k); in channels_last order its outer is C_in / groups * prod(k) and inner is 1.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .launch import divisor

FORWARD_TILE = 1024  # elements of one weight
PROGRAM_NUMBERS = 8  # int32 that describe a program
LAYER_NUMBERS = 10  # int64 that describe a layer, forward

TILES = (
    # rows, channels, elements of inner a program handles at a time: rows of a matrix by length, ...
    (1, 1, 1024), (1, 8, 128), (1, 32, 32),
    # ... channels side by side, kernels of transposed convolutions
    (64, 16, 1), (32, 2, 16),
)
VECTOR = 8  # elements in 16 bytes of the smallest dtype: what inner must be a multiple of for such accesses


class Geometry(NamedTuple):
    """A dense weight as an array [groups, outer, width, inner]."""

    groups: int
    outer: int
    width: int
    inner: int

    @property
    def channels(self) -> int:
        return self.groups * self.width

    @property
    def elements(self) -> int:
        return self.outer * self.channels * self.inner


def memory_order(shape: Sequence[int], strides: Sequence[int]) -> list[int] | None:
    """The axes longer than 1, from the outermost to the innermost in memory; None for a weight with gaps."""
    order = sorted((d for d in range(len(shape)) if shape[d] > 1), key=lambda d: strides[d], reverse=True)
    expected = 1
    for d in reversed(order):
        if strides[d] != expected:
            return None
        expected *= shape[d]
    return order


@functools.cache
def geometry(shape: tuple[int, ...], strides: tuple[int, ...], groups: int) -> Geometry | None:
    """The geometry of a weight, or None where it must be copied to have one. ValueError for shapes no weight has.

    groups: 0 where the output channel is axis 0, the number of groups of a transposed convolution's weight otherwise.
    """
    if groups < 0 or len(shape) < (2 if groups > 0 else 1):
        raise ValueError(
            f"has a weight of shape {tuple(shape)} and groups = {groups}; expected groups 0 with the channels in axis "
            "0, or groups >= 1 with a transposed convolution's weight (C_in, C_out / groups, ...)"
        )
    if groups > 1 and shape[0] % groups != 0:
        raise ValueError(f"has a weight of shape {tuple(shape)}; expected axis 0 to be a multiple of groups = {groups}")
    axis = 1 if groups > 0 else 0
    if math.prod(shape) == 0:
        return Geometry(1, 0, shape[axis] * max(1, groups), 1)
    order = memory_order(shape, strides)
    if order is None or (groups > 1 and order[0] != 0):
        return None
    if axis not in order:
        order.insert(1 if groups > 1 else 0, axis)
    place = order.index(axis)
    outer = math.prod(shape[d] for d in order[:place])
    inner = math.prod(shape[d] for d in order[place + 1 :])
    if groups <= 1:
        return Geometry(1, outer, shape[axis], inner)
    if outer == groups:  # one input channel a group: the channels of all groups follow one another
        return Geometry(1, 1, groups * shape[axis], inner)
    return Geometry(groups, outer // groups, shape[axis], inner)


class Plan(NamedTuple):
    """What a launch needs besides addresses, on the device; never dropped, since a recorded CUDA graph may read it."""

    programs: Tensor  # (grid, PROGRAM_NUMBERS)
    layers: Tensor  # (layers, LAYER_NUMBERS); empty for a backward plan
    grid: int
    largest: int  # the layer of most elements


def _plan(rows: list[Tensor], layers: list[list[int]], shapes: tuple[Geometry, ...], device: torch.device) -> Plan:
    programs = torch.cat([torch.empty(0, PROGRAM_NUMBERS, dtype=torch.int64), *rows]).to(torch.int32)
    largest = max(range(len(shapes)), key=lambda layer: shapes[layer].elements)
    return Plan(programs.to(device), torch.tensor(layers, dtype=torch.int64).to(device), len(programs), largest)


@functools.cache
def forward_plan(shapes: tuple[Geometry, ...], with_bias: tuple[bool, ...], device: torch.device) -> Plan:
    """Tiles of FORWARD_TILE consecutive elements of the weights, and of the biases where there are any.

    A program: layer, number of the tile, 1 for a bias, then [group, outer, width, inner] indices of its first element.
    A layer: elements, channels, levels, width, and the `divisor` of inner, width and outer. levels: the divisions that
    lead from an element to its channel: 0 by inner; 1 also by width; 2 also by outer.
    """
    rows, layers = [], []
    for layer, (shape, bias) in enumerate(zip(shapes, with_bias, strict=True)):
        outer, width, inner = max(1, shape.outer), max(1, shape.width), max(1, shape.inner)
        levels = 0 if outer == 1 else 1 if shape.groups == 1 else 2
        numbers = (number for value in (inner, width, outer) for number in divisor(value))
        layers.append([shape.elements, shape.channels, levels, width, *numbers])
        for of_bias, elements in ((0, shape.elements), (1, shape.channels if bias else 0)):
            tile = torch.arange(-(-elements // FORWARD_TILE))
            first = tile * FORWARD_TILE
            row = first // inner
            indices = (row // width // outer, row // width % outer, row % width, first % inner)
            same = torch.ones_like(tile)
            rows.append(torch.stack((same * layer, tile, same * of_bias, *indices, same * 0), 1))
    return _plan(rows, layers, shapes, device)


def tile_class(shape: Geometry) -> int:
    """Index of TILES that suits a weight, doubled, plus 1 where accesses of 16 bytes fit it."""
    if shape.outer == 1:
        number = 0 if shape.inner > 512 else 1 if shape.inner > 32 else 2
    else:
        number = 3 if shape.inner == 1 else 4
    fits = number != 2 and (shape.width if number == 3 else shape.inner) % VECTOR == 0
    return 2 * number + fits


@functools.cache
def backward_plan(shapes: tuple[Geometry, ...], device: torch.device) -> Plan:
    """Blocks of channels of one group; the longest go first, so that none is left running alone.

    A program: layer, tile class, group, number of the block, outer, width, inner.
    """
    rows = []
    by_work = sorted(range(len(shapes)), key=lambda i: shapes[i].outer * shapes[i].inner, reverse=True)
    for layer in by_work:
        shape = shapes[layer]
        kind = tile_class(shape)
        blocks = -(-shape.width // TILES[kind // 2][1])
        program = torch.arange(shape.groups * blocks)
        group, block = program // max(1, blocks), program % max(1, blocks)
        same = torch.ones_like(program)
        fixed = (same * shape.outer, same * shape.width, same * shape.inner, same * 0)
        rows.append(torch.stack((same * layer, same * kind, group, block, *fixed), 1))
    return _plan(rows, [], shapes, device)

"""A 2-d convolution's numbers, and which convolutions fused kernels take; imports no Triton."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

FEW_CHANNELS = 16
"""With fewer channels to reduce than this taps and channels are one axis: tl.dot takes no reduction shorter than 16."""

BEYOND_POSITIONS = 2**16
"""Positions past the last that programs count up to: the rest of the last tile, or of the last part of a sum."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

Pair = tuple[int, int]


class Geometry(NamedTuple):
    """A layer's, in the order of aten::convolution."""

    stride: Pair
    padding: Pair
    dilation: Pair
    transposed: bool
    output_padding: Pair
    groups: int


def geometry(
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], transposed: bool,
    output_padding: Sequence[int], groups: int,
) -> Geometry:
    """ValueError unless stride, padding, dilation and output_padding are two numbers each."""
    return _geometry(tuple(stride), tuple(padding), tuple(dilation), transposed, tuple(output_padding), groups)


@functools.lru_cache(maxsize=4096)
def _geometry(
    stride: tuple[int, ...], padding: tuple[int, ...], dilation: tuple[int, ...], transposed: bool,
    output_padding: tuple[int, ...], groups: int,
) -> Geometry:
    pairs = stride, padding, dilation, output_padding
    if any(len(pair) != 2 for pair in pairs):
        raise ValueError(
            f"stride, padding, dilation and output_padding are {', '.join(map(str, pairs))}; expected two numbers each"
        )
    return Geometry(stride, padding, dilation, transposed, output_padding, groups)  # type: ignore[arg-type]


@functools.lru_cache(maxsize=4096)
def output_size(x: tuple[int, ...], weight: tuple[int, ...], layer: Geometry) -> Pair:
    """Height and width of y by the shapes of x and weight."""
    sizes = [
        (size - 1) * stride - 2 * padding + dilation * (kernel - 1) + extra + 1 if layer.transposed
        else (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
        for size, kernel, stride, padding, dilation, extra in zip(
            x[2:], weight[2:], layer.stride, layer.padding, layer.dilation, layer.output_padding, strict=True
        )
    ]
    return sizes[0], sizes[1]


@functools.lru_cache(maxsize=4096)
def _refusal_of_shapes(x: tuple[int, ...], weight: tuple[int, ...], layer: Geometry) -> str | None:
    if len(x) != 4 or len(weight) != 4:
        return f"x has shape {x} and weight {weight}; expected (N, C_in, H, W) and a weight with 4 axes"
    groups = layer.groups
    if groups < 1 or min(layer.stride) < 1 or min(layer.dilation) < 1 or min(layer.padding) < 0:
        return (
            f"stride is {layer.stride}, dilation {layer.dilation}, padding {layer.padding}, groups {groups}; "
            "expected stride, dilation and groups from 1 up, padding from 0 up"
        )
    own = weight[0] if layer.transposed else weight[1] * groups
    if x[1] != own or weight[0] % groups:
        return (
            f"x has shape {x}; expected {own} channels in axis 1, by the weight's shape {weight} and groups = {groups}"
        )
    if any(
        extra < 0 or extra >= max(stride, dilation)
        for extra, stride, dilation in zip(layer.output_padding, layer.stride, layer.dilation, strict=True)
    ):
        return (
            f"output_padding is {layer.output_padding}; expected less than the larger of stride {layer.stride} and "
            f"dilation {layer.dilation}"
        )
    least = min(weight[0] // groups, weight[1])
    if groups > 1 and least < FEW_CHANNELS:
        return (
            f"groups = {groups} leaves {least} channel{'s' * (least > 1)} a group, and the tile of a matrix product "
            f"takes {FEW_CHANNELS} at least"
        )
    size = output_size(x, weight, layer)
    if min(size) < 1:
        return (
            f"x has shape {x} and weight {weight}, which gives {size[0]} x {size[1]} results; expected at least 1 x 1"
        )
    most = 2**31 - 1 - BEYOND_POSITIONS
    if x[0] * max(x[2] * x[3], math.prod([a + b for a, b in zip(size, layer.stride, strict=True)])) > most:
        return f"x has shape {x}, which makes more than {most} positions; positions are counted in 32 bits"
    return None


def refusal(x: Tensor, weight: Tensor, layer: Geometry) -> str | None:
    """Why the kernels cannot compute this, as a sentence, or None."""
    if x.dtype not in DTYPES or weight.dtype != x.dtype:
        return f"x has dtype {x.dtype} and weight {weight.dtype}; expected both float32, bfloat16 or float16"
    return _refusal_of_shapes(tuple(x.shape), tuple(weight.shape), layer)

"""Tensors as strided [samples, channels, positions] arrays, so that one kernel serves every layout.

A tensor's axes but the channels' are merged as far as the strides of all the tensors involved allow: NCHW gives M = H W
positions of stride 1, channels_last N H W positions of stride C, (N, ..., C) the rows of a matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import block, divide, divisor, signed

PLANS_KEPT = 1024


class Strides(NamedTuple):
    """Elements from one sample, channel, position to the next; 0 along an axis of size 1."""

    sample: int
    channel: int
    position: int


class View(NamedTuple):
    """samples is 1 where one axis of positions covers everything; strides: one entry a tensor."""

    samples: int
    channels: int
    positions: int
    strides: tuple[Strides, ...]


def merged_axes(
    shape: Sequence[int], axes: Sequence[int], strides: Sequence[Sequence[int]]
) -> list[tuple[int, tuple[int, ...]]]:
    """(size, stride by tensor) of the fewest axes that cover `axes` of all tensors, in the first's order of memory."""
    order = sorted(
        (axis for axis in axes if shape[axis] != 1), key=lambda axis: [stride[axis] for stride in strides], reverse=True
    )
    merged: list[tuple[int, tuple[int, ...]]] = []
    for axis in order:
        size, steps = shape[axis], tuple(stride[axis] for stride in strides)
        if merged and all(outer == size * step for outer, step in zip(merged[-1][1], steps, strict=True)):
            merged[-1] = (merged[-1][0] * size, steps)
        else:
            merged.append((size, steps))
    return merged


def common_view(
    shape: Sequence[int], channel_axis: int, per_sample: bool, strides: Sequence[Sequence[int]]
) -> View | None:
    """The view of tensors of one shape, or None where their strides need more axes than it has.

    per_sample: axis 0 must stay recognisable. It is then the view's samples, or, where no other axis is left, its
    positions (with samples = 1).
    """
    none = (0,) * len(strides)
    rest = [axis for axis in range(len(shape)) if axis != channel_axis and not (per_sample and axis == 0)]
    merged = merged_axes(shape, rest, strides)
    if per_sample and shape[0] != 1:
        merged.insert(0, (shape[0], tuple(stride[0] for stride in strides)))
    if len(merged) > 2:
        return None
    (samples, outer), (positions, inner) = ([(1, none), (1, none)] + merged)[-2:]
    channels = shape[channel_axis]
    channel = tuple(stride[channel_axis] if channels > 1 else 0 for stride in strides)
    return View(samples, channels, positions, tuple(map(Strides, outer, channel, inner)))


class Units(NamedTuple):
    """How wide accesses can be: the sizes and slow strides that kernels receive are divided by these."""

    channels_fastest: bool
    unit: int
    tensors: tuple[int, ...]


def units(view: View, itemsize: int) -> Units:
    """Units of up to 16 bytes, as the view's extents and the first tensor's strides allow; 1 for tensors that don't.

    Triton sees that a number is a multiple of 16, and of no less: written as a run-time number times a compile-time
    unit, extents and strides of 4 or 8 give wide accesses too.
    """
    first = view.strides[0]
    channels_fastest = first.channel == 1 and first.position != 1
    unit = math.gcd(
        max(1, 16 // itemsize), view.channels if channels_fastest else view.positions,
        *_slow(first, channels_fastest),
    ) if (first.channel if channels_fastest else first.position) == 1 else 1
    fits = (all(slow % unit == 0 for slow in _slow(strides, channels_fastest)) for strides in view.strides)
    return Units(channels_fastest, unit, tuple(unit if fit else 1 for fit in fits))


def _slow(strides: Strides, channels_fastest: bool) -> tuple[int, int]:
    return strides.sample, strides.position if channels_fastest else strides.channel


def divided(strides: Strides, channels_fastest: bool, unit: int) -> tuple[int, int, int]:
    """The strides as kernels receive them: the slow ones in units."""
    sample, channel, position = strides
    if channels_fastest:
        return sample // unit, channel, position // unit
    return sample // unit, channel // unit, position


class Layout(NamedTuple):
    """How tensors of one shape are addressed together."""

    copy: str  # "": as they are; "like": those of other strides as empty_like(u); "contiguous", "channels second": all
    strides: tuple[tuple[int, ...], ...]  # of empty_like(u), and of copies that do not have these
    shape: tuple[int, ...]  # as kernels see it
    axis: int  # the channels' in the tensors themselves
    view: View
    channels_fastest: bool
    lanes: int
    channel_unit: int
    tensor_units: tuple[int, ...]
    stride_arguments: tuple[int, ...]

    @property
    def position_units(self) -> int:
        return self.view.samples * self.view.positions // self.lanes

    def division(self) -> tuple[int, int, int]:
        """sample_units, magic and magic_shift."""
        per_sample = self.view.positions // self.lanes
        return per_sample, *signed(divisor(max(1, min(per_sample, 2**31 - 1))))


def layout(u: Tensor, others: Sequence[Tensor], axis: int, per_sample: bool) -> Layout:
    """Of u, which has elements, a result with the strides of empty_like(u), and others."""
    result = torch.empty_like(u, device="meta").stride()
    contiguous = torch.empty(u.shape, device="meta").stride()
    # with a gate a sample and axes on both sides of the channels' even contiguous tensors need an axis too many
    moved = u.shape[:1] + u.shape[axis : axis + 1] + u.shape[1:axis] + u.shape[axis + 1 :] if per_sample else u.shape
    second = torch.empty(moved, device="meta").stride()
    strides = [u.stride(), result, *(other.stride() for other in others)]
    count = len(strides)
    for copy, shape, channel_axis, tried in (
        ("", u.shape, axis, strides), ("like", u.shape, axis, [result] * count),
        ("contiguous", u.shape, axis, [contiguous] * count), ("channels second", moved, 1, [second] * count),
    ):
        view = common_view(shape, channel_axis, per_sample, tried)
        if view is not None:
            # where each position has a gate of its own, positions are not taken several at a time
            one_gate_each = per_sample and view.samples == 1 and view.strides[0].position == 1
            fastest, unit, tensor_units = units(view, 16 if one_gate_each else u.element_size())
            arguments = tuple(
                number for own, tensor_unit in zip(view.strides, tensor_units, strict=True)
                for number in divided(own, fastest, tensor_unit)
            )
            lanes, channel_unit = (1, unit) if fastest else (unit, 1)
            return Layout(
                copy, (result, tried[0]), tuple(shape), axis, view, fastest, lanes, channel_unit, tensor_units,
                arguments,
            )
    raise AssertionError("contiguous tensors with the channels in axis 0 or 1 always have a view")


def laid_out(tensor: Tensor, plan: Layout) -> Tensor:
    """The tensor, or its copy as the layout's `copy` says."""
    if plan.copy == "contiguous":
        return tensor.contiguous()
    if plan.copy == "channels second":
        return tensor.movedim(plan.axis, 1).contiguous()
    if plan.copy == "like" and tensor.stride() != plan.strides[0]:
        copy = torch.empty_strided(tensor.shape, plan.strides[0], dtype=tensor.dtype, device=tensor.device)
        return copy.copy_(tensor)
    return tensor


def result_of(u: Tensor, plan: Layout) -> Tensor:
    strides = plan.strides[1 if plan.copy in ("contiguous", "channels second") else 0]
    return torch.empty_strided(plan.shape, strides, dtype=u.dtype, device=u.device)


def restored(result: Tensor, like: Tensor, plan: Layout) -> Tensor:
    """The result with the strides of empty_like(like)."""
    if plan.copy not in ("contiguous", "channels second"):
        return result
    target = torch.empty_strided(like.shape, plan.strides[0], dtype=result.dtype, device=result.device)
    return target.copy_(in_order(result, plan))


def in_order(result: Tensor, plan: Layout) -> Tensor:
    """A kernel's result with the axes of the tensors themselves."""
    return result.movedim(1, plan.axis) if plan.copy == "channels second" else result


def tile_of(layout: Layout, elements: int, lanes: int) -> tuple[int, int]:
    """(BLOCK_C, BLOCK_J) with BLOCK_C * BLOCK_J * lanes = elements, as far as the tensor has that many."""
    if layout.channels_fastest:
        channels = block(layout.view.channels, 1, 128)
        return channels, block(layout.position_units, 1, elements // channels)
    few = block(layout.view.channels, 1, 8)
    positions = block(layout.position_units, 1, elements // (few * lanes))
    return block(layout.view.channels, 1, elements // (positions * lanes)), positions


_plans: dict[Hashable, Any] = {}


def remembered(key: Hashable, make: Callable[[], Any]) -> Any:
    """make(), once for each key."""
    plan = _plans.get(key)
    if plan is None:
        if len(_plans) >= PLANS_KEPT:
            _plans.clear()
        plan = _plans[key] = make()
    return plan


# ---- addresses, shared by forward and backward ----------------------------------------------------------------------


@triton.jit
def sample_and_position(
    j, sample_units, magic, magic_shift, ONE_SAMPLE: tl.constexpr, WIDE: tl.constexpr
):
    """(n, m) of positions j of all samples in a row; j, m and sample_units in units of positions."""
    if ONE_SAMPLE:
        n = j * 0
    elif WIDE:
        n = j // sample_units
    else:
        n = divide(j, magic, magic_shift)
    return n, j - n * sample_units


@triton.jit
def offsets(
    c, n, m, sample, channel, position, UNIT: tl.constexpr, LANES: tl.constexpr, CHANNELS_FASTEST: tl.constexpr
):
    """Offsets of [channels, units of positions, LANES] elements; slow strides are in units of UNIT.

    They have 64 bits where c, n and m do.
    """
    if c.dtype == tl.int64:
        sample, channel, position = tl.cast(sample, tl.int64), tl.cast(channel, tl.int64), tl.cast(position, tl.int64)
    if CHANNELS_FASTEST:
        row = n * (sample * UNIT) + m * (position * UNIT)
        return (c * channel)[:, None, None] + row[None, :, None]
    else:
        row = n * (sample * UNIT) + m * LANES * position
        lane = tl.arange(0, LANES) * position
        return (c * (channel * UNIT))[:, None, None] + row[None, :, None] + lane[None, None, :]


@triton.jit
def parameters(
    bias, gate, shift, c, rows, channels, in_c, in_tile, GATE_BY_SAMPLE: tl.constexpr, REAL: tl.constexpr
):
    """b, g and t of a tile, each to broadcast over [channels, units, LANES]; absent ones are 0."""
    b = tl.zeros((1, 1, 1), REAL)
    g = tl.zeros((1, 1, 1), REAL)
    t = tl.zeros((1, 1, 1), REAL)
    if bias is not None:
        b = tl.load(bias + c, mask=in_c, other=0.0).to(REAL)[:, None, None]
    if GATE_BY_SAMPLE:
        places = (rows * channels)[None, :, None] + c[:, None, None]
        if gate is not None:
            g = tl.load(gate + places, mask=in_tile, other=0.0).to(REAL)
        if shift is not None:
            t = tl.load(shift + places, mask=in_tile, other=0.0).to(REAL)
    else:
        if gate is not None:
            g = tl.load(gate + c, mask=in_c, other=0.0).to(REAL)[:, None, None]
        if shift is not None:
            t = tl.load(shift + c, mask=in_c, other=0.0).to(REAL)[:, None, None]
    return b, g, t

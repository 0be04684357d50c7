"""How the epilogue's backward pass is cut into programs, and its launches; the kernels are in epilogue_backward.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .device import on_device, processors
from .epilogue_backward import REAL, TILE, backward_by_sample, backward_shared, finish, finish_by_sample, tile_elements
from .launch import INT32_LIMIT, accumulation_dtype, block, wide
from .views import Layout, laid_out, layout, remembered, restored, result_of, tile_of

STEPS_A_PART = 8
"""A part of the positions has at least so many steps: fewer are done sooner than a second launch starts."""
PROGRAMS_A_PROCESSOR = 4


class Wanted(NamedTuple):
    """Which gradients to compute."""

    u: bool
    bias: bool
    gate: bool
    shift: bool


class Plan(NamedTuple):
    layout: Layout
    kernel: Any
    grid: tuple[int]
    partial: tuple[int, ...]  # shape of the sums for a second launch, (parts, 2, ...); () where none is needed
    numbers: tuple[int, ...]
    constants: dict[str, Any]
    finish_by_sample: bool
    finish_grid: tuple[int]
    finish_constants: dict[str, Any]


def make_plan(
    values: Tensor, grad: Tensor, axis: int, per_sample: bool, activation: int, kind: int, wanted: Wanted
) -> Plan:
    found = layout(values, (grad,), axis, per_sample)
    view, lanes, tile = found.view, found.lanes, tile_elements(values.dtype)
    by_row = per_sample and view.samples == 1
    total, dot = wanted.bias or (wanted.shift and not by_row), wanted.gate and not by_row
    real = REAL[accumulation_dtype(values.dtype)]
    constants = {
        "CHANNEL_UNIT": found.channel_unit, "LANES": lanes,
        **dict(zip(("V_UNIT", "R_UNIT", "D_UNIT"), found.tensor_units, strict=True)),
        "CHANNELS_FASTEST": found.channels_fastest, "ACTIVATION": activation,
        "READ_VALUES": activation != 0 or wanted.gate, "SUM": total, "DOT": dot, "REAL": real,
        # values and grad may be expanded, the result is not
        "WIDE": wide(values, grad, slack=4 * TILE) or values.numel() + 4 * TILE > INT32_LIMIT,
    }
    target = PROGRAMS_A_PROCESSOR * processors(values.device)
    channel_units = view.channels // found.channel_unit
    numbers: tuple[int, ...]
    slabs = 1
    if per_sample and not by_row:
        kernel, block_c, block_n, block_m = backward_by_sample, *blocks_by_sample(found, tile, target)
        parts = triton.cdiv(view.samples, block_n)
        steps = triton.cdiv(found.division()[0], block_m)
        most = target // (triton.cdiv(view.channels, block_c) * parts)
        slabs = max(1, min(triton.cdiv(steps, STEPS_A_PART) if total or dot else steps, most))
        steps = triton.cdiv(steps, slabs)
        slabs = triton.cdiv(found.division()[0], block_m * steps)
        numbers = (channel_units, view.samples, found.division()[0], steps)
        constants.update(BLOCK_C=block_c, BLOCK_N=block_n, BLOCK_M=block_m, SPLIT=slabs > 1)
        second = (total or dot) if slabs > 1 else wanted.bias and parts > 1
    else:
        kernel, (block_c, block_j) = backward_shared, tile_of(found, tile, lanes)
        steps = triton.cdiv(found.position_units, block_j)
        most = triton.cdiv(target, triton.cdiv(view.channels, block_c))
        parts = max(1, min(triton.cdiv(steps, STEPS_A_PART), most)) if total or dot else steps
        steps = triton.cdiv(steps, parts)
        parts = triton.cdiv(found.position_units, block_j * steps)
        numbers = (channel_units, found.position_units, *found.division(), steps)
        constants.update(
            BLOCK_C=block_c, BLOCK_J=block_j, GATE_BY_SAMPLE=by_row, ONE_SAMPLE=view.samples == 1, VALUES=kind
        )
        second = (total or dot) and parts > 1
    partial = (slabs, 2, view.samples, view.channels) if slabs > 1 else (parts, 2, view.channels)
    finish_constants = {"SUM": total, "DOT": dot and (slabs > 1 or not per_sample), "REAL": real}
    if slabs > 1:
        finish_c = block(view.channels, 1, 8)
        finish_constants.update(BLOCK_N=block(view.samples, 1, 32), BLOCK_P=block(slabs, 1, 8))
    else:
        finish_c = block(view.channels, 1, 16)
        finish_constants.update(BLOCK_P=block(parts, 1, 128))
    return Plan(
        found, kernel, (triton.cdiv(view.channels, block_c) * parts * slabs,), partial if second else (),
        (*found.stride_arguments, *numbers), constants, slabs > 1, (triton.cdiv(view.channels, finish_c),),
        {**finish_constants, "BLOCK_C": finish_c},
    )


def blocks_by_sample(found: Layout, tile: int, target: int) -> tuple[int, int, int]:
    """(BLOCK_C, BLOCK_N, BLOCK_M), a full tile where that leaves enough programs."""
    view, lanes = found.view, found.lanes
    least = block(view.channels, 1, 32) if found.channels_fastest else 1
    block_c = block(view.channels, 1, 128) if found.channels_fastest else least
    block_m = block(view.positions // lanes, 1, tile // (block_c * lanes))
    block_c = max(block_c, block(view.channels, 1, tile // (block_m * lanes)))
    block_n = block(view.samples, 1, max(1, tile // (block_c * block_m * lanes)))
    while triton.cdiv(view.channels, block_c) * triton.cdiv(view.samples, block_n) < target:
        if block_n > 1:
            block_n //= 2
        elif block_c > least:
            block_c //= 2
        else:
            break
    return block_c, block_n, block_m


def backward(
    grad: Tensor, values: Tensor, bias: Tensor | None, gate: Tensor | None, shift: Tensor | None, axis: int,
    per_sample: bool, activation: int, kind: int, wanted: Wanted, results: Sequence[Tensor | None],
) -> Tensor | None:
    """Launches; du, where it is wanted. results: empty tensors for db, dg and dt, None where not wanted.

    kind: what `values`, of grad's shape, holds: INPUT, ARGUMENT or RESULT. Without a gate g counts as unused.
    """
    key = (
        values.shape, values.stride(), grad.stride(), values.dtype, values.device, axis, per_sample, activation, kind,
        wanted,
    )
    plan: Plan = remembered(
        key, lambda: make_plan(values, grad, axis, per_sample, activation, kind, wanted)
    )
    grad_u = result_of(values, plan.layout) if wanted.u else None
    db, dg, dt = results
    partial = None
    if plan.partial:
        partial = torch.empty(plan.partial, dtype=accumulation_dtype(values.dtype), device=values.device)
    first_db = None if plan.partial else db
    with on_device(values):
        plan.kernel[plan.grid](
            laid_out(grad, plan.layout), laid_out(values, plan.layout), bias, gate, shift, grad_u, first_db, dg, dt,
            partial, *plan.numbers, **plan.constants,
        )
        if partial is not None and plan.finish_by_sample:
            finish_by_sample[plan.finish_grid](
                partial, gate, db, dg, dt, plan.partial[0], *plan.partial[2:], **plan.finish_constants
            )
        elif partial is not None:
            summed = (None, None) if per_sample else (dg, dt)
            finish[plan.finish_grid](
                partial, None if per_sample else gate, db, *summed, plan.partial[0], plan.partial[2],
                **plan.finish_constants,
            )
    return None if grad_u is None else restored(grad_u, values, plan.layout)

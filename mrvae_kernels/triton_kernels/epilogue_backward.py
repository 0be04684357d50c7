"""Backward pass of y = act(z), z = g (u + b) + t, in one pass over u and dy.

    s = act'(z) dy;  du = g s;  dt = sum s;  dg = sum s (u + b);  db = sum g s

The sums run over whatever a parameter is shared by: b by all samples, g and t by all or by none.

Memory: as in epilogue.py. s is had from z, from u and the parameters, or, for sums alone, from the activation's result.

Grid: with one gate for all, a program for each tile of channels and each part of the positions; it adds up in
registers and writes its part's sums, which a second small launch adds in order (left out where there is one part). With
one gate a sample, a program for each tile of samples and channels runs over their positions, and only db needs the
second launch; where these are too few programs, each runs over a part of the positions (SPLIT), and all sums need it.

Bytes: reads u and dy and writes du, each once, and only where they are needed.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .activations import ACTIVATIONS, activation_slope, activation_slope_of_result
from .launch import TRITON_NAMES, Variant, accumulation_dtype
from .views import offsets, parameters, sample_and_position

REAL = {torch.float32: tl.float32, torch.float64: tl.float64}
TILE = 2048
"""Elements of a step; the sums of each stay in registers."""

PARAMETERS = ["bias", "gate", "shift"]
"""Slices of one tensor may start anywhere; read once a tile, they are not worth kernels of their own."""
STRIDES = [f"{tensor}_{axis}" for tensor in "vrd" for axis in ("sample", "channel", "position")]

# What `values` holds
INPUT = tl.constexpr(0)  # u
ARGUMENT = tl.constexpr(1)  # z
RESULT = tl.constexpr(2)  # y


@triton.jit
def slope_times(dy, value, b, g, t, VALUES: tl.constexpr, ACTIVATION: tl.constexpr):
    """s = act'(z) dy."""
    if ACTIVATION == 0:
        return dy
    elif VALUES == RESULT:
        return dy * activation_slope_of_result(value, ACTIVATION)
    elif VALUES == ARGUMENT:
        return dy * activation_slope(value, ACTIVATION)
    else:
        return dy * activation_slope(g * (value + b) + t, ACTIVATION)


@triton.jit
def store_if_wanted(target, places, values, mask):
    if target is not None:
        tl.store(target + places, values.to(target.dtype.element_ty), mask=mask)


@triton.jit(
    do_not_specialize=["channel_units", "position_units", "sample_units", "magic", "magic_shift", "steps"],
    do_not_specialize_on_alignment=[*STRIDES, *PARAMETERS],
)
def backward_shared(
    grad, values, bias, gate, shift, grad_u, grad_bias, grad_gate, grad_shift, partial,
    v_sample, v_channel, v_position, r_sample, r_channel, r_position, d_sample, d_channel, d_position,
    channel_units, position_units, sample_units, magic, magic_shift, steps,
    CHANNEL_UNIT: tl.constexpr, LANES: tl.constexpr, V_UNIT: tl.constexpr, R_UNIT: tl.constexpr, D_UNIT: tl.constexpr,
    CHANNELS_FASTEST: tl.constexpr, ONE_SAMPLE: tl.constexpr, GATE_BY_SAMPLE: tl.constexpr, ACTIVATION: tl.constexpr,
    VALUES: tl.constexpr, READ_VALUES: tl.constexpr, SUM: tl.constexpr, DOT: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_J: tl.constexpr, REAL: tl.constexpr, WIDE: tl.constexpr,
):
    """One gate for all samples, or one for each position (GATE_BY_SAMPLE): then the gradients of g and t are elements.

    partial: (parts, 2, C), the sums of s and of s (u + b); with GATE_BY_SAMPLE of g s; None where there is one part.
    """
    program = tl.program_id(0)
    if WIDE:
        program = tl.cast(program, tl.int64)
    channels = channel_units * CHANNEL_UNIT
    tiles = tl.cdiv(channels, BLOCK_C)
    c = program % tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    part = program // tiles
    in_c = c < channels
    total = tl.zeros((BLOCK_C, BLOCK_J, LANES), REAL)
    dot = tl.zeros((BLOCK_C, BLOCK_J, LANES), REAL)
    if not GATE_BY_SAMPLE:
        b, g, t = parameters(bias, gate, shift, c, c, channels, in_c, in_c, False, REAL)
    for step in range(steps):
        j = (part * steps + step) * BLOCK_J + tl.arange(0, BLOCK_J)
        n, m = sample_and_position(j, sample_units, magic, magic_shift, ONE_SAMPLE, WIDE)
        in_tile = in_c[:, None, None] & (j < position_units)[None, :, None]
        if GATE_BY_SAMPLE:
            b, g, t = parameters(bias, gate, shift, c, m, channels, in_c, in_tile, True, REAL)
        d_places = offsets(c, n, m, d_sample, d_channel, d_position, D_UNIT, LANES, CHANNELS_FASTEST)
        dy = tl.load(grad + d_places, mask=in_tile, other=0.0).to(REAL)
        value = dy
        if READ_VALUES:
            v_places = offsets(c, n, m, v_sample, v_channel, v_position, V_UNIT, LANES, CHANNELS_FASTEST)
            value = tl.load(values + v_places, mask=in_tile, other=0.0).to(REAL)
        s = slope_times(dy, value, b, g, t, VALUES, ACTIVATION)
        if grad_u is not None:
            r_places = offsets(c, n, m, r_sample, r_channel, r_position, R_UNIT, LANES, CHANNELS_FASTEST)
            tl.store(grad_u + r_places, (g * s).to(grad_u.dtype.element_ty), mask=in_tile)
        if GATE_BY_SAMPLE:
            places = (m * channels)[None, :, None] + c[:, None, None]
            store_if_wanted(grad_shift, places, s, in_tile)
            store_if_wanted(grad_gate, places, s * (value + b), in_tile)
            if SUM:
                total += g * s
        else:
            if SUM:
                total += s
            if DOT:
                dot += s * (value + b)
    if SUM:
        sums = tl.sum(tl.sum(total, 2), 1)
        if partial is not None:
            tl.store(partial + part * 2 * channels + c, sums, mask=in_c)
        elif GATE_BY_SAMPLE:
            store_if_wanted(grad_bias, c, sums, in_c)
        else:
            store_if_wanted(grad_shift, c, sums, in_c)
            if grad_bias is not None:
                own_gate = tl.load(gate + c, mask=in_c, other=0.0).to(REAL)
                store_if_wanted(grad_bias, c, own_gate * sums, in_c)
    if DOT:
        dots = tl.sum(tl.sum(dot, 2), 1)
        if partial is not None:
            tl.store(partial + (part * 2 + 1) * channels + c, dots, mask=in_c)
        else:
            store_if_wanted(grad_gate, c, dots, in_c)


@triton.jit(
    do_not_specialize=["channel_units", "samples", "sample_units", "steps"],
    do_not_specialize_on_alignment=[*STRIDES, *PARAMETERS]
)
def backward_by_sample(
    grad, values, bias, gate, shift, grad_u, grad_bias, grad_gate, grad_shift, partial,
    v_sample, v_channel, v_position, r_sample, r_channel, r_position, d_sample, d_channel, d_position,
    channel_units, samples, sample_units, steps,
    CHANNEL_UNIT: tl.constexpr, LANES: tl.constexpr, V_UNIT: tl.constexpr, R_UNIT: tl.constexpr, D_UNIT: tl.constexpr,
    CHANNELS_FASTEST: tl.constexpr, ACTIVATION: tl.constexpr, READ_VALUES: tl.constexpr, SUM: tl.constexpr,
    DOT: tl.constexpr, SPLIT: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
    REAL: tl.constexpr, WIDE: tl.constexpr,
):
    """A program sums BLOCK_N samples of BLOCK_C channels; axis 1 of a tile is samples x units of positions.

    partial: (tiles of samples, 2, C), the sums of g s over the tile's samples in [:, 0]; with SPLIT (parts of the
    positions, 2, N, C), the sums of s and of s (u + b).
    """
    program = tl.program_id(0)
    if WIDE:
        program = tl.cast(program, tl.int64)
    channels = channel_units * CHANNEL_UNIT
    tiles = tl.cdiv(channels, BLOCK_C)
    c = program % tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    part = program // tiles
    first = 0
    if SPLIT:
        sample_tiles = tl.cdiv(samples, BLOCK_N)
        slab = part // sample_tiles
        part = part % sample_tiles
        first = slab * steps
    in_c = c < channels
    lane = tl.arange(0, BLOCK_N * BLOCK_M)
    n = part * BLOCK_N + lane // BLOCK_M
    in_n = in_c[:, None, None] & (n < samples)[None, :, None]
    b, g, t = parameters(bias, gate, shift, c, n, channels, in_c, in_n, True, REAL)
    total = tl.zeros((BLOCK_C, BLOCK_N * BLOCK_M, LANES), REAL)
    dot = tl.zeros((BLOCK_C, BLOCK_N * BLOCK_M, LANES), REAL)
    for step in range(steps):
        m = (first + step) * BLOCK_M + lane % BLOCK_M
        if WIDE:
            m = m.to(tl.int64)
        in_tile = in_n & (m < sample_units)[None, :, None]
        d_places = offsets(c, n, m, d_sample, d_channel, d_position, D_UNIT, LANES, CHANNELS_FASTEST)
        dy = tl.load(grad + d_places, mask=in_tile, other=0.0).to(REAL)
        value = dy
        if READ_VALUES:
            v_places = offsets(c, n, m, v_sample, v_channel, v_position, V_UNIT, LANES, CHANNELS_FASTEST)
            value = tl.load(values + v_places, mask=in_tile, other=0.0).to(REAL)
        s = slope_times(dy, value, b, g, t, INPUT, ACTIVATION)
        if grad_u is not None:
            r_places = offsets(c, n, m, r_sample, r_channel, r_position, R_UNIT, LANES, CHANNELS_FASTEST)
            tl.store(grad_u + r_places, (g * s).to(grad_u.dtype.element_ty), mask=in_tile)
        if SUM:
            total += s
        if DOT:
            dot += s * (value + b)
    own_n = part * BLOCK_N + tl.arange(0, BLOCK_N)
    places = (own_n * channels)[None, :] + c[:, None]
    in_own = in_c[:, None] & (own_n < samples)[None, :]
    if SUM:
        sums = tl.sum(tl.reshape(tl.sum(total, 2), (BLOCK_C, BLOCK_N, BLOCK_M)), 2)
        if SPLIT:
            tl.store(partial + slab * 2 * samples * channels + places, sums, mask=in_own)
        else:
            store_if_wanted(grad_shift, places, sums, in_own)
        if not SPLIT and (grad_bias is not None or partial is not None):
            own_gate = tl.load(gate + places, mask=in_own, other=0.0).to(REAL)
            scaled = tl.sum(own_gate * sums, 1)
            store_if_wanted(grad_bias, c, scaled, in_c)
            store_if_wanted(partial, part * 2 * channels + c, scaled, in_c)
    if DOT:
        dots = tl.sum(tl.reshape(tl.sum(dot, 2), (BLOCK_C, BLOCK_N, BLOCK_M)), 2)
        if SPLIT:
            tl.store(partial + (slab * 2 + 1) * samples * channels + places, dots, mask=in_own)
        else:
            store_if_wanted(grad_gate, places, dots, in_own)


@triton.jit(do_not_specialize=["parts", "channels"], do_not_specialize_on_alignment=["gate"])
def finish(
    partial, gate, grad_bias, grad_gate, grad_shift, parts, channels,
    SUM: tl.constexpr, DOT: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, REAL: tl.constexpr,
):
    """Adds up partial (parts, 2, C). gate None: the sums of g s, which are db; else those of s and s (u + b)."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = c < channels
    total = tl.zeros((BLOCK_P, BLOCK_C), REAL)
    dot = tl.zeros((BLOCK_P, BLOCK_C), REAL)
    for start in range(0, parts, BLOCK_P):
        part = start + tl.arange(0, BLOCK_P)
        in_tile = (part < parts)[:, None] & in_c[None, :]
        places = (part * 2 * channels)[:, None] + c[None, :]
        if SUM:
            total += tl.load(partial + places, mask=in_tile, other=0.0)
        if DOT:
            dot += tl.load(partial + places + channels, mask=in_tile, other=0.0)
    if SUM:
        sums = tl.sum(total, 0)
        store_if_wanted(grad_shift, c, sums, in_c)
        if gate is None:
            store_if_wanted(grad_bias, c, sums, in_c)
        elif grad_bias is not None:
            store_if_wanted(grad_bias, c, tl.load(gate + c, mask=in_c, other=0.0).to(REAL) * sums, in_c)
    if DOT:
        store_if_wanted(grad_gate, c, tl.sum(dot, 0), in_c)


@triton.jit(do_not_specialize=["parts", "samples", "channels"], do_not_specialize_on_alignment=["gate"])
def finish_by_sample(
    partial, gate, grad_bias, grad_gate, grad_shift, parts, samples, channels,
    SUM: tl.constexpr, DOT: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
    REAL: tl.constexpr,
):
    """Adds up partial (parts, 2, N, C), the sums of s and of s (u + b); db is the sum of g s over the samples."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = c < channels
    scaled = tl.zeros((BLOCK_N, BLOCK_C), REAL)
    for first in range(0, samples, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        in_own = (n < samples)[:, None] & in_c[None, :]
        places = (n * channels)[:, None] + c[None, :]
        total = tl.zeros((BLOCK_P, BLOCK_N, BLOCK_C), REAL)
        dot = tl.zeros((BLOCK_P, BLOCK_N, BLOCK_C), REAL)
        for start in range(0, parts, BLOCK_P):
            part = start + tl.arange(0, BLOCK_P)
            in_tile = (part < parts)[:, None, None] & in_own[None, :, :]
            own = partial + (part * 2 * samples * channels)[:, None, None] + places[None, :, :]
            if SUM:
                total += tl.load(own, mask=in_tile, other=0.0)
            if DOT:
                dot += tl.load(own + samples * channels, mask=in_tile, other=0.0)
        if SUM:
            sums = tl.sum(total, 0)
            store_if_wanted(grad_shift, places, sums, in_own)
            if grad_bias is not None:
                scaled += tl.load(gate + places, mask=in_own, other=0.0).to(REAL) * sums
        if DOT:
            store_if_wanted(grad_gate, places, tl.sum(dot, 0), in_own)
    if SUM:
        store_if_wanted(grad_bias, c, tl.sum(scaled, 0), in_c)


def tile_elements(dtype: torch.dtype) -> int:
    return TILE // 4 if dtype == torch.float64 else TILE


def variants(architecture: str = "sm_90") -> list[Variant]:
    """Each kernel and dtype in each layout, each activation once; on any architecture."""
    found: list[Variant] = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        for channels_fastest in (False, True):
            for kernel, by_row, split in (
                (backward_shared, False, False), (backward_shared, True, False), (backward_by_sample, False, False),
                (backward_by_sample, False, True),
            ):
                if not by_row or channels_fastest:
                    code = len(found) % len(ACTIVATIONS)
                    found.append(_variant(kernel, dtype, channels_fastest, by_row, split, code))
    for real, number in (("fp32", tl.float32), ("fp64", tl.float64)):
        types = {name: f"*{real}" for name in ("partial", "gate", "grad_bias", "grad_gate", "grad_shift")}
        found.append(Variant(
            f"epilogue_backward.finish {real}", finish, {**types, "parts": "i32", "channels": "i32"},
            {"SUM": True, "DOT": True, "BLOCK_C": 16, "BLOCK_P": 128, "REAL": number},
        ))
        found.append(Variant(
            f"epilogue_backward.finish_by_sample {real}", finish_by_sample,
            {**types, "parts": "i32", "samples": "i32", "channels": "i32"},
            {"SUM": True, "DOT": True, "BLOCK_C": 8, "BLOCK_N": 32, "BLOCK_P": 8, "REAL": number},
        ))
    return found


def _variant(
    kernel: Any, dtype: torch.dtype, channels_fastest: bool, by_row: bool, split: bool, code: int
) -> Variant:
    name, real = TRITON_NAMES[dtype], accumulation_dtype(dtype)
    unit, shared = 16 // dtype.itemsize, kernel is backward_shared
    lanes = 1 if channels_fastest else unit
    types = {tensor: f"*{name}" for tensor in ("grad", "values", "bias", "grad_u", "grad_bias")}
    parameters = ("gate", "shift", "grad_gate", "grad_shift", "partial")
    types.update({tensor: f"*{TRITON_NAMES[real]}" for tensor in parameters})
    constants: dict[str, Any] = {f"{t}_{'channel' if channels_fastest else 'position'}": 1 for t in "vrd"}
    numbers = [*STRIDES, "channel_units", "sample_units", "steps"]
    numbers += ["position_units", "magic", "magic_shift"] if shared else ["samples"]
    types.update({number: "i32" for number in numbers if number not in constants})
    constants.update(
        CHANNEL_UNIT=unit if channels_fastest else 1, LANES=lanes, V_UNIT=unit, R_UNIT=unit, D_UNIT=unit,
        CHANNELS_FASTEST=channels_fastest, ACTIVATION=code, READ_VALUES=True, SUM=True, DOT=not by_row,
        BLOCK_C=128 if channels_fastest else 8, REAL=REAL[real], WIDE=False,
    )
    rows = tile_elements(dtype) // (constants["BLOCK_C"] * lanes)
    constants.update(
        {"BLOCK_J": rows, "GATE_BY_SAMPLE": by_row, "ONE_SAMPLE": channels_fastest, "VALUES": 0} if shared
        else {"BLOCK_N": 1 if split else 2, "BLOCK_M": rows // (1 if split else 2), "SPLIT": split}
    )
    label = (
        f"epilogue_backward.{kernel.__name__} {name} channels_fastest={channels_fastest} split={split} "
        f"{ACTIVATIONS[code]}"
    )
    return Variant(label, kernel, types, constants)

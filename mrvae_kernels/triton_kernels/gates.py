"""All gates of a model from one flat w and c: one launch forward, one backward.

    p_nf = w_f eta_n + c_f        g_nf = act_f(p_nf)        act_f by kind: sigmoid, sqrt, softplus or identity
    dp_nf = act_f'(p_nf) dg_nf    dw_f = sum_n eta_n dp_nf     dc_f = sum_n dp_nf     deta_n = sum_f w_f dp_nf

Of degree 2 and 3 p_nf = sum_k w_kf P_k(eta_n) + c_f, with the polynomials P of `basis` and a row of w for each.

The T features are cut in slices, one a layer. A table on the device, (3, T) int32, tells of each feature f its slice
and kind, where the slice starts, and its size: so a program does not depend on the model. With one eta a sample, slice
i is a contiguous (N, size_i) matrix, and feature f of sample n lies at n size_f + (f - start_f) in it.

Grid: forward, tiles of samples x features. Backward, a program for each block of features loops over the samples; where
deta is wanted, further programs of the same launch, for blocks of samples, loop over the features. Every sum has a
fixed order. Bytes moved: 12 T of the table, w and c, and 4 N T of gates or of their gradients, twice for deta.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .activations import KINDS, finite, gate_slope, gate_value
from .device import on_device
from .launch import TRITON_NAMES, Variant, accumulation_dtype, check_device, check_floating, pointer_table

SHARED_COLUMNS = 128  # features a program handles with one eta for all
TILE = (8, 128)  # samples x features, forward
BACKWARD_TILE = (32, 32)
BACKWARD_TILE_FLOAT64 = (16, 32)  # with 32 samples, 160 registers a thread instead of 80
SHARED_ETA_TILE = (1, 512)  # of the programs that sum deta
SHARED_ETA_TILE_FLOAT64 = (1, 256)  # with 512 features, of degree 2, registers spill on sm_100
ETA_TILE = (4, 256)
MAX_DEGREE = 3  # of a gate's argument as a polynomial of eta
BACKWARD_WARPS = 8  # with four, the sum of deta spills registers on sm_100


@triton.jit
def described(table, stride, columns, inside):
    """Of each feature: the number of its slice, its kind, its place in the slice, the slice's start and size."""
    code = tl.load(table + columns, mask=inside, other=0)
    start = tl.load(table + stride + columns, mask=inside, other=0)
    size = tl.load(table + 2 * stride + columns, mask=inside, other=0)
    return code // 4, code % 4, columns - start, start, size


@triton.jit
def basis(eta, k: tl.constexpr):
    """P_k(eta): eta, eta^2 - 1, eta^3 - 9/5 eta."""
    if k == 0:
        return eta
    if k == 1:
        return eta * eta - 1
    return (eta * eta - 1.8) * eta


@triton.jit
def basis_slope(eta, k: tl.constexpr):
    """dP_k / deta, of k = 1 and 2."""
    return 2 * eta if k == 1 else 3 * eta * eta - 1.8


@triton.jit
def columns_of(weight, bias, columns, features, DEGREE: tl.constexpr, dtype: tl.constexpr):
    """c, then w_0, w_1, ... of these features; those beyond DEGREE are not read."""
    inside = columns < features
    c = tl.load(bias + columns, mask=inside, other=0).to(dtype)
    w = tl.load(weight + columns, mask=inside, other=0).to(dtype)
    second, third = w, w
    if DEGREE > 1:
        second = tl.load(weight + features + columns, mask=inside, other=0).to(dtype)
    if DEGREE > 2:
        third = tl.load(weight + 2 * features + columns, mask=inside, other=0).to(dtype)
    return c, w, second, third


@triton.jit
def argument(c, w, second, third, eta, DEGREE: tl.constexpr):
    """p in eta's dtype, kept finite: (rows, columns)."""
    p = w[None, :] * eta[:, None] + c[None, :]
    if DEGREE > 1:
        p += second[None, :] * basis(eta, 1)[:, None]
    if DEGREE > 2:
        p += third[None, :] * basis(eta, 2)[:, None]
    return finite(p)


@triton.jit(do_not_specialize=["features", "samples"])
def gates_kernel(
    values, weight, bias, eta, table, stride, features, samples,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, SHARED: tl.constexpr, SEPARATE: tl.constexpr, WIDE: tl.constexpr,
    DEGREE: tl.constexpr,
):
    """One tile of g; values: one flat buffer, or with SEPARATE the addresses of the slices."""
    dtype: tl.constexpr = tl.float64 if weight.dtype.element_ty == tl.float64 else tl.float32
    blocks = tl.cdiv(features, COLUMNS)
    rows = tl.program_id(0) // blocks * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < features
    mask = (rows < samples)[:, None] & inside[None, :]
    layer, kind, place, start, size = described(table, stride, columns, inside)
    c, w, second, third = columns_of(weight, bias, columns, features, DEGREE, dtype)
    e = tl.load(eta + rows, mask=rows < samples, other=0).to(dtype)
    g = gate_value(argument(c, w, second, third, e, DEGREE), kind[None, :])
    if WIDE:
        rows = rows.to(tl.int64)
        start = start.to(tl.int64)
    offsets = rows[:, None] * size[None, :] + place[None, :]
    if SEPARATE:
        addresses = tl.load(values + layer, mask=inside, other=0)
        tl.store(addresses.to(tl.pointer_type(dtype))[None, :] + offsets, g, mask=mask)
    elif SHARED:
        tl.store(values + columns[None, :], g, mask=mask)
    else:
        tl.store(values + (start * samples)[None, :] + offsets, g, mask=mask)


@triton.jit
def argument_gradient(grads, c, w, second, third, eta, table, stride, rows, columns, features, samples,
                      dtype: tl.constexpr, WIDE: tl.constexpr, DEGREE: tl.constexpr):
    """dp of a tile, and the eta of its samples; zeros outside, and where nobody gave a gradient."""
    inside = columns < features
    layer, kind, place, start, size = described(table, stride, columns, inside)
    addresses = tl.load(grads + layer, mask=inside, other=0)
    mask = (rows < samples)[:, None] & (addresses != 0)[None, :]
    e = tl.load(eta + rows, mask=rows < samples, other=0).to(dtype)
    if WIDE:
        rows = rows.to(tl.int64)
    offsets = rows[:, None] * size[None, :] + place[None, :]
    grad = tl.load(addresses.to(tl.pointer_type(dtype))[None, :] + offsets, mask=mask, other=0)
    return tl.where(mask, grad * gate_slope(argument(c, w, second, third, e, DEGREE), kind[None, :]), 0.0), e


@triton.jit(do_not_specialize=["features", "samples"])
def gates_backward_kernel(
    grads, weight, bias, eta, table, grad_weight, grad_bias, grad_eta, stride, features, samples,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, ETA_ROWS: tl.constexpr, ETA_COLUMNS: tl.constexpr,
    ETA: tl.constexpr, WIDE: tl.constexpr, DEGREE: tl.constexpr,
):
    """dw and dc of one block of features, or deta of one block of samples; grads: the addresses of the slices."""
    dtype: tl.constexpr = tl.float64 if weight.dtype.element_ty == tl.float64 else tl.float32
    program = tl.program_id(0)
    blocks = tl.cdiv(features, COLUMNS)
    if program < blocks:
        columns = program * COLUMNS + tl.arange(0, COLUMNS)
        c, w, second, third = columns_of(weight, bias, columns, features, DEGREE, dtype)
        weight_sum = tl.zeros([ROWS, COLUMNS], dtype)
        second_sum, third_sum = weight_sum, weight_sum
        bias_sum = tl.zeros([ROWS, COLUMNS], dtype)
        for first in range(0, samples, ROWS):
            rows = first + tl.arange(0, ROWS)
            dp, e = argument_gradient(
                grads, c, w, second, third, eta, table, stride, rows, columns, features, samples, dtype, WIDE, DEGREE
            )
            weight_sum += dp * e[:, None]
            bias_sum += dp
            if DEGREE > 1:
                second_sum += dp * basis(e, 1)[:, None]
            if DEGREE > 2:
                third_sum += dp * basis(e, 2)[:, None]
        inside = columns < features
        tl.store(grad_weight + columns, tl.sum(weight_sum, 0), mask=inside)
        tl.store(grad_bias + columns, tl.sum(bias_sum, 0), mask=inside)
        if DEGREE > 1:
            tl.store(grad_weight + features + columns, tl.sum(second_sum, 0), mask=inside)
        if DEGREE > 2:
            tl.store(grad_weight + 2 * features + columns, tl.sum(third_sum, 0), mask=inside)
    elif ETA:
        rows = (program - blocks) * ETA_ROWS + tl.arange(0, ETA_ROWS)
        eta_sum = tl.zeros([ETA_ROWS, ETA_COLUMNS], dtype)
        for first in range(0, features, ETA_COLUMNS):
            columns = first + tl.arange(0, ETA_COLUMNS)
            c, w, second, third = columns_of(weight, bias, columns, features, DEGREE, dtype)
            dp, e = argument_gradient(
                grads, c, w, second, third, eta, table, stride, rows, columns, features, samples, dtype, WIDE, DEGREE
            )
            slope = w[None, :]
            if DEGREE > 1:
                slope = slope + second[None, :] * basis_slope(e, 1)[:, None]
            if DEGREE > 2:
                slope = slope + third[None, :] * basis_slope(e, 2)[:, None]
            eta_sum += dp * slope
        tl.store(grad_eta + rows, tl.sum(eta_sum, 1), mask=rows < samples)


@functools.cache  # never dropped: a recorded CUDA graph may go on reading the table
def feature_table(sizes: tuple[int, ...], kinds: tuple[int, ...], device: torch.device) -> tuple[Tensor, int, int]:
    """The (3, stride) table of features, its stride, a multiple of 16, and the number of features.

    Its rows: 4 slice + kind, start of the slice, size of the slice. ValueError for sizes and kinds that do not fit.
    """
    if len(kinds) != len(sizes):
        raise ValueError(f"gates: got {len(kinds)} kinds for {len(sizes)} sizes; expected one kind a size")
    for size in sizes:
        if size < 0:
            raise ValueError(f"gates: sizes has {size}; expected no negative number")
    for kind in kinds:
        if not 0 <= kind < len(KINDS):
            names = ", ".join(f"{code} ({name})" for code, name in enumerate(KINDS))
            raise ValueError(f"gates: kind is {kind}; expected one of {names}")
    features = sum(sizes)
    stride = triton.cdiv(features, 16) * 16
    lengths = torch.tensor(sizes, dtype=torch.int32)
    codes = 4 * torch.arange(len(sizes), dtype=torch.int32) + torch.tensor(kinds, dtype=torch.int32)
    table = torch.zeros(3, stride, dtype=torch.int32)
    for row, values in enumerate((codes, lengths.cumsum(0) - lengths, lengths)):
        table[row, :features] = values.to(torch.int32).repeat_interleave(lengths)
    return table.to(device), stride, features


def checked(
    weight: Tensor, bias: Tensor, eta: Tensor, sizes: tuple[int, ...], kinds: tuple[int, ...]
) -> tuple[Tensor, int, int]:
    """The table of features, once the arguments are known to fit it; raises as `gates` does."""
    check_floating("gates", weight=weight, bias=bias, eta=eta)
    check_device("gates", weight, bias, eta)
    table, stride, features = feature_table(sizes, kinds, weight.device)
    allowed = [(features,), *((degree, features) for degree in range(1, MAX_DEGREE + 1))]
    if tuple(weight.shape) not in allowed or bias.shape != (features,):
        raise ValueError(
            f"gates: weight and bias have shapes {tuple(weight.shape)} and {tuple(bias.shape)}; expected ({features},) "
            f"each, the sum of sizes, or (degree, {features}) for the weight of gates of degree 1, 2 or 3"
        )
    if eta.dim() > 1:
        raise ValueError(f"gates: eta has shape {tuple(eta.shape)}; expected one number (0-d), or one a sample (N,)")
    return table, stride, features


def degree_of(weight: Tensor) -> int:
    """Of the gates' argument as a polynomial of eta: the rows of weight."""
    return 1 if weight.dim() == 1 else len(weight)


def gates(
    weight: Tensor, bias: Tensor, eta: Tensor, sizes: Sequence[int], kinds: Sequence[int], separate: bool = False
) -> list[Tensor]:
    """g_i = act_i(w_i eta + c_i) for slices i of one flat w and c: (size_i,), or (N, size_i) for an eta of shape (N,).

    weight, bias: (sum of sizes,), or weight (degree, sum of sizes), eta: () or (N,), any floating dtypes and strides;
    eta is read on the device.
    kinds: indices of activations.KINDS. Results are contiguous, float32, or float64 for a float64 weight. They share
    storage, as views of one buffer, unless `separate`: it allocates each by itself, and launches on their addresses.
    ValueError for shapes that do not fit, TypeError for dtypes, RuntimeError for devices.
    """
    sizes, kinds = tuple(sizes), tuple(kinds)
    table, stride, features = checked(weight, bias, eta, sizes, kinds)
    shared, samples = eta.dim() == 0, eta.numel()
    dtype, device = accumulation_dtype(weight.dtype), weight.device
    if separate:
        results = [torch.empty((size,) if shared else (samples, size), dtype=dtype, device=device) for size in sizes]
        target = pointer_table(results, weight)
    else:
        target = torch.empty(samples * features, dtype=dtype, device=device)
        parts = target.split([samples * size for size in sizes])
        results = list(parts) if shared else [part.view(samples, size) for part, size in zip(parts, sizes, strict=True)]
    if samples * features > 0:
        rows, columns = (1, SHARED_COLUMNS) if shared else TILE
        grid = (triton.cdiv(samples, rows) * triton.cdiv(features, columns),)
        with on_device(weight):
            gates_kernel[grid](
                target, weight.contiguous(), bias.contiguous(), eta.contiguous(), table, stride, features, samples,
                ROWS=rows, COLUMNS=columns, SHARED=shared, SEPARATE=separate,
                WIDE=(samples + rows) * features > launch.INT32_LIMIT, DEGREE=degree_of(weight), num_warps=4,
            )
    return results


def backward_tiles(shared: bool, sums: torch.dtype) -> tuple[int, int, int, int]:
    """Samples and features of a program, then those of a program that sums deta."""
    if shared:
        return 1, SHARED_COLUMNS, *(SHARED_ETA_TILE_FLOAT64 if sums == torch.float64 else SHARED_ETA_TILE)
    return *(BACKWARD_TILE_FLOAT64 if sums == torch.float64 else BACKWARD_TILE), *ETA_TILE


def gates_backward(
    grads: Sequence[Tensor | None], weight: Tensor, bias: Tensor, eta: Tensor, sizes: Sequence[int],
    kinds: Sequence[int], eta_needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dw, dc, deta) from the gradients of `gates`, None for zero; deta is empty, (0,), unless asked for.

    grads[i]: the shape of gate i, any strides. Gradients have the dtypes of weight, bias and eta. Errors as in `gates`.
    """
    sizes, kinds = tuple(sizes), tuple(kinds)
    table, stride, features = checked(weight, bias, eta, sizes, kinds)
    if len(grads) != len(sizes):
        raise ValueError(f"gates_backward: got {len(grads)} gradients for {len(sizes)} gates")
    dtype, shared, samples = accumulation_dtype(weight.dtype), eta.dim() == 0, eta.numel()
    dense: list[Tensor | None] = []
    for i, (grad, size) in enumerate(zip(grads, sizes, strict=True)):
        if grad is not None and grad.numel() != samples * size:
            raise ValueError(f"gates_backward: gradient {i} has shape {tuple(grad.shape)}; expected that of the gate")
        if grad is not None and not (grad.dtype == dtype and grad.is_contiguous()):
            grad = grad.to(dtype).contiguous()
        dense.append(grad)
    check_device("gates_backward", weight, *dense)
    grad_weight, grad_bias = weight.new_empty(weight.shape), torch.empty_like(bias)  # rows one after another
    grad_eta = torch.empty(eta.shape if eta_needs_grad else (0,), dtype=eta.dtype, device=eta.device)
    rows, columns, eta_rows, eta_columns = backward_tiles(shared, dtype)
    programs = triton.cdiv(features, columns) + (triton.cdiv(samples, eta_rows) if eta_needs_grad else 0)
    if programs > 0:
        with on_device(weight):
            gates_backward_kernel[(programs,)](
                pointer_table(dense, weight), weight.contiguous(), bias.contiguous(), eta.contiguous(), table,
                grad_weight, grad_bias, grad_eta, stride, features, samples,
                ROWS=rows, COLUMNS=columns, ETA_ROWS=eta_rows, ETA_COLUMNS=eta_columns, ETA=eta_needs_grad,
                WIDE=(samples + rows) * features > launch.INT32_LIMIT, DEGREE=degree_of(weight),
                num_warps=BACKWARD_WARPS,
            )
    return grad_weight, grad_bias, grad_eta


def variants(architecture: str = "sm_90") -> list[Variant]:
    """Both kernels with each way of storing, dtype of weights and degree; `architecture` changes nothing."""
    result = []
    integers = {"stride": "i32", "features": "i32", "samples": "i32"}
    divisible = ("stride",)
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    for dtype, degree in itertools.product(dtypes, range(1, MAX_DEGREE + 1)):
        suffix = "" if degree == 1 else f" degree={degree}"
        name, sums = TRITON_NAMES[dtype], TRITON_NAMES[accumulation_dtype(dtype)]
        inputs = {"weight": f"*{name}", "bias": f"*{name}", "eta": f"*{sums}", "table": "*i32"}
        for shared in (True, False):
            rows, columns = (1, SHARED_COLUMNS) if shared else TILE
            for separate in (True, False):
                types = {"values": "*i64" if separate else f"*{sums}", **inputs, **integers}
                constants = {
                    "ROWS": rows, "COLUMNS": columns, "SHARED": shared, "SEPARATE": separate, "WIDE": False,
                    "DEGREE": degree,
                }
                label = f"gates {name} shared={shared} separate={separate}{suffix}"
                result.append(Variant(label, gates_kernel, types, constants, divisible=divisible))
            rows, columns, eta_rows, eta_columns = backward_tiles(shared, accumulation_dtype(dtype))
            outputs = {"grad_weight": f"*{name}", "grad_bias": f"*{name}", "grad_eta": f"*{sums}"}
            for eta in (True, False):
                constants = {
                    "ROWS": rows, "COLUMNS": columns, "ETA_ROWS": eta_rows, "ETA_COLUMNS": eta_columns, "ETA": eta,
                    "WIDE": dtype == torch.float16, "DEGREE": degree,
                }
                types = {"grads": "*i64", **inputs, **outputs, **integers}
                label = f"gates_backward {name} shared={shared} eta={eta}{suffix}"
                result.append(Variant(
                    label, gates_backward_kernel, types, constants, BACKWARD_WARPS, divisible=divisible
                ))
    return result

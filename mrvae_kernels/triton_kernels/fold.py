"""The gates of all layers multiplied into their weights: one launch forward, one backward.

    W' = g W                       b' = g b + t
    dW = g dW'                     db = g db'        dt = db'        dg = <dW', W> + db' b, summed per channel

A launch handles all layers whose weights and biases have the same dtypes. What differs between layers it reads from
tables on the device: addresses, the layers' geometry, and which part of which layer a program handles (fold_plan.py).

Forward: a weight is one run of elements, cut in tiles; a program divides an element's place by the lengths of the axes
to find its channel. Backward: a program owns a block of channels, in tiles that suit the layer's geometry, and sums
over all of their elements in a fixed order. Elements moved for each of W: 2 forward; 3 backward, or 2 and those of a
partial sum's splits. The kernels are in fold_kernels.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from . import launch
from .device import architecture, on_device, register_limit
from .fold_kernels import fold_backward_kernel, fold_kernel
from .fold_layers import Layer, aligned, checked_layer, checked_layers, incoming, launches, operand, restored
from .fold_plan import FORWARD_TILE, backward_plan, forward_plan
from .launch import TRITON_NAMES, Variant, accumulation_dtype, check_device, pointer_table

TRITON_DTYPES = {
    torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32, torch.float64: tl.float64,
}

BACKWARD_WARPS = 8
"""A thread of four warps would want 154 to 247 registers for its 8 elements; with 4, 128 are enough."""


def fold(
    weights: Sequence[Tensor], biases: Sequence[Tensor | None], gates: Sequence[Tensor],
    shifts: Sequence[Tensor | None], groups: Sequence[int],
) -> tuple[list[Tensor], list[Tensor]]:
    """(W', b') for every layer, in one launch for each pair of dtypes of weight and bias.

    groups: 0 where the output channel is axis 0 of the weight; the number of groups for a transposed convolution's
    (C_in, C_out / groups, k...). gates, biases, shifts: (C_out,), of any floating dtype. W' has the dtype of W and the
    strides of torch.empty_like(W); b' has W's dtype and is empty, (0,), for a layer with neither bias nor shift.
    ValueError for shapes that do not fit, TypeError for dtypes, RuntimeError for devices.
    """
    layers = checked_layers(weights, biases, gates, shifts, groups)
    folded = [torch.empty_like(layer.weight) for layer in layers]
    with_bias = [layer.bias is not None or layer.shift is not None for layer in layers]
    folded_biases = [
        layer.weight.new_empty((layer.shape.channels if present else 0,))
        for layer, present in zip(layers, with_bias, strict=True)
    ]
    for (dtype, bias_dtype), batch in launches(layers).items():
        like = layers[batch[0]].weight
        plan = forward_plan(
            tuple(layers[i].shape for i in batch), tuple(with_bias[i] for i in batch), like.device
        )
        if plan.grid == 0:
            continue
        addresses: list[Tensor | None] = []
        for i in batch:
            layer = layers[i]
            bias = folded_biases[i] if with_bias[i] else None
            addresses += (layer.weight, layer.bias, layer.gate, layer.shift, folded[i], bias)
        with on_device(like):
            fold_kernel[(plan.grid,)](
                pointer_table(addresses, like), plan.layers, plan.programs,
                WEIGHT=TRITON_DTYPES[dtype], BIAS=TRITON_DTYPES[bias_dtype], TILE=FORWARD_TILE,
                ALIGNED=aligned([tensor for i in batch for tensor in (layers[i].weight, folded[i])]),
                WIDE=launch.wide(folded[batch[plan.largest]], slack=FORWARD_TILE), num_warps=4,
            )
    return [restored(*pair) for pair in zip(folded, weights, strict=True)], folded_biases


class Request(NamedTuple):
    """What a layer's backward pass reads beyond the layer, and writes; None for zeros, and for what nobody wants."""

    grad_weight: Tensor | None
    grad_bias: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    gate: Tensor | None
    shift: Tensor | None


def backward(layers: Sequence[Layer], requests: Sequence[Request], splits: int = 0) -> None:
    """Fills what the requests hold. splits > 0: grad_weight of the only layer is (splits, *shape)."""
    for (dtype, bias_dtype), batch in launches(layers).items():
        like = layers[batch[0]].weight
        plan = backward_plan(tuple(layers[i].shape for i in batch), like.device)
        if plan.grid == 0:
            continue
        addresses: list[Tensor | None] = []
        wide_accesses: list[Tensor | None] = []
        for i in batch:
            layer, request = layers[i], requests[i]
            addresses += (*request[:2], layer.weight, layer.bias, layer.gate, *request[2:])
            wide_accesses += (request.grad_weight, layer.weight, request.weight)
        largest = layers[batch[plan.largest]].weight
        with on_device(like):
            fold_backward_kernel[(plan.grid,)](
                pointer_table(addresses, like), plan.programs, splits, largest.numel(),
                WEIGHT=TRITON_DTYPES[dtype], BIAS=TRITON_DTYPES[bias_dtype],
                GRAD=TRITON_DTYPES[accumulation_dtype(dtype) if splits > 0 else dtype], SPLIT=splits > 1,
                ALIGNED=aligned(wide_accesses), WIDE=launch.wide(largest), num_warps=BACKWARD_WARPS,
                **register_limit(architecture(like.device), BACKWARD_WARPS),
            )


def fold_backward(
    grad_weights: Sequence[Tensor | None], grad_biases: Sequence[Tensor | None], weights: Sequence[Tensor],
    biases: Sequence[Tensor | None], gates: Sequence[Tensor], shifts: Sequence[Tensor | None], groups: Sequence[int],
    mask: Sequence[bool],
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """(dW, db, dg, dt) of every layer from the gradients of W' and b', None for zeros, of any strides.

    mask: four flags a layer, which of its gradients to compute; the others, and those of what a layer lacks, are
    empty, (0,). Gradients have the dtypes of weight, bias, gate and shift, and dW the strides of torch.empty_like(W).
    Errors as in `fold`.
    """
    layers = checked_layers(weights, biases, gates, shifts, groups)
    count = len(layers)
    if len(grad_weights) != count or len(grad_biases) != count or len(mask) != 4 * count:
        raise ValueError(
            f"fold_backward: got {len(grad_weights)} and {len(grad_biases)} gradients and {len(mask)} flags for "
            f"{count} layers; expected one, one and four a layer"
        )
    check_device("fold_backward", *weights, *grad_weights, *grad_biases)
    requests = []
    for i, (layer, grad, grad_bias) in enumerate(zip(layers, grad_weights, grad_biases, strict=True)):
        weight, bias, gate, shift, _ = layer
        assert gate is not None
        if grad is not None and grad.shape != weight.shape:
            raise ValueError(
                f"fold_backward: layer {i} has a gradient of shape {tuple(grad.shape)}; expected "
                f"{tuple(weight.shape)}, that of its weight"
            )
        if grad_bias is not None and grad_bias.numel() > 0 and grad_bias.shape != gate.shape:
            raise ValueError(
                f"fold_backward: layer {i} has a gradient of b' of shape {tuple(grad_bias.shape)}; expected "
                f"{tuple(gate.shape)}"
            )
        want_weight, want_bias, want_gate, want_shift = mask[4 * i : 4 * i + 4]
        requests.append(Request(
            incoming(grad, weight) if want_weight or want_gate else None,
            operand(grad_bias, weight.dtype) if grad_bias is not None and grad_bias.numel() > 0 else None,
            torch.empty_like(weight) if want_weight else None,
            torch.empty_like(bias) if want_bias and bias is not None else None,
            torch.empty_like(gate) if want_gate else None,
            torch.empty_like(gate) if want_shift and shift is not None else None,
        ))
    backward(layers, requests)
    return (
        [weight.new_empty(0) if grad is None else restored(grad, weight)
         for weight, (_, _, grad, *_) in zip(weights, requests, strict=True)],
        [weight.new_empty(0) if request.bias is None else request.bias
         for weight, request in zip(weights, requests, strict=True)],
        [gate.new_empty(0) if request.gate is None else request.gate.to(gate.dtype)
         for gate, request in zip(gates, requests, strict=True)],
        [gate.new_empty(0) if request.shift is None or shift is None else request.shift.to(shift.dtype)
         for gate, shift, request in zip(gates, shifts, requests, strict=True)],
    )


def finish_weight_gradient(
    partial: Tensor, sums: Tensor | None, weight: Tensor, bias: Tensor | None, gate: Tensor | None, groups: int,
    mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dW, db, dg, dt) from the partial sums of dW', where W' = g W and b' = g b + t: one launch.

    partial: (splits, *weight.shape), contiguous, float32 (float64 for a float64 weight): dW' = the sum over splits, in
    their order. Memory order is that of the contiguous weight, whatever the strides of `weight` itself.
    sums: (C,), the dtype of `partial`: db' = dt, the sum of dy over everything but the channel; None counts as zeros.
    weight, bias, gate: as in `fold`; gate None stands for gates of 1, and has no gradient. groups: as in `fold`.
    mask: which of dW, db, dg, dt to compute; the others are empty, (0,).

    dW = g dW', contiguous, in the weight's dtype; db = g db', in the bias's dtype; dg = <dW', W> + db' b per channel
    and dt = db', in the gate's dtype (that of `partial` without a gate). Errors as in `fold`.
    """
    want_weight, want_bias, want_gate, want_shift = mask
    check_device("finish_weight_gradient", partial, sums, weight, bias, gate)
    dtype = accumulation_dtype(weight.dtype)
    layer = checked_layer(0, weight.contiguous(), bias, gate, None, groups)
    channels = layer.shape.channels
    if partial.dim() == 0 or partial.shape[1:] != weight.shape or partial.dtype != dtype or not partial.is_contiguous():
        raise ValueError(
            f"finish_weight_gradient: partial is {partial.dtype} of shape {tuple(partial.shape)}, strides "
            f"{partial.stride()}; expected contiguous {dtype} of shape (splits, *{tuple(weight.shape)})"
        )
    if sums is not None and (sums.shape != (channels,) or sums.dtype != dtype):
        raise ValueError(
            f"finish_weight_gradient: sums is {sums.dtype} of shape {tuple(sums.shape)}; expected {dtype} of shape "
            f"({channels},)"
        )
    if gate is None and want_gate:
        raise ValueError("finish_weight_gradient: the gradient of the gate is asked for; expected a gate")
    request = Request(
        partial if partial.shape[0] > 0 and (want_weight or want_gate) else None, operand(sums, dtype),
        torch.empty_like(layer.weight) if want_weight else None,
        torch.empty_like(layer.bias) if want_bias and layer.bias is not None else None,
        partial.new_empty(channels) if want_gate else None,
        partial.new_empty(channels) if want_shift else None,
    )
    backward([layer], [request], splits=max(1, partial.shape[0]))
    like = partial if gate is None else gate
    return (
        weight.new_empty(0) if request.weight is None else request.weight,
        weight.new_empty(0) if request.bias is None else request.bias,
        like.new_empty(0) if request.gate is None else request.gate.to(like.dtype),
        like.new_empty(0) if request.shift is None else request.shift.to(like.dtype),
    )


def variants(architecture: str = "sm_90") -> list[Variant]:
    """Both kernels for each dtype of weights, unaligned weights, and float32 biases beside half precision."""
    limit = register_limit(architecture, BACKWARD_WARPS)
    result = []
    integers = {"splits": "i32", "split_stride": "i32"}
    for dtype, bias, aligned_, wide in (
        (torch.float32, torch.float32, True, False), (torch.float32, torch.float32, False, True),
        (torch.bfloat16, torch.bfloat16, True, False), (torch.bfloat16, torch.float32, True, False),
        (torch.float16, torch.float16, True, False), (torch.float64, torch.float64, True, False),
    ):
        name = f"{TRITON_NAMES[dtype]} bias={TRITON_NAMES[bias]} aligned={aligned_} wide={wide}"
        shared = {"WEIGHT": TRITON_DTYPES[dtype], "BIAS": TRITON_DTYPES[bias], "ALIGNED": aligned_, "WIDE": wide}
        tables = {"addresses": "*i64", "layers": "*i64", "programs": "*i32"}
        result.append(Variant(f"fold {name}", fold_kernel, tables, {**shared, "TILE": FORWARD_TILE}))
        tables = {"addresses": "*i64", "programs": "*i32", **integers}
        for split in (False, True):
            grad = accumulation_dtype(dtype) if split else dtype
            constants = {**shared, "GRAD": TRITON_DTYPES[grad], "SPLIT": split}
            result.append(Variant(
                f"fold_backward {name} split={split}", fold_backward_kernel, tables, constants, BACKWARD_WARPS,
                limit=limit,
            ))
    return result

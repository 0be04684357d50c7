"""The operands of fold.py: checked, made dense, and sorted by dtypes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .fold_plan import Geometry, geometry
from .launch import FLOATING, accumulation_dtype, check_device


class Layer(NamedTuple):
    """One layer's operands as kernels take them: the weight dense, the rest contiguous, gate and shift for sums."""

    weight: Tensor
    bias: Tensor | None
    gate: Tensor | None
    shift: Tensor | None
    shape: Geometry


def dense(weight: Tensor, groups: int) -> tuple[Tensor, Geometry]:
    """The weight with the strides of torch.empty_like(weight), or contiguous where those have no geometry."""
    found = geometry(weight.shape, weight.stride(), groups)
    for memory_format in (torch.preserve_format, torch.contiguous_format):
        if found is not None:
            break
        weight = torch.empty_like(weight, memory_format=memory_format).copy_(weight)
        found = geometry(weight.shape, weight.stride(), groups)
    assert found is not None, "contiguous weights have a geometry"
    return weight, found


def operand(tensor: Tensor | None, dtype: torch.dtype | None = None) -> Tensor | None:
    """The tensor, contiguous and of the dtype; torch's own calls cost more than asking whether they are needed."""
    if tensor is None or (tensor.is_contiguous() and (dtype is None or tensor.dtype == dtype)):
        return tensor
    return tensor.to(dtype).contiguous() if dtype is not None else tensor.contiguous()


def checked_layer(
    index: int, weight: Tensor, bias: Tensor | None, gate: Tensor | None, shift: Tensor | None, groups: int
) -> Layer:
    """ValueError for shapes, TypeError for dtypes, with the layer's number."""
    try:
        weight, shape = dense(weight, groups)
    except ValueError as error:
        raise ValueError(f"fold: layer {index} {error}") from None
    expected = (shape.channels,)
    for name, tensor in (("weight", weight), ("gate", gate), ("bias", bias), ("shift", shift)):
        if tensor is None:
            continue
        if tensor.dtype not in FLOATING:
            raise TypeError(
                f"fold: layer {index} has a {name} of dtype {tensor.dtype}; expected float32, float64, bfloat16 or "
                "float16"
            )
        if tensor is not weight and tensor.shape != expected:
            advice = ". One beta a sample cannot be folded: use the epilogue" if tensor.dim() == 2 else ""
            raise ValueError(
                f"fold: layer {index} has a {name} of shape {tuple(tensor.shape)}; expected ({shape.channels},), its "
                f"output channels{advice}"
            )
    sums = accumulation_dtype(weight.dtype)
    return Layer(weight, operand(bias), operand(gate, sums), operand(shift, sums), shape)


def checked_layers(
    weights: Sequence[Tensor], biases: Sequence[Tensor | None], gates: Sequence[Tensor],
    shifts: Sequence[Tensor | None], groups: Sequence[int],
) -> list[Layer]:
    """ValueError for lists of different lengths; the rest as `checked_layer` and launch.check_device."""
    lengths = {len(values) for values in (weights, biases, gates, shifts, groups)}
    if len(lengths) > 1:
        raise ValueError(
            f"fold: got {len(weights)} weights, {len(biases)} biases, {len(gates)} gates, {len(shifts)} shifts and "
            f"{len(groups)} groups; expected as many of each"
        )
    check_device("fold", *weights, *biases, *gates, *shifts)
    return list(map(checked_layer, range(len(weights)), weights, biases, gates, shifts, groups))


def launches(layers: Sequence[Layer]) -> dict[tuple[torch.dtype, torch.dtype], list[int]]:
    """Numbers of the layers by the dtypes of weight and bias; a layer without a bias goes with any other."""
    result: dict[tuple[torch.dtype, torch.dtype], list[int]] = {}
    rest = []
    for i, layer in enumerate(layers):
        if layer.bias is None:
            rest.append(i)
        else:
            result.setdefault((layer.weight.dtype, layer.bias.dtype), []).append(i)
    for i in rest:
        dtype = layers[i].weight.dtype
        key = next((key for key in result if key[0] == dtype), (dtype, dtype))
        result.setdefault(key, []).append(i)
    return result


def aligned(tensors: Sequence[Tensor | None]) -> bool:
    """True where all of them start at a multiple of 16 bytes."""
    bits = 0
    for tensor in tensors:
        if tensor is not None:
            bits |= tensor.data_ptr()
    return bits % 16 == 0


def restored(result: Tensor, weight: Tensor) -> Tensor:
    """The result, computed in the layout of `dense`, with the strides of torch.empty_like(weight)."""
    if result.stride() == weight.stride():
        return result
    like = torch.empty_like(weight)
    return result if result.stride() == like.stride() else like.copy_(result)


def incoming(grad: Tensor | None, weight: Tensor) -> Tensor | None:
    """dW' with the dtype and strides of the dense weight; itself where it has them."""
    if grad is None or (grad.dtype == weight.dtype and grad.stride() == weight.stride()):
        return grad
    lengths = zip(weight.shape, grad.stride(), weight.stride(), strict=True)
    if grad.dtype == weight.dtype and all(size <= 1 or a == b for size, a, b in lengths):
        return grad
    return torch.empty_like(weight).copy_(grad)

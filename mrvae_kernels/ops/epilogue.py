"""torch.ops.mrvae.epilogue: bias, gate, shift and activation of a product's result, in one pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._load import fake, require


def epilogue(
    u: Tensor, bias: Tensor | None, gate: Tensor, shift: Tensor | None, dim: int, activation: str
) -> Tensor:
    """y = activation(g (u + b) + t) along channel axis `dim` of u.

    bias (C,); gate and shift (C,), or (N, C) with the samples in axis 0 of u and the channels elsewhere. activation:
    none, relu, silu, gelu, tanh, leaky_relu or elu. y has u's dtype and, where u is dense, its strides; arithmetic in
    float32 (float64 for float64). The backward pass keeps u and gives du, db, dg and dt in one pass, the same bits each
    time. ValueError for shapes that do not fit.
    """
    require()
    return torch.ops.mrvae.epilogue.default(u, bias, gate, shift, dim, activation)


@fake("epilogue")
def fake_epilogue(
    u: Tensor, bias: Tensor | None, gate: Tensor, shift: Tensor | None, dim: int, activation: str
) -> Tensor:
    if gate.dim() not in (1, 2) or (shift is not None and shift.dim() != gate.dim()):
        raise ValueError(f"epilogue: gate has shape {tuple(gate.shape)}; expected (C,) or (N, C), and shift the same")
    for value in (bias, gate, shift):
        if value is not None:
            torch._check(value.shape[-1] == u.shape[dim])
    if gate.dim() == 2:
        torch._check(gate.shape[0] == u.shape[0])
    return torch.empty_like(u)


@fake("epilogue_backward")
def fake_epilogue_backward(
    grad: Tensor, u: Tensor, bias: Tensor | None, gate: Tensor, shift: Tensor | None, dim: int, activation: str,
    mask: Sequence[bool],
) -> tuple[Tensor, ...]:
    # what nobody asked for is empty: (0,) in the dtype of u (its bias) or of the gate (its shift)
    values, defaults = (u, bias, gate, shift), (u, u if bias is None else bias, gate, gate)
    return tuple(
        torch.empty_like(value) if wanted and value is not None else default.new_empty((0,))
        for value, default, wanted in zip(values, defaults, mask, strict=True)
    )

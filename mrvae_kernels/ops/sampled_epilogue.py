"""torch.ops.mrvae.sampled_epilogue: the epilogue of u (N, C) with one beta a sample, whose gates are made on the way.

    y = activation(g (u + b) + t),  g = act(w eta + c), t = w' eta + c', each (N, C) and kept nowhere

For graphs of torch.compile on the CPU (`traced`); it has no derivative of its own but sampled_epilogue_backward.
weight (S,) or (degree, S), gate_bias (S,): all of a network's, of which the gates begin at `gate` and the shifts at
`shift`, -1 for none; eta (N,). kind: 0 sigmoid, 1 sqrt, 2 softplus. u is float32, float64 or bfloat16; TypeError for
others, and ValueError for shapes that do not fit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._load import accumulation_dtype, fake


@fake("sampled_epilogue")
def fake_sampled_epilogue(
    u: Tensor, bias: Tensor | None, weight: Tensor, gate_bias: Tensor, eta: Tensor, gate: int, shift: int, kind: int,
    activation: str,
) -> Tensor:
    torch._check(u.dim() == 2, lambda: f"sampled_epilogue: u has shape {tuple(u.shape)}; expected (N, C)")
    torch._check(eta.dim() == 1 and eta.shape[0] == u.shape[0], lambda: "sampled_epilogue: expected an eta a row of u")
    return u.new_empty(u.shape)


@fake("sampled_epilogue_backward")
def fake_sampled_epilogue_backward(
    grad: Tensor, u: Tensor, bias: Tensor | None, weight: Tensor, gate_bias: Tensor, eta: Tensor, gate: int, shift: int,
    kind: int, activation: str, of_result: bool, mask: Sequence[bool],
) -> tuple[Tensor, ...]:
    channels, degree = u.shape[1], 1 if weight.dim() == 1 else weight.shape[0]
    like = u if bias is None else bias
    sums = eta.new_empty((degree + 1, channels), dtype=accumulation_dtype(u.dtype))
    return (
        u.new_empty(u.shape if mask[0] else (0,)),
        like.new_empty((channels,) if mask[1] and bias is not None else (0,)),
        sums if mask[2] else sums.new_empty((0,)),
        torch.empty_like(sums) if mask[3] and shift >= 0 else sums.new_empty((0,)),
    )

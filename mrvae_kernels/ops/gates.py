"""torch.ops.mrvae.gates: all gates of a model in one operator."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._load import accumulation_dtype, fake, require


def gates(weight: Tensor, bias: Tensor, eta: Tensor, sizes: Sequence[int], kinds: Sequence[int]) -> list[Tensor]:
    """g_i = act_i(w_i eta + c_i) for slices i of one flat w and c (MR-VAE, Eqn. 6 and 7).

    weight, bias: (sum of sizes,), any floating dtype; weight may be (degree, sum of sizes): `reference.gate_argument`.
    eta: 0-d, giving (size_i,), or (N,), giving (N, size_i).
    kinds: 0 sigmoid, 1 sqrt, 2 softplus, 3 identity. Results are float32, float64 for a float64 weight.
    The backward pass recomputes the gates from w, c and eta: nothing else is kept. ValueError for shapes that do not
    fit.
    """
    require()
    return torch.ops.mrvae.gates.default(weight, bias, eta, sizes, kinds)


@fake("gates")
def fake_gates(weight: Tensor, bias: Tensor, eta: Tensor, sizes: Sequence[int], kinds: Sequence[int]) -> list[Tensor]:
    if weight.dim() not in (1, 2) or bias.dim() != 1 or eta.dim() > 1 or len(sizes) != len(kinds):
        raise ValueError(
            f"gates: weight, bias and eta have shapes {tuple(weight.shape)}, {tuple(bias.shape)}, {tuple(eta.shape)} "
            f"with {len(sizes)} sizes and {len(kinds)} kinds; expected (sum of sizes,) twice, or (degree, sum of "
            "sizes) for the weight, () or (N,), a kind a size"
        )
    torch._check(weight.shape[-1] == sum(sizes))
    torch._check(weight.dim() == 1 or 1 <= weight.shape[0] <= 3, lambda: "gates: expected degree 1, 2 or 3")
    torch._check(bias.shape[0] == sum(sizes))
    dtype = accumulation_dtype(weight.dtype)
    return [weight.new_empty((*eta.shape, size), dtype=dtype) for size in sizes]


@fake("gates_backward")
def fake_gates_backward(
    grads: Sequence[Tensor | None], weight: Tensor, bias: Tensor, eta: Tensor, sizes: Sequence[int],
    kinds: Sequence[int], eta_needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_eta = eta.new_empty(eta.shape if eta_needs_grad else (0,))
    return weight.new_empty(weight.shape), bias.new_empty(bias.shape), grad_eta

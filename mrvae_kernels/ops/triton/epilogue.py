"""torch.ops.mrvae_triton.epilogue: bias, gate, shift and activation on a library product's result, in one launch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...triton_kernels import epilogue as kernels
from ..epilogue import fake_epilogue
from ..fused_shapes import fake_contiguous
from ..once import once_differentiable
from .define import LIBRARY, define, recording, traced, unwanted


def _fresh(u: Tensor, bias: Tensor | None, gate: Tensor, shift: Tensor | None, dim: int, activation: str) -> Tensor:
    return kernels.epilogue(u, bias, gate, shift, dim, activation)


def _fake_backward(
    grad: Tensor, u: Tensor, bias: Tensor | None, gate: Tensor, shift: Tensor | None, dim: int, activation: str,
    mask: Sequence[bool],
) -> tuple[Tensor, ...]:
    pairs = zip((bias, gate, shift), (u, gate, gate), mask[1:], strict=True)
    du = torch.empty_like(u) if mask[0] else u.new_empty((0,))
    return (du, *(fake_contiguous(value if wanted else None, default) for value, default, wanted in pairs))


EPILOGUE = define(
    "epilogue(Tensor u, Tensor? bias, Tensor gate, Tensor? shift, int dim, str activation) -> Tensor", _fresh,
    fake_epilogue,
)
EPILOGUE_BACKWARD = define(
    "epilogue_backward(Tensor grad, Tensor u, Tensor? bias, Tensor gate, Tensor? shift, int dim, str activation, "
    "bool[4] mask) -> (Tensor, Tensor, Tensor, Tensor)", kernels.epilogue_backward, _fake_backward,
)


def epilogue(
    u: Tensor, bias: Tensor | None, gate: Tensor, shift: Tensor | None, dim: int, activation: str,
    u_is_free: bool = False,
) -> Tensor:
    """y = act(g (u + b) + t); as mrvae_kernels.ops.epilogue.

    u_is_free: nobody reads u afterwards, so that y may take its memory where autograd does not need it.
    """
    if traced():
        return EPILOGUE(u, bias, gate, shift, dim, activation)
    if recording(u, bias, gate, shift):
        return _Epilogue.apply(u, bias, gate, shift, dim, activation)
    return kernels.epilogue(u, bias, gate, shift, dim, activation, in_place=u_is_free)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    u, bias, gate, shift, ctx.dim, ctx.activation = inputs
    # without gate gradient and activation u has no influence, and is not kept
    needed = gate.requires_grad or ctx.activation != "none"
    ctx.save_for_backward(u if needed else None, bias, gate, shift)


def _backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
    mask = list(ctx.needs_input_grad[:4])
    run = EPILOGUE_BACKWARD if traced() else kernels.epilogue_backward
    u, bias, gate, shift = ctx.saved_tensors
    results = run(grads[0], grads[0] if u is None else u, bias, gate, shift, ctx.dim, ctx.activation, mask)
    return (*map(unwanted, results, mask), None, None)


class _Epilogue(torch.autograd.Function):
    forward = staticmethod(_fresh)
    setup_context = staticmethod(_setup)
    backward = staticmethod(once_differentiable(_backward))


torch.library.register_autograd(
    "mrvae_triton::epilogue", once_differentiable(_backward), setup_context=_setup, lib=LIBRARY
)

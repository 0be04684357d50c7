"""Defining the operators of torch.ops.mrvae_triton, and deciding when to go past them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

ONCE = (
    b"this operator of mrvae_kernels is differentiable once: its gradient has no derivative. For second derivatives "
    b"compute the layer with mrvae_kernels.reference"
)
LIBRARY = torch.library.Library("mrvae_triton", "DEF")


def define(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any], tables: bool = False) -> Any:
    """The operator mrvae_triton::<name of the schema>, on whatever device the kernel takes; returns its overload.

    tables: its kernel keeps tables of pointers from one call to the next. torch.compile's own CUDA graphs ("reduce-
    overhead") run a step in their memory pool before they record it, and refuse memory that stays: they leave such an
    operator out of the graph. A torch.cuda.graph of the user's takes it.
    """
    name = schema.partition("(")[0]
    tags = (torch.Tag.pt2_compliant_tag, *((torch.Tag.cudagraph_unsafe,) if tables else ()))
    LIBRARY.define(schema, tags=tags)
    LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"mrvae_triton::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.mrvae_triton, name).default


def traced() -> bool:
    """True where the operators have to be seen: torch.compile, torch.export, fake tensors, any dispatch mode.

    Otherwise kernels are launched without torch's dispatcher, which takes several microseconds to reach Python code.
    """
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


def recording(*tensors: Tensor | None) -> bool:
    """True where autograd has to know: grad mode is on and a tensor requires a gradient, or one has a tangent.

    With a tangent (forward-mode AD) the autograd.Function raises, which has no jvp; past it the tangent would be lost.
    """
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        return True
    if forward_ad._current_level < 0:
        return False
    return any(tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)


def autocast_dtype(tensor: Tensor) -> torch.dtype:
    """Autocast's dtype where it is on for the tensor's device and casts its dtype, else the tensor's."""
    kind = tensor.device.type
    castable = kind != "meta" and tensor.dtype in (torch.float32, torch.float16, torch.bfloat16)
    if castable and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return tensor.dtype


def autocast(tensor: Tensor) -> Tensor:
    """The tensor in `autocast_dtype`."""
    return tensor.to(autocast_dtype(tensor))


def once_differentiable(backward: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    """The gradients, behind a node that raises when one differentiates through them (under create_graph=True).

    torch's own decorator of this name raises only where the incoming gradient requires one: a penalty on the gradients
    of a plain sum would count for nothing, silently.
    """

    @functools.wraps(backward)
    def guarded(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        with torch.no_grad():
            results = backward(ctx, *grads)
        return tuple(_refusing(result) for result in results) if torch.is_grad_enabled() else results

    return guarded


def _refusing(result: Any) -> Any:
    if isinstance(result, list):
        return [_refusing(value) for value in result]
    if result is None:
        return None
    return torch._C._functions.DelayedError(ONCE, 1)(result.detach().requires_grad_())


def unwanted(gradient: Tensor, wanted: bool) -> Tensor | None:
    """Operators return an empty tensor for a gradient that nobody asked for; autograd takes None."""
    return gradient if wanted else None

"""Defining the operators of torch.ops.mrvae_triton, and deciding when to go past them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

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


def unwanted(gradient: Tensor, wanted: bool) -> Tensor | None:
    """Operators return an empty tensor for a gradient that nobody asked for; autograd takes None."""
    return gradient if wanted else None

"""What raises when one differentiates a second time through a backward pass that is written out."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

ONCE = (
    b"this operator of mrvae_kernels is differentiable once: its gradient has no derivative. For second derivatives "
    b'call the layer or the model within `with mrvae_kernels.override(backend="reference"):`'
)


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

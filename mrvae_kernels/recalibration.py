"""Running statistics of batch and instance norms, set for one beta.

In training they mix the betas that were sampled, so that they are right for none.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm

from .gates import Beta


def running_norms(network: nn.Module) -> list[_NormBase]:
    """The batch and instance norms that keep running statistics."""
    return [m for m in network.modules() if isinstance(m, _NormBase) and m.track_running_stats]


def _cumulative() -> Callable[[nn.Module, Any], None]:
    """A hook that gives the k-th call of an instance norm the momentum 1/k: the average that torch knows for batch
    norms alone, with momentum None, of which an instance norm makes 0."""
    calls = itertools.count(1)

    def set_momentum(norm: Any, arguments: Any) -> None:
        norm.momentum = 1 / next(calls)

    return set_momentum


def _arguments(network: nn.Module, batch: Any) -> Sequence[Any]:
    """What the network is called with; TypeError for a tuple of more than it takes."""
    if not isinstance(batch, (tuple, list)):
        return (batch,)
    try:
        inspect.signature(network.forward).bind(*batch)
    except TypeError as error:
        raise TypeError(
            f"a batch of {len(batch)} is as many arguments of the network, {error}: where batches are pairs with "
            "labels, give (x for x, label in batches)"
        ) from None
    return batch


def recalibrate(model: Any, batches: Iterable[Any], beta: Beta) -> int:
    """What MultiRate.recalibrate does; `model` is the MultiRate."""
    norms = running_norms(model.network)
    if not norms:
        return 0
    if isinstance(batches, Tensor):
        raise TypeError("batches is one tensor; expected an iterable of inputs: [x]")
    try:
        inputs = iter(batches)
    except TypeError:
        raise TypeError(f"batches is {batches!r}; expected an iterable of inputs first, and then beta") from None
    before = [{name: buffer.clone() for name, buffer in norm.named_buffers(recurse=False)} for norm in norms]
    training = {module: module.training for module in model.modules()}
    momenta = {norm: norm.momentum for norm in norms}
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a cumulative average
        norm.train()
    hooks = [norm.register_forward_pre_hook(_cumulative()) for norm in norms if isinstance(norm, _InstanceNorm)]
    count = 0
    try:
        with torch.no_grad():
            for batch in inputs:
                model(*_arguments(model.network, batch), beta=beta)
                count += 1
        if count == 0:
            raise ValueError("batches is empty; running statistics need at least one batch")
    except BaseException:
        for norm, buffers in zip(norms, before, strict=True):
            for name, buffer in buffers.items():
                norm.get_buffer(name).copy_(buffer)
        raise
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in training.items():
            module.training = mode
        for norm, momentum in momenta.items():
            norm.momentum = momentum
    return count

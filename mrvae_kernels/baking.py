"""One beta of a multi-rate network as a plain network again."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .adapters import FoldJob, fold_layers
from .gates import Beta
from .hosting import Hosted, release_sequentials
from .layers import _one, write_folded
from .multirate import MultiRate
from .recalibration import running_norms


def bake(model: MultiRate, beta: Beta, batches: Iterable[Any] | None = None) -> nn.Module:
    """The plain network at one beta: a copy, original classes, g W and g b + t as its weights, no gate left.

    beta: one number. batches: inputs (as for `recalibrate`) that set the running statistics of norms for this beta;
    without them a network that has some gets a warning, since theirs mix all betas. A MultiRate within the network has
    betas of its own, and stays one. ValueError for a beta a sample, and for a layer that another multirate() gated.
    """
    if not isinstance(model, MultiRate):
        raise TypeError(f"bake takes the MultiRate that multirate() returned, not a {type(model).__name__}")
    beta = _one(beta)
    _refuse_others(model)
    model = _copied(model)
    if batches is not None:
        model.recalibrate(batches, beta)
    elif norms := running_norms(model.network):
        warnings.warn(
            f"the running statistics of {len(norms)} norms mix the betas of training; give bake(model, beta, "
            "batches) some training inputs to set them for this beta",
            stacklevel=2,
        )
    with torch.no_grad():
        gates = model._gates(beta)
        layers = model._hosts()
        jobs = [
            FoldJob(layer, entry.adapter, g.gate, g.shift)
            for layer, entry, g in zip(layers, model._entries, gates, strict=True)
        ]
        for layer, job, g, folded in zip(layers, jobs, gates, fold_layers(jobs), strict=True):
            if g.inputs is not None:
                folded["weight"] = job.adapter.fold_inputs(layer, _present(folded["weight"]), g.inputs)
            if "forward" in vars(layer):
                raise ValueError(
                    f"the forward of a gated {layer.plain.__name__} was replaced after multirate(), by a hook of "
                    "accelerate's, say, and still calls the gated layer; take it off, then bake"
                )
            layer.release()
            write_folded(layer, folded)
        if model.conditional is not None:
            pairs = model.conditional.by_name(model._norm_values(beta)).values()
            for norm, (s, t) in zip(model.conditional.places.hosted(), pairs, strict=True):
                norm.release()
                own = norm._parameters
                write_folded(norm, {"weight": _present(own["weight"]) + s, "bias": _present(own["bias"]) + t})
    release_sequentials(model.network)
    _compile_anew(model.network)
    return model.network


def _compile_anew(network: nn.Module) -> None:
    """What torch.compile made of a layer alone calls it as the class that it had: bound again to that which it has."""
    if "torch._dynamo" in sys.modules:  # else there is none
        for module in network.modules():
            if isinstance(module, torch._dynamo.OptimizedModule):
                module._initialize()


def _refuse_others(model: MultiRate) -> None:
    own = {*model._hosts(), *(() if model.conditional is None else model.conditional.places.hosted())}
    for inner in model.network.modules():
        if isinstance(inner, MultiRate):
            own.update(inner.modules())
    for name, module in model.network.named_modules():
        if isinstance(module, Hosted) and module not in own:
            raise ValueError(
                f"{name!r} was gated by another multirate() of this network, and bake() gives a plain network of the "
                "gates of one: gate all of it with one multirate(network, gates={...})"
            )


def _copied(model: MultiRate) -> MultiRate:
    """A deep copy. What modules keep of their last call, and what weight norm or pruning computes, has a history, which
    torch does not copy: of such tensors, in attributes or lists, tuples and dictionaries there, it has the values."""
    copies: dict[int, Any] = {}
    seen: set[int] = set()
    left: list[Any] = [vars(module) for module in model.modules()]
    while left:
        value = left.pop()
        if isinstance(value, Tensor) and not value.is_leaf:
            copies[id(value)] = value.detach().clone()
        elif isinstance(value, (dict, list, tuple)) and id(value) not in seen:
            seen.add(id(value))
            left.extend(value.values() if isinstance(value, dict) else value)
    return copy.deepcopy(model, copies)


def _present(value: Tensor | None) -> Tensor:
    assert value is not None
    return value

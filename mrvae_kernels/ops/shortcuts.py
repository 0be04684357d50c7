"""Short cuts to the operators for the hot path of an eager step: the same, without torch.ops reading the arguments.

torch.compile cannot see them, so nothing that it traces may use them.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

from torch import nn

from ._load import require


@functools.cache
def bank(sizes: tuple[int, ...], kinds: tuple[int, ...]) -> Any:
    """The gates of a model with these slices: `.gates(weight, bias, eta)` and `.gates_at(weight, bias, eta: float)`."""
    require()
    return importlib.import_module("mrvae_kernels._C").Bank(sizes, kinds)


@functools.cache
def gated_fold(
    sizes: tuple[int, ...], kinds: tuple[int, ...], gates: tuple[int, ...], shifts: tuple[int, ...],
    groups: tuple[int, ...],
) -> Any:
    """All gates of a model and the folds of its plan, one autograd node:

    `.run(weight, bias, eta, weights, biases)` gives a StepGates: the folded `.weights` and `.biases`, and
    `.variable(slice)`, a gate or shift with its history. sizes, kinds: of the gates' slices; gates, shifts: each folded
    layer's slices, -1 for no shift; groups as in ops.fold.
    """
    require()
    return importlib.import_module("mrvae_kernels._C").GatedFold(sizes, kinds, gates, shifts, groups)


@functools.cache
def core() -> Any:
    """The compiled core's module, for the classes and functions of hosted layers; RuntimeError without one.

    It knows the activations that a layer before them in an nn.Sequential can take into its epilogue: those that have
    the same bits there.
    """
    require()
    module = importlib.import_module("mrvae_kernels._C")
    hooks = [
        getattr(nn.modules.module, f"_global_{kind}")
        for kind in ("forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks")
    ]
    module.set_known_modules({nn.ReLU: "relu"}, hooks)
    return module

"""The hot path of a training step: a plan's gates and folds by one call of the compiled core.

The plan of a MultiRate says which layers fold. Prepared, its gates and folds are one autograd node and few lines of
Python a layer: for ten small convolutions 0.52 of the time of the two operators, 0.81 with backward (python -m
bench.host_time, one thread).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .adapters import Adapter, lost
from .hosting import Hosted, Share
from .ops.shortcuts import gated_fold


class Prepared:
    """What `shares` gives the layers of a plan, by layer and in the order of the gates' slices.

    plan: each layer's strategy. layout: each layer's slices of its shift and of its gate on inputs, or None; its gate
    is slice i for layer i. See `can_prepare`.
    """

    def __init__(
        self, layers: Sequence[Hosted], plan: Sequence[str], layout: Sequence[tuple[int | None, int | None]],
        sizes: tuple[int, ...], kinds: tuple[int, ...],
    ) -> None:
        self._layout = [
            (shift, inputs, how, how == "epilogue" and inputs is None and layer.adapter.product)
            for layer, how, (shift, inputs) in zip(layers, plan, layout, strict=True)
        ]
        self._folds = [
            (i, entry.weight, entry.bias, layout[i][0] if entry.shifted else None, entry.groups)
            for i, how in enumerate(plan) if how == "fold" for entry in layers[i].adapter.entries(layers[i])
        ]
        shifts = tuple(-1 if shift is None else shift for _, _, _, shift, _ in self._folds)
        gates = tuple(i for i, *_ in self._folds)
        groups = tuple(groups for *_, groups in self._folds)
        self._run = gated_fold(sizes, kinds, gates, shifts, groups).run_at

    def shares(self, layers: Sequence[Hosted], weight: Tensor, bias: Tensor, eta: float) -> list[Share]:
        """Each layer's share at eta, from the flat weight and bias of all gates."""
        weights: list[Tensor] = []
        biases: list[Tensor | None] = []
        for i, weight_name, bias_name, _, _ in self._folds:
            parameters: dict[str, Any] = layers[i]._parameters
            if (own := parameters.get(weight_name)) is None:
                raise lost(layers[i], weight_name)
            weights.append(own)
            biases.append(parameters.get(bias_name))
        gates, folded_weights, folded_biases = self._run(weight, bias, eta, weights, biases)
        folded: dict[int, dict[str, Tensor | None]] = {}
        for (i, weight_name, bias_name, _, _), w, b in zip(self._folds, folded_weights, folded_biases, strict=True):
            parts = folded.setdefault(i, {})
            parts[weight_name] = w
            if bias_name in layers[i]._parameters:
                parts[bias_name] = b
        shares = []
        for i, (shift, inputs, how, direct) in enumerate(self._layout):
            shift_value = None if shift is None else gates[shift]
            input_gate = None if inputs is None else gates[inputs]
            if i in folded:
                shares.append(Share(gates[i], shift_value, folded[i], None, input_gate))
            else:
                shares.append(Share(gates[i], shift_value, None, how, input_gate, direct))
        return shares


def can_prepare(layers: Sequence[Hosted], plan: Sequence[str]) -> bool:
    """Whether the plan can be prepared: every fold scales whole parameters by all of the layer's gate.

    Not recurrent layers, of which each parameter has rows of its own, and no affine of several axes.
    """
    return all(_whole(layer.adapter, layer) for layer, how in zip(layers, plan, strict=True) if how == "fold")


def _whole(adapter: Adapter, layer: Hosted) -> bool:
    parameters: dict[str, Any] = layer._parameters
    return all(
        entry.rows == slice(None) and (not entry.flat or parameters[entry.weight].dim() == 1)
        for entry in adapter.entries(layer)
    )

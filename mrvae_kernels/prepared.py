"""The hot path of a training step: a plan's gates, folds and layers through the compiled core.

The plan of a MultiRate says how each layer is gated. Prepared, all of its gates are one autograd node, and a layer that
the core can call straight away is handed nothing a step: it finds the gates on the network's stage. Other layers get
their share as always: folded parameters from the same node, or gates as tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from .adapters import Adapter, lost
from .gates import BetaRange
from .hosting import Hosted, Share
from .ops.shortcuts import core, gated_fold


class Indirect(NamedTuple):
    """A layer that gets a share: which, its slices of gate, shift and gate on inputs or None, and its strategy."""

    layer: int
    shift: int | None
    inputs: int | None
    strategy: str | None


class Prepared:
    """A plan made ready for calls with arguments of these shapes (None for one that is no tensor), and with one beta or
    one a sample.

    plan: each layer's strategy; layout: each layer's slices of its shift and of its gate on inputs, or None; its gate
    is slice i for layer i. stage: the network's. See `can_prepare`.
    """

    def __init__(
        self, stage: Any, per_sample: bool, shapes: Sequence[Sequence[int] | None], beta_range: BetaRange,
        layers: Sequence[Hosted], plan: Sequence[str | None], layout: Sequence[tuple[int | None, int | None]],
        sizes: tuple[int, ...], kinds: tuple[int, ...],
    ) -> None:
        self._stage = stage
        self._direct: list[tuple[int, Any]] = []
        self.indirect: list[Indirect] = []
        for i, (layer, how, (shift, inputs)) in enumerate(zip(layers, plan, layout, strict=True)):
            if _direct(layer, how):
                slices = (i, -1 if shift is None else shift, -1 if inputs is None else inputs)
                self._direct.append((i, core().HostedLayer(stage, *slices, how, layer.adapter.geometry(layer))))
            else:
                self.indirect.append(Indirect(i, shift, inputs, how))
        folds = [
            (i, entry, layout[i][0] if entry.shifted else None)
            for i, _, _, how in self.indirect if how == "fold" and folded_together(layers[i])
            for entry in layers[i].adapter.entries(layers[i])
        ]
        self._folds = [(i, entry.weight, entry.bias) for i, entry, _ in folds]
        gates = tuple(i for i, *_ in folds)
        shifts = tuple(-1 if shift is None else shift for *_, shift in folds)
        fold = gated_fold(sizes, kinds, gates, shifts, tuple(entry.groups for _, entry, _ in folds))
        self.begin = core().Entry(stage, fold, per_sample, shapes, self._folds, *beta_range).begin

    def install(self, layers: Sequence[Hosted]) -> None:
        """Give the layers that the core calls what they keep between the calls of this plan."""
        for i, direct in self._direct:
            layers[i].__dict__["_direct"] = direct

    def hand_out(self, layers: Sequence[Hosted]) -> None:
        """Give the other layers their shares of the gates that `begin` has put on the stage."""
        gates = self._stage.gates
        folded: dict[int, dict[str, Tensor | None]] = {}
        for (i, weight_name, bias_name), w, b in zip(self._folds, gates.weights, gates.biases, strict=True):
            parts = folded.setdefault(i, {})
            parts[weight_name] = w
            if bias_name in layers[i]._parameters:
                parts[bias_name] = b
            elif getattr(layers[i], bias_name, None) is not None:
                raise lost(layers[i], bias_name)
        for i, shift, inputs, how in self.indirect:
            shift_value = None if shift is None else gates.variable(shift)
            input_gate = None if inputs is None else gates.variable(inputs)
            strategy = None if i in folded else how
            share = Share(gates.variable(i), shift_value, folded.get(i), strategy, input_gate)
            layers[i].__dict__["_share"] = share

    def take_back(self, layers: Sequence[Hosted]) -> None:
        """Take them back."""
        for i, *_ in self.indirect:
            layers[i].__dict__["_share"] = None


def folded_together(layer: Hosted) -> bool:
    """Whether the layer folds with the others, in one operator, and not in its own: norms, and products on a GPU whose
    weight is a parameter as it stands.

    Either way has roundings of its own, and a call without a plan, such as the first one after a resumed training, has
    to have those of the others.
    """
    adapter = layer.adapter
    return not adapter.product or (adapter.stored and next(layer.parameters()).device.type != "cpu")


def can_prepare(layers: Sequence[Hosted], plan: Sequence[str | None]) -> bool:
    """Whether the plan can be prepared: every fold scales whole parameters by all of the layer's gate.

    Not recurrent layers, of which each parameter has rows of its own, and no affine of several axes.
    """
    return all(_whole(layer.adapter, layer) for layer, how in zip(layers, plan, strict=True) if how == "fold")


def _direct(layer: Hosted, how: str | None) -> bool:
    """Folds of GPU tensors stay together: few launches count there; on the CPU a weight that is still in the cache."""
    if not layer.adapter.direct(layer):
        return False
    weight: Any = layer.weight
    return how == "epilogue" or (how == "fold" and weight.device.type == "cpu")


def _whole(adapter: Adapter, layer: Hosted) -> bool:
    parameters: dict[str, Any] = layer._parameters
    return all(
        entry.rows == slice(None) and (not entry.flat or parameters[entry.weight].dim() == 1)
        for entry in adapter.entries(layer)
    )

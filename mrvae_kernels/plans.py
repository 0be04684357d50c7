"""What a MultiRate keeps from one call for the next: which layer folds, and those plans made ready for the core.

A plan is made after a first call, for inputs of its shapes. Where it can be prepared, it is installed: the layers then
keep what the core needs of it until another takes its place.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import measurements, ops, strategy
from .adapters import Adapter, FoldJob, fold_layers
from .backends import inside_transform
from .gates import KINDS, Beta, BetaRange
from .hosting import HOSTED_TYPES, Share
from .ops.shortcuts import core
from .places import Places
from .prepared import Prepared, can_prepare, folded_together

MOST = 32
"""Plans kept; one more, and all are made anew: inputs whose shapes change all the time would pile them up."""


class LayerGates(NamedTuple):
    """A layer's gate, (C,) or (N, C), its shift or None, and the gate on its inputs or None."""

    gate: Tensor
    shift: Tensor | None
    inputs: Tensor | None


class Plans:
    """The plans of a MultiRate, whose gated layers have these adapters and places.

    layout: each layer's slices of its shift and of its gate on inputs, or None; sizes, kinds: of the slices of the flat
    gates; parameters: the MultiRate's own. Attributes:
        made         key -> each layer's strategy, None where it depends on the call
        prepared     key -> the same made ready, where that is possible
        installed    the one that the layers hold parts of, or None; installed_under: the override and the records of
                     measurements that it belongs to
        stage        the compiled core's, where the layers find a call's gates; None without a core
        lent         blocks of lent shares that are open: no plan begins within one
    """

    def __init__(
        self, adapters: Sequence[Adapter], layout: Sequence[tuple[int | None, int | None]], sizes: tuple[int, ...],
        kinds: tuple[str, ...], places: Places, parameters: Mapping[str, nn.Parameter | None],
    ) -> None:
        self._adapters, self._layout, self._sizes, self._kinds = adapters, layout, sizes, kinds
        self._places, self._parameters = places, parameters  # not the MultiRate, which would hold itself
        self._unplanned = tuple(None if adapter.product else "fold" for adapter in adapters)
        self.made: dict[Any, tuple[str | None, ...]] = {}
        self.prepared: dict[Any, Prepared] = {}
        self.installed: Prepared | None = None
        self.installed_under: Any = None
        self.lent = self._version = 0
        self._raise_stage()

    def _raise_stage(self) -> None:
        """A stage, which the gated layers know: they tell it of another stride and the like."""
        self.stage: Any = core().Stage() if ops.EXTENSION else None
        for layer in self._places.layers:
            layer.__dict__["_stage"] = self.stage

    def begin(self, prepared: Prepared, args: Any, beta: Beta) -> bool:
        """Whether this is a call that the plan is for; then its gates are on the stage."""
        places = self._places
        if places.layers[0].__dict__.get("_stage") is not self.stage:  # a shallow copy has made these layers its own
            self._raise_stage()
            self.forget()
            return False
        return (
            not self.lent and places.network_stays()
            and prepared.begin(args, beta, places.locations, HOSTED_TYPES, places.holders, self._parameters)
        )

    def key(self, beta: Beta, args: Any) -> Any:
        """What a plan depends on; None where none is made."""
        if _saving_is_hooked() or inside_transform():
            return None
        if self.stage is not None and self.stage.version != self._version:  # a layer's stride or padding was changed
            self.forget()
        per_sample = (beta.dim() if isinstance(beta, Tensor) else not isinstance(beta, (int, float))) != 0
        shapes = tuple(tuple(value.shape) if isinstance(value, Tensor) else None for value in args)
        return (per_sample, shapes, strategy.current(), measurements.generation)

    def find(self, key: Any) -> Prepared | None:
        """The prepared plan for this key; None where there is none, and while the layers are in use by a call."""
        in_use = self.lent or (self.stage is not None and self.stage.gates is not None)
        return None if in_use else self.prepared.get(key)

    def ahead(self, key: Any, beta_range: BetaRange) -> Prepared | None:
        """The plan for a first call with one beta a sample, of which nothing has to be seen: the first step of a
        resumed training then has the bits of every other. None where there is none."""
        weight = self._parameters.get("gate_weight")
        if key is None or not key[0] or key in self.made or weight is None or weight.device.type != "cpu":
            return None
        self._remember(key, weight.device, beta_range)
        return self.find(key)

    def install(self, prepared: Prepared) -> Prepared:
        """The same, its parts with the layers."""
        if self.installed is not prepared:
            prepared.install(self._places.hosted())
            self.installed = prepared
        self.installed_under = (strategy.current(), measurements.generation)
        return prepared

    def shares(self, gates: Sequence[LayerGates], key: Any) -> list[Share]:
        """Each layer's share of these gates, with its folded parameters where the plan for this key folds it."""
        plan: Sequence[str | None] = self._unplanned
        if gates[0].gate.dim() == 2:
            plan = self._per_sample(gates[0].gate.device)
        elif key is not None:
            plan = self.made.get(key, self._unplanned)
        shares = [Share(g.gate, g.shift, None, how, g.inputs) for g, how in zip(gates, plan, strict=True)]
        layers = self._places.hosted()
        folding = [i for i, how in enumerate(plan) if how == "fold" and folded_together(layers[i])]
        if folding:
            jobs = [FoldJob(layers[i], self._adapters[i], gates[i].gate, gates[i].shift) for i in folding]
            for i, folded in zip(folding, fold_layers(jobs), strict=True):
                shares[i] = Share(gates[i].gate, gates[i].shift, folded, None, gates[i].inputs)
        return shares

    def remember(self, key: Any, gate: Tensor, beta_range: BetaRange) -> None:
        """Plan for inputs of this key after a call with such a gate: each layer's strategy, so that next time those
        that fold do so together."""
        if key in self.made or (gate.dim() == 2) != key[0]:
            return
        self._remember(key, gate.device, beta_range)

    def _remember(self, key: Any, device: torch.device, beta_range: BetaRange) -> None:
        per_sample, shapes, *_ = key
        if len(self.made) > MOST:
            self.forget()
        layers = self._places.hosted()
        plan: tuple[str | None, ...]
        if per_sample:
            plan = tuple(
                how if adapter.product else None
                for adapter, how in zip(self._adapters, self._per_sample(device), strict=True)
            )
        else:
            plan = tuple(
                (layer._last_strategy or "epilogue") if adapter.product else "fold"
                for layer, adapter in zip(layers, self._adapters, strict=True)
            )
        self.made[key] = plan
        if self._runs_compiled("gates", "fold", "epilogue") and can_prepare(layers, plan) and not self._traces_parts():
            kinds = tuple(map(KINDS.index, self._kinds))
            self.prepared[key] = Prepared(
                self.stage, per_sample, shapes, beta_range, layers, plan, self._layout, self._sizes, kinds
            )

    def forget(self) -> None:
        """Make plans anew."""
        self.made.clear()
        self.prepared.clear()
        self.installed = None
        self._version = 0 if self.stage is None else self.stage.version

    def _per_sample(self, device: torch.device) -> Sequence[str | None]:
        """The compiled core has one way on the CPU, "epilogue", or an error for another that was asked for."""
        known = not torch.compiler.is_compiling() and device.type == "cpu" and self._runs_compiled("epilogue")
        return (strategy.choose_strategy(0, 0, True) if known else None,) * len(self._adapters)

    def _traces_parts(self) -> bool:
        """Whether torch.compile made a part of the network faster, which cannot trace the core's layers in a plan."""
        optimized = torch._dynamo.OptimizedModule if "torch._dynamo" in sys.modules else ()
        return any(
            isinstance(module, optimized) or module._compiled_call_impl is not None
            for module in self._places.network.modules()
        )

    def _runs_compiled(self, *operators: str) -> bool:
        weight = self._parameters.get("gate_weight")  # gone where it is parametrized
        return weight is not None and all(
            strategy.choose_backend(weight.device, weight.dtype, operator) == "cpp" for operator in operators
        )


def _saving_is_hooked() -> bool:
    """Whether hooks pack saved tensors, as in torch.utils.checkpoint: a recomputation must then save what the forward
    saved, in the same order, so that it must not follow a plan made in between."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None

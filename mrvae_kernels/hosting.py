"""Layers inside a MultiRate network: the user's own objects, waiting for their share of the gates.

A hosted layer has the class Hosted<Name>, a subclass of its torch.nn class, so that names, parameters, optimisers and
isinstance checks stay as they were. MultiRate gives it a Share for the duration of a call and takes it back afterwards:
one entry of a dictionary a layer, where torch.func.functional_call renews every parameter and nn.Module's own attribute
assignment looks through three dictionaries. A layer that the compiled core calls straight away keeps, between the calls
of one plan, the core's HostedLayer, which finds the gates on the network's stage (`prepared`).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from . import traced
from .adapters import ADAPTERS, Adapter, FoldJob, fold_layers, lost
from .ops import EXTENSION
from .ops.shortcuts import core
from .traced import SampledGate, TracedGates


class Share(NamedTuple):
    """What a layer is handed: its gate, its shift or None, its folded parameters where they were folded already, the
    strategy where that is decided already, and the gate on its inputs or None."""

    gate: Tensor
    shift: Tensor | None
    folded: Mapping[str, Tensor | None] | None = None
    strategy: str | None = None
    inputs: Tensor | None = None


WITHOUT_A_BETA = (
    "this {} belongs to a multi-rate network and was called without a beta: call the MultiRate itself, "
    "model(x, beta=...), or work within `with model.at(beta):`. Under activation checkpointing inside the network, "
    "pass context_fn=mrvae_kernels.checkpoint_context(model) to torch.utils.checkpoint.checkpoint"
)


def hooked(module: nn.Module) -> bool:
    """Whether nn.Module's call does more than `forward`. Of a traced call it is asked once, and not guarded, as
    torch.compile does itself."""
    kinds = ("forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks")
    everywhere = any(getattr(nn.modules.module, f"_global_{kind}") for kind in kinds)
    return everywhere or any(getattr(module, f"_{kind}") for kind in kinds) or torch.compiler.is_exporting()


Slices = tuple[int, int, int, int]
"""The places of the gate, the shift and the gate on inputs, -1 for none; and where the gate begins among all gates."""



def place_of(slices: Slices) -> str:
    """The same as a string, for which Dynamo has one guard a layer and call; for the tuple it has three."""
    return " ".join(map(str, slices))


@traced.asked_once
def slices_of(place: str) -> Slices:
    gate, shift, inputs, start = map(int, place.split())
    return gate, shift, inputs, start


class Hosted(nn.Module):
    """What hosted layers share; `plain` is the torch.nn class underneath."""

    plain: type[nn.Module]
    adapter: Adapter
    _calls: Sequence[TracedGates] = ()  # the network's Calls
    _place: str = place_of((0, -1, -1, 0))
    _share: Share | None = None
    _direct: Any = None  # the core's HostedLayer, which counts where there is no share; not for a compiled network
    _stage: Any = None  # the network's, where there is a compiled core
    _last_strategy: str | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Without nn.Module's way to `forward` where there is nothing on it: 0.8 of a small layer's 5.4 us."""
        if torch.compiler.is_compiling():
            return super().__call__(*args, **kwargs) if self._has_hooks() else self.forward(*args, **kwargs)
        if len(args) == 1 and not kwargs and EXTENSION:
            y = core().call_layer(self, args[0])
            if y is not None:
                return y
        return super().__call__(*args, **kwargs)

    @traced.asked_once
    def _has_hooks(self) -> bool:
        return hooked(self)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        calls = self._calls  # not traced itself, a layer behind a break of Dynamo's graph is part of such a call too
        if calls and (torch.compiler.is_compiling() or self._share is None):
            return trace(self, calls[-1], *args, **kwargs)
        share = self._share
        if share is None and self._direct is not None:
            if len(args) == 1 and not kwargs:
                y = core().run_layer(self._direct, self._parameters, args[0])
                if y is not None:
                    return y
            if self._parameters.get("weight") is None:
                raise lost(self, "weight")
            share = share_of(self._direct)
        if share is None:
            raise RuntimeError(WITHOUT_A_BETA.format(self.plain.__name__))
        adapter = self.adapter
        if "input" in kwargs:  # torch.nn's name for it
            args = (kwargs.pop("input"), *args)
        if share.inputs is not None:
            args = (adapter.scale_inputs(args[0], share.inputs), *args[1:])
        if share.folded is not None:
            return adapter.run_folded(self, self.plain, share.folded, *args, **kwargs)
        strategy = share.strategy
        if strategy is None and adapter.product and share.gate.dim() == 1:
            strategy = adapter.choose(self, args[0])
            if not torch.compiler.is_compiling():  # a compiled graph has its choice, and would be guarded on this
                self._last_strategy = strategy
        return adapter.run(self, share.gate, share.shift, None, strategy, *args, **kwargs)

    def _traced(self, call: TracedGates, slices: Slices, x: Any, *args: Any, **kwargs: Any) -> Any:
        """The layer's output as torch.compile traces it."""
        gate, shift = values_of(call, slices)
        adapter = self.adapter
        if gate.dim() == 1 and not adapter.product:
            folded = fold_layers([FoldJob(self, adapter, gate, shift)])[0]
            return adapter.run_folded(self, self.plain, folded, x, *args, **kwargs)
        return adapter.run(self, gate, shift, None, None, x, *args, **kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in GEOMETRY and self._stage is not None and value != getattr(self, name, None):
            self._stage.version += 1  # the core keeps these numbers
        super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        """A copy or a pickle made during a call or within `at` waits for a beta of its own."""
        # torch's recurrent layers have one; object since Python 3.11
        inherited = getattr(super(), "__getstate__", None)
        state = self.__dict__ if inherited is None else inherited()
        own = ("_last_strategy", "_stage", "_direct", "_calls")
        kept = {name: value for name, value in state.items() if name not in own}
        return kept | {"_share": None}

    def release(self) -> None:
        """Turn back into the plain layer."""
        for name in ("_share", "_direct", "_stage", "_last_strategy", "_calls", "_place"):
            self.__dict__.pop(name, None)
        self.__class__ = self.plain  # type: ignore[assignment]


class TracedProduct(Hosted):
    """A Linear or convolution: traced, it takes an nn.ReLU after it along, and torch.compile looks at little, its
    parameters and a few numbers."""


class TracedLinear(TracedProduct):
    """A Linear, of which torch.compile looks at nothing but weight and bias."""

    def _traced(
        self, call: TracedGates, slices: Slices, x: Any, *args: Any, activation: str = "none", **kwargs: Any
    ) -> Any:
        layer: Any = self
        gate, shift, _, start = slices
        found = call.values[gate]
        if isinstance(found, SampledGate):
            film: Any = None if shift < 0 else call.values[shift]
            w, c, at = (None, None, -1) if film is None else (film.weight, film.bias, film.start)
            return traced.sampled_linear(x, layer.weight, layer.bias, *found, w, c, at, activation, call.asked)
        return traced.gated_linear(
            x, layer.weight, layer.bias, *values_of(call, slices), call.flat, start, activation, call.asked,
            call.exporting,
        )


class TracedConvolution(TracedProduct):
    """A convolution likewise, with its strides and the like as numbers; others run as every layer."""

    def _traced(
        self, call: TracedGates, slices: Slices, x: Any, *args: Any, activation: str = "none", **kwargs: Any
    ) -> Any:
        layer: Any = self
        padding = layer.padding
        if args or kwargs or isinstance(padding, str) or layer.padding_mode != "zeros" or x.dim() != layer.weight.dim():
            y = super()._traced(call, slices, x, *args, **kwargs)
            return y if activation == "none" else y.relu()
        geometry = (layer.stride, padding, layer.dilation, layer.transposed, layer.output_padding, layer.groups)
        return traced.gated_convolution(
            x, layer.weight, layer.bias, *values_of(call, slices), call.flat, slices[3], geometry, activation,
            call.asked, call.exporting,
        )


# Functions where methods would do: of a method that is called on a layer, Dynamo guards that it is the class's own.


def values_of(call: TracedGates, slices: Slices) -> tuple[Tensor, Tensor | None]:
    """Gate and shift of a call that torch.compile traces."""
    gate, shift, _, _ = slices
    return call.value(gate), None if shift < 0 else call.value(shift)


def trace(layer: Hosted, call: TracedGates, *args: Any, **kwargs: Any) -> Any:
    """The layer's output in a call that torch.compile traces."""
    x, *rest = (kwargs.pop("input"), *args) if "input" in kwargs else args
    slices = slices_of(layer._place)
    if slices[2] >= 0:
        x = layer.adapter.scale_inputs(x, call.value(slices[2]))
    return layer._traced(call, slices, x, *rest, **kwargs)


GEOMETRY = frozenset(("stride", "padding", "dilation", "groups", "output_padding", "padding_mode"))


class HostedSequential(nn.Sequential):
    """An nn.Sequential with gated layers in it, whose calls the compiled core makes.

    A layer that the core calls straight away takes the activation after it into its epilogue; every other module, and
    one with hooks, is called as in nn.Sequential.
    """

    def forward(self, input: Any) -> Any:
        if not torch.compiler.is_compiling() and EXTENSION:  # it may be unpickled where there is no core
            return core().run_sequential(self._modules, input)
        done = False
        modules, hooks = list(self._modules.values()), self._hooks()
        for i, (module, after) in enumerate(zip(modules, [*modules[1:], None], strict=True)):
            if done:
                done = False
            elif (
                isinstance(module, TracedProduct) and type(after) is nn.ReLU and module._calls
                and not (hooks[i] or hooks[i + 1])
            ):
                input, done = trace(module, module._calls[-1], input, activation="relu"), True
            else:
                input = module(input)
        return input

    @traced.asked_once
    def _hooks(self) -> tuple[bool, ...]:
        """Whether each module has hooks."""
        return tuple(map(hooked, self._modules.values()))


def host_sequentials(network: nn.Module, layers: Collection[nn.Module]) -> None:
    """Make each nn.Sequential of the network that holds one of these layers a HostedSequential."""
    if EXTENSION:
        for module in network.modules():
            if type(module) is nn.Sequential and any(child in layers for child in module.children()):
                module.__class__ = HostedSequential


def release_sequentials(network: nn.Module) -> None:
    """Turn them back."""
    for module in network.modules():
        if type(module) is HostedSequential:
            module.__class__ = nn.Sequential  # type: ignore[assignment]


def _base(plain: type[nn.Module]) -> type[Hosted]:
    if plain is nn.Linear:
        return TracedLinear
    return TracedConvolution if issubclass(plain, _ConvNd) and ADAPTERS[plain].stored else Hosted


HOSTED: dict[type[nn.Module], type[Hosted]] = {
    plain: type(
        f"Hosted{plain.__name__}", (_base(plain), plain), {"plain": plain, "adapter": adapter, "__module__": __name__}
    )
    for plain, adapter in ADAPTERS.items()
}
globals().update({hosted.__name__: hosted for hosted in HOSTED.values()})  # pickle finds them by name


HOSTED_TYPES = frozenset(HOSTED.values())


class Turn:
    """A lock: one thread at a time in a network, whose layers hold one beta's gates. Copies have locks of their own."""

    def __init__(self) -> None:
        self.lock = threading.RLock()

    def __reduce__(self) -> tuple[type[Turn], tuple[()]]:
        return Turn, ()


def share_of(direct: Any) -> Share | None:
    """What the core's HostedLayer stands for at present: None outside a call."""
    gates = direct.stage.gates
    if gates is None:
        return None
    shift = None if direct.shift < 0 else gates.variable(direct.shift)
    inputs = None if direct.inputs < 0 else gates.variable(direct.inputs)
    return Share(gates.variable(direct.gate), shift, None, direct.strategy, inputs)


def hand_out(layers: Sequence[Hosted], shares: Sequence[Any]) -> list[Any]:
    """Give each layer its share; returns what they held before."""
    before = [layer._share for layer in layers]
    if torch.compiler.is_compiling():  # Dynamo follows attributes, not dictionaries
        for layer, share in zip(layers, shares, strict=True):
            layer._share = share
    else:
        for layer, share in zip(layers, shares, strict=True):
            layer.__dict__["_share"] = share
    return before


@contextlib.contextmanager
def lend(layers: Sequence[Hosted], shares: Sequence[Any]) -> Iterator[None]:
    """Within the block the layers hold these shares."""
    before = hand_out(layers, shares)
    try:
        yield
    finally:
        hand_out(layers, before)

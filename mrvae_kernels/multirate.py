"""A whole network: gate it, run it at any beta, bake one beta into a plain network again.

    model = multirate(vae, gates={"encoder": "sigmoid", "decoder": "sqrt"}, beta_range=(0.01, 10.0))
    out = model(x, beta=0.5)
    plain = bake(model, beta=0.5)

One flat gate_weight and gate_bias hold the gates of all layers. A forward evaluates them in one operator, folds every
layer for which that is cheaper in one more, and hands each layer its share for the duration of the call.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import functional, measurements, reference, strategy, traced, traced_call
from .adapters import ADAPTERS, Adapter
from .backends import inside_transform
from .gates import (
    DEFAULT_BETA_RANGE,
    Beta,
    BetaRange,
    GateNetwork,
    GateSpec,
    init_gates_,
    standardize,
)
from .hosted_norms import ConditionalNorms
from .hosting import (
    HOSTED,
    Hosted,
    Share,
    Turn,
    host_sequentials,
    lend,
    place_of,
)
from .layers import Recorded
from .ops.shortcuts import core
from .places import Places
from .plans import LayerGates, Plans
from .recalibration import recalibrate
from .selection import Gates, select
from .traced import Calls


class GatedEntry(NamedTuple):
    """A gated layer of a network: its name, adapter, gate and features."""

    name: str
    adapter: Adapter
    spec: GateSpec
    features: int


class BankRows(NamedTuple):
    """Consecutive rows of the flat gates: whose, in which role (gated, shifts or inputs), how many, which kind."""

    name: str
    role: str
    size: int
    kind: str
    init: str


class MultiRate(Recorded):
    """A network whose gated layers compute y = g (W x + b) + t with g a function of beta (MR-VAE, Eqn. 6 to 8).

    Made by `multirate`. Calls take the network's own arguments plus `beta=`. Attributes:
        network      the user's network, its names untouched; call it through this module, or within `at(beta)`
        gate_weight  w of all gates (then of all shifts), flat, (degree, C) for gates of degree 2 or 3; gate_bias c
                     likewise. None with hidden gate layers, which live in `gate_networks`
        gated        layer name -> slice of the flat gates; `shifts` likewise for FiLM, `inputs` for gates on inputs
        left         layer name -> why it has no gate
        conditional  with norms="conditional", s and t of the batch norms; its `names` are theirs. Else None
        beta_range   (a, b); saved in the state_dict, checked on loading
    """

    gate_weight: nn.Parameter | None
    gate_bias: nn.Parameter | None
    conditional: ConditionalNorms | None

    def __init__(
        self, network: nn.Module, gates: Gates | None = None, beta_range: Sequence[float] = DEFAULT_BETA_RANGE,
        include: Sequence[str] | None = None, exclude: Sequence[str] = (), norms: str = "gated",
    ) -> None:
        super().__init__()
        for option, value in (("include", include), ("exclude", exclude)):
            if isinstance(value, str):
                raise TypeError(f"{option} is the string {value!r}; expected a list of names: [{value!r}]")
        self.beta_range = BetaRange.of(beta_range)
        selection = select(network, gates, include, exclude, norms)
        self.left = selection.left
        modules = dict(network.named_modules(remove_duplicate=False))
        self._entries = [
            GatedEntry(name, ADAPTERS[type(modules[name])], spec, ADAPTERS[type(modules[name])].features(modules[name]))
            for name, spec in selection.gated.items()
        ]
        rows = [BankRows(e.name, "gated", e.features, e.spec.kind, e.spec.init) for e in self._entries]
        rows += [BankRows(e.name, "shifts", e.features, "identity", e.spec.init) for e in self._entries if e.spec.shift]
        for entry in self._entries:
            if isinstance(entry.spec.inputs, GateSpec):
                size = entry.adapter.inputs(modules[entry.name])
                rows.append(BankRows(entry.name, "inputs", size, entry.spec.inputs.kind, entry.spec.inputs.init))
        self._rows = rows
        self._sizes, self._kinds = tuple(row.size for row in rows), tuple(row.kind for row in rows)
        self.gated: dict[str, slice] = {}
        self.shifts: dict[str, slice] = {}
        self.inputs: dict[str, slice] = {}
        end = 0
        for row in rows:
            getattr(self, row.role)[row.name] = slice(end, end + row.size)
            end += row.size
        self._add_gates(next(modules[self._entries[0].name].parameters()))
        for entry in self._entries:
            layer = modules[entry.name]
            layer.__class__ = HOSTED[type(layer)]
            layer._share = None  # there from the start: torch.compile is guarded on an attribute that comes later
        self.network = network
        self.conditional = ConditionalNorms(self, selection.conditional) if selection.conditional else None
        places = {(row.name, row.role): i for i, row in enumerate(rows)}
        self._layout = [(places.get((e.name, "shifts")), places.get((e.name, "inputs"))) for e in self._entries]
        self._turn = Turn()
        self._places = Places(self, [entry.name for entry in self._entries])
        self._tell_layers()
        self._plans = self._no_plans()
        host_sequentials(network, self._places.layers)

    def _add_gates(self, like: Tensor) -> None:
        specs = [e.spec for e in self._entries]
        for entry in self._entries:
            for name in ("hidden", "shared", "degree"):
                here, there = (getattr(each.spec, name) for each in (entry, self._entries[0]))
                if here != there:
                    raise ValueError(
                        f"the gate of {self._entries[0].name} has {name} {there}, that of {entry.name} has {here}; "
                        f"expected one {name} for all gates of a network: give a GateSpec for each, in place of a name"
                    )
        self.gate_networks: nn.ModuleList | None = None
        self.register_parameter("gate_weight", None)
        self.register_parameter("gate_bias", None)
        if specs[0].hidden:
            parts: list[tuple[Sequence[int], Sequence[str]]]
            if specs[0].shared:
                parts = [(self._sizes, self._kinds)]
            else:
                parts = [([size], [kind]) for size, kind in zip(self._sizes, self._kinds, strict=True)]
            built = [GateNetwork(specs[0].hidden, sizes, kinds, specs[0].init) for sizes, kinds in parts]
            self.gate_networks = nn.ModuleList(built).to(device=like.device, dtype=like.dtype)
            return
        bias = torch.empty(sum(self._sizes), device=like.device, dtype=like.dtype)
        weight = torch.empty_like(bias) if specs[0].degree == 1 else bias.new_empty(specs[0].degree, len(bias))
        pieces = zip(weight.split(self._sizes, -1), bias.split(self._sizes), self._rows, strict=True)
        for piece_weight, piece_bias, row in pieces:
            init_gates_(piece_weight, piece_bias, row.kind, row.init)
        self.gate_weight, self.gate_bias = nn.Parameter(weight), nn.Parameter(bias)

    def forward(self, *args: Any, beta: Beta, **kwargs: Any) -> Any:
        """The network's forward at this beta: a positive number, a 0-d tensor, or one a sample, shape (N,)."""
        if torch.compiler.is_compiling():
            return traced_call.run(self, beta, args, kwargs)
        if self.conditional is not None:
            with self._turn.lock, self._lend_norms(beta):
                return self._run(beta, args, kwargs)
        return self._run(beta, args, kwargs)

    def _replicate_for_data_parallel(self) -> Any:
        """nn.DataParallel's replicas would take the gates from one another."""
        raise RuntimeError(
            "nn.DataParallel runs several copies of a network in one process, of which a MultiRate has one set of "
            "gates; use torch.nn.parallel.DistributedDataParallel, a process for each GPU"
        )

    def _run(self, beta: Beta, args: Any, kwargs: Any) -> Any:
        with self._turn.lock:  # while another thread's call runs, the layers hold that call's gates
            plans, under = self._plans, (strategy.current(), measurements.generation)
            installed = plans.installed
            if installed is None or under != plans.installed_under or not plans.begin(installed, args, beta):
                key = plans.key(beta, args)
                found = plans.find(key) or plans.ahead(key, self.beta_range)
                if found is None or not plans.begin(plans.install(found), args, beta):
                    return self._call(beta, key, args, kwargs)
                installed = found
            try:
                network: Any = self._modules["network"]
                if not installed.indirect:
                    return network(*args, **kwargs)
                layers = self._hosts()
                try:
                    installed.hand_out(layers)
                    return network(*args, **kwargs)
                finally:
                    installed.take_back(layers)
            finally:
                plans.stage.gates = None

    @traced.asked_once
    def _check_layers(self) -> None:
        """RuntimeError where a gated layer is gone: asked when the call is traced, and not guarded."""
        traced.announce()
        self._hosts()

    def _call(self, beta: Beta, key: Any, args: Any, kwargs: Any) -> Any:
        """Without a plan that is ready."""
        shares, network = self._plans.shares(self._gates(beta), key), self.network
        with self._lend(shares):
            result = network(*args, **kwargs)
        if key is not None:
            self._plans.remember(key, shares[0].gate, self.beta_range)
        return result

    @contextmanager
    def at(self, beta: Beta) -> Iterator[MultiRate]:
        """Within the block the network's layers are gated for beta: `with model.at(0.5): z = model.network.encode(x)`.

        For one beta, give a number or a 0-d tensor; for one a sample, every call in the block takes that batch size.
        Other threads that call the model wait for the block's end. The gates are those of the block's beginning: after
        an optimiser's step or load_state_dict() within it, begin another.
        """
        with self._turn.lock, self._lend_norms(beta), self._lend(self._plans.shares(self._gates(beta), None)):
            yield self

    @contextmanager
    def _lend_norms(self, beta: Beta) -> Iterator[None]:
        """Within the block the conditional norms, if there are any, hold their s and t."""
        norms = self.conditional
        if norms is None:
            yield
            return
        pairs = norms.by_name(self._norm_values(beta)).values()
        with lend(norms.places.hosted(), [Share(s, t) for s, t in pairs]):
            yield

    def _norm_values(self, beta: Beta) -> list[Tensor]:
        """s and t of each conditional norm in turn."""
        norms = self.conditional
        if norms is None:
            return []
        return norms.values(self._eta(beta, norms.like.device, reference.gate_dtype(norms.like.dtype)))

    @contextmanager
    def _lend(self, shares: Sequence[Share]) -> Iterator[None]:
        """Within the block the layers hold these shares, and a call of the model leaves them as they are."""
        with lend(self._hosts(), shares):
            self._plans.lent += 1
            try:
                yield
            finally:
                self._plans.lent -= 1

    def gate_values(self, beta: Beta) -> dict[str, Tensor]:
        """Layer name -> g at beta, (C,) or (N, C); shifts under "<name>.shift", input gates under "<name>.inputs".

        s and t of a conditional norm: "<name>.scale" and "<name>.shift".
        """
        suffix = {"gated": "", "shifts": ".shift", "inputs": ".inputs"}
        values = {row.name + suffix[row.role]: g for row, g in zip(self._rows, self._bank(beta), strict=True)}
        if self.conditional is not None:
            for name, (s, t) in self.conditional.by_name(self._norm_values(beta)).items():
                values |= {f"{name}.scale": s, f"{name}.shift": t}
        return values

    def gate_parameters(self) -> list[nn.Parameter]:
        """The parameters that depend on beta's response: for an optimiser group of their own."""
        return [p for name, p in self.named_parameters() if not name.startswith("network.")]

    def network_parameters(self) -> list[nn.Parameter]:
        """The parameters of the user's network."""
        return list(self.network.parameters())

    def recalibrate(self, batches: Iterable[Any], beta: Beta) -> int:
        """Set the running statistics of batch and instance norms to this data at this beta; returns the batches used.

        In training they mix the betas that were sampled, so that without this a network with such norms is wrong at
        every single beta. `batches` gives the network's input: a tensor, or a tuple of positional arguments.
        Each batch counts alike. Nothing happens for a network without running statistics. ValueError for no batch;
        after an error the statistics are what they were.
        """
        return recalibrate(self, batches, beta)

    def _gate_state(self) -> dict[str, Any]:
        norms = {} if self.conditional is None else {"conditional": list(self.conditional.names)}
        return {
            "beta_range": list(self.beta_range),
            "gates": [f"{row.name} {row.role} {row.kind}" for row in self._rows],
            "degree": self._entries[0].spec.degree,
            **norms,
        }

    def extra_repr(self) -> str:
        features = sum(entry.features for entry in self._entries)
        norms = "" if self.conditional is None else f"conditional={len(self.conditional.names)} norms, "
        degree = "" if (degree := self._entries[0].spec.degree) == 1 else f"degree={degree}, "
        gated = f"gated={len(self._entries)} layers ({features} features), {degree}{norms}"
        return f"{gated}beta_range={tuple(self.beta_range)}"

    def _bank(self, beta: Beta) -> list[Tensor]:
        """All gates, shifts and input gates at beta, in the order of `_rows`."""
        if self.gate_networks is None:
            weight, bias = self.gate_weight, self.gate_bias  # which torch's parametrizations may compute
            assert weight is not None and bias is not None
            if isinstance(beta, float):
                return functional.gate_bank_at(weight, bias, beta, self.beta_range, self._sizes, self._kinds)
            eta = self._eta(beta, weight.device, reference.gate_dtype(weight.dtype))
            return functional.gate_bank(weight, bias, eta, self._sizes, self._kinds)
        networks: Any = self.gate_networks  # of GateNetwork
        like = networks[0].output.bias
        eta = self._eta(beta, like.device, reference.gate_dtype(like.dtype))
        p = torch.cat([net(eta.to(like.dtype)).to(eta.dtype) for net in networks], -1)
        return [
            reference.gate_activation(piece, kind)
            for piece, kind in zip(p.split(self._sizes, -1), self._kinds, strict=True)
        ]

    def _eta(self, beta: Beta, device: torch.device, dtype: torch.dtype) -> Tensor:
        """eta of the betas, with the bits that a plan made ready has."""
        plans = self._plans.stage is not None and device.type == "cpu" and isinstance(beta, Tensor)
        # not where it would be recorded: what the core writes no tracer sees
        if plans and not (torch.compiler.is_compiling() or inside_transform() or torch._C._is_tracing()):
            eta: Tensor | None = core().standardized(beta, *self.beta_range, dtype == torch.float64)
            if eta is not None:
                return eta
        return standardize(beta, self.beta_range, device=device, dtype=dtype)

    def _gates(self, beta: Beta) -> list[LayerGates]:
        """The same by layer."""
        values = self._bank(beta)
        return [
            LayerGates(gate, None if shift is None else values[shift], None if inputs is None else values[inputs])
            for gate, (shift, inputs) in zip(values, self._layout, strict=False)
        ]

    def _hosts(self) -> list[Hosted]:
        """The gated layers, as the network holds them now."""
        return self._places.hosted()

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "beta_range":
            value = BetaRange.of(value)
            if (plans := self.__dict__.get("_plans")) is not None:
                plans.forget()  # they hold the range that they were made for
        super().__setattr__(name, value)

    def _apply(self, *args: Any, **kwargs: Any) -> MultiRate:
        """`.to()`, `.half()` and the like: another device or dtype makes other plans."""
        self._plans.forget()
        return super()._apply(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        """A copy or a pickle makes its own plans."""
        return {**self.__dict__, "_plans": None, "_calls": Calls()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._plans = self._no_plans()
        self._tell_layers()

    def _no_plans(self) -> Plans:
        adapters = [entry.adapter for entry in self._entries]
        return Plans(adapters, self._layout, self._sizes, self._kinds, self._places, self._parameters)

    def _tell_layers(self) -> None:
        """Where each layer finds its gates in calls that torch.compile traces."""
        known = self._places.layers[0].__dict__.get("_calls")  # of a shallow copy, whose layers these are as well
        self._calls = Calls() if known is None else known
        for i, (layer, (shift, inputs)) in enumerate(zip(self._places.layers, self._layout, strict=True)):
            start = self.gated[self._entries[i].name].start
            place = place_of((i, -1 if shift is None else shift, -1 if inputs is None else inputs, start))
            layer.__dict__.update(_calls=self._calls, _place=place)
        if self.conditional is not None:
            self.conditional.tell(self._calls, len(self._rows))
        of_linear = {entry.name for entry in self._entries if type(entry.adapter) is Adapter}
        linear = [row.name in of_linear and row.role != "inputs" for row in self._rows]
        self._traced_layout = traced_call.described(
            self._sizes, self._kinds, linear, self.gate_networks is None, self.conditional is not None
        )


def multirate(
    network: nn.Module, gates: Gates | None = None, beta_range: Sequence[float] = DEFAULT_BETA_RANGE,
    *, include: Sequence[str] | None = None, exclude: Sequence[str] = (), norms: str = "gated",
) -> MultiRate:
    """Gate a network that the user already has; its own parameters stay the same objects.

    gates       a kind or GateSpec for every layer, or a mapping from module names to them, the most specific name
                winning; by default {"encoder": "sigmoid", "decoder": "sqrt"} (MR-VAE, Eqn. 7)
    beta_range  (a, b), the range that training samples beta from
    include     gate only these layers (names or patterns with *); one that cannot be gated is an error
    exclude     leave these alone
    norms       "gated": batch norms get gates; "conditional": they compute (w + s(eta)) x_hat + (b + t(eta)), s and t
                each an MLP 1-64-C of eta, and the layers before them are gated too, as in the paper's convolutional
                networks (its Table 1 counts both)

    Linear, Conv, ConvTranspose, LSTM, GRU, and BatchNorm, InstanceNorm, GroupNorm and LayerNorm with an affine are
    gated; `model.left` says of every other layer why not. A layer right before a norm that would divide its gate out
    (batch, instance, or group with a group a channel) is left. The network itself is changed: its gated layers now wait
    for a beta, so call the MultiRate. ValueError for names that are not there, for shared layers, for lazy ones that
    have not run yet, and for a network whose forward has an argument beta of its own.
    A layer's gate acts where the layer is called: code that computes with its weight itself (F.linear(x, layer.weight))
    goes past the gate, and `bake` would differ there. With one beta a sample, axis 0 of what a layer gets is the
    samples, of an LSTM or GRU the axis that its batch_first says: in a network of sequences, (T, N, C), give one beta.
    The backward pass may read a layer's result again: change it in place by torch's operators, which autograd sees, not
    through `.data` or a NumPy array.
    """
    if not isinstance(network, nn.Module):
        raise TypeError(f"network is {network!r}; expected an nn.Module, whose layers get gates")
    if isinstance(network, MultiRate):
        raise ValueError("the network is a MultiRate already; call it with beta, or gate a fresh network")
    return MultiRate(network, gates, beta_range, include, exclude, norms)

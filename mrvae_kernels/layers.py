"""Drop-in layers: torch.nn's own, with a gate of their own that depends on beta.

    y = layer(x, beta) = act(g (W x + b) + t),   g = gate(w eta + c)

Each class is a subclass of torch.nn's, takes its arguments, initialises weight and bias alike (before the gate, so that
a seed gives the same weights) and keeps their `state_dict` keys; added are `gate_weight` and `gate_bias` (C each; the
weight (degree, C) for gates of degree 2 or 3), with FiLM `shift_weight` and `shift_bias`, or `gate_network` for gates
with hidden layers. Further keywords:

    gate        "sigmoid", "sqrt", "softplus" or a GateSpec
    beta_range  (a, b), the range that beta is sampled from in training; saved in the state_dict and checked on loading
    activation  a pointwise non-linearity in the same pass (Linear and convolutions): relu, silu, gelu, tanh,
                leaky_relu, elu

beta is a positive number, a 0-d tensor, or one a sample, shape (N,) with N = x.shape[0].
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from . import functional, reference
from .adapters import ADAPTERS, FoldJob, fold_layers, refusal
from .gates import DEFAULT_BETA_RANGE, Beta, BetaRange, GateNetwork, GateSpec, init_gates_, standardize


def encode_state(state: dict[str, Any]) -> Tensor:
    """A small dictionary as a uint8 tensor of JSON, so that it travels in a state_dict, in safetensors and with
    `torch.load(weights_only=True)`, and survives `.half()`."""
    return torch.tensor(list(json.dumps(state, sort_keys=True).encode()), dtype=torch.uint8)


def check_state(own: dict[str, Any], loaded: object, owner: str) -> None:
    """Compare what a checkpoint says of the gates with what this module has; ValueError names the difference."""
    if isinstance(loaded, Tensor) and loaded.is_floating_point():  # of an average of state_dicts, or after .half()
        loaded = loaded.round().to(torch.uint8)
    try:
        state = json.loads(bytes(loaded.tolist()).decode()) if isinstance(loaded, Tensor) else None
    except (ValueError, TypeError, RecursionError):
        state = None
    if not isinstance(state, dict):
        raise ValueError(f"the checkpoint's record of the gates of this {owner} is unreadable; it is damaged")
    state = {"degree": 1, **state}  # of checkpoints from before there was another
    for key, value in own.items():
        if state.get(key) != value:
            raise ValueError(
                f"the checkpoint was made with {key} = {state.get(key)!r}, this {owner} has {value!r}; "
                f"build it with the checkpoint's {key}"
            )


class Recorded(nn.Module):
    """A module whose state_dict says what its gates are; one of others is refused before this module copies."""

    def _gate_state(self) -> dict[str, Any]:
        raise NotImplementedError

    def get_extra_state(self) -> Tensor:
        return encode_state(self._gate_state())

    def set_extra_state(self, state: object) -> None:
        check_state(self._gate_state(), state, type(self).__name__)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        if (state := state_dict.get(f"{prefix}_extra_state")) is not None:
            self.set_extra_state(state)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class GatedLayer(Recorded):
    """What all gated layers share; `plain` is the torch.nn class that each extends."""

    plain: type[nn.Module]
    gate_weight: nn.Parameter
    gate_bias: nn.Parameter
    shift_weight: nn.Parameter
    shift_bias: nn.Parameter

    def __init__(
        self, *args: Any, gate: str | GateSpec = "sigmoid", beta_range: Sequence[float] = DEFAULT_BETA_RANGE,
        activation: str | None = None, **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._add_gate(gate, beta_range, activation)

    def _add_gate(self, gate: str | GateSpec, beta_range: Sequence[float], activation: str | None) -> None:
        adapter, name = ADAPTERS[self.plain], type(self).__name__
        spec = GateSpec.of(gate)
        if isinstance(spec.inputs, GateSpec):
            kind = spec.inputs.kind
            raise ValueError(f"{name}: inputs={kind!r} gates the inputs of a network's layer; use multirate()")
        if spec.shared:
            raise ValueError(
                f"{name}: shared=True shares hidden layers between the layers of a network; use multirate()"
            )
        if activation is not None and (not adapter.product or activation not in reference.ACTIVATIONS):
            known = ", ".join(reference.ACTIVATIONS) if adapter.product else "None for this kind of layer"
            raise ValueError(f"activation is {activation!r}; expected {known}")
        if reason := refusal(self, spec):
            raise ValueError(f"{name} cannot be gated: {reason}")
        self.gate_spec, self.beta_range, self.activation = spec, BetaRange.of(beta_range), activation
        features = adapter.features(self)
        like = next(self.parameters())
        kinds = [spec.kind, "identity"][: 1 + spec.shift]
        if spec.hidden:
            self.gate_network = GateNetwork(spec.hidden, [features] * len(kinds), kinds, spec.init)
            self.gate_network.to(device=like.device, dtype=like.dtype)
            return
        for prefix, kind in zip(("gate", "shift"), kinds, strict=False):
            shapes = [(features,) if spec.degree == 1 else (spec.degree, features), (features,)]
            pair = [nn.Parameter(torch.empty(shape, device=like.device, dtype=like.dtype)) for shape in shapes]
            init_gates_(pair[0], pair[1], kind, spec.init)
            self.register_parameter(f"{prefix}_weight", pair[0])
            self.register_parameter(f"{prefix}_bias", pair[1])

    @classmethod
    def from_plain(
        cls, layer: nn.Module, gate: str | GateSpec = "sigmoid", beta_range: Sequence[float] = DEFAULT_BETA_RANGE,
        activation: str | None = None,
    ) -> Self:
        """A gated layer around a plain one's own parameters and buffers (shared, not copied).

        Hooks that are on the plain layer are on both; what is set on one later is not on the other. TypeError for
        another class.
        """
        if type(layer) is not cls.plain:
            raise TypeError(f"{cls.__name__}.from_plain takes an nn.{cls.plain.__name__}, not a {type(layer).__name__}")
        gated = _twin(layer)
        gated.__class__ = cls
        gated._add_gate(gate, beta_range, activation)
        return gated

    def to_plain(self, beta: Beta) -> nn.Module:
        """The plain layer at one beta: a copy with the gate folded into weight and bias, without the `activation`."""
        with torch.no_grad():
            folded = self._fold(*self.gate(_one(beta)))
        layer = _twin(self)
        for name in [n for n in (*layer._parameters, *layer._modules) if n.startswith(("gate_", "shift_"))]:
            delattr(layer, name)
        for name in ("gate_spec", "beta_range", "activation"):
            del layer.__dict__[name]
        layer.__class__ = self.plain
        copied = copy.deepcopy(layer)
        write_folded(copied, folded)
        return copied

    def gate(self, beta: Beta) -> tuple[Tensor, Tensor | None]:
        """g and t (None without FiLM) at beta: (C,), or (N, C) for one beta a sample."""
        like = self.gate_network.output.bias if self.gate_spec.hidden else self.gate_weight
        eta = standardize(beta, self.beta_range, device=like.device, dtype=reference.gate_dtype(like.dtype))
        if self.gate_spec.hidden:
            p = self.gate_network(eta.to(like.dtype)).to(eta.dtype)
            parts = p.chunk(2, -1) if self.gate_spec.shift else (p,)
            kinds = (self.gate_spec.kind, "identity")
            values = [reference.gate_activation(part, kind) for part, kind in zip(parts, kinds, strict=False)]
        else:
            size = [len(self.gate_bias)]
            values = functional.gate_bank(self.gate_weight, self.gate_bias, eta, size, [self.gate_spec.kind])
            if self.gate_spec.shift:
                values += functional.gate_bank(self.shift_weight, self.shift_bias, eta, size, ["identity"])
        return values[0], values[1] if self.gate_spec.shift else None

    def forward(self, x: Any, beta: Beta, *args: Any, **kwargs: Any) -> Any:
        """The plain layer's forward with its result gated; further arguments as torch's (hx, output_size)."""
        adapter = ADAPTERS[self.plain]
        gate, shift = self.gate(beta)
        if gate.dim() == 1 and not adapter.product:
            return adapter.run_folded(self, self.plain, self._fold(gate, shift), x, *args, **kwargs)
        return adapter.run(self, gate, shift, self.activation, None, x, *args, **kwargs)

    def _fold(self, gate: Tensor, shift: Tensor | None) -> dict[str, Tensor | None]:
        return fold_layers([FoldJob(self, ADAPTERS[self.plain], gate, shift)])[0]

    def _gate_state(self) -> dict[str, Any]:
        gate = self.gate_spec.kind + ("+shift" if self.gate_spec.shift else "")
        return {"beta_range": list(self.beta_range), "gate": gate, "degree": self.gate_spec.degree}

    def extra_repr(self) -> str:
        inherited = super().extra_repr()
        degree = "" if self.gate_spec.degree == 1 else f", degree={self.gate_spec.degree}"
        gate = f"gate={self.gate_spec.kind}{degree}, beta_range={tuple(self.beta_range)}"
        return f"{inherited}, {gate}".removeprefix(", ")


def _twin(layer: nn.Module) -> Any:
    """The layer again, its parameters and buffers the same ones, in containers of its own: those of parameters, hooks
    and buffers that are not saved, and an LSTM's list of weights."""
    twin = copy.copy(layer)
    own = {name: copy.copy(value) for name, value in vars(twin).items() if isinstance(value, (dict, list, set))}
    vars(twin).update(own)
    return twin


def _one(beta: Beta) -> Beta:
    if getattr(beta, "ndim", 0) > 0 or isinstance(beta, Sequence):
        raise ValueError(f"beta is {beta!r}; a plain layer or network holds one beta: give a number")
    return beta


def write_folded(layer: nn.Module, folded: dict[str, Tensor | None]) -> None:
    """Put folded tensors in a plain layer's parameters, keeping requires_grad; a bias that a shift made is added."""
    for name, value in folded.items():
        if value is not None:
            before = layer._parameters[name]
            trainable = True if before is None else before.requires_grad
            setattr(layer, name, nn.Parameter(value.detach().clone(), requires_grad=trainable))
    ADAPTERS[type(layer)].settle(layer)


class GatedLinear(GatedLayer, nn.Linear):
    """y = act(g (x W^T + b) + t), g and t one a feature: nn.Linear's arguments, plus the gate (MR-VAE, Eqn. 8)."""

    plain = nn.Linear


class GatedConv1d(GatedLayer, nn.Conv1d):
    """nn.Conv1d with one gate a filter (MR-VAE, Eqn. 40 and 41)."""

    plain = nn.Conv1d


class GatedConv2d(GatedLayer, nn.Conv2d):
    """nn.Conv2d with one gate a filter (MR-VAE, Eqn. 40 and 41)."""

    plain = nn.Conv2d


class GatedConv3d(GatedLayer, nn.Conv3d):
    """nn.Conv3d with one gate a filter (MR-VAE, Eqn. 40 and 41)."""

    plain = nn.Conv3d


class GatedConvTranspose1d(GatedLayer, nn.ConvTranspose1d):
    """nn.ConvTranspose1d with one gate an output channel."""

    plain = nn.ConvTranspose1d


class GatedConvTranspose2d(GatedLayer, nn.ConvTranspose2d):
    """nn.ConvTranspose2d with one gate an output channel."""

    plain = nn.ConvTranspose2d


class GatedConvTranspose3d(GatedLayer, nn.ConvTranspose3d):
    """nn.ConvTranspose3d with one gate an output channel."""

    plain = nn.ConvTranspose3d


class GatedLSTM(GatedLayer, nn.LSTM):
    """nn.LSTM with every gate row (4 H a layer and direction) scaled before its non-linearity.

    One beta a batch folds into the weights and runs torch's kernel; one a sample runs a written-out recurrence.
    """

    plain = nn.LSTM


class GatedGRU(GatedLayer, nn.GRU):
    """nn.GRU with every gate row (3 H a layer and direction) scaled before its non-linearity; see GatedLSTM."""

    plain = nn.GRU


class GatedBatchNorm1d(GatedLayer, nn.BatchNorm1d):
    """y = g (w x_hat + b) + t: the gate sits in the affine, after the normalisation, which would cancel it before."""

    plain = nn.BatchNorm1d


class GatedBatchNorm2d(GatedLayer, nn.BatchNorm2d):
    """y = g (w x_hat + b) + t: the gate sits in the affine, after the normalisation, which would cancel it before."""

    plain = nn.BatchNorm2d


class GatedBatchNorm3d(GatedLayer, nn.BatchNorm3d):
    """y = g (w x_hat + b) + t: the gate sits in the affine, after the normalisation, which would cancel it before."""

    plain = nn.BatchNorm3d


class GatedGroupNorm(GatedLayer, nn.GroupNorm):
    """nn.GroupNorm with one gate a channel in its affine."""

    plain = nn.GroupNorm


class GatedLayerNorm(GatedLayer, nn.LayerNorm):
    """nn.LayerNorm with one gate a normalised element in its affine."""

    plain = nn.LayerNorm

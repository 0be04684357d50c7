"""The networks that are set side by side: one VAE, gated in the ways that a user could gate it.

    ungated        the plain network
    gated          multirate(network), one beta a step
    per-sample     multirate(network), one beta an example
    listing1       the MR-VAE paper's Listing 1: an nn.Linear(1, C), an activation and a multiplication after each
                   gated layer, one beta an example as in the authors' code
    plain-fold     folding written with plain PyTorch operations, a layer at a time, one beta a step

All gate the layers that `multirate` gates, by the same gates, so that they compute the same function of beta. Of other
gates, one beta an example, is

    recipe          what `mrvae train` trains unless told otherwise: for an MLP or a convolutional network gates that
                    are cubic in log beta, a FiLM shift each, and gates on the decoder's inputs

and, where they are asked for, "gated-cubic" and "per-sample-cubic": the gates of the first two, cubic in log beta.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from mrvae_models.recipes import gate_fields, recipe_options
from torch import Tensor, nn
from torch.func import functional_call

import mrvae_kernels as mk
from mrvae_kernels.reference import along, fold, gate_activation

BETA_RANGE = mk.BetaRange(0.01, 10.0)
KINDS = {"encoder": "sigmoid", "decoder": "sqrt"}
RECIPE = "recipe"
VARIANTS = ("ungated", "gated", "per-sample", RECIPE, "listing1", "plain-fold")
CUBIC = ("gated-cubic", "per-sample-cubic")
OURS = ("gated", "per-sample", RECIPE, *CUBIC)
ONE_A_SAMPLE = ("per-sample", RECIPE, "listing1", "per-sample-cubic")
"""The variants that take one beta an example; the others take one a step."""

Gates = dict[str, tuple[Tensor, Tensor]]
"""Layer name -> (w, c) of its gate act(w eta + c), (C,) each, or w (3, C) of cubic ones. Of its shift under
"<layer>.shift", of the gate on its inputs under "<layer>.inputs"."""

Of = Callable[[nn.Parameter], Tensor]
"""What is asked of each parameter that holds gates: its value, or its gradient."""

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.GroupNorm)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def kind_of(name: str) -> str:
    """The gate's activation for the layer of this name, where KINDS were asked for."""
    return KINDS[name.split(".")[0]]


def kinds_of(model: nn.Module) -> dict[str, str]:
    """The same by the name in Gates, of a MultiRate with other gates; empty for other networks."""
    if not isinstance(model, mk.MultiRate):
        return {}
    suffix = {"gated": "", "shifts": ".shift", "inputs": ".inputs"}
    return {row.name + suffix[row.role]: row.kind for row in model._rows}


def channel_axis(layer: nn.Module, ndim: int) -> int:
    """The axis of the layer's output that its gate scales. ValueError for a kind of layer that is not known here."""
    if isinstance(layer, nn.Linear):
        return ndim - 1
    if isinstance(layer, (*CONVOLUTIONS, *NORMS)):
        return 1
    raise ValueError(
        f"a {type(layer).__name__} has no gate in plain PyTorch here; expected Linear, convolutions or batch and group "
        "norms: extend bench/overhead_networks.py"
    )


def eta_of(beta: Tensor) -> Tensor:
    """(log beta - mean) / std."""
    return (beta.log() - BETA_RANGE.mean) / BETA_RANGE.std


class Listing1(nn.Module):
    """A layer and the gate after it, as the paper's Listing 1 prints it (`torch.activation_fnc` read as the module)."""

    def __init__(self, layer: nn.Module, features: int, kind: str) -> None:
        super().__init__()
        self.layer = layer
        self.hyper_block_scale = nn.Linear(1, features, device=next(layer.parameters()).device)
        self.kind = kind
        self.eta = torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        scale = gate_activation(self.hyper_block_scale(self.eta), self.kind)
        return along(scale, channel_axis(self.layer, y.dim()), y.dim()) * y


class Listing1Network(nn.Module):
    """A network with Listing 1 after every layer of `gates`; beta is (N,)."""

    def __init__(self, network: nn.Module, gates: Gates) -> None:
        super().__init__()
        self.network = network
        self.places: dict[str, Listing1] = {}
        for name, (weight, bias) in gates.items():
            gate = Listing1(network.get_submodule(name), len(weight), kind_of(name))
            with torch.no_grad():
                gate.hyper_block_scale.weight.copy_(weight.unsqueeze(1))
                gate.hyper_block_scale.bias.copy_(bias)
            parent, _, child = name.rpartition(".")
            setattr(network.get_submodule(parent), child, gate)
            self.places[name] = gate

    def gates(self, of: Of) -> Gates:
        pairs = {name: gate.hyper_block_scale for name, gate in self.places.items()}
        return {name: (of(pair.weight).squeeze(1), of(pair.bias)) for name, pair in pairs.items()}

    def forward(self, x: Tensor, beta: Tensor) -> Any:
        eta = eta_of(beta).unsqueeze(-1)
        for gate in self.places.values():
            gate.eta = eta
        return self.network(x)


class PlainFoldNetwork(nn.Module):
    """Folding with plain PyTorch: g * W and g * b for every layer of `gates`, then functional_call; beta is 0-d."""

    def __init__(self, network: nn.Module, gates: Gates) -> None:
        super().__init__()
        self.network = network
        self.hyper = nn.ParameterDict({
            name.replace(".", "-"): nn.Parameter(torch.stack(pair)) for name, pair in gates.items()
        })
        self.names = list(gates)
        for name in self.names:
            channel_axis(network.get_submodule(name), 2)  # refuses what `fold` would misread

    def gates(self, of: Of) -> Gates:
        pairs = {name: of(self.hyper[name.replace(".", "-")]) for name in self.names}
        return {name: (pair[0], pair[1]) for name, pair in pairs.items()}

    def forward(self, x: Tensor, beta: Tensor) -> Any:
        eta = eta_of(beta)
        tensors: dict[str, Tensor] = {}
        for name in self.names:
            layer: Any = self.network.get_submodule(name)
            groups = layer.groups if getattr(layer, "transposed", False) else 0
            weight, bias = self.hyper[name.replace(".", "-")]
            gate = gate_activation(weight * eta + bias, kind_of(name))
            scaled = "gain" if isinstance(layer, mk.WeightNormConv2d) else "weight"  # the norm would cancel the gate
            folded = fold(layer.get_parameter(scaled), layer.bias, gate, None, groups)
            pairs = zip((f"{name}.{scaled}", f"{name}.bias"), folded, strict=True)
            tensors.update((key, value) for key, value in pairs if value is not None)
        return functional_call(self.network, tensors, (x,))


def bank_gates(model: mk.MultiRate, of: Of) -> Gates:
    """The gates in a MultiRate's flat parameters."""
    assert model.gate_weight is not None and model.gate_bias is not None
    weight, bias = of(model.gate_weight), of(model.gate_bias)
    slices = dict(model.gated)
    slices |= {f"{name}.shift": rows for name, rows in model.shifts.items()}
    slices |= {f"{name}.inputs": rows for name, rows in model.inputs.items()}
    return {name: (weight[..., rows], bias[rows]) for name, rows in slices.items()}


def recipe_gates(recipe: str) -> dict[str, mk.GateSpec]:
    """The gates of one of mrvae_models' recipes."""
    options = recipe_options(recipe)
    found = {}
    for module, text in options["gates"].items():
        fields = gate_fields(text, options["gate_init"], options["gate_degree"])
        inputs = fields.pop("inputs", None)
        found[module] = mk.GateSpec(**fields, inputs=None if inputs is None else mk.GateSpec(**inputs))
    return found


def gated_network(
    network: nn.Module, variant: str, recipe: str = "ranked"
) -> tuple[nn.Module, Callable[[Of], Gates]]:
    """The network gated as the variant says, and a function that gives what is asked of its gates.

    The network itself is taken over: its parameters stay the same objects. Gates are the same for every variant but
    "recipe", whose are those of `recipe`, and the cubic ones. ValueError for a variant that is not known.
    """
    if variant == "ungated":
        return network, lambda of: {}
    if variant not in (*VARIANTS, *CUBIC):
        raise ValueError(f"variant is {variant!r}; expected one of {', '.join((*VARIANTS, *CUBIC))}")
    ours = variant in OURS
    degree = 3 if variant in CUBIC else 1
    gates = {part: mk.GateSpec(kind, degree=degree) for part, kind in KINDS.items()}
    if variant == RECIPE:
        gates = recipe_gates(recipe)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = mk.multirate(network if ours else copy.deepcopy(network), gates, BETA_RANGE)
        if variant in (RECIPE, *CUBIC):
            # bends and shifts start at 0, where a kernel that leaves them out would be right
            for parameter in model.gate_parameters():
                with torch.no_grad():
                    parameter.add_(0.1 * torch.randn_like(parameter, device="cpu"))
    if ours:
        return model, lambda of: bank_gates(model, of)
    values = bank_gates(model, lambda parameter: parameter.detach().clone())
    other = Listing1Network(network, values) if variant == "listing1" else PlainFoldNetwork(network, values)
    return other, other.gates

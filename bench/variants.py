"""The ways to train a network at many betas that the benchmark sets side by side.

    ungated        the plain network
    gated          multirate(network), one beta a step
    per-sample     multirate(network), one beta an example
    listing1       the MR-VAE paper's Listing 1: an nn.Linear(1, C), an activation and a multiplication after each layer
    plain-fold     folding written with plain PyTorch operations, a layer at a time
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from mrvae_models.networks import build
from mrvae_models.objectives import beta_vae
from torch import Tensor, nn
from torch.func import functional_call

import mrvae_kernels as mk
from mrvae_kernels.reference import fold, gate_activation

BETA_RANGE = mk.BetaRange(0.01, 10.0)
KINDS = {"encoder": "sigmoid", "decoder": "sqrt"}
PRODUCTS = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)


class Listing1(nn.Module):
    """A layer and the gate after it, as the paper's Listing 1 prints it (`torch.activation_fnc` read as the module)."""

    def __init__(self, layer: nn.Module, features: int, kind: str) -> None:
        super().__init__()
        self.layer = layer
        self.hyper_block_scale = nn.Linear(1, features)
        self.kind = kind
        self.eta = torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        scale = gate_activation(self.hyper_block_scale(self.eta), self.kind)
        if y.dim() == 4:
            scale = scale.unsqueeze(-1).unsqueeze(-1)
        return scale * y


class Listing1Network(nn.Module):
    """A network with Listing 1 after every product, beta as (N, 1) as in the authors' code."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.gates: list[Listing1] = []
        for name, layer in list(network.named_modules()):
            if isinstance(layer, PRODUCTS):
                features = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
                gate = Listing1(layer, features, KINDS[name.split(".")[0]])
                parent, _, child = name.rpartition(".")
                setattr(network.get_submodule(parent), child, gate)
                self.gates.append(gate)

    def forward(self, x: Tensor, beta: Tensor) -> Any:
        eta = ((beta.log() - BETA_RANGE.mean) / BETA_RANGE.std).unsqueeze(-1)
        for gate in self.gates:
            gate.eta = eta
        return self.network(x)


class PlainFoldNetwork(nn.Module):
    """Folding with plain PyTorch: g * W and g * b for every product, then functional_call."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.hyper = nn.ParameterDict()
        self.layers: list[tuple[str, str, int]] = []
        for name, layer in network.named_modules():
            if isinstance(layer, PRODUCTS):
                features = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
                self.hyper[name.replace(".", "-")] = nn.Parameter(torch.empty(2, features).uniform_(-1, 1))
                groups = layer.groups if isinstance(layer, nn.ConvTranspose2d) else 0
                self.layers.append((name, KINDS[name.split(".")[0]], groups))

    def forward(self, x: Tensor, beta: Tensor) -> Any:
        eta = (beta.log() - BETA_RANGE.mean) / BETA_RANGE.std
        tensors = {}
        for name, kind, groups in self.layers:
            layer = self.network.get_submodule(name)
            weight, bias = self.hyper[name.replace(".", "-")]
            gate = gate_activation(weight * eta + bias, kind)
            tensors[f"{name}.weight"], tensors[f"{name}.bias"] = fold(layer.weight, layer.bias, gate, None, groups)
        return functional_call(self.network, tensors, (x,))


def betas() -> Iterator[float]:
    """Log-uniform on the range, for ever."""
    generator = torch.Generator().manual_seed(0)
    low, high = math.log(BETA_RANGE.low), math.log(BETA_RANGE.high)
    while True:
        yield from (low + (high - low) * torch.rand(1024, generator=generator)).exp().tolist()


def training_step(
    variant: str, network: str, shape: tuple[int, ...], batch: int, compiled: bool = False, **options: Any
) -> Callable[[], Tensor]:
    """One optimiser step of a variant on the next of eight random batches: forward, loss, backward, fused Adam.

    Every variant starts from the same weights. The returned function gives the loss.
    """
    torch.manual_seed(0)
    vae = build(network, shape, **options)
    likelihood = vae.likelihood
    images = torch.rand(8, batch, *shape)
    model: nn.Module = copy.deepcopy(vae)
    if variant in ("gated", "per-sample"):
        model = mk.multirate(model, KINDS, BETA_RANGE)
    elif variant == "listing1":
        model = Listing1Network(model)
    elif variant == "plain-fold":
        model = PlainFoldNetwork(model)
    elif variant != "ungated":
        raise ValueError(f"variant is {variant!r}; expected ungated, gated, per-sample, listing1 or plain-fold")
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True)
    call = torch.compile(model) if compiled else model
    draw, counter = betas(), iter(range(10**9))

    def step() -> Tensor:
        x, beta = images[next(counter) % 8], next(draw)
        if variant == "ungated":
            output = call(x)
        elif variant == "gated":
            output = call(x, beta=torch.tensor(beta) if compiled else beta)
        elif variant == "plain-fold":
            output = call(x, torch.tensor(beta))
        else:
            spread = torch.full((batch,), beta)
            output = call(x, beta=spread) if variant == "per-sample" else call(x, spread)
        loss = beta_vae(output, x, beta, likelihood).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    step.model = model  # type: ignore[attr-defined]
    return step

"""One gated layer with its activation, computed in every way that the layer benchmark sets side by side.

    library            act(layer(x)): no gate at all, the baseline
    separate           act(g * layer(x)): the library's layer, then elementwise operations
    listing1           the MR-VAE paper's Listing 1: nn.Linear(1, C), an activation, a multiplication; also compiled
    plain-fold         W' = g W, b' = g b with plain PyTorch operations, then the library's layer
    fold triton, fold cpp, ... this package's strategies (fold, epilogue, fused), each on both backends of a GPU
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mrvae_kernels as mk
from mrvae_kernels import ops
from mrvae_kernels import strategy as choices
from mrvae_kernels.backends import triton_refusals
from mrvae_kernels.reference import CONVOLUTIONS, activate, along, fold, gate_activation

from .shapes import Case

BACKENDS = ("cpp", "triton")
OURS = tuple(f"{strategy} {backend}" for strategy in choices.STRATEGIES for backend in BACKENDS)
OTHERS = ("library", "separate", "listing1", "listing1 compiled", "plain-fold")
VARIANTS = (*OTHERS, *OURS)


def absent(device: torch.device) -> dict[str, str]:
    """The backends that have no kernels for this device, and why; what the core has for a CPU is not meant here."""
    reasons = {}
    if not ops.EXTENSION:
        reasons["cpp"] = str(ops.EXTENSION_ERROR)
    elif ops.GPU_TYPE != device.type:
        reasons["cpp"] = ops.CUDA_ERROR or f"its kernels take {ops.GPU_TYPE} tensors, the device is {device}"
    if refusals := triton_refusals(device, torch.float32):
        reasons["triton"] = "; ".join(refusals)
    return reasons


def ours(device: torch.device, backends: Sequence[str] = BACKENDS) -> tuple[str, ...]:
    """Those of OURS whose backend, one of these, has kernels for the device."""
    there = set(backends) - set(absent(device))
    return tuple(name for name in OURS if name.partition(" ")[2] in there)


class GatedCase:
    """A case's tensors on a device, and y = act(g (product(x) + b)) by each variant that can run there.

    A variant of ours leaves the override of its backend in force, since putting back the one before would count as its
    host time: run it within `mk.override()`, which does that at the end.
    """

    def __init__(self, case: Case, batch: int, dtype: torch.dtype, device: torch.device, copies: int = 1) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float32, device=device)

        self.case, self.layer = case, case.layer(device, dtype)
        self.inputs = [draw(batch, *case.shape).to(dtype).requires_grad_() for _ in range(copies)]
        features = case.features()
        self.gate = torch.rand(features, generator=generator, device=device).add_(0.1).requires_grad_()
        # Listing 1: one beta an example, as in the authors' code
        self.response = nn.Linear(1, features, device=device, dtype=dtype)
        self.eta = draw(batch, 1).to(dtype)
        self.grad: Tensor | None = None
        self._functions: dict[str, Callable[[Tensor], Tensor]] = {}
        for name in OTHERS:
            function = getattr(self, "_" + name.partition(" ")[0].replace("-", "_"))
            self._functions[name] = torch.compile(function, dynamic=False) if name.endswith(" compiled") else function
        for name in ours(device):
            self._functions[name] = self._on_backend(*name.split())

    @property
    def names(self) -> tuple[str, ...]:
        """The variants that can run."""
        return tuple(self._functions)

    def leaves(self, name: str, x: Tensor) -> list[Tensor]:
        """What backward differentiates by."""
        own = [x, *self.layer.parameters()]
        if name.startswith("listing1"):
            return own + list(self.response.parameters())
        return own if name == "library" else [*own, self.gate]

    def forward(self, name: str, x: Tensor) -> Tensor:
        """y by that variant."""
        return self._functions[name](x)

    def both(self, name: str, x: Tensor) -> tuple[Tensor, ...]:
        """y, and its gradients by `leaves` for a fixed random gradient of y."""
        y = self.forward(name, x)
        if self.grad is None:
            self.grad = torch.randn(y.shape, device=y.device, dtype=torch.float32).to(y.dtype)
        return (y.detach(), *torch.autograd.grad(y, self.leaves(name, x), self.grad))

    def exact(self, x: Tensor) -> ExactCase:
        """The same layer in float64."""
        return ExactCase(self, x)

    def steps(self, name: str, backward: bool) -> Callable[[], Any]:
        """A function without arguments that runs the variant on the next of the inputs."""
        inputs = self._next()
        if backward:
            return lambda: self.both(name, next(inputs))

        def forward_only() -> Tensor:
            with torch.no_grad():
                return self.forward(name, next(inputs))

        return forward_only

    def _next(self) -> Iterator[Tensor]:
        while True:
            yield from self.inputs

    # ---- the variants ------------------------------------------------------------------------------------------------

    def _activate(self, y: Tensor) -> Tensor:
        return activate(y, self.case.activation)

    def _along(self, gate: Tensor, y: Tensor) -> Tensor:
        return along(gate, y.dim() - 1 if self.case.kind is nn.Linear else 1, y.dim())

    def _library(self, x: Tensor) -> Tensor:
        return self._activate(self.layer(x))

    def _separate(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return self._activate(y * self._along(self.gate.to(y.dtype), y))

    def _listing1(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return self._activate(self._along(gate_activation(self.response(self.eta), "sigmoid"), y) * y)

    def _plain_fold(self, x: Tensor) -> Tensor:
        layer: Any = self.layer
        groups = layer.groups if self.case.kind is nn.ConvTranspose2d else 0
        weight, bias = fold(layer.weight, layer.bias, self.gate, None, groups)
        if self.case.kind is nn.Linear:
            return self._activate(F.linear(x, weight, bias))
        padding = {"output_padding": layer.output_padding} if layer.transposed else {}
        convolve = CONVOLUTIONS[layer.transposed][1]
        geometry = {name: getattr(layer, name) for name in ("stride", "padding", "dilation", "groups")}
        return self._activate(convolve(x, weight, bias, **geometry, **padding))

    def _on_backend(self, strategy: str, backend: str) -> Callable[[Tensor], Tensor]:
        chosen = choices.Override(backend=backend)

        def run(x: Tensor) -> Tensor:
            choices._override = chosen  # mk.override() would cost host time, which is measured
            return self._ours(x, strategy)

        return run

    def _ours(self, x: Tensor, strategy: str) -> Tensor:
        layer: Any = self.layer
        arguments = (x, layer.weight, layer.bias, self.gate)
        act = self.case.activation
        if self.case.kind is nn.Linear:
            return mk.gated_linear(*arguments, activation=act, strategy=strategy)
        if layer.transposed:
            return mk.gated_conv_transpose2d(
                *arguments, None, layer.stride, layer.padding, layer.output_padding, layer.groups, layer.dilation, act,
                strategy=strategy,
            )
        return mk.gated_conv2d(
            *arguments, None, layer.stride, layer.padding, layer.dilation, layer.groups, act, strategy=strategy
        )


class ExactCase:
    """A gated case in float64: z = g (product(x) + b), y = act(z) and the gradients."""

    def __init__(self, gated: GatedCase, x: Tensor) -> None:
        assert gated.grad is not None, "y's gradient is drawn by the first backward"
        layer = gated.case.layer(x.device, torch.float64)
        layer.load_state_dict(gated.layer.state_dict())
        gate, wide = (tensor.detach().double().requires_grad_() for tensor in (gated.gate, x))
        product = layer(wide)
        self.activation, self.grad = gated.case.activation, gated.grad.double()
        self.leaves = [wide, *layer.parameters(), gate]
        self.z = product * gated._along(gate, product)
        self.y = activate(self.z, self.activation)

    def gradients(self, computed: Tensor) -> tuple[Tensor, ...]:
        """By x, weight, bias and gate, as `GatedCase.both` has them, for the y that was computed.

        relu's slope jumps: where z is nearly 0 its computed sign is rounding's, and one gradient differs by all of
        itself. Taking that sign from the computed y leaves the arithmetic to compare.
        """
        y = torch.where(computed > 0, self.z, 0.0) if self.activation == "relu" else self.y
        return torch.autograd.grad(y, self.leaves, self.grad, retain_graph=True)

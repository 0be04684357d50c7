"""One gated layer with its activation, computed in every way that the layer benchmarks set side by side.

    library            act(layer(x)): no gate at all, the baseline
    separate           act(g * layer(x)): the library's layer, then elementwise operations, with one gate a batch;
                       "separate per-sample" with one an example, which is Listing 1 where its gate is ready
    listing1           the MR-VAE paper's Listing 1: nn.Linear(1, C), an activation, a multiplication, for one beta an
                       example; also compiled. Of an LSTM, whose gates act before its non-linearities, the recurrence
                       written out
    plain-fold         W' = g W, b' = g b with plain PyTorch operations, then the library's layer
    fold cpp, ...      this package's strategies (fold, epilogue, fused), each on every backend (cpp, triton,
                       reference), for one beta a batch; "epilogue cpp per-sample" and the like for one beta an example

Only listing1 computes its gate from beta, forward and backward; every other variant is handed one that is ready, and
gives its gradient. A network's gates are computed in one operator for all of its layers, which a single layer cannot
show. So per-sample variants are to be held against "separate per-sample", and the others against "separate" and
"plain-fold"; `bench.overhead` times whole networks, gates included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import mrvae_kernels as mk
from mrvae_kernels import backends, functional, ops
from mrvae_kernels import strategy as choices
from mrvae_kernels.adapters import ADAPTERS, FoldJob, fold_layers
from mrvae_kernels.backends import triton_refusals
from mrvae_kernels.recurrent import gated_recurrent
from mrvae_kernels.reference import CONVOLUTIONS, activate, along, fold, gate_activation

from .shapes import Case

BACKENDS = ("cpp", "triton")
"""Those with kernels of a GPU's own."""
OURS = tuple(f"{strategy} {backend}" for strategy in choices.STRATEGIES for backend in BACKENDS)
OTHERS = ("library", "separate", "separate per-sample", "listing1", "listing1 compiled", "plain-fold")
VARIANTS = (*OTHERS, *OURS)
EVERY = (
    *OTHERS, *(f"{strategy} {backend}" for strategy in choices.STRATEGIES for backend in backends.BACKENDS),
    *(f"{strategy} {backend} per-sample" for strategy in ("epilogue", "fused") for backend in backends.BACKENDS),
)
"""Plain PyTorch too, and one beta an example."""
PER_SAMPLE = " per-sample"
INSIDE = "an LSTM's gates act before its non-linearities, inside the library's kernel, so that one beta a batch folds"


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


def refusal(name: str, case: Case, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why one of EVERY is not timed for this kind of layer on this device, or None; the layer's geometry may be refused
    when it runs, by ValueError."""
    recurrent, product = case.kind is nn.LSTM, ADAPTERS[case.kind].product
    if name == "listing1 compiled":
        return "torch.compile unrolls the recurrence, for minutes" if recurrent else None
    if name.startswith("separate"):
        return INSIDE if recurrent else None
    if name in OTHERS:
        return None
    strategy, backend, *per_sample = name.split()
    if reasons := backends.refusals(backend, device, dtype, strategy):
        return "; ".join(reasons)
    if backend == "triton" and device.type == "cpu":
        return "on a CPU Triton's kernels run in its interpreter, whose times say nothing"
    if strategy == "fused" and not product:
        return f"the fused kernels are for Linear, Conv2d and ConvTranspose2d, this is a {case.kind.__name__}"
    if strategy == "epilogue" and recurrent:
        return "one beta an example is the recurrence written out, listing1 here" if per_sample else INSIDE
    return None


class GatedCase:
    """A case's tensors on a device, and y = act(g (product(x) + b)) by each variant that can run there.

    A variant of ours leaves the override of its backend in force, since putting back the one before would count as its
    host time: run it within `mk.override()`, which does that at the end.
    """

    def __init__(
        self, case: Case, batch: int, dtype: torch.dtype, device: torch.device, copies: int = 1,
        variants: Sequence[str] | None = None,
    ) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float32, device=device)

        self.case, self.layer = case, case.layer(device, dtype)
        # an LSTM whose parameters functional_call has replaced is not at once the same again
        self.shell = case.layer(device, dtype)
        self.inputs = [draw(batch, *case.shape).to(dtype).requires_grad_() for _ in range(copies)]
        features = case.features()
        self.gate, self.gates = (
            torch.rand(shape, generator=generator, device=device).add_(0.1).requires_grad_()
            for shape in ((features,), (batch, features))
        )
        # Listing 1: one beta an example, as in the authors' code
        self.response = nn.Linear(1, features, device=device, dtype=dtype)
        self.eta = draw(batch, 1).to(dtype)
        self.grad: Tensor | None = None
        self._functions: dict[str, Callable[[Tensor], Tensor]] = {}
        for name in (*OTHERS, *ours(device)) if variants is None else variants:
            if name in OTHERS:
                plain, compiled = name.removesuffix(" compiled"), name.endswith(" compiled")
                function = getattr(self, "_" + plain.replace("-", "_").replace(" ", "_"))
                self._functions[name] = torch.compile(function, dynamic=False) if compiled else function
            else:
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
        if name == "library":
            return own
        return [*own, self.gates if name.endswith(PER_SAMPLE) else self.gate]

    def forward(self, name: str, x: Tensor) -> Tensor:
        """y by that variant."""
        return self._functions[name](x)

    def both(self, name: str, x: Tensor) -> tuple[Tensor, ...]:
        """y, and its gradients by `leaves` for a fixed random gradient of y."""
        y = self.forward(name, x)
        if self.grad is None:
            self.grad = torch.randn(y.shape, device=y.device, dtype=torch.float32).to(y.dtype)
        return (y.detach(), *torch.autograd.grad(y, self.leaves(name, x), self.grad))

    def exact(self, x: Tensor, name: str = "separate") -> ExactCase:
        """The same layer in float64, with the gate of that variant."""
        return ExactCase(self, x, name)

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
        return self._activate(only(self.layer(x)))

    def _separate(self, x: Tensor) -> Tensor:
        return self._activate(self._times(self.gate, self.layer(x)))

    def _separate_per_sample(self, x: Tensor) -> Tensor:
        return self._activate(self._times(self.gates, self.layer(x)))

    def _times(self, gate: Tensor, y: Tensor) -> Tensor:
        return y * self._along(gate.to(y.dtype), y)

    def _listing1(self, x: Tensor) -> Tensor:
        gate = gate_activation(self.response(self.eta), "sigmoid")
        if self.case.kind is nn.LSTM:
            return gated_recurrent(self.layer, gate, None, x)[0]
        y = self.layer(x)
        return self._activate(self._along(gate, y) * y)

    def _plain_fold(self, x: Tensor) -> Tensor:
        layer: Any = self.layer
        if not ADAPTERS[self.case.kind].product:
            return self._activate(only(functional_call(self.shell, scaled(layer, self.gate), (x,))))
        groups = layer.groups if self.case.kind is nn.ConvTranspose2d else 0
        weight, bias = fold(layer.weight, layer.bias, self.gate, None, groups)
        if self.case.kind is nn.Linear:
            return self._activate(F.linear(x, weight, bias))
        padding = {"output_padding": layer.output_padding} if layer.transposed else {}
        convolve = CONVOLUTIONS[layer.transposed][1]
        geometry = {name: getattr(layer, name) for name in ("stride", "padding", "dilation", "groups")}
        return self._activate(convolve(x, weight, bias, **geometry, **padding))

    def _on_backend(self, strategy: str, backend: str, per_sample: str = "") -> Callable[[Tensor], Tensor]:
        chosen = choices.Override(backend=backend)
        gate = self.gates if per_sample else self.gate
        compute = self._ours if ADAPTERS[self.case.kind].product else self._ours_folded

        def run(x: Tensor) -> Tensor:
            choices._override = chosen  # mk.override() would cost host time, which is measured
            return compute(x, strategy, gate)

        return run

    def _ours(self, x: Tensor, strategy: str, gate: Tensor) -> Tensor:
        layer: Any = self.layer
        arguments = (x, layer.weight, layer.bias, gate)
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

    def _ours_folded(self, x: Tensor, strategy: str, gate: Tensor) -> Tensor:
        """Of a norm or an LSTM, for which a network's gates fold or, after a norm, scale its result."""
        adapter = ADAPTERS[self.case.kind]
        if strategy == "epilogue":
            return functional.epilogue(self.layer(x), None, gate, None, 1, self.case.activation)
        (folded,) = fold_layers([FoldJob(self.layer, adapter, gate, None)])
        return self._activate(only(adapter.run_folded(self.layer, self.case.kind, folded, x)))


def only(y: Any) -> Tensor:
    """The output, of an LSTM without the last state."""
    return y[0] if isinstance(y, tuple) else y


def scaled(layer: nn.Module, gate: Tensor) -> dict[str, Tensor]:
    """A norm's or an LSTM's parameters, each row times its gate, with plain PyTorch operations."""
    return {name: fold(value, None, gate)[0] for name, value in layer.named_parameters()}


class ExactCase:
    """A gated case in float64: z = g product, y = act(z) and the gradients, with the gate of a variant.

    product: the plain layer's result, bias included; None for an LSTM, within which the gates are.
    """

    def __init__(self, gated: GatedCase, x: Tensor, name: str = "separate") -> None:
        assert gated.grad is not None, "y's gradient is drawn by the first backward"
        layer = gated.case.layer(x.device, torch.float64)
        layer.load_state_dict(gated.layer.state_dict())
        wide = x.detach().double().requires_grad_()
        self.activation, self.grad = gated.case.activation, gated.grad.double()
        self.leaves = [wide, *layer.parameters()]
        self.product: Tensor | None = None
        gate: Tensor | None = None
        if name.startswith("listing1"):
            response = nn.Linear(1, gated.gate.shape[0], device=x.device, dtype=torch.float64)
            response.load_state_dict(gated.response.state_dict())
            self.leaves += response.parameters()
            gate = gate_activation(response(gated.eta.double()), "sigmoid")
        elif name != "library":
            gate = (gated.gates if name.endswith(PER_SAMPLE) else gated.gate).detach().double().requires_grad_()
            self.leaves.append(gate)
        if gated.case.kind is nn.LSTM:
            if gate is not None and gate.dim() == 2:
                self.z = gated_recurrent(layer, gate, None, wide)[0]
            else:
                self.z = functional_call(layer, {} if gate is None else scaled(layer, gate), (wide,))[0]
        else:
            self.product = layer(wide)
            self.z = self.product if gate is None else self.product * gated._along(gate, self.product)
        self.y = activate(self.z, self.activation)

    def gradients(self, computed: Tensor) -> tuple[Tensor, ...]:
        """By `GatedCase.leaves`, as `GatedCase.both` has them, for the y that was computed.

        relu's slope jumps: where z is nearly 0 its computed sign is rounding's, and one gradient differs by all of
        itself. Taking that sign from the computed y leaves the arithmetic to compare.
        """
        y = torch.where(computed > 0, self.z, 0.0) if self.activation == "relu" else self.y
        return torch.autograd.grad(y, self.leaves, self.grad, retain_graph=True)

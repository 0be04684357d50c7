"""What a gate means for each kind of torch.nn layer: its features, how it folds, how it runs.

A layer's gate has one feature an output feature (Linear), filter (convolutions), channel (norms, in the affine) or gate
row (LSTM, GRU: 4 H or 3 H for each layer and direction). Everything that differs between kinds of layers is here;
`layers`, `multirate` and `bake` treat them alike.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.instancenorm import _InstanceNorm

from . import functional, sample_norms
from .gates import GateSpec
from .recurrent import gated_recurrent, recurrent_rows
from .reference import Geometry, along
from .strategy import Product
from .weight_norm import WeightNormConv2d


class FoldEntry(NamedTuple):
    """One weight (and bias) of a layer that folding scales, by parameter name.

    rows: which of the layer's gate features scale it. groups: 0 where the output channel is axis 0 of the weight, else
    the groups of a transposed convolution. shifted: whether FiLM's shift enters this bias. flat: every element of the
    weight has a gate feature of its own.
    """

    weight: str
    bias: str
    rows: slice
    groups: int = 0
    shifted: bool = True
    flat: bool = False


class Adapter:
    """Linear; the other kinds override what differs."""

    product = True
    """Whether strategy chooses between fold and epilogue; norms and recurrent layers always fold for a shared beta."""

    stored = True
    """Whether the layer computes with its parameters as they stand, so that they can be folded outside of it."""

    def features(self, layer: Any) -> int:
        """Gate features of the layer."""
        return layer.out_features

    def refusal(self, layer: Any) -> str | None:
        """Why this layer cannot be gated, or None."""
        return None

    def shift_refusal(self, layer: Any) -> str | None:
        """Why this layer cannot take a FiLM shift, or None."""
        return None

    def inputs(self, layer: Any) -> int:
        """Features of a gate on the layer's inputs; 0 where it cannot have one."""
        return layer.in_features

    def scale_inputs(self, x: Tensor, gate: Tensor) -> Tensor:
        """g_in x, for a gate (K,) or (N, K)."""
        return _scaled(x, gate, x.dim() - 1)

    def fold_inputs(self, layer: Any, weight: Tensor, gate: Tensor) -> Tensor:
        """The weight with its columns scaled by a gate (K,), for bake."""
        return (weight.to(gate.dtype) * gate).to(weight.dtype)

    def entries(self, layer: Any) -> list[FoldEntry]:
        """The parameters that folding scales."""
        return [FoldEntry("weight", "bias", slice(None))]

    def weight(self, layer: Any) -> Tensor:
        """The weight that a product computes with."""
        return layer.weight

    def settle(self, layer: Any) -> None:
        """Called when folded tensors have become the parameters of a plain layer."""

    def choose(self, layer: Any, x: Tensor) -> str:
        """The strategy for this input and one beta."""
        return functional.linear_strategy(x, layer.weight, False)

    def measured_product(self, layer: Any, x: Tensor, device: torch.device) -> Product | None:
        """The layer's product for an input like x on that device, as measurements know it."""
        return functional.linear_product(x, layer.weight, device)

    def fused_refusal(self, layer: Any, x: Tensor) -> str | None:
        """Why the fused kernels do not take the layer for an input like x, or None."""
        return None

    def run(
        self, layer: Any, gate: Tensor, shift: Tensor | None, activation: str | None, strategy: str | None, x: Tensor,
        *args: Any, **kwargs: Any,
    ) -> Any:
        """The gated layer's output, for a gate (C,) or (N, C)."""
        return functional.gated_linear(x, layer.weight, layer.bias, gate, shift, activation, strategy=strategy)

    def direct(self, layer: Any) -> bool:
        """Whether the compiled core can call the layer straight away, with a number for each of `geometry`."""
        return True

    def geometry(self, layer: Any) -> Geometry | None:
        """A convolution's stride, padding, dilation, transposed, output padding and groups, else None."""
        return None

    def run_folded(
        self, layer: Any, plain: type, folded: Mapping[str, Tensor | None], *args: Any, **kwargs: Any
    ) -> Any:
        """The plain layer's output with `folded` in place of its parameters."""
        with holding(layer, folded) as holder:
            return plain.forward(holder, *args, **kwargs)  # type: ignore[attr-defined]


class ConvolutionAdapter(Adapter):
    """Conv1d, 2d and 3d, any padding mode."""

    def __init__(self, spatial: int) -> None:
        self.spatial = spatial
        self.function = (functional.gated_conv1d, functional.gated_conv2d, functional.gated_conv3d)[spatial - 1]

    def features(self, layer: Any) -> int:
        return layer.out_channels

    def inputs(self, layer: Any) -> int:
        return layer.in_channels

    def scale_inputs(self, x: Tensor, gate: Tensor) -> Tensor:
        return _scaled(x, gate, x.dim() - self.spatial - 1)

    def fold_inputs(self, layer: Any, weight: Tensor, gate: Tensor) -> Tensor:
        grouped = weight.to(gate.dtype).unflatten(0, (layer.groups, -1))
        return (grouped * gate.reshape(layer.groups, 1, -1, *[1] * self.spatial)).flatten(0, 1).to(weight.dtype)

    def choose(self, layer: Any, x: Tensor) -> str:
        x = x if x.dim() == self.spatial + 2 else x.unsqueeze(0)
        return functional.convolution_strategy(x, layer.weight, self.geometry(layer), False)

    def measured_product(self, layer: Any, x: Tensor, device: torch.device) -> Product | None:
        x, geometry = x if x.dim() == self.spatial + 2 else x.unsqueeze(0), self.geometry(layer)
        outputs = functional.convolution_output_numel(x, layer.weight, *geometry)
        return functional.convolution_product(x, layer.weight, outputs, geometry, device)

    def fused_refusal(self, layer: Any, x: Tensor) -> str | None:
        x = x if x.dim() == self.spatial + 2 else x.unsqueeze(0)
        return functional.fused_refusal(x, layer.weight, self.geometry(layer))

    def geometry(self, layer: Any) -> Geometry:
        padding = layer.padding
        if isinstance(padding, str):
            reach = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
            padding = [0] * self.spatial if padding == "valid" else [r // 2 for r in reach]
        return layer.stride, padding, layer.dilation, layer.transposed, layer.output_padding, layer.groups

    def direct(self, layer: Any) -> bool:
        return layer.padding_mode == "zeros" and layer.padding != "same"  # which may pad one side more than the other

    def run(
        self, layer: Any, gate: Tensor, shift: Tensor | None, activation: str | None, strategy: str | None, x: Tensor,
        *args: Any, **kwargs: Any,
    ) -> Tensor:
        padding = layer.padding
        if layer.padding_mode != "zeros":
            x = F.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
            padding = 0
        return self.function(
            x, self.weight(layer), layer.bias, gate, shift, layer.stride, padding, layer.dilation, layer.groups,
            activation, strategy=strategy,
        )


class WeightNormAdapter(ConvolutionAdapter):
    """WeightNormConv2d: the gate scales the weight that its directions and gains make; baked, it is both again."""

    stored = False

    def direct(self, layer: Any) -> bool:
        return False

    def weight(self, layer: Any) -> Tensor:
        return layer.effective_weight()

    def settle(self, layer: Any) -> None:
        layer.settle()


class TransposedConvolutionAdapter(ConvolutionAdapter):
    """ConvTranspose1d, 2d and 3d; forward takes output_size as torch's does."""

    def __init__(self, spatial: int) -> None:
        super().__init__(spatial)
        self.transposed_function = (
            functional.gated_conv_transpose1d, functional.gated_conv_transpose2d, functional.gated_conv_transpose3d,
        )[spatial - 1]

    def entries(self, layer: Any) -> list[FoldEntry]:
        return [FoldEntry("weight", "bias", slice(None), groups=layer.groups)]

    def fold_inputs(self, layer: Any, weight: Tensor, gate: Tensor) -> Tensor:
        return (weight.to(gate.dtype) * along(gate, 0, weight.dim())).to(weight.dtype)

    def run(
        self, layer: Any, gate: Tensor, shift: Tensor | None, activation: str | None, strategy: str | None, x: Tensor,
        *args: Any, **kwargs: Any,
    ) -> Tensor:
        output_size = args[0] if args else kwargs.get("output_size")
        output_padding = layer._output_padding(
            x, output_size, layer.stride, layer.padding, layer.kernel_size, self.spatial, layer.dilation
        )
        return self.transposed_function(
            x, layer.weight, layer.bias, gate, shift, layer.stride, layer.padding, tuple(output_padding), layer.groups,
            layer.dilation, activation, strategy=strategy,
        )


class NormAdapter(Adapter):
    """BatchNorm, GroupNorm and InstanceNorm: the gate scales the affine, so it sits after the normalisation."""

    product = False
    affine_flag = "affine"

    def direct(self, layer: Any) -> bool:
        return False

    def features(self, layer: Any) -> int:
        return layer.weight.numel()

    def inputs(self, layer: Any) -> int:
        return 0

    def refusal(self, layer: Any) -> str | None:
        return None if layer.weight is not None else f"it has no affine ({self.affine_flag}=False)"

    def run(
        self, layer: Any, gate: Tensor, shift: Tensor | None, activation: str | None, strategy: str | None, x: Tensor,
        *args: Any, **kwargs: Any,
    ) -> Tensor:
        if isinstance(layer, _InstanceNorm) and x.dim() == layer._get_no_batch_dim():
            raise ValueError(f"x has shape {tuple(x.shape)}, no batch axis; expected one beta, not one a sample")
        if activation is None and sample_norms.takes(layer, x, gate, shift):
            return sample_norms.batch_norm(layer, x, gate, shift, layer.weight, layer.bias)
        normalized = layer.plain.forward(layer, x)
        return functional.epilogue(normalized, None, gate, shift, 1, activation)


class LayerNormAdapter(NormAdapter):
    """LayerNorm: one gate feature for each normalised element."""

    affine_flag = "elementwise_affine"

    def entries(self, layer: Any) -> list[FoldEntry]:
        return [FoldEntry("weight", "bias", slice(None), flat=len(layer.normalized_shape) > 1)]

    def run(
        self, layer: Any, gate: Tensor, shift: Tensor | None, activation: str | None, strategy: str | None, x: Tensor,
        *args: Any, **kwargs: Any,
    ) -> Tensor:
        normalized = layer.plain.forward(layer, x)
        axes = len(layer.normalized_shape)
        if normalized.dim() == axes:
            raise ValueError(f"x has shape {tuple(x.shape)}, no batch axis; expected one beta, not one a sample")
        flat = normalized.flatten(-axes)
        return functional.epilogue(flat, None, gate, shift, flat.dim() - 1, activation).view_as(normalized)


class RecurrentAdapter(Adapter):
    """LSTM and GRU: every gate row of every layer and direction, scaled before the non-linearity."""

    product = False

    def direct(self, layer: Any) -> bool:
        return False

    def features(self, layer: Any) -> int:
        return recurrent_rows(layer) * layer.num_layers * (2 if layer.bidirectional else 1)

    def inputs(self, layer: Any) -> int:
        return 0

    def shift_refusal(self, layer: Any) -> str | None:
        return None if layer.bias else "it has bias=False, and a shift enters the recurrent layer through its bias"

    def entries(self, layer: Any) -> list[FoldEntry]:
        rows = recurrent_rows(layer)
        found = []
        for k in range(layer.num_layers):
            for direction, suffix in enumerate(("", "_reverse")[: 2 if layer.bidirectional else 1]):
                start = (k * (2 if layer.bidirectional else 1) + direction) * rows
                for source in ("ih", "hh"):
                    name = f"{source}_l{k}{suffix}"
                    span = slice(start, start + rows)
                    found.append(FoldEntry(f"weight_{name}", f"bias_{name}", span, shifted=source == "ih"))
        return found

    def run(
        self, layer: Any, gate: Tensor, shift: Tensor | None, activation: str | None, strategy: str | None, x: Tensor,
        *args: Any, **kwargs: Any,
    ) -> Any:
        return gated_recurrent(layer, gate, shift, x, *args, **kwargs)

    def run_folded(
        self, layer: Any, plain: type, folded: Mapping[str, Tensor | None], *args: Any, **kwargs: Any
    ) -> Any:
        layer._update_flat_weights()  # or forward does, after a parameter was exchanged, and loses the folded ones
        holder = _shadow(layer)
        names = layer._flat_weights_names
        vars(holder)["_flat_weights"] = [folded[name] if name in folded else getattr(layer, name) for name in names]
        return plain.forward(holder, *args, **kwargs)  # type: ignore[attr-defined]


def _shadow(layer: nn.Module) -> Any:
    """The layer again for one call: other attributes may be put in place of its own, which other threads read.

    Its buffers are the same ones, so that a norm's running statistics are counted.
    """
    shadow = object.__new__(type(layer))
    vars(shadow).update(vars(layer))
    return shadow


@contextlib.contextmanager
def holding(layer: nn.Module, parameters: Mapping[str, Tensor | None]) -> Iterator[Any]:
    """Something with the layer's forward that has these in place of its parameters, for the length of the block.

    Not the layer itself: a state_dict or a copy that another thread takes meanwhile, and a call of its own, would have
    them too. torch.compile, whose graph is traced in one thread, does not follow a second object.
    """
    if not torch.compiler.is_compiling():
        shadow = _shadow(layer)
        for name in parameters:
            vars(shadow).pop(name, None)  # where a replica of nn.DataParallel has it
        vars(shadow)["_parameters"] = {**layer._parameters, **parameters}
        yield shadow
        return
    own = layer._parameters
    before = {name: own[name] for name in parameters}
    own.update(parameters)  # type: ignore[arg-type]
    try:
        yield layer
    finally:
        own.update(before)


ADAPTERS: dict[type[nn.Module], Adapter] = {
    nn.Linear: Adapter(),
    nn.Conv1d: ConvolutionAdapter(1),
    nn.Conv2d: ConvolutionAdapter(2),
    nn.Conv3d: ConvolutionAdapter(3),
    WeightNormConv2d: WeightNormAdapter(2),
    nn.ConvTranspose1d: TransposedConvolutionAdapter(1),
    nn.ConvTranspose2d: TransposedConvolutionAdapter(2),
    nn.ConvTranspose3d: TransposedConvolutionAdapter(3),
    nn.BatchNorm1d: NormAdapter(),
    nn.BatchNorm2d: NormAdapter(),
    nn.BatchNorm3d: NormAdapter(),
    nn.SyncBatchNorm: NormAdapter(),
    nn.InstanceNorm1d: NormAdapter(),
    nn.InstanceNorm2d: NormAdapter(),
    nn.InstanceNorm3d: NormAdapter(),
    nn.GroupNorm: NormAdapter(),
    nn.LayerNorm: LayerNormAdapter(),
    nn.LSTM: RecurrentAdapter(),
    nn.GRU: RecurrentAdapter(),
}
"""The kinds of layers that can be gated. A subclass is left alone: what it changed about its parent is unknown."""


def _scaled(x: Tensor, gate: Tensor, dim: int) -> Tensor:
    if dim < 0 or x.shape[dim] != gate.shape[-1]:
        raise ValueError(
            f"x has shape {tuple(x.shape)}; expected {gate.shape[-1]} features, as many as the gate on the layer's "
            "inputs has"
        )
    if gate.dim() == 2 and (dim == 0 or gate.shape[0] != x.shape[0]):
        raise ValueError(
            f"gate has shape {tuple(gate.shape)}; expected one row a sample of x, {tuple(x.shape)}, or one beta"
        )
    return (x * along(gate, dim, x.dim())).to(x.dtype)


def _computed(layer: nn.Module, adapter: Adapter) -> str | None:
    """The first weight or bias that the layer makes of other parameters, or None. A bias may also be missing."""
    own = layer._parameters
    for entry in adapter.entries(layer):
        if entry.weight not in own:
            return entry.weight
        if entry.bias not in own and getattr(layer, entry.bias, None) is not None:
            return entry.bias
    return None


def altered(layer: nn.Module, adapter: Adapter) -> str | None:
    """Why this layer does not compute as its class says, from real parameters of its own, or None."""
    if own := {"forward", "_conv_forward"} & vars(layer).keys():
        return f"its {own.pop()} was replaced on this one layer, and may differ from that of its class"
    if computed := _computed(layer, adapter):
        return f"its {computed} is not a parameter of its own but computed (weight_norm, spectral_norm, pruning)"
    if any(parameter.is_complex() for parameter in layer.parameters(recurse=False)):
        return "its parameters are complex"
    return None


def refusal(layer: nn.Module, spec: GateSpec) -> str | None:
    """Why this layer cannot have this gate, or None."""
    adapter = ADAPTERS[type(layer)] if type(layer) in ADAPTERS else ADAPTERS[layer.plain]  # type: ignore[index]
    reason = altered(layer, adapter) or adapter.refusal(layer)
    if reason := reason or (adapter.shift_refusal(layer) if spec.shift else None):
        return reason
    if spec.inputs is not None and not adapter.inputs(layer):
        return "it cannot have a gate on its inputs, only Linear and convolutions can"
    return None


class FoldJob(NamedTuple):
    """A layer to fold: the layer, its adapter, its gate (C,) and its shift (C,) or None."""

    layer: nn.Module
    adapter: Adapter
    gate: Tensor
    shift: Tensor | None


def lost(layer: nn.Module, name: str) -> RuntimeError:
    """The error for a gated layer whose parameter of that name is gone."""
    plain = getattr(layer, "plain", type(layer))  # of a layer within a MultiRate
    alone = hasattr(layer, "gate_spec")
    return RuntimeError(
        f"a gated {plain.__name__} has no parameter {name!r} any more: it was pruned or parametrized after "
        f"{'it was gated' if alone else 'multirate'}, or the parameter was deleted; "
        + ("a gated layer computes with parameters of its own" if alone else
           "change the network first (weight norm, pruning), then call multirate()")
    )


def fold_layers(jobs: list[FoldJob]) -> list[dict[str, Tensor | None]]:
    """Fold all the layers in one operator; for each, its folded tensors by parameter name, shaped as the parameters."""
    weights, biases, gates, shifts, groups, names = [], [], [], [], [], []
    for job, (layer, adapter, gate, shift) in enumerate(jobs):
        # torch.nn.DataParallel's replicas hold tensors as plain attributes
        parameters = vars(layer) if getattr(layer, "_is_replica", False) else layer._parameters
        for entry in adapter.entries(layer):
            weight: Tensor | None = parameters.get(entry.weight)
            bias = parameters.get(entry.bias)
            if weight is None:
                raise lost(layer, entry.weight)
            if entry.bias not in parameters and getattr(layer, entry.bias, None) is not None:
                raise lost(layer, entry.bias)
            if not adapter.stored:
                weight = adapter.weight(layer)
            weights.append(weight.flatten() if entry.flat else weight)
            biases.append(bias.flatten() if entry.flat and bias is not None else bias)
            gates.append(gate if entry.rows == slice(None) else gate[entry.rows])
            shifts.append(shift[entry.rows] if shift is not None and entry.shifted else None)
            groups.append(entry.groups)
            names.append((job, entry, weight.shape, entry.bias in parameters))
    folded: list[dict[str, Tensor | None]] = [{} for _ in jobs]
    results = functional.fold(weights, biases, gates, shifts, groups)
    for (job, entry, shape, biased), w, b in zip(names, *results, strict=True):
        folded[job][entry.weight] = w.view(shape) if entry.flat else w
        if biased:
            folded[job][entry.bias] = b.view(shape) if entry.flat and b is not None else b
    return folded



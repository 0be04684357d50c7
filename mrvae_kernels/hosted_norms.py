"""Conditional batch norms inside a MultiRate network: the user's own norms, with an affine that depends on beta.

    y = (w + s(eta)) x_hat + (b + t(eta)),   s and t each an MLP 1-64-C of eta

The formula of `conditional`, for networks whose layers wait for a beta: the norm's w and b stay where they are, s and t
belong to the MultiRate. They start at 0, so that the network starts with its own norms.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from .adapters import ADAPTERS, NormAdapter
from .conditional import conditional_norm
from .gates import GateNetwork
from .hosting import Hosted, Slices, place_of, values_of
from .places import Places
from .traced import Calls, TracedGates

HIDDEN = (64,)


class ConditionalNormAdapter(NormAdapter):
    """A batch norm whose gate and shift are s and t."""

    def refusal(self, layer: Any) -> str | None:
        if layer.weight is not None and layer.bias is None:
            return "it has bias=False, and a conditional norm's bias depends on beta"
        return super().refusal(layer)

    def run(
        self, layer: Any, gate: Tensor, shift: Tensor | None, activation: str | None, strategy: str | None, x: Tensor,
        *args: Any, **kwargs: Any,
    ) -> Tensor:
        assert shift is not None
        dtype = layer.weight.dtype
        return conditional_norm(layer, layer.weight + gate.to(dtype), layer.bias + shift.to(dtype), x)


class HostedNorm(Hosted):
    """A conditional norm, which never folds with the gated layers."""

    def _traced(self, call: TracedGates, slices: Slices, x: Any, *args: Any, **kwargs: Any) -> Any:
        return self.adapter.run(self, *values_of(call, slices), None, None, x)


ADAPTER = ConditionalNormAdapter()
CONDITIONAL: dict[type[nn.Module], type[Hosted]] = {
    plain: type(
        f"HostedConditional{plain.__name__}",
        (HostedNorm, plain),
        {"plain": plain, "adapter": ADAPTER, "__module__": __name__},
    )
    for plain in ADAPTERS
    if issubclass(plain, nn.modules.batchnorm._BatchNorm)
}
"""Kinds of norms that can be conditional, and their classes within a MultiRate."""
globals().update({hosted.__name__: hosted for hosted in CONDITIONAL.values()})  # pickle finds them by name


class ConditionalNorms(nn.Module):
    """s and t of these norms of `owner.network`, a MultiRate's; the norms become hosted."""

    def __init__(self, owner: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.names = tuple(names)
        self.scale, self.shift = nn.ModuleList(), nn.ModuleList()
        network = owner.get_submodule("network")
        for name in names:
            layer: Any = network.get_submodule(name)
            for networks in (self.scale, self.shift):
                s = GateNetwork(HIDDEN, [layer.num_features], ["identity"])
                networks.append(s.to(device=layer.weight.device, dtype=layer.weight.dtype))
            layer.__class__ = CONDITIONAL[type(layer)]
            layer._share = None
        self.places = Places(owner, names, frozenset(CONDITIONAL.values()))

    @property
    def like(self) -> Tensor:
        """A parameter whose device and dtype the others have."""
        return next(self.parameters())

    def values(self, eta: Tensor) -> list[Tensor]:
        """s and t of the first norm, of the second, ...: (C,), or (N, C) for one eta a sample."""
        eta = eta.to(self.like.dtype)
        return [net(eta) for pair in zip(self.scale, self.shift, strict=True) for net in pair]

    def by_name(self, values: Sequence[Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        """Norm -> (s, t), from `values`."""
        return {name: (values[2 * i], values[2 * i + 1]) for i, name in enumerate(self.names)}

    def tell(self, calls: Calls, start: int) -> None:
        """Where each norm finds s and t in calls that torch.compile traces: from slice `start` on."""
        for i, layer in enumerate(self.places.layers):
            layer.__dict__.update(_calls=calls, _place=place_of((start + 2 * i, start + 2 * i + 1, -1, 0)))

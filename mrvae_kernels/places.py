"""Where the gated layers of a network are, so that a call sees whether one was exchanged, moved or lost."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import cast

import torch
from torch import nn

from .hosting import HOSTED_TYPES, Hosted

Modules = dict[str, nn.Module | None]


class Places:
    """The gated layers of `owner.network`, a MultiRate's, which have one of the classes `types`.

    network: the one that was gated. layers: the layers, in the order of their names then. locations: (modules, name,
    layer) of each. holders: (modules, name, module, its modules) of what they are in, from the network itself
    downwards. The compiled core asks both lists whether everything is there still.
    """

    def __init__(
        self, owner: nn.Module, names: Sequence[str], types: Collection[type[nn.Module]] = HOSTED_TYPES
    ) -> None:
        self._root: Modules = owner._modules  # not the owner, which would hold itself
        self._types = types
        self.network, self._names = owner.get_submodule("network"), tuple(names)
        self.layers: list[nn.Module] = [self.network.get_submodule(name) for name in names]
        self._locate()

    def network_stays(self) -> bool:
        """Whether `owner.network` is the network that was gated."""
        return self._root["network"] is self.network

    def hosted(self) -> list[Hosted]:
        """The gated layers, as the network holds them now. RuntimeError where one is gone or not gated any more."""
        layers = self.layers
        if torch.compiler.is_compiling():
            network = self._root["network"]
            assert network is not None
            layers = [network.get_submodule(name) for name in self._names]
        else:
            if not self.network_stays():
                raise RuntimeError(
                    "model.network was replaced after multirate(); its gates belong to the network that multirate() "
                    "got: call multirate() on the new one"
                )
            if not all(modules.get(name) is layer for modules, name, layer in self.locations) or not all(
                modules.get(name) is holder and holder._modules is children
                for modules, name, holder, children in self.holders
            ):
                self._locate()
        if not all(layer.__class__ in self._types for layer in layers):
            self._refuse_changed()
        return cast(list[Hosted], layers)

    def _locate(self) -> None:
        network, root = self.network, self._root
        names = {id(module): name for name, module in network.named_modules()}
        self.locations: list[tuple[Modules, str, nn.Module]] = []
        self.holders: list[tuple[Modules, str, nn.Module, Modules]] = [(root, "network", network, network._modules)]
        seen = {""}
        for layer in self.layers:
            if id(layer) not in names:
                self._refuse_changed()
            path, _, name = names[id(layer)].rpartition(".")
            # a network that is itself the one gated layer has no parent in it: it is the owner's own child
            self.locations.append(
                (network.get_submodule(path)._modules, name, layer) if name else (root, "network", layer)
            )
            while path not in seen:
                seen.add(path)
                holder = network.get_submodule(path)
                path, _, name = path.rpartition(".")
                self.holders.append((network.get_submodule(path)._modules, name, holder, holder._modules))

    def _refuse_changed(self) -> None:
        inside = {id(module) for module in self.network.modules()}
        for name, own in zip(self._names, self.layers, strict=True):
            try:
                layer = self.network.get_submodule(name)
            except AttributeError:
                layer = None
            if id(own) not in inside or type(own) not in self._types:
                now = "gone" if layer is None else f"a {type(layer).__name__}"
                raise RuntimeError(
                    f"{name!r} is {now}: it was replaced or parametrized after multirate() "
                    "and would run without its gate; change the network (SyncBatchNorm, weight norm, quantisation) "
                    "first, then call multirate()"
                )

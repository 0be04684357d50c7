"""Which layers of a network get which gate, and why the others do not."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping, Sequence, Set
from fnmatch import fnmatchcase
from typing import NamedTuple

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy

from .adapters import ADAPTERS, altered, refusal
from .conditional import ConditionalBatchNorm
from .gates import GateNetwork, GateSpec
from .hosted_norms import ADAPTER as CONDITIONAL_ADAPTER
from .hosted_norms import CONDITIONAL, ConditionalNorms
from .hosting import Hosted
from .layers import GatedLayer, Recorded

Gates = str | GateSpec | Mapping[str, str | GateSpec]

NORMS = ("gated", "conditional")


class Selection(NamedTuple):
    """gated: layer name -> its GateSpec, in module order. left: layer name -> why it was left alone. conditional: names
    of the batch norms that become conditional."""

    gated: dict[str, GateSpec]
    left: dict[str, str]
    conditional: list[str]


def select(
    network: nn.Module, gates: Gates | None, include: Sequence[str] | None, exclude: Sequence[str],
    norms: str = "gated",
) -> Selection:
    """Decide for each layer of the network.

    gates maps module names to gates; the longest name that is the layer's own or a parent's counts, "" is the whole
    network. include and exclude are names (of layers or parents) or patterns with *; a layer named in include that
    cannot be gated, a name that matches nothing, a lazy layer that has not run yet, a layer that gates cover by two of
    its names, and a parameter of two layers are ValueErrors.
    norms: "gated", or "conditional": batch norms that a gate is chosen for become conditional instead, and the products
    before them are gated, as in the authors' networks.
    """
    if norms not in NORMS:
        raise ValueError(f"norms is {norms!r}; expected one of {', '.join(NORMS)}")
    _refuse_gated(network)
    _refuse_own_beta(network)
    specs = _resolve(network, gates)
    names = dict(network.named_modules(remove_duplicate=False))
    for option, patterns in (("exclude", exclude), ("include", include or ())):
        for pattern in patterns:
            if not any(_matches(name, pattern) for name in names):
                raise ValueError(
                    f"{option} names {pattern!r}, which is not in the network{_did_you_mean(pattern, names)}"
                )
    gated: dict[str, GateSpec] = {}
    left: dict[str, str] = {}
    conditional: list[str] = []
    before_norm = _before_norm(network, norms)
    inside = _inside_opaque(network)
    aliases: dict[nn.Module, list[str]] = {}
    for name, module in names.items():
        aliases.setdefault(module, []).append(name)
    for module, known_as in aliases.items():
        name = _covered(known_as, specs)
        lazy = _is_lazy(module)
        opaque = next((inside[each] for each in known_as if each in inside), None)
        cancelled = next((before_norm[each] for each in known_as if each in before_norm), None)
        if next(module.parameters(recurse=False), None) is None and not lazy:
            continue
        spec = specs.get(max((key for key in specs if _matches(name, key)), key=len, default=None))  # type: ignore[arg-type]
        asked = include is not None and any(_matches(each, pattern) for pattern in include for each in known_as)
        exact = include is not None and any(each in include for each in known_as)
        if any(_matches(each, pattern) for pattern in exclude for each in known_as):
            left[name] = "excluded"
        elif include is not None and not asked:
            left[name] = "not in include"
        elif spec is None:
            left[name] = f"no entry of gates ({', '.join(map(repr, specs))}) covers it"
        elif lazy and opaque is None:
            raise ValueError(
                f"gates cover {name!r}, a {type(module).__name__} that has no sizes yet: run the network once first, "
                "or exclude it"
            )
        elif reason := opaque or _refusal(module, spec, norms):
            if exact:
                raise ValueError(f"{name!r} was asked for in include, but cannot be gated: {reason}")
            left[name] = reason
        elif cancelled is not None and not asked:
            left[name] = cancelled
        else:
            _refuse_names(known_as, specs)
            if norms == "conditional" and type(module) in CONDITIONAL:
                conditional.append(name)
            else:
                gated[name] = spec
    chosen = {*gated, *conditional}
    chosen_as = [each for known_as in aliases.values() if chosen.intersection(known_as) for each in known_as]
    for pattern in include or ():
        if not any(_matches(name, pattern) for name in chosen_as):
            reasons = "; ".join(f"{name}: {reason}" for name, reason in left.items() if _matches(name, pattern))
            raise ValueError(
                f"include names {pattern!r}, where nothing can be gated: {reasons or 'it has no parameters'}"
            )
    if not gated:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in left.items()) or "it has no layer with parameters"
        raise ValueError(f"nothing to gate in this {type(network).__name__}: {reasons}")
    _refuse_sharing(network, {*gated, *conditional})
    if norms == "conditional" and not conditional:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in left.items() if isinstance(names[name], _BatchNorm))
        raise ValueError(
            f"norms is 'conditional', and no batch norm of this {type(network).__name__} can be: "
            f"{reasons or 'it has none with an affine'}"
        )
    return Selection(gated, left, conditional)


def _refuse_gated(network: nn.Module) -> None:
    for name, module in network.named_modules():
        if isinstance(module, (GatedLayer, ConditionalBatchNorm)):
            raise ValueError(
                f"{name or 'the network'!r} is a {type(module).__name__}, which takes beta itself; multirate() gates "
                f"plain layers: put an nn.{module.plain.__name__} there, or pass beta to your layers without it"
            )


def _resolve(network: nn.Module, gates: Gates | None) -> dict[str, GateSpec]:
    if gates is None:
        names = {name for name, module in network._modules.items() if module is not None}
        if "encoder" not in names or "decoder" not in names:
            raise ValueError(
                f"{type(network).__name__} has no children named encoder and decoder, so the gates must be said: "
                'gates={"module name": "sigmoid", ...}, or gates="softplus" for every layer'
            )
        gates = {"encoder": "sigmoid", "decoder": "sqrt"}
    if not isinstance(gates, Mapping):
        return {"": GateSpec.of(gates)}
    modules = dict(network.named_modules(remove_duplicate=False))
    theirs = {layer for module in modules.values() if isinstance(module, Recorded) for layer in module.modules()}
    for name in gates:
        if name not in modules:
            raise ValueError(f"gates names {name!r}, which is not in the network{_did_you_mean(name, modules)}")
        if not any(type(module) in ADAPTERS or _is_lazy(module) for module in {*modules[name].modules()} - theirs):
            kind = type(modules[name]).__name__
            if any(isinstance(module, Hosted) for module in modules[name].modules()):
                raise ValueError(
                    f"gates names {name!r}, whose layers are gated already, by an earlier multirate(); use that "
                    "MultiRate, or gate a fresh network"
                )
            raise ValueError(f"gates names {name!r}, a {kind} without any layer that can be gated")
    if not gates:
        raise ValueError("gates is empty; give a gate for at least one module")
    return {name: GateSpec.of(spec) for name, spec in gates.items()}


def _matches(name: str, pattern: str) -> bool:
    return pattern == "" or name == pattern or name.startswith(pattern + ".") or fnmatchcase(name, pattern)


def _did_you_mean(name: str, known: Mapping[str, object]) -> str:
    close = difflib.get_close_matches(name, [k for k in known if k], n=3, cutoff=0.5)
    if close:
        return f"; did you mean {' or '.join(map(repr, close))}?"
    return f"; it has {', '.join(repr(k) for k in list(known)[1:8])}{', ...' if len(known) > 8 else ''}"


def _refusal(module: nn.Module, spec: GateSpec, norms: str) -> str | None:
    adapter = ADAPTERS.get(type(module))
    if isinstance(module, Hosted):
        return "it belongs to another multi-rate network"
    if adapter is None:
        base = next((kind.__name__ for kind in ADAPTERS if isinstance(module, kind)), None)
        if base is not None:
            return f"a {type(module).__name__}, a subclass of nn.{base} whose forward may differ"
        return f"a {type(module).__name__}, not a kind of layer that can be gated"
    if norms == "conditional" and type(module) in CONDITIONAL:
        return altered(module, adapter) or CONDITIONAL_ADAPTER.refusal(module)  # s and t take no part in the spec
    return refusal(module, spec)


def _is_lazy(module: nn.Module) -> bool:
    """Whether the layer waits for a first input, which gives it its sizes and its class."""
    own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
    return isinstance(module, LazyModuleMixin) and any(map(is_lazy, own))


def _inside_opaque(network: nn.Module) -> dict[str, str]:
    """Layers whose parent computes with their weights without calling them: always, or in its fast path for eval. And
    those of a MultiRate, the networks of its gates among them."""
    reasons: dict[type[nn.Module], str] = {
        kind: f"part of nn.{kind.__name__}, which uses its weight without calling it"
        for kind in (nn.MultiheadAttention, nn.TransformerEncoderLayer)
    }
    reasons |= dict.fromkeys((Recorded, GateNetwork, ConditionalNorms), "part of another multi-rate network")
    return {
        child: reason
        for name, module in network.named_modules(remove_duplicate=False)
        for kind, reason in reasons.items() if isinstance(module, kind)
        for child, _ in module.named_modules(prefix=name) if child != name
    }


def _before_norm(network: nn.Module, norms: str) -> dict[str, str]:
    """Products registered right before a norm that divides their gate out again, and what that means for each.

    Registration order stands for data flow (nn.Sequential, and by custom elsewhere); `include` overrules it. So does
    norms="conditional", for the batch norms that can be: the authors gate what is before them too.
    """
    found = {}
    for parent, module in network.named_modules(remove_duplicate=False):
        children = list(module.named_children())
        for (name, layer), (norm_name, norm) in zip(children[:-1], children[1:], strict=True):
            adapter = ADAPTERS.get(type(layer))
            if adapter is None or not adapter.product or not _cancels(norm, adapter.features(layer)):
                continue
            affine = bool(norm.affine)
            if norms == "conditional" and isinstance(norm, _BatchNorm) and affine:
                continue
            prefix = f"{parent}." if parent else ""
            kind = "batch" if isinstance(norm, _BatchNorm) else "instance"
            found[prefix + name] = (
                f"{kind} normalisation ({prefix + norm_name}) follows and would cancel its gate; "
                f"{'gate the norm' if affine else 'give the norm affine=True'}, or name this layer in include"
            )
    return found


def _cancels(norm: nn.Module, width: int) -> bool:
    """Whether the norm takes each of `width` channels to mean 0 and variance 1, whatever its scale and shift were.

    A batch norm does so in train mode, of a batch with one beta; an instance norm, and a group norm with a group for
    each channel, always.
    """
    if isinstance(norm, (_BatchNorm, _InstanceNorm)):
        return norm.num_features == width
    return isinstance(norm, nn.GroupNorm) and norm.num_groups == norm.num_channels == width


def _refuse_own_beta(network: nn.Module) -> None:
    """ValueError where forward has an argument of the name that goes to the gates, and would be left at its default."""
    try:
        beta = inspect.signature(network.forward).parameters.get("beta")
    except (TypeError, ValueError):  # of a forward that is no Python function
        return
    if beta is not None and beta.kind in (beta.POSITIONAL_OR_KEYWORD, beta.KEYWORD_ONLY):
        raise ValueError(
            f"{type(network).__name__}.forward has an argument beta of its own, which model(x, beta=...) would not "
            "reach: that beta goes to the gates; rename the argument, to kl_weight say"
        )


def _covered(known_as: Sequence[str], specs: Mapping[str, GateSpec]) -> str:
    """The name of a module that counts: the first that gates cover, of one that the network holds under several."""
    return next((name for name in known_as if any(_matches(name, key) for key in specs)), known_as[0])


def _refuse_names(known_as: Sequence[str], specs: Mapping[str, GateSpec]) -> None:
    """A layer under two names may be used twice, or once under either, as self.net = Sequential(self.encoder, ...)."""
    covered = [name for name in known_as if any(_matches(name, key) for key in specs)]
    if len(covered) > 1:
        first, second, *_ = covered
        raise ValueError(
            f"{first!r} and {second!r} are one and the same layer, and gates cover both names; a shared layer cannot "
            f"have a gate for each use: give gates by one of the names only, gates={{{first!r}: ...}}, exclude "
            f"{first!r}, or copy it"
        )


def _refuse_sharing(network: nn.Module, gated: Set[str]) -> None:
    named = {name: module for name, module in network.named_modules(remove_duplicate=False) if name in gated}
    names = {module: name for name, module in named.items()}
    parameters: dict[int, str] = {}
    for path, module in network.named_modules():
        path = names.get(module, path)
        for own, parameter in module.named_parameters(recurse=False):
            name = f"{path}.{own}" if path else own
            other = parameters.setdefault(id(parameter), name)
            owners = {other.rpartition(".")[0], path}
            if other == name or not owners & gated:
                continue
            raise ValueError(
                f"{other!r} and {name!r} are one and the same parameter; "
                f"exclude {' and '.join(sorted(map(repr, owners)))}, or untie them"
            )

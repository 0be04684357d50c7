"""Which layers get which gate, and why the others do not."""

from __future__ import annotations

import re

import pytest
import torch
from helpers import ConvolutionalVAE, randomize
from torch import nn
from torch.nn.utils import prune

import mrvae_kernels as mk
from mrvae_kernels.selection import select


def kinds(network, gates=None, include=None, exclude=()):
    return {name: spec.kind for name, spec in select(network, gates, include, exclude).gated.items()}


def stack(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(*layers)


def test_the_paper_s_gates_are_the_default():
    assert kinds(ConvolutionalVAE()) == {
        "encoder.0": "sigmoid",
        "encoder.2": "sigmoid",
        "encoder.5": "sigmoid",
        "decoder.0": "sqrt",
        "decoder.3": "sqrt",
        "decoder.5": "sqrt",
    }
    with pytest.raises(
        ValueError, match=r"has no children named encoder and decoder, so the gates must be said: gates="
    ):
        select(stack(nn.Linear(2, 2)), None, None, ())


def test_the_longest_name_counts():
    network = stack(stack(nn.Linear(2, 2), nn.Linear(2, 2)), nn.Linear(2, 2))
    assert kinds(network, "softplus") == dict.fromkeys(["0.0", "0.1", "1"], "softplus")
    assert kinds(network, {"": "softplus", "0": "sqrt", "0.1": mk.GateSpec("sigmoid")}) == {
        "0.0": "sqrt",
        "0.1": "sigmoid",
        "1": "softplus",
    }
    selection = select(network, {"0": "sqrt"}, None, ())
    assert list(selection.gated) == ["0.0", "0.1"]
    assert selection.left == {"1": "no entry of gates ('0') covers it"}


def test_a_name_is_not_the_prefix_of_another():
    network = nn.ModuleDict({"head": nn.Linear(2, 2), "head2": nn.Linear(2, 2)})
    assert list(kinds(network, {"head": "sqrt"})) == ["head"]
    assert list(kinds(network, "sqrt", exclude=["head"])) == ["head2"]


def test_a_layer_is_a_network():
    assert kinds(nn.Linear(2, 3), "sqrt") == {"": "sqrt"}


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        (None, ["decoder"], ["encoder.0", "encoder.2", "encoder.5"]),
        (None, ["*.5", "decoder.0"], ["encoder.0", "encoder.2", "decoder.3"]),
        (["encoder"], ["encoder.5"], ["encoder.0", "encoder.2"]),
        (["*.0"], (), ["encoder.0", "decoder.0"]),
        (["decoder.3", "encoder.2"], (), ["encoder.2", "decoder.3"]),
    ],
)
def test_include_and_exclude(include, exclude, expected):
    selection = select(ConvolutionalVAE(), None, include, exclude)
    assert list(selection.gated) == expected
    assert all(selection.left[name] in ("excluded", "not in include") for name in selection.left)
    assert len(selection.gated) + len(selection.left) == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gates": {"encodr": "sqrt"}}, "gates names 'encodr', which is not in the network; did you mean 'encoder'"),
        ({"exclude": ["decoder.9"]}, "exclude names 'decoder.9', which is not in the network; did you mean 'decoder"),
        ({"include": ["zzz*"]}, "include names 'zzz*', which is not in the network; it has 'encoder'"),
        ({"gates": {"encoder.1": "sqrt"}}, "gates names 'encoder.1', a ReLU without any layer that can be gated"),
        ({"gates": {}}, "gates is empty"),
        ({"include": ["encoder.1"]}, "include names 'encoder.1', where nothing can be gated: it has no parameters"),
        ({"include": ["encoder"], "exclude": ["encoder"]}, "nothing can be gated: encoder.0: excluded"),
        ({"gates": {"encoder": "sqrt"}, "include": ["decoder"]}, "nothing can be gated: decoder.0: no entry of gates"),
        ({"exclude": ["*"]}, "nothing to gate in this ConvolutionalVAE: encoder.0: excluded"),
        ({"gates": "cube"}, "gate kind is 'cube'"),
        (
            {"gates": {"encoder": mk.GateSpec(hidden=(4,)), "decoder": "sqrt"}},
            "the gate of encoder.0 has hidden (4,), that of decoder.0 has ()",
        ),
    ],
)
def test_errors_name_what_is_wrong_and_leave_the_network_alone(options, message):
    network = ConvolutionalVAE()
    classes = [type(m) for m in network.modules()]
    with pytest.raises(ValueError, match=re.escape(message)):
        mk.multirate(network, **options)
    assert [type(m) for m in network.modules()] == classes


def test_what_is_gated_already_says_so():
    network = ConvolutionalVAE()
    model = mk.multirate(network)
    with pytest.raises(ValueError, match="the network is a MultiRate already; call it with beta"):
        mk.multirate(model)
    with pytest.raises(ValueError, match="gates names 'encoder', whose layers are gated already"):
        mk.multirate(network)


def test_a_string_for_include_is_a_type_error():
    for option in ("include", "exclude"):
        with pytest.raises(
            TypeError, match=rf"{option} is the string 'encoder'; expected a list of names: \['encoder'\]"
        ):
            mk.multirate(ConvolutionalVAE(), **{option: "encoder"})
    with pytest.raises(TypeError, match="gate is 3"):
        mk.multirate(ConvolutionalVAE(), {"encoder": 3})


class Twice(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def reasons(network):
    return select(network, "sigmoid", None, ()).left


def test_why_layers_are_left_alone():
    tail = nn.Linear(4, 4)
    with pytest.warns(FutureWarning):
        normed = nn.utils.weight_norm(nn.Linear(4, 4))
    pruned, pruned_bias, pruned_rows = nn.Linear(4, 4), nn.LayerNorm(4), nn.LSTM(4, 4, bidirectional=True)
    prune.random_unstructured(pruned, "weight", 0.5)
    prune.random_unstructured(pruned_bias, "bias", 0.5)
    prune.random_unstructured(pruned_rows, "bias_hh_l0_reverse", 0.5)
    cases = [
        (Twice(4, 4), "a Twice, a subclass of nn.Linear whose forward may differ"),
        (nn.Embedding(3, 4), "a Embedding, not a kind of layer that can be gated"),
        (nn.PReLU(), "a PReLU, not a kind"),
        (normed, "its weight is not a parameter of its own but computed"),
        (pruned, "its weight is not a parameter of its own but computed"),
        (pruned_bias, "its bias is not a parameter of its own but computed"),
        (pruned_rows, "its bias_hh_l0_reverse is not a parameter of its own but computed"),
        (mk.multirate(nn.Linear(4, 4), "sqrt").network, "it belongs to another multi-rate network"),
    ]
    for layer, reason in cases:
        assert re.match(reason, reasons(stack(layer, tail))["0"])
        with pytest.raises(ValueError, match="include|asked for"):
            select(stack(layer, tail), "sigmoid", ["0"], ())
    parametrized = stack(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), tail)
    assert set(reasons(parametrized)) >= {"0"} and list(select(parametrized, "sigmoid", None, ()).gated) == ["1"]
    assert reasons(stack(nn.BatchNorm1d(4, affine=False), nn.LayerNorm(4, elementwise_affine=False), tail)) == {}


def test_what_a_shift_or_a_gate_on_inputs_cannot_join():
    network = stack(nn.LSTM(4, 4, bias=False), nn.Linear(4, 4))
    assert list(select(network, "sigmoid", None, ()).gated) == ["0", "1"]
    assert "bias=False" in select(network, mk.GateSpec(shift=True), None, ()).left["0"]
    network = stack(nn.GroupNorm(2, 4), nn.Linear(4, 4))
    assert "only Linear and convolutions" in select(network, mk.GateSpec(inputs="sigmoid"), None, ()).left["0"]


@pytest.mark.parametrize("kind", ["MultiheadAttention", "TransformerEncoderLayer"])
def test_modules_that_use_weights_without_calling_their_layers_are_left_alone(kind):
    opaque = (
        nn.MultiheadAttention(4, 2)
        if kind == "MultiheadAttention"
        else nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    )
    network = stack(opaque, nn.Linear(4, 4))
    selection = select(network, "sigmoid", None, ())
    assert list(selection.gated) == ["1"]
    inner = "0.out_proj" if kind == "MultiheadAttention" else "0.linear1"
    assert selection.left[inner] == f"part of nn.{kind}, which uses its weight without calling it"
    with pytest.raises(ValueError, match=f"'{inner}' was asked for in include, but cannot be gated: part of"):
        select(network, "sigmoid", [inner], ())


def test_a_layer_right_before_a_batch_norm_is_left_to_the_norm():
    network = stack(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.BatchNorm2d(4))
    selection = select(network, "sigmoid", None, ())
    assert list(selection.gated) == ["1", "3", "5"]
    assert selection.left["0"].startswith("batch normalisation (1) follows and would cancel its gate")
    assert list(select(network, "sigmoid", ["0", "1"], ()).gated) == ["0", "1"]
    assert "0" in select(stack(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4)), "sigmoid", None, ()).gated
    for other in (nn.BatchNorm2d(8), nn.InstanceNorm2d(8), nn.GroupNorm(8, 8)):
        assert "0" in select(stack(nn.Conv2d(1, 4, 3), other), "sigmoid", None, ()).gated


@pytest.mark.parametrize(
    ("norm", "kind"),
    [
        (nn.BatchNorm2d(4, affine=False), "batch"), (nn.InstanceNorm2d(4), "instance"),
        (nn.GroupNorm(4, 4, affine=False), "instance"), (nn.InstanceNorm2d(4, affine=True), "instance"),
        (nn.GroupNorm(4, 4), "instance"),
    ],
    ids=str,
)
@pytest.mark.parametrize("norms", ["gated", "conditional"])
def test_nor_is_one_gated_that_another_norm_of_single_channels_follows(norm, kind, norms):
    end = [nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)] if norms == "conditional" else [nn.Conv2d(4, 4, 3)]
    network = stack(nn.Conv2d(1, 4, 3), norm, nn.ReLU(), *end)
    selection = select(network, "sigmoid", None, (), norms)
    assert list(selection.gated) == (["1", "3"] if norm.affine else ["3"])
    instead = "gate the norm" if norm.affine else "give the norm affine=True"
    assert selection.left == {
        "0": f"{kind} normalisation (1) follows and would cancel its gate; {instead}, or name this layer in include"
    }
    assert list(select(network, "sigmoid", ["0", "3", "4"][: len(end) + 1], (), norms).gated) == ["0", "3"]


def test_a_norm_divides_a_gate_and_a_shift_before_it_out():
    """Of a convolution with large outputs, beside which the norm's eps is nothing."""
    x = 1e4 * torch.randn(5, 1, 6, 6, dtype=torch.float64)
    for norm in (nn.BatchNorm2d(4, affine=False), nn.InstanceNorm2d(4), nn.GroupNorm(4, 4), nn.GroupNorm(2, 4)):
        network = stack(nn.Conv2d(1, 4, 3), norm).double()
        model = randomize(mk.multirate(network, mk.GateSpec("softplus", shift=True), include=["0"]))
        difference = (model(x, beta=0.02) - model(x, beta=9.0)).abs().max()
        assert (difference < 1e-5) == (getattr(norm, "num_groups", 4) == 4), norm


def test_nothing_but_a_layer_whose_gate_is_cancelled_is_an_error():
    message = r"nothing to gate in this Sequential: 0: instance normalisation \(1\) .*; give the norm affine=True"
    with pytest.raises(ValueError, match=message):
        mk.multirate(stack(nn.Conv2d(1, 4, 3), nn.InstanceNorm2d(4)), "sigmoid")


@pytest.mark.parametrize("kind", ["LazyLinear", "LazyBatchNorm1d"])
@pytest.mark.parametrize("gates", ["sigmoid", {"0": "sqrt"}, {"": "sqrt", "1": "sigmoid"}], ids=str)
def test_lazy_layers_have_to_run_once_first(kind, gates):
    lazy = nn.LazyLinear(4) if kind == "LazyLinear" else nn.LazyBatchNorm1d(affine=False)
    network = stack(lazy, nn.Linear(4, 4))
    for include in (None, ["0"]):
        with pytest.raises(ValueError, match=f"gates cover '0', a {kind} that has no sizes yet: run the network once"):
            mk.multirate(network, gates, include=include)
    assert select(network, "sigmoid", None, ["0"]).left == {"0": "excluded"}
    assert select(network, "sigmoid", ["1"], ()).left == {"0": "not in include"}
    assert select(network, {"1": "sqrt"}, None, ()).left == {"0": "no entry of gates ('1') covers it"}
    network(torch.randn(3, 4))
    if kind == "LazyLinear":  # the other has no affine
        assert "0" in select(network, gates, None, ()).gated


class Around(nn.Module):
    """A layer, and a multi-rate network with a beta of its own."""

    def __init__(self, inner: mk.MultiRate) -> None:
        super().__init__()
        self.before, self.inner = nn.Linear(4, 4), inner

    def forward(self, x):
        return self.inner(self.before(x), beta=0.5)


@pytest.mark.parametrize(
    ("gates", "norms"), [("sigmoid", "gated"), (mk.GateSpec(hidden=(3,)), "gated"), ("sqrt", "conditional")]
)
def test_nothing_of_a_multi_rate_network_inside_is_gated_again(gates, norms):
    network = stack(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    inner = mk.multirate(network, gates, exclude=["2"], include=["0", "1"] if norms == "gated" else None, norms=norms)
    outer = mk.multirate(Around(inner), "softplus")
    assert list(outer.gated) == ["before"]
    reasons = {name: reason for name, reason in outer.left.items() if name != "inner"}
    assert {"inner.network.0", "inner.network.2"} < set(reasons)
    assert set(reasons.values()) == {"part of another multi-rate network"}
    with pytest.raises(ValueError, match="'inner.network.2' was asked for in include, but .*: part of another"):
        select(outer.network, "sigmoid", ["inner.network.2"], ())
    for name in ("inner", "inner.network"):
        with pytest.raises(ValueError, match=f"gates names '{name}', whose layers are gated already"):
            select(Around(inner), {name: "sigmoid", "before": "sqrt"}, None, ())


def test_shared_layers_and_tied_weights_are_refused():
    layer = nn.Linear(4, 4)
    network = nn.ModuleDict({"a": layer, "b": nn.Sequential(layer), "c": nn.Linear(4, 4)})
    with pytest.raises(ValueError, match=r"'a' and 'b.0' are one and the same layer.*exclude 'a', or copy it"):
        select(network, "sigmoid", None, ())
    assert list(kinds(network, "sigmoid", exclude=["a"])) == ["c"]
    block = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ValueError, match=r"'a.0' and 'b.0' are one and the same layer"):
        select(nn.ModuleDict({"a": block, "b": block}), "sigmoid", None, ())
    tied = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "c": nn.Linear(4, 4)})
    tied["b"].weight = tied["a"].weight
    for gates in ("sigmoid", {"a": "sqrt"}, {"b": "sqrt"}):
        with pytest.raises(ValueError, match=r"'a.weight' and 'b.weight' are one and the same parameter"):
            select(tied, gates, None, ())
    assert list(kinds(tied, "sigmoid", exclude=["a", "b"])) == ["c"]
    embedding = nn.ModuleDict({"in": nn.Embedding(7, 4), "out": nn.Linear(4, 7)})
    embedding["out"].weight = embedding["in"].weight
    with pytest.raises(ValueError, match="one and the same parameter"):
        select(embedding, "sigmoid", None, ())


def test_every_layer_with_parameters_is_either_gated_or_left():
    network = nn.Transformer(4, 2, 1, 1, 8)
    selection = select(stack(network, ConvolutionalVAE(True)), "sigmoid", None, ())
    owners = {
        n
        for n, m in stack(network, ConvolutionalVAE(True)).named_modules()
        if next(m.parameters(recurse=False), None) is not None
    }
    assert set(selection.gated) | set(selection.left) == owners and not set(selection.gated) & set(selection.left)


def test_a_transformers_decoder_in_eval_mode_is_gated_as_in_training():
    network = nn.TransformerDecoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
    model = mk.multirate(network, "sqrt")
    x = torch.randn(2, 3, 4)
    expected = model(x, x, beta=0.5)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x, x, beta=0.5), expected)

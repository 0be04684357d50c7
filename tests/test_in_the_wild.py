"""Habits of other programs: hooks on a layer, second names for one, readers in other threads, averaged checkpoints."""

from __future__ import annotations

import copy
import functools
import threading
import types

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

import mrvae_kernels as mk


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.decoder = nn.Linear(6, 4), nn.Linear(4, 6)

    def forward(self, x):
        return self.decoder(self.encoder(x))


# A layer that is not what its class says


def hook_forward(layer):
    """What libraries that offload layers do."""
    layer.old_forward = layer.forward
    layer.forward = functools.partial(lambda module, *args: module.old_forward(*args), layer)


def test_a_layer_whose_forward_was_replaced_is_left_alone():
    network = Pair()
    hook_forward(network.encoder)
    model = mk.multirate(network)
    assert list(model.gated) == ["decoder"]
    assert model.left["encoder"].startswith("its forward was replaced on this one layer")
    x = torch.randn(3, 6)
    torch.testing.assert_close(mk.bake(model, 9.0)(x), model(x, beta=9.0))
    tiled = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 3))
    tiled[0]._conv_forward = types.MethodType(lambda self, x, weight, bias: x, tiled[0])
    assert list(mk.multirate(tiled, "sigmoid").gated) == ["1"]
    with pytest.raises(ValueError, match="GatedConv2d cannot be gated: its _conv_forward was replaced"):
        mk.GatedConv2d.from_plain(tiled[0])


def test_a_forward_replaced_after_multirate_is_no_layer_to_bake():
    model = mk.multirate(Pair())
    hook_forward(model.network.encoder)
    with pytest.raises(ValueError, match="the forward of a gated Linear was replaced after multirate"):
        mk.bake(model, 0.5)


def test_complex_layers_are_left_and_complex_tensors_refused():
    network = Pair()
    network.decoder = nn.Linear(4, 6, dtype=torch.complex64)
    model = mk.multirate(network)
    assert list(model.gated) == ["encoder"] and model.left["decoder"] == "its parameters are complex"
    with pytest.raises(ValueError, match="GatedLinear cannot be gated: its parameters are complex"):
        mk.GatedLinear(3, 3, dtype=torch.complex64)
    x, w, g = torch.randn(2, 3, dtype=torch.complex64), torch.randn(4, 3, dtype=torch.complex64), torch.ones(4)
    for strategy in ("fold", "epilogue"):
        with pytest.raises(TypeError, match="complex64; gated operators take real numbers"):
            mk.gated_linear(x, w, None, g, strategy=strategy)
    with pytest.raises(TypeError, match="a weight is complex"):
        mk.functional.fold([w], [None], [g], [None], [0])


def test_a_pruned_layer_is_refused_where_it_becomes_a_gated_one():
    layer = nn.Linear(3, 4)
    prune.l1_unstructured(layer, "weight", 0.5)
    with pytest.raises(ValueError, match="GatedLinear cannot be gated: its weight is not a parameter of its own"):
        mk.GatedLinear.from_plain(layer)
    normed = mk.GatedLayerNorm(8)
    prune.identity(normed, "weight")
    with pytest.raises(RuntimeError, match="after it was gated.*a gated layer computes with parameters of its own"):
        normed(torch.randn(2, 8), 0.5)


def test_gates_may_be_parametrized():
    class Below(nn.Module):
        def forward(self, weight):
            return weight.clamp_max(-2)

    model, x = mk.multirate(Pair()), torch.randn(3, 6)
    parametrize.register_parametrization(model, "gate_weight", Below())
    y = model(x, beta=0.5)
    gates = model.gate_values(0.5)
    expected = gates["decoder"] * model.network.decoder.bias + (
        (gates["encoder"] * (x @ model.network.encoder.weight.T + model.network.encoder.bias))
        @ model.network.decoder.weight.T * gates["decoder"]
    )
    torch.testing.assert_close(y, expected)


# Two names


class Named(nn.Module):
    """A second name for what is one network, before or after the first."""

    def __init__(self, net_first: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        encoder, decoder = nn.Sequential(nn.Linear(8, 4)), nn.Sequential(nn.Linear(4, 8))
        parts = {"encoder": encoder, "decoder": decoder}
        net = {"net": nn.Sequential(encoder, decoder)}
        for name, module in ({**net, **parts} if net_first else {**parts, **net}).items():
            setattr(self, name, module)

    def forward(self, x):
        return self.net(x)


@pytest.mark.parametrize("net_first", [False, True])
def test_a_second_name_for_a_layer_is_no_second_use(net_first):
    plain = Named(net_first).double()
    model = mk.multirate(copy.deepcopy(plain))
    assert list(model.gated) == ["encoder.0", "decoder.0"]
    x = torch.randn(3, 8).double()
    for _ in range(3):
        y = model(x, beta=0.3)
    gates = model.gate_values(0.3)
    h = gates["encoder.0"] * plain.encoder(x)
    torch.testing.assert_close(y, gates["decoder.0"] * plain.decoder(h))
    torch.testing.assert_close(mk.bake(model, 0.3)(x), y)
    with pytest.raises(ValueError, match="gates cover both names.*give gates by one of the names only"):
        mk.multirate(Named(net_first), "sigmoid")
    with pytest.raises(ValueError, match="nothing to gate"):
        mk.multirate(Named(net_first), exclude=["net"])


# Checkpoints


def test_averages_of_state_dicts_and_half_precision_ones_are_loaded():
    model = mk.multirate(Pair())
    state = model.state_dict()
    for other in ({k: 0.999 * v + 0.001 * v for k, v in state.items()}, {k: v.half() for k, v in state.items()}):
        assert other["_extra_state"].is_floating_point()
        model.load_state_dict(other)
    state["_extra_state"] = torch.tensor([1.0, 2.0])
    with pytest.raises(ValueError, match="it is damaged"):
        model.load_state_dict(state)


# Threads


LAYERS = {
    "GroupNorm": lambda: (mk.GatedGroupNorm(4, 16), torch.randn(8, 16, 6, 6)),
    "LayerNorm": lambda: (mk.GatedLayerNorm(32), torch.randn(16, 32)),
    "BatchNorm": lambda: (mk.GatedBatchNorm1d(32), torch.randn(64, 32)),
    "LSTM": lambda: (mk.GatedLSTM(6, 8), torch.randn(3, 4, 6)),
    "ConditionalBatchNorm": lambda: (mk.ConditionalBatchNorm1d(32), torch.randn(64, 32)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_that_folds_keeps_its_parameters_while_it_runs(name):
    """Another thread that reads them, for a checkpoint say, has the layer's own, and a call of its own beta's."""
    layer, x = LAYERS[name]()
    layer.eval()
    parameters = dict(layer.named_parameters())
    plain, seen, other = layer.plain.forward, [], []

    def forward(self, *args, **kwargs):
        seen.append(all(dict(layer.named_parameters())[name] is p for name, p in parameters.items()))
        if len(seen) == 1:  # a call in between
            other.append(layer(x, 5.0))
        return plain(self, *args, **kwargs)

    with torch.no_grad():
        wanted = {beta: layer(x, beta) for beta in (0.02, 5.0)}
        layer.plain.forward = forward
        try:
            found = layer(x, 0.02)
        finally:
            layer.plain.forward = plain
    assert seen == [True, True]
    torch.testing.assert_close(found, wanted[0.02])
    torch.testing.assert_close(other[0], wanted[5.0])
    assert all(dict(layer.named_parameters())[name] is p for name, p in parameters.items())


def test_running_statistics_are_counted_where_a_norm_folds():
    gated, plain = mk.GatedBatchNorm1d(4), nn.BatchNorm1d(4)
    x = torch.randn(16, 4)
    gated(x, 0.5)
    plain(x)
    torch.testing.assert_close(gated.running_mean, plain.running_mean)
    assert gated.num_batches_tracked == 1


def test_a_state_dict_taken_by_another_thread_is_that_of_the_layers():
    model = mk.multirate(nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 64)), "sigmoid").eval()
    x, before = torch.randn(32, 64), {k: v.clone() for k, v in model.state_dict().items()}
    stop, wrong = threading.Event(), []

    def run():
        with torch.no_grad():
            while not stop.is_set():
                model(x, beta=0.5)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        for _ in range(100):
            state = model.state_dict()
            wrong += [k for k, v in state.items() if not torch.equal(v, before[k])]
    finally:
        stop.set()
        thread.join()
    assert wrong == []


def test_data_parallel_is_refused_by_name():
    with pytest.raises(RuntimeError, match="use torch.nn.parallel.DistributedDataParallel"):
        mk.multirate(Pair())._replicate_for_data_parallel()


def test_a_replica_of_data_parallel_folds_its_own_parameters():
    """torch's replicas hold their parameters as plain attributes."""
    layer, x = LAYERS["LayerNorm"]()
    replica = layer._replicate_for_data_parallel()
    replica._parameters = {}
    for name, parameter in layer.named_parameters(recurse=False):
        setattr(replica, name, parameter.detach().clone())
    torch.testing.assert_close(replica(x, 0.5), layer(x, 0.5))


# torch.compile of a part


def test_a_part_that_is_compiled_stays_compiled():
    counts = []

    def backend(graph, inputs):
        def run(*args):
            counts.append(1)
            return graph.forward(*args)

        return run

    torch._dynamo.reset()
    network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    model = mk.multirate(network, "sigmoid")
    x = torch.randn(3, 4)
    expected = copy.deepcopy(model)(x, beta=0.5)
    model.network.compile(fullgraph=True, backend=backend)
    for _ in range(4):
        torch.testing.assert_close(model(x, beta=0.5), expected)
    assert len(counts) == 4


def test_a_layer_compiled_alone_is_baked():
    torch._dynamo.reset()
    network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    network[0] = torch.compile(network[0], backend="eager")
    model, x = mk.multirate(network, "softplus"), torch.randn(3, 4)
    torch.testing.assert_close(mk.bake(model, 0.5)(x), model(x, beta=0.5))


def test_a_layer_under_two_names_is_judged_under_both():
    class Opaque(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.first = self.block.linear1

    with pytest.raises(ValueError, match="TransformerEncoderLayer"):
        mk.multirate(Opaque(), {"first": "sigmoid"})

    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Conv2d(2, 2, 3))
            self.convs = nn.ModuleList([self.encoder[0], self.encoder[2]])

    model = mk.multirate(Normed(), {"convs": "sigmoid"})
    assert [*model.gated] == ["convs.1"] and "cancel" in model.left["convs.0"]
    assert [*mk.multirate(Normed(), {"convs": "sigmoid"}, include=["encoder.2"]).gated] == ["convs.1"]

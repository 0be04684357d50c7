"""Networks of special kinds: keywords, recurrent layers, gates with hidden layers, gates on inputs."""

from __future__ import annotations

import copy
import dataclasses
import functools
import pickle

import pytest
import torch
import torch.nn.functional as F
from helpers import BETA, ConvolutionalVAE, build_network, images, randomize
from torch import Tensor, nn

import mrvae_kernels as mk


class Keyword(nn.Module):
    """Calls its layers with torch's keywords, and has a forward with defaults."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(4, 60), nn.LayerNorm(60)
        self.up = nn.ConvTranspose1d(4, 2, 3, stride=2)

    def forward(self, x: Tensor, *, size: int = 31, scale: float = 1.0) -> dict[str, Tensor]:
        h = self.norm(input=self.first(input=x))
        return {"y": scale * self.up(input=h.view(-1, 4, 15), output_size=[size])}


def test_keywords_reach_the_network_and_its_layers(backend):
    model = mk.multirate(Keyword().double(), "softplus")
    x = torch.randn(5, 4, dtype=torch.float64)
    plain = mk.bake(model, 0.3)
    for _ in range(2):
        for size in (31, 32):
            expected = plain(x, size=size, scale=2.0)["y"]
            assert expected.shape[-1] == size
            for beta in (0.3, [0.3] * 5):
                torch.testing.assert_close(model(x, beta=beta, size=size, scale=2.0)["y"], expected)
                torch.testing.assert_close(model(x=x, beta=beta, size=size, scale=2.0)["y"], expected)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 4)
        self.lstm = nn.LSTM(4, 5, num_layers=2, batch_first=True, bidirectional=True)
        self.gru = nn.GRU(10, 3, batch_first=True)
        self.head = nn.Linear(3, 11)

    def forward(self, tokens: Tensor) -> Tensor:
        h, _ = self.lstm(self.embed(tokens))
        return self.head(self.gru(h)[0])


def test_a_recurrent_network(backend):
    model = randomize(mk.multirate(Recurrent().double(), mk.GateSpec("softplus", shift=True))).eval()
    assert list(model.gated) == ["lstm", "gru", "head"] and "Embedding" in model.left["embed"]
    tokens = torch.randint(11, (5, 7))
    together = model(tokens, beta=BETA)
    for i, beta in enumerate(BETA):
        alone = model(tokens[i : i + 1], beta=beta)
        torch.testing.assert_close(together[i : i + 1], alone)
        torch.testing.assert_close(mk.bake(model, beta)(tokens[i : i + 1]), alone)
    model(tokens, beta=0.3).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    with model.at(9.0):
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(tokens, beta=0.3), model(tokens, beta=0.3))


@pytest.mark.parametrize("shared", [False, True])
def test_gates_from_hidden_layers_shared_or_not(backend, shared):
    spec = mk.GateSpec("softplus", shift=True, hidden=(8,), shared=shared)
    model, x = build_network(spec), images()
    assert model.gate_weight is None and model.gate_bias is None
    assert len(model.gate_networks) == (1 if shared else 12)
    assert {id(p) for p in model.gate_parameters()} == {id(p) for p in model.gate_networks.parameters()}
    eta = mk.standardize(0.3, dtype=torch.float64)
    p = torch.cat([net(eta) for net in model.gate_networks])
    values = model.gate_values(0.3)
    torch.testing.assert_close(values["encoder.2"], F.softplus(p[model.gated["encoder.2"]]))
    torch.testing.assert_close(values["decoder.3.shift"], p[model.shifts["decoder.3"]])
    torch.testing.assert_close(model(x, beta=[0.3] * 5), model(x, beta=0.3))
    torch.testing.assert_close(mk.bake(model, 0.3)(x), model(x, beta=0.3))
    model(x, beta=0.3).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    other = build_network(spec)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x, beta=0.3), model(x, beta=0.3))


GATED_INPUTS = {
    "encoder": mk.GateSpec("sigmoid", inputs="softplus"),
    "decoder": mk.GateSpec("sqrt", shift=True, inputs=mk.GateSpec("sigmoid", init="ranked")),
}


def test_gates_on_inputs_of_more_degrees(backend):
    cubic = {part: dataclasses.replace(spec, degree=3) for part, spec in GATED_INPUTS.items()}
    model, x = build_network(cubic), images()
    assert model.gate_weight.shape == (3, model.gate_bias.numel())
    model.gate_weight.data[1:] *= 0.3
    alone = torch.cat([model(x[i : i + 1], beta=b) for i, b in enumerate(BETA)])
    torch.testing.assert_close(model(x, beta=BETA), alone)
    torch.testing.assert_close(mk.bake(model, 0.3)(x), model(x, beta=0.3))
    with torch.no_grad():
        model.gate_weight[1:] = 0
    affine = build_network(GATED_INPUTS)
    affine.load_state_dict({
        **model.state_dict(), "gate_weight": model.gate_weight[0], "_extra_state": affine.get_extra_state(),
    })
    torch.testing.assert_close(model(x, beta=BETA), affine(x, beta=BETA))


def test_gates_on_inputs(backend):
    model, x = build_network(GATED_INPUTS), images()
    gates = model.gate_values(0.3)
    expected = mk.multirate(
        ConvolutionalVAE().double(), {"encoder": "sigmoid", "decoder": mk.GateSpec("sqrt", shift=True)}
    )
    expected.network.load_state_dict(model.network.state_dict())
    count = expected.gate_weight.numel()
    with torch.no_grad():
        expected.gate_weight.copy_(model.gate_weight[:count])
        expected.gate_bias.copy_(model.gate_bias[:count])
    for name in model.inputs:
        layer, gate = expected.network.get_submodule(name), gates[f"{name}.inputs"]
        scale = (
            gate.view(-1, *[1] * (layer.weight.dim() - 1))
            if isinstance(layer, nn.ConvTranspose2d)
            else gate.view(1, -1, *[1] * (layer.weight.dim() - 2))
        )
        layer.weight.data.mul_(scale)
    torch.testing.assert_close(model(x, beta=0.3), expected(x, beta=0.3))
    torch.testing.assert_close(mk.bake(model, 0.3)(x), model(x, beta=0.3))
    alone = torch.cat([model(x[i : i + 1], beta=b) for i, b in enumerate(BETA)])
    torch.testing.assert_close(model(x, beta=BETA), alone)
    with pytest.raises(ValueError, match="expected"):
        model(x, beta=[0.5, 0.5])


@pytest.mark.parametrize("groups", [1, 2])
def test_gates_on_inputs_of_grouped_convolutions(backend, groups):
    for layer in (nn.Conv1d(4, 6, 3, groups=groups), nn.ConvTranspose1d(4, 6, 3, groups=groups)):
        model = randomize(mk.multirate(layer.double(), mk.GateSpec("softplus", inputs="softplus")))
        x = torch.randn(5, 4, 7, dtype=torch.float64)
        plain = mk.bake(model, 0.3)
        torch.testing.assert_close(model(x, beta=0.3), plain(x))
        torch.testing.assert_close(model(x[0], beta=0.3), plain(x[0]))
        gates = model.gate_values(0.3)
        convolve = F.conv_transpose1d if isinstance(layer, nn.ConvTranspose1d) else F.conv1d
        u = convolve(x * gates[".inputs"][:, None], layer.weight, layer.bias, groups=groups)
        torch.testing.assert_close(plain(x), u * gates[""][:, None])


SINGLE = [
    (nn.Linear(4, 6), (5, 4)),
    (nn.Linear(4, 6, bias=False), (5, 3, 4)),
    (nn.Conv1d(4, 6, 4, padding="same", dilation=3), (5, 4, 9)),
    (nn.Conv1d(4, 6, 3, padding=2, padding_mode="circular"), (5, 4, 9)),
    (nn.Conv2d(4, 6, 3, padding="same", padding_mode="reflect"), (5, 4, 5, 4)),
    (nn.Conv2d(4, 6, (3, 2), stride=(2, 1), groups=2, padding="valid"), (5, 4, 5, 4)),
    (nn.Conv3d(2, 3, 2, padding=1), (5, 2, 3, 2, 3)),
    (nn.ConvTranspose1d(4, 6, 3, stride=2, output_padding=1, groups=2), (5, 4, 4)),
    (nn.ConvTranspose2d(4, 6, 4, 2, 1, bias=False), (5, 4, 3, 2)),
    (nn.ConvTranspose3d(2, 3, 2, dilation=2), (5, 2, 2, 2, 2)),
]


@pytest.mark.parametrize(("layer", "shape"), SINGLE, ids=lambda v: str(v))
@pytest.mark.parametrize("strategy", ["fold", "epilogue"])
@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_every_call_of_a_layer_gives_the_same_batched_or_not(backend, layer, shape, strategy, shift, dtype):
    layer = copy.deepcopy(layer).to(dtype)
    model = randomize(mk.multirate(layer, mk.GateSpec("softplus", shift=shift)))
    x = torch.randn(shape, dtype=dtype)
    exact = mk.bake(copy.deepcopy(model).double(), 0.3)
    tolerance = {"rtol": 1e-9, "atol": 1e-11} if dtype == torch.float64 else {"rtol": 0.05, "atol": 0.1}
    for value in (x, x[0], x.transpose(0, -1).contiguous().transpose(0, -1), x[1:2]):
        expected = exact(value.double())
        for _ in range(3):  # before there is a plan, and from the plan
            with mk.override(strategy=strategy):
                y = model(value, beta=0.3)
                assert y.dtype == dtype and y.shape == expected.shape
                torch.testing.assert_close(y.double(), expected, **tolerance)
            if value.dim() == x.dim():
                y = model(value, beta=[0.3] * len(value))
                torch.testing.assert_close(y.double(), expected, **tolerance)
    for count in (1, 3):
        for _ in range(2):
            with pytest.raises(ValueError, match="expected"):
                model(x, beta=[0.3] * count)
    with mk.override(strategy=strategy), pytest.raises((ValueError, RuntimeError, TypeError)):
        model(x.float() if dtype == torch.float64 else x.double(), beta=0.3)


class Weighed(nn.Module):
    """Gives the loss itself, with a beta of its own, as many beta-VAEs do."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(4, 2), nn.Linear(2, 4)

    def forward(self, x: Tensor, beta: float = 1.0) -> Tensor:
        z = self.encoder(x)
        return (self.decoder(z) - x).square().sum() + beta * z.square().sum()


class WeighedByKeyword(Weighed):
    def forward(self, x: Tensor, *, beta: float = 1.0) -> Tensor:
        return super().forward(x, beta)


@pytest.mark.parametrize("network", [Weighed(), WeighedByKeyword()], ids=lambda network: type(network).__name__)
def test_a_network_with_a_beta_of_its_own_is_refused_before_it_is_changed(network):
    with pytest.raises(ValueError, match="forward has an argument beta of its own.*rename the argument, to kl_weight"):
        mk.multirate(network, "sqrt")
    assert type(network.encoder) is nn.Linear


class Opaque(Weighed):
    def forward(self, *args, **kwargs):
        return self.decoder(self.encoder(*args, **kwargs))


def test_a_forward_whose_arguments_are_unknown_is_taken():
    unreadable, partial, x = Opaque(), Opaque(), torch.randn(3, 4)
    unreadable.forward = type("Call", (), {"__call__": staticmethod(unreadable.forward), "__signature__": "none"})()
    partial.forward = functools.partial(partial.forward)
    for network in (Opaque(), unreadable, partial, nn.DataParallel(Opaque()), torch.compile(Opaque(), backend="eager")):
        assert mk.multirate(network, "sqrt")(x, beta=0.5).shape == x.shape


@pytest.mark.parametrize("network", [None, nn.Linear, 0.5], ids=repr)
def test_what_is_no_network_is_a_type_error(network):
    with pytest.raises(TypeError, match="network is .*; expected an nn.Module"):
        mk.multirate(network)

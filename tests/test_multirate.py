"""A whole network: names untouched, every gate where it belongs, any way to give beta, several models at once."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from helpers import ConvolutionalVAE, randomize, relative_error
from torch import Tensor, nn

import mrvae_kernels as mk

BETA = [0.02, 0.3, 1.0, 4.0, 9.0]


def images(count: int = 5) -> Tensor:
    return torch.randn(count, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def build(gates=None, with_norm: bool = False, **options) -> mk.MultiRate:
    torch.manual_seed(0)
    network = ConvolutionalVAE(with_norm).double()
    return randomize(mk.multirate(network, gates, **options))


def by_hand(model: mk.MultiRate, x: Tensor, beta) -> Tensor:
    """The network without norms written out from the flat gates, independent of how the package runs it."""
    eta = mk.standardize(beta, model.beta_range, dtype=torch.float64)
    act = {"sigmoid": torch.sigmoid, "sqrt": lambda p: (1 - p.exp()).clamp(min=0).sqrt(), "softplus": F.softplus}

    def gated(name: str, u: Tensor) -> Tensor:
        def value(where):
            return eta.unsqueeze(-1) * model.gate_weight[where] + model.gate_bias[where]

        kind = {e.name: e.spec.kind for e in model._entries}[name]
        along = (-1, u.shape[1], *[1] * (u.dim() - 2))
        u = u * act[kind](value(model.gated[name])).view(along)
        return u + value(model.shifts[name]).view(along) if name in model.shifts else u

    e, d = model.network.encoder, model.network.decoder
    x = gated("encoder.0", F.conv2d(x, e[0].weight, e[0].bias, 2, 1)).relu()
    x = gated("encoder.2", F.conv2d(x, e[2].weight, None, 2, 1)).tanh().flatten(1)
    z = gated("encoder.5", F.linear(x, e[5].weight, e[5].bias))
    x = F.elu(gated("decoder.0", F.linear(z, d[0].weight, d[0].bias))).view(-1, 8, 2, 2)
    x = gated("decoder.3", F.conv_transpose2d(x, d[3].weight, d[3].bias, 2, 1)).relu()
    return gated("decoder.5", F.conv_transpose2d(x, d[5].weight, d[5].bias, 2, 1))


FILM = {"encoder": mk.GateSpec("sigmoid", shift=True), "decoder": mk.GateSpec("softplus", shift=True)}


@pytest.mark.parametrize("gates", [None, "softplus", FILM], ids=["paper", "softplus", "FiLM"])
@pytest.mark.parametrize("strategy", [None, "fold", "epilogue"])
@pytest.mark.parametrize("beta", [0.3, torch.tensor(0.3), torch.tensor(0.3, dtype=torch.float64), BETA, torch.tensor(BETA)], ids=repr)
def test_the_network_computes_the_formula_and_its_gradients(backend, gates, strategy, beta):
    model, x = build(gates), images().requires_grad_()
    per_sample = isinstance(beta, list) or isinstance(beta, Tensor) and beta.dim() == 1
    expected = by_hand(model, x, beta)
    wanted = torch.autograd.grad(expected.square().sum(), [x, *model.parameters()])
    with mk.override(strategy="epilogue" if per_sample and strategy == "fold" else strategy):
        for _ in range(3):  # unplanned, planned, from the plan
            y = model(x, beta=beta)
            torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-7)  # eta of a float32 beta is rounded
            found = torch.autograd.grad(y.square().sum(), [x, *model.parameters()])
            for value, other in zip(found, wanted, strict=True):
                assert relative_error(value, other) < 1e-5


def test_names_parameters_and_buffers_stay_as_they_were():
    network = ConvolutionalVAE(True)
    before, identities = dict(network.state_dict()), {n: id(p) for n, p in network.named_parameters()}
    classes = {n: type(m) for n, m in network.named_modules()}
    model = mk.multirate(network)
    assert model.network is network and network.state_dict().keys() == before.keys()
    assert {n: id(p) for n, p in network.named_parameters()} == identities
    assert all(torch.equal(before[k], v) for k, v in network.state_dict().items())
    assert all(isinstance(m, classes[n]) for n, m in network.named_modules())
    assert set(model.state_dict()) == {f"network.{k}" for k in before} | {"gate_weight", "gate_bias", "_extra_state"}
    assert {id(p) for p in model.gate_parameters()} == {id(model.gate_weight), id(model.gate_bias)}
    assert {id(p) for p in model.network_parameters()} == set(identities.values())


def test_slices_cover_the_flat_gates_once_in_module_order():
    model = build(FILM, with_norm=True)
    assert list(model.gated) == ["encoder.1", "encoder.3", "encoder.6", "decoder.0", "decoder.3", "decoder.4", "decoder.6"]
    sizes = {"encoder.1": 6, "encoder.3": 8, "encoder.6": 5, "decoder.0": 32, "decoder.3": 6, "decoder.4": 6, "decoder.6": 1}
    covered = [i for part in (model.gated, model.shifts) for s in part.values() for i in range(s.start, s.stop)]
    assert covered == list(range(2 * sum(sizes.values()))) == list(range(model.gate_weight.numel()))
    assert {name: s.stop - s.start for name, s in model.gated.items()} == sizes
    values = model.gate_values(0.3)
    for name, where in model.gated.items():
        kind = "softplus" if name.startswith("decoder") else "sigmoid"
        torch.testing.assert_close(values[name], mk.gate_values(model.gate_weight[where], model.gate_bias[where], 0.3, kind))
        assert model.gate_values(BETA)[f"{name}.shift"].shape == (5, sizes[name])
    assert "gated=7 layers (64 features)" in repr(model)


def test_gates_start_open_and_shifts_at_0():
    model = mk.multirate(ConvolutionalVAE(), FILM)
    for name, value in model.gate_values(0.3).items():
        assert (value == 0).all() if name.endswith(".shift") else (value.mean() > 0.6)


@pytest.mark.parametrize("with_norm", [False, True])
def test_one_beta_a_sample_equals_each_sample_alone_at_its_beta(backend, with_norm):
    model, x = build(with_norm=with_norm).eval(), images()
    together = model(x, beta=BETA)
    alone = torch.cat([model(x[i : i + 1], beta=b) for i, b in enumerate(BETA)])
    torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-11)
    assert relative_error(model(x, beta=0.02), model(x, beta=9.0)) > 1e-2


@pytest.mark.parametrize("count", [0, 1, 3, 6])
def test_a_wrong_number_of_betas_is_a_value_error_and_nothing_sticks(backend, count):
    model, x = build(), images()
    expected = model(x, beta=0.3)
    with pytest.raises(ValueError, match=r"expected \(6,\), or \(5, 6\) for one beta a sample"):
        model(x, beta=torch.full((count,), 0.5))
    torch.testing.assert_close(model(x, beta=0.3), expected)


@pytest.mark.parametrize("beta", [0, -1.0, float("nan"), "1", None, torch.ones(5, 1)], ids=repr)
def test_a_bad_beta_is_a_value_error(backend, beta):
    with pytest.raises(ValueError, match="beta"):
        build()(images(), beta=beta)


def test_calls_without_beta_say_what_to_do():
    model = build()
    with pytest.raises(TypeError, match="beta"):
        model(images())
    for call in (model.network, model.network.encode, model.network.encoder[0]):
        with pytest.raises(RuntimeError, match=r"without a beta: call the MultiRate itself, model\(x, beta=...\)"):
            call(images())


def test_at_lends_the_gates_and_takes_them_back(backend):
    model, x = build(), images()
    expected = model(x, beta=0.3)
    with model.at(0.3) as same:
        assert same is model
        torch.testing.assert_close(model.network.decode(model.network.encode(x)), expected)
        with model.at(BETA):
            torch.testing.assert_close(model.network(x), model(x, beta=BETA))
        torch.testing.assert_close(model(x, beta=5.0), by_hand(model, x, 5.0))
        torch.testing.assert_close(model.network(x), expected)
        torch.testing.assert_close(copy.deepcopy(model)(x, beta=0.3), expected)
    with pytest.raises(RuntimeError, match="without a beta"):
        model.network(x)


def test_an_exception_inside_restores_everything(backend):
    model, x = build(with_norm=True), images()
    before = {name: (id(p), p.clone()) for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match="x has shape"):
        model(x[:, :, :2, :2], beta=0.3)
    with pytest.raises(KeyError), model.at(0.3):
        raise KeyError
    with pytest.raises(RuntimeError, match="without a beta"):
        model.network(x)
    assert all(id(p) == before[name][0] and torch.equal(p, before[name][1]) for name, p in model.named_parameters())
    assert model.eval()(x, beta=0.3).isfinite().all()


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
            for call in (lambda b: model(x, beta=b, size=size, scale=2.0), lambda b: model(x=x, beta=b, size=size, scale=2.0)):
                torch.testing.assert_close(call(0.3)["y"], expected)
                torch.testing.assert_close(call([0.3] * 5)["y"], expected)


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


@pytest.mark.parametrize("shared", [False, True])
def test_gates_from_hidden_layers_shared_or_not(backend, shared):
    spec = mk.GateSpec("softplus", shift=True, hidden=(8,), shared=shared)
    model, x = build(spec), images()
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
    other = build(spec)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x, beta=0.3), model(x, beta=0.3))


GATED_INPUTS = {"encoder": mk.GateSpec("sigmoid", inputs="softplus"), "decoder": mk.GateSpec("sqrt", shift=True, inputs=mk.GateSpec("sigmoid", init="ranked"))}


def test_gates_on_inputs(backend):
    model, x = build(GATED_INPUTS), images()
    gates = model.gate_values(0.3)
    expected = mk.multirate(ConvolutionalVAE().double(), {"encoder": "sigmoid", "decoder": mk.GateSpec("sqrt", shift=True)})
    expected.network.load_state_dict(model.network.state_dict())
    count = expected.gate_weight.numel()
    with torch.no_grad():
        expected.gate_weight.copy_(model.gate_weight[:count])
        expected.gate_bias.copy_(model.gate_bias[:count])
    for name in model.inputs:
        layer, gate = expected.network.get_submodule(name), gates[f"{name}.inputs"]
        scale = gate.view(-1, *[1] * (layer.weight.dim() - 1)) if isinstance(layer, nn.ConvTranspose2d) else gate.view(1, -1, *[1] * (layer.weight.dim() - 2))
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


def test_copies_and_pickles_are_independent(backend):
    model, x = build(FILM, with_norm=True).eval(), images()
    expected = model(x, beta=0.3)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        assert torch.equal(other(x, beta=0.3), expected)
        with torch.no_grad():
            other.gate_bias.add_(1)
            other.network.encoder[3].weight.mul_(2)
        assert not torch.allclose(other(x, beta=0.3), expected)
        assert torch.equal(model(x, beta=0.3), expected)

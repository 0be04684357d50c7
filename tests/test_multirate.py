"""A whole network: names untouched, every gate where it belongs, any way to give beta, several models at once."""

from __future__ import annotations

import copy
import io
import pickle
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers import BETA, ConvolutionalVAE, build_network, images, relative_error
from torch import Tensor

import mrvae_kernels as mk


def by_hand(model: mk.MultiRate, x: Tensor, beta) -> Tensor:
    """The network without norms written out from the flat gates, independent of how the package runs it."""
    eta = mk.standardize(beta, model.beta_range, dtype=torch.float64)
    act = {"sigmoid": torch.sigmoid, "sqrt": lambda p: (1 - p.exp()).clamp(min=0).sqrt(), "softplus": F.softplus}

    def gated(name: str, u: Tensor) -> Tensor:
        def value(where):
            e, w = eta.unsqueeze(-1), model.gate_weight[..., where]
            p = e * w if w.dim() == 1 else e * w[0] + (e**2 - 1) * w[1] + (e**3 - 1.8 * e) * w[2]
            return p + model.gate_bias[where]

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
CUBIC = {part: replace(spec, degree=3) for part, spec in FILM.items()}


@pytest.mark.parametrize("gates", [None, "softplus", FILM, CUBIC], ids=["paper", "softplus", "FiLM", "cubic"])
@pytest.mark.parametrize("strategy", [None, "fold", "epilogue"])
@pytest.mark.parametrize(
    "beta", [0.3, torch.tensor(0.3), torch.tensor(0.3, dtype=torch.float64), BETA, torch.tensor(BETA)], ids=repr
)
def test_the_network_computes_the_formula_and_its_gradients(backend, gates, strategy, beta):
    model, x = build_network(gates), images().requires_grad_()
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
    model = build_network(FILM, with_norm=True)
    assert list(model.gated) == [
        "encoder.1",
        "encoder.3",
        "encoder.6",
        "decoder.0",
        "decoder.3",
        "decoder.4",
        "decoder.6",
    ]
    sizes = {
        "encoder.1": 6,
        "encoder.3": 8,
        "encoder.6": 5,
        "decoder.0": 32,
        "decoder.3": 6,
        "decoder.4": 6,
        "decoder.6": 1,
    }
    covered = [i for part in (model.gated, model.shifts) for s in part.values() for i in range(s.start, s.stop)]
    assert covered == list(range(2 * sum(sizes.values()))) == list(range(model.gate_weight.numel()))
    assert {name: s.stop - s.start for name, s in model.gated.items()} == sizes
    values = model.gate_values(0.3)
    for name, where in model.gated.items():
        kind = "softplus" if name.startswith("decoder") else "sigmoid"
        torch.testing.assert_close(
            values[name], mk.gate_values(model.gate_weight[where], model.gate_bias[where], 0.3, kind)
        )
        assert model.gate_values(BETA)[f"{name}.shift"].shape == (5, sizes[name])
    assert "gated=7 layers (64 features)" in repr(model)


def test_gates_start_open_and_shifts_at_0():
    model = mk.multirate(ConvolutionalVAE(), FILM)
    for name, value in model.gate_values(0.3).items():
        assert (value == 0).all() if name.endswith(".shift") else (value.mean() > 0.6)


@pytest.mark.parametrize("with_norm", [False, True])
def test_one_beta_a_sample_equals_each_sample_alone_at_its_beta(backend, with_norm):
    model, x = build_network(with_norm=with_norm).eval(), images()
    together = model(x, beta=BETA)
    alone = torch.cat([model(x[i : i + 1], beta=b) for i, b in enumerate(BETA)])
    torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-11)
    assert relative_error(model(x, beta=0.02), model(x, beta=9.0)) > 1e-2


@pytest.mark.parametrize("count", [0, 1, 3, 6])
def test_a_wrong_number_of_betas_is_a_value_error_and_nothing_sticks(backend, count):
    model, x = build_network(), images()
    expected = model(x, beta=0.3)
    with pytest.raises(ValueError, match=r"expected \(6,\), or \(5, 6\) for one beta a sample"):
        model(x, beta=torch.full((count,), 0.5))
    torch.testing.assert_close(model(x, beta=0.3), expected)


@pytest.mark.parametrize("beta", [0, -1.0, float("nan"), "1", None, torch.ones(5, 1)], ids=repr)
def test_a_bad_beta_is_a_value_error(backend, beta):
    with pytest.raises(ValueError, match="beta"):
        build_network()(images(), beta=beta)


def test_calls_without_beta_say_what_to_do():
    model = build_network()
    with pytest.raises(TypeError, match="beta"):
        model(images())
    for call in (model.network, model.network.encode, model.network.encoder[0]):
        with pytest.raises(RuntimeError, match=r"without a beta: call the MultiRate itself, model\(x, beta=...\)"):
            call(images())


def test_at_lends_the_gates_and_takes_them_back(backend):
    model, x = build_network(), images()
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
    model, x = build_network(with_norm=True), images()
    before = {name: (id(p), p.clone()) for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match="x has shape"):
        model(x[:, :, :2, :2], beta=0.3)
    with pytest.raises(KeyError), model.at(0.3):
        raise KeyError
    with pytest.raises(RuntimeError, match="without a beta"):
        model.network(x)
    assert all(id(p) == before[name][0] and torch.equal(p, before[name][1]) for name, p in model.named_parameters())
    assert model.eval()(x, beta=0.3).isfinite().all()


def test_copies_and_pickles_are_independent(backend):
    model, x = build_network(FILM, with_norm=True).eval(), images()
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

"""Networks with conditional batch norms: the formula, everything that MultiRate and bake do with them, errors."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from helpers import BETA
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import mrvae_kernels as mk


class Network(nn.Module):
    """Two norms, one of them behind a convolution, for (N, 3, 6, 6)."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5))
        self.norm = nn.BatchNorm1d(5)
        self.last = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.norm(self.body(x))))


def build(**options) -> mk.MultiRate:
    """One whose s and t are not 0 any more, and whose running statistics are not the first ones."""
    torch.manual_seed(0)
    model = mk.multirate(Network().double(), "softplus", norms="conditional", **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    model(images(), beta=1.0)
    return model


def images() -> Tensor:
    return torch.randn(5, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def by_the_formula(model: mk.MultiRate, x: Tensor, beta) -> Tensor:
    """The network with the package's single layers in its place, which have tests of their own."""
    values, conv, linear = model.gate_values(beta), model.network.body[0], model.network.body[4]
    own = model.conditional
    networks = {name: (s, t) for name, s, t in zip(own.names, own.scale, own.shift, strict=True)}

    def norm(name: str, kind: type[nn.Module], y: Tensor) -> Tensor:
        own = model.network.get_submodule(name)
        layer = kind(own.num_features, dtype=torch.float64)
        layer.load_state_dict(own.state_dict(), strict=False)
        layer.scale, layer.shift = networks[name]
        layer.weight, layer.bias = own.weight, own.bias
        return layer.train(own.training)(y, beta)

    y = mk.gated_conv2d(x, conv.weight, conv.bias, values["body.0"])
    y = norm("body.1", mk.ConditionalBatchNorm2d, y).relu().flatten(1)
    y = norm("norm", mk.ConditionalBatchNorm1d, mk.gated_linear(y, linear.weight, linear.bias, values["body.4"]))
    return mk.gated_linear(y.tanh(), model.network.last.weight, model.network.last.bias, values["last"])


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("beta", [0.3, torch.tensor(0.3).double(), BETA], ids=["number", "tensor", "per sample"])
def test_the_formula_and_its_gradients(mode, beta):
    model, x = build(), images()
    model.train(mode == "train")
    parameters = list(model.parameters())
    expected = by_the_formula(model, x, beta)
    theirs = torch.autograd.grad(expected.square().sum(), parameters)
    for _ in range(3):  # the first call makes a plan, which the others follow
        found = model(x, beta=beta)
        torch.testing.assert_close(found, expected)
        for ours, other in zip(torch.autograd.grad(found.square().sum(), parameters), theirs, strict=True):
            torch.testing.assert_close(ours, other)
    assert any(gradient.abs().sum() > 0 for gradient in theirs)


def test_it_starts_as_the_network_that_it_was():
    torch.manual_seed(0)
    plain = Network()
    model = mk.multirate(copy.deepcopy(plain), "sigmoid", norms="conditional", include=["*norm*", "body.1", "last"])
    expected = plain(images().float())
    with torch.no_grad():
        model.gate_bias.fill_(100)
    torch.testing.assert_close(model(images().float(), beta=BETA), expected)


def test_what_it_says_of_itself():
    model = build()
    assert model.conditional.names == ("body.1", "norm") and model.left == {}
    assert set(model.gated) == {"body.0", "body.4", "last"}
    assert set(model.gate_values(0.3)) == {
        "body.0", "body.4", "last", "body.1.scale", "body.1.shift", "norm.scale", "norm.shift"
    }
    own = {id(parameter) for parameter in model.network_parameters()}
    assert own == {id(parameter) for parameter in model.network.parameters()}
    added = sum(p.numel() for p in model.gate_parameters())
    assert added == 2 * (4 + 5 + 2) + sum(2 * (64 + 64 + 64 * c + c) for c in (4, 5))
    assert not own & {id(parameter) for parameter in model.gate_parameters()}
    assert "conditional=2" in repr(model)


def test_within_at_and_a_call_inside():
    model, x = build().eval(), images()
    with model.at(0.3):
        inside = model.network(x)
        other = model(x, beta=4.0)
        again = model.network(x)
    assert torch.equal(inside, again)
    torch.testing.assert_close(inside, model(x, beta=0.3))
    torch.testing.assert_close(other, model(x, beta=4.0))
    with pytest.raises(RuntimeError, match="without a beta"):
        model.network.norm(torch.randn(5, 5).double())


def test_bake_and_recalibrate():
    model, x = build(), images()
    plain = mk.bake(model, 0.3, [x])
    assert type(plain) is Network and {type(m) for m in plain.modules()} == {type(m) for m in Network().modules()}
    model.recalibrate([x], 0.3)
    torch.testing.assert_close(plain.eval()(x), model.eval()(x, beta=0.3))
    assert set(plain.state_dict()) == set(Network().state_dict())


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "state_dict"])
def test_copies(way):
    model, x = build().eval(), images()
    if way == "state_dict":
        file = io.BytesIO()
        torch.save(model.state_dict(), file)
        file.seek(0)
        other = mk.multirate(Network().double(), "softplus", norms="conditional")
        other.load_state_dict(torch.load(file, weights_only=True))
        other.eval()
    else:
        other = copy.deepcopy(model) if way == "deepcopy" else pickle.loads(pickle.dumps(model))
    expected = model(x, beta=0.3)
    torch.testing.assert_close(other(x, beta=0.3), expected)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    torch.testing.assert_close(model(x, beta=0.3), expected)
    assert not torch.allclose(other(x, beta=0.3), expected)


def test_weights_of_other_norms_are_refused():
    model, gated = build(), mk.multirate(Network().double(), "softplus")
    for one, other in ((model, gated), (gated, model)):
        with pytest.raises((ValueError, RuntimeError), match="made with|conditional"):
            one.load_state_dict(other.state_dict())
    first, second = (
        mk.multirate(
            nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.BatchNorm1d(4)), "softplus", norms="conditional",
            exclude=[left],
        )
        for left in ("1", "2")
    )
    with pytest.raises(ValueError, match=r"made with conditional = \['2'\], this MultiRate has \['1'\]"):
        second.load_state_dict(first.state_dict())


@pytest.mark.parametrize("per_sample", [False, True])
def test_compiled_whole_it_agrees(per_sample):
    model, x = build(), images()
    parameters = list(model.parameters())
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for beta in (0.3, 4.0):
        beta = torch.tensor([beta * value for value in BETA] if per_sample else beta).double().clamp(0.01, 10)
        before = copy.deepcopy(model.state_dict())
        expected = model(x, beta=beta)
        theirs = torch.autograd.grad(expected.square().sum(), parameters)
        after = copy.deepcopy(model.state_dict())
        model.load_state_dict(before)
        found = compiled(x, beta=beta)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(dict(model.named_buffers()), {n: after[n] for n, _ in model.named_buffers()})
        for ours, other in zip(torch.autograd.grad(found.square().sum(), parameters), theirs, strict=True):
            torch.testing.assert_close(ours, other)


def test_compiled_whole_on_a_backend_that_was_asked_for():
    model, x = build().eval(), images()
    for backend in ("cpp", "reference"):
        with mk.override(backend=backend):
            found = torch.compile(model, fullgraph=True, backend="eager")(x, beta=0.3)
        torch.testing.assert_close(found, model(x, beta=0.3))


def test_checkpointed_inside():
    model, x = build().eval(), images()
    expected = torch.autograd.grad(model(x, beta=0.3).square().sum(), list(model.parameters()))

    class Checkpointed(Network):
        def forward(self, x: Tensor) -> Tensor:
            context = mk.checkpoint_context(model)
            hidden = checkpoint(self.body, x, use_reentrant=False, context_fn=context)
            return self.last(torch.tanh(checkpoint(self.norm, hidden, use_reentrant=False, context_fn=context)))

    model.network.__class__ = Checkpointed
    found = torch.autograd.grad(model(x, beta=0.3).square().sum(), list(model.parameters()))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_exclude_and_include_choose_among_the_norms_too():
    model = mk.multirate(Network(), "softplus", norms="conditional", exclude=["body.1"])
    assert model.conditional.names == ("norm",) and model.left == {"body.1": "excluded"}
    model = mk.multirate(Network(), "softplus", norms="conditional", include=["body"])
    assert model.conditional.names == ("body.1",)


def test_gates_on_inputs_are_the_products_matter():
    spec = mk.GateSpec("softplus", inputs=mk.GateSpec("sigmoid"))
    model = mk.multirate(Network(), spec, norms="conditional")
    assert model.conditional.names == ("body.1", "norm") and model.left == {}
    assert set(model.inputs) == {"body.0", "body.4", "last"}


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="norms is 'none'; expected one of gated, conditional"):
        mk.multirate(Network(), "softplus", norms="none")
    with pytest.raises(ValueError, match="'conditional', and no batch norm of this Sequential"):
        mk.multirate(nn.Sequential(nn.Linear(2, 2)), "softplus", norms="conditional")
    with pytest.raises(ValueError, match="no batch norm of this Sequential can be: 1: excluded"):
        mk.multirate(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), "softplus", exclude=["1"], norms="conditional")
    with pytest.raises(ValueError, match="'0' and '2' are one and the same layer"):
        norm = nn.BatchNorm1d(2)
        mk.multirate(nn.Sequential(norm, nn.Linear(2, 2), norm), "softplus", norms="conditional")
    network = Network()
    network.norm = nn.BatchNorm1d(5, affine=False)
    assert mk.multirate(network, "softplus", norms="conditional").conditional.names == ("body.1",)
    model = build()
    model.network.norm = nn.BatchNorm1d(5).double()
    with pytest.raises(RuntimeError, match="'norm' is a BatchNorm1d"):
        model(images(), beta=0.3)
    for beta in (0.0, [0.3] * 4):
        with pytest.raises(ValueError, match="expected"):
            build()(images(), beta=beta)

"""bake: the gated model's outputs, the original classes, no trace of a gate."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from helpers import ConvolutionalVAE, randomize, relative_error
from torch import Tensor, nn
from torch.nn.utils import prune

import mrvae_kernels as mk

GATES = {
    "paper": None,
    "FiLM": {"encoder": mk.GateSpec("sigmoid", shift=True), "decoder": mk.GateSpec("softplus", shift=True)},
    "hidden": mk.GateSpec("softplus", shift=True, hidden=(8,)),
    "inputs": mk.GateSpec("softplus", inputs="sigmoid", shift=True),
}


def build(gates: str = "paper", dtype: torch.dtype = torch.float32) -> mk.MultiRate:
    torch.manual_seed(0)
    return randomize(mk.multirate(ConvolutionalVAE().to(dtype), GATES[gates])).eval()


@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("beta", [0.01, 0.3, 1, torch.tensor(10.0)])
@pytest.mark.parametrize("strategy", ["fold", "epilogue", None])
def test_outputs_equal_the_gated_models(backend, gates, beta, strategy):
    model, x = build(gates), torch.randn(64, 1, 8, 8)
    plain = mk.bake(model, beta)
    with mk.override(strategy=strategy):
        assert relative_error(plain(x), model(x, beta=beta)) < 1e-6
    exact = copy.deepcopy(model).double()
    assert relative_error(mk.bake(exact, beta)(x.double()), exact(x.double(), beta=beta)) < 1e-13


@pytest.mark.parametrize("gates", GATES)
def test_classes_names_and_modes_are_the_originals_and_nothing_of_the_gates_is_left(gates):
    network = ConvolutionalVAE()
    model = build(gates)
    model.network.encoder.train()
    plain = mk.bake(model, 0.3)
    assert [(n, type(m)) for n, m in plain.named_modules()] == [(n, type(m)) for n, m in network.named_modules()]
    extra = set(plain.state_dict()) - set(network.state_dict())
    assert extra == (set() if gates == "paper" else {"encoder.2.bias"}), "a shift needs a bias; nothing else is added"
    assert [m.training for m in plain.modules()] == [m.training for m in model.network.modules()]
    for module, original in zip(plain.modules(), network.modules(), strict=True):
        assert set(module.__dict__) == set(original.__dict__)
        assert not [name for name in (*vars(module), *module._parameters) if "gate" in name or "share" in name]
    assert "Gate" not in repr(plain) and "Hosted" not in repr(plain)
    assert all(isinstance(p, nn.Parameter) and p.is_leaf for p in plain.parameters())


def test_the_model_itself_is_left_alone():
    model = build()
    before, ids = copy.deepcopy(model.state_dict()), [id(p) for p in model.parameters()]
    plain = mk.bake(model, 0.3)
    with torch.no_grad():
        for p in plain.parameters():
            p.zero_()
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert [id(p) for p in model.parameters()] == ids


def test_requires_grad_is_kept():
    model = build("FiLM")
    model.network.encoder[0].weight.requires_grad_(False)
    model.network.decoder[3].bias.requires_grad_(False)
    plain = mk.bake(model, 0.3)
    frozen = {name for name, p in plain.named_parameters() if not p.requires_grad}
    assert frozen == {"encoder.0.weight", "decoder.3.bias"}
    plain(torch.randn(2, 1, 8, 8)).sum().backward()


def test_a_baked_network_can_be_gated_and_baked_again():
    plain, x = mk.bake(build(), 0.3), torch.randn(4, 1, 8, 8)
    again = mk.multirate(copy.deepcopy(plain), "softplus")
    assert list(again.gated) == list(build().gated)
    assert relative_error(mk.bake(again, 0.7)(x), again(x, beta=0.7)) < 1e-6


class Everything(nn.Module):
    """Every kind of layer that has an adapter for 1-d data, and tokens for the recurrent ones."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv1d(2, 4, 3, padding="same", padding_mode="circular"),
            nn.BatchNorm1d(4),
            nn.ConvTranspose1d(4, 6, 3, groups=2),
            nn.GroupNorm(3, 6),
            nn.InstanceNorm1d(6, affine=True),
            nn.LayerNorm((6, 9)),
        )
        self.lstm = nn.LSTM(6, 4, num_layers=2, bidirectional=True, proj_size=2, batch_first=True)
        self.gru = nn.GRU(4, 3, bias=False, batch_first=True)
        self.volume = nn.Sequential(nn.Conv3d(1, 2, 2), nn.ConvTranspose3d(2, 1, 2, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        h = self.layers(x).transpose(1, 2)
        h = self.gru(self.lstm(h)[0])[0]
        return self.volume(h.reshape(len(x), 1, 3, 3, 3))


def test_every_kind_of_layer(backend):
    model = randomize(mk.multirate(Everything().double(), "softplus"))
    assert list(model.gated) == [
        "layers.1",
        "layers.2",
        "layers.3",
        "layers.4",
        "layers.5",
        "lstm",
        "gru",
        "volume.0",
        "volume.1",
    ]
    x = torch.randn(5, 2, 7, dtype=torch.float64)
    plain = mk.bake(model, 0.3, [x])
    assert [type(m) for m in plain.modules()] == [type(m) for m in Everything().modules()]
    model.recalibrate([x], 0.3)
    for mode in (True, False):
        torch.testing.assert_close(plain.train(mode)(x), model.train(mode)(x, beta=0.3))
        torch.testing.assert_close(plain(x), model(x, beta=[0.3] * 5))
    beta = [0.02, 0.3, 1.0, 4.0, 9.0]
    alone = torch.cat([model(x[i : i + 1], beta=b) for i, b in enumerate(beta)])
    torch.testing.assert_close(model(x, beta=beta), alone)


def test_batch_norms_without_batches_warn_and_with_them_are_recalibrated():
    model = mk.multirate(ConvolutionalVAE(True))
    x = [torch.randn(16, 1, 8, 8) + 3 for _ in range(3)]
    with pytest.warns(
        UserWarning, match=r"the running statistics of 1 norms mix the betas of training; give bake\(model"
    ):
        stale = mk.bake(model, 0.3)
    assert (stale.encoder[1].running_mean == 0).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain = mk.bake(model, 0.3, x)
        mk.bake(build(), 0.3)
    assert (model.network.encoder[1].running_mean == 0).all(), "the model's own statistics changed"
    model.recalibrate(x, 0.3)
    assert torch.equal(plain.encoder[1].running_mean, model.network.encoder[1].running_mean)
    assert relative_error(plain.eval()(x[0]), model.eval()(x[0], beta=0.3)) < 1e-6


def test_a_frozen_batch_of_errors():
    model = build()
    for beta in ([0.3], torch.tensor([0.3, 0.4]), 0.0, -1, float("nan")):
        with pytest.raises(ValueError, match="beta is"):
            mk.bake(model, beta)
    with pytest.raises(TypeError, match="bake takes the MultiRate that multirate"):
        mk.bake(model.network, 0.3)
    with pytest.raises(ValueError, match="batches is empty"):
        mk.bake(mk.multirate(ConvolutionalVAE(True)), 0.3, [])


class Keeping(nn.Module):
    """Keeps of its last call what a loss needs, with its history, and has layers whose weight a hook computes."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(4, 3), nn.Linear(3, 4)
        self.normed, self.pruned = nn.Linear(4, 4), nn.LSTM(4, 4)
        nn.utils.weight_norm(self.normed)
        prune.random_unstructured(self.pruned, "weight_hh_l0", 0.5)

    def forward(self, x: Tensor) -> Tensor:
        mean = self.encoder(self.pruned(self.normed(x))[0])
        self.mean, self.terms, self.parts = mean, [(mean.square(), 1)], {"rate": mean.sum(), "self": self.__dict__}
        return self.decoder(mean)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_what_a_network_keeps_of_its_last_call_is_no_obstacle():
    model, x = mk.multirate(Keeping()), torch.randn(2, 5, 4)
    y = model(x, beta=0.3)
    kept = model.network.mean
    plain = mk.bake(model, 0.3)
    assert torch.equal(plain.mean, kept) and plain.mean.is_leaf and plain.terms[0][0].is_leaf
    torch.testing.assert_close(plain(x), y)
    assert model.network.mean is kept and kept.grad_fn is not None
    kept.sum().backward()  # the history is the model's still
    assert plain.encoder.weight.grad is None and model.network.encoder.weight.grad is not None


def test_a_layer_that_another_multirate_gated_is_named():
    network = ConvolutionalVAE(True)
    parts = mk.multirate(network, {"encoder": "sigmoid"}), mk.multirate(network, {"decoder": "sqrt"})
    for part, name in zip(parts, ("decoder.0", "encoder.1"), strict=True):
        with pytest.raises(ValueError, match=f"'{name}' was gated by another multirate.* one multirate\\(network"):
            mk.bake(part, 5.0, [torch.randn(4, 1, 8, 8)])


class Around(nn.Module):
    """A layer, and a multi-rate network with a beta of its own."""

    def __init__(self, inner: mk.MultiRate) -> None:
        super().__init__()
        self.before, self.inner = nn.Conv2d(1, 1, 1), inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.before(x), beta=0.5)


def test_a_multi_rate_network_inside_stays_one(backend):
    outer, x = randomize(mk.multirate(Around(build()), "softplus")), torch.randn(4, 1, 8, 8)
    plain = mk.bake(outer, 5.0)
    assert type(plain.before) is nn.Conv2d and type(plain.inner) is mk.MultiRate
    torch.testing.assert_close(plain(x), outer(x, beta=5.0))


def test_within_a_block_that_lends_gates(backend):
    model, x = build(), torch.randn(4, 1, 8, 8)
    with model.at(5.0):
        plain = mk.bake(model, 0.3)
    torch.testing.assert_close(plain(x), model(x, beta=0.3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_rounded_once(dtype):
    model = build("FiLM", dtype)
    plain, exact = mk.bake(model, 0.3), mk.bake(copy.deepcopy(model).double(), 0.3)
    for (name, value), other in zip(plain.named_parameters(), exact.parameters(), strict=True):
        assert value.dtype == dtype
        assert relative_error(value.double(), other) < torch.finfo(dtype).eps, name

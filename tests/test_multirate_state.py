"""Keeping a MultiRate network: running statistics, state_dicts, precision, memory formats."""

from __future__ import annotations

import copy
import io
import json
import re

import pytest
import torch
from helpers import BETA, ConvolutionalVAE, build_network, images, parameter_gradients, randomize, relative_error
from torch import nn

import mrvae_kernels as mk
from mrvae_kernels.layers import encode_state


def test_recalibrated_statistics_are_those_of_the_data_at_this_beta(backend):
    model = build_network(with_norm=True)
    model.network.encoder[3].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    batches = [images(), images(4) + 1, images(6) * 2]
    assert model.recalibrate(batches, 0.3) == 3
    assert {name: module.training for name, module in model.named_modules()} == modes
    norm = model.network.encoder[1]
    h = [nn.functional.conv2d(x, model.network.encoder[0].weight, model.network.encoder[0].bias, 2, 1) for x in batches]
    torch.testing.assert_close(norm.running_mean, torch.stack([v.mean((0, 2, 3)) for v in h]).mean(0))
    torch.testing.assert_close(norm.running_var, torch.stack([v.var((0, 2, 3)) for v in h]).mean(0))
    assert norm.momentum == 0.1 and model.recalibrate([(x,) for x in batches], 0.3) == 3
    torch.testing.assert_close(norm.running_mean, torch.stack([v.mean((0, 2, 3)) for v in h]).mean(0))


class TwoNorms(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3), nn.BatchNorm1d(3))


def test_the_second_norms_statistics_follow_beta():
    model = randomize(mk.multirate(TwoNorms(), "sigmoid"))
    x = torch.randn(4096, 4)

    def off_center(beta: float) -> float:
        y = model.eval()(x, beta=beta) - model.network[4].bias * model.gate_values(beta)["4"]
        return y.mean(0).abs().max().item()

    for beta, other in ((0.02, 9.0), (9.0, 0.02)):
        model.recalibrate([x], beta)
        assert off_center(beta) < 1e-3 < 0.05 < off_center(other)


def test_recalibrate_with_no_batch_or_a_failing_one_loses_nothing():
    model = build_network(with_norm=True)
    model(images(), beta=0.3)
    before = copy.deepcopy(model.state_dict())
    modes = [m.training for m in model.modules()]
    for batches, error in (
        ([], ValueError),
        ([images(), images()[:, :, :2]], (ValueError, RuntimeError)),
        (images(), TypeError),
        (3, TypeError),
    ):
        with pytest.raises(error):
            model.recalibrate(batches, 0.3)
        assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
        assert model.network.encoder[1].momentum == 0.1 and [m.training for m in model.modules()] == modes
    assert build_network().recalibrate([], 0.3) == 0


def test_recalibrate_says_what_to_do_with_pairs_and_with_swapped_arguments():
    model, x = build_network(with_norm=True), images()
    with pytest.raises(TypeError, match=r"a batch of 2 is as many arguments.*give \(x for x, label in batches\)"):
        model.recalibrate([(x, torch.zeros(len(x)))], 0.3)
    with pytest.raises(TypeError, match="batches is 0.3; expected an iterable of inputs first, and then beta"):
        model.recalibrate(0.3, [x])


def test_a_state_dict_goes_through_a_file_safely():
    model, x = build_network(with_norm=True), images()
    model(x, beta=0.3)
    model.eval()
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = mk.multirate(ConvolutionalVAE(True).double()).eval()
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(x, beta=0.3), model(x, beta=0.3))
    plain = ConvolutionalVAE(True).double()
    plain.load_state_dict(model.network.state_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta_range": (0.1, 10.0)}, r"beta_range = [0.01, 10.0], this MultiRate has [0.1, 10.0]"),
        ({"gates": "softplus"}, "gates = ["),
        ({"gates": {"encoder": mk.GateSpec("sigmoid", shift=True), "decoder": "sqrt"}}, "gates = ["),
        ({"exclude": ["decoder.5"]}, "gates = ["),
        ({"gates": {"encoder": mk.GateSpec(degree=3), "decoder": mk.GateSpec("sqrt", degree=3)}},
         "degree = 1, this MultiRate has 3"),
    ],
    ids=["range", "kind", "shift", "layers", "degree"],
)
def test_a_state_dict_of_other_gates_is_refused_before_anything_is_copied(options, message):
    other = build_network(**options)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=re.escape(f"the checkpoint was made with {message}")):
        other.load_state_dict(build_network().state_dict())
    assert all(torch.equal(before[k], v) for k, v in other.state_dict().items())


def test_gates_of_more_degrees_keep_them_and_are_no_affine_ones():
    gates = {"encoder": mk.GateSpec(degree=2), "decoder": mk.GateSpec("sqrt", degree=2)}
    state = build_network(gates).state_dict()
    other = build_network(gates)
    torch.nn.init.zeros_(other.gate_weight)
    other.load_state_dict(state)
    assert torch.equal(other.gate_weight, state["gate_weight"]) and other.gate_weight.shape[0] == 2
    assert "degree=2" in repr(other) and "degree" not in repr(build_network())
    with pytest.raises(ValueError, match=re.escape("degree = 2, this MultiRate has 1")):
        build_network().load_state_dict(state)


def test_a_record_from_before_there_was_a_degree_is_of_affine_gates():
    affine = build_network()
    record = json.loads(bytes(affine.get_extra_state().tolist()))
    assert record.pop("degree") == 1
    state = {**affine.state_dict(), "_extra_state": encode_state(record)}
    build_network().load_state_dict(state)
    cubic = build_network({"encoder": mk.GateSpec(degree=3), "decoder": mk.GateSpec("sqrt", degree=3)})
    with pytest.raises(ValueError, match=re.escape("degree = 1, this MultiRate has 3")):
        cubic.load_state_dict(state)


def test_gates_of_a_network_have_one_degree():
    with pytest.raises(ValueError, match="has degree 3, that of decoder.*has 1; expected one degree for all gates"):
        build_network({"encoder": mk.GateSpec(degree=3), "decoder": "sqrt"})


def test_missing_keys_and_other_shapes_are_errors():
    state = build_network().state_dict()
    for key in ("gate_weight", "_extra_state", "network.encoder.0.weight"):
        with pytest.raises(RuntimeError, match=key):
            build_network().load_state_dict({k: v for k, v in state.items() if k != key})
    with pytest.raises(RuntimeError, match="size mismatch for gate_bias"):
        build_network().load_state_dict({**state, "gate_bias": state["gate_bias"][:-1]})


@pytest.mark.parametrize("beta", [0.3, BETA], ids=["shared", "per sample"])
@pytest.mark.parametrize("strategy", ["fold", "epilogue", None])
def test_bfloat16_and_autocast_stay_near_float64(backend, beta, strategy):
    if strategy == "fold" and beta is BETA:
        strategy = None
    exact, x = build_network(with_norm=True).eval(), images()
    expected = exact(x, beta=beta)
    with mk.override(strategy=strategy):
        low = copy.deepcopy(exact).bfloat16()
        y = low(x.bfloat16(), beta=beta)
        assert y.dtype == torch.bfloat16 and relative_error(y.double(), expected) < 0.05
        mixed = copy.deepcopy(exact).float()
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16):
                y = mixed(x.float(), beta=beta)
            assert y.dtype == torch.bfloat16 and relative_error(y.double(), expected) < 0.05
        y.float().square().sum().backward()
        reference = dict(
            zip(
                (n for n, _ in exact.named_parameters()),
                parameter_gradients(exact, expected.square().sum()),
                strict=True,
            )
        )
        for name, parameter in mixed.named_parameters():
            if parameter.grad is not None:
                assert parameter.grad.dtype == torch.float32
                error = (parameter.grad.double() - reference[name]).norm() / reference[name].norm()
                assert error < 0.15, name  # a rounded unit near 0 may fall on the other side of ReLU


class PartlyFloat32(torch.nn.Module):
    """A network whose head runs without autocast, as loss-like parts do."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = torch.nn.Linear(6, 5), torch.nn.Linear(5, 4)

    def forward(self, x):
        h = self.encoder(x)
        with torch.autocast("cpu", enabled=False):
            return self.decoder(h.float())


@pytest.mark.parametrize("strategy", ["fold", "epilogue"])
def test_a_part_without_autocast_stays_in_float32(backend, strategy):
    model, x = mk.multirate(PartlyFloat32()), torch.rand(3, 6)
    expected = model(x, beta=0.3)
    with mk.override(strategy=strategy), torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            y = model(x, beta=0.3)
            assert y.dtype == torch.float32
        plain = mk.bake(model, 0.3)
    torch.testing.assert_close(y, expected, rtol=3e-2, atol=3e-2)
    assert {p.dtype for p in plain.parameters()} == {torch.float32}
    torch.testing.assert_close(plain(x), expected)


def test_a_layer_replaced_after_multirate_is_named():
    model = mk.multirate(ConvolutionalVAE(True))
    model.network = nn.SyncBatchNorm.convert_sync_batchnorm(model.network)
    with pytest.raises(
        RuntimeError, match=r"'encoder.1' is a SyncBatchNorm: it was replaced or parametrized after multirate\(\)"
    ):
        model(images().float(), beta=0.5)
    model.network = ConvolutionalVAE(True)
    with pytest.raises(RuntimeError, match="model.network was replaced after multirate"):
        model(images().float(), beta=0.5)


def test_channels_last_networks(backend):
    model, x = build_network(with_norm=True).eval(), images()
    for beta in (0.3, BETA):
        expected = model(x, beta=beta)
        wanted = parameter_gradients(model, expected.sum())
        last = copy.deepcopy(model).to(memory_format=torch.channels_last)
        y = last(x.to(memory_format=torch.channels_last), beta=beta)
        torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-12)
        for value, other in zip(parameter_gradients(last, y.sum()), wanted, strict=True):
            torch.testing.assert_close(value, other, rtol=1e-9, atol=1e-11)
    x = torch.randn(2, 64, 8, 8, dtype=torch.float64).to(memory_format=torch.channels_last)
    layer = mk.multirate(nn.Conv2d(64, 64, 3).double().to(memory_format=torch.channels_last), "sqrt")
    for strategy in ("fold", "epilogue"):
        with mk.override(strategy=strategy):
            assert layer(x, beta=0.5).is_contiguous(memory_format=torch.channels_last)

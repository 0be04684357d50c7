"""WeightNormConv2d: its formula, and gated, folded and baked against plain PyTorch in float64."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mrvae_kernels as mk
from mrvae_kernels.gates import GateSpec
from tests.helpers import BETA, RANGE, parameter_gradients, randomize, relative_error

GATES = ["sigmoid", "sqrt", GateSpec("softplus", shift=True), GateSpec("softplus", inputs=GateSpec("sigmoid"))]


def layer(bias: bool = True) -> mk.WeightNormConv2d:
    torch.manual_seed(0)
    made = mk.WeightNormConv2d(4, 6, 3, stride=2, padding=1, groups=2, bias=bias).double()
    randomize(made)
    return made


def gated(spec, bias: bool = True) -> mk.MultiRate:
    model = mk.multirate(nn.Sequential(layer(bias), nn.SiLU(), mk.WeightNormConv2d(6, 3, 1).double()), spec, RANGE)
    randomize(model)
    return model


def reference(model: mk.MultiRate, x: torch.Tensor, beta: float) -> torch.Tensor:
    """g (W x + b) + t of both layers, W from torch's own weight norm, on unrelated leaves."""
    values = model.gate_values(beta)
    for name, stride, padding, groups in (("0", 2, 1, 2), ("2", 1, 0, 1)):
        module = model.network.get_submodule(name)
        weight = torch._weight_norm(module.weight, module.gain[:, None, None, None], 0)
        if (inputs := values.get(f"{name}.inputs")) is not None:
            x = x * inputs[:, None, None]
        x = F.conv2d(x, weight, module.bias, stride, padding, 1, groups) * values[name][:, None, None]
        if (shift := values.get(f"{name}.shift")) is not None:
            x = x + shift[:, None, None]
        x = F.silu(x) if name == "0" else x
    return x


def test_it_starts_as_the_convolution_of_the_same_seed_and_equals_torchs_weight_norm():
    torch.manual_seed(1)
    plain = nn.Conv2d(3, 5, 3)
    torch.manual_seed(1)
    normed = mk.WeightNormConv2d(3, 5, 3)
    x = torch.randn(2, 3, 6, 6)
    assert relative_error(normed(x), plain(x)) < 1e-6
    normed = layer()
    other = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2).double()
    other = nn.utils.parametrizations.weight_norm(other)
    other.load_state_dict({
        "bias": normed.bias, "parametrizations.weight.original0": normed.gain[:, None, None, None],
        "parametrizations.weight.original1": normed.weight,
    })
    x = torch.randn(2, 4, 7, 5, dtype=torch.float64)
    assert relative_error(normed(x), other(x)) < 1e-14
    normed.reset_parameters()
    assert relative_error(normed.effective_weight(), normed.weight) < 1e-15


@pytest.mark.parametrize("spec", GATES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("strategy", [None, "fold", "epilogue"])
def test_gated_equals_plain_pytorch_with_its_gradients(spec, bias, strategy):
    model = gated(spec, bias)
    x = torch.randn(5, 4, 7, 5, dtype=torch.float64)
    expected = torch.cat([reference(model, row[None], beta) for row, beta in zip(x, BETA, strict=True)])
    wanted = parameter_gradients(model, expected.cos().sum())
    with mk.override(strategy=strategy) if strategy != "fold" else mk.override():  # one a sample cannot fold
        for _ in range(3):  # without a plan, then with one
            found = model(x, beta=torch.tensor(BETA, dtype=torch.float64))
            assert relative_error(found, expected) < 1e-12
    for ours, theirs in zip(parameter_gradients(model, found.cos().sum()), wanted, strict=True):
        assert relative_error(ours, theirs) < 1e-10
    with mk.override(strategy=strategy):
        for beta in (0.3, 4.0):
            expected = reference(model, x, beta)
            for _ in range(3):
                found = model(x, beta=beta)
                assert relative_error(found, expected) < 1e-12
            wanted = parameter_gradients(model, expected.cos().sum())
            for ours, theirs in zip(parameter_gradients(model, found.cos().sum()), wanted, strict=True):
                assert relative_error(ours, theirs) < 1e-10


@pytest.mark.parametrize("spec", GATES)
def test_baked_it_is_a_layer_of_its_own_class_with_equal_outputs(spec):
    model = gated(spec)
    x = torch.randn(3, 4, 7, 5, dtype=torch.float64)
    plain = mk.bake(model, 0.7)
    assert [type(module) for module in plain] == [mk.WeightNormConv2d, nn.SiLU, mk.WeightNormConv2d]
    assert relative_error(plain(x), model(x, beta=0.7)) < 1e-13
    assert plain.state_dict().keys() == model.network.state_dict().keys()


def test_a_filter_whose_gate_is_zero_bakes_to_zero():
    model = mk.multirate(nn.Sequential(layer()), "sqrt", RANGE)
    with torch.no_grad():
        model.gate_weight[0], model.gate_bias[0] = 0.0, 5.0  # sqrt(relu(1 - exp(5))) = 0
    plain = mk.bake(model, 1.0)
    x = torch.randn(3, 4, 7, 5, dtype=torch.float64)
    assert plain(x)[:, 0].abs().max() == 0
    assert relative_error(plain(x), model(x, beta=1.0)) < 1e-13


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_a_filter_without_a_direction_is_zero_whatever_its_gain(dtype):
    normed = mk.WeightNormConv2d(4, 6, 3, dtype=dtype)
    with torch.no_grad():
        normed.weight[0] = 0
        normed.gain.fill_(100)  # over the least number of the dtype it is infinite
    weight = normed.effective_weight()
    assert weight.isfinite().all() and not weight[0].any() and weight[1].any()
    weight.square().sum().backward()
    assert normed.gain.grad.isfinite().all() and normed.weight.grad.isfinite().all()


def test_it_trains_copies_compiles_and_exports():
    model = gated(GateSpec("softplus", shift=True)).float()
    x = torch.randn(5, 4, 7, 5)
    twin = copy.deepcopy(model)
    beta = torch.tensor(BETA)
    assert torch.equal(twin(x, beta=beta), model(x, beta=beta))
    optimizer = torch.optim.SGD(twin.parameters(), 1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        twin(x, beta=beta).square().mean().backward()
        optimizer.step()
    assert twin(x, beta=beta).square().mean() < model(x, beta=beta).square().mean()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(model, fullgraph=True, backend="eager")
    for value in (beta, 0.5):
        assert relative_error(compiled(x, beta=value), model(x, beta=value)) < 1e-5
    program = torch.export.export(mk.bake(model, 0.5), (x,))
    assert relative_error(program.module()(x), model(x, beta=0.5)) < 1e-5

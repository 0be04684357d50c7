"""Every drop-in layer: torch.nn's own weights and names, a gate that is right, and what is saved and refused."""

from __future__ import annotations

import copy
import io
import json
from typing import Any, NamedTuple

import pytest
import torch
from helpers import randomize, relative_error, rows
from torch import Tensor, nn

import mrvae_kernels as mk
from mrvae_kernels.layers import encode_state


class Case(NamedTuple):
    gated: type
    args: tuple
    kwargs: dict[str, Any]
    shape: tuple[int, ...]


CASES = {
    "Linear": Case(mk.GatedLinear, (4, 6), {}, (5, 4)),
    "Linear, 3 axes, no bias": Case(mk.GatedLinear, (4, 6), {"bias": False}, (5, 3, 4)),
    "Conv1d same": Case(mk.GatedConv1d, (4, 6, 4), {"padding": "same", "groups": 2, "dilation": 3}, (5, 4, 7)),
    "Conv1d circular": Case(mk.GatedConv1d, (4, 6, 3), {"padding": 2, "padding_mode": "circular"}, (5, 4, 7)),
    "Conv2d": Case(mk.GatedConv2d, (2, 6, (3, 2)), {"stride": (2, 1), "padding": (1, 0)}, (5, 2, 6, 5)),
    "Conv2d reflect same": Case(
        mk.GatedConv2d, (2, 6, 3), {"padding": "same", "padding_mode": "reflect", "bias": False}, (5, 2, 5, 4)
    ),
    "Conv2d replicate valid": Case(
        mk.GatedConv2d, (2, 6, 3), {"padding": "valid", "padding_mode": "replicate"}, (5, 2, 5, 4)
    ),
    "Conv3d": Case(mk.GatedConv3d, (2, 4, 2), {"groups": 2, "padding": "valid"}, (5, 2, 3, 4, 3)),
    "ConvTranspose1d": Case(
        mk.GatedConvTranspose1d, (4, 6, 3), {"stride": 2, "output_padding": 1, "groups": 2}, (5, 4, 4)
    ),
    "ConvTranspose2d": Case(mk.GatedConvTranspose2d, (2, 6, 4, 2, 1), {"bias": False}, (5, 2, 3, 4)),
    "ConvTranspose3d": Case(mk.GatedConvTranspose3d, (2, 3, 2), {"dilation": 2}, (5, 2, 2, 3, 2)),
    "BatchNorm1d": Case(mk.GatedBatchNorm1d, (4,), {}, (5, 4)),
    "BatchNorm2d": Case(mk.GatedBatchNorm2d, (4,), {"momentum": None}, (5, 4, 3, 2)),
    "BatchNorm3d": Case(mk.GatedBatchNorm3d, (4,), {"track_running_stats": False}, (5, 4, 2, 2, 2)),
    "GroupNorm": Case(mk.GatedGroupNorm, (2, 4), {}, (5, 4, 3)),
    "LayerNorm": Case(mk.GatedLayerNorm, (4,), {}, (5, 3, 4)),
    "LayerNorm, 2 axes": Case(mk.GatedLayerNorm, ((3, 4),), {"bias": False}, (5, 2, 3, 4)),
    "LSTM": Case(mk.GatedLSTM, (3, 4), {"batch_first": True}, (5, 6, 3)),
    "GRU": Case(mk.GatedGRU, (3, 4), {"batch_first": True, "num_layers": 2, "bidirectional": True}, (5, 6, 3)),
}
BETA = [0.02, 0.3, 1.0, 4.0, 9.0]
every_case = pytest.mark.parametrize("name", CASES)


def build(name: str, seed: int = 0, **kwargs: Any) -> nn.Module:
    torch.manual_seed(seed)
    case = CASES[name]
    return case.gated(*case.args, **case.kwargs, **kwargs)


def build_plain(name: str, seed: int = 0, **kwargs: Any) -> nn.Module:
    torch.manual_seed(seed)
    case = CASES[name]
    return case.gated.plain(*case.args, **case.kwargs, **kwargs)


def output(result: Any) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


def inputs(name: str, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(CASES[name].shape, dtype=dtype, generator=torch.Generator().manual_seed(7))


@every_case
def test_a_seed_gives_torchs_own_weights_under_torchs_own_names(name):
    layer, plain = build(name, 3), build_plain(name, 3)
    assert isinstance(layer, CASES[name].gated.plain)
    state, expected = layer.state_dict(), plain.state_dict()
    assert all(torch.equal(state[key], value) for key, value in expected.items())
    assert set(state) - set(expected) == {"gate_weight", "gate_bias", "_extra_state"}
    features = layer.gate_weight.numel()
    assert layer.gate_weight.shape == layer.gate_bias.shape == (features,)
    film = build(name, 3, gate=mk.GateSpec(shift=True)).state_dict()
    assert set(film) - set(state) == {"shift_weight", "shift_bias"}


@every_case
@pytest.mark.parametrize("kind", ["sigmoid", "sqrt", "softplus"])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_shared_equals_per_sample_equals_the_plain_layer_at_that_beta(backend, name, kind, mode):
    layer = randomize(build(name, gate=mk.GateSpec(kind, shift=True), dtype=torch.float64)).train(mode == "train")
    x = inputs(name, torch.float64)
    twin, plain = copy.deepcopy(layer), layer.to_plain(0.3)
    assert type(plain) is CASES[name].gated.plain and plain.training == layer.training
    shared, repeated, expected = output(layer(x, 0.3)), output(twin(x, [0.3] * 5)), output(plain(x))
    torch.testing.assert_close(shared, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(repeated, expected, rtol=1e-10, atol=1e-12)
    for (key, buffer), other in zip(layer.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(buffer, other, msg=key)
    other = output(layer(x, 5.0))
    assert relative_error(other, shared) > 1e-3, "the output does not depend on beta"


@every_case
def test_one_beta_a_sample_equals_each_sample_alone_at_its_beta(backend, name):
    layer = randomize(build(name, gate=mk.GateSpec("softplus", shift=True), dtype=torch.float64)).eval()
    x = inputs(name, torch.float64)
    if "BatchNorm3d" in name:  # its statistics are the batch's, always: one sample alone is another batch
        expected = torch.stack([layer(x, b)[i] for i, b in enumerate(BETA)])
    else:
        expected = rows(lambda row, b: output(layer(row, b)), x, BETA)
    torch.testing.assert_close(output(layer(x, BETA)), expected, rtol=1e-9, atol=1e-11)


@every_case
def test_the_gate_multiplies_and_the_shift_adds(backend, name):
    """With gates forced to 1 and shifts to 0 the layer is torch's own; with gates 0 only the shift is left."""
    layer, x = build(name, gate=mk.GateSpec("sigmoid", shift=True)), inputs(name)
    with torch.no_grad():
        layer.gate_weight.zero_()
        layer.gate_bias.fill_(1e4)
    torch.testing.assert_close(output(layer(x, 0.5)), output(build_plain(name)(x)), rtol=1e-5, atol=1e-6)
    if name in ("LSTM", "GRU"):
        return
    with torch.no_grad():
        layer.gate_bias.fill_(-1e4)
        layer.shift_bias.fill_(0.75)
    for beta in (0.5, [0.5] * 5):
        assert (layer(x, beta) == 0.75).all()


@every_case
@pytest.mark.parametrize("per_sample", [False, True])
def test_gradcheck(backend, name, per_sample):
    layer = randomize(build(name, gate=mk.GateSpec("sigmoid", shift=True), dtype=torch.float64))
    if "running_mean" in layer._buffers:
        layer.eval()  # gradcheck calls again and again, and running statistics would move
    names, values = zip(*layer.named_parameters(), strict=True)
    beta = torch.tensor(BETA[:2] if per_sample else 0.3, dtype=torch.float64, requires_grad=True)
    x = inputs(name, torch.float64)[:2].detach().requires_grad_()

    def run(x: Tensor, beta: Tensor, *parameters: Tensor) -> Tensor:
        return output(torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x, beta)))

    assert torch.autograd.gradcheck(run, (x, beta, *values), fast_mode=True)


@every_case
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes(backend, name, dtype):
    layer, x = build(name, gate=mk.GateSpec(shift=True), dtype=dtype), inputs(name, dtype)
    exact = build(name, gate=mk.GateSpec(shift=True)).double()
    exact.load_state_dict(layer.state_dict())
    for beta in (0.3, BETA):
        y = output(layer(x, beta))
        assert y.dtype == dtype
        assert relative_error(y.double(), output(exact(x.double(), beta))) < (
            0.04 if dtype == torch.bfloat16 else 1e-12
        )
        y.float().sum().backward()
        assert all(p.grad.dtype == dtype and p.grad.isfinite().all() for p in layer.parameters())


@every_case
@pytest.mark.parametrize("count", [1, 3, 6])
def test_a_wrong_number_of_betas_is_a_value_error(backend, name, count):
    layer, x = build(name), inputs(name)
    with pytest.raises(ValueError, match="expected"):
        layer(x, [0.5] * count)
    with pytest.raises(ValueError, match="beta has shape"):
        layer(x, torch.full((5, 1), 0.5))


@every_case
def test_from_plain_shares_parameters_and_leaves_the_plain_layer_alone(backend, name):
    plain, x = randomize(build_plain(name)), inputs(name)
    before = {key: value.clone() for key, value in plain.state_dict().items()}
    layer = CASES[name].gated.from_plain(plain, "softplus", (0.1, 5.0))
    assert all(getattr(layer, key) is value for key, value in plain.named_parameters())
    assert type(plain) is CASES[name].gated.plain and plain.state_dict().keys() == before.keys()
    assert layer.gate_spec.kind == "softplus" and layer.beta_range == (0.1, 5.0)
    assert output(layer(x, 0.5)).shape == output(plain(x)).shape
    with torch.no_grad():
        next(plain.parameters()).zero_()
    assert (next(layer.parameters()) == 0).all()
    with pytest.raises(TypeError, match="from_plain takes an"):
        CASES[name].gated.from_plain(nn.Identity())


@every_case
def test_what_is_set_on_one_layer_of_from_plain_is_not_on_the_other(name):
    plain, x, heard = build_plain(name).eval(), inputs(name), []
    plain.register_forward_hook(lambda *_: heard.append("both"))
    layer = CASES[name].gated.from_plain(plain)
    plain.register_forward_pre_hook(lambda *_: heard.append("plain"))
    layer.register_forward_hook(lambda *_: heard.append("gated"))
    plain.register_buffer("count", torch.zeros(1), persistent=False)
    layer.register_buffer("count", torch.zeros(1))
    assert "count" in layer.state_dict() and "count" not in plain.state_dict()
    expected = output(plain(x))
    assert heard == ["plain", "both"]
    layer(x, 0.5)
    assert heard == ["plain", "both", "both", "gated"]
    first = next(key for key, _ in plain.named_parameters())
    setattr(layer, first, nn.Parameter(torch.zeros_like(getattr(plain, first))))
    assert torch.equal(output(plain(x)), expected)


@every_case
def test_to_plain_keeps_requires_grad_and_leaves_the_layer_alone(name):
    layer = build(name, gate=mk.GateSpec(shift=True))
    first = next(n for n, _ in layer.named_parameters())
    layer.get_parameter(first).requires_grad_(False)
    state = copy.deepcopy(layer.state_dict())
    plain = layer.to_plain(torch.tensor(0.3))
    assert not plain.get_parameter(first).requires_grad
    assert all(torch.equal(state[key], value) for key, value in layer.state_dict().items())
    assert set(plain.state_dict()) <= {*build_plain(name).state_dict(), "bias"}
    assert not [n for n in (*plain.__dict__, *plain.state_dict()) if "gate" in n or "beta" in n]
    for bad in ([0.5], torch.tensor([0.5]), -1.0):
        with pytest.raises(ValueError, match="beta is"):
            layer.to_plain(bad)


@every_case
def test_deepcopy_and_a_safe_round_trip_through_a_file(backend, name):
    layer, x = randomize(build(name, gate=mk.GateSpec("sqrt", shift=True))).eval(), inputs(name)
    expected = output(layer(x, 0.3))
    assert torch.equal(output(copy.deepcopy(layer)(x, 0.3)), expected)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = build(name, 99, gate=mk.GateSpec("sqrt", shift=True)).eval()
    assert not torch.equal(output(other(x, 0.3)), expected)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(output(other(x, 0.3)), expected)


@pytest.mark.parametrize("name", ["Linear", "Conv2d", "BatchNorm2d", "LSTM"])
@pytest.mark.parametrize(
    ("broken", "named"),
    [
        (encode_state({"beta_range": [0.1, 10.0], "gate": "sigmoid"}), r"beta_range = \[0.1, 10.0\]"),
        (encode_state({"beta_range": [0.01, 10.0], "gate": "sqrt"}), "gate = 'sqrt'"),
        (encode_state({}), "beta_range = None"),
        (torch.tensor([1, 2, 3], dtype=torch.uint8), "damaged"),
        (torch.tensor([400.0]), "damaged"),
        (torch.tensor(list(b"[" * 100_000), dtype=torch.uint8), "damaged"),
        (torch.tensor(list(json.dumps([1]).encode()), dtype=torch.uint8), "damaged"),
        ({"beta_range": [0.01, 10.0]}, "damaged"),
        (torch.empty(0, dtype=torch.uint8), "damaged"),
    ],
    ids=["range", "kind", "empty", "no json", "float", "deep", "list", "not a tensor", "nothing"],
)
def test_another_or_damaged_record_is_refused_before_anything_is_copied(name, broken, named):
    layer = build(name)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(ValueError, match=named):
        layer.load_state_dict({**build(name, 9).state_dict(), "_extra_state": broken})
    assert all(torch.equal(before[key], value) for key, value in layer.state_dict().items())


@every_case
@pytest.mark.parametrize("per_sample", [False, True])
def test_gates_of_more_degrees(backend, name, per_sample):
    layer = randomize(build(name, gate=mk.GateSpec("softplus", shift=True, degree=3), dtype=torch.float64)).eval()
    x, beta = inputs(name, torch.float64), torch.tensor(BETA if per_sample else 0.3, dtype=torch.float64)
    eta = mk.standardize(beta, dtype=torch.float64).unsqueeze(-1)
    basis = (eta, eta**2 - 1, eta**3 - 1.8 * eta)
    gate, shift = layer.gate(beta)
    p, t = (
        sum(e * w for e, w in zip(basis, weight, strict=True)) + bias
        for weight, bias in ((layer.gate_weight, layer.gate_bias), (layer.shift_weight, layer.shift_bias))
    )
    torch.testing.assert_close(gate, nn.functional.softplus(p))
    torch.testing.assert_close(shift, t)
    output(layer(x, beta)).sum().backward()
    assert layer.gate_weight.grad.shape == layer.gate_weight.shape == (3, layer.gate_bias.numel())
    assert all(row.any() for row in layer.gate_weight.grad) and "gate=softplus, degree=3" in repr(layer)
    torch.testing.assert_close(output(layer(x, 0.3)), output(layer.to_plain(0.3)(x)), rtol=1e-10, atol=1e-12)
    other = build(name, gate=mk.GateSpec("softplus", shift=True, degree=2), dtype=torch.float64)
    with pytest.raises(ValueError, match="degree = 3, this"):
        other.load_state_dict(layer.state_dict())


@every_case
@pytest.mark.parametrize("per_sample", [False, True])
def test_gates_with_hidden_layers(backend, name, per_sample):
    layer = randomize(build(name, gate=mk.GateSpec("softplus", shift=True, hidden=(8,)), dtype=torch.float64)).eval()
    x, beta = inputs(name, torch.float64), torch.tensor(BETA if per_sample else 0.3, dtype=torch.float64)
    gate, shift = layer.gate(beta)
    p = layer.gate_network(mk.standardize(beta, dtype=torch.float64))
    size = p.shape[-1] // 2
    torch.testing.assert_close(gate, nn.functional.softplus(p[..., :size]))
    torch.testing.assert_close(shift, p[..., size:])
    y = output(layer(x, beta))
    y.sum().backward()
    assert all(q.grad is not None for q in layer.parameters())
    plain = layer.to_plain(0.3)
    assert not [n for n in plain.state_dict() if "gate" in n]
    torch.testing.assert_close(output(layer(x, 0.3)), output(plain(x)), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("activation", ["relu", "silu", "gelu", "tanh", "leaky_relu", "elu"])
@pytest.mark.parametrize("name", ["Linear", "Conv1d circular", "ConvTranspose2d"])
def test_activations_follow_the_gate(backend, name, activation, per_sample):
    layer, x = build(name, activation=activation), inputs(name)
    bare = build(name)
    beta = BETA if per_sample else 0.3
    torch.testing.assert_close(layer(x, beta), getattr(nn.functional, activation)(bare(x, beta)))


def test_what_a_layer_refuses():
    with pytest.raises(ValueError, match="GatedGroupNorm cannot be gated: it has no affine"):
        mk.GatedGroupNorm(2, 4, affine=False)
    with pytest.raises(ValueError, match="elementwise_affine=False"):
        mk.GatedLayerNorm(4, elementwise_affine=False)
    with pytest.raises(ValueError, match="bias=False"):
        mk.GatedLSTM(3, 4, bias=False, gate=mk.GateSpec(shift=True))
    with pytest.raises(ValueError, match="multirate"):
        mk.GatedLinear(3, 4, gate=mk.GateSpec(hidden=(4,), shared=True))
    with pytest.raises(ValueError, match="multirate"):
        mk.GatedLinear(3, 4, gate=mk.GateSpec(inputs="sigmoid"))
    with pytest.raises(ValueError, match="gate kind is 'cube'"):
        mk.GatedLinear(3, 4, gate="cube")
    with pytest.raises(ValueError, match="activation is 'softmax'"):
        mk.GatedLinear(3, 4, activation="softmax")
    with pytest.raises(ValueError, match="activation is 'relu'; expected None"):
        mk.GatedBatchNorm1d(3, activation="relu")
    with pytest.raises(ValueError, match="beta_range"):
        mk.GatedLinear(3, 4, beta_range=(1, 0))


def test_output_size_unbatched_input_and_repr(backend):
    layer = mk.GatedConvTranspose2d(2, 3, 3, stride=2, padding=1)
    plain, x = layer.to_plain(0.3), torch.randn(4, 2, 5, 5)
    for size in ([9, 9], [10, 9], [10, 10]):
        expected = plain(x, output_size=size)
        assert expected.shape[2:] == tuple(size)
        torch.testing.assert_close(layer(x, 0.3, size), expected)
        torch.testing.assert_close(layer(x, [0.3] * 4, output_size=size), expected)
    torch.testing.assert_close(layer(x[0], 0.3), plain(x[0]))
    torch.testing.assert_close(layer(x[0], [0.3]), plain(x[0]))
    with pytest.raises(ValueError, match="no batch axis"):
        layer(x[0], [0.3, 0.4])
    with pytest.raises(ValueError, match="expected"):
        mk.GatedLayerNorm(4)(torch.randn(4), [0.5] * 4)
    assert "gate=sqrt, beta_range=(0.01, 10.0)" in repr(mk.GatedLinear(2, 3, gate="sqrt"))

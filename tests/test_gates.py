"""Gates against independent closed forms, their numbers at the extremes, their initialisation and their errors."""

from __future__ import annotations

import itertools
import math
import warnings

import numpy as np
import pytest
import torch
from helpers import RANGE
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import mrvae_kernels as mk
from mrvae_kernels import gates
from mrvae_kernels.gates import GATE_KINDS, GateNetwork, all_positive, init_gates_
from mrvae_kernels.reference import gate_activation, polynomials

BOUNDS = mk.BetaRange(*RANGE)
BETAS = torch.tensor([1e-30, 1e-6, 0.01, 0.37, 1.0, 10.0, 1e6, 1e30], dtype=torch.float64)
finite = st.floats(allow_nan=False, allow_infinity=False, width=32)


@pytest.fixture(autouse=True)
def _extrapolation_is_meant():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="beta = .* lies outside")
        yield


# Theorem 1 of the paper (Eqn. 26): the gate is the exact response of a linear VAE, once the standardisation is undone.


def test_the_sigmoid_gate_is_the_linear_encoders_response(backend):
    singular = torch.tensor([0.05, 0.3, 1.0, 2.5, 40.0], dtype=torch.float64)
    weight = torch.full((5,), -BOUNDS.std, dtype=torch.float64)
    bias = 2 * singular.log() - BOUNDS.mean
    gate = mk.gate_values(weight, bias, BETAS, "sigmoid")
    expected = singular**2 / (singular**2 + BETAS[:, None])
    torch.testing.assert_close(gate, expected, rtol=1e-12, atol=0)


def test_the_sqrt_gate_is_the_linear_decoders_response(backend):
    eigenvalues = torch.tensor([0.05, 0.3, 1.0, 2.5, 40.0], dtype=torch.float64)
    weight = torch.full((5,), BOUNDS.std, dtype=torch.float64)
    bias = BOUNDS.mean - eigenvalues.log()
    beta = BETAS + 1e-3 * BETAS  # no beta equals an eigenvalue, where rounding decides
    gate = mk.gate_values(weight, bias, beta, "sqrt")
    expected = (1 - beta[:, None] / eigenvalues).clamp(min=0).sqrt()
    torch.testing.assert_close(gate, expected, rtol=1e-9, atol=0)
    assert (gate[beta[:, None] > eigenvalues] == 0).all()


def test_the_softplus_gate_is_unbounded_and_log_1_plus_exp(backend):
    p = torch.tensor([-800.0, -30.0, -1.0, 0.0, 2.0, 30.0, 800.0], dtype=torch.float64)
    gate = mk.gate_values(torch.zeros_like(p), p, 0.5, "softplus")
    expected = torch.tensor([math.log1p(math.exp(v)) if v < 700 else v for v in p.tolist()], dtype=torch.float64)
    # the compiled core's e^p is never below the smallest normal number
    torch.testing.assert_close(gate, expected, rtol=1e-14, atol=2.3e-308)


def test_the_polynomials_are_orthogonal_where_log_beta_is_uniform():
    nodes, weights = np.polynomial.legendre.leggauss(8)  # exact for the products, of degree 6
    eta = math.sqrt(3) * torch.tensor(nodes)
    basis = torch.stack([torch.ones_like(eta), *polynomials(eta, 3)])
    gram = (basis * torch.tensor(weights) / 2) @ basis.t()
    torch.testing.assert_close(gram, torch.diag(gram.diag()), rtol=0, atol=1e-14)
    torch.testing.assert_close(gram.diag(), torch.tensor([1, 1, 4 / 5, 108 / 175], dtype=torch.float64))


@pytest.mark.parametrize("kind", GATE_KINDS)
def test_a_gate_of_degree_3_is_a_cubic_of_log_beta(backend, kind):
    weight = torch.tensor([[0.3, -0.2, 0.0], [-0.1, 0.05, 0.0], [0.02, 0.1, 0.0]], dtype=torch.float64)
    bias = torch.tensor([-1.0, -2.0, -0.5], dtype=torch.float64)
    eta = ((BETAS[2:6].log() - BOUNDS.mean) / BOUNDS.std)[:, None]
    for degree in (1, 2, 3):
        p = bias + weight[0] * eta
        p = p + weight[1] * (eta**2 - 1) if degree > 1 else p
        p = p + weight[2] * (eta**3 - 9 / 5 * eta) if degree > 2 else p
        gate = mk.gate_values(weight[:degree], bias, BETAS[2:6], kind)
        torch.testing.assert_close(gate, gate_activation(p, kind), rtol=1e-12, atol=0)
        for one, row in zip(BETAS[2:6].tolist(), gate, strict=True):
            torch.testing.assert_close(mk.gate_values(weight[:degree], bias, one, kind), row, rtol=1e-12, atol=0)


@pytest.mark.parametrize("degree", [None, 2, 3])
@pytest.mark.parametrize("kind", GATE_KINDS)
def test_gate_gradients_are_right(backend, kind, degree):
    generator = torch.Generator().manual_seed(1)
    shape = (4,) if degree is None else (degree, 4)
    weight, bias = (0.3 * torch.randn(size, dtype=torch.float64, generator=generator) for size in (shape, (4,)))
    bias -= 1.5 * (kind == "sqrt")  # away from the end where the slope is bounded on purpose
    for beta in (torch.tensor(0.7, dtype=torch.float64), torch.tensor([0.02, 0.7, 8.0], dtype=torch.float64)):
        inputs = [t.clone().requires_grad_() for t in (weight, bias, beta)]
        assert torch.autograd.gradcheck(lambda w, c, b: mk.gate_values(w, c, b, kind), inputs)


def slope(kind: str, p: Tensor) -> Tensor:
    p = p.clone().requires_grad_()
    eta_zero = math.exp(BOUNDS.mean)  # p = c there
    return torch.autograd.grad(mk.gate_values(torch.zeros_like(p), p, eta_zero, kind).sum(), p)[0]


def test_the_sqrt_gates_slope_is_exact_away_from_0_bounded_near_it_and_0_when_closed(backend):
    p = torch.tensor([-20.0, -3.0, -0.5, -0.01], dtype=torch.float64)
    torch.testing.assert_close(slope("sqrt", p), -p.exp() / (2 * (1 - p.exp()).sqrt()), rtol=1e-10, atol=1e-15)
    near = -torch.logspace(-300, -3, 50, dtype=torch.float64)
    assert (slope("sqrt", near) < 0).all() and (slope("sqrt", near) >= -8).all()
    assert slope("sqrt", near[:1]).item() == pytest.approx(-8)
    closed = torch.tensor([0.0, 1e-300, 1.0, 88.5, 100.0, 1e300], dtype=torch.float64)
    assert (slope("sqrt", closed) == 0).all()
    gate = mk.gate_values(torch.zeros(6, dtype=torch.float64), closed, 0.5, "sqrt")
    assert (gate == 0).all() and not torch.signbit(gate).any()


def test_the_bound_on_the_slope_leaves_the_values_exact(backend):
    p = -torch.logspace(-30, -3, 50, dtype=torch.float64)
    gate = mk.gate_values(torch.zeros_like(p), p, 0.5, "sqrt")
    torch.testing.assert_close(gate, (-torch.expm1(p)).sqrt(), rtol=1e-14, atol=0)


@given(
    w=finite,
    c=finite,
    log10_beta=st.floats(-30, 30),
    kind=st.sampled_from(GATE_KINDS),
    per_sample=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
)
def test_no_finite_input_gives_nan_or_infinity(backend, w, c, log10_beta, kind, per_sample, dtype):
    check_finite(backend, w, c, log10_beta, kind, per_sample, dtype)


@pytest.mark.parametrize("kind", GATE_KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_the_largest_parameters_give_finite_gates(backend, kind, dtype):
    largest = torch.finfo(dtype).max
    for w, c, log10_beta in itertools.product((-largest, 0.0, largest), (-largest, largest), (-30, 0, 30)):
        check_finite(backend, w, c, log10_beta, kind, False, dtype)


def check_finite(backend, w, c, log10_beta, kind, per_sample, dtype):
    if backend == "cpp" and dtype == torch.float16:
        return  # not one of its dtypes
    limit = torch.finfo(dtype).max
    weight, bias = (torch.tensor([min(max(v, -limit), limit)], dtype=dtype).requires_grad_() for v in (w, c))
    beta = torch.tensor([10.0**log10_beta] * 2 if per_sample else 10.0**log10_beta)
    gate = mk.gate_values(weight, bias, beta, kind)
    assert gate.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert gate.isfinite().all() and (gate >= 0).all()
    if kind != "softplus":
        assert (gate <= 1).all()
    for gradient, parameter in zip(
        torch.autograd.grad(gate[..., 0].reshape(-1)[0], (weight, bias)), (weight, bias), strict=True
    ):
        assert gradient.dtype == parameter.dtype and gradient.isfinite().all()


def test_low_precision_parameters_are_raised_to_float32_gates(backend):
    weight, bias = torch.randn(8).bfloat16(), torch.randn(8).bfloat16()
    gate = mk.gate_values(weight, bias, 0.3)
    torch.testing.assert_close(gate, mk.gate_values(weight.float(), bias.float(), 0.3), rtol=1e-6, atol=0)


def test_errors_of_gate_values():
    with pytest.raises(ValueError, match="gate kind is 'tanh'; expected one of sigmoid, sqrt, softplus"):
        mk.gate_values(torch.ones(2), torch.ones(2), 0.5, "tanh")
    with pytest.raises(ValueError, match="expected"):
        mk.gate_values(torch.ones(2), torch.ones(3), 0.5)
    for shape in ((4, 2), (0, 2), (2, 3), (1, 2, 2)):
        with pytest.raises(ValueError, match="of degree 1 to 3"):
            mk.gate_values(torch.ones(shape), torch.ones(2), 0.5)
    with pytest.raises(ValueError, match="gate kind is 'cube'"):
        gate_activation(torch.ones(2), "cube")


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": "identity"},
        {"kind": ""},
        {"init": "closed"},
        {"hidden": (0,)},
        {"hidden": (4, -1)},
        {"hidden": 4},
        {"hidden": (2.5,)},
        {"shared": True},
        {"kind": "sqrt", "init": "ranked"},
        {"init": "ranked", "hidden": (4,)},
        {"hidden": (4,), "inputs": "sigmoid"},
        {"degree": 0},
        {"degree": 4},
        {"degree": True},
        {"degree": 2.5},
        {"degree": 2.0},
        {"inputs": mk.GateSpec(degree=3)},
        {"inputs": mk.GateSpec(degree=2), "degree": 3},
        {"degree": "3"},
        {"hidden": (4,), "degree": 2},
        {"inputs": "cube"},
        {"inputs": mk.GateSpec(shift=True)},
    ],
)
def test_a_bad_gate_spec_is_a_value_error(fields):
    with pytest.raises(ValueError, match=r"gate|shared|inputs"):
        mk.GateSpec(**fields)


def test_gate_specs_from_names_and_lists():
    assert mk.GateSpec.of("sqrt") == mk.GateSpec(kind="sqrt")
    assert mk.GateSpec(hidden=[4, 5]) == mk.GateSpec(hidden=(4, 5)) and hash(mk.GateSpec(hidden=[4]))
    with pytest.raises(TypeError, match="gate is 3"):
        mk.GateSpec.of(3)


def test_the_gate_on_the_inputs_has_the_gates_degree():
    assert mk.GateSpec(inputs="sigmoid", degree=3).inputs == mk.GateSpec("sigmoid", degree=3)


def test_ranked_gates_that_bend_have_their_thresholds_earlier():
    weight, bias = torch.empty(2, 6), torch.empty(6)
    init_gates_(weight, bias, "sigmoid", "ranked")
    torch.testing.assert_close(-bias / weight[0], torch.tensor([2.0, 1.5, 1.0, 0.5, 0.0, -0.5]))
    assert (weight[0] == -4).all() and (weight[1] == 0).all()


@pytest.mark.parametrize("init", ["open", "paper"])
def test_gates_of_more_degrees_start_affine(init):
    weight, bias = torch.full((3, 50), 7.0), torch.empty(50)
    init_gates_(weight, bias, "sigmoid", init)
    assert (weight[1:] == 0).all() and (weight[0] != 7).all() and weight[0].std() > 0.2


def dead(kind: str, init: str) -> tuple[float, Tensor]:
    """The share of gates that are 0 at every beta of the range, and all the gates (beta, feature)."""
    weight, bias = torch.empty(100_000), torch.empty(100_000)
    init_gates_(weight, bias, kind, init)
    gate = mk.gate_values(weight, bias, torch.logspace(-2, 1, 61), kind)
    return (gate == 0).all(0).float().mean().item(), gate


def test_the_papers_initialisation_leaves_a_seventh_of_the_sqrt_gates_dead():
    share, gate = dead("sqrt", "paper")
    assert share == pytest.approx(1 / (4 * math.sqrt(3)), abs=0.005)  # P(c >= sqrt(3) |w|) for w, c ~ U(-1, 1)
    assert (gate == 0).float().mean().item() == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize(("kind", "center"), [("sigmoid", 0.85), ("sqrt", 0.94), ("softplus", 1.0)])
def test_gates_start_open_by_default(kind, center):
    share, gate = dead(kind, "open")
    assert share == 0
    assert gate[30].mean().item() == pytest.approx(center, abs=0.03)
    assert gate.mean(1).min() > 0.75


def test_ranked_features_close_one_after_another():
    weight, bias = torch.empty(8), torch.empty(8)
    init_gates_(weight, bias, "sigmoid", "ranked")
    gate = mk.gate_values(weight, bias, [0.02, 10.0, 100.0], "sigmoid")
    assert (gate.diff(dim=1) < 0).all() and (gate[0] > gate[1]).all() and (gate[1] > gate[2]).all()


def test_a_shift_starts_at_0():
    weight, bias = torch.empty(5), torch.empty(5)
    init_gates_(weight, bias, "identity")
    assert (weight == 0).all() and (bias == 0).all()


def test_a_gate_network_starts_open_and_is_an_mlp_of_eta():
    network = GateNetwork((7, 3), [4, 2], ["sqrt", "identity"])
    p = network(torch.tensor([-1.0, 0.5]))
    assert p.shape == (2, 6) and network(torch.tensor(0.5)).shape == (6,)
    assert (p[0] == p[1]).all() and (p[0, :4] <= -1).all() and (p[0, 4:] == 0).all()
    nn.init.normal_(network.output.weight)
    first, _, second, _ = network.hidden
    eta = torch.tensor([[0.3]])
    h = (first.weight @ eta + first.bias[:, None]).relu()
    h = (second.weight @ h + second.bias[:, None]).relu()
    expected = (network.output.weight @ h + network.output.bias[:, None])[:, 0]
    torch.testing.assert_close(network(torch.tensor(0.3)), expected)
    assert len(list(GateNetwork((5,), [3], ["sigmoid"], "paper").parameters())) == 4


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.int64])
@pytest.mark.parametrize("place", [0, 4, 8])
def test_betas_are_all_positive_or_one_of_them_is_not(monkeypatch, compiled, dtype, place):
    if not compiled:
        monkeypatch.setattr(gates, "EXTENSION", False)
    betas = torch.full((9,), 3, dtype=dtype)
    for strided in (betas, betas.repeat_interleave(2)[::2], betas[4], betas[:0]):
        assert all_positive(strided) is True
    for bad in (0.0, -1.0, *((math.nan, math.inf, -math.inf) if dtype.is_floating_point else ())):
        betas[place] = bad
        for holding in (betas, betas.repeat_interleave(2)[::2], betas[place]):
            assert all_positive(holding) is False


def test_betas_that_need_a_gradient_are_looked_at_too():
    beta = torch.tensor([1.0, -1.0], requires_grad=True)
    assert not all_positive(beta) and all_positive(beta.abs())

"""The reference operators against loops and torch's own functions: what everything else is compared with."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from mrvae_kernels import reference


def double(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def test_fold_scales_each_output_row():
    weight, bias, gate, shift = double(3, 4, 2), double(3), double(3), double(3)
    folded, folded_bias = reference.fold(weight, bias, gate, shift)
    for c in range(3):
        assert torch.equal(folded[c], weight[c] * gate[c])
        assert folded_bias[c] == bias[c] * gate[c] + shift[c]


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_fold_of_a_transposed_weight_follows_its_groups(groups):
    c_in, c_out = 2 * groups, 4 * groups
    weight, gate = double(c_in, 4, 3), double(c_out)
    folded, _ = reference.fold(weight, None, gate, None, groups)
    for i in range(c_in):
        for o in range(4):
            assert torch.equal(folded[i, o], weight[i, o] * gate[(i // 2) * 4 + o])
    x, options = double(2, c_in, 5), {"stride": 2, "padding": 1, "groups": groups}
    torch.testing.assert_close(
        F.conv_transpose1d(x, folded, **options), F.conv_transpose1d(x, weight, **options) * gate[:, None]
    )


def test_fold_without_a_bias_is_the_shift_or_nothing():
    weight, gate, shift = double(3, 2), double(3), double(3)
    assert reference.fold(weight, None, gate)[1] is None
    assert torch.equal(reference.fold(weight, None, gate, shift)[1], shift)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_float32_and_rounded_once(dtype):
    weight, bias, u = (t.to(dtype) for t in (torch.randn(64, 9), torch.randn(64), torch.randn(7, 64)))
    gate, shift = torch.rand(64), torch.randn(64)
    folded, folded_bias = reference.fold(weight, bias, gate, shift)
    assert folded.dtype == folded_bias.dtype == dtype
    assert torch.equal(folded, (weight.double() * gate.double()[:, None]).float().to(dtype))
    assert torch.equal(folded_bias, (bias.float() * gate + shift).to(dtype))
    y = reference.epilogue(u, bias, gate, shift, 1, "tanh")
    assert y.dtype == dtype
    assert torch.equal(y, torch.tanh((u.float() + bias.float()) * gate + shift).to(dtype))


@pytest.mark.parametrize("dim", [0, 1, 2, 3])
def test_epilogue_along_each_axis(dim):
    u = double(2, 3, 4, 5)
    bias, gate, shift = (double(u.shape[dim]) for _ in range(3))
    y = reference.epilogue(u, bias, gate, shift, dim, "elu").movedim(dim, -1)
    torch.testing.assert_close(y, F.elu(gate * (u.movedim(dim, -1) + bias) + shift))


def test_epilogue_with_a_gate_for_each_sample():
    u, bias, gate, shift = double(3, 4, 5), double(4), double(3, 4), double(3, 4)
    y = reference.epilogue(u, bias, gate, shift, 1)
    for n in range(3):
        assert torch.equal(y[n], (u[n] + bias[:, None]) * gate[n][:, None] + shift[n][:, None])


@pytest.mark.parametrize(
    ("name", "formula"),
    [
        ("none", lambda v: v),
        ("relu", lambda v: max(v, 0.0)),
        ("silu", lambda v: v / (1 + math.exp(-v))),
        ("gelu", lambda v: v * (1 + math.erf(v / math.sqrt(2))) / 2),
        ("tanh", math.tanh),
        ("leaky_relu", lambda v: v if v > 0 else 0.01 * v),
        ("elu", lambda v: v if v > 0 else math.expm1(v)),
    ],
)
def test_activations_by_their_formulas(name, formula):
    values = [-3.0, -0.5, 0.0, 0.5, 3.0]
    y = reference.activate(torch.tensor(values, dtype=torch.float64), name)
    assert y.tolist() == pytest.approx([formula(v) for v in values], rel=1e-14, abs=1e-16)
    assert name in reference.ACTIVATIONS


def test_an_unknown_activation_is_a_value_error():
    with pytest.raises(ValueError, match="activation is 'softmax'; expected one of none, relu"):
        reference.activate(torch.ones(2), "softmax")


def test_the_bank_is_its_parts():
    weight, bias, eta = double(9), double(9), double(4)
    kinds = ["sigmoid", "sqrt", "identity"]
    for value in (eta, eta[0]):
        bank = reference.gate_bank(weight, bias, value, [2, 3, 4], kinds)
        starts = (0, 2, 5, 9)
        for k, (start, end) in enumerate(zip(starts[:-1], starts[1:], strict=True)):
            alone = reference.gates(weight[start:end], bias[start:end], value, kinds[k])
            assert torch.equal(bank[k], alone) and alone.shape == (*value.shape, end - start)


def test_the_sqrt_gate_is_differentiable_twice():
    """At its end it has the bounded slope's derivative, -8 e^p."""
    p = torch.tensor([-3.0, -0.5, -0.01, -0.003, -1e-12, 0.0, 0.5], dtype=torch.float64)
    gate = (1 - p.exp()).clamp(min=0).sqrt()
    exact = -p.exp() / (2 * gate) - p.exp().square() / (4 * gate**3)
    expected = torch.where(gate > 1 / 16, exact, torch.where(p < 0, -8 * p.exp(), 0))
    for hessian in (torch.func.hessian, lambda f: torch.func.jacrev(torch.func.grad(f)), twice):
        found = torch.stack([hessian(lambda value: reference.gate_activation(value, "sqrt"))(value) for value in p])
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)


def twice(function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """Its second derivative as autograd has it."""

    def second(p: torch.Tensor) -> torch.Tensor:
        p = p.clone().requires_grad_()
        (first,) = torch.autograd.grad(function(p), p, create_graph=True)
        return torch.autograd.grad(first, p)[0]

    return second

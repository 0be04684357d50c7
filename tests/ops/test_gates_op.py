from __future__ import annotations

import math

import pytest
import torch
from helpers import check_gradient_with_a_tangent
from op_checks import (
    DEVICE,
    agree,
    assert_close,
    check_compiled,
    check_once_differentiable,
    check_subsets,
    leaf,
    requires_extension,
    same_bits_for_any_threads,
)

from mrvae_kernels import ops, reference

pytestmark = requires_extension

NAMES = ["sigmoid", "sqrt", "softplus", "identity"]
SIZES = [3, 1, 260, 17]
KINDS = [0, 1, 2, 3]


def bank(weight, bias, eta):
    return ops.gates(weight, bias, eta, SIZES, KINDS)


def oracle(weight, bias, eta):
    return reference.gate_bank(weight, bias, eta, SIZES, NAMES)


def parameters(dtype=torch.float64, degree=None):
    """weight (C,), or (degree, C), and bias."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    shape = (sum(SIZES),) if degree is None else (degree, sum(SIZES))
    weight, bias = (torch.randn(size, generator=generator) for size in (shape, shape[-1:]))
    return weight.to(dtype), bias.to(dtype)


def eta_like(samples, dtype):
    dtype = reference.gate_dtype(dtype)
    return torch.tensor(0.4, dtype=dtype) if samples is None else torch.linspace(-2, 2, samples, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("samples", [None, 0, 1, 5])
@pytest.mark.parametrize("degree", [None, 1, 2, 3])
def test_agrees_with_reference(degree, dtype, samples):
    agree(bank, oracle, [*parameters(dtype, degree), eta_like(samples, dtype)])
    gates = bank(*parameters(dtype, degree), eta_like(samples, dtype))
    assert {g.dtype for g in gates} == {reference.gate_dtype(dtype)}


@pytest.mark.parametrize("samples", [None, 4])
@pytest.mark.parametrize("degree", [None, 2, 3])
def test_gradcheck(degree, samples):
    weight, bias = parameters(degree=degree)
    bias[3] = -2.0  # the sqrt gate well inside p < 0
    weight[..., 3] = 0.3 if degree is None else 0.1
    assert torch.autograd.gradcheck(bank, [leaf(weight), leaf(bias), leaf(eta_like(samples, torch.float64))])


def test_values_against_exact_arithmetic():
    p = torch.tensor([-80.0, -20.0, -3.0, -0.5, -1e-3, -1e-7, 0.0, 0.7, 15.0, 60.0], dtype=torch.float64)
    exact = {
        0: lambda v: 1 / (1 + math.exp(-v)),
        1: lambda v: math.sqrt(-math.expm1(v)) if v < 0 else 0.0,
        2: lambda v: max(v, 0) + math.log1p(math.exp(-abs(v))),
    }
    for dtype, tolerance in ((torch.float64, 4e-16), (torch.float32, 3e-7)):
        for kind, function in exact.items():
            w = torch.zeros(len(p), dtype=dtype)
            (g,) = ops.gates(w, p.to(dtype), torch.tensor(0.0, dtype=dtype), [len(p)], [kind])
            want = torch.tensor([function(v) for v in p.to(dtype).tolist()], dtype=torch.float64)
            torch.testing.assert_close(g.double(), want, rtol=tolerance, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_sqrt_gate_is_exactly_closed_and_its_slope_is_bounded(dtype):
    p = torch.tensor([0.0, -0.0, 1e-30, 1.0, 87.0, 89.0, 1e4, -1e-30, -1e-12, -1e-4], dtype=dtype, requires_grad=True)
    (g,) = ops.gates(torch.zeros_like(p), p, torch.tensor(0.0, dtype=dtype), [len(p)], [1])
    g.sum().backward()
    assert torch.equal(g[:7], torch.zeros(7, dtype=dtype)) and not torch.signbit(g[:7]).any()
    assert torch.equal(p.grad[:7].abs(), torch.zeros(7, dtype=dtype))
    assert (p.grad[7:] >= -8).all() and (p.grad[7:] < 0).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_every_finite_argument_gives_finite_gates_and_slopes(kind, dtype):
    limit = torch.finfo(dtype).max
    values = torch.tensor([0.0, 1e-38, 1.0, 88.0, 90.0, 710.0, 1e20, limit], dtype=dtype)
    values = torch.cat([values, -values])
    weight, bias = (t.flatten() for t in torch.meshgrid(values, values, indexing="ij"))
    for eta in (-40.0, -1.0, 0.0, 1.0, 40.0):
        w, c = leaf(weight), leaf(bias)
        (g,) = ops.gates(w, c, torch.tensor(eta, dtype=dtype), [len(w)], [kind])
        g.backward(torch.ones_like(g))
        assert g.isfinite().all() and w.grad.isfinite().all() and c.grad.isfinite().all()


def test_nan_is_not_hidden():
    for kind in KINDS:
        (g,) = ops.gates(torch.tensor([math.nan]), torch.zeros(1), torch.tensor(1.0), [1], [kind])
        assert g.isnan().all()


def test_subsets_and_unused_outputs():
    check_subsets(bank, [*parameters(), eta_like(3, torch.float64)])
    weight, bias = (leaf(t) for t in parameters())
    gates = bank(weight, bias, eta_like(3, torch.float64))
    gates[2].sum().backward()
    used = torch.zeros(sum(SIZES), dtype=torch.bool)
    used[4:264] = True
    assert (weight.grad[used] != 0).all() and (weight.grad[~used] == 0).all() and (bias.grad[~used] == 0).all()


@pytest.mark.parametrize("samples", [None, 5])
def test_strided_inputs_and_expanded_gradients(samples):
    wide = torch.randn(2 * sum(SIZES), dtype=torch.float64)
    eta = torch.randn(10, dtype=torch.float64)[::2] if samples else torch.tensor(0.1, dtype=torch.float64)

    def transposed(weight, bias, eta):
        return bank(weight.t(), bias[1::2], eta)

    def transposed_oracle(weight, bias, eta):
        return oracle(weight.t(), bias[1::2], eta)

    agree(transposed, transposed_oracle, [torch.randn(sum(SIZES), 3, dtype=torch.float64), wide, eta])

    def sliced(weight, bias, eta):
        return bank(weight[::2], bias[1::2], eta)

    def sliced_oracle(weight, bias, eta):
        return oracle(weight[::2], bias[1::2], eta)

    agree(sliced, sliced_oracle, [wide, wide.flip(0), eta])
    agree(sliced, sliced_oracle, [wide, wide.flip(0), eta], grads=lambda t: t.new_ones(()).expand(t.shape))


def test_keeps_only_its_inputs():
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        bank(*(leaf(t) for t in parameters()), eta_like(5, torch.float64))
    assert [t.numel() for t in kept] == [sum(SIZES), sum(SIZES), 5]


@pytest.mark.parametrize("shape", [(5000,), (3, 5000)])
def test_large_banks_give_the_same_bits_for_any_number_of_threads(shape):
    torch.manual_seed(0)
    weight, bias, eta = torch.randn(shape), torch.randn(5000), torch.randn(40)
    grads = [torch.randn(40, 3000), torch.randn(40, 2000)]

    def compute():
        leaves = [leaf(weight), leaf(bias), leaf(eta)]
        gates = ops.gates(*leaves, [3000, 2000], [1, 2])
        return [*gates, *torch.autograd.grad(gates, leaves, grads)]

    same_bits_for_any_threads(compute)
    exact = [leaf(t, torch.float64) for t in (weight, bias, eta)]
    want = reference.gate_bank(*exact, [3000, 2000], ["sqrt", "softplus"])
    for got, expected in zip(compute()[2:], torch.autograd.grad(want, exact, [g.double() for g in grads]), strict=True):
        assert_close(got, expected, 1e-4)


@pytest.mark.parametrize("degree", [None, 3])
def test_opcheck_and_compile(degree):
    weight, bias = parameters(degree=degree)
    for eta in (torch.tensor(0.3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)):
        torch.library.opcheck(torch.ops.mrvae.gates.default, (leaf(weight), leaf(bias), leaf(eta), SIZES, KINDS))
    check_compiled(bank, [[weight, bias, torch.randn(n, dtype=torch.float64)] for n in (2, 5)])
    grads = [torch.randn(3, size) for size in SIZES]
    grads[1] = None
    w, c, eta = *parameters(torch.float32, degree), torch.randn(3)
    for needed in (True, False):
        torch.library.opcheck(torch.ops.mrvae.gates_backward.default, (grads, w, c, eta, SIZES, KINDS, needed))


def test_second_derivatives_and_forward_mode_are_refused():
    check_once_differentiable(bank, [*parameters(), eta_like(2, torch.float64)], "gates")
    weight, bias = parameters()
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match="jvp"):
        bank(torch.autograd.forward_ad.make_dual(weight, bias), bias, torch.tensor(0.1, dtype=torch.float64))
    weight.requires_grad_()
    check_gradient_with_a_tangent(bank(weight, bias, torch.tensor(0.1, dtype=torch.float64))[0], weight, "gates")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weight": torch.zeros(5)}, ValueError, r"\(281,\) each, the sum of sizes"),
        ({"bias": torch.zeros(281, 1)}, ValueError, r"\(281,\) each"),
        ({"weight": torch.zeros(4, 281)}, ValueError, "degree 1, 2 or 3"),
        ({"weight": torch.zeros(0, 281)}, ValueError, "degree 1, 2 or 3"),
        ({"weight": torch.zeros(2, 3, 281)}, ValueError, "degree 1, 2 or 3"),
        ({"weight": torch.zeros(2, 280)}, ValueError, "degree 1, 2 or 3"),
        ({"eta": torch.zeros(2, 2)}, ValueError, r"one number \(0-d\), or one a sample"),
        ({"kinds": [0, 1, 2]}, ValueError, "3 kinds for 4 sizes"),
        ({"kinds": [0, 1, 2, 4]}, ValueError, "kind is 4"),
        ({"sizes": [300, -19, 0, 0]}, ValueError, "no negative"),
        ({"weight": torch.zeros(281, dtype=torch.long)}, TypeError, "weight has dtype Long"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    arguments = {
        "weight": torch.zeros(281), "bias": torch.zeros(281), "eta": torch.tensor(0.0), "sizes": SIZES, "kinds": KINDS
    }
    with pytest.raises(error, match=message):
        ops.gates(**{**arguments, **change})

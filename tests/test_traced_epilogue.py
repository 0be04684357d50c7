"""Backward passes written out for torch.compile, against autograd's of the reference, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mrvae_kernels import reference
from mrvae_kernels.gates import GATE_KINDS, KINDS
from mrvae_kernels.traced_epilogue import Bank, Epilogue, Fold, FoldedProduct, SampledEpilogue

ETA = torch.tensor([-1.7, -0.4, 0.0, 0.9, 1.6], dtype=torch.float64)


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def gradients(results, inputs: list[Tensor]) -> list[Tensor]:
    """Of a sum in which every element of every result has a weight of its own."""
    results = [results] if isinstance(results, Tensor) else [r for r in results if r is not None]
    generator = torch.Generator().manual_seed(1)
    total = sum((r * torch.rand(r.shape, generator=generator, dtype=r.dtype)).sum() for r in results)
    return list(torch.autograd.grad(total, inputs))


def same(ours, expected, inputs: list[Tensor]) -> None:
    pairs = [(ours, expected)] if isinstance(ours, Tensor) else zip(ours, expected, strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b)
    for a, b in zip(gradients(ours, inputs), gradients(expected, inputs), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_slopes_are_those_of_the_activation(kind):
    p = torch.tensor([-800.0, -40, -3, -1e-3, -1e-9, 0, 1e-9, 2, 40, 800], dtype=torch.float64, requires_grad=True)
    gate, slope = reference.gate_and_slope(p, kind)
    torch.testing.assert_close(gate, reference.gate_activation(p, kind))
    expected, = torch.autograd.grad(reference.gate_activation(p, kind).sum(), p)
    torch.testing.assert_close(slope, expected, rtol=1e-12, atol=1e-300)


@pytest.mark.parametrize("shape", [(10,), (1, 10), (2, 10), (3, 10)])
def test_bank(shape):
    weight, bias, eta = numbers(*shape), numbers(10), torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    sizes = (3, 2, 4, 1)
    expected = reference.gate_bank(weight, bias, eta, sizes, KINDS)
    flat, *values = Bank.apply(weight, bias, eta, sizes, KINDS)
    torch.testing.assert_close(flat, torch.cat(expected))
    assert not flat.requires_grad
    same(values, expected, [weight, bias, eta])


@pytest.mark.parametrize("groups", [0, 1, 3])
@pytest.mark.parametrize("biased", [True, False])
def test_fold(groups, biased):
    weight = numbers(6, 2, 4, 3)
    channels = 2 * groups if groups else 6
    bias = numbers(channels) if biased else None
    flat = torch.rand(channels + 3, dtype=torch.float64)
    gate = flat[2 : 2 + channels].clone().requires_grad_()
    inputs = [weight, gate, *([bias] if biased else [])]
    ours = Fold.apply(weight, bias, gate, flat, 2, groups)
    same([r for r in ours if r is not None],
         [r for r in reference.fold(weight, bias, gate, None, groups) if r is not None], inputs)


@pytest.mark.parametrize("kind", GATE_KINDS)
def test_relative_slopes_are_slopes_over_gates(kind):
    p = torch.tensor([-800.0, -40, -3, -1e-3, -1e-9, 0, 1e-9, 2, 40, 800], dtype=torch.float64)
    gate, slope = reference.gate_and_slope(p, kind)
    again, relative = reference.gate_and_relative_slope(p, kind)
    torch.testing.assert_close(again, gate, rtol=0, atol=0)
    torch.testing.assert_close(gate * relative, slope, rtol=1e-12, atol=1e-300)
    assert relative.isfinite().all()


CONVOLUTIONS = [
    # x, weight, groups of a transposed convolution's fold, geometry
    ((4, 3, 9), (6, 3, 3), 0, ((2,), (1,), (1,), False, (0,), 1)),
    ((4, 4, 6, 5), (6, 2, 3, 2), 0, ((1, 2), (1, 0), (2, 1), False, (0, 0), 2)),
    ((2, 2, 4, 3, 5), (3, 2, 2, 1, 2), 0, ((1, 1, 2), (0, 1, 1), (1, 1, 1), False, (0, 0, 0), 1)),
    ((4, 6, 4), (6, 2, 3), 3, ((2,), (1,), (1,), True, (1,), 3)),
    ((3, 4, 3, 4), (4, 5, 3, 3), 1, ((2, 2), (1, 1), (1, 1), True, (1, 1), 1)),
]


@pytest.mark.parametrize("x_shape, weight_shape, groups, geometry", [
    ((5, 4), (6, 4), 0, None), ((2, 3, 4), (6, 4), 0, None), *CONVOLUTIONS,
])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("of_x", [True, False])
def test_folded_product(x_shape, weight_shape, groups, geometry, biased, of_x):
    x, weight = numbers(*x_shape).requires_grad_(of_x), numbers(*weight_shape)
    channels = groups * weight_shape[1] if groups else weight_shape[0]
    bias = numbers(channels) if biased else None
    flat = torch.rand(channels + 3, dtype=torch.float64)
    gate = flat[2 : 2 + channels].clone().requires_grad_()
    inputs = [weight, gate, *([x] if of_x else []), *([bias] if biased else [])]
    ours = FoldedProduct.apply(x, *Fold.apply(weight, bias, gate, flat, 2, groups), weight, flat, 2, groups, geometry)
    if geometry is None:
        expected = reference.gated_linear(x, weight, bias, gate)
    else:
        expected = reference.gated_convolution(x, weight, bias, gate, None, *geometry)
    same(ours, expected, inputs)


@pytest.mark.parametrize("shape, dim", [((4, 3), 1), ((2, 5, 3), 2), ((4, 3, 2, 5), 1), ((4, 3, 2, 2, 2), 1)])
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("biased", [True, False])
def test_epilogue_of_one_gate_a_sample_and_channel(shape, dim, relu, biased):
    u, gate = numbers(*shape), (torch.rand(shape[0], 3, dtype=torch.float64) + 1e-3).requires_grad_()
    bias = numbers(3) if biased else None
    expected = reference.epilogue(u, bias, gate, None, dim, "relu" if relu else "none")
    same(Epilogue.apply(u, bias, gate, None, 0, dim, relu), expected, [u, gate, *([bias] if biased else [])])


@pytest.mark.parametrize("shape, dim", [((3,), 0), ((5, 3), 1), ((2, 5, 3), 2), ((4, 3, 2, 5), 1)])
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("biased", [True, False])
def test_epilogue(shape, dim, relu, biased):
    u, flat = numbers(*shape), torch.rand(7, dtype=torch.float64) + 1e-3
    bias = numbers(3) if biased else None
    gate = flat[3:6].clone().requires_grad_()
    inputs = [u, gate, *([bias] if biased else [])]
    expected = reference.epilogue(u, bias, gate, None, dim, "relu" if relu else "none")
    same(Epilogue.apply(u, bias, gate, flat, 3, dim, relu), expected, inputs)


@pytest.mark.parametrize("relu", [True, False])
def test_a_closed_gate_has_no_gradient(relu):
    u, bias = numbers(4, 3), numbers(3)
    gate = torch.tensor([0.5, 0.0, 1e-320], dtype=torch.float64, requires_grad=True)
    y = Epilogue.apply(u, bias, gate, gate.detach(), 0, 1, relu)
    du, dbias, dgate = gradients(y, [u, bias, gate])
    assert dgate[0] != 0 and not dgate[1:].any()
    assert not du[:, 1].any() and dbias[1] == 0 and du.isfinite().all()
    each = gate.detach().expand(4, 3).clone().requires_grad_()
    du, dbias, deach = gradients(Epilogue.apply(u, bias, each, None, 0, 1, relu), [u, bias, each])
    assert deach[:, 0].any() and not deach[:, 1:].any()
    assert not du[:, 1].any() and dbias[1] == 0 and du.isfinite().all()


@pytest.mark.parametrize("kind", GATE_KINDS)
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("shape", [(3,), (2, 3), (3, 3)])
def test_sampled_epilogue(shape, kind, relu, biased):
    u, weight, gate_bias, eta = numbers(5, 3), numbers(*shape), numbers(3), ETA.clone().requires_grad_()
    bias = numbers(3) if biased else None
    flats = [torch.cat([torch.ones_like(value)[..., :2], value.detach()], -1) for value in (weight, gate_bias)]
    inputs = [u, weight, gate_bias, eta, *([bias] if biased else [])]
    ours = SampledEpilogue.apply(u, bias, weight, gate_bias, eta, *flats, 2, kind, relu)
    gate = reference.gates(weight, gate_bias, eta, kind)
    same(ours, reference.epilogue(u, bias, gate, None, 1, "relu" if relu else "none"), inputs)


@pytest.mark.parametrize("relu", [True, False])
def test_a_result_that_is_written_into(relu):
    u, bias, flat = numbers(4, 3), numbers(3), torch.rand(3, dtype=torch.float64) + 0.1
    weight, gate_bias, eta = numbers(3), numbers(3), ETA[:4]
    gate = flat.clone().requires_grad_()
    sampled = reference.gates(weight, gate_bias, eta, "softplus")
    activation = "relu" if relu else "none"
    for ours, expected, inputs in (
        (Epilogue.apply(u, bias, gate, flat, 0, 1, relu), reference.epilogue(u, bias, gate, None, 1, activation),
         [u, bias, gate]),
        (SampledEpilogue.apply(u, bias, weight, gate_bias, eta, weight.detach(), gate_bias.detach(), 0, "softplus",
                               relu),
         reference.epilogue(u, bias, sampled, None, 1, activation), [u, bias, weight, gate_bias]),
    ):
        same(ours.mul_(3).clamp_(max=1), (expected * 3).clamp(max=1), inputs)

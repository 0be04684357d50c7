"""Gradients of every operator: gradcheck, strides, sums, empty batches, each subset of inputs, low precision."""

from __future__ import annotations

import pytest
import torch
from helpers import OPERATORS, WAYS, gradients, operands, operate, relative_error, subsets
from torch import Tensor


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize(("strategy", "per_sample"), WAYS)
def test_gradcheck(backend, name, strategy, per_sample):
    assert torch.autograd.gradcheck(lambda *v: operate(name, list(v), strategy), operands(name, per_sample))


@pytest.mark.parametrize("name", ["linear", "conv2d", "conv_transpose1d"])
@pytest.mark.parametrize(("strategy", "per_sample"), WAYS)
def test_every_subset_of_inputs_that_need_a_gradient(backend, name, strategy, per_sample):
    inputs = operands(name, per_sample)
    everything = gradients(operate(name, inputs, strategy), inputs)
    for wanted in subsets(5):
        some = [v.detach().requires_grad_(w) for v, w in zip(inputs, wanted, strict=True)]
        y = operate(name, some, strategy)
        assert y.requires_grad
        found = iter(gradients(y, [v for v in some if v.requires_grad]))
        for w, expected in zip(wanted, everything, strict=True):
            if w:
                torch.testing.assert_close(next(found), expected, rtol=1e-10, atol=1e-12)
    assert not operate(name, [v.detach() for v in inputs], strategy).requires_grad


def strided(kind: str, value: Tensor) -> Tensor:
    """The same values behind strides that are not trivially right."""
    value = value.detach()
    if kind == "sliced":
        buffer = torch.full([2 * n + 1 for n in value.shape], float("nan"), dtype=value.dtype)
        view = buffer[tuple(slice(1, None, 2) for _ in value.shape)]
        view.copy_(value)
        return view
    if kind == "transposed":
        return value.transpose(0, -1).contiguous().transpose(0, -1)
    if kind == "channels_last" and value.dim() in (4, 5):
        return value.contiguous(memory_format=torch.channels_last if value.dim() == 4 else torch.channels_last_3d)
    return value[:1].expand_as(value) if kind == "expanded" else value


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize(("strategy", "per_sample"), WAYS)
@pytest.mark.parametrize("kind", ["sliced", "transposed", "channels_last", "expanded"])
def test_strides_of_inputs_and_grad_outputs_do_not_matter(backend, name, strategy, per_sample, kind):
    views = [strided(kind, v) for v in operands(name, per_sample)]
    plain = [v.clone(memory_format=torch.contiguous_format).requires_grad_() for v in views]
    views = [v.requires_grad_() for v in views]
    expected, y = operate(name, plain, strategy), operate(name, views, strategy)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-12)
    grad = torch.randn_like(expected, memory_format=torch.contiguous_format)
    behind = strided(kind, grad)
    wanted = gradients(expected, plain, behind.clone(memory_format=torch.contiguous_format))
    for value, other in zip(gradients(y, views, behind), wanted, strict=True):
        torch.testing.assert_close(value, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize(("strategy", "per_sample"), WAYS)
def test_the_gradient_of_a_sum_and_of_a_scaled_sum(backend, name, strategy, per_sample):
    inputs = operands(name, per_sample)
    y = operate(name, inputs, strategy)
    ones = gradients(y, inputs, torch.ones_like(y))  # dense, where sum() hands on an expanded scalar
    for factor in (1.0, 2.5):
        total = operate(name, inputs, strategy).sum() * factor
        for value, expected in zip(torch.autograd.grad(total, inputs), ones, strict=True):
            torch.testing.assert_close(value, expected * factor, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize(("strategy", "per_sample"), WAYS)
def test_empty_batches(backend, name, strategy, per_sample):
    x, weight, bias, gate, shift = operands(name, per_sample)
    x, gate, shift = x[:0], gate[:0] if per_sample else gate, shift[:0] if per_sample else shift
    inputs = [v.detach().requires_grad_() for v in (x, weight, bias, gate, shift)]
    y = operate(name, inputs, strategy)
    assert y.shape == (0, *operate(name, operands(name, per_sample), strategy).shape[1:])
    found = torch.autograd.grad(y.sum(), inputs)
    for value, given_ in zip(found, inputs, strict=True):
        assert value.shape == given_.shape and (value == 0).all()


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize(("strategy", "per_sample"), WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_is_near_float64(backend, name, strategy, per_sample, dtype):
    low = operands(name, per_sample, dtype)
    low[3:] = [v.detach().float().requires_grad_() for v in low[3:]]
    high = [v.detach().double().requires_grad_() for v in low]
    y, expected = operate(name, low, strategy), operate(name, high, strategy)
    tolerance = 2e-6 if dtype == torch.float32 else 2e-2
    assert y.dtype == dtype
    assert relative_error(y.double(), expected) < tolerance
    for value, other, given_ in zip(gradients(y, low), gradients(expected, high), low, strict=True):
        assert value.dtype == given_.dtype
        assert relative_error(value.double(), other) < 2 * tolerance

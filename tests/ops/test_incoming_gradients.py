"""What a gated product's node does with the gradient that it is given: overwritten, left alone, or refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers import check_gradient_with_a_tangent
from op_checks import leaf, requires_extension
from product_cases import LINEAR, PRODUCTS, WAYS, grads_of, layer, same, tensors_for
from torch import Tensor, nn

import mrvae_kernels as mk
from mrvae_kernels import ops

pytestmark = requires_extension

RESHAPED = {
    "as it is": lambda y: y,
    "viewed": lambda y: y.view(-1),
    "viewed twice": lambda y: y.unsqueeze(0).view(-1),
    "transposed": lambda y: y.transpose(0, 1),
    "summed": lambda y: y.sum(0),
}


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shaped", RESHAPED)
def test_a_gradient_of_nobody_else_s_may_be_overwritten(shaped, product, bias):
    """The engine's own, as after gelu: du takes its memory."""
    tensors = tensors_for(product, False)
    if not bias:
        tensors[2] = None
    run, formula = (
        lambda *t, f=f: F.gelu(RESHAPED[shaped](f(*t))).flatten() for f in layer(product, "none", "epilogue")
    )
    same(grads_of(run, tensors), grads_of(formula, tensors))


@pytest.mark.parametrize("change", ["relu of a fold", "per sample"])
def test_a_reshaped_gradient_of_nobody_else_s_is_overwritten(change):
    """A view holds the tensor that it is of, which nobody else has then."""
    x, beta = leaf(torch.randn(64, 3)), torch.rand(64) + 0.1
    model = mk.multirate(nn.Sequential(nn.Linear(3, 96)), "sqrt")

    def layer() -> Tensor:
        if change == "per sample":
            return model(x, beta=beta)
        return ops.gated_linear(x, model.network[0].weight, None, torch.ones(96), None, "relu", "fold")

    def allocations(reshape: Callable[[Tensor], Tensor]) -> int:
        y = layer()
        loss = F.gelu(reshape(y)).sum()
        with torch.profiler.profile(profile_memory=True) as profile:
            loss.backward()
        return sum(event.self_cpu_memory_usage >= 4 * y.numel() for event in profile.events())

    layer()  # a network's first call makes its gates in another way
    for name in ("as it is", "viewed", "viewed twice", "transposed"):
        assert allocations(RESHAPED[name]) == 1, name  # gelu's gradient


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("activation", ["none", "relu"])
@pytest.mark.parametrize(("strategy", "per_sample"), WAYS)
@pytest.mark.parametrize("shaped", ["viewed", "viewed twice", "transposed"])
def test_a_gradient_that_is_asked_for_too_is_left_as_it_is(shaped, strategy, per_sample, activation, product):
    """The engine holds what the view is of, for the caller."""
    tensors = tensors_for(product, per_sample)
    found = []
    for function in layer(product, activation, strategy):
        leaves = [None if value is None else leaf(value) for value in tensors]
        reshaped = RESHAPED[shaped](function(*leaves))
        sought = [reshaped, *(value for value in leaves if value is not None)]
        found.append([reshaped.detach(), *torch.autograd.grad(F.gelu(reshaped).sum(), sought)])
    same(*found)


@pytest.mark.parametrize("product", ["linear", "convolution"])
@pytest.mark.parametrize(("strategy", "per_sample"), WAYS)
def test_a_gradient_with_a_tangent_is_refused(strategy, per_sample, product):
    leaves = [None if value is None else leaf(value) for value in tensors_for(product, per_sample)]
    check_gradient_with_a_tangent(layer(product, "none", strategy)[0](*leaves), leaves[0], f"gated_{product}")


@pytest.mark.parametrize("product", LINEAR)
@pytest.mark.parametrize("activation", ["none", "relu"])
@pytest.mark.parametrize(("strategy", "per_sample"), WAYS)
def test_a_gradient_that_somebody_holds_is_left_alone(strategy, per_sample, activation, product):
    tensors = tensors_for(product, per_sample)
    run, formula = layer(product, activation, strategy)
    held: dict[str, list[Tensor]] = {}

    def watched(name: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        held[name] = []

        def call(*given: Tensor) -> Tensor:
            y = function(*given)
            y.retain_grad()
            y.register_hook(lambda grad: held[name].append(grad.view(-1)))  # a view alone keeps the memory
            held[name + " result"] = [y]
            return (y * y).sin()

        return call

    same(grads_of(watched("operator", run), tensors), grads_of(watched("formula", formula), tensors))
    same(held["operator"], held["formula"])
    same([y.grad for y in held["operator result"]], [y.grad for y in held["formula result"]])


@pytest.mark.parametrize("product", LINEAR)
@pytest.mark.parametrize("activation", ["none", "relu"])
@pytest.mark.parametrize(("strategy", "per_sample"), WAYS)
def test_gradients_asked_of_the_result_and_of_what_lies_before_it(strategy, per_sample, activation, product):
    tensors = tensors_for(product, per_sample)
    found = []
    for function in layer(product, activation, strategy):
        leaves = [None if t is None else leaf(t) for t in tensors]
        y = function(*leaves)
        found.append(torch.autograd.grad((y * y).sin().sum(), [y, *leaves[:4]]))
    same(*found)


FOREIGN = {
    "expanded": lambda y: torch.tensor(0.7, dtype=y.dtype).expand(y.shape),
    "strided": lambda y: torch.randn(*y.shape, 2, dtype=y.dtype)[..., 0],
    "transposed": lambda y: torch.randn(y.shape[::-1], dtype=y.dtype).permute(*reversed(range(y.dim()))),
}


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize(("strategy", "per_sample"), WAYS)
@pytest.mark.parametrize("kind", FOREIGN)
def test_gradients_of_any_layout(kind, strategy, per_sample, product):
    for activation in ("none", "relu"):
        tensors = tensors_for(product, per_sample)
        found = []
        run, formula = layer(product, activation, strategy)
        y = run(*tensors)
        grad = FOREIGN[kind](y)
        before = grad.clone()
        for function in (run, formula):
            leaves = [None if t is None else leaf(t) for t in tensors]
            found.append(torch.autograd.grad(function(*leaves), leaves[:4], grad))
        same(*found)
        assert torch.equal(grad, before)


def test_two_layers_share_one_gradient():
    """Of y = a + b both get the same tensor."""
    tensors = tensors_for("linear", False)
    found = []
    for function in layer("linear", "relu", "epilogue"):
        leaves = [None if t is None else leaf(t) for t in tensors]
        x = leaves[0]
        y = function(*leaves) + function(x * 2, *leaves[1:])
        found.append(torch.autograd.grad(y.square().sum(), leaves[:4]))
    same(*found)

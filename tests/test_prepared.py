"""A plan's gates and folds in one node: the same bits as the operators one by one, and the same gradients."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

import mrvae_kernels as mk
from mrvae_kernels import ops
from mrvae_kernels.ops.shortcuts import gated_fold

pytestmark = pytest.mark.skipif(not ops.EXTENSION, reason=f"the compiled core is missing: {ops.EXTENSION_ERROR}")


def convolutional() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3, groups=2),
        nn.ReLU(), nn.ConvTranspose2d(8, 4, 2, stride=2, groups=2), nn.GroupNorm(2, 4),
        nn.Flatten(), nn.Linear(4 * 8 * 8, 5),
    )


GATES = {
    "gates": "sigmoid", "shifts": mk.GateSpec("softplus", shift=True),
    "inputs": {"0": mk.GateSpec("sigmoid", inputs="softplus"), "3": mk.GateSpec("sqrt", shift=True)},
}


def step(model: mk.MultiRate, x: torch.Tensor, beta: float) -> list[torch.Tensor]:
    """The output, and every parameter's gradient."""
    model.zero_grad(set_to_none=True)
    y = model(x, beta=beta)
    y.square().sum().backward()
    return [y.detach(), *(p.grad if p.grad is not None else torch.empty(0) for p in model.parameters())]


@pytest.mark.parametrize("frozen", ["", "gate", "network.3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("gates", GATES.values(), ids=GATES.keys())
def test_same_bits_as_the_operators_one_by_one(gates, dtype, frozen):
    x = torch.randn(3, 2, 6, 6).to(dtype)
    prepared = mk.multirate(convolutional().to(dtype), gates=gates)
    for name, parameter in prepared.named_parameters():
        parameter.requires_grad_(not frozen or not name.startswith(frozen))
    separate = copy.deepcopy(prepared)
    with mk.override(strategy="fold"):
        check_same_bits(prepared, separate, x)


def check_same_bits(prepared: mk.MultiRate, separate: mk.MultiRate, x: torch.Tensor) -> None:
    for model in (prepared, separate):
        model(x, beta=0.3)
    assert prepared._plans.prepared and set(next(iter(prepared._plans.made.values()))) == {"fold"}
    for beta in (0.3, 2.0):
        separate._plans.prepared.clear()
        separate._plans.installed = None
        assert all(torch.equal(*pair) for pair in zip(step(prepared, x, beta), step(separate, x, beta), strict=True))


def test_same_bits_with_and_without_a_plan():
    """As a resumed training needs it, whose first step has none: products fold in their own node either way."""
    x = torch.randn(32, 96)
    with mk.override(strategy="fold"):
        model = mk.multirate(nn.Sequential(nn.Linear(96, 160)), gates=mk.GateSpec("softplus", inputs="sigmoid"))
        first = step(model, x, 0.3)
        assert model._plans.prepared
        assert all(torch.equal(*pair) for pair in zip(first, step(model, x, 0.3), strict=True))
    direct = model.network[0]._direct
    assert (direct.strategy, direct.inputs) == ("fold", 1) and not model._plans.installed.indirect


def test_another_range_of_beta_counts_from_the_next_call_on():
    model = mk.multirate(convolutional(), "sigmoid")
    x = torch.randn(3, 2, 6, 6)
    for _ in range(3):
        before = model(x, beta=0.5)
    model.beta_range = (0.1, 2.0)
    other = mk.multirate(convolutional(), "sigmoid", (0.1, 2.0))
    other.load_state_dict(model.state_dict())
    for _ in range(3):
        torch.testing.assert_close(model(x, beta=0.5), other(x, beta=0.5))
    assert not torch.allclose(model(x, beta=0.5), before)
    with pytest.raises(ValueError, match="beta_range is"):
        model.beta_range = (2.0, 0.1)
    assert model.beta_range == (0.1, 2.0)


def test_without_a_gradient():
    model = mk.multirate(convolutional().eval(), gates="sigmoid")
    x = torch.randn(3, 2, 6, 6)
    with torch.no_grad():
        first = model(x, beta=0.3)
        assert model._plans.prepared
        assert torch.equal(model(x, beta=0.3), first) and not model(x, beta=0.3).requires_grad


def test_a_plan_without_folds():
    model = mk.multirate(nn.Sequential(nn.Linear(30, 40)), gates="sigmoid")
    x = torch.randn(2, 30)
    first = model(x, beta=0.3)
    assert model._plans.prepared and torch.equal(model(x, beta=0.3), first)
    with torch.no_grad():
        assert torch.equal(model(x, beta=0.3), first)


def test_what_cannot_be_prepared_runs_all_the_same():
    model = mk.multirate(nn.LSTM(3, 4), gates="sigmoid")
    x = torch.randn(5, 2, 3)
    assert torch.equal(model(x, beta=0.3)[0], model(x, beta=0.3)[0])
    assert model._plans.made and not model._plans.prepared
    affine = mk.multirate(nn.Sequential(nn.LayerNorm((2, 3))), gates="sigmoid")
    affine(torch.randn(4, 2, 3), beta=0.3)
    assert affine._plans.made and not affine._plans.prepared


def test_other_parameters_in_place_of_those_of_the_first_step():
    model = mk.multirate(nn.Sequential(nn.Conv2d(2, 3, 3)), gates="sigmoid")
    x = torch.randn(8, 2, 9, 9)
    model(x, beta=0.3)
    model.network[0].weight = nn.Parameter(torch.zeros_like(model.network[0].weight))
    model.network[0].bias = None
    assert model._plans.prepared and not model(x, beta=0.3).any()


def operands() -> tuple:
    weights = [torch.randn(3, 2), torch.randn(4, 2, 2)]
    return torch.randn(9), torch.randn(9), torch.tensor(0.3), weights, [torch.randn(3), None]


def test_a_gate_that_is_folded_and_used_besides():
    plan = gated_fold((3, 4, 2), (0, 1, 3), (0, 1), (2, -1), (0, 2))
    with pytest.raises(ValueError, match="shift of shape"):
        plan.run(*operands())
    plan = gated_fold((3, 4, 2), (0, 1, 3), (0, 1), (-1, -1), (0, 2))
    weight, bias, eta, weights, biases = operands()
    weight, bias, eta = (value.double().requires_grad_() for value in (weight, bias, eta))
    weights, biases = [w.double() for w in weights], [biases[0].double(), None]

    def run(weight: torch.Tensor, bias: torch.Tensor, eta: torch.Tensor, *weights: torch.Tensor) -> tuple:
        gates = plan.run(weight, bias, eta, list(weights), biases)
        assert gates.biases[1] is None
        return (*(gates.variable(i) for i in range(3)), *gates.weights, gates.biases[0])

    assert torch.autograd.gradcheck(run, (weight, bias, eta, *(w.requires_grad_() for w in weights)))


def test_it_is_differentiable_once():
    model = mk.multirate(nn.Sequential(nn.Conv2d(2, 3, 3)), gates="sigmoid")
    x = torch.randn(8, 2, 9, 9)
    model(x, beta=0.3)
    (grad,) = torch.autograd.grad(model(x, beta=0.3).sum(), [model.gate_weight], create_graph=True)
    with pytest.raises(RuntimeError, match="gated_fold"):
        grad.sum().backward()


def test_batched_gradients_are_refused_as_by_the_operators():
    model = mk.multirate(nn.Sequential(nn.Conv2d(2, 3, 3)), gates="sigmoid")
    x = torch.randn(8, 2, 9, 9)
    model(x, beta=0.3)
    y = model(x, beta=0.3)
    with pytest.raises(RuntimeError, match="no ordinary tensor, as with is_grads_batched"):
        torch.autograd.grad(y, list(model.parameters()), torch.randn(3, *y.shape), is_grads_batched=True)


@pytest.mark.parametrize("backward", [False, True])
def test_nothing_is_kept(backward):
    model = mk.multirate(nn.Sequential(nn.Conv2d(2, 3, 3)), gates="sigmoid")
    x = torch.randn(8, 2, 9, 9)
    model(x, beta=0.3)
    y = model(x, beta=0.3)
    if backward:
        y.sum().backward()
    kept = [weakref.ref(y), weakref.ref(model), weakref.ref(model.network[0].weight)]
    del y, model
    gc.collect()
    assert [reference() for reference in kept] == [None, None, None]


@pytest.mark.parametrize(("arguments", "message"), [
    (((3,), (0, 1), (), (), ()), "as many kinds as sizes"), (((3,), (0,), (1,), (-1,), (0,)), "gate in slice 1"),
    (((3,), (0,), (0,), (-2,), (0,)), "shift in -2"), (((3,), (0,), (0,), (), (0,)), "one of the others a layer"),
])
def test_a_plan_that_does_not_fit_is_an_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        gated_fold(*arguments)


def test_as_many_weights_as_layers():
    with pytest.raises(ValueError, match="got 0 weights and 1 biases; expected 1 of each"):
        gated_fold((3,), (0,), (0,), (-1,), (0,)).run(torch.randn(3), torch.randn(3), torch.tensor(0.0), [], [None])


@pytest.mark.parametrize("rows", [1, 8])
def test_a_layer_that_is_parametrized_afterwards_is_named(rows):
    model = mk.multirate(nn.Sequential(nn.Conv2d(2, 3, 3)), gates="sigmoid")
    x = torch.randn(rows, 2, 9, 9)
    with mk.override(strategy="fold"):
        model(x, beta=0.3)
        assert model._plans.prepared
        with pytest.warns(FutureWarning):
            nn.utils.weight_norm(model.network[0])
        for beta in (0.3, torch.tensor(0.3)):
            with pytest.raises(RuntimeError, match="Conv2d has no parameter 'weight' any more: it was pruned or"):
                model(x, beta=beta)

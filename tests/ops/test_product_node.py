"""The node of a gated product, and what it keeps: gradients in float64 against the plain reference."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from op_checks import leaf, requires_extension
from product_cases import LINEAR, PRODUCTS, WAYS, grads_of, layer, same, tensors_for
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

pytestmark = requires_extension

CHANGES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "mul_": (lambda y: y.mul_(2), lambda y: y * 2),
    "of a view": (lambda y: y.view(-1).mul_(3).view(y.shape), lambda y: y * 3),
    "relu": (lambda y: F.relu(y, inplace=True), F.relu),
    "module": (lambda y: nn.ReLU(inplace=True)(y), F.relu),
    "a row": (lambda y: _zero_row(y), lambda y: _zero_row(y.clone())),
    "detached": (lambda y: _detached(y), lambda y: y + 0),
}


def _zero_row(y: Tensor) -> Tensor:
    y[1] = 0
    return y


def _detached(y: Tensor) -> Tensor:
    """As a metric may do that takes the result for its own."""
    result = y + 0
    y.detach().mul_(5)
    return result


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize(("strategy", "per_sample"), WAYS)
@pytest.mark.parametrize("change", CHANGES)
def test_a_result_changed_in_place_is_not_relied_on(change, strategy, per_sample, product):
    here, there = CHANGES[change]
    for activation in ("none", "relu"):
        for shift in (False, True):
            tensors = tensors_for(product, per_sample, shift)
            run, formula = layer(product, activation, strategy)
            same(
                grads_of(lambda *t, run=run: here(run(*t)), tensors),
                grads_of(lambda *t, formula=formula: there(formula(*t)), tensors),
            )


HOOKS = {
    "as they are": lambda: torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t),
    "on the CPU": torch.autograd.graph.save_on_cpu,
}


@pytest.mark.parametrize("product", LINEAR)
@pytest.mark.parametrize("activation", ["none", "relu"])
@pytest.mark.parametrize(("strategy", "per_sample"), WAYS)
@pytest.mark.parametrize("hooks", HOOKS)
def test_what_hooks_pack_is_not_changed_with_the_result(hooks, strategy, per_sample, activation, product):
    tensors = tensors_for(product, per_sample)
    run, formula = layer(product, activation, strategy)

    def hooked(*given: Tensor) -> Tensor:
        with HOOKS[hooks]():
            y = run(*given)
        return y.mul_(2)

    same(grads_of(hooked, tensors), grads_of(lambda *t: 2 * formula(*t), tensors))


@pytest.mark.parametrize("product", LINEAR)
@pytest.mark.parametrize(("strategy", "per_sample"), WAYS)
def test_a_checkpoint_that_goes_on_after_a_change_in_place(strategy, per_sample, product):
    tensors = tensors_for(product, per_sample)
    run, formula = layer(product, "none", strategy)

    def recomputed(*given: Tensor) -> Tensor:
        return checkpoint(lambda *t: run(*t).mul_(2).tanh().square(), *given, use_reentrant=False)

    same(grads_of(recomputed, tensors), grads_of(lambda *t: (2 * formula(*t)).tanh().square(), tensors))


def _holders(tensor: Tensor) -> int:
    storage = tensor.untyped_storage()
    return torch._C._storage_Use_Count(storage._cdata)


@pytest.mark.parametrize(("product", "kept"), [("linear", True), *((name, False) for name in PRODUCTS if " " in name)])
def test_a_large_result_without_an_activation_is_not_kept(product, kept):
    for change in ("none", "relu", "shift", "per sample", "frozen weight"):
        values = tensors_for(product, change == "per sample", change == "shift")
        tensors = [None if value is None else leaf(value) for value in values]
        tensors[1].requires_grad_(change != "frozen weight")
        y = layer(product, "relu" if change == "relu" else "none", "epilogue")[0](*tensors)
        before = _holders(y)
        y.sum().backward()
        holds = kept if change == "none" else change != "shift"  # with a shift u is kept, which is not y
        assert before - _holders(y) == holds, change


@pytest.mark.parametrize("product", [name for name in PRODUCTS if " " in name])
@pytest.mark.parametrize("bias", [True, False])
def test_every_subset_of_gradients_of_a_large_result(product, bias):
    values = tensors_for(product, False)[:4]
    for wanted in itertools.product([False, True], repeat=4):
        found = []
        for function in layer(product, "none", "epilogue"):
            leaves = [leaf(value).requires_grad_(want) for value, want in zip(values, wanted, strict=True)]
            given = [*leaves[:2], leaves[2] if bias else None, leaves[3], None]
            sought = [value for value in given if value is not None and value.requires_grad]
            if not sought:
                continue
            y = function(*given)
            pattern = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape).cos()
            found.append([*torch.autograd.grad(y, sought, pattern, retain_graph=True)])
            found[-1] += torch.autograd.grad(y, sought[-1:], pattern)  # the others not asked for
        same(*found or ([], []))


GATE_VALUES = {
    "one dead": [0.0, 0.7, 0.3], "all dead": [0.0, 0.0, 0.0], "minus zero": [-0.0, 0.7, 0.3],
    "negative": [-0.5, 0.7, -1e-3], "tiny": [1e-35, 0.5, 1e-300], "tiny negative": [-1e-35, -1e-300, 1.0],
    "subnormal": [5e-324, 0.4, 1e-310], "large": [1e30, 1.0, 1e-30],
}


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize(("strategy", "per_sample"), WAYS)
@pytest.mark.parametrize("values", GATE_VALUES)
def test_gates_that_do_not_divide(values, strategy, per_sample, product):
    rounds_to_zero = values == "subnormal" and strategy == "fold"  # g W, whose sign ReLU asks for
    for activation in ("none",) if rounds_to_zero else ("none", "relu"):
        for bias in (True, False):
            tensors = tensors_for(product, per_sample)
            tensors[3] = torch.tensor(GATE_VALUES[values], dtype=torch.float64).expand(tensors[3].shape)
            if not bias:
                tensors[2] = None
            run, formula = layer(product, activation, strategy)
            same(grads_of(run, tensors), grads_of(formula, tensors))


@pytest.mark.parametrize("product", LINEAR)
@pytest.mark.parametrize("value", [1e-19, 1e-25, 1e-30, 1e-35])
@pytest.mark.parametrize("activation", ["none", "relu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tiny_gates_of_single_precision(dtype, activation, value, product):
    tensors = tensors_for(product, False, dtype=dtype)
    tensors[3] = torch.tensor([value, 0.5, value])
    run, formula = layer(product, activation, "epilogue")
    found = grads_of(run, tensors)[-1]
    expected = grads_of(formula, [None if t is None else t.double() for t in tensors])[-1]
    rounding = max(1.0, expected.abs().max().item() / 3) * (3e-2 if dtype == torch.bfloat16 else 1e-5)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=rounding)


@pytest.mark.parametrize("value", [1e-3, 1e-6, 1e-8])
@pytest.mark.parametrize("activation", ["none", "relu"])
def test_small_gates_of_half_precision(activation, value):
    """float16 ends at 6e-8: the result says nothing of the product long before the gate is too small to divide by."""
    tensors = tensors_for("linear", False, dtype=torch.float16)
    tensors[3] = torch.tensor([value, 0.5, value])
    run, formula = layer("linear", activation, "epilogue")
    found = grads_of(run, tensors)[-1]
    expected = grads_of(formula, [None if t is None else t.double() for t in tensors])[-1]
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-2)


@pytest.mark.parametrize("product", LINEAR)
@pytest.mark.parametrize("activation", ["none", "relu", "silu"])
@pytest.mark.parametrize(("strategy", "per_sample"), WAYS)
def test_retained_graphs_and_freed_ones(strategy, per_sample, activation, product):
    tensors = [None if t is None else leaf(t) for t in tensors_for(product, per_sample, shift=True)]
    y = layer(product, activation, strategy)[0](*tensors)
    grad = torch.randn_like(y)
    before = grad.clone()
    first, second = (torch.autograd.grad(y, tensors, grad, retain_graph=True) for _ in range(2))
    same(first, second, rtol=0, atol=0)
    torch.autograd.grad(y, tensors, grad)
    assert torch.equal(grad, before)
    with pytest.raises(RuntimeError, match="backward through the graph a second time.*pass retain_graph=True"):
        torch.autograd.grad(y, tensors, grad)


@pytest.mark.parametrize(("strategy", "per_sample"), WAYS)
def test_what_it_does_not_differentiate_is_refused(strategy, per_sample):
    leaves = [None if t is None else leaf(t) for t in tensors_for("linear", per_sample)]
    run, _ = layer("linear", "relu", strategy)
    y = run(*leaves)
    (first,) = torch.autograd.grad(y.square().sum(), leaves[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="gated_linear is differentiable once"):
        first.sum().backward()
    with pytest.raises(RuntimeError, match="no ordinary tensor, as with is_grads_batched"):
        torch.autograd.grad(run(*leaves), leaves[:4], torch.randn(3, *y.shape, dtype=y.dtype), is_grads_batched=True)
    with torch.autograd.forward_ad.dual_level():
        for i in range(4):
            given = [None if t is None else t.detach() for t in leaves]
            given[i] = torch.autograd.forward_ad.make_dual(given[i], torch.ones_like(given[i]))
            with pytest.raises(NotImplementedError, match="forward AD with gated_linear"):
                run(*given)


def lazily_negative(grad: Tensor) -> Tensor:
    """grad as the imaginary part of a conjugate, whose memory holds -grad: what losses of complex spectra send back."""
    negative = torch.complex(torch.zeros_like(grad), -grad).conj().imag
    assert negative.is_neg() and torch.equal(negative, grad)
    return negative


GRADIENTS = {
    "negative bit": lazily_negative,
    "zeros without memory": lambda grad: torch._efficientzerotensor(grad.shape, dtype=grad.dtype),
}


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize(("strategy", "per_sample"), WAYS)
@pytest.mark.parametrize("kind", GRADIENTS)
def test_gradients_that_are_not_what_their_memory_says(kind, strategy, per_sample, product):
    for activation in ("none", "relu"):
        leaves = [None if t is None else leaf(t) for t in tensors_for(product, per_sample)]
        run, _ = layer(product, activation, strategy)
        given = [t for t in leaves if t is not None]
        y = run(*leaves)
        grad = torch.randn_like(y)
        sent = GRADIENTS[kind](grad)
        found = torch.autograd.grad(y, given, sent)
        torch.testing.assert_close(found, torch.autograd.grad(run(*leaves), given, sent.clone()), rtol=0, atol=0)


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize(("strategy", "per_sample"), WAYS)
def test_a_backward_pass_alone_may_be_counted(strategy, per_sample, product):
    leaves = [None if t is None else leaf(t) for t in tensors_for(product, per_sample)]
    run, _ = layer(product, "relu", strategy)
    given = [t for t in leaves if t is not None]
    expected = torch.autograd.grad(run(*leaves).square().sum(), given)
    loss = run(*leaves).square().sum()
    with FlopCounterMode(display=False) as counter:
        found = torch.autograd.grad(loss, given)
    torch.testing.assert_close(found, expected)
    assert counter.get_total_flops() > 0


@pytest.mark.parametrize(("strategy", "per_sample"), WAYS)
def test_what_is_frozen_is_not_kept_and_may_change(strategy, per_sample):
    """As torch's own linear has it: without a gradient of the weight x is not read again, and the other way round."""
    tensors = tensors_for("linear", per_sample)
    run, formula = layer("linear", "none", strategy)
    x = leaf(tensors[0]) * 1
    before = leaf(x.detach())
    (expected,) = torch.autograd.grad(formula(before, *tensors[1:]).square().sum(), before)
    y = run(x, *tensors[1:])
    loss = y.square().sum()
    tensors[2].zero_()
    with torch.no_grad():
        x.mul_(3)
    (found,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(found, expected)
    tensors = tensors_for("linear", per_sample)
    weight, bias = leaf(tensors[1]), leaf(tensors[2])
    rest = [None if t is None else t.clone() for t in tensors[3:]]
    (expected,) = torch.autograd.grad(formula(tensors[0], weight, bias, *rest).square().sum(), weight)
    loss = run(tensors[0], weight, bias, *rest).square().sum()
    (found,) = torch.autograd.grad(loss, weight)
    torch.testing.assert_close(found, expected)


def test_an_input_changed_before_backward_is_an_error():
    leaves = [None if t is None else leaf(t) for t in tensors_for("linear", False)]
    run, _ = layer("linear", "none", "epilogue")
    x = leaves[0] * 1
    y = run(x, *leaves[1:])
    x.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()

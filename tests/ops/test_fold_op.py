from __future__ import annotations

import pytest
import torch
from helpers import check_gradient_with_a_tangent
from op_checks import (
    DEVICE,
    agree,
    check_compiled,
    check_once_differentiable,
    check_subsets,
    leaf,
    requires_extension,
    reversed_strides,
    same_bits_for_any_threads,
)

import mrvae_kernels as mk
from mrvae_kernels import ops, reference

pytestmark = requires_extension

CHANNELS_LAST = torch.channels_last

# weight, groups (0: channels in axis 0; otherwise a transposed convolution's groups)
LAYERS = {
    "linear": (lambda: torch.randn(7, 13), 0),
    "linear, long rows": (lambda: torch.randn(3, 5000), 0),
    "one channel": (lambda: torch.randn(1, 70), 0),
    "norm": (lambda: torch.randn(37), 0),
    "no channels": (lambda: torch.randn(0, 4), 0),
    "no inputs": (lambda: torch.randn(4, 0), 0),
    "conv1d": (lambda: torch.randn(5, 3, 3), 0),
    "conv2d": (lambda: torch.randn(6, 5, 3, 3), 0),
    "conv2d, channels_last": (lambda: torch.randn(6, 5, 3, 3).to(memory_format=CHANNELS_LAST), 0),
    "conv3d": (lambda: torch.randn(4, 2, 3, 1, 5), 0),
    "transposed weight": (lambda: torch.randn(300, 9).t(), 0),
    "slice": (lambda: torch.randn(8, 20)[::2, 3:11], 0),
    "expanded": (lambda: torch.randn(5, 1).expand(5, 6), 0),
    "transposed1d": (lambda: torch.randn(5, 4, 3), 1),
    "transposed2d": (lambda: torch.randn(300, 5, 2, 3), 1),
    "transposed2d, big kernel": (lambda: torch.randn(4, 3, 9, 9), 1),
    "transposed2d, groups": (lambda: torch.randn(6, 5, 3, 3), 3),
    "transposed2d, groups, channels_last": (lambda: torch.randn(6, 5, 3, 3).to(memory_format=CHANNELS_LAST), 2),
    "transposed2d, groups, permuted": (lambda: torch.randn(5, 6, 3, 3).transpose(0, 1), 2),
    "transposed2d, one channel": (lambda: torch.randn(6, 1, 4, 4), 1),
}


def channels(weight, groups):
    return weight.shape[0] if groups == 0 else weight.shape[1] * groups


def one(groups, has_bias=True, has_shift=True):
    """The operator and its oracle for one layer, as functions of the tensors that exist."""

    def arrange(function, weight, gate, *rest):
        bias = rest[0] if has_bias else None
        shift = rest[-1] if has_shift else None
        return function(weight, bias, gate, shift)

    def operator(weight, bias, gate, shift):
        weights, biases = ops.fold([weight], [bias], [gate], [shift], [groups])
        return [*weights, *biases] if has_bias or has_shift else weights

    def oracle(weight, bias, gate, shift):
        return [out for out in reference.fold(weight, bias, gate, shift, groups) if out is not None]

    return lambda *t: arrange(operator, *t), lambda *t: arrange(oracle, *t)


def tensors_for(name, dtype=torch.float64, has_bias=True, has_shift=True):
    torch.manual_seed(0)
    make, groups = LAYERS[name]
    weight = make().to(dtype)
    count = channels(weight, groups)
    gate = torch.randn(count, dtype=reference.gate_dtype(dtype))
    bias = [torch.randn(count).to(dtype)] if has_bias else []
    shift = [torch.randn(count, dtype=gate.dtype)] if has_shift else []
    return groups, [weight, gate, *bias, *shift]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LAYERS)
def test_agrees_with_reference(name, dtype):
    groups, tensors = tensors_for(name, dtype)
    agree(*one(groups), tensors)
    folded = one(groups)[0](*tensors)[0]
    assert folded.dtype == dtype and folded.stride() == torch.empty_like(tensors[0]).stride()


@pytest.mark.parametrize("name", ["linear", "transposed2d, groups"])
@pytest.mark.parametrize(("has_bias", "has_shift"), [(True, False), (False, True), (False, False)])
def test_without_bias_or_shift(name, has_bias, has_shift):
    groups, tensors = tensors_for(name, has_bias=has_bias, has_shift=has_shift)
    agree(*one(groups, has_bias, has_shift), tensors)
    if not has_bias and not has_shift:
        weights, biases = ops.fold(tensors[:1], [None], tensors[1:], [None], [groups])
        assert biases[0].shape == (0,) and not biases[0].requires_grad


@pytest.mark.parametrize("name", ["linear", "conv2d, channels_last", "transposed2d, groups", "norm"])
def test_gradcheck_and_subsets(name):
    groups, tensors = tensors_for(name)
    assert torch.autograd.gradcheck(one(groups)[0], [leaf(t) for t in tensors])
    check_subsets(one(groups)[0], tensors)


def many(dtype=torch.float64):
    """All kinds of layers at once; biases of every second, shifts of every third."""
    torch.manual_seed(1)
    weights = [make().to(dtype) for make, _ in LAYERS.values()]
    groups = [group for _, group in LAYERS.values()]
    counts = [channels(w, g) for w, g in zip(weights, groups, strict=True)]
    gates = [torch.randn(c, dtype=reference.gate_dtype(dtype)) for c in counts]
    biases = [torch.randn(c).to(dtype) if i % 2 else None for i, c in enumerate(counts)]
    shifts = [torch.randn(c, dtype=gates[0].dtype) if i % 3 == 0 else None for i, c in enumerate(counts)]
    return weights, biases, gates, shifts, groups


def test_all_layers_of_a_model_at_once():
    weights, biases, gates, shifts, groups = many()
    count = len(weights)

    def split(tensors):
        return tensors[:count], tensors[count : 2 * count], tensors[2 * count : 3 * count], tensors[3 * count :]

    def operator(*tensors):
        w, b, g, t = split(tensors)
        folded, folded_biases = ops.fold(w, b, g, t, groups)
        return [*folded, *folded_biases]

    def oracle(*tensors):
        results = [reference.fold(*layer) for layer in zip(*split(tensors), groups, strict=True)]
        return [w for w, _ in results] + [b for _, b in results]

    agree(operator, oracle, [*weights, *biases, *gates, *shifts])


def test_layers_of_mixed_dtypes():
    weights = [leaf(torch.randn(4, 6).bfloat16()), leaf(torch.randn(5)), leaf(torch.randn(3, 2, dtype=torch.float64))]
    gates = [leaf(torch.rand(4)), leaf(torch.rand(5)), leaf(torch.rand(3, dtype=torch.float64))]
    folded, _ = ops.fold(weights, [None] * 3, gates, [None] * 3, [0] * 3)
    sum(f.double().sum() for f in folded).backward()
    for w, g, f in zip(weights, gates, folded, strict=True):
        assert f.dtype == w.dtype == w.grad.dtype
        torch.testing.assert_close(g.grad, w.detach().to(g.dtype).flatten(1).sum(1) if w.dim() > 1 else w.detach())


@pytest.mark.parametrize("name", ["linear", "conv2d", "conv2d, channels_last", "transposed2d, groups"])
def test_expanded_sliced_and_foreign_gradients(name):
    groups, tensors = tensors_for(name)
    run, oracle = one(groups)
    agree(run, oracle, tensors, grads=lambda t: t.new_full((), 0.5).expand(t.shape))
    agree(run, oracle, tensors, grads=lambda t: torch.randn(*t.shape, 2, dtype=t.dtype)[..., 0])
    agree(run, oracle, tensors, grads=reversed_strides)


def test_a_gradient_that_somebody_holds_is_not_overwritten():
    weight, gate = leaf(torch.randn(4, 3)), leaf(torch.rand(4))
    mine = torch.randn(4, 3)
    before = mine.clone()
    (folded,), _ = ops.fold([weight], [None], [gate], [None], [0])
    torch.autograd.grad(folded, [weight, gate], mine)
    assert torch.equal(mine, before)

    (folded,), _ = ops.fold([weight], [None], [gate], [None], [0])
    folded.retain_grad()
    seen = []
    folded.register_hook(lambda grad: seen.append(grad))
    x = torch.randn(5, 3)
    torch.nn.functional.linear(x, folded).sum().backward()
    expected = x.sum(0).expand(4, 3)
    torch.testing.assert_close(folded.grad, expected)
    torch.testing.assert_close(seen[0], expected)
    torch.testing.assert_close(weight.grad, expected * gate.detach()[:, None])


def test_a_gradient_with_a_tangent_is_refused():
    """Overwritten it would be handed on with the tangent that it came with."""
    weight, x = leaf(torch.randn(16, 8)), torch.randn(32, 8)
    model = mk.multirate(torch.nn.Sequential(torch.nn.BatchNorm1d(8)), "softplus")
    (folded,), _ = ops.fold([weight], [None], [torch.rand(16)], [None], [0])
    check_gradient_with_a_tangent(torch.nn.functional.linear(x, folded), weight, "fold")
    model(x, beta=0.5)  # the next call has gates and folds in one node
    check_gradient_with_a_tangent(model(x, beta=0.5), model.network[0].weight, "gated_fold")


def test_a_gradient_keeps_no_more_memory_than_its_own():
    """That of a part of a weight is a view of the whole one's."""
    weight, x = leaf(torch.randn(16, 8)), torch.randn(32, 8)
    (folded,), _ = ops.fold([weight], [None], [torch.ones(16)], [None], [0])
    torch.nn.functional.linear(x, torch.cat([folded, torch.randn(48, 8)])).sum().backward()
    torch.testing.assert_close(weight.grad, x.sum(0).expand(16, 8))
    assert weight.grad.untyped_storage().nbytes() == weight.nbytes


def test_a_gradient_may_be_changed_in_place():
    weight, x, factor = leaf(torch.randn(16, 8)), torch.randn(32, 8), leaf(torch.tensor(2.0))
    (folded,), _ = ops.fold([weight], [None], [torch.ones(16)], [None], [0])
    (gradient,) = torch.autograd.grad(torch.nn.functional.linear(x, folded).sum(), weight)
    torch.testing.assert_close(gradient.mul_(factor).detach(), 2 * x.sum(0).expand(16, 8))


def test_the_gradient_buffer_is_reused_when_nobody_holds_it():
    weight, gate, x = leaf(torch.randn(256, 300)), leaf(torch.rand(256)), torch.randn(5, 300)

    def weight_sized_allocations(held):
        (folded,), _ = ops.fold([weight], [None], [gate], [None], [0])
        loss = torch.nn.functional.linear(x, folded).sum()
        if held:
            folded.retain_grad()
        with torch.profiler.profile(profile_memory=True) as profile:
            loss.backward(inputs=[weight, gate])
        usage = "self_cpu_memory_usage" if DEVICE == "cpu" else "self_device_memory_usage"
        return sum(getattr(event, usage) >= 4 * weight.numel() for event in profile.events())

    weight.grad = torch.zeros_like(weight)
    assert [weight_sized_allocations(held) for held in (True, False)] == [1, 0]
    expected = 2 * gate.detach()[:, None] * x.sum(0)
    torch.testing.assert_close(weight.grad, expected)


def test_backward_twice_through_a_retained_graph():
    groups, tensors = tensors_for("conv2d")
    leaves = [leaf(t) for t in tensors]
    weight, bias = one(groups)[0](*leaves)
    loss = (weight.sin() * bias[:, None, None, None]).sum()
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    second = torch.autograd.grad(loss, leaves)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_big_weights_give_the_same_bits_for_any_number_of_threads():
    torch.manual_seed(0)
    shapes = [((700, 300), 0), ((200, 90, 4, 4), 1), ((64, 64, 3, 3), 0)]
    weights = [torch.randn(shape) for shape, _ in shapes]
    groups = [g for _, g in shapes]
    gates = [torch.rand(channels(w, g)) for w, g in zip(weights, groups, strict=True)]
    grads = [torch.randn_like(w) for w in weights]

    def compute():
        leaves = [leaf(t) for t in (*weights, *gates)]
        folded, _ = ops.fold(leaves[:3], [None] * 3, leaves[3:], [None] * 3, groups)
        return [*folded, *torch.autograd.grad(folded, leaves, grads)]

    same_bits_for_any_threads(compute)
    for got, w, d, g in zip(compute()[6:], weights, grads, groups, strict=True):
        product = (w.double() * d.double()).transpose(0, 1) if g else w.double() * d.double()
        torch.testing.assert_close(got.double(), product.flatten(1).sum(1), rtol=1e-5, atol=1e-3)


def test_keeps_only_its_inputs():
    groups, tensors = tensors_for("conv2d")
    kept = []
    leaves = [leaf(t) for t in tensors]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        one(groups)[0](*leaves)
    assert set(kept) == {t.data_ptr() for t in leaves}


def test_autocast_leaves_folding_to_the_products():
    weights = [leaf(torch.randn(4, 6)), leaf(torch.randn(5))]
    gates = [leaf(torch.rand(4)), leaf(torch.rand(5))]
    with torch.autocast(DEVICE, torch.bfloat16):
        folded, biases = ops.fold(weights, [leaf(torch.randn(4)), None], gates, [None, leaf(torch.randn(5))], [0, 0])
    assert {t.dtype for t in (*folded, *biases)} == {torch.float32}
    sum(f.sum() for f in folded).backward()
    assert weights[0].grad.dtype == torch.float32 and gates[0].grad.dtype == torch.float32
    torch.testing.assert_close(gates[0].grad, weights[0].detach().sum(1))


@pytest.mark.parametrize("name", ["linear", "conv2d, channels_last", "transposed2d, groups", "norm"])
def test_opcheck(name):
    groups, tensors = tensors_for(name)
    w, g, b, t = (leaf(t) for t in tensors)
    torch.library.opcheck(torch.ops.mrvae.fold.default, ([w, w], [b, None], [g, g], [None, None], [groups, groups]))
    torch.library.opcheck(torch.ops.mrvae.fold.default, ([w], [None], [g], [t], [groups]))
    w, g, b, t = tensors
    for mask in ([True] * 4, [False, True, False, True], [True, False, True, False]):
        arguments = ([torch.randn_like(w)], [b], [w], [b], [g], [None], [groups], mask)
        torch.library.opcheck(torch.ops.mrvae.fold_backward.default, arguments)


def test_compile_with_dynamic_shapes():
    def batch(channels, features):
        return [torch.randn(channels, features), torch.rand(channels), torch.randn(channels), torch.randn(channels)]

    check_compiled(one(0)[0], [batch(5, 7), batch(6, 9), batch(3, 4)])


def test_second_derivatives_are_refused():
    groups, tensors = tensors_for("linear")
    check_once_differentiable(one(groups)[0], tensors, "fold")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"gates": [torch.rand(5)]}, ValueError, r"gate of shape \[5\]; expected \(4,\)"),
        ({"gates": [torch.rand(2, 4)]}, ValueError, "One beta a sample cannot be folded"),
        ({"biases": [torch.rand(3)]}, ValueError, r"bias of shape \[3\]"),
        ({"shifts": [torch.rand(4, 1)]}, ValueError, r"shift of shape \[4, 1\]"),
        ({"groups": [-1]}, ValueError, "groups = -1"),
        ({"groups": [3], "gates": [torch.rand(18)]}, ValueError, "multiple of groups = 3"),
        ({"groups": [0, 0]}, ValueError, "1 weights, 1 biases, 1 gates, 1 shifts and 2 groups"),
        ({"weights": [torch.ones(4, 6, dtype=torch.int)]}, TypeError, "weight has dtype Int"),
        ({"weights": [torch.ones(())]}, ValueError, "layer 0 has a weight of shape"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    arguments = {
        "weights": [torch.rand(4, 6)], "biases": [None], "gates": [torch.rand(4)], "shifts": [None], "groups": [0]
    }
    with pytest.raises(error, match=message):
        ops.fold(**{**arguments, **change})

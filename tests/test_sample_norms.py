"""Batch norms with one affine a sample: the formula in plain PyTorch, in float64, and what they keep and update."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import BETA, check_gradient_with_a_tangent, randomize
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

import mrvae_kernels as mk
from mrvae_kernels import ops, sample_norms
from mrvae_kernels.conditional import conditional_norm
from mrvae_kernels.ops.shortcuts import core

pytestmark = pytest.mark.skipif(not ops.EXTENSION, reason="the compiled core is not built")

NORMS = {1: (nn.BatchNorm1d, ()), 2: (nn.BatchNorm2d, (4, 3)), 3: (nn.BatchNorm3d, (2, 3, 2))}
OPTIONS: dict[str, dict[str, Any]] = {
    "usual": {}, "cumulative": {"momentum": None}, "no statistics": {"track_running_stats": False}, "eps": {"eps": 0.1},
    "no bias": {"bias": False},
}


@pytest.fixture(autouse=True)
def _small_ones_too(monkeypatch):
    monkeypatch.setattr(sample_norms, "LEAST_POSITIONS", 1)


def made(dims: int, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[Any, Any, Tensor]:
    """A plain norm, a gated one with the same values, and an input; 4 channels, a sample for each of BETA."""
    kind, positions = NORMS[dims]
    plain = randomize(kind(4, dtype=dtype, **options))
    spec = mk.GateSpec("softplus", shift=True)
    gated = getattr(mk, f"Gated{kind.__name__}").from_plain(copy.deepcopy(plain), gate=spec)
    return plain, gated, (3 + 2 * torch.randn(len(BETA), 4, *positions, dtype=dtype)).requires_grad_()


def affine(gated: Any, dims: int) -> tuple[Tensor, Tensor]:
    """Gate and shift, (N, C, 1, ...), of reference operators."""
    eta = mk.standardize(BETA, dtype=gated.gate_weight.dtype)
    with mk.override(backend="reference"):
        gate = nn.functional.softplus(eta[:, None] * gated.gate_weight + gated.gate_bias)
        shift = eta[:, None] * gated.shift_weight + gated.shift_bias
    return (value.reshape(len(BETA), 4, *[1] * len(NORMS[dims][1])) for value in (gate, shift))


def in_one_pass(y: Tensor) -> bool:
    """Whether a norm and its affine a sample were one node of y's history."""
    nodes, seen = [y.grad_fn], set()
    while nodes:
        if (node := nodes.pop()) is not None and node not in seen:
            seen.add(node)
            nodes += [before for before, _ in node.next_functions]
    return any("SampleNormNode" in node.name() for node in seen)


@pytest.mark.parametrize("dims", NORMS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("training", [True, False])
def test_norm_gate_and_shift_are_the_formula_s(dims, options, training):
    plain, gated, x = made(dims, **options)
    for norm in (plain, gated):
        norm(x.detach(), *([] if norm is plain else [0.5]))  # running statistics that are not the first ones
        norm.train(training)
    gate, shift = affine(gated, dims)
    y, expected = gated(x, BETA), gate * plain(x) + shift
    assert in_one_pass(y)
    torch.testing.assert_close(y, expected)
    for ours, theirs in zip(gated.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)
    grad = torch.randn_like(y)
    names = [name for name, _ in gated.named_parameters()]
    assert len(names) == (5 if plain.bias is None else 6)
    inputs = [x, *gated.parameters()]
    got = torch.autograd.grad(y, inputs, grad)
    theirs = {"weight": plain.weight, "bias": plain.bias}
    wanted = torch.autograd.grad(expected, [x, *(theirs.get(n, p) for n, p in gated.named_parameters())], grad)
    for name, ours, other in zip(["x", *names], got, wanted, strict=True):
        torch.testing.assert_close(ours, other, msg=lambda text, name=name: f"{name}: {text}")


GIVEN = ("", "shift", "weight", "bias", "shift weight", "weight bias", "shift weight bias")


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("of_batch", [True, False])
def test_gradcheck(of_batch, given):
    """Of every set of what is given, all of it and all but one of it wanting a gradient."""
    _, gated, x = made(2)
    gated.train(of_batch)
    sizes = {"x": x.shape, "gate": (len(BETA), 4), "shift": (len(BETA), 4), "weight": (4,), "bias": (4,)}
    names = ["x", "gate", *given.split()]

    def function(*values: Tensor) -> Tensor:
        arguments = dict.fromkeys(sizes) | dict(zip(names, values, strict=True))
        assert sample_norms.takes(gated, arguments["x"], arguments["gate"], arguments["shift"])
        return sample_norms.batch_norm(gated, *arguments.values())

    for frozen in (None, *names):
        inputs = [torch.randn(sizes[n], dtype=torch.float64, requires_grad=n != frozen) for n in names]
        assert torch.autograd.gradcheck(function, inputs)
    y = function(*inputs)
    (grad,) = torch.autograd.grad(y.sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once.*the layer or the model within .*override"):
        grad.square().sum().backward()


def test_strides_of_the_input_are_kept_and_any_gradient_s_are_taken():
    plain, gated, x = made(2)
    x = x.detach().to(memory_format=torch.channels_last).requires_grad_()
    gate, shift = affine(gated, 2)
    y, expected = gated(x, BETA), gate * plain(x) + shift
    assert y.is_contiguous(memory_format=torch.channels_last)
    for grad in (torch.randn(y.shape, dtype=y.dtype), torch.ones((), dtype=y.dtype).expand(y.shape)):
        (got,), (wanted,) = (torch.autograd.grad(value, [x], grad, retain_graph=True) for value in (y, expected))
        torch.testing.assert_close(got, wanted)


def test_an_input_far_from_zero_loses_no_digits_to_its_mean():
    """A mean of 3,000 standard deviations, in float32: what float32 leaves of x itself is 2e-4 of its deviation."""
    plain, gated, x = made(2, torch.float32)
    x = (3000 + torch.randn(x.shape)).requires_grad_()
    exact, of = (copy.deepcopy(layer).double() for layer in (plain, gated))
    wide = x.detach().double().requires_grad_()
    gate, shift = affine(of, 2)
    y, expected = gated(x, BETA), gate * exact(wide) + shift
    grad = torch.randn(y.shape)
    (got,), (wanted,) = torch.autograd.grad(y, [x], grad), torch.autograd.grad(expected, [wide], grad.double())
    torch.testing.assert_close(y, expected.float(), rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(got, wanted.float(), rtol=2e-3, atol=2e-3)


def test_of_the_activations_the_input_alone_is_kept():
    _, gated, x = made(2)
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = gated(x, BETA)
    large = [tensor for tensor in kept if tensor.numel() == x.numel()]
    assert [tensor.data_ptr() for tensor in large] == [x.data_ptr()]
    y.detach().zero_()  # an activation in place, say
    y.sum().backward()


def test_a_later_step_does_not_change_what_the_backward_pass_knows():
    """Of running statistics, which batch_norm_update_stats changes without a word to autograd."""
    _, gated, x = made(2)
    gated(x.detach(), BETA)
    parameters = [x, *gated.parameters()]
    wanted = torch.autograd.grad(gated.eval()(x, BETA).square().sum(), parameters)
    y = gated.eval()(x, BETA)
    gated.train()(2 * x.detach() + 30, BETA)
    for got, expected in zip(torch.autograd.grad(y.square().sum(), parameters), wanted, strict=True):
        torch.testing.assert_close(got, expected)


WRONG: dict[str, tuple[bool, dict[str, Any], str]] = {
    "too few": (True, {"running_mean": torch.zeros(3), "running_var": torch.ones(3)}, "should contain 4 elements"),
    "one of two": (True, {"running_var": None}, "both be None or neither"),
    "one of two, evaluated": (False, {"running_mean": None}, "must be defined in evaluation mode"),
    "another dtype": (True, {"running_mean": torch.zeros(4).half(), "running_var": torch.ones(4).half()}, "dtype|type"),
}


@pytest.mark.parametrize("case", WRONG)
def test_running_statistics_that_do_not_fit_are_torch_s_to_refuse(case):
    training, buffers, message = WRONG[case]
    _, gated, x = made(2, torch.float32)
    for name, value in buffers.items():
        setattr(gated, name, value)
    with pytest.raises((RuntimeError, ValueError), match=message):
        gated.train(training)(x, BETA)


def test_inputs_of_few_positions_are_left_to_two_operators(monkeypatch):
    _, gated, x = made(2)
    scale = torch.ones(len(BETA), 4, dtype=x.dtype)
    for least, taken in ((12, True), (13, False)):
        monkeypatch.setattr(sample_norms, "LEAST_POSITIONS", least)
        assert sample_norms.takes(gated, x, scale, None) == taken
        assert in_one_pass(gated(x, BETA)) == taken


MISFITS: dict[str, tuple[int, Tensor | None, type[Exception], str]] = {
    "integers": (0, torch.ones(3, 4, 2, dtype=torch.int64), TypeError, "x has dtype Long; expected float32 or float64"),
    "one axis": (0, torch.ones(4), ValueError, r"x has shape \[4\]; expected \(N, C, ...\)"),
    "gate": (1, torch.ones(2, 4), ValueError, r"gate has shape \[2, 4\] and dtype Float; expected \[3, 4\]"),
    "shift": (2, torch.ones(3, 5), ValueError, r"shift has shape \[3, 5\]"),
    "weight": (3, torch.ones(4).double(), ValueError, r"weight has shape \[4\] and dtype Double; expected"),
    "bias": (4, torch.ones(1), ValueError, r"bias has shape \[1\]"),
    "running_mean": (5, torch.ones(3), ValueError, r"running_mean has shape \[3\]"),
    "running_var": (6, torch.ones(5), ValueError, r"running_var has shape \[5\]"),
    "none": (5, None, ValueError, "there are no running statistics"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_the_core_reads_and_writes_no_memory_of_tensors_that_do_not_fit(case):
    place, value, error, message = MISFITS[case]
    each, channels = [torch.ones(3, 4), torch.ones(3, 4)], [torch.ones(4) for _ in range(4)]
    arguments = [torch.ones(3, 4, 2), *each, *channels]
    core().sample_batch_norm(*arguments, False, 0.1, 1e-5)
    arguments[place] = value
    with pytest.raises(error, match=message):
        core().sample_batch_norm(*arguments, False, 0.1, 1e-5)


OTHERS: dict[str, Any] = {
    "bfloat16": lambda norm, x: (norm.bfloat16(), x.bfloat16()),
    "SyncBatchNorm": lambda norm, x: (nn.SyncBatchNorm(4, dtype=torch.float64).eval(), x),
    "reference": lambda norm, x: (norm, x),
}


@pytest.mark.parametrize("case", OTHERS)
def test_what_is_not_taken_goes_the_usual_way(case):
    norm, x = OTHERS[case](randomize(nn.BatchNorm2d(4, dtype=torch.float64)), made(2)[2].detach())
    model = mk.multirate(nn.Sequential(norm), gates="softplus")
    with mk.override(backend="reference" if case == "reference" else "cpp"):
        y = model(x.requires_grad_(), beta=torch.tensor(BETA))
        one = torch.cat([model.eval()(x, beta=beta)[i : i + 1] for i, beta in enumerate(BETA)])
        each = model.eval()(x, beta=torch.tensor(BETA))
    assert not in_one_pass(y)
    rounding = {"rtol": 2e-2, "atol": 2e-2} if case == "bfloat16" else {}  # one beta folds: g w is rounded as well
    torch.testing.assert_close(each, one, **rounding)


def test_under_a_dispatch_mode_forward_and_backward_pass_are_operators():
    _, gated, x = made(2)
    parameters = [x, *gated.parameters()]
    expected = torch.autograd.grad(gated(x, BETA).square().sum(), parameters)
    batches = int(gated.num_batches_tracked)
    with FlopCounterMode(display=False):
        y = gated(x, BETA)
        y.square().sum().backward()
    assert not in_one_pass(y) and int(gated.num_batches_tracked) == batches + 1
    torch.testing.assert_close([parameter.grad for parameter in parameters], list(expected))
    loss = gated(x, BETA).square().sum()
    with FlopCounterMode(display=False):
        found = torch.autograd.grad(loss, parameters)
    torch.testing.assert_close(found, expected)


def test_a_gradient_of_a_conjugate_s_imaginary_part():
    _, gated, x = made(2)
    parameters, y = [x, *gated.parameters()], gated(x, BETA)
    assert in_one_pass(y)
    grad = torch.randn_like(y)
    negative = torch.complex(torch.zeros_like(grad), -grad).conj().imag
    assert negative.is_neg()
    expected = torch.autograd.grad(y, parameters, grad, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(y, parameters, negative), expected, rtol=0, atol=0)


def test_a_trace_replays_with_its_own_gates_and_statistics():
    norm = mk.ConditionalBatchNorm2d(4, dtype=torch.float64, track_running_stats=False)

    def function(x: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
        return conditional_norm(norm, scale, offset, x)

    def drawn() -> list[Tensor]:
        return [torch.randn(size, dtype=torch.float64) for size in ((3, 4, 4, 3), (3, 4), (3, 4))]

    traced, other = make_fx(function)(*drawn()), drawn()
    assert sample_norms.takes(norm, *other)
    torch.testing.assert_close(traced(*other), function(*other))


@pytest.mark.parametrize("case", ["negative bit", "another offset"])
def test_tensors_that_are_not_what_their_memory_says_go_the_usual_way(case):
    _, gated, x = made(2)
    scale, offset = torch.rand(len(BETA), 4, dtype=x.dtype), None
    assert sample_norms.takes(gated, x, scale, offset)
    if case == "negative bit":
        x = torch.complex(torch.zeros_like(x.detach()), x.detach()).conj().imag
        with pytest.raises(ValueError, match="expected ordinary tensors"):
            core().sample_batch_norm(x, scale, offset, None, None, None, None, True, 0.1, 1e-5)
    else:
        offset = scale.float()
    assert not sample_norms.takes(gated, x, scale, offset)


@pytest.mark.parametrize("layout", ["contiguous", "channels last", "transposed"])
def test_large_inputs_are_cut_into_the_same_parts_by_any_number_of_threads(layout):
    """More than the 16,384 elements that one task of the backward pass takes; torch's own statistics of channels-last
    inputs do depend on the threads, so that the bits are those with running statistics."""
    plain = randomize(nn.BatchNorm2d(24, dtype=torch.float64))
    gated = mk.GatedBatchNorm2d.from_plain(copy.deepcopy(plain), gate=mk.GateSpec("softplus", shift=True))
    beta = torch.linspace(0.1, 5, 16, dtype=torch.float64)
    x = torch.randn(16, 24, 9, 9, dtype=torch.float64)
    if layout == "channels last":
        x = x.to(memory_format=torch.channels_last)
    if layout == "transposed":
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    x.requires_grad_()
    eta = mk.standardize(beta, dtype=torch.float64)[:, None]
    gate = nn.functional.softplus(eta * gated.gate_weight + gated.gate_bias)[..., None, None]
    shift = (eta * gated.shift_weight + gated.shift_bias)[..., None, None]
    grad = torch.randn(x.shape, dtype=x.dtype)
    sought = [x, gated.gate_weight, gated.shift_bias]
    expected = torch.autograd.grad(gate * plain(x) + shift, sought, grad)
    threads = torch.get_num_threads()
    try:
        for training in (True, False):
            found = []
            for count in (1, 2):
                torch.set_num_threads(count)
                y = gated.train(training)(x, beta)
                assert in_one_pass(y)
                found.append([y, *torch.autograd.grad(y, sought, grad)])
            if training:
                torch.testing.assert_close(found[0][1:], list(expected))
                torch.testing.assert_close(found[1][1:], list(expected))
            else:
                torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)
    finally:
        torch.set_num_threads(threads)


def test_tangents_are_refused():
    _, gated, x = made(2)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x.detach(), torch.ones_like(x))
        with pytest.raises(NotImplementedError, match="forward AD with batch norm.*override.backend=.reference"):
            gated(dual, BETA)
    check_gradient_with_a_tangent(gated(x, BETA), gated.gate_weight, "batch norm")


def test_vmap_and_one_element_a_channel():
    _, gated, x = made(1)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        gated(x[:1], BETA[:1])
    gated.eval()
    stacked = torch.stack([x, 2 * x]).detach()
    together = torch.func.vmap(lambda values: gated(values, BETA))(stacked)
    torch.testing.assert_close(together, torch.stack([gated(values, BETA) for values in stacked]))
    with pytest.raises(ValueError, match="expected 2D or 3D"):
        gated(torch.randn(len(BETA), 4, 2, 2, dtype=torch.float64), BETA)

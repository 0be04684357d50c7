"""fold == epilogue == formula for every operator and argument, their gradients, and their errors."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from helpers import gradients
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import mrvae_kernels as mk
from mrvae_kernels import functional, reference

CONVOLUTIONS = {
    (1, False): (mk.gated_conv1d, F.conv1d),
    (2, False): (mk.gated_conv2d, F.conv2d),
    (3, False): (mk.gated_conv3d, F.conv3d),
    (1, True): (mk.gated_conv_transpose1d, F.conv_transpose1d),
    (2, True): (mk.gated_conv_transpose2d, F.conv_transpose2d),
    (3, True): (mk.gated_conv_transpose3d, F.conv_transpose3d),
}
ACTIVATIONS = st.sampled_from([None, "none", *reference.ACTIVATIONS[1:]])


def double(*shape: int, grad: bool = True) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).requires_grad_(grad)


def agree(
    call, plain: Tensor, gate: Tensor, shift: Tensor | None, dim: int, activation: str | None, inputs: list[Tensor]
):
    """call(strategy) equals act(gate * plain + shift) for each strategy that applies, values and all gradients."""
    y = plain * reference.along(gate, dim, plain.dim())
    if shift is not None:
        y = y + reference.along(shift, dim, plain.dim())
    expected = reference.activate(y, activation or "none")
    expected_gradients = gradients(expected, inputs)
    for strategy in (None, "epilogue", *(["fold"] if gate.dim() == 1 else [])):
        result = call(strategy)
        torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-11)
        for value, other in zip(gradients(result, inputs), expected_gradients, strict=True):
            torch.testing.assert_close(value, other, rtol=1e-8, atol=1e-10)


@given(
    lead=st.lists(st.integers(1, 3), max_size=3),
    k=st.integers(1, 5),
    c=st.integers(1, 5),
    bias=st.booleans(),
    shift=st.booleans(),
    per_sample=st.booleans(),
    activation=ACTIVATIONS,
)
def test_linear(backend, lead, k, c, bias, shift, per_sample, activation):
    assume(lead or not per_sample)
    x, weight, b = double(*lead, k), double(c, k), double(c) if bias else None
    rows = (lead[0],) if per_sample else ()
    gate, t = double(*rows, c), double(*rows, c) if shift else None
    inputs = [v for v in (x, weight, b, gate, t) if v is not None]
    agree(
        lambda s: mk.gated_linear(x, weight, b, gate, t, activation, strategy=s),
        F.linear(x, weight, b),
        gate,
        t,
        len(lead),
        activation,
        inputs,
    )


@st.composite
def convolution_cases(draw):
    d, transposed = draw(st.sampled_from([1, 1, 2, 2, 3])), draw(st.booleans())
    each = lambda low, high: draw(st.one_of(st.integers(low, high), st.tuples(*[st.integers(low, high)] * d)))  # noqa: E731
    groups, c_in, c_out = (draw(st.integers(1, n)) for n in (3, 2, 2))
    kernel = draw(st.tuples(*[st.integers(1, 3)] * d))
    options = {"stride": each(1, 2), "padding": each(0, 1), "dilation": each(1, 2), "groups": groups}
    if transposed:
        options["output_padding"] = draw(st.sampled_from([0, 0, 1]))
    elif draw(st.booleans()):
        options["padding"] = draw(st.sampled_from(["same", "valid"]))
        options["stride"] = 1
    shape = (draw(st.integers(1, 3)), c_in * groups, *draw(st.tuples(*[st.integers(3, 6)] * d)))
    weight = (c_in * groups, c_out, *kernel) if transposed else (c_out * groups, c_in, *kernel)
    return d, transposed, shape, weight, c_out * groups, options


@settings(max_examples=200)
@given(
    case=convolution_cases(),
    bias=st.booleans(),
    shift=st.booleans(),
    per_sample=st.booleans(),
    batched=st.booleans(),
    activation=ACTIVATIONS,
)
def test_convolutions(backend, case, bias, shift, per_sample, batched, activation):
    d, transposed, shape, weight_shape, c, options = case
    gated, plain = CONVOLUTIONS[d, transposed]
    x, weight, b = double(*(shape if batched else shape[1:])), double(*weight_shape), double(c) if bias else None
    rows = (shape[0],) if per_sample and batched else ()
    gate, t = double(*rows, c), double(*rows, c) if shift else None
    try:
        expected = plain(x, weight, b, **options)
    except RuntimeError:  # sizes that torch refuses
        assume(False)
    agree(
        lambda s: gated(x, weight, b, gate, t, activation=activation, strategy=s, **options),
        expected,
        gate,
        t,
        1 if batched else 0,
        activation,
        [v for v in (x, weight, b, gate, t) if v is not None],
    )


@settings(max_examples=200)
@given(case=convolution_cases())
def test_the_output_size_that_the_cost_model_uses_is_the_outputs(case):
    d, transposed, shape, weight_shape, _, options = case
    assume(not isinstance(options["padding"], str))
    x, weight = torch.empty(*shape, device="meta"), torch.empty(*weight_shape, device="meta")
    try:
        numel = CONVOLUTIONS[d, transposed][1](x, weight, **options).numel()
    except RuntimeError:
        assume(False)
    spread = {
        key: functional._ints(options.get(key, 0), d) for key in ("stride", "padding", "dilation", "output_padding")
    }
    ours = functional.convolution_output_numel(x, weight, transposed=transposed, groups=options["groups"], **spread)
    assert ours == numel


@given(
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=5),
    data=st.data(),
    bias=st.booleans(),
    shift=st.booleans(),
    activation=ACTIVATIONS,
)
def test_epilogue(backend, shape, data, bias, shift, activation):
    dim = data.draw(st.integers(-len(shape), len(shape) - 1))
    channel = dim % len(shape)
    rows = (shape[0],) if channel and data.draw(st.booleans()) else ()
    u, b = double(*shape), double(shape[dim]) if bias else None
    gate, t = double(*rows, shape[dim]), double(*rows, shape[dim]) if shift else None
    plain = u if b is None else u + reference.along(b, channel, u.dim())
    y = functional.epilogue(u, b, gate, t, dim, activation)
    expected = plain * reference.along(gate, channel, u.dim())
    expected = reference.activate(
        expected if t is None else expected + reference.along(t, channel, u.dim()), activation or "none"
    )
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-12)
    inputs = [v for v in (u, b, gate, t) if v is not None]
    for value, other in zip(gradients(y, inputs), gradients(expected, inputs), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-9, atol=1e-11)


def test_fold_of_many_layers_is_the_fold_of_each(backend):
    shapes, groups = [(3, 4), (5, 2, 3), (4, 3, 2, 2), (6,)], [0, 0, 2, 0]
    features = [3, 5, 6, 6]
    weights = [double(*s) for s in shapes]
    biases, shifts = [double(3), None, double(6), None], [None, None, double(6), double(6)]
    gates = [double(f) for f in features]
    folded, folded_biases = functional.fold(weights, biases, gates, shifts, groups)
    assert folded_biases[1] is None
    for i in range(4):
        expected, expected_bias = reference.fold(weights[i], biases[i], gates[i], shifts[i], groups[i])
        inputs = [v for v in (weights[i], biases[i], gates[i], shifts[i]) if v is not None]
        pairs = [(folded[i], expected)] + ([(folded_biases[i], expected_bias)] if i != 1 else [])
        total, expected_total = (sum((p[k] * p[k].detach().cos()).sum() for p in pairs) for k in (0, 1))
        torch.testing.assert_close([p[0] for p in pairs], [p[1] for p in pairs])
        ours = torch.autograd.grad(total, inputs, retain_graph=True)
        torch.testing.assert_close(ours, torch.autograd.grad(expected_total, inputs))
    assert functional.fold([], [], [], [], []) == ([], [])

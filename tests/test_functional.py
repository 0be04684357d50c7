"""fold == epilogue == formula for every operator and argument, their gradients, and their errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import gradients, relative_error, subsets
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import mrvae_kernels as mk
from mrvae_kernels import functional, reference

CONVOLUTIONS = {
    (1, False): (mk.gated_conv1d, F.conv1d), (2, False): (mk.gated_conv2d, F.conv2d), (3, False): (mk.gated_conv3d, F.conv3d),
    (1, True): (mk.gated_conv_transpose1d, F.conv_transpose1d), (2, True): (mk.gated_conv_transpose2d, F.conv_transpose2d),
    (3, True): (mk.gated_conv_transpose3d, F.conv_transpose3d),
}
ACTIVATIONS = st.sampled_from([None, "none", *reference.ACTIVATIONS[1:]])


def double(*shape: int, grad: bool = True) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).requires_grad_(grad)


def agree(call, plain: Tensor, gate: Tensor, shift: Tensor | None, dim: int, activation: str | None, inputs: list[Tensor]):
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
    lead=st.lists(st.integers(1, 3), max_size=3), k=st.integers(1, 5), c=st.integers(1, 5), bias=st.booleans(),
    shift=st.booleans(), per_sample=st.booleans(), activation=ACTIVATIONS,
)
def test_linear(backend, lead, k, c, bias, shift, per_sample, activation):
    assume(lead or not per_sample)
    x, weight, b = double(*lead, k), double(c, k), double(c) if bias else None
    rows = (lead[0],) if per_sample else ()
    gate, t = double(*rows, c), double(*rows, c) if shift else None
    inputs = [v for v in (x, weight, b, gate, t) if v is not None]
    agree(
        lambda s: mk.gated_linear(x, weight, b, gate, t, activation, strategy=s),
        F.linear(x, weight, b), gate, t, len(lead), activation, inputs,
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
    case=convolution_cases(), bias=st.booleans(), shift=st.booleans(), per_sample=st.booleans(),
    batched=st.booleans(), activation=ACTIVATIONS,
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
        expected, gate, t, 1 if batched else 0, activation, [v for v in (x, weight, b, gate, t) if v is not None],
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
    spread = {key: functional._ints(options.get(key, 0), d) for key in ("stride", "padding", "dilation", "output_padding")}
    ours = functional.convolution_output_numel(x, weight, transposed=transposed, groups=options["groups"], **spread)
    assert ours == numel


@given(
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=5), data=st.data(), bias=st.booleans(), shift=st.booleans(),
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
    expected = reference.activate(expected if t is None else expected + reference.along(t, channel, u.dim()), activation or "none")
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


CASES = {
    "linear": (mk.gated_linear, (3, 4), (5, 4), 5, {}),
    "linear, 3 axes": (mk.gated_linear, (3, 2, 4), (5, 4), 5, {}),
    "conv1d": (mk.gated_conv1d, (3, 4, 6), (4, 2, 3), 4, {"padding": 1, "groups": 2}),
    "conv2d": (mk.gated_conv2d, (3, 2, 5, 4), (3, 2, 3, 2), 3, {"stride": 2, "padding": "valid"}),
    "conv3d": (mk.gated_conv3d, (3, 1, 3, 4, 3), (2, 1, 2, 2, 2), 2, {"dilation": (1, 2, 1)}),
    "conv_transpose1d": (mk.gated_conv_transpose1d, (3, 4, 4), (4, 2, 3), 4, {"stride": 2, "output_padding": 1, "groups": 2}),
    "conv_transpose2d": (mk.gated_conv_transpose2d, (3, 2, 3, 2), (2, 3, 3, 3), 3, {"stride": 2, "padding": 1}),
    "conv_transpose3d": (mk.gated_conv_transpose3d, (3, 2, 2, 2, 2), (2, 1, 2, 2, 2), 1, {}),
}
WAYS = [("fold", False), ("epilogue", False), ("epilogue", True)]


def tensors(name: str, per_sample: bool, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    _, shape, weight, c, _ = CASES[name]
    rows = (shape[0], c) if per_sample else (c,)
    gate = torch.rand(rows, dtype=torch.float64) + 0.2
    values = [torch.randn(shape), torch.randn(weight), torch.randn(c), gate, torch.randn(rows)]
    return [v.to(dtype).requires_grad_() for v in values]


def call(name: str, inputs: list[Tensor], strategy: str, activation: str | None = "silu") -> Tensor:
    function, *_, options = CASES[name]
    return function(*inputs, **options, activation=activation, strategy=strategy)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("strategy", "per_sample"), WAYS)
def test_gradcheck(backend, name, strategy, per_sample):
    assert torch.autograd.gradcheck(lambda *v: call(name, list(v), strategy), tensors(name, per_sample))


@pytest.mark.parametrize("name", ["linear", "conv2d", "conv_transpose1d"])
@pytest.mark.parametrize(("strategy", "per_sample"), WAYS)
def test_every_subset_of_inputs_that_need_a_gradient(backend, name, strategy, per_sample):
    inputs = tensors(name, per_sample)
    everything = gradients(call(name, inputs, strategy), inputs)
    for wanted in subsets(5):
        some = [v.detach().requires_grad_(w) for v, w in zip(inputs, wanted, strict=True)]
        y = call(name, some, strategy)
        assert y.requires_grad
        found = iter(gradients(y, [v for v in some if v.requires_grad]))
        for w, expected in zip(wanted, everything, strict=True):
            if w:
                torch.testing.assert_close(next(found), expected, rtol=1e-10, atol=1e-12)
    assert not call(name, [v.detach() for v in inputs], strategy).requires_grad


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


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("strategy", "per_sample"), WAYS)
@pytest.mark.parametrize("kind", ["sliced", "transposed", "channels_last", "expanded"])
def test_strides_of_inputs_and_grad_outputs_do_not_matter(backend, name, strategy, per_sample, kind):
    views = [strided(kind, v) for v in tensors(name, per_sample)]
    plain = [v.clone(memory_format=torch.contiguous_format).requires_grad_() for v in views]
    views = [v.requires_grad_() for v in views]
    expected, y = call(name, plain, strategy), call(name, views, strategy)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-12)
    grad = torch.randn_like(expected, memory_format=torch.contiguous_format)
    behind = strided(kind, grad)
    wanted = gradients(expected, plain, behind.clone(memory_format=torch.contiguous_format))
    for value, other in zip(gradients(y, views, behind), wanted, strict=True):
        torch.testing.assert_close(value, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("strategy", "per_sample"), WAYS)
def test_the_gradient_of_a_sum_and_of_a_scaled_sum(backend, name, strategy, per_sample):
    inputs = tensors(name, per_sample)
    y = call(name, inputs, strategy)
    ones = gradients(y, inputs, torch.ones_like(y))  # dense, where sum() hands on an expanded scalar
    for factor in (1.0, 2.5):
        total = call(name, inputs, strategy).sum() * factor
        for value, expected in zip(torch.autograd.grad(total, inputs), ones, strict=True):
            torch.testing.assert_close(value, expected * factor, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("strategy", "per_sample"), WAYS)
def test_empty_batches(backend, name, strategy, per_sample):
    x, weight, bias, gate, shift = tensors(name, per_sample)
    x, gate, shift = x[:0], gate[:0] if per_sample else gate, shift[:0] if per_sample else shift
    inputs = [v.detach().requires_grad_() for v in (x, weight, bias, gate, shift)]
    y = call(name, inputs, strategy)
    assert y.shape == (0, *call(name, tensors(name, per_sample), strategy).shape[1:])
    found = torch.autograd.grad(y.sum(), inputs)
    for value, given_ in zip(found, inputs, strict=True):
        assert value.shape == given_.shape and (value == 0).all()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("strategy", "per_sample"), WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_is_near_float64(backend, name, strategy, per_sample, dtype):
    low = tensors(name, per_sample, dtype)
    low[3:] = [v.detach().float().requires_grad_() for v in low[3:]]
    high = [v.detach().double().requires_grad_() for v in low]
    y, expected = call(name, low, strategy), call(name, high, strategy)
    tolerance = 2e-6 if dtype == torch.float32 else 2e-2
    assert y.dtype == dtype
    assert relative_error(y.double(), expected) < tolerance
    for value, other, given_ in zip(gradients(y, low), gradients(expected, high), low, strict=True):
        assert value.dtype == given_.dtype
        assert relative_error(value.double(), other) < 2 * tolerance


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("rows", [1, 2, 5])
def test_a_wrong_number_of_betas_is_a_value_error(backend, name, rows):
    x, weight, bias, gate, shift = tensors(name, True)
    wrong = [torch.rand(rows, gate.shape[1], dtype=torch.float64) for _ in range(2)]
    for broken in ((wrong[0], shift), (gate, wrong[1]), (wrong[0], wrong[1]), (wrong[0], None)):
        with pytest.raises(ValueError, match=rf"has shape \({rows}, {gate.shape[1]}\); expected .* \(3, {gate.shape[1]}\) for one beta"):
            call(name, [x, weight, bias, *broken], "epilogue")


@pytest.mark.parametrize("name", CASES)
def test_shapes_that_would_broadcast_are_value_errors(backend, name):
    x, weight, bias, gate, shift = tensors(name, False)
    one = torch.ones(1, dtype=torch.float64)
    for strategy in ("fold", "epilogue"):
        cases = [(bias, gate, shift[:, None]), (bias, gate[None, None], None), (bias, gate, gate[None].expand(3, -1)), (bias, one[0], None)]
        cases += [(one, gate, shift), (bias, one, shift), (bias, gate, one)] if len(gate) > 1 else []
        for broken in cases:
            with pytest.raises(ValueError, match="shape"):
                call(name, [x, weight, *broken], strategy)


@pytest.mark.parametrize("name", CASES)
def test_errors_say_what_to_do(backend, name):
    inputs = tensors(name, False)
    with pytest.raises(ValueError, match="activation is 'softmax'|softmax"):
        call(name, inputs, "epilogue", "softmax")
    with pytest.raises(ValueError, match="strategy is 'magic'; expected one of fold, epilogue"):
        call(name, inputs, "magic")
    with pytest.raises(ValueError, match="folding needs one weight for the whole batch"):
        call(name, tensors(name, True), "fold")
    x = inputs[0]
    with pytest.raises(ValueError, match="x has shape .* and weight"):
        wrong = torch.cat([x, x], -1) if "linear" in name else torch.cat([x, x], 1)
        call(name, [wrong, *inputs[1:]], "epilogue")


def test_errors_of_single_arguments(backend):
    x, weight, gate = double(2, 3, 5), double(3, 4, 3), double(4)
    with pytest.raises(ValueError, match="a transposed convolution takes numbers only"):
        mk.gated_conv_transpose1d(x, weight, None, gate, padding="same")  # type: ignore[arg-type]
    weight = double(4, 3, 3)
    with pytest.raises(ValueError, match="padding is 'same' with stride"):
        mk.gated_conv1d(x, weight, None, gate, padding="same", stride=2)
    with pytest.raises(ValueError, match="padding is 'full'"):
        mk.gated_conv1d(x, weight, None, gate, padding="full")
    with pytest.raises(ValueError, match="expected one number or 1"):
        mk.gated_conv1d(x, weight, None, gate, stride=(1, 2))
    with pytest.raises(ValueError, match="no batch axis; expected one beta, not 2"):
        mk.gated_conv1d(x[0], weight, None, double(2, 4))
    with pytest.raises(ValueError, match="dim is 3"):
        functional.epilogue(x, None, double(5), dim=3)
    with pytest.raises(ValueError, match="expected"):
        mk.gated_linear(x[0, 0], double(4, 5), None, double(2, 4))


def test_gates_of_another_precision_are_converted(backend):
    for dtype in (torch.float32, torch.float64):
        x, weight, bias = (torch.randn(s, dtype=dtype) for s in ((3, 4), (5, 4), (5,)))
        gate, shift = torch.rand(5), torch.randn(5)
        for strategy in ("fold", "epilogue"):
            expected = mk.gated_linear(x, weight, bias, gate.to(dtype), shift.to(dtype), strategy=strategy)
            for other in (torch.float32, torch.float64):
                y = mk.gated_linear(x, weight, bias, gate.to(other), shift.to(other), strategy=strategy)
                assert y.dtype == dtype
                torch.testing.assert_close(y, expected, rtol=1e-6 if dtype == torch.float32 else 1e-12, atol=0)

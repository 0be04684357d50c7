from __future__ import annotations

import pytest
import torch
from op_checks import DEVICE, agree, check_compiled, check_once_differentiable, check_subsets, leaf, requires_extension

from mrvae_kernels import ops, reference

pytestmark = requires_extension

STRATEGIES = ["fold", "epilogue"]

# x, weight, (stride, padding, dilation, transposed, output_padding, groups)
CASES = {
    "conv1d": ((3, 4, 11), (6, 4, 3), ([2], [1], [1], False, [0], 1)),
    "conv2d": ((3, 4, 9, 7), (5, 4, 3, 2), ([2, 1], [1, 0], [1, 2], False, [0, 0], 1)),
    "conv2d, groups": ((2, 6, 6, 5), (4, 3, 3, 3), ([1, 1], [1, 1], [1, 1], False, [0, 0], 2)),
    "conv2d, depthwise": ((2, 4, 6, 5), (8, 1, 3, 3), ([1, 1], [1, 1], [1, 1], False, [0, 0], 4)),
    "conv3d": ((2, 3, 5, 4, 6), (4, 3, 2, 3, 1), ([1, 2, 1], [1, 1, 0], [1, 1, 1], False, [0, 0, 0], 1)),
    "transposed1d": ((3, 4, 5), (4, 3, 4), ([2], [1], [1], True, [1], 1)),
    "transposed2d": ((2, 4, 5, 3), (4, 3, 3, 4), ([2, 2], [1, 1], [1, 1], True, [1, 0], 1)),
    "transposed2d, groups": ((2, 6, 4, 3), (6, 2, 3, 3), ([2, 1], [1, 1], [1, 2], True, [0, 0], 3)),
    "transposed3d": ((1, 4, 3, 2, 3), (4, 2, 2, 2, 3), ([2, 1, 2], [0, 0, 1], [1, 1, 1], True, [1, 0, 1], 2)),
    "empty batch": ((0, 4, 9, 7), (5, 4, 3, 3), ([2, 2], [1, 1], [1, 1], False, [0, 0], 1)),
}


def tensors_for(name, per_sample=False, dtype=torch.float64, channels_last=False):
    torch.manual_seed(0)
    x_shape, weight_shape, geometry = CASES[name]
    channels = weight_shape[1] * geometry[-1] if geometry[3] else weight_shape[0]
    shape = (x_shape[0], channels) if per_sample else (channels,)
    x, weight, bias = (torch.randn(s).to(dtype) for s in (x_shape, weight_shape, (channels,)))
    gate, shift = (torch.randn(shape, dtype=reference.gate_dtype(dtype)) for _ in range(2))
    if channels_last:
        x, weight = (t.to(memory_format=torch.channels_last) for t in (x, weight))
    return geometry, [x, weight, bias, gate, shift]


def functions(geometry, strategy, activation="none"):
    return (
        lambda *tensors: ops.gated_convolution(*tensors, *geometry, activation, strategy),
        lambda *tensors: reference.gated_convolution(*tensors, *geometry, activation, "epilogue"),
    )


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_strategies_agree_with_reference(name, dtype):
    for per_sample, strategy in ((False, "fold"), (False, "epilogue"), (True, "epilogue")):
        geometry, tensors = tensors_for(name, per_sample, dtype)
        agree(*functions(geometry, strategy), tensors)
        agree(*functions(geometry, strategy, "silu"), tensors)


@pytest.mark.parametrize("name", ["conv2d", "transposed2d", "transposed2d, groups"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_gradcheck_and_subsets(name, strategy):
    geometry, tensors = tensors_for(name)
    for activation in ("none", "tanh"):
        assert torch.autograd.gradcheck(functions(geometry, strategy, activation)[0], [leaf(t) for t in tensors])
        check_subsets(functions(geometry, strategy, activation)[0], tensors)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_channels_last(strategy):
    for name in ("conv2d", "conv2d, groups", "transposed2d"):
        for per_sample in (False, True) if strategy == "epilogue" else (False,):
            geometry, tensors = tensors_for(name, per_sample, torch.float32, channels_last=True)
            agree(*functions(geometry, strategy, "relu"), tensors)
            plain = torch.ops.aten.convolution(tensors[0], tensors[1], None, *geometry)
            assert functions(geometry, strategy)[0](*tensors).stride() == plain.stride()


@pytest.mark.parametrize("missing", [(2,), (4,), (2, 4)])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_without_bias_or_shift(missing, strategy):
    for name in ("conv2d", "transposed2d, groups"):
        geometry, tensors = tensors_for(name)
        tensors = [None if i in missing else t for i, t in enumerate(tensors)]
        agree(*functions(geometry, strategy, "leaky_relu"), tensors)
        agree(*functions(geometry, strategy), tensors)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_expanded_and_foreign_gradients_and_strided_inputs(strategy):
    for name in ("conv2d", "transposed2d"):
        geometry, tensors = tensors_for(name)
        tensors[0] = torch.cat([tensors[0]] * 2, dim=-1)[..., : tensors[0].shape[-1]]
        tensors[1] = torch.stack([tensors[1]] * 2, dim=-1)[..., 1]
        run, oracle = functions(geometry, strategy, "elu")
        agree(run, oracle, tensors, grads=lambda t: t.new_full((), 0.5).expand(t.shape))
        agree(run, oracle, tensors, grads=lambda t: torch.randn(*t.shape, 2, dtype=t.dtype)[..., 0])
        agree(
            run, oracle, tensors,
            grads=lambda t: torch.randn_like(t).contiguous(memory_format=torch.channels_last),
        )


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_autocast(strategy):
    geometry, tensors = tensors_for("conv2d", dtype=torch.float32)
    leaves = [leaf(t) for t in tensors]
    with torch.autocast(DEVICE, torch.bfloat16):
        y = functions(geometry, strategy)[0](*leaves)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    exact = [leaf(t, torch.float64) for t in tensors]
    functions(geometry, strategy)[1](*exact).square().sum().backward()
    for t, e in zip(leaves, exact, strict=True):
        assert t.grad.dtype == torch.float32
        torch.testing.assert_close(t.grad.double(), e.grad, rtol=0.05, atol=0.05 * e.grad.abs().max().item())


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_opcheck(strategy):
    for name in ("conv1d", "conv2d, groups", "transposed2d"):
        geometry, tensors = tensors_for(name)
        arguments = [leaf(t) for t in tensors]
        torch.library.opcheck(
            torch.ops.mrvae.gated_convolution.default, (*arguments, *geometry, "gelu", strategy),
        )


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("transposed", [False, True])
def test_compile_with_dynamic_shapes(strategy, transposed):
    geometry = ([2, 2], [1, 1], [1, 1], transposed, [1, 1] if transposed else [0, 0], 1)

    def batch(n, side):
        weight = torch.randn(4, 3, 3, 3) if transposed else torch.randn(3, 4, 3, 3)
        return [torch.randn(n, 4, side, side), weight, torch.randn(3), torch.rand(3), None]

    check_compiled(functions(geometry, strategy, "relu")[0], [batch(4, 6), batch(3, 9), batch(5, 7)])


def test_second_derivatives_are_refused():
    for strategy in STRATEGIES:
        geometry, tensors = tensors_for("conv2d")
        check_once_differentiable(functions(geometry, strategy)[0], tensors, "gated_convolution")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.rand(2, 5, 6, 6)}, ValueError, r"expected 4 channels in axis 1"),
        ({"x": torch.rand(4, 6, 6)}, ValueError, r"x has shape \[4, 6, 6\]"),
        ({"x": torch.rand(2, 4, 6, 6).bfloat16()}, TypeError, "x has dtype BFloat16 and weight Float"),
        ({"stride": [1]}, ValueError, "one of each a spatial axis"),
        ({"groups": 0}, ValueError, "groups = 0"),
        ({"gate": torch.rand(2, 3), "strategy": "fold"}, ValueError, "cannot be folded"),
        ({"gate": torch.rand(4)}, ValueError, "gate has shape"),
        ({"shift": torch.rand(2, 3)}, ValueError, "that of gate"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    arguments = {
        "x": torch.rand(2, 4, 6, 6), "weight": torch.rand(3, 4, 3, 3), "bias": None, "gate": torch.rand(3),
        "shift": None, "stride": [1, 1], "padding": [1, 1], "dilation": [1, 1], "transposed": False,
        "output_padding": [0, 0], "groups": 1, "activation": "none", "strategy": "epilogue",
    }
    with pytest.raises(error, match=message):
        ops.gated_convolution(**{**arguments, **change})

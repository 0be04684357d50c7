"""What the operators refuse: wrong numbers of betas, shapes that would broadcast, unknown names; gates converted."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import OPERATORS, operands, operate
from torch import Tensor

import mrvae_kernels as mk
from mrvae_kernels import functional


def double(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("rows", [1, 2, 5])
def test_a_wrong_number_of_betas_is_a_value_error(backend, name, rows):
    x, weight, bias, gate, shift = operands(name, True)
    wrong = [torch.rand(rows, gate.shape[1], dtype=torch.float64) for _ in range(2)]
    for broken in ((wrong[0], shift), (gate, wrong[1]), (wrong[0], wrong[1]), (wrong[0], None)):
        with pytest.raises(
            ValueError, match=rf"has shape \({rows}, {gate.shape[1]}\); expected .* \(3, {gate.shape[1]}\) for one beta"
        ):
            operate(name, [x, weight, bias, *broken], "epilogue")


@pytest.mark.parametrize("name", OPERATORS)
def test_shapes_that_would_broadcast_are_value_errors(backend, name):
    x, weight, bias, gate, shift = operands(name, False)
    one = torch.ones(1, dtype=torch.float64)
    for strategy in ("fold", "epilogue"):
        cases = [
            (bias, gate, shift[:, None]),
            (bias, gate[None, None], None),
            (bias, gate, gate[None].expand(3, -1)),
            (bias, one[0], None),
        ]
        cases += [(one, gate, shift), (bias, one, shift), (bias, gate, one)] if len(gate) > 1 else []
        for broken in cases:
            with pytest.raises(ValueError, match="shape"):
                operate(name, [x, weight, *broken], strategy)


@pytest.mark.parametrize("name", OPERATORS)
def test_errors_say_what_to_do(backend, name):
    inputs = operands(name, False)
    with pytest.raises(ValueError, match="activation is 'softmax'|softmax"):
        operate(name, inputs, "epilogue", "softmax")
    with pytest.raises(ValueError, match="strategy is 'magic'; expected one of fold, epilogue"):
        operate(name, inputs, "magic")
    with pytest.raises(ValueError, match="folding needs one weight for the whole batch"):
        operate(name, operands(name, True), "fold")
    x = inputs[0]
    with pytest.raises(ValueError, match="x has shape .* and weight"):
        wrong = torch.cat([x, x], -1) if "linear" in name else torch.cat([x, x], 1)
        operate(name, [wrong, *inputs[1:]], "epilogue")


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


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("wrong", [0.5, [0.5] * 4, np.ones(4)], ids=["number", "list", "array"])
def test_a_gate_that_is_no_tensor_is_a_type_error(backend, name, wrong):
    x, weight, bias, gate, _ = operands(name, False)
    for row in (x, x[0]):
        with pytest.raises(TypeError, match=r"gate is .*; expected a tensor, \(C,\) or \(N, C\)"):
            operate(name, [row, weight, bias, wrong, None], "epilogue")
    with pytest.raises(TypeError, match="shift is .*; expected a tensor"):
        operate(name, [x, weight, bias, gate, wrong], "epilogue")


def test_a_stride_of_0_is_a_value_error(backend):
    x, weight, per_sample = double(2, 3, 5), double(4, 3, 3), double(2, 4)
    for gate in (per_sample[0], per_sample):
        with pytest.raises(ValueError, match=r"stride is \(0,\); expected positive numbers"):
            mk.gated_conv1d(x, weight, None, gate, stride=0)
        with pytest.raises(ValueError, match=r"stride is \(0,\); expected positive numbers"):
            mk.gated_conv_transpose1d(x, weight.transpose(0, 1), None, gate, stride=0)
    layer = mk.GatedConv1d(3, 4, 3, stride=0).double()
    with pytest.raises(ValueError, match=r"stride is \(0,\); expected positive numbers"):
        layer(x, 0.5)


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

"""The epilogue of (N, C) with one beta a sample as an operator, against the reference in float64."""

from __future__ import annotations

import pytest
import torch
from op_checks import TOLERANCE, assert_close, requires_extension
from torch import Tensor

from mrvae_kernels import reference
from mrvae_kernels.gates import GATE_KINDS, KINDS

pytestmark = requires_extension

BEFORE, CHANNELS, BETWEEN = 5, 37, 3
FLAT = BEFORE + CHANNELS + BETWEEN + CHANNELS + 2
GATE, SHIFT = BEFORE, BEFORE + CHANNELS + BETWEEN


def inputs(dtype: torch.dtype, degree: int, samples: int = 19) -> dict[str, Tensor]:
    torch.manual_seed(0)
    wide = reference.gate_dtype(dtype)
    return {
        "u": torch.randn(samples, CHANNELS).to(dtype), "bias": torch.randn(CHANNELS).to(dtype),
        "weight": torch.randn(*([degree] if degree > 1 else []), FLAT).to(wide) / 2,
        "gate_bias": torch.randn(FLAT).to(wide), "eta": torch.empty(samples).uniform_(-1.7, 1.7).to(wide),
    }


def formula(given: dict[str, Tensor], shift: int, kind: str, activation: str) -> Tensor:
    def made(start: int, of: str) -> Tensor:
        rows = slice(start, start + CHANNELS)
        return reference.gates(given["weight"][..., rows], given["gate_bias"][rows], given["eta"], of)

    t = None if shift < 0 else made(shift, "identity")
    return reference.epilogue(given["u"], given.get("bias"), made(GATE, kind), t, 1, activation)


def op(given: dict[str, Tensor], shift: int, kind: str, activation: str) -> Tensor:
    parts = given["weight"], given["gate_bias"], given["eta"]
    code = KINDS.index(kind)
    return torch.ops.mrvae.sampled_epilogue(given["u"], given.get("bias"), *parts, GATE, shift, code, activation)


def backward(
    given: dict[str, Tensor], grad: Tensor, kept: Tensor, shift: int, kind: str, activation: str, of_result: bool,
    mask: list[bool],
) -> list[Tensor]:
    parts = given["weight"], given["gate_bias"], given["eta"]
    how = GATE, shift, KINDS.index(kind), activation, of_result, mask
    return list(torch.ops.mrvae.sampled_epilogue_backward(grad, kept, given.get("bias"), *parts, *how))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
@pytest.mark.parametrize("shift", [-1, SHIFT])
@pytest.mark.parametrize("degree", [1, 2, 3])
@pytest.mark.parametrize("kind", GATE_KINDS)
def test_values_and_gradients(kind, degree, shift, activation, dtype):
    given = inputs(dtype, degree)
    if degree == 2:
        del given["bias"]
    exact = {name: value.double().requires_grad_(name != "eta") for name, value in given.items()}
    y, target = op(given, shift, kind, activation), formula(exact, shift, kind, activation)
    tolerance = 4 * TOLERANCE[dtype]
    assert y.dtype == dtype
    assert_close(y, target, tolerance)
    grad = torch.randn_like(y)
    leaves = [exact[name] for name in ("u", "weight", "gate_bias")]
    wanted = torch.autograd.grad(target, leaves, grad.double(), retain_graph=True)
    for of_result in (False, True) if activation in ("none", "relu") and kind != "sqrt" else (False,):
        if of_result and dtype == torch.bfloat16:
            continue  # y has lost what its shift is larger by
        kept = y if of_result else given["u"]
        mask = [True, "bias" in given, True, shift >= 0]
        du, dbias, sums, shifts = backward(given, grad, kept, shift, kind, activation, of_result, mask)
        assert_close(du, wanted[0], tolerance, "u")
        if "bias" in given:
            dtarget, = torch.autograd.grad(target, exact["bias"], grad.double(), retain_graph=True)
            assert_close(dbias, dtarget, tolerance, "bias")
        for found, start in ((sums, GATE), *([(shifts, SHIFT)] if shift >= 0 else [])):
            rows = slice(start, start + CHANNELS)
            assert_close(found[:-1].squeeze(0) if degree == 1 else found[:-1], wanted[1][..., rows], tolerance, "w")
            assert_close(found[-1], wanted[2][rows], tolerance, "c")


def test_an_empty_batch_and_one_of_one():
    for samples in (0, 1):
        given = inputs(torch.float64, 3, samples)
        exact = {name: value.requires_grad_(name != "eta") for name, value in given.items()}
        target = formula(exact, SHIFT, "softplus", "relu")
        with torch.no_grad():
            torch.testing.assert_close(op(given, SHIFT, "softplus", "relu"), target)
        wanted = torch.autograd.grad(target.sum(), [exact[name] for name in ("u", "bias", "weight")])
        plain = {name: value.detach() for name, value in given.items()}
        grad = torch.ones_like(plain["u"])
        du, dbias, sums, _ = backward(plain, grad, plain["u"], SHIFT, "softplus", "relu", False, [True] * 4)
        rows = slice(GATE, GATE + CHANNELS)
        torch.testing.assert_close([du, dbias, sums[:-1]], [wanted[0], wanted[1], wanted[2][:, rows]])


def test_what_is_not_asked_for_is_empty():
    given = inputs(torch.float32, 3)
    y = op(given, SHIFT, "softplus", "relu")
    full = backward(given, y, given["u"], SHIFT, "softplus", "relu", False, [True] * 4)
    for i in range(4):
        mask = [j == i for j in range(4)]
        found = backward(given, y, given["u"], SHIFT, "softplus", "relu", False, mask)
        assert torch.equal(found[i], full[i])
        assert all(value.shape == (0,) for j, value in enumerate(found) if j != i)
    assert backward(given, y, y, -1, "softplus", "relu", True, [True] * 4)[3].shape == (0,)


@pytest.mark.parametrize("shift", [-1, SHIFT])
@pytest.mark.parametrize("biased", [True, False])
def test_schema_and_shapes_for_compilers(shift, biased):
    given = inputs(torch.float32, 3)
    bias = given["bias"] if biased else None
    parts = given["u"], bias, given["weight"], given["gate_bias"], given["eta"], GATE, shift, 2, "relu"
    utilities = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.mrvae.sampled_epilogue.default, parts, test_utils=utilities)
    grad = torch.randn_like(given["u"])
    for mask in ([True, biased, True, True], [True, False, False, False]):
        torch.library.opcheck(
            torch.ops.mrvae.sampled_epilogue_backward.default, (grad, *parts, False, mask), test_utils=utilities
        )


def test_memory_of_any_order():
    given = inputs(torch.float64, 2)
    other = {**given, "u": given["u"].t().contiguous().t(), "weight": torch.stack([*given["weight"]], -1).t()}
    assert not other["u"].is_contiguous() and not other["weight"].is_contiguous()
    y = op(given, SHIFT, "softplus", "relu")
    torch.testing.assert_close(op(other, SHIFT, "softplus", "relu"), y)
    mask = [True] * 4
    expected = backward(given, y, given["u"], SHIFT, "softplus", "relu", False, mask)
    found = backward(other, y.t().contiguous().t(), other["u"], SHIFT, "softplus", "relu", False, mask)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("change", "error", "message"), [
    ({"u": torch.randn(19, CHANNELS).half()}, TypeError, "float16|Half"),
    ({"weight": torch.randn(FLAT).double()}, TypeError, "expected gates of"),
    ({"u": torch.randn(19, CHANNELS, 2)}, ValueError, "expected \\(N, C\\)"),
    ({"weight": torch.randn(4, FLAT)}, ValueError, "degree, S"),
    ({"gate_bias": torch.randn(FLAT - 1)}, ValueError, "weight and gate_bias"),
    ({"eta": torch.randn(18)}, ValueError, "one a row of u"),
    ({"bias": torch.randn(3)}, ValueError, "bias has shape"),
    ({"u": torch.randn(19, FLAT)}, ValueError, "the gates begin at"),
])
def test_what_does_not_fit_is_refused(change, error, message):
    with pytest.raises(error, match=message):
        op({**inputs(torch.float32, 1), **change}, -1, "sigmoid", "none")


def test_places_kinds_and_activations_that_are_not_there():
    given = inputs(torch.float32, 1)
    parts = given["u"], None, given["weight"], given["gate_bias"], given["eta"]
    for gate, shift, kind in ((-1, -1, 0), (GATE, FLAT, 0), (GATE, -2, 0), (GATE, -1, 3), (GATE, -1, -1)):
        with pytest.raises(ValueError, match="expected"):
            torch.ops.mrvae.sampled_epilogue(*parts, gate, shift, kind, "none")
    with pytest.raises(ValueError, match="of the result expected none or relu"):
        backward(given, given["u"], given["u"], -1, "sigmoid", "tanh", True, [True] * 4)

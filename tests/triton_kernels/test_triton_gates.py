from __future__ import annotations

import pytest
import torch
from kernel_checks import (
    DEVICE,
    TOLERANCE,
    Mutant,
    assert_close,
    choices,
    layouts,
    must_fail,
    poisoned,
    requires_triton,
    run_all,
)

from mrvae_kernels import reference

pytestmark = requires_triton
kernels = pytest.importorskip("mrvae_kernels.triton_kernels.gates")

SIZES, KINDS = (3, 0, 17, 131, 5, 1), (0, 1, 1, 2, 3, 0)
TOTAL = sum(SIZES)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def parameters(dtype=torch.float32, samples=None, total=TOTAL, degree=None):
    """weight (total,), or (degree, total), bias and eta."""
    torch.manual_seed(0)
    shape = () if samples is None else (samples,)
    rows = (total,) if degree is None else (degree, total)
    return (
        torch.randn(rows, dtype=dtype, device=DEVICE), torch.randn(total, dtype=dtype, device=DEVICE),
        torch.randn(shape, device=DEVICE),
    )


def exact(weight, bias, eta, sizes=SIZES, kinds=KINDS):
    """The oracle's gates in float64, and its leaves."""
    leaves = [tensor.detach().double().requires_grad_() for tensor in (weight, bias, eta)]
    return reference.gate_bank(*leaves, sizes, [kernels.KINDS[kind] for kind in kinds]), leaves


def check_values(kernels, weight, bias, eta, sizes=SIZES, kinds=KINDS, separate=False):
    with poisoned():
        results = kernels.gates(weight, bias, eta, sizes, kinds, separate)
    expected, _ = exact(weight, bias, eta, sizes, kinds)
    for i, (result, value) in enumerate(zip(results, expected, strict=True)):
        assert result.dtype == reference.gate_dtype(weight.dtype) and result.is_contiguous()
        assert_close(result, value, f"gate {i}")
    return results


def check_gradients(kernels, weight, bias, eta, sizes=SIZES, kinds=KINDS, eta_needs_grad=True, grads=None, none=(0,)):
    values, leaves = exact(weight, bias, eta, sizes, kinds)
    if grads is None:
        grads = [torch.randn_like(value, dtype=reference.gate_dtype(weight.dtype)) for value in values]
    grads = [None if i in none else grad for i, grad in enumerate(grads)]
    given = [(value, grad.double()) for value, grad in zip(values, grads, strict=True) if grad is not None]
    expected = torch.autograd.grad([value for value, _ in given], leaves, [grad for _, grad in given])
    with poisoned():
        results = kernels.gates_backward(grads, weight, bias, eta, sizes, kinds, eta_needs_grad)
    for result, value, tensor, name in zip(results, expected, (weight, bias, eta), ("dw", "dc", "deta"), strict=True):
        assert result.dtype == tensor.dtype
        if name == "deta" and not eta_needs_grad:
            assert result.shape == (0,)
        else:
            tolerance = max(TOLERANCE[result.dtype], TOLERANCE[reference.gate_dtype(weight.dtype)])
            assert_close(result, value, name, tolerance)


@pytest.mark.parametrize("samples", [None, 1, 9])
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradients(dtype, samples):
    tensors = parameters(dtype, samples)
    check_values(kernels, *tensors)
    check_gradients(kernels, *tensors)


@pytest.mark.parametrize("samples", [None, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("degree", [1, 2, 3])
def test_degrees(degree, dtype, samples):
    tensors = parameters(dtype, samples, degree=degree)
    check_values(kernels, *tensors, separate=samples is None)
    check_gradients(kernels, *tensors)
    check_gradients(kernels, *tensors, eta_needs_grad=False)
    transposed = tensors[0].t().contiguous().t()
    check_values(kernels, transposed, *tensors[1:])
    check_gradients(kernels, transposed, *tensors[1:])


@pytest.mark.parametrize("samples", [None, 33])
def test_each_kind(samples):
    for kind in range(len(kernels.KINDS)):
        tensors = parameters(torch.float64, samples, 40)
        check_values(kernels, *tensors, (40,), (kind,))
        check_gradients(kernels, *tensors, (40,), (kind,), none=())


@pytest.mark.parametrize("samples", [None, 5])
def test_separate_results(samples):
    tensors = parameters(samples=samples)
    results = check_values(kernels, *tensors, separate=True)
    assert len({result.untyped_storage().data_ptr() for result in results if result.numel() > 0}) == 5
    together = check_values(kernels, *tensors)
    assert len({result.untyped_storage().data_ptr() for result in together}) == 1
    assert all(torch.equal(*pair) for pair in zip(results, together, strict=True))


def test_many_features():
    sizes, kinds = (600, 7, 600), (0, 1, 2)
    for samples in (None, 2):
        tensors = parameters(samples=samples, total=sum(sizes))
        check_values(kernels, *tensors, sizes, kinds)
        check_gradients(kernels, *tensors, sizes, kinds)


def test_layouts():
    for _, weight in layouts(TOTAL):
        bias, eta = torch.randn(2 * TOTAL, device=DEVICE)[::2], torch.randn(1, device=DEVICE).expand(3)
        check_values(kernels, weight, bias, eta)
        check_gradients(kernels, weight, bias, eta)
    for _, grad in layouts(4, 17):
        grads = [None, torch.randn(4, 0, device=DEVICE), grad, None, torch.randn(4, 5, device=DEVICE), None]
        check_gradients(kernels, *parameters(samples=4), grads=grads, none=(0, 3, 5))


def test_mixed_dtypes():
    weight, bias, eta = parameters(torch.bfloat16, 3)
    check_values(kernels, weight, bias.float(), eta.double())
    check_gradients(kernels, weight, bias.float(), eta.double())
    check_gradients(kernels, weight.float(), bias.double(), eta.half())
    grads = [torch.randn(3, size, dtype=torch.bfloat16, device=DEVICE) for size in SIZES]
    check_gradients(kernels, weight, bias, eta, grads=grads)


def test_what_nobody_wants():
    for samples in (None, 5):
        check_gradients(kernels, *parameters(samples=samples), eta_needs_grad=False)
        weight, bias, eta = parameters(samples=samples)
        with poisoned():
            results = kernels.gates_backward([None] * 6, weight, bias, eta, SIZES, KINDS, True)
        for result, like in zip(results, (weight, bias, eta), strict=True):
            assert torch.equal(result, torch.zeros_like(like))


def test_empty():
    weight, bias, _ = parameters()
    nobody = torch.empty(0, device=DEVICE)
    assert [gate.shape for gate in kernels.gates(weight, bias, nobody, SIZES, KINDS)] == [(0, size) for size in SIZES]
    with poisoned():
        grads = [torch.empty(0, size, device=DEVICE) for size in SIZES]
        dw, dc, deta = kernels.gates_backward(grads, weight, bias, nobody, SIZES, KINDS, True)
    assert torch.equal(dw, torch.zeros_like(weight)) and torch.equal(dc, torch.zeros_like(bias)) and deta.shape == (0,)
    for sizes in ((), (0, 0)):
        kinds = (0,) * len(sizes)
        eta = torch.randn(2, device=DEVICE)
        assert [gate.shape for gate in kernels.gates(nobody, nobody, eta, sizes, kinds)] == [(2, 0)] * len(sizes)
        with poisoned():
            dw, dc, deta = kernels.gates_backward([None] * len(sizes), nobody, nobody, eta, sizes, kinds, True)
        assert dw.shape == dc.shape == (0,) and torch.equal(deta, torch.zeros_like(eta))


def test_extreme_arguments():
    big = torch.finfo(torch.float32).max
    weight = torch.tensor([big, -big, 1e-3, 0.0, -1e-30], device=DEVICE)
    for kind in range(len(kernels.KINDS)):
        eta, bias = torch.tensor(4.0, device=DEVICE), torch.zeros(5, device=DEVICE)
        (gate,) = kernels.gates(weight, bias, eta, (5,), (kind,))
        assert gate.isfinite().all()
        grads = kernels.gates_backward([torch.ones_like(gate)], weight, bias, eta, (5,), (kind,), True)
        assert grads[0].isfinite().all() and grads[1].isfinite().all()


def test_wide_offsets(monkeypatch):
    monkeypatch.setattr(kernels.launch, "INT32_LIMIT", 0)
    for samples in (None, 9):
        tensors = parameters(samples=samples)
        for separate in (True, False):
            check_values(kernels, *tensors, separate=separate)
        check_gradients(kernels, *tensors)


def test_same_bits():
    tensors = parameters(samples=40)
    grads = [torch.randn(40, size, device=DEVICE) for size in SIZES]
    first, second = (kernels.gates_backward(grads, *tensors, SIZES, KINDS, True) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


def test_any_subset_of_slices():
    tensors = parameters(samples=3)
    for choice in choices(3):
        absent = {place for place, given in zip((2, 3, 5), choice, strict=True) if not given}
        check_gradients(kernels, *tensors, none={0, 1, 4} | absent)


def test_errors():
    weight, bias, eta = parameters()
    for arguments, error, message in (
        ((weight, bias, eta, (3,), (0,)), ValueError, r"expected \(3,\)"),
        ((weight, bias[1:], eta, SIZES, KINDS), ValueError, "bias have shapes"),
        ((weight.expand(4, TOTAL), bias, eta, SIZES, KINDS), ValueError, "degree 1, 2 or 3"),
        ((weight.expand(0, TOTAL), bias, eta, SIZES, KINDS), ValueError, "degree 1, 2 or 3"),
        ((weight, bias, eta.expand(2, 2), SIZES, KINDS), ValueError, "eta has shape"),
        ((weight, bias, eta, SIZES, (0,)), ValueError, "1 kinds for 6 sizes"),
        ((weight, bias, eta, (-1, TOTAL + 1), (0, 0)), ValueError, "negative"),
        ((weight, bias, eta, (TOTAL,), (4,)), ValueError, "kind is 4"),
        ((weight.int(), bias, eta, SIZES, KINDS), TypeError, "weight has dtype"),
        ((weight.to("meta"), bias, eta, SIZES, KINDS), RuntimeError, "expected one device"),
    ):
        with pytest.raises(error, match=message):
            kernels.gates(*arguments)
    with pytest.raises(ValueError, match="1 gradients for 6 gates"):
        kernels.gates_backward([None], weight, bias, eta, SIZES, KINDS, True)
    with pytest.raises(ValueError, match="gradient 0 has shape"):
        kernels.gates_backward([weight] + [None] * 5, weight, bias, eta, SIZES, KINDS, True)


# ---- seeded faults ---------------------------------------------------------------------------------------------------


def check_forward_quickly(kernels):
    run_all([
        lambda kernels: check_values(kernels, *parameters()),
        lambda kernels: check_values(kernels, *parameters(samples=17)),
        lambda kernels: check_values(kernels, *parameters(samples=9), separate=True),
    ], kernels)


def check_backward_quickly(kernels):
    check_gradients(kernels, *parameters(samples=37))


def check_degrees_quickly(kernels):
    for degree in (2, 3):
        tensors = parameters(samples=9, degree=degree)
        check_values(kernels, *tensors)
        check_gradients(kernels, *tensors)


MUTANTS = [
    Mutant("gates", "code // 4, code % 4, columns - start", "code // 4, code % 4, columns", check_forward_quickly),
    Mutant("gates", "(start * samples)[None, :]", "start[None, :]", check_forward_quickly),
    Mutant("gates", "tl.program_id(0) // blocks * ROWS", "tl.program_id(0) // blocks", check_forward_quickly),
    Mutant("gates", "code % 4,", "code % 2,", check_forward_quickly),
    Mutant("gates", "range(0, samples, ROWS)", "range(0, ROWS, ROWS)", check_backward_quickly),
    Mutant("gates", "range(0, features, ETA_COLUMNS)", "range(0, ETA_COLUMNS, ETA_COLUMNS)",
           lambda kernels: check_gradients(kernels, *parameters(samples=2, total=600), (600,), (0,), none=())),
    Mutant("gates", "dp * e[:, None]", "dp", check_backward_quickly),
    Mutant("gates", "eta_sum += dp * slope", "eta_sum += dp", check_backward_quickly),
    Mutant("gates", "eta * eta - 1\n", "eta * eta\n", check_degrees_quickly),
    Mutant("gates", "weight + 2 * features + columns, mask=inside, other=0", "weight + features + columns, mask=inside",
           check_degrees_quickly),
    Mutant("gates", "grad_weight + 2 * features", "grad_weight + features", check_degrees_quickly),
    Mutant("gates", "3 * eta * eta - 1.8", "3 * eta * eta", check_degrees_quickly),
    Mutant("gates", "third_sum += dp * basis(e, 2)", "third_sum += dp * basis(e, 1)", check_degrees_quickly),
    Mutant("gates", "(program - blocks) * ETA_ROWS", "(program - blocks)", check_backward_quickly),
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=[mutant.new for mutant in MUTANTS])
def test_mutants(mutant, tmp_path):
    must_fail(mutant, tmp_path)

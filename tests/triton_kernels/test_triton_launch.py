"""Division by magic numbers, tables of pointers, and the gate functions and activations on their own."""

from __future__ import annotations

import random
import sys
import threading
from types import ModuleType

import pytest
import torch
from kernel_checks import DEVICE, Mutant, must_fail

pytest.importorskip("triton")
import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from mrvae_kernels import reference  # noqa: E402
from mrvae_kernels.triton_kernels import activations, launch  # noqa: E402


@triton.jit
def divide_kernel(numbers, quotients, magic, shift, DIVIDE: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(quotients + i, DIVIDE(tl.load(numbers + i), magic, shift))


def check_divide(kernels: ModuleType) -> None:
    draw = random.Random(0)
    divisors = [1, 2, 3, 7, 49, 1000, 2**16 + 1, 2**30 + 1, 2**31 - 1]
    for value in divisors + [draw.randint(1, 2 ** draw.randint(1, 31) - 1) for _ in range(20)]:
        edges = [0, value - 1, value, min(value + 1, 2**31 - 1), 2**31 - 1]
        numbers = torch.tensor([*edges, *(draw.randint(0, 2**31 - 1) for _ in range(11))], dtype=torch.int32)
        quotients = torch.full_like(numbers, -1).to(DEVICE)
        divide_kernel[(1,)](numbers.to(DEVICE), quotients, *kernels.divisor(value), kernels.divide, BLOCK=16)
        assert torch.equal(quotients.cpu(), numbers // value), value


def check_table(kernels: ModuleType) -> None:
    tensors = [torch.empty(3, device=DEVICE) if i % 5 else None for i in range(37)]
    table = kernels.pointer_table(tensors, tensors[1])
    addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
    assert table.dtype == torch.int64 and table[: len(addresses)].tolist() == addresses
    assert kernels.pointer_table(tensors, tensors[1]) is table
    other = kernels.pointer_table(tensors[::-1], tensors[1])
    assert other[: len(addresses)].tolist() == addresses[::-1]
    assert kernels.pointer_table([], tensors[1]).numel() > 0


def test_divide():
    check_divide(launch)


def test_pointer_table():
    check_table(launch)


def test_only_the_last_tables_are_kept(monkeypatch):
    monkeypatch.setattr(launch, "TABLES_KEPT", 2)
    monkeypatch.setattr(launch, "_tables", type(launch._tables)())
    tensors = [torch.empty(1, device=DEVICE) for _ in range(3)]
    first, second = (launch.pointer_table([t], t) for t in tensors[:2])
    assert launch.pointer_table(tensors[:1], tensors[0]) is first, "used again, and so the younger"
    launch.pointer_table(tensors[2:], tensors[2])
    assert len(launch._tables) == 2
    assert launch.pointer_table(tensors[:1], tensors[0]) is first
    assert launch.pointer_table(tensors[1:2], tensors[1]) is not second


def test_threads_share_the_tables(monkeypatch):
    """Nothing is launched: the interpreter is made for one thread, the dictionary of tables must not be."""

    class Launched:
        def __getitem__(self, grid):
            return lambda *arguments, **options: None

    monkeypatch.setattr(launch, "write_pointers", Launched())
    monkeypatch.setattr(launch, "TABLES_KEPT", 2)
    monkeypatch.setattr(launch, "_tables", type(launch._tables)())
    tensors, errors = [torch.empty(1, device=DEVICE) for _ in range(5)], []

    def work(seed: int) -> None:
        draw = random.Random(seed)
        try:
            for _ in range(4000):
                launch.pointer_table([draw.choice(tensors)], tensors[0])
        except Exception as error:
            errors.append(repr(error))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert errors == []


def test_one_binary_serves_every_pattern_of_absent_tensors():
    """Triton takes an int's type from its value unless the kernel says it: 0 is 32 bits, an address 64."""
    types = {parameter.name: parameter.annotation for parameter in _jit(launch.write_pointers).params[1:]}
    assert set(types.values()) == {"i64"} and len(types) == launch.POINTERS_A_LAUNCH


def _jit(kernel):
    return triton.runtime.jit.JITFunction(kernel.fn, do_not_specialize=[])


@triton.jit
def gate_kernel(p, kind, g, slope, count, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    mask = i < count
    x, k = tl.load(p + i, mask=mask, other=0.0), tl.load(kind + i, mask=mask, other=0)
    tl.store(g + i, activations.gate_value(x, k), mask=mask)
    tl.store(slope + i, activations.gate_slope(x, k), mask=mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", activations.KINDS)
def test_gates_and_slopes_over_the_whole_range(kind, dtype):
    p = torch.cat([torch.linspace(-30, 30, 301), torch.tensor([0.0, -0.0, -1e-30, -1e-7, 1e-7, -0.5, 1e30, -1e30])])
    p = p.to(DEVICE, dtype)
    kinds = torch.full(p.shape, activations.KINDS.index(kind), dtype=torch.int32, device=DEVICE)
    g, slope = torch.full_like(p, 7), torch.full_like(p, 7)
    gate_kernel[(1,)](p, kinds, g, slope, p.numel(), BLOCK=512)
    exact = p.double().requires_grad_()
    want = reference.gate_activation(exact, kind)
    (gradient,) = torch.autograd.grad(want.sum(), exact)
    limit = 1e-6 if dtype == torch.float32 else 1e-14
    near = p.abs() <= 30
    torch.testing.assert_close(g[near].double(), want[near].detach(), rtol=10 * limit, atol=1e-38)
    torch.testing.assert_close(g[~near], want[~near].detach().to(dtype))
    torch.testing.assert_close(slope.double(), gradient, rtol=limit, atol=limit)


MUTANTS = [
    Mutant("launch", "tl.store(table + 15, p15)", "tl.store(table + 15, p14)", check_table),
    Mutant("launch", "tl.store(table + 3, p3)", "tl.store(table + 3, p3 + 8)", check_table),
    Mutant("launch", "addresses = tuple(0 if tensor", "addresses = tuple(1 if tensor", check_table),
    Mutant("launch", "(value - 1).bit_length()", "value.bit_length()", check_divide),
    Mutant("launch", "// value + 1, shift", "// value, shift", check_divide),
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.new)
def test_faults_are_noticed(mutant, tmp_path):
    must_fail(mutant, tmp_path)

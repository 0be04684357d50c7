"""What the tests of the Triton kernels share: poisoned buffers, comparison with float64, copies with a seeded fault."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import itertools
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
from interpreter_bounds import OutOfBounds
from torch import Tensor

import mrvae_kernels

INTERPRETED = importlib.util.find_spec("triton") is not None and not torch.cuda.is_available()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
requires_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Largest error allowed, in norm, relative to the norm of the exact result."""

PACKAGE = Path(mrvae_kernels.__file__).parent / "triton_kernels"


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Within the block torch.empty and its kin hold NaN, and the largest number where they hold integers."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]


def assert_close(actual: Tensor, expected: Tensor, name: str = "", tolerance: float | None = None) -> None:
    """Same shape, no NaN that is not expected, and an error within `tolerance` (by dtype) of the norm."""
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    if actual.numel() == 0:
        return
    limit = TOLERANCE[actual.dtype] if tolerance is None else tolerance
    got, want = actual.double().cpu(), expected.double().cpu()
    assert not bool(got.isnan().any()), f"{name}: NaN in {int(got.isnan().sum())} of {got.numel()} places"
    error, scale = (got - want).norm().item(), want.norm().item()
    assert error <= limit * max(scale, 1e-3), f"{name}: relative error {error / max(scale, 1e-3):.3g}"


def layouts(*shape: int, dtype: torch.dtype = torch.float32) -> Iterator[tuple[str, Tensor]]:
    """Random tensors of this shape in every layout that users hand over: contiguous, reversed, sliced, expanded, ..."""
    yield "contiguous", torch.randn(shape, dtype=dtype, device=DEVICE)
    axes = tuple(reversed(range(len(shape))))
    yield "reversed", torch.randn([shape[axis] for axis in axes], dtype=dtype, device=DEVICE).permute(axes)
    padded = torch.randn([2 * size + 1 for size in shape], dtype=dtype, device=DEVICE)
    yield "sliced", padded[tuple(slice(1, 2 * size + 1, 2) for size in shape)]
    yield "expanded", torch.randn((1, *shape[1:]), dtype=dtype, device=DEVICE).expand(shape)
    if len(shape) == 4:
        yield "channels_last", torch.randn(shape, dtype=dtype, device=DEVICE).to(memory_format=torch.channels_last)


def choices(count: int) -> Iterator[tuple[bool, ...]]:
    """Every way of asking for some of `count` gradients, except none."""
    return (choice for choice in itertools.product((True, False), repeat=count) if any(choice))


class Mutant(NamedTuple):
    """A fault: in triton_kernels/<file>.py the text `old`, which occurs once, becomes `new`; `check` must then fail."""

    file: str
    old: str
    new: str
    check: Callable[[ModuleType], None]


_copies = itertools.count()


def faulty(mutant: Mutant, folder: Path) -> ModuleType:
    """The kernels' module from a copy of their package that has the mutant's fault, under a name of its own."""
    name = f"faulty_kernels_{next(_copies)}"
    package = folder / name
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    source = package / f"{mutant.file}.py"
    text = source.read_text()
    assert text.count(mutant.old) == 1, f"{mutant.file}.py has {text.count(mutant.old)} times {mutant.old!r}"
    source.write_text(text.replace(mutant.old, mutant.new))
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module(f"{name}.{mutant.file}")
    finally:
        sys.path.remove(str(folder))


def caused_by(error: BaseException | None, kind: type[BaseException]) -> bool:
    """Whether the error is of this kind or was raised from one; the interpreter wraps once a call within the kernel."""
    return error is not None and (isinstance(error, kind) or caused_by(error.__cause__, kind))


def must_fail(mutant: Mutant, folder: Path) -> None:
    """The check passes on the kernels as they are, and fails on the copy with the fault."""
    if DEVICE != "cpu":
        pytest.skip("a fault may write anywhere: in the interpreter only")
    mutant.check(importlib.import_module(f"mrvae_kernels.triton_kernels.{mutant.file}"))
    from triton.runtime.errors import InterpreterError

    broken = faulty(mutant, folder)
    try:
        mutant.check(broken)
    except AssertionError:
        return
    except InterpreterError as error:
        if not caused_by(error, OutOfBounds):
            raise
        return
    pytest.fail(f"the fault {mutant.old!r} -> {mutant.new!r} in {mutant.file}.py goes unnoticed")


def run_all(checks: Sequence[Callable[[ModuleType], None]], kernels: ModuleType) -> None:
    for check in checks:
        check(kernels)

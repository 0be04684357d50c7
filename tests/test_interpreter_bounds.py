"""The check of the tests' own: an interpreted kernel that leaves its tensors is stopped before it does."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from interpreter_bounds import Memory, OutOfBounds

triton = pytest.importorskip("triton")
tl = triton.language

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled, not interpreted")


@triton.jit
def copy(source, target, size, LANES: tl.constexpr):
    lanes = tl.arange(0, LANES)
    tl.store(target + lanes, tl.load(source + lanes, mask=lanes < size), mask=lanes < size)


@triton.jit
def add_at(target, place):
    tl.atomic_add(target + place, 1.0)


@pytest.mark.parametrize(("read", "written"), [(5, 5), (4, 5), (5, 4)])
def test_loads_and_stores(read, written):
    source, target = torch.arange(float(read)), torch.zeros(written)
    if read == written:
        copy[(1,)](source, target, 5, LANES=8)
        assert torch.equal(target, source)
    else:
        what = "a load" if read < written else "a store"
        with pytest.raises(Exception, match=rf"{what} of 4 bytes, 1 of 5 outside of every tensor: the first 16 bytes"):
            copy[(1,)](source, target, 5, LANES=8)


def test_atomic_operations():
    target = torch.zeros(3)
    add_at[(1,)](target, 2)
    assert target.tolist() == [0, 0, 1]
    for place in (3, -1):
        with pytest.raises(Exception, match="an atomic operation of 4 bytes"):
            add_at[(1,)](target, place)


def test_the_memory_that_is_known():
    memory, tensor = Memory(), torch.zeros(4)
    inside = np.array([tensor.data_ptr()], dtype=np.uint64)
    with pytest.raises(OutOfBounds):
        memory.check("a load", inside, np.array([True]), 4)
    memory.check("a load", inside, np.array([False]), 4)
    memory.add(tensor[2:])
    memory.check("a load", inside, np.array([True]), 16)
    with pytest.raises(OutOfBounds):
        memory.check("a load", inside, np.array([True]), 17)
    memory.clear()
    with pytest.raises(OutOfBounds):
        memory.check("a load", inside, np.array([True]), 4)

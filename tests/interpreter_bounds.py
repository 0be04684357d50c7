"""Bounds of every memory access that Triton's interpreter makes, so that a kernel cannot leave its tensors unnoticed.

The interpreter reads and writes raw addresses of this process. A kernel that leaves its tensors may still give right
numbers, or damage the heap so that the test run dies some tests later. `install` makes such an access an `OutOfBounds`
before it happens.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import numpy as np
import torch
from torch import Tensor

KEPT = 1024
"""Memory blocks that are known at a time; no launch here has more tensors."""


class OutOfBounds(AssertionError):
    """A kernel was about to access memory of no tensor that was handed to it."""


class Memory:
    """The memory of those tensors whose address was asked for, which is how a kernel comes by it.

    The blocks are kept alive: what lies at a known address is not freed and handed out again.
    """

    def __init__(self) -> None:
        self._blocks: OrderedDict[int, torch.UntypedStorage] = OrderedDict()
        self._sorted: tuple[np.ndarray, np.ndarray] | None = None

    def add(self, tensor: Tensor) -> None:
        """Makes the tensor's memory known."""
        storage = tensor.untyped_storage()
        if tensor.device.type != "cpu" or storage.nbytes() == 0:
            return
        start = storage.data_ptr()
        known = self._blocks.get(start)
        if known is None or known.nbytes() != storage.nbytes():
            self._sorted = None
        self._blocks[start] = storage
        self._blocks.move_to_end(start)
        while len(self._blocks) > KEPT:
            self._blocks.popitem(last=False)
            self._sorted = None

    def clear(self) -> None:
        """Forgets, and lets go, all blocks."""
        self._blocks.clear()
        self._sorted = None

    def check(self, what: str, pointers: Any, mask: Any, size: int) -> None:
        """OutOfBounds unless the `size` bytes at every pointer whose mask is set lie within one block."""
        addresses = np.asarray(pointers).reshape(-1)[np.asarray(mask, dtype=bool).reshape(-1)]
        if addresses.size == 0:
            return
        if self._sorted is None:
            starts = sorted(self._blocks)
            ends = [start + self._blocks[start].nbytes() for start in starts]
            # a block before all others that holds nothing, for addresses below the first
            self._sorted = np.array([0, *starts], dtype=np.uint64), np.array([0, *ends], dtype=np.uint64)
        starts, ends = self._sorted
        place = np.searchsorted(starts, addresses, side="right") - 1
        outside = addresses + np.uint64(size) > ends[place]
        if outside.any():
            address, block = int(addresses[outside][0]), int(place[outside][0])
            raise OutOfBounds(
                f"{what} of {size} bytes, {int(outside.sum())} of {addresses.size} outside of every tensor: the first "
                f"{address - int(starts[block])} bytes after the start of a block of {int(ends[block] - starts[block])}"
            )


memory = Memory()


class CheckedMemoryAccess:
    """The interpreter's functions for memory, each after a check; all others as they are."""

    def __init__(self, functions: Any) -> None:
        self._functions = functions

    def __getattr__(self, name: str) -> Any:
        return getattr(self._functions, name)

    def load(self, pointers: Any, mask: Any, other: Any, dtype: Any) -> Any:
        memory.check("a load", pointers, mask, np.dtype(dtype).itemsize)
        return self._functions.load(pointers, mask, other, dtype)

    def store(self, pointers: Any, value: Any, mask: Any) -> Any:
        memory.check("a store", pointers, mask, value.dtype.itemsize)
        return self._functions.store(pointers, value, mask)

    def atomic_rmw(self, operation: Any, pointers: Any, value: Any, mask: Any, order: Any) -> Any:
        memory.check("an atomic operation", pointers, mask, value.dtype.itemsize)
        return self._functions.atomic_rmw(operation, pointers, value, mask, order)

    def atomic_cas(self, pointers: Any, compared: Any, value: Any, order: Any) -> Any:
        memory.check("an atomic operation", pointers, np.ones_like(pointers, dtype=bool), value.dtype.itemsize)
        return self._functions.atomic_cas(pointers, compared, value, order)


def install() -> None:
    """From now on every access of an interpreted kernel is checked. To be called once."""
    from triton.runtime import interpreter

    data_ptr = Tensor.data_ptr

    def recorded(tensor: Tensor) -> int:
        address = data_ptr(tensor)
        memory.add(tensor)
        return address

    Tensor.data_ptr = recorded  # type: ignore[method-assign]
    interpreter._interpreter = CheckedMemoryAccess(interpreter._interpreter)

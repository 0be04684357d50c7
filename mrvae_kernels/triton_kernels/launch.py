"""What the launching code of several kernels shares: sizes, layouts, tables of pointers."""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import DEVICE_TYPES, INTERPRETED, capturing, on_device, stream_of

INT32_LIMIT = 2**31 - 1
POINTERS_A_LAUNCH = 16
TABLES_KEPT = 4096

TRITON_NAMES = {
    torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64", torch.int32: "i32",
    torch.int64: "i64",
}


FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Variant:
    """One kernel as it would be compiled, for checks without a GPU.

    types: Triton's type of each run-time argument by name ("*fp32", "i32"); constants: value of each constexpr.
    Pointers and the integers named in `divisible` are compiled as multiples of 16. limit: `register_limit` of the
    launch, where it has one.
    """

    label: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    warps: int = 4
    stages: int = 2
    divisible: tuple[str, ...] = field(default=())
    limit: dict[str, int] = field(default_factory=dict)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for every other dtype: the dtype of gates and of sums."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def dot_dtype(dtype: torch.dtype) -> tl.dtype:
    """The dtype of tl.dot's operands; the interpreter's numpy has no bfloat16 to multiply."""
    if INTERPRETED and dtype == torch.bfloat16:
        return tl.float32
    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype]


def check_device(name: str, *tensors: Tensor | None) -> None:
    """RuntimeError unless all tensors are on one device that Triton's kernels run on."""
    devices = {tensor.device for tensor in tensors if tensor is not None}
    if len(devices) > 1:
        raise RuntimeError(f"{name}: tensors are on {', '.join(sorted(map(str, devices)))}; expected one device")
    for device in devices:
        if device.type not in DEVICE_TYPES:
            raise RuntimeError(
                f"{name}: tensors are on {device}; Triton's kernels take {' and '.join(DEVICE_TYPES)} tensors"
                + ("" if INTERPRETED else " (and CPU tensors where TRITON_INTERPRET=1 is set before Python starts)")
            )


def check_floating(name: str, **tensors: Tensor | None) -> None:
    """TypeError for a tensor whose dtype kernels do not compute in."""
    for what, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in FLOATING:
            raise TypeError(f"{name}: {what} has dtype {tensor.dtype}; expected float32, float64, bfloat16 or float16")


def extent(*tensors: Tensor | None) -> int:
    """One past the largest element offset that any of the tensors reaches from its first element."""
    return max(
        (1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
         for tensor in tensors if tensor is not None and tensor.numel() > 0),
        default=0,
    )


def wide(*tensors: Tensor | None, slack: int = 0) -> bool:
    """True where offsets need 64 bits: some tensor reaches, with `slack` elements of padding, beyond int32."""
    return extent(*tensors) + slack > INT32_LIMIT


def block(size: int, least: int, most: int) -> int:
    """The power of two that covers `size`, within [least, most], themselves powers of two."""
    return max(least, min(most, 1 << max(0, size - 1).bit_length()))


def divisor(value: int) -> tuple[int, int]:
    """(magic, shift) with n // value == (umulhi(n, magic) + n) >> shift for 0 <= n < 2^31, 0 < value < 2^31.

    Granlund and Montgomery, "Division by invariant integers using multiplication", 1994. See `divide`.
    """
    shift = (value - 1).bit_length()
    return ((1 << 32) * ((1 << shift) - value)) // value + 1, shift


def signed(magic: tuple[int, int]) -> tuple[int, int]:
    """`divisor`'s numbers with the magic one's 32 bits as a signed int32, so that its type is always the same."""
    return magic[0] - 2**32 if magic[0] >= 2**31 else magic[0], magic[1]


@triton.jit
def divide(n, magic, shift):
    """n // divisor as int32, from `divisor`'s magic number (as int64, or `signed`) and shift."""
    unsigned = n.to(tl.uint32)
    return ((tl.umulhi(unsigned, tl.cast(magic, tl.uint32)) + unsigned) >> tl.cast(shift, tl.uint32)).to(tl.int32)


# ---- tables of pointers ---------------------------------------------------------------------------------------------


# The annotations fix the arguments' types: by its value a 0 would be taken for 32 bits, and each pattern of absent
# tensors would be compiled anew.
@triton.jit(do_not_specialize=[f"p{i}" for i in range(POINTERS_A_LAUNCH)])
def write_pointers(
    table,
    p0: tl.int64, p1: tl.int64, p2: tl.int64, p3: tl.int64, p4: tl.int64, p5: tl.int64, p6: tl.int64, p7: tl.int64,
    p8: tl.int64, p9: tl.int64, p10: tl.int64, p11: tl.int64, p12: tl.int64, p13: tl.int64, p14: tl.int64, p15:
    tl.int64,
):
    tl.store(table + 0, p0)
    tl.store(table + 1, p1)
    tl.store(table + 2, p2)
    tl.store(table + 3, p3)
    tl.store(table + 4, p4)
    tl.store(table + 5, p5)
    tl.store(table + 6, p6)
    tl.store(table + 7, p7)
    tl.store(table + 8, p8)
    tl.store(table + 9, p9)
    tl.store(table + 10, p10)
    tl.store(table + 11, p11)
    tl.store(table + 12, p12)
    tl.store(table + 13, p13)
    tl.store(table + 14, p14)
    tl.store(table + 15, p15)


_tables_lock = threading.Lock()
_tables: OrderedDict[tuple[Any, ...], Tensor] = OrderedDict()


def pointer_table(tensors: Sequence[Tensor | None], like: Tensor) -> Tensor:
    """The tensors' addresses as int64 on the device of `like`, 0 for None; to be used on the current stream, at once.

    The addresses are written by a kernel, from its arguments: nothing is copied from the host, so that the launch does
    not wait and a CUDA graph can record it. A training step meets the same addresses again and again, since torch's
    allocator hands out the same blocks: the tables of the last 4,096 lists are kept, by stream. A graph being recorded
    gets a table of its own, written at each replay.
    """
    addresses = tuple(0 if tensor is None else tensor.data_ptr() for tensor in tensors)
    recording = capturing(like)
    key = (like.device, stream_of(like), addresses)
    if not recording:
        with _tables_lock:  # autograd runs backward passes in threads of its own
            if (known := _tables.get(key)) is not None:
                _tables.move_to_end(key)
                return known
    launches = max(1, math.ceil(len(addresses) / POINTERS_A_LAUNCH))
    signed = tuple(address - 2**64 if address >= 2**63 else address for address in addresses)
    padded = signed + (0,) * (launches * POINTERS_A_LAUNCH - len(signed))
    table = torch.empty(len(padded), dtype=torch.int64, device=like.device)
    with on_device(like):
        for start in range(0, len(padded), POINTERS_A_LAUNCH):
            write_pointers[(1,)](table[start:], *padded[start : start + POINTERS_A_LAUNCH], num_warps=1)
    if not recording:
        with _tables_lock:
            _tables[key] = table
            while len(_tables) > TABLES_KEPT:
                _tables.popitem(last=False)
    return table


def variants() -> list[Variant]:
    """write_pointers, the one kernel of this file."""
    types = {"table": "*i64", **{f"p{i}": "i64" for i in range(POINTERS_A_LAUNCH)}}
    return [Variant("write_pointers", write_pointers, types, {}, warps=1)]

"""Large sets of images in memory: as bytes, or as bits where every value is 0 or 1, and float32 where they are used."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

PACKING = 4096
"""Examples converted at a time: a few ten megabytes for images of 64 by 64."""


def at_once(shape: Sequence[int], most: int = PACKING, values: int = 2**26) -> int:
    """How many examples of a shape to take at a time: `most`, or as few as `values` numbers are, but one at least."""
    return max(1, min(most, values // math.prod(shape)))


class Rows(Protocol):
    """Examples that indexing by a slice or by a tensor of indices gives as tensors: a tensor, or a Compact."""

    @property
    def shape(self) -> torch.Size: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any) -> Tensor: ...


class Compact:
    """Reads like the float32 tensor x of shape (N, *shape), and takes a quarter of its memory, or a 32nd.

        x[i] = stored[i] / divisor          stored: (N, D) uint8, D = prod(shape)
        x[i] = bits of stored[i]            stored: (N, ceil(D / 8)) uint8, the first value in the highest bit

    Indexing (an integer, a slice, a tensor of indices) converts what it gives, and nothing else. The values are those
    of converting the whole set, bit for bit.
    """

    dtype = torch.float32

    def __init__(self, stored: Tensor, shape: tuple[int, ...], divisor: int, bits: bool):
        size = math.prod(shape)
        if stored.dtype != torch.uint8 or stored.dim() != 2 or stored.shape[1] != (-(-size // 8) if bits else size):
            raise ValueError(
                f"stored is {stored.dtype}, shape {tuple(stored.shape)}; expected uint8, (N, {size}), or "
                f"(N, {-(-size // 8)}) as bits, for examples of shape {shape}: pack() makes it"
            )
        self.stored = stored
        self.divisor = divisor
        self.bits = bits
        self.shape = torch.Size((len(stored), *shape))

    @property
    def device(self) -> torch.device:
        return self.stored.device

    @property
    def nbytes(self) -> int:
        """Bytes that are held, not those of the float32 tensor."""
        return self.stored.nbytes

    def dim(self) -> int:
        return len(self.shape)

    def to(self, device: torch.device | str) -> Compact:
        return Compact(self.stored.to(device), tuple(self.shape[1:]), self.divisor, self.bits)

    def __len__(self) -> int:
        return len(self.stored)

    def __getitem__(self, index: Any) -> Tensor:
        rows = self.stored[index]
        if self.bits:
            shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=rows.device)
            rows = (rows.unsqueeze(-1) >> shifts & 1).flatten(-2)[..., : math.prod(self.shape[1:])]
        values = rows.to(torch.float32)
        if self.divisor != 1:
            values.div_(self.divisor)
        return values.reshape(*rows.shape[:-1], *self.shape[1:])

    def index_select(self, dim: int, index: Tensor) -> Tensor:
        """As torch.index_select along the examples, dim 0."""
        if dim != 0:
            raise ValueError(f"dim is {dim}; expected 0, the examples")
        return self[index]


def pack(images: Any, kept: np.ndarray, divisor: int) -> Compact:
    """The images `kept` (indices) of an array (N, *shape) of bytes or bools; bits where the divisor is 1.

    The memory of the result is all that it takes, but for `at_once` images. The array may be anything that has `shape`
    and that an array of indices can index.
    """
    shape = tuple(images.shape[1:])
    size, bits, step = math.prod(shape), divisor == 1, at_once(shape)
    stored = np.empty((len(kept), -(-size // 8) if bits else size), np.uint8)
    for start in range(0, len(kept), step):
        rows = images[kept[start : start + step]].reshape(-1, size)
        stored[start : start + len(rows)] = np.packbits(rows, axis=1) if bits else rows
    return Compact(torch.from_numpy(stored), shape, divisor, bits)


class Chunks:
    """The examples in order, `size` at a time, as tensors; Lightning would take a list of them for several loaders."""

    def __init__(self, examples: Rows, size: int):
        self.examples = examples
        self.size = size

    def __len__(self) -> int:
        return -(-len(self.examples) // self.size)

    def __iter__(self) -> Iterator[Tensor]:
        for start in range(0, len(self.examples), self.size):
            yield self.examples[start : start + self.size]


CLIP_VALUES = 2**22
"""Numbers in a batch of clips to evaluate on: 51 clips of twenty grey frames of 64 by 64."""


def turns(examples: Rows, batch_size: int) -> Chunks:
    """Examples in order to evaluate on, `batch_size` at a time; fewer of clips (N, T, C, H, W), of CLIP_VALUES numbers.

    A network holds what it makes of every frame: 500 clips of twenty frames are 10,000 images.
    """
    of_clips = len(examples.shape) == 5
    return Chunks(examples, at_once(examples.shape[1:], batch_size, CLIP_VALUES) if of_clips else batch_size)

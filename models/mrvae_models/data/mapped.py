"""Images that stay in their file: read when they are indexed, and the operating system keeps what memory it has."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .storage import Compact, at_once


class MappedRows:
    """Rows of an array that is mapped from a file, as a raw set: (N, *shape), `array[rows]`, read when indexed."""

    def __init__(self, array: np.ndarray, rows: np.ndarray):
        self.array, self.rows = array, rows
        self.dtype, self.ndim = array.dtype, array.ndim
        self.shape = (len(rows), *array.shape[1:])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> np.ndarray:
        return np.asarray(self.array[self.rows[index]])

    def min(self) -> int:
        """Of bytes; reads no further once it is 0, as it is after the first few thousand images of most sets."""
        return self._extreme(np.min, 0)

    def max(self) -> int:
        return self._extreme(np.max, 255)

    def _extreme(self, of: Any, bound: int) -> int:
        found: list[int] = []
        step = at_once(self.shape[1:])
        for start in range(0, len(self), step):
            found.append(int(of(self[start : start + step])))
            if found[-1] == bound:
                break
        return int(of(found))


class Mapped:
    """Reads like the float32 tensor x of shape (N, *shape), and takes no memory but for indices.

        x[i] = images[kept[i]] / divisor          images: (M, *shape) uint8

    The values are those of converting the whole set, bit for bit. `to` another device than the CPU puts all of them
    there, as bytes.
    """

    dtype = torch.float32
    device = torch.device("cpu")

    def __init__(self, images: MappedRows, kept: np.ndarray, divisor: int):
        self.images, self.kept, self.divisor = images, kept, divisor
        self.shape = torch.Size((len(kept), *images.shape[1:]))

    @property
    def nbytes(self) -> int:
        """Bytes that they are on another device."""
        return math.prod(self.shape)

    def dim(self) -> int:
        return len(self.shape)

    def to(self, device: torch.device | str) -> Mapped | Compact:
        if torch.device(device) == self.device:
            return self
        stored = torch.empty(len(self), math.prod(self.shape[1:]), dtype=torch.uint8, device=device)
        step = at_once(self.shape[1:])
        for start in range(0, len(self), step):  # never all of them in the host's memory
            rows = self.images[self.kept[start : start + step]].reshape(-1, stored.shape[1])
            stored[start : start + len(rows)] = torch.from_numpy(rows).to(device)
        return Compact(stored, tuple(self.shape[1:]), self.divisor, False)

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, index: Any) -> Tensor:
        if isinstance(index, Tensor):
            index = index.cpu().numpy()
        values = torch.from_numpy(np.ascontiguousarray(self.images[self.kept[index]], np.float32))
        return values.div_(self.divisor) if self.divisor != 1 else values

    def index_select(self, dim: int, index: Tensor) -> Tensor:
        """As torch.index_select along the examples, dim 0."""
        if dim != 0:
            raise ValueError(f"dim is {dim}; expected 0, the examples")
        return self[index]

"""Clips in memory: videos of one length each, and the runs of frames that are taken from them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .checks import DataError, Factors, Raw
from .dataset import ImageDataset, bernoulli
from .splits import Sets
from .storage import Compact


class Windows:
    """`frames` frames of each clip, every `stride`-th: reads like (N, frames, C, H, W), float32, of the first of them.

        x[i, t] = clips[i, start_i + stride t],  0 <= start_i < starts         start_i = 0 but in `at`

    clips: (N, T, C, H, W), a tensor or a Compact; starts = T - stride (frames - 1).
    """

    dtype = torch.float32

    def __init__(self, clips: Tensor | Compact, frames: int, stride: int = 1):
        self.clips, self.frames, self.stride = clips, frames, stride
        self.starts = clips.shape[1] - stride * (frames - 1)
        if frames < 1 or stride < 1 or self.starts < 1:
            raise DataError(
                f"frames is {frames}, every {stride} of a clip's {clips.shape[1]}; expected at least 1, and at most "
                f"{-(-clips.shape[1] // max(1, stride))}"
            )
        self.shape = torch.Size((len(clips), frames, *clips.shape[2:]))

    @property
    def device(self) -> torch.device:
        return self.clips.device

    @property
    def nbytes(self) -> int:
        return self.clips.nbytes

    def dim(self) -> int:
        return 5

    def to(self, device: torch.device | str) -> Windows:
        return Windows(self.clips.to(device), self.frames, self.stride)

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: Any) -> Tensor:
        return self.clips[index][..., : self.stride * self.frames : self.stride, :, :, :]

    def index_select(self, dim: int, index: Tensor) -> Tensor:
        """As torch.index_select along the clips, dim 0."""
        if dim != 0:
            raise ValueError(f"dim is {dim}; expected 0, the clips")
        return self[index]

    def at(self, indices: Tensor, starts: Tensor) -> Tensor:
        """The frames of the clips at `indices` (n,) from those at `starts` (n,) on: (n, frames, C, H, W)."""
        times = starts[:, None] + self.stride * torch.arange(self.frames, device=starts.device)
        return self.clips[indices][torch.arange(len(indices), device=starts.device)[:, None], times]


def clips_first(sets: Sets) -> Sets:
    """The same sets of arrays (T, N, ...), as (N, T, ...)."""

    def turned(read: Callable[[], Raw]) -> Callable[[], Raw]:
        def read_and_turn() -> Raw:
            raw = read()
            if raw.layout is not None:
                return raw  # its file says it
            if raw.images.ndim not in (4, 5):
                raise DataError(f"{raw.origin}: shape {raw.images.shape}; expected clips, (T, N, H, W)")
            test = raw.test and raw.test._replace(shape=(*raw.test.shape[1::-1], *raw.test.shape[2:]))
            return raw._replace(images=np.swapaxes(raw.images, 0, 1), test=test)

        return read_and_turn

    return {split: turned(read) for split, read in sets.items()}


class VideoDataset(ImageDataset):
    """Clips in memory, and what is drawn from them; as ImageDataset, with frames.

    images: (N, T, C, H, W) float32 in [0, 1], or a Compact that reads like it; input_shape: (frames, C, H, W).
    frames: how many of a clip's T an example has, every `stride`-th; None for all. moving: `take` draws where they
    start, uniformly, at every access, as dynamic binarisation draws pixels, and from the same generator before those;
    otherwise, and in `examples` in any case, they are the clip's first.
    """

    shape_of_one = ("T", "C", "H", "W")

    def __init__(
        self,
        images: Tensor | Compact,
        labels: Tensor | None = None,
        binarize: str = "none",
        seed: int = 0,
        factors: Factors | None = None,
        frames: int | None = None,
        stride: int = 1,
        moving: bool = False,
    ):
        super().__init__(images, labels, binarize, seed, factors)
        length = self.input_shape[0]
        self._asked, self._stride = frames, stride
        frames = -(-length // stride) if frames is None else frames
        self.moving = False
        if (frames, stride) != (length, 1):
            self.examples = Windows(self.examples, frames, stride)
            self.moving = moving and self.examples.starts > 1
        self.draws = self.draws or self.moving
        self.input_shape = tuple(self.examples.shape[1:])

    @property
    def test_shape(self) -> tuple[int, ...] | None:
        """As of images; with fewer frames than were asked for where the test set's clips have no more."""
        shape = super().test_shape
        if shape is None:
            return None
        most = -(-shape[0] // self._stride)
        return (min(most, self._asked or most), *shape[1:])

    def take(self, indices: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The clips at `indices` (n,), as one tensor (n, frames, C, H, W)."""
        if not self.moving:
            return super().take(indices, generator)
        starts = torch.randint(self.examples.starts, (len(indices),), generator=generator, device=indices.device)
        x = self.examples.at(indices, starts)
        return bernoulli(x, generator) if self.binarize == "dynamic" else x

    def __getitem__(self, index: int) -> Tensor:
        return self.take(torch.tensor([index], device=self.examples.device))[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Tensor]:
        return list(self.take(torch.as_tensor(indices, device=self.examples.device)).unbind())

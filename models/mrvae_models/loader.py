"""The data of a run, and its batches as Lightning sees them: in the order of its epochs, and resumable within one."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .config import TrainConfig
from .data import Batches, ImageDataset, load

CALIBRATION_EXAMPLES = 2000
"""Training images on which BatchNorm statistics are recalibrated at each beta."""


def load_split(config: TrainConfig, split: str) -> ImageDataset:
    """One split of the run's data. Only training draws dynamic binarisation anew; other splits are drawn once."""
    binarize = "fixed" if config.binarize == "dynamic" and split != "train" else config.binarize
    return load(config.data, split, binarize, config.data_seed, layout=config.layout, resize=config.resize)


def calibration_images(train_set: ImageDataset) -> Tensor:
    """The training images, at most CALIBRATION_EXAMPLES, that running statistics are recalibrated on."""
    indices = torch.arange(min(len(train_set), CALIBRATION_EXAMPLES), device=train_set.images.device)
    return train_set.take(indices, torch.Generator(train_set.images.device).manual_seed(0))


class EpochLoader:
    """Batches, with the epoch that Lightning sets decided when the first batch is asked for.

    Lightning makes iterators that it never uses (to see whether a loader is iterable) and makes the first one before it
    sets the epoch, so that nothing may happen when an iterator is only made.
    """

    def __init__(self, batches: Batches) -> None:
        self.batches = batches
        self._epoch = 0
        self._start = 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Tensor]:
        self.batches.load_state_dict({"epoch": self._epoch, "position": self._start})
        self._start = 0
        yield from self.batches

    @property
    def sampler(self) -> EpochLoader:
        """Itself: Lightning calls set_epoch() on a loader's sampler."""
        return self

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def state_dict(self) -> dict[str, int]:
        """The place in the epoch; its start after the last batch, as Lightning counts the epoch itself."""
        return {"position": self.batches.state_dict()["position"] % len(self)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._start = int(state["position"])

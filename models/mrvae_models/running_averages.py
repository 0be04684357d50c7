"""Means of training steps, for the progress line and metrics.csv."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor


class Averages(NamedTuple):
    """Means over steps, in nats an example; loss is the objective, annealed if it is, before weight_power."""

    loss: float
    distortion: float
    rate: float


class RunningAverages:
    """Means of the training steps since somebody last took them; summed on the device, so that no step waits for it."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None
        self._count = 0

    def add(self, step: Tensor) -> None:
        """Count one step: a tensor of the fields of Averages."""
        self._sums = step if self._sums is None else self._sums.to(step) + step  # those of a checkpoint are on the CPU
        self._count += 1

    def means(self) -> Averages | None:
        """Means since the last take(), or None without a step; waits for the device."""
        return None if self._sums is None else Averages(*(self._sums / self._count).tolist())

    def take(self) -> Averages | None:
        """The same, and starts anew."""
        means = self.means()
        self._sums, self._count = None, 0
        return means

    def state_dict(self) -> dict[str, Any]:
        """What load_state_dict() goes on from: tensors and plain types."""
        return {"sums": self._sums, "count": self._count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Have counted the steps of a state_dict()."""
        self._sums, self._count = state["sums"], state["count"]

"""An exponential moving average of the weights: what is validated and kept, while training goes on from its own."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

KEY = "weight_average"
"""Entry of a checkpoint: the weights that training goes on from, and the number of steps averaged."""
PREFIX = "model."
"""Of the model's entries in a checkpoint's state_dict."""


class WeightAverage(pl.Callback):
    """a <- decay a + (1 - decay) w after each optimiser step, a = w after the first.

    Validation runs with a, and a checkpoint's weights are a, so that the best and the last model are averages; w goes
    beside them, and a resumed run ends with the same bits. Buffers, such as running statistics, are the last step's.
    a is in float64 with weights of it, and in float32 with all others: in bfloat16 a step of 1 - decay would be lost.
    Lightning's own callback copies the whole module, and with it the data that ours holds; this one copies the model.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.average: nn.Module | None = None
        self.updates = 0
        self._own: list[Tensor] = []  # w, while a is in its place

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        model: Any = pl_module.model
        dtype = torch.float64 if trainer.precision == "64-true" else torch.float32
        self.average = copy.deepcopy(model).to(dtype)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._averaged.to(pl_module.device)

    @property
    def _averaged(self) -> nn.Module:
        assert self.average is not None  # Lightning calls setup() first
        return self.average

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        model: Any = pl_module.model
        averages = [*self._averaged.parameters()]
        weights = [own.to(average) for average, own in zip(averages, model.parameters(), strict=True)]
        if self.updates == 0:
            _copy(weights, averages)
        else:
            get_ema_multi_avg_fn(self.decay)(averages, weights, self.updates)
        _copy(model.buffers(), self._averaged.buffers())
        self.updates += 1

    @torch.no_grad()
    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        model: Any = pl_module.model
        self._own = [own.clone() for own in model.parameters()]
        _copy(self._averaged.parameters(), model.parameters())

    @torch.no_grad()
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Not at the epoch's end, of which callbacks hear before the module: what it computes there is of a too.
        Checkpoints are saved later."""
        model: Any = pl_module.model
        _copy(self._own, model.parameters())
        self._own = []

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        saved = checkpoint["state_dict"]
        own = {name: value for name, value in saved.items() if name.startswith(PREFIX)}
        checkpoint[KEY] = {"weights": own, "updates": self.updates}
        averages = {PREFIX + name: value for name, value in self._averaged.state_dict().items()}
        checkpoint["state_dict"] = {**saved, **averages}

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Lightning has put the average into the module by now: it goes where it belongs, and the weights come back.

        The average is read from the checkpoint, of whose digits the module's may have fewer.
        """
        kept = checkpoint[KEY]
        model: Any = pl_module.model
        self._averaged.load_state_dict(_of_model(checkpoint["state_dict"]))
        self.updates = int(kept["updates"])
        model.load_state_dict(_of_model(kept["weights"]))


def _copy(sources: Iterable[Tensor], targets: Iterable[Tensor]) -> None:
    for source, target in zip(sources, targets, strict=True):
        target.copy_(source)


def _of_model(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The model's part of a checkpoint's entries, by its own names."""
    return {name.removeprefix(PREFIX): value for name, value in state.items() if name.startswith(PREFIX)}

"""An exponential moving average of the weights: what is validated and kept, while training goes on from its own."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

KEY = "weight_average"
"""Entry of a checkpoint: the weights that training goes on from, and the number of steps averaged."""
PREFIX = "model."
"""Of the model's entries in a checkpoint's state_dict."""


class WeightAverage(pl.Callback):
    """a <- decay a + (1 - decay) w after each optimiser step, a = w after the first.

    Validation runs with a, and a checkpoint's weights are a, so that the best and the last model are averages; w goes
    beside them, and a resumed run ends with the same bits. Buffers, such as running statistics, are the last step's.
    Lightning's own callback copies the whole module, and with it the data that ours holds; this one copies the model.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.average: AveragedModel | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        model: Any = pl_module.model
        self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(self.decay))

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._averaged.to(pl_module.device)

    @property
    def _averaged(self) -> AveragedModel:
        assert self.average is not None  # Lightning calls setup() first
        return self.average

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        model: Any = pl_module.model
        self._averaged.update_parameters(model)

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._swap(pl_module)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._swap(pl_module)

    @torch.no_grad()
    def _swap(self, pl_module: pl.LightningModule) -> None:
        model: Any = pl_module.model
        for average, own in zip(self._averaged.module.parameters(), model.parameters(), strict=True):
            kept = own.clone()
            own.copy_(average)
            average.copy_(kept)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        saved = checkpoint["state_dict"]
        own = {name: value for name, value in saved.items() if name.startswith(PREFIX)}
        checkpoint[KEY] = {"weights": own, "updates": self._averaged.n_averaged}
        averages = {PREFIX + name: value for name, value in self._averaged.module.state_dict().items()}
        checkpoint["state_dict"] = {**saved, **averages}

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Lightning has put the average into the module by now: it goes where it belongs, and the weights come back."""
        kept, averaged = checkpoint[KEY], self._averaged
        model: Any = pl_module.model
        averaged.module.load_state_dict(model.state_dict())
        averaged.n_averaged.copy_(kept["updates"])
        weights = {name.removeprefix(PREFIX): value for name, value in kept["weights"].items()}
        model.load_state_dict(weights)

"""What a run shows and writes while it trains: the progress line, and metrics.csv.

Both look at the numbers every few seconds only, or once an epoch: reading a loss waits for the device.
"""

from __future__ import annotations

import csv
import math
import sys
import time
import warnings
from pathlib import Path
from typing import Any, TextIO

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from .lightning_module import TrainingModule
from .run import replace_file
from .running_averages import Averages

METRICS = "metrics.csv"


def clock(seconds: float) -> str:
    """0:07, 12:30 or 1:02:03."""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class ProgressLine(Callback):
    """loss, distortion and rate (nats an example, averaged since the line before), speed and time left.

    On a terminal one line, redrawn twice a second; elsewhere (a file, a pipe, CI) a new line every `interval` seconds.
    """

    def __init__(self, interval: float = 5.0, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stderr
        self.terminal = self.stream.isatty()
        self.interval = 0.5 if self.terminal else interval
        self._begun = self._due = 0.0
        self._first = 0
        self._shown = -1
        self._averages: Averages | None = None
        self._width = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begun = time.monotonic()
        self._due = self._begun + min(1.0, self.interval)
        self._first = trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = time.monotonic()
        if now < self._due:
            return
        self._due = now + self.interval
        self._show(trainer, pl_module, now)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.terminal or trainer.global_step != self._shown:
            self._show(trainer, pl_module, time.monotonic())
        self._close(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._close(trainer)

    def _show(self, trainer: pl.Trainer, module: pl.LightningModule, now: float) -> None:
        if not trainer.is_global_zero:
            return
        assert isinstance(module, TrainingModule)
        self._shown = trainer.global_step
        line = self._line(module, self._shown, now)
        if self.terminal:
            self.stream.write("\r" + line.ljust(self._width))
            self._width = len(line)
        else:
            self.stream.write(line + "\n")
        self.stream.flush()

    def _line(self, module: TrainingModule, step: int, now: float) -> str:
        config, steps = module.config, module.steps
        speed = (step - self._first) / max(now - self._begun, 1e-9)
        epoch = max(1, -(-step * config.epochs // steps))  # that of the step just done
        filled = 20 * step // steps
        parts = [f"epoch {epoch:>{len(str(config.epochs))}}/{config.epochs} [{'#' * filled}{'.' * (20 - filled)}]"]
        averages = self._averages = module.recent_averages.take() or self._averages
        if averages is not None:
            parts.append(
                f"loss {averages.loss:7.2f}  distortion {averages.distortion:7.2f}  rate {averages.rate:6.2f} nats"
            )
        parts.append(f"{speed:.0f} steps/s" if speed >= 10 else f"{speed:.2g} steps/s")
        if speed > 0:
            parts.append(f"eta {clock((steps - step) / speed)}" if step < steps else f"took {clock(now - self._begun)}")
        return "  ".join(parts)

    def _close(self, trainer: pl.Trainer) -> None:
        if self.terminal and trainer.is_global_zero and self._width:
            self.stream.write("\n")
            self.stream.flush()
            self._width = 0


class JumpWarning(Callback):
    """A warning, once the run has ended, that the loss of an epoch was far above that of an earlier one: finite, but
    of a network that was thrown off, and may not have come back.

    Far: above the least so far by more than `factor` times the larger of its magnitude and the first epoch's. A range
    of betas that grows (range_warmup) and an annealed KL raise the loss less.
    """

    factor = 10.0

    def __init__(self) -> None:
        self._first: float | None = None
        self._least = math.inf
        self._jump: tuple[int, float, float] | None = None  # epoch, loss and the least before it

    def state_dict(self) -> dict[str, Any]:
        return {"first": self._first, "least": self._least, "jump": self._jump}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._first, self._least, self._jump = (state_dict[name] for name in ("first", "least", "jump"))

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, TrainingModule)
        averages = pl_module.epoch_averages.means()
        if averages is None:
            return
        if self._first is None:
            self._first = self._least = averages.loss
        far = self.factor * max(abs(self._first), abs(self._least))
        if averages.loss - self._least > far and (self._jump is None or averages.loss > self._jump[1]):
            self._jump = trainer.current_epoch + 1, averages.loss, self._least
        self._least = min(self._least, averages.loss)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, TrainingModule)
        if self._jump is None or not trainer.is_global_zero:
            return
        epoch, loss, least = self._jump
        warnings.warn(
            f"{pl_module.config.directory}: training was thrown off, the loss rose from {least:.4g} to {loss:.4g} in "
            f"epoch {epoch}. Try a smaller --lr, such as {pl_module.config.lr / 10:g}, or, with few examples, a "
            "smaller network",
            stacklevel=1,  # to where it is: warnings of Lightning's are kept from the user
        )


class MetricsFile(Callback):
    """metrics.csv and the loggers: a row an epoch with the means of training, what is learned besides the weights
    (sigma, as it is when the epoch ends), and the validation where there was one.

    Resuming drops the rows of epochs that are trained again.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._columns: list[str] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, TrainingModule)
        self._columns = ["epoch", "step", "seconds", "lr", *(f"train/{name}" for name in Averages._fields)]
        self._columns += [f"train/{name}" for name in pl_module.trajectory()]
        self._columns += pl_module.validation_metrics
        if self.path is None or not trainer.is_global_zero:
            return
        kept: list[dict[str, str]] = []
        if self.path.exists():
            with open(self.path, newline="", encoding="utf-8") as file:
                kept = [row for row in csv.DictReader(file) if int(row["epoch"]) <= trainer.current_epoch]
        replace_file(self.path, lambda temporary: self._write(temporary, "w", kept, header=True))

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, TrainingModule)
        averages = pl_module.epoch_averages.means()
        if not trainer.is_global_zero or averages is None:
            return
        row: dict[str, Any] = {
            "epoch": trainer.current_epoch + 1,
            "step": trainer.global_step,
            "seconds": round(time.time(), 1),
            "lr": pl_module.optimizers().param_groups[0]["lr"],  # type: ignore[union-attr]
            **{f"train/{name}": value for name, value in {**averages._asdict(), **pl_module.trajectory()}.items()},
        }
        if pl_module.validated_epoch == trainer.current_epoch:
            row |= {name: value.item() for name, value in trainer.callback_metrics.items() if name in self._columns}
        for logger in trainer.loggers:
            values = {name: value for name, value in row.items() if name not in ("step", "seconds")}
            logger.log_metrics(values, step=trainer.global_step)
        if self.path is not None:
            self._write(self.path, "a", [row])

    def _write(self, path: Path, mode: str, rows: list[dict[str, Any]], header: bool = False) -> None:
        with open(path, mode, newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self._columns, extrasaction="ignore")
            if header:
                writer.writeheader()
            writer.writerows(rows)

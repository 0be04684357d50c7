"""Checkpoints: written whole or not at all, read without running anything, and exact to the bit on resume.

last.ckpt holds Lightning's own state (weights, optimiser, schedule, loops, callbacks) and what exactness needs besides:
the random number generators of every process and the place in the epoch. Only tensors and plain types go in, so that
torch's weights-only unpickler reads it, which refuses everything that could run code.
"""

from __future__ import annotations

import math
import pickle
import random
import shlex
import shutil
import signal
import threading
import time
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from lightning.pytorch.callbacks import Checkpoint

from .config import TrainConfig
from .data import Batches, InMemory
from .data.fingerprint import Fingerprints, change
from .lightning_module import OBJECTIVE, TrainingModule
from .option_changes import CHANGEABLE, as_now
from .run import BEST, LAST, first_lines, replace_file

KEY = "mrvae"
"""Entry of a checkpoint that is ours."""


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used: truncated, of another run, or holding more than tensors and plain types."""


class TrainingDiverged(RuntimeError):
    """The loss or the weights are no longer finite; the checkpoint before that is kept."""


class StopTraining(Exception):
    """Raised after the checkpoint is saved, to leave Lightning's loops: by a signal or by max_time."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class SafeCheckpointIO(CheckpointIO):
    """Lightning's way to the disk: atomic writes, weights-only reads."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        path = Path(path)
        try:
            replace_file(path, lambda temporary: torch.save(checkpoint, temporary))
        except (OSError, RuntimeError) as error:
            if not isinstance(error, OSError) and "unexpected pos" not in str(error):  # what torch says of a full disk
                raise
            free = shutil.disk_usage(path.parent).free
            resumes = (path.parent / LAST).exists()
            advice = f"make room, and mrvae train --resume {shlex.quote(str(path.parent))} goes on from the one before"
            raise CheckpointError(
                f"{path} cannot be written, with {free / 1e6:.0f} MB free on its disk ({first_lines(error, 1)}): "
                f"{advice if resumes else 'make room, and train again'}"
            ) from error

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        return read_checkpoint(path)

    def remove_checkpoint(self, path: str | Path) -> None:
        Path(path).unlink(missing_ok=True)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The checkpoint in a file, on the CPU. Nothing in it is run.

    FileNotFoundError when there is none; CheckpointError when it is truncated, when it is a pickle with anything but
    tensors and plain types, and when it is not one of ours.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; expected a run that mrvae train has saved at least once")
    if not zipfile.is_zipfile(path):  # torch's format has its directory at the end: cut off with the rest
        raise CheckpointError(f"{path} is truncated or no checkpoint ({path.stat().st_size} bytes); nothing was loaded")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds objects other than tensors and plain types, which could run code when loaded; refused, "
            f"nothing was run: {_refused(error)}"
        ) from None
    except (RuntimeError, EOFError, OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{path} is damaged: {first_lines(error)}") from None
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get(KEY), dict):
        raise CheckpointError(f"{path} was not written by mrvae train; nothing was loaded")
    return checkpoint


def _refused(error: pickle.UnpicklingError) -> str:
    named = [line.strip() for line in str(error).splitlines() if "GLOBAL" in line or "Unsupported" in line]
    return named[0] if named else first_lines(error, 1)


def check_checkpoint(
    checkpoint: Mapping[str, Any], description: Mapping[str, Any], config: TrainConfig, path: Path
) -> None:
    """CheckpointError unless the checkpoint was saved by a run of this model and of these options.

    An option that did not exist yet when it was saved had its default.
    """
    saved = checkpoint[KEY]
    known = {entry.name for entry in fields(TrainConfig)}
    options = as_now(saved["config"])
    defaults = TrainConfig(**{name: value for name, value in options.items() if name in known}).to_dict()
    wanted = {**{k: v for k, v in config.to_dict().items() if k not in CHANGEABLE}, **description}
    held = {**{k: v for k, v in {**defaults, **options}.items() if k not in CHANGEABLE}, **saved["model"]}
    different = sorted(key for key in {*wanted, *held} if wanted.get(key) != held.get(key))
    if different:
        raise CheckpointError(
            f"{path} is of another run: "
            + "; ".join(f"{key} is {held.get(key)!r} there and {wanted.get(key)!r} here" for key in different)
        )


def check_processes(checkpoint: Mapping[str, Any], config: TrainConfig) -> None:
    """CheckpointError unless as many processes go on with the run as have saved it."""
    before, now = len(checkpoint[KEY]["random"]), config.devices * config.num_nodes
    if before != now:
        raise CheckpointError(
            f"the run was saved by {before} processes and resumes with {now}; exact resume needs the same number: give "
            "the --devices and --num-nodes it had"
        )


def check_data(
    checkpoint: Mapping[str, Any], config: TrainConfig, sets: Mapping[str, InMemory], path: Path
) -> None:
    """CheckpointError where data are others than the run was trained on: --resume may name another place of them.

    sets: by split, train and validation. What is compared is how they are divided, their number and a hash of some
    (data/fingerprint.py). A checkpoint of before data were recorded goes on with data of the same name.
    """
    saved = checkpoint[KEY]
    if "data" not in saved:
        name = saved["config"].get("data")
        if name != config.data:
            raise CheckpointError(
                f"{path} is of before data were recorded: data is {name!r} there and {config.data!r} here; expected "
                "the same, so that they are known to be those it was trained on"
            )
        return
    for split, data in sets.items():
        if changed := change(saved["data"], data.source, split):
            raise CheckpointError(
                f"the data of {path} have changed since: {config.data} has {changed}, so that its splits are others; "
                "restore them, or start another run"
            )


def random_state(device: torch.device) -> dict[str, Any]:
    """States of all random number generators of this process, as tensors and plain types."""
    name, keys, position, has_gauss, gauss = np.random.get_state()
    state = {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.array(keys, dtype=np.int64)), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["device"] = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        state["device"] = torch.mps.get_rng_state()
    return state


def set_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Put back what random_state() returned."""
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
    name, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(state["torch"])
    if "device" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["device"], device)
    elif "device" in state and device.type == "mps":
        torch.mps.set_rng_state(state["device"])


class RunCheckpoint(Checkpoint):
    """Saves last.ckpt and best.ckpt, stops cleanly on a signal or after max_time, and makes resuming exact.

    last.ckpt after every epoch and every `checkpoint_every_steps` steps; best.ckpt when the validation objective
    improves. Ctrl-C and SIGTERM let the step end, save and raise StopTraining; a second one stops at once. With several
    processes the stop waits for the end of the epoch, where they agree on it. What is not finite is never saved:
    TrainingDiverged instead, at the save.
    """

    def __init__(
        self, config: TrainConfig, description: Mapping[str, Any], data: Fingerprints, loader: Batches
    ) -> None:
        self.loader = loader
        self.config = config
        self.description = dict(description)
        self.data = data
        self.directory = config.directory
        self.best: float | None = None
        self.best_epoch: int | None = None
        self._improved = False
        self._states: list[dict[str, Any]] | None = None
        self._reason: str | None = None
        self._started = 0.0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._started = time.monotonic()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._reason is not None:
            raise KeyboardInterrupt
        self._reason = "interrupted" if number == signal.SIGINT else "terminated"

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in (
                signal.SIGINT,
                signal.SIGTERM,
            ):  # Lightning put its own before, and puts back the user's after
                signal.signal(number, self._on_signal)
        if self._states is None:
            if trainer.world_size > 1:  # the same weights were drawn everywhere; betas and noise must differ
                seed = np.random.SeedSequence((self.config.seed, trainer.global_rank)).generate_state(1)[0]
                pl.seed_everything(int(seed), verbose=False)
            return
        # last of all hooks before the first batch: nothing draws a number after this
        set_random_state(self._states[trainer.global_rank], pl_module.device)
        self._states = None

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx + 1 == trainer.num_training_batches:
            return  # the end of the epoch saves, and stops
        alone = trainer.world_size == 1
        every = self.config.checkpoint_every_steps
        if alone and self._wants_stop():
            self._check_finite(trainer, pl_module)
            self._save(trainer, LAST)
            raise StopTraining(self._reason or "stopped")
        if every is not None and trainer.global_step % every == 0:
            self._check_finite(trainer, pl_module)
            self._save(trainer, LAST)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        objective = trainer.callback_metrics[OBJECTIVE].item()
        if not math.isfinite(objective):  # every comparison with NaN is false: once best, it would stay so
            warnings.warn(
                f"the validation objective is {objective} in epoch {trainer.current_epoch + 1}; not counted as best",
                stacklevel=1,
            )
        elif self.best is None or objective < self.best:
            self.best, self.best_epoch, self._improved = objective, trainer.current_epoch, True

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._check_finite(trainer, pl_module)
        if self._improved:
            self._improved = False
            self._save(trainer, BEST)
        stop = trainer.strategy.reduce_boolean_decision(self._wants_stop(), all=False)
        self._save(trainer, LAST)
        if stop and trainer.current_epoch + 1 < self.config.epochs and not trainer.should_stop:
            raise StopTraining(self._reason or "stopped")

    def _wants_stop(self) -> bool:
        limit = self.config.max_time
        if self._reason is None and limit is not None and time.monotonic() - self._started >= limit:
            self._reason = f"max_time of {limit:g} s reached"
        return self._reason is not None

    def _check_finite(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Before a save, which waits for the device anyway; all processes raise together, or some would hang."""
        assert isinstance(module, TrainingModule)
        if not trainer.strategy.reduce_boolean_decision(not module.is_finite(), all=False):
            return
        averages = module.epoch_averages.means()
        loss = "none yet" if averages is None else f"{averages.loss:g}"
        last = self.directory / LAST
        kept = f"{last} is kept as it was saved before" if last.exists() else "no checkpoint was saved before"
        raise TrainingDiverged(
            f"training diverged in epoch {trainer.current_epoch + 1} of {self.config.epochs}, by step "
            f"{trainer.global_step}, at learning rate {trainer.optimizers[0].param_groups[0]['lr']:g} (--lr "
            f"{self.config.lr:g}): the mean loss is {loss}, expected a finite loss and finite weights; train again "
            f"(--force) with a smaller --lr, or with --clip, e.g. --clip 1; {kept}"
        )

    def _save(self, trainer: pl.Trainer, name: str) -> None:
        trainer.save_checkpoint(self.directory / name, weights_only=False)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        states: list[Any] = [random_state(pl_module.device)]
        if trainer.world_size > 1:
            states = [None] * trainer.world_size
            torch.distributed.all_gather_object(states, random_state(pl_module.device))
        checkpoint[KEY] = {
            "config": self.config.to_dict(),
            "model": self.description,
            "data": self.data,
            "random": states,
            "loader": self.loader.state_dict(),
            "best": self.best,
            "best_epoch": self.best_epoch,
            "stopped_early": bool(trainer.should_stop),
        }

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        saved = checkpoint[KEY]
        self._states = saved["random"]
        self.loader.load_state_dict(saved["loader"])
        self.best, self.best_epoch = saved["best"], saved["best_epoch"]

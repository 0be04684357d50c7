"""train(): one run, from a TrainConfig to a directory with the model in it.

    result = train(TrainConfig(epochs=50, out="runs/mine"))
    result.model(x, beta=0.5)

Training is Lightning's; `lightning_module.py` has the step, `checkpoint.py` what makes it survive kill -9.
"""

from __future__ import annotations

import logging
import os
import shlex
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.profilers import PassThroughProfiler
from torch import Tensor, nn

from .averaging import KEY as AVERAGE
from .averaging import WeightAverage
from .checkpoint import (
    KEY,
    CheckpointError,
    RunCheckpoint,
    SafeCheckpointIO,
    StopTraining,
    check_checkpoint,
    check_data,
    check_processes,
    read_checkpoint,
)
from .config import TrainConfig
from .data import Batches, InMemory, batches, in_turn
from .data.fingerprint import Fingerprints, recorded
from .l_vae import learned_values
from .lightning_module import OBJECTIVE, TrainingModule
from .networks import start_from
from .preflight import (
    TENSORBOARD,
    check_free,
    check_kind,
    check_last_batch,
    check_likelihood,
    check_objective,
    check_splits,
    remove_run,
)
from .progress import METRICS, JumpWarning, MetricsFile, ProgressLine
from .run import (
    BEST,
    CONFIG,
    LAST,
    MODEL,
    build_model,
    calibration_images,
    describe,
    first_lines,
    load_split,
    plain_network,
    read_description,
    save_model,
    save_vocabulary,
    with_gates_of,
    write_config,
)
from .scored import likeliest_sigma

__all__ = ["TrainConfig", "TrainResult", "TrainingInterrupted", "train"]

VALIDATION_BATCH = 500


class TrainingInterrupted(RuntimeError):
    """Training stopped before its end, with a checkpoint to resume from; the message says how."""


@dataclass(frozen=True)
class TrainResult:
    """What train() returns; the model is on the CPU and in eval mode, with the weights of model.safetensors."""

    directory: Path
    model: nn.Module
    steps: int
    objective: float | None  # of the best validation, nats an example; None without one
    seconds_per_step: float | None  # of this call; None when there was nothing left to do


def train(config: TrainConfig, resume: bool = False, force: bool = False, progress: bool = True) -> TrainResult:
    """Train by `config`, or continue the run in config.directory (resume=True), and leave the model there.

    Everything is checked before training starts. ValueError for options and data that make no sense; FileExistsError
    when the directory holds a run already (force=True removes it); CheckpointError for a checkpoint that cannot be
    resumed; TrainingInterrupted after Ctrl-C, SIGTERM or max_time, with a checkpoint on the disk; TrainingDiverged, a
    RuntimeError, when the loss or the weights are no longer finite.
    A resumed run ends with the same bits as one that was never stopped, on the CPU and, with `deterministic`, on a GPU.
    """
    config.check() if resume else config.check_new()
    directory = config.directory
    first = is_first_process()
    if first and not resume:
        check_free(directory, force)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    kept = directory if resume else None
    train_set, validation_set = load_split(config, "train", kept, anew=True), load_split(config, "validation", kept)
    check_splits(train_set, validation_set, config.data)
    check_kind(train_set, config)
    description = describe(config, train_set.input_shape)
    pl.seed_everything(config.seed, verbose=False)
    model = build_model(description)
    check_last_batch(model, len(train_set), config)
    check_objective(model, len(train_set), config)
    check_likelihood(model, config, train_set, validation_set)
    start_from(plain_network(model), train_set.examples)
    share = config.batch_size // (config.devices * config.num_nodes)
    loader = batches(train_set, share, shuffle=True, seed=config.seed)
    data = recorded((train_set.source, validation_set.source))
    last = directory / LAST
    of_finished: dict[str, Any] = {}
    if resume:
        checkpoint = read_checkpoint(last)
        check_checkpoint(checkpoint, description, config, last)
        check_data(checkpoint, config, {"train": train_set, "validation": validation_set}, last)
        model = with_gates_of(model, description, _state_of(checkpoint))
        _load_weights(model, checkpoint, last)
        done, under_way = _epochs_done(checkpoint)
        if config.epochs < done + under_way:
            raise ValueError(
                f"epochs is {config.epochs}, and the run in {directory} has done {done}{' and a part' * under_way}; "
                "leave it as it was, ask for more to go on, or start another run"
            )
        saved = checkpoint[KEY]
        no_more = saved["stopped_early"] and config.patience == saved["config"].get("patience")
        if no_more or config.epochs == done:
            return _finish(config, description, data, model, checkpoint, validation_set, None)
        check_processes(checkpoint, config)
        del checkpoint
        of_finished = _entries_of_finished(directory)
    with _quiet():
        timer = _StepTimer()
        trainer = _trainer(config, description, data, loader, timer, progress)
    if first:
        if force and not resume:
            remove_run(directory)
        described = {"description": description, "config": config.to_dict(), "data": data}
        write_config(directory, **{**described, **of_finished})
        save_vocabulary(directory, train_set)
    module = TrainingModule(model, config, loader, calibration_images(train_set))
    with _quiet():
        _fit(trainer, module, validation_set, last if resume else None, config)
    return _finish(config, description, data, model, read_checkpoint(last), validation_set, timer.seconds_per_step())


def _entries_of_finished(directory: Path) -> dict[str, Any]:
    """What config.json says of the weights in model.safetensors, which stay until the run has gone on to its end."""
    if not (directory / MODEL).exists():
        return {}
    document = read_description(directory)
    return {"description": document["model"]} | ({"learned": document["learned"]} if "learned" in document else {})


def _trainer(
    config: TrainConfig,
    description: dict[str, Any],
    data: Fingerprints,
    loader: Batches,
    timer: pl.Callback,
    progress: bool,
) -> pl.Trainer:
    """Lightning's trainer, which writes nothing yet. ValueError for hardware options that this machine cannot meet."""
    directory = config.directory
    callbacks: list[pl.Callback] = [
        timer,
        MetricsFile(directory / METRICS if "csv" in config.log_to else None),
        RunCheckpoint(config, description, data, loader),
    ]
    if config.ema:
        callbacks.append(WeightAverage(config.ema))
    if progress:
        callbacks.append(ProgressLine())
    callbacks.append(JumpWarning())  # after the progress line, which ends with its end
    if config.patience is not None:
        callbacks.append(_Patience(OBJECTIVE, patience=config.patience, mode="min"))
    try:
        trainer = pl.Trainer(
            accelerator=config.accelerator,
            devices=config.devices,
            num_nodes=config.num_nodes,
            strategy=config.strategy,
            precision=config.precision,  # type: ignore[arg-type]
            max_epochs=config.epochs,
            gradient_clip_val=config.clip,
            deterministic=config.deterministic,
            check_val_every_n_epoch=config.validate_every,
            num_sanity_val_steps=0,
            callbacks=callbacks,
            plugins=[SafeCheckpointIO()],
            default_root_dir=directory,
            profiler=_NoProfiler(),
            logger=TensorBoardLogger(directory, name="", version=TENSORBOARD)
            if "tensorboard" in config.log_to
            else False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
    except (pl.utilities.exceptions.MisconfigurationException, ValueError) as error:
        raise ValueError(f"the hardware options do not fit this machine: {first_lines(error)}") from None
    if trainer.precision != config.precision:  # Lightning takes another one where a CPU has none, and warns
        raise ValueError(
            f"precision is {config.precision!r}, which this device has not; expected --precision {trainer.precision}, "
            "say, or another --accelerator"
        )
    return trainer


def _fit(
    trainer: pl.Trainer, module: TrainingModule, validation_set: InMemory, last: Path | None, config: TrainConfig
) -> None:
    """Run Lightning's loop. TrainingInterrupted where it is stopped before its end."""
    try:
        validation_batches = in_turn(validation_set, VALIDATION_BATCH)
        trainer.fit(module, module.loader, validation_batches, ckpt_path=last, weights_only=True)
    except StopTraining as stop:
        raise TrainingInterrupted(
            f"{stop.reason} in epoch {trainer.current_epoch + 1} of {config.epochs}, after step {trainer.global_step}; "
            f"continue with: mrvae train --resume {shlex.quote(str(config.directory))}"
        ) from None
    except SystemExit:  # what Lightning makes of a KeyboardInterrupt
        raise KeyboardInterrupt from None


def _finish(
    config: TrainConfig,
    description: dict[str, Any],
    data: Fingerprints,
    model: nn.Module,
    checkpoint: dict[str, Any],
    validation_set: InMemory,
    seconds: float | None,
) -> TrainResult:
    """Write model.safetensors from the last or the best checkpoint, with the sigma that the run keeps."""
    directory = config.directory
    saved = checkpoint[KEY]
    steps = checkpoint["global_step"]
    if config.keep == "best":
        if saved["best"] is None:
            warnings.warn(
                f"no validation with a finite objective in {config.epochs} epochs, validate_every being "
                f"{config.validate_every}: keeping the last weights",
                stacklevel=3,
            )
        else:
            checkpoint = read_checkpoint(directory / BEST)
    model = model.cpu()
    if seconds is None:  # nothing was trained, in whose precision the model would be
        own = checkpoint[AVERAGE]["weights"] if AVERAGE in checkpoint else checkpoint["state_dict"]
        model.to(next(value.dtype for value in own.values() if value.is_floating_point()))
    _load_weights(model, checkpoint, directory)
    if is_first_process():
        learned = learned_values(config, plain_network(model), checkpoint["state_dict"])
        if learned is not None:
            description = {**description, "beta": learned["beta"]}
        if config.sigma_from == "validation":
            learned = {"sigma": _take_sigma(config, model.eval(), validation_set)}
        further = {} if learned is None else {"learned": learned}
        write_config(directory, description, config=config.to_dict(), data=data, **further)
        save_model(directory, model, description)
    return TrainResult(directory, model.eval(), steps, saved["best"], seconds)


def _take_sigma(config: TrainConfig, model: nn.Module, validation_set: InMemory) -> float:
    """Give the decoder the likeliest sigma for the validation examples; returns that of training."""
    assert config.beta is not None  # checked with the options
    likelihood = plain_network(model).likelihood
    of_training: float = likelihood.sigma
    # of examples that are all the same the error may be 0, and sigma is then the least there is
    likelihood.set_sigma(max(likeliest_sigma(model, validation_set, config.beta), 1e-30))
    return of_training


def _load_weights(model: nn.Module, checkpoint: dict[str, Any], path: Path) -> None:
    try:
        model.load_state_dict(_state_of(checkpoint))
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path} does not fit the network of {CONFIG}: {first_lines(error)}") from None


def _state_of(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    """The model's, without what the objective learns."""
    prefix = "model."
    whole = checkpoint["state_dict"].items()
    return {name.removeprefix(prefix): value for name, value in whole if name.startswith(prefix)}


def _epochs_done(checkpoint: dict[str, Any]) -> tuple[int, bool]:
    """Whole epochs, and whether the next one has begun."""
    progress = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]
    return progress["processed"], progress["started"] > progress["processed"]


def is_first_process() -> bool:
    """Whether this process writes the run's files: known before torch.distributed is, from what launchers set."""
    for name in ("RANK", "SLURM_PROCID"):
        if name in os.environ:
            return int(os.environ[name]) == 0
    return int(os.environ.get("LOCAL_RANK", 0)) == 0 and int(os.environ.get("NODE_RANK", 0)) == 0


class _Patience(EarlyStopping):
    """With the patience that is asked for: Lightning's takes the saved one, though --resume may change it."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict({**state_dict, "patience": self.patience})


class _NoProfiler(PassThroughProfiler):
    """Lightning enters a profiler's context many times a step; this one costs next to nothing."""

    _nothing = nullcontext()

    def profile(self, action_name: str) -> nullcontext:  # type: ignore[override]
        return self._nothing


class _StepTimer(pl.Callback):
    """Seconds a step of this call, validation and saving included."""

    def __init__(self) -> None:
        self._begun = self._ended = 0.0
        self._first = self._last = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begun, self._first = time.perf_counter(), trainer.global_step

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._ended, self._last = time.perf_counter(), trainer.global_step

    def seconds_per_step(self) -> float:
        return (self._ended - self._begun) / max(1, self._last - self._first)


@contextmanager
def _quiet() -> Iterator[None]:
    """Lightning's notes on its own set-up are about things that this module has decided."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"lightning\..*")
            # the margin of the sampled range, which is there for the range's own end
            warnings.filterwarnings("ignore", message="beta = .* lies outside the range")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)

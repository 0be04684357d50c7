"""What a run shows while it trains: its line, and the warning of a loss that jumps."""

from __future__ import annotations

import contextlib
import io
import re
import sys
from dataclasses import replace
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from mrvae_models import progress, training
from mrvae_models.checkpoint import RunCheckpoint, read_checkpoint
from mrvae_models.cli import main
from mrvae_models.lightning_module import AVERAGES, TrainingModule
from mrvae_models.run import LAST
from mrvae_models.running_averages import Averages
from mrvae_models.training import TrainingInterrupted, train
from training_cases import rows_of, small


class Logged(TrainingModule):
    """A module that trains nothing: its epochs have these losses."""

    def __init__(self, losses):
        pl.LightningModule.__init__(self)
        averages = [Averages(loss, loss, 0.0) for loss in losses]
        self.epoch_averages = SimpleNamespace(means=lambda: averages.pop(0))
        self.config = SimpleNamespace(lr=0.001, directory="runs/one")


def jumps(losses, recwarn):
    """The warnings of a run whose epochs have these losses."""
    module, callback = Logged(losses), progress.JumpWarning()
    for epoch in range(len(losses)):
        callback.on_train_epoch_end(SimpleNamespace(current_epoch=epoch), module)
    callback.on_train_end(SimpleNamespace(is_global_zero=True), module)
    return [str(warning.message) for warning in recwarn]


@pytest.mark.parametrize("losses", [
    [5796.0, 1200.0, 300.0, 180.0],
    [70.0, 120.0, 300.0, 600.0],  # a range of betas that grows
    [900.0, 20.0, 1.0, 700.0, 0.5],  # back to where it began
    [50.0, -200.0, -900.0, -1200.0, 3000.0, -1500.0],
    [0.5, 0.01, 4.0],
])
def test_a_loss_that_falls_or_rises_a_few_times_is_no_jump(losses, recwarn):
    assert jumps(losses, recwarn) == []


@pytest.mark.parametrize(("losses", "expected"), [
    ([5796.0, 19130.0, 4.57e15, 49999.0], "rose from 5796 to 4.57e+15 in epoch 3"),
    ([100.0, -200.0, 9000.0, 50000.0, -300.0], "rose from -200 to 5e+04 in epoch 4"),
    ([900.0, 20.0, 1.0, 10000.0], "rose from 1 to 1e+04 in epoch 4"),
])
def test_a_loss_that_jumps_is_told_once_with_what_to_do(losses, expected, recwarn):
    (told,) = jumps(losses, recwarn)
    assert told.startswith("runs/one: ") and expected in told and "Try a smaller --lr, such as 0.0001" in told


def test_a_jump_before_a_stop_is_told_after_it(recwarn):
    first, second = progress.JumpWarning(), progress.JumpWarning()
    module = Logged([100.0, 50.0, 9000.0, 60.0])
    for epoch in range(3):
        first.on_train_epoch_end(SimpleNamespace(current_epoch=epoch), module)
    second.load_state_dict(first.state_dict())
    second.on_train_epoch_end(SimpleNamespace(current_epoch=3), module)
    second.on_train_end(SimpleNamespace(is_global_zero=True), module)
    assert ["rose from 50 to 9000 in epoch 3" in str(warning.message) for warning in recwarn] == [True]


def test_the_warning_reaches_the_user_after_the_line_and_through_a_resume(images, tmp_path, monkeypatch, capsys):
    losses = iter([100.0, 9000.0, 80.0])
    epoch_end = progress.JumpWarning.on_train_epoch_end

    def jumping(self, trainer, module):
        loss = next(losses)
        monkeypatch.setattr(module.epoch_averages, "means", lambda: Averages(loss, loss, 0.0))
        epoch_end(self, trainer, module)

    monkeypatch.setattr(progress.JumpWarning, "on_train_epoch_end", jumping)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    run = str(tmp_path / "run")
    options = ["--batch-size", "81", "--latent", "3", "--set", "hidden=8", "--log-to", "none", "--validate-every", "9"]
    assert main(["train", "--data", str(images), "--out", run, "--epochs", "2", *options, "--quiet"]) == 0
    assert "thrown off, the loss rose from 100 to 9000 in epoch 2" in capsys.readouterr().err
    assert main(["train", "--resume", run, "--epochs", "3"]) == 0
    lines = capsys.readouterr().err.splitlines()
    (told,) = [line for line in lines if "thrown off" in line]
    assert told.startswith(f"mrvae: warning: {run}: training was thrown off") and "in epoch 2" in told


def metrics(config):
    """metrics.csv of a run, without its times."""
    rows = rows_of(config.directory / progress.METRICS)
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


@pytest.mark.parametrize("steps", [1, 3, 4])  # of 4 an epoch
def test_a_run_that_was_stopped_within_epochs_has_the_same_numbers(images, tmp_path, monkeypatch, steps):
    config = replace(small(images, tmp_path, epochs=3, batch_size=24, validate_every=2), log_to=("csv",))
    whole = replace(config, out=str(tmp_path / "whole"))
    assert train(whole, progress=False).steps == 12
    wants_stop, done = RunCheckpoint._wants_stop, []

    def stop(self):
        done.append(1)
        self._reason = "stopped" if len(done) % steps == 0 else None
        return wants_stop(self)

    monkeypatch.setattr(RunCheckpoint, "_wants_stop", stop)
    resume = False
    for _ in range(20):
        with contextlib.suppress(TrainingInterrupted):
            train(config, resume=resume, progress=False)
            break
        resume = True
    assert resume and metrics(config) == metrics(whole)


def test_a_checkpoint_without_averages_goes_on(images, tmp_path, monkeypatch):
    """Those of the epoch are of the steps after it then."""
    config = replace(small(images, tmp_path, epochs=2, batch_size=24), log_to=("csv",), checkpoint_every_steps=1)
    whole = replace(config, out=str(tmp_path / "whole"))
    train(whole, progress=False)
    with pytest.raises(TrainingInterrupted):
        train(replace(config, max_time=1e-6), progress=False)
    saved = read_checkpoint(config.directory / LAST)
    del saved[AVERAGES]
    torch.save(saved, config.directory / LAST)
    train(config, resume=True, progress=False)
    (first, second), (other, same) = metrics(config), metrics(whole)
    assert first["train/loss"] != other["train/loss"] and second == same


def test_a_line_is_of_the_epoch_just_done_and_the_last_comes_once(images, tmp_path, monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(training, "ProgressLine", lambda: progress.ProgressLine(0.0, stream))
    train(small(images, tmp_path, epochs=3, batch_size=81))
    lines = stream.getvalue().splitlines()
    assert [re.match(r"epoch (\d)/3 ", line)[1] for line in lines] == ["1", "2", "3"]
    assert all("loss" in line for line in lines) and "took" in lines[-1] and "eta" in lines[0]

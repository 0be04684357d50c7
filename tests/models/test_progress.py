"""What a run shows while it trains: its line, and the warning of a loss that jumps."""

from __future__ import annotations

import io
import re
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
from mrvae_models import progress, training
from mrvae_models.lightning_module import Averages, TrainingModule
from mrvae_models.training import train
from training_cases import small


class Logged(TrainingModule):
    """A module that trains nothing: its epochs have these losses."""

    def __init__(self, losses):
        pl.LightningModule.__init__(self)
        averages = [Averages(loss, loss, 0.0) for loss in losses]
        self.epoch_averages = SimpleNamespace(means=lambda: averages.pop(0))
        self.config = SimpleNamespace(lr=0.001)


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
    assert expected in told and "Try a smaller --lr, such as 0.0001" in told


def test_the_warning_reaches_the_user(images, tmp_path, monkeypatch):
    monkeypatch.setattr(progress.JumpWarning, "factor", -1.0)  # the least rise of all is a jump
    with pytest.warns(UserWarning, match="thrown off"):
        train(small(images, tmp_path, epochs=2, batch_size=81), progress=False)


def test_a_line_is_of_the_epoch_just_done_and_the_last_comes_once(images, tmp_path, monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(training, "ProgressLine", lambda: progress.ProgressLine(0.0, stream))
    train(small(images, tmp_path, epochs=3, batch_size=81))
    lines = stream.getvalue().splitlines()
    assert [re.match(r"epoch (\d)/3 ", line)[1] for line in lines] == ["1", "2", "3"]
    assert all("loss" in line for line in lines) and "took" in lines[-1] and "eta" in lines[0]

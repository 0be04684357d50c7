"""train(): what it writes and never overwrites, early stopping, progress, and several processes."""

from __future__ import annotations

import io
import json
import math
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from mrvae_models import training
from mrvae_models.config import TrainConfig
from mrvae_models.data import DataError, ImageDataset
from mrvae_models.lightning_module import TrainingModule
from mrvae_models.progress import ProgressLine, clock
from mrvae_models.run import load_model, load_split
from mrvae_models.training import train
from training_cases import rows_of, run


def test_training_lowers_the_objective_and_writes_a_run(config):
    result = run(replace(config, epochs=12, log_to=("csv", "tensorboard"), lr=1e-2, gate_lr_factor=1.0))
    rows = rows_of(result.directory / "metrics.csv")
    assert [int(row["epoch"]) for row in rows] == list(range(1, 13))
    assert int(rows[-1]["step"]) == result.steps == 12 * math.ceil(81 / 16)
    assert float(rows[-1]["validation/objective"]) < 0.9 * float(rows[0]["validation/objective"])
    values = {name: float(value) for name, value in rows[-1].items()}
    betas = [0.01, 0.316228, 10]
    per_beta = [
        values[f"validation/distortion/beta={b:.3g}"] + b * values[f"validation/rate/beta={b:.3g}"] for b in betas
    ]
    assert values["validation/objective"] == pytest.approx(sum(per_beta) / 3, rel=1e-5)
    assert result.objective == pytest.approx(min(float(row["validation/objective"]) for row in rows), rel=1e-6)
    document = json.loads((result.directory / "config.json").read_text())
    assert document["config"]["lr"] == 0.01
    assert document["model"]["input_shape"] == [1, 6, 6]
    assert document["versions"]["torch"] == torch.__version__
    assert TrainConfig.load(result.directory / "config.json") == replace(
        config, epochs=12, log_to=("csv", "tensorboard"), lr=1e-2, gate_lr_factor=1.0
    )
    assert any(path.name.startswith("events") for path in (result.directory / "tensorboard").iterdir())
    loaded, _ = load_model(result.directory)
    x = load_split(config, "test").examples
    with torch.no_grad(), loaded.at(0.5), result.model.at(0.5):
        assert torch.equal(loaded.network.encode(x)[0], result.model.network.encode(x)[0])


def test_early_stop_keeps_the_best_and_is_finished(config, monkeypatch):
    values = iter([5.0, 3.0, 4.0, 6.0, 1.0])

    def scripted(self):
        self.log("validation/objective", next(values))
        self.validated_epoch = self.current_epoch

    monkeypatch.setattr(TrainingModule, "on_validation_epoch_end", scripted)
    config = replace(config, epochs=5, patience=2, keep="best")
    result = run(config)
    assert (result.steps, result.objective) == (4 * 6, 3.0)
    best = torch.load(config.directory / "best.ckpt", weights_only=True)
    assert best["global_step"] == 2 * 6
    assert torch.equal(result.model.gate_weight, best["state_dict"]["model.gate_weight"])
    assert run(config, resume=True).steps == 4 * 6  # it had stopped: nothing to continue


def test_a_run_is_not_overwritten_unless_forced(config):
    run(config)
    before = (config.directory / "last.ckpt").read_bytes()
    (config.directory / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="holds a run already.*--resume.*--force"):
        run(config)
    with pytest.raises(DataError, match="no such file"):
        run(replace(config, data="missing.npz"), force=True)
    assert (config.directory / "last.ckpt").read_bytes() == before  # bad arguments lose nothing
    run(replace(config, seed=5), force=True)
    assert (config.directory / "last.ckpt").read_bytes() != before
    assert (config.directory / "notes.txt").read_text() == "mine"


def test_force_removes_what_was_derived_from_the_replaced_run(config):
    run(config)
    directory = config.directory
    for name in ("curve.csv", "curve.json", "curve.png"):
        (directory / name).write_text("old")
    for name in ("baked-0.5", "baked-1", "baked-mine"):
        (directory / name).mkdir()
        (directory / name / "model.pt2").write_text("old")
    for name in ("baked-0.5", "baked-1"):
        (directory / name / "config.json").write_text((directory / "config.json").read_text())
    (directory / "baked-1" / "notes.txt").write_text("mine")
    run(config, force=True)
    assert not list(directory.glob("curve.*"))
    assert sorted(path.name for path in directory.glob("baked-*")) == ["baked-1", "baked-mine"]
    assert [path.name for path in (directory / "baked-1").iterdir()] == ["notes.txt"]
    assert (directory / "baked-mine" / "model.pt2").exists()  # no config.json of ours: not ours


def test_force_leaves_a_curve_that_is_of_no_run(config):
    config.directory.mkdir()
    (config.directory / "curve.csv").write_text("mine")
    run(replace(config, epochs=1), force=True)
    assert (config.directory / "curve.csv").read_text() == "mine"


def test_splits_of_different_shapes_are_refused_before_training(config, monkeypatch):
    def load(config, split, run, anew=False):
        return ImageDataset(torch.rand(4, 1, *((8, 8) if split == "train" else (10, 10))))

    monkeypatch.setattr(training, "load_split", load)
    with pytest.raises(DataError, match=r"training images have shape \(1, 8, 8\) and validation images \(1, 10, 10\)"):
        run(config)
    assert not config.directory.exists()


def test_a_last_batch_of_one_is_refused_for_batch_norm_alone(config):
    options = {"channels": [4, 64]}
    normed = replace(config, network="cnn", network_options=options, batch_size=16, epochs=1)
    message = "81 training images in batches of 16 leave a batch of 1 .* choose --batch-size 15 or 17, or a network"
    with pytest.raises(ValueError, match=message):
        run(normed)
    assert not config.directory.exists()
    with pytest.raises(ValueError, match="in batches of 1 leave a batch of 1"):
        run(replace(normed, batch_size=1))
    with pytest.raises(ValueError, match="shared by 2 processes"):  # 81 = 3 * 26 + 3: one row each, one left out
        run(replace(normed, batch_size=26, devices=2))
    run(replace(normed, network_options={**options, "norm": "group"}))
    run(replace(normed, batch_size=17), force=True)


def test_out_that_is_a_file(config):
    config.directory.write_text("")
    with pytest.raises(FileExistsError, match="is a file"):
        run(config)


def test_progress_without_a_terminal_is_lines_with_everything(config, monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(ProgressLine.__init__, "__defaults__", (0.0, stream))
    train(config)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2 * 6  # every step, the end with the last
    for word in ("epoch 1/2", "loss", "distortion", "rate", "nats", "steps/s", "eta"):
        assert word in lines[2]
    assert lines[-1].startswith("epoch 2/2 [####################]")
    assert "took" in lines[-1]


def test_clock():
    assert [clock(seconds) for seconds in (7, 750, 3723)] == ["0:07", "12:30", "1:02:03"]


def launch(*arguments, launcher=()):
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, *launcher, "-m", "mrvae_models", "train", *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


def test_two_processes_train_stop_and_resume_to_the_same_bits(images, tmp_path):
    options = [
        "--data", images, "--epochs", 3, "--batch-size", 16, "--set", "hidden=12", "--latent", 3, "--validate-every", 2,
        "--log-to", "none", "--devices", 2, "--strategy", "ddp", "--accelerator", "cpu",
    ]
    whole = launch(*options, "--out", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    stopped = launch(*options, "--out", tmp_path / "run", "--max-time", 0.001, launcher=torchrun)
    assert "max_time of 0.001 s reached in epoch 1 of 3, after step 5" in stopped.stderr
    resumed = launch("--resume", tmp_path / "run", "--max-time", "1h")
    assert resumed.returncode == 0, resumed.stderr
    weights = (tmp_path / "whole" / "model.safetensors").read_bytes()
    assert weights == (tmp_path / "run" / "model.safetensors").read_bytes()
    saved = torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)
    states = [state["torch"] for state in saved["mrvae"]["random"]]
    assert len(states) == 2
    assert not torch.equal(*states)  # each process draws betas and noise of its own
    assert saved["global_step"] == 15
    with pytest.raises(RuntimeError, match="saved by 2 processes and resumes with 1"):
        run(
            replace(TrainConfig.load(tmp_path / "run" / "config.json"), devices=1, strategy="auto", epochs=4),
            resume=True,
        )

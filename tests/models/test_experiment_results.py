"""Results of runs that are there: taken as they are, finished after a kill, and made anew where an option differs."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from mrvae_models import checkpoint, training
from mrvae_models.baking import source_config
from mrvae_models.cli import main
from mrvae_models.config import TrainConfig
from mrvae_models.experiments import evaluation, execution
from mrvae_models.experiments.execution import configured, execute_one
from mrvae_models.experiments.plan import Evaluation, Run
from mrvae_models.option_changes import OF_MANY_BETAS

ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "OMP_NUM_THREADS": "1"}
OPTIONS = {field.name for field in dataclasses.fields(TrainConfig)}
SLOWER = ["--baselines", "constant", "--option", "batch_size=250", "--epochs", "12"]
TINY = {"epochs": 1, "batch_size": 500, "latent": 3, "network_options": {"hidden": [16]}}


@pytest.mark.slow
def test_killed_half_way_it_goes_on_and_ends_with_the_same_bits(tmp_path, monkeypatch):
    line = [sys.executable, "-m", "mrvae_models", "experiment", "retraining", "--small", *SLOWER, "--out"]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = subprocess.Popen([*line, str(killed)], env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    second = killed / "runs" / "retrained-beta-0.01-0"
    while not (second / "last.ckpt").exists() and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (second / "last.ckpt").exists() and not (second / "result.json").exists(), "killed in the second run"
    assert (killed / "runs" / "multi-rate-0" / "result.json").exists() and not (killed / "results.csv").exists()
    asked = []
    train = training.train

    def spy(config, **options):
        asked.append((config.beta, options.get("resume", False)))
        return train(config, **options)

    monkeypatch.setattr(training, "train", spy)
    assert main([*line[3:], str(killed)]) == 0
    assert asked == [(0.01, True), (10.0, False)]
    subprocess.run([*line, str(whole), "--processes", "2"], env=ENVIRONMENT, check=True, stdout=subprocess.DEVNULL)
    assert (killed / "results.csv").read_bytes() == (whole / "results.csv").read_bytes()
    for run in (killed / "runs").iterdir():
        weights = whole / "runs" / run.name / "model.safetensors"
        assert (run / "model.safetensors").read_bytes() == weights.read_bytes()


def alive(pid):
    """Whether a process runs; one that has ended and waits to be reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def until(condition, seconds=30.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


SLEEPERS = """
import os, signal, sys, time
from pathlib import Path
from mrvae_models.experiments import execution, launchers

def work(folder, number):
    (Path(folder) / f"pid{number}").write_text(str(os.getpid()))
    time.sleep(120)

if __name__ == "__main__":
    launchers.PATIENCE = 0.1
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    with execution._terminable():
        list(launchers.local(work, [(sys.argv[1], i) for i in range(4)], processes=2))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks /proc")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_processes_end_with_the_one_that_started_them(tmp_path, number):
    (tmp_path / "sleepers.py").write_text(SLEEPERS)
    line = [sys.executable, str(tmp_path / "sleepers.py"), str(tmp_path)]
    process = subprocess.Popen(line, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    try:
        assert until(lambda: len(list(tmp_path.glob("pid?"))) == 2 and all(map(pid_in, tmp_path.glob("pid?"))))
        workers = [pid_in(path) for path in tmp_path.glob("pid?")]
        process.send_signal(number)
        assert until(lambda: process.poll() is not None) and until(lambda: not any(map(alive, workers)))
        assert len(list(tmp_path.glob("pid?"))) == 2, "no other job was begun"
        said = process.communicate()[1]
        assert ("KeyboardInterrupt" in said) == (number != signal.SIGKILL)
    finally:
        process.kill()
        for path in tmp_path.glob("pid?"):
            if alive(pid_in(path)):
                os.kill(pid_in(path), signal.SIGKILL)


def pid_in(path):
    return int(path.read_text() or 0)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks /proc")
def test_an_experiment_that_is_interrupted_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    line = ["experiment", "retraining", "--small", "--baselines", "constant", "--out", str(tmp_path)]
    save = checkpoint.RunCheckpoint._save

    def terminated(self, trainer, name):
        save(self, trainer, name)
        if self.config.beta is None and trainer.current_epoch == 0:
            signal.raise_signal(signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.RunCheckpoint, "_save", terminated)
        assert main([*line, "--epochs", "3"]) == 130
    said = capsys.readouterr().err
    assert said == "mrvae experiment: interrupted; give the same command again to go on\n"
    assert (tmp_path / "runs" / "multi-rate-0" / "last.ckpt").exists() and signal.getsignal(signal.SIGTERM) == before
    with monkeypatch.context() as patch:  # while nothing is trained, the signal is the experiment's
        patch.setattr(evaluation, "check_columns", lambda *_: signal.raise_signal(signal.SIGTERM))
        assert main([*line, "--epochs", "3"]) == 130
    assert "give the same command again to go on" in capsys.readouterr().err
    assert main([*line, "--epochs", "3"]) == 0


def test_another_evaluation_of_a_run_trains_nothing_and_another_option_does(tmp_path, monkeypatch):
    run = Run("line", 0, {**TINY, "beta": 1.0, "seed": 0}, (1.0,))
    first = execute_one(tmp_path, run, Evaluation(draws=1))
    asked = []
    train = training.train

    def spy(config, **options):
        asked.append(options.get("resume", False))
        return train(config, **options)

    monkeypatch.setattr(training, "train", spy)
    assert execute_one(tmp_path, run, Evaluation(draws=1)) == first and asked == []
    more = execute_one(tmp_path, run, Evaluation(draws=3))
    assert asked == [True] and more["seconds"] is None and more["columns"]["rate"] == first["columns"]["rate"]
    assert more["columns"]["distortion"] != first["columns"]["distortion"]
    other = dataclasses.replace(run, options={**run.options, "lr": 0.01})
    assert execute_one(tmp_path, other, Evaluation(draws=1))["columns"] != first["columns"] and asked == [True, False]


def test_a_metric_of_a_file_that_was_edited_is_measured_again(tmp_path, monkeypatch):
    run, file = Run("line", 0, {**TINY, "beta": 1.0, "seed": 0}, (1.0,)), tmp_path / "mine.py"
    evaluation = Evaluation("metric", f"{file}:metric", draws=1)
    train = training.train

    def measured(value, resumed):
        asked = []
        monkeypatch.setattr(training, "train", lambda *a, **k: asked.append(k.get("resume", False)) or train(*a, **k))
        file.write_text(f"def metric(model, dataset, beta):\n    return {value}\n")
        assert execute_one(tmp_path / "run", run, evaluation)["columns"]["metric"] == [value]
        assert asked == resumed

    measured(1.0, [False])
    measured(1.0, [])
    measured(2.0, [True])


def test_runs_at_one_beta_are_kept_where_gates_and_the_drawing_of_betas_change(tmp_path, monkeypatch):
    changed = {"gate_degree": 1, "margin": (1.0, 1.0), "weight_power": 0.0, "range_warmup": 0.5}
    changed["gates"] = {"encoder": "sigmoid"}
    assert set(changed) < OF_MANY_BETAS < OPTIONS and not {"beta", "lr"} & OF_MANY_BETAS

    def run(beta, draws=1, **options):
        out = tmp_path / str(beta)
        made = Run("line", 0, {**TINY, "beta": beta, "seed": 0, **options}, (1.0,))
        return execute_one(out, made, Evaluation(draws=draws))["columns"]

    first, multirate = run(1.0), run(None)
    weights = (tmp_path / "1.0" / "model.safetensors").read_bytes()
    train = training.train

    def not_anew(config, **options):
        assert options.get("resume"), "trained again"
        return train(config, **options)

    monkeypatch.setattr(training, "train", not_anew)
    assert run(1.0, **changed) == first
    assert run(1.0, draws=3, **changed)["rate"] == first["rate"]
    for name, value in changed.items():
        with pytest.raises(AssertionError, match="trained again"):
            run(None, **{name: value})
    monkeypatch.undo()
    training.train(configured(tmp_path / "again", {**TINY, "beta": 1.0, "seed": 0, **changed}), progress=False)
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == weights, "they change nothing"
    assert run(None, **changed) != multirate


def test_a_result_from_before_an_option_existed_is_that_of_affine_gates(tmp_path, monkeypatch):
    def run(degree: int):
        options = {**TINY, "seed": 0, "gate_degree": degree}
        return execute_one(tmp_path, Run("line", 0, options, (1.0,)), Evaluation(draws=1))

    first = run(1)
    document = json.loads((tmp_path / "result.json").read_text())
    del document["config"]["gate_degree"]
    (tmp_path / "result.json").write_text(json.dumps(document))

    def trained(*arguments, **options):
        raise InterruptedError

    monkeypatch.setattr(training, "train", trained)
    assert run(1)["columns"] == first["columns"]
    assert source_config(document).gate_degree == 1
    with pytest.raises(InterruptedError):
        run(3)


def test_a_hierarchy_at_one_beta_does_not_depend_on_how_a_range_grows(images, tmp_path):
    options = {
        "network": "nvae", "data": str(images), "beta": 1.0, "epochs": 1, "batch_size": 27, "seed": 0,
        "network_options": {"channels": 4, "groups": 1, "cells": 1, "process_cells": 1}, "latent": 2,
    }
    weights = []
    for part in (0.0, 0.9):
        config = configured(tmp_path / str(part), {**options, "range_warmup": part})
        training.train(config, progress=False)
        weights.append((config.directory / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]


def test_a_result_with_an_option_that_is_gone_is_taken_where_it_was_idle(tmp_path, monkeypatch):
    run = Run("line", 0, {**TINY, "seed": 0}, (1.0,))
    first = execute_one(tmp_path, run, Evaluation(draws=1))
    for name, entry in (("result.json", "config"), ("config.json", "config")):
        document = json.loads((tmp_path / name).read_text())
        document[entry]["ends"] = 0.0
        (tmp_path / name).write_text(json.dumps(document))
    assert TrainConfig.load(tmp_path / "config.json") == TrainConfig.from_dict(first["config"])
    monkeypatch.setattr(training, "train", None)
    assert execute_one(tmp_path, run, Evaluation(draws=1))["columns"] == first["columns"]
    document["config"]["ends"] = 0.6
    (tmp_path / "config.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match="unknown option 'ends'"):
        TrainConfig.load(tmp_path / "config.json")


def test_a_run_waits_for_the_process_that_is_at_it(tmp_path):
    entered = []

    def second():
        with execution._locked(tmp_path):
            entered.append(time.monotonic())

    with execution._locked(tmp_path):
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.2)
        assert entered == []
    thread.join(5)
    assert len(entered) == 1

"""Checkpoints survive kill -9, resume to the bit, and refuse what they must not load."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import random
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from mrvae_models import checkpoint as checkpoint_module
from mrvae_models.checkpoint import (
    KEY,
    CheckpointError,
    SafeCheckpointIO,
    TrainingDiverged,
    random_state,
    read_checkpoint,
    set_random_state,
)
from mrvae_models.config import TrainConfig
from mrvae_models.lightning_module import TrainingModule
from mrvae_models.options import read_json
from mrvae_models.run import BEST, CONFIG, LAST, MODEL, load_model, replace_file, save_model, write_json
from mrvae_models.training import TrainingInterrupted
from training_cases import run, small

from mrvae_kernels import cost_model

STEPS_PER_EPOCH = 6
"""of 44 training examples in batches of 8: the last one has 4"""


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "images.npz"
    generator = np.random.default_rng(0)
    np.savez(
        path,
        train_images=generator.integers(0, 256, (49, 6, 6), dtype=np.uint8),
        test_images=np.eye(6, dtype=np.uint8)[None] * 255,
    )
    return path


@pytest.fixture
def config(images, tmp_path):
    return small(
        images, tmp_path, epochs=4, batch_size=8, validate_every=2, validation_betas=2, binarize="dynamic", warmup=0.5,
        seed=3,
    )


def tensors(directory):
    """Everything that resuming must reproduce: weights, both moments of Adam, and the generators."""
    saved = read_checkpoint(Path(directory) / LAST)
    optimizer = saved["optimizer_states"][0]["state"]
    found = {f"weights/{name}": value for name, value in saved["state_dict"].items()}
    for number, state in optimizer.items():
        found |= {f"adam/{number}/{name}": value for name, value in state.items()}
    return found | {"torch": saved[KEY]["random"][0]["torch"]}


def assert_same_bits(first, second):
    one, other = tensors(first), tensors(second)
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different
    assert (Path(first) / MODEL).read_bytes() == (Path(second) / MODEL).read_bytes()


def train_until(config, step, when):
    """In a process of its own: train, and die by SIGKILL at `step`, in the training step or half-way through a save."""

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    def step_or_die(self, x):
        if self.trainer.global_step == step:
            die()
        return original(self, x)

    def half_a_save(checkpoint, path):
        if checkpoint["global_step"] < step:
            return save(checkpoint, path)
        save(checkpoint, path)
        os.truncate(path, os.path.getsize(path) // 2)
        die()

    cost_model._fitted.clear()  # as conftest.py has it in this process
    original, save = TrainingModule.training_step, torch.save
    if when == "step":
        TrainingModule.training_step = step_or_die
    else:
        checkpoint_module.torch.save = half_a_save
    run(config)


@pytest.fixture(scope="module")
def processes():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mrvae_models.training"])  # imports once, before any thread
    return context


def kill(processes, config, step, when="step"):
    process = processes.Process(target=train_until, args=(config, step, when))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize("sample", ["example", "step"])
def test_resume_after_kill_within_an_epoch_ends_with_the_same_bits(processes, config, tmp_path, sample):
    config = replace(config, checkpoint_every_steps=2, sample=sample)
    whole = replace(config, out=str(tmp_path / "whole"))
    run(whole)
    kill(processes, config, 2 * STEPS_PER_EPOCH + 5)
    assert read_checkpoint(config.directory / LAST)["global_step"] == 2 * STEPS_PER_EPOCH + 4
    assert not (config.directory / MODEL).exists()
    run(config, resume=True)
    assert_same_bits(config.out, whole.out)


@pytest.mark.parametrize("epoch", [1, 2])  # after the first there was no validation, after the second there was one
def test_resume_after_kill_between_epochs_ends_with_the_same_bits(processes, config, tmp_path, epoch):
    whole = replace(config, out=str(tmp_path / "whole"))
    run(whole)
    kill(processes, config, epoch * STEPS_PER_EPOCH + 3)
    assert read_checkpoint(config.directory / LAST)["global_step"] == epoch * STEPS_PER_EPOCH
    run(config, resume=True)
    assert_same_bits(config.out, whole.out)


def test_kill_while_saving_leaves_the_checkpoint_before(processes, config, tmp_path):
    whole = replace(config, out=str(tmp_path / "whole"))
    run(whole)
    kill(processes, config, 3 * STEPS_PER_EPOCH, when="save")
    assert read_checkpoint(config.directory / LAST)["global_step"] == 2 * STEPS_PER_EPOCH
    run(config, resume=True)
    assert_same_bits(config.out, whole.out)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_how_to_resume(config, tmp_path, monkeypatch, number):
    whole = replace(config, out=str(tmp_path / "whole"))
    run(whole)
    original, handler = TrainingModule.training_step, signal.getsignal(number)

    def interrupted(self, x):
        if self.trainer.global_step == STEPS_PER_EPOCH + 1:
            os.kill(os.getpid(), number)
        return original(self, x)

    monkeypatch.setattr(TrainingModule, "training_step", interrupted)
    with pytest.raises(TrainingInterrupted, match=f"epoch 2 of 4, after step 8.*mrvae train --resume {config.out}"):
        run(config)
    assert signal.getsignal(number) == handler
    monkeypatch.undo()
    run(config, resume=True)
    assert_same_bits(config.out, whole.out)


def spoil(monkeypatch, at):
    """Make the loss NaN from optimiser step `at` on."""
    step = TrainingModule.training_step

    def spoiled(self, x):
        return step(self, x * torch.nan if self.global_step >= at else x)

    monkeypatch.setattr(TrainingModule, "training_step", spoiled)


@pytest.mark.parametrize("every", [None, 1])
def test_a_loss_that_is_not_finite_ends_training_and_keeps_the_checkpoint_before(config, monkeypatch, every):
    config = replace(config, warmup=0.0, validate_every=1, checkpoint_every_steps=every)
    spoil(monkeypatch, 8)
    message = (
        "diverged in epoch 2 of 4.*learning rate .*mean loss is nan.*smaller --lr, or with --clip.*last.ckpt is kept"
    )
    with pytest.raises(TrainingDiverged, match=message):
        run(config)
    saved = read_checkpoint(config.directory / LAST)
    assert saved["global_step"] == (STEPS_PER_EPOCH if every is None else 8)
    assert all(value.isfinite().all() for value in saved["state_dict"].values())
    assert read_checkpoint(config.directory / BEST)["global_step"] == STEPS_PER_EPOCH
    assert not (config.directory / MODEL).exists()


def test_weights_that_are_not_finite_end_training_though_every_loss_was(config, monkeypatch):
    config = replace(config, epochs=1, warmup=0.0)

    def overflow(self, *hook):
        if self.global_step == STEPS_PER_EPOCH - 1:
            next(self.parameters()).grad.fill_(torch.inf)

    monkeypatch.setattr(TrainingModule, "on_after_backward", overflow)
    with pytest.raises(TrainingDiverged, match=r"mean loss is \d.*no checkpoint was saved before"):
        run(config)
    assert not (config.directory / LAST).exists()


def test_a_validation_that_is_not_finite_is_never_best(config, monkeypatch):
    values = iter([torch.nan, 3.0, -torch.inf, 4.0])
    monkeypatch.setattr(
        TrainingModule, "on_validation_epoch_end", lambda self: self.log("validation/objective", next(values))
    )
    with pytest.warns(UserWarning, match="validation objective is nan in epoch 1; not counted as best"):
        result = run(replace(config, validate_every=1, warmup=0.0))
    assert result.objective == 3.0
    assert read_checkpoint(config.directory / BEST)["global_step"] == 2 * STEPS_PER_EPOCH


def test_max_time_stops_and_resumes(config, tmp_path):
    whole = replace(config, out=str(tmp_path / "whole"))
    run(whole)
    with pytest.raises(TrainingInterrupted, match="max_time of 1e-06 s reached in epoch 1"):
        run(replace(config, max_time=1e-6))
    run(config, resume=True)
    assert_same_bits(config.out, whole.out)


def test_resuming_a_finished_run_changes_nothing(config):
    run(config)
    before = (config.directory / LAST).read_bytes()
    weights = (config.directory / MODEL).read_bytes()
    result = run(config, resume=True)
    assert (config.directory / LAST).read_bytes() == before
    assert (config.directory / MODEL).read_bytes() == weights
    assert result.steps == 4 * STEPS_PER_EPOCH


SINCE_0_1_0 = (
    "objective tcvae_weights tcvae_sampling free_bits annealing annealing_cycles gated norms include optimizer "
    "vocabulary vocabulary_size min_count max_length train_on gate_degree"
).split()
"""Options that a checkpoint of the first release does not have; all gates were affine then, whatever a recipe says."""


@pytest.mark.parametrize("change", [{}, {"beta": 0.5}])
def test_a_run_from_before_some_options_existed_resumes_with_their_defaults(config, tmp_path, change):
    config = replace(config, gate_degree=1, **change)
    whole = replace(config, out=str(tmp_path / "whole"))
    run(whole)
    with pytest.raises(TrainingInterrupted):
        run(replace(config, max_time=1e-6))
    path = config.directory / LAST
    saved, document = read_checkpoint(path), read_json(config.directory / CONFIG)
    for options in (saved[KEY]["config"], document["config"]):
        for name in SINCE_0_1_0:
            del options[name]
    torch.save(saved, path)
    write_json(config.directory / CONFIG, document)
    old = TrainConfig.load(config.directory / CONFIG)
    assert replace(old, max_time=None) == config
    run(replace(old, max_time=None), resume=True)
    assert_same_bits(config.out, whole.out)


def test_an_option_that_only_the_checkpoint_knows_is_named(config):
    config = replace(config, epochs=1, warmup=0.0)
    run(config)
    saved = read_checkpoint(config.directory / LAST)
    saved[KEY]["config"]["of_tomorrow"] = 3
    torch.save(saved, config.directory / LAST)
    with pytest.raises(CheckpointError, match="of_tomorrow is 3 there and None here"):
        run(config, resume=True)


def test_more_epochs_continue_a_finished_run(config):
    run(config)
    result = run(replace(config, epochs=5), resume=True)
    assert result.steps == 5 * STEPS_PER_EPOCH


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("form", ["torch", "pickle"])
def test_a_malicious_checkpoint_is_refused_and_nothing_runs(config, tmp_path, form):
    run(replace(config, epochs=1, warmup=0.0))
    proof = tmp_path / "ran"
    saved = torch.load(config.directory / LAST, weights_only=True)
    saved["extra"] = Malicious(proof)
    if form == "torch":
        torch.save(saved, config.directory / LAST)
    else:
        (config.directory / LAST).write_bytes(pickle.dumps(saved["extra"]))
    with pytest.raises(CheckpointError, match="refused, nothing was run|truncated or no checkpoint"):
        run(replace(config, epochs=1, warmup=0.0), resume=True)
    assert not proof.exists()
    with pytest.raises(CheckpointError):
        SafeCheckpointIO().load_checkpoint(config.directory / LAST, weights_only=False)  # whatever Lightning asks for
    assert not proof.exists()
    torch.load(config.directory / LAST, weights_only=False) if form == "torch" else pickle.loads(
        pickle.dumps(Malicious(proof))
    )
    assert proof.exists()  # it would have run


@pytest.mark.parametrize("kept", [0, 0.3, 0.7, 0.999])
def test_a_truncated_checkpoint_is_refused(config, kept):
    config = replace(config, epochs=1, warmup=0.0)
    run(config)
    path = config.directory / LAST
    os.truncate(path, int(kept * path.stat().st_size))
    with pytest.raises(CheckpointError, match="truncated"):
        run(config, resume=True)


def test_a_damaged_checkpoint_is_refused(config):
    config = replace(config, epochs=1, warmup=0.0)
    run(config)
    path = config.directory / LAST
    content = bytearray(path.read_bytes())
    start = content.index(b"data.pkl") + 20
    content[start : start + 200] = bytes(200)
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged|refused"):
        run(config, resume=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beta_range": (0.1, 1.0)}, r"beta_range is \[0.01, 10.0\] there and \[0.1, 1.0\] here"),
        ({"latent": 4}, "latent is 3 there and 4 here"),
        ({"beta": 1.0}, "beta is None there and 1.0 here"),
        ({"gates": {"encoder": "sqrt"}}, "gates is .*'encoder': .* there and .* here"),
        ({"lr": 0.01}, "lr is 0.001 there and 0.01 here"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(config, change, message):
    config = replace(config, epochs=1, warmup=0.0)
    run(config)
    before = (config.directory / LAST).read_bytes()
    with pytest.raises(CheckpointError, match=message):
        run(replace(config, **change), resume=True)
    assert (config.directory / LAST).read_bytes() == before


def test_weights_of_another_network_are_refused(config):
    config = replace(config, epochs=1, warmup=0.0)
    run(config)
    saved = read_checkpoint(config.directory / LAST)
    name = next(name for name in saved["state_dict"] if name.endswith("mean.weight"))
    saved["state_dict"][name] = torch.zeros(5, 5)
    torch.save(saved, config.directory / LAST)
    with pytest.raises(CheckpointError, match="does not fit the network"):
        run(config, resume=True)


def test_resuming_what_is_not_there(config):
    with pytest.raises(FileNotFoundError, match="does not exist; expected a run"):
        run(config, resume=True)


def test_model_file_truncated_or_of_another_configuration(config):
    config = replace(config, epochs=1, warmup=0.0)
    run(config)
    text = (config.directory / "config.json").read_text()
    (config.directory / "config.json").write_text(text.replace("0.01,", "0.1,"))
    with pytest.raises(ValueError, match=r"beta_range is \[0.01, 10.0\] there and \[0.1, 10.0\] here"):
        load_model(config.directory)
    (config.directory / "config.json").write_text(text)
    path = config.directory / MODEL
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(ValueError, match="truncated or no safetensors file"):
        load_model(config.directory)
    path.write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(ValueError, match="truncated or no safetensors file"):
        load_model(config.directory)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda document: document["model"].pop("network"), "entry 'network' of 'model' is missing"),
        (lambda document: document["model"].update(gates=["sigmoid"]), r"entry 'gates' of 'model' is \['sigmoid'\]"),
        (lambda document: document["model"].update(gates={"encoder": "sigmoid"}), "the gate of 'encoder' is 'sigmoid'"),
        (
            lambda document: document["model"].update(latent="3"),
            "entry 'latent' of 'model' is '3'; expected int or null",
        ),
        (lambda document: document.pop("config"), "no entry 'config'"),
        (lambda document: document.update(model=[1]), "no entry 'model'"),
    ],
)
def test_a_malformed_config_is_named(config, change, message):
    run(replace(config, epochs=1, warmup=0.0))
    path = config.directory / CONFIG
    document = read_json(path)
    change(document)
    write_json(path, document)
    with pytest.raises(ValueError, match=f"config.json.*{message}"):
        load_model(config.directory)


@pytest.mark.parametrize("change", [{"input_shape": ["a"]}, {"gates": {"encoder": {"kind": "sigmoid", "colour": 1}}}])
def test_a_description_of_no_network_names_the_file(config, change):
    run(replace(config, epochs=1, warmup=0.0))
    model, document = load_model(config.directory)
    document["model"].update(change)
    write_json(config.directory / CONFIG, document)
    save_model(config.directory, model, document["model"])
    with pytest.raises(ValueError, match=r"config.json: its entry 'model' describes no network that can be built"):
        load_model(config.directory)


def test_a_malformed_header_is_named(config):
    run(replace(config, epochs=1, warmup=0.0))
    model, _ = load_model(config.directory)
    save_model(config.directory, model, [1])
    with pytest.raises(
        ValueError, match=r"model.safetensors: entry 'model' of its header is \[1\]; expected an object"
    ):
        load_model(config.directory)


def test_random_states_round_trip():
    state = random_state(torch.device("cpu"))
    first = torch.rand(3), np.random.rand(3), random.random(), random.gauss(0, 1)
    set_random_state(state, torch.device("cpu"))
    second = torch.rand(3), np.random.rand(3), random.random(), random.gauss(0, 1)
    assert torch.equal(first[0], second[0])
    assert (first[1] == second[1]).all()
    assert first[2:] == second[2:]


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def fail(temporary):
        temporary.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        replace_file(path, fail)
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]

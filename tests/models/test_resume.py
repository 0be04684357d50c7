"""What --resume and --force may do to a run that is there: nothing, until it is certain that training can begin."""

from __future__ import annotations

import errno
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from mrvae_models.checkpoint import KEY, CheckpointError, read_checkpoint
from mrvae_models.cli import main
from mrvae_models.config import TrainConfig
from mrvae_models.data import load
from mrvae_models.data.fingerprint import fingerprint
from mrvae_models.lightning_module import TrainingModule
from mrvae_models.operating import landing
from mrvae_models.run import CONFIG, LAST, MODEL, load_model
from mrvae_models.training import TrainingInterrupted
from training_cases import run


def files(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"strategy": "dpp"}, "the hardware options do not fit this machine: .*dpp"),
        ({"accelerator": "abacus"}, "the hardware options do not fit this machine: .*abacus"),
        ({"accelerator": "cpu", "precision": "16-mixed"}, "'16-mixed', which this device has not; .*bf16-mixed"),
    ],
)
def test_hardware_that_is_not_there_leaves_the_run_as_it_was(config, change, message):
    run(config)
    before = files(config.directory)
    with pytest.raises(ValueError, match=message):
        run(replace(config, **change), force=True)
    assert files(config.directory) == before
    if "precision" not in change:  # which --resume may not change
        with pytest.raises(ValueError, match=message):
            run(replace(config, epochs=4, **change), resume=True)
        assert files(config.directory) == before
    fresh = replace(config, out=str(config.directory / "fresh"), **change)
    with pytest.raises(ValueError, match=message):
        run(fresh)
    assert not fresh.directory.exists(), "nor does the start that failed look like a run"


def test_another_number_of_processes_leaves_the_run_as_it_was(config):
    run(config)
    before = files(config.directory)
    with pytest.raises(CheckpointError, match="saved by 1 processes and resumes with 2; .* --devices"):
        run(replace(config, epochs=4, devices=2, batch_size=16), resume=True)
    assert files(config.directory) == before
    assert run(replace(config, epochs=3), resume=True).steps == 18


def test_a_directory_in_which_nothing_was_saved_says_so(config):
    run(config)
    for path in config.directory.iterdir():
        if path.name != CONFIG:
            path.unlink()
    with pytest.raises(FileExistsError, match=r"\(config.json\): it has saved nothing yet, .*--force"):
        run(config)


@pytest.mark.parametrize(
    "options",
    [
        {"objective": "sigma-vae", "likelihood": "gaussian-shared", "sigma_from": "validation"},
        {"objective": "l-vae", "likelihood": "gaussian"},
    ],
)
def test_a_finished_run_stays_what_it_was_until_it_has_gone_on_to_its_end(config, options):
    config = replace(config, beta=1.0, **options)
    run(config)
    document = json.loads((config.directory / CONFIG).read_text())
    model, _ = load_model(config.directory)
    before = landing(config.directory)
    with pytest.raises(TrainingInterrupted):
        run(replace(config, epochs=60, max_time=1e-6), resume=True)
    there = json.loads((config.directory / CONFIG).read_text())
    assert there["config"]["epochs"] == 60
    assert (there["model"], there["learned"]) == (document["model"], document["learned"])
    assert landing(config.directory) == before
    state = load_model(config.directory)[0].state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    run(replace(config, epochs=6), resume=True)
    assert json.loads((config.directory / CONFIG).read_text())["learned"] != document["learned"]


def falling_until(monkeypatch, epochs):
    """The validation objective falls for so many epochs, and then stays."""

    def scripted(self):
        self.log("validation/objective", float(max(epochs - self.current_epoch, 0)))
        self.validated_epoch = self.current_epoch

    monkeypatch.setattr(TrainingModule, "on_validation_epoch_end", scripted)


def test_another_patience_counts_from_the_resume_on(config, monkeypatch):
    falling_until(monkeypatch, 1)
    config = replace(config, patience=2)
    run(replace(config, epochs=2))
    assert run(replace(config, epochs=20, patience=5), resume=True).steps == 6 * 7, "the best epoch and five more"
    assert run(replace(config, epochs=20, patience=5), resume=True).steps == 6 * 7
    assert run(replace(config, epochs=20, patience=8), resume=True).steps == 6 * 10
    assert run(replace(config, epochs=12, patience=None), resume=True).steps == 6 * 12


def test_fewer_epochs_than_the_one_that_has_begun_are_refused(config):
    with pytest.raises(TrainingInterrupted, match="in epoch 2 of 3, after step 8"):
        stopped_at(config, 8)
    with pytest.raises(ValueError, match="epochs is 1, and the run in .* has done 1 and a part; leave it"):
        run(replace(config, epochs=1), resume=True)
    assert run(replace(config, epochs=3), resume=True).steps == 18


def stopped_at(config, step):
    """A run of three epochs that max_time ends after this step."""
    with pytest.MonkeyPatch.context() as patch:
        take = TrainingModule.training_step

        def timed(self, x):
            if self.global_step == step - 1:
                patch.setattr("mrvae_models.checkpoint.time.monotonic", lambda: 1e12)
            return take(self, x)

        patch.setattr(TrainingModule, "training_step", timed)
        run(replace(config, epochs=3, max_time=1e6))


def test_a_full_disk_is_named_and_the_checkpoint_before_is_kept(config, monkeypatch):
    run(config)
    before = read_checkpoint(config.directory / LAST)["global_step"]

    def full(checkpoint, path):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("mrvae_models.checkpoint.torch.save", full)
    with pytest.raises(CheckpointError, match=r"t.ckpt cannot be written, with \d+ MB free .* --resume .*/run goes on"):
        run(replace(config, epochs=4), resume=True)
    with pytest.raises(CheckpointError, match="make room, and train again"):
        run(replace(config, out=config.out + "-fresh"))

    def broken(checkpoint, path):
        raise RuntimeError("something else")

    monkeypatch.setattr("mrvae_models.checkpoint.torch.save", broken)
    with pytest.raises(RuntimeError, match="^something else$"):
        run(replace(config, epochs=4), resume=True)
    monkeypatch.undo()
    assert read_checkpoint(config.directory / LAST)["global_step"] == before
    assert run(replace(config, epochs=4), resume=True).steps == 24


@pytest.mark.parametrize("precision", ["64-true", "bf16-true", "32-true"])
@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_resuming_a_finished_run_leaves_its_weights_in_any_precision(config, precision, ema):
    config = replace(config, precision=precision, ema=ema)
    run(config)
    weights = (config.directory / MODEL).read_bytes()
    assert run(config, resume=True).steps == 12
    assert (config.directory / MODEL).read_bytes() == weights


@pytest.fixture
def undivided(images, tmp_path):
    """102 images in one array, and a run of them."""
    path = tmp_path / "set.npz"
    with np.load(images) as arrays:
        np.savez(path, images=np.concatenate([arrays["train_images"], arrays["test_images"]]))
    return path


def write(path, images):
    np.savez(path, images=images)


def images_of(path):
    with np.load(path) as arrays:
        return arrays["images"]


def test_data_that_have_moved_are_found_again_and_changed_ones_are_refused(config, undivided, tmp_path, capsys):
    config = replace(config, data=str(undivided))
    run(replace(config, out=str(tmp_path / "whole")))
    with pytest.raises(TrainingInterrupted):
        run(replace(config, max_time=1e-6))
    moved = undivided.rename(tmp_path / "moved.npz")
    assert main(["train", "--resume", config.out, "--data", str(moved), "--max-time", "1h", "--quiet"]) == 0
    assert (config.directory / MODEL).read_bytes() == (tmp_path / "whole" / MODEL).read_bytes()
    assert json.loads((config.directory / CONFIG).read_text())["config"]["data"] == str(moved)
    more = replace(config, data=str(moved), epochs=6)
    there, kept = images_of(moved), files(config.directory)
    for images, changed in (
        (np.concatenate([there, there[:1]]), "103 examples in place of 102"),
        (there[::-1], "others among its 102 examples, or another order"),
    ):
        write(moved, images)
        with pytest.raises(CheckpointError, match=f"have changed since: .* has {changed}, so that its splits are oth"):
            run(more, resume=True)
        assert main(["curve", "--run", config.out, "--no-images", "--out", str(tmp_path / "curve")]) == 0
        assert f"{changed}, so that its splits are others, and the test split may hold" in capsys.readouterr().err
    assert files(config.directory) == kept
    write(moved, there)
    run(more, resume=True)


def test_a_checkpoint_of_before_data_were_recorded_goes_on_with_data_of_its_name(config, undivided, tmp_path):
    config = replace(config, data=str(undivided))
    run(config)
    saved = read_checkpoint(config.directory / LAST)
    del saved[KEY]["data"]
    torch.save(saved, config.directory / LAST)
    assert run(replace(config, epochs=3), resume=True).steps == 3 * 6
    torch.save(saved, config.directory / LAST)
    moved = undivided.rename(tmp_path / "moved.npz")
    with pytest.raises(CheckpointError, match="of before data were recorded: data is '.*set.npz' there and"):
        run(replace(config, data=str(moved), epochs=3), resume=True)


def test_a_relative_path_that_is_not_there_says_where_it_was_looked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=rf"none.npz: no such file or folder in {tmp_path}; expected"):
        load("none.npz")


def test_fingerprints_are_of_what_was_read():
    images = np.random.default_rng(0).integers(0, 256, (300, 4, 4), dtype=np.uint8)
    first = fingerprint("all", images)
    assert first == fingerprint("all", images.copy()) and first.examples == 300
    for other in (images.astype(np.int64), images.reshape(300, 2, 8), images[1:], np.roll(images, 1, 0)):
        assert fingerprint("all", other) != first
    documents = np.array([["a", "b"], ["c"]], dtype=object)
    assert fingerprint("all", documents) != fingerprint("all", documents[::-1])
    assert load(images).source == load(images, "test").source == first


@pytest.mark.parametrize(("before", "after"), [("all", "two"), ("two", "all"), ("two", "three"), ("three", "two")])
def test_data_that_are_divided_otherwise_are_refused(config, undivided, tmp_path, capsys, before, after):
    images, paths = images_of(undivided), {name: tmp_path / f"{name}.npz" for name in ("all", "two", "three")}
    write(paths["all"], images)
    np.savez(paths["two"], train_images=images[:90], test_images=images[90:])
    np.savez(paths["three"], train_images=images[:90], validation_images=images[80:90], test_images=images[90:])
    config = replace(config, data=str(paths[before]))
    run(config)
    with pytest.raises(CheckpointError, match=f"{after}.npz has another division into sets, its .* examples being of"):
        run(replace(config, data=str(paths[after]), epochs=3), resume=True)
    paths[after].replace(paths[before])
    for split in ("validation", "test"):
        assert main(["curve", "--run", config.out, "--no-images", "--split", split, "--out", str(tmp_path / "c")]) == 0
        told = "another division into sets" in capsys.readouterr().err
        assert told == (split == "validation" or "all" in (before, after)), "a test set of its own is not recorded"


def test_a_run_of_two_processes_that_is_done_is_finished_by_one(config):
    run(config)
    saved = read_checkpoint(config.directory / LAST)
    saved[KEY]["random"] *= 2
    torch.save(saved, config.directory / LAST)
    (config.directory / MODEL).unlink()
    assert run(config, resume=True).steps == 12
    assert (config.directory / MODEL).exists()


def test_a_run_from_when_other_layers_were_gated_is_read_and_goes_on(config, monkeypatch):
    """Layers before norms that divide their gate out had one once."""
    config = replace(config, network="cnn", network_options={"channels": (8, 16), "norm": "group"})
    with monkeypatch.context() as earlier:
        earlier.setattr("mrvae_kernels.selection._before_norm", lambda network, norms: {})
        whole = run(replace(config, out=config.out + "-whole"))
        with pytest.raises(TrainingInterrupted):
            run(replace(config, max_time=1e-6))
    result = run(config, resume=True)
    assert "encoder.body.0" in whole.model.gated and set(result.model.gated) == set(whole.model.gated)
    names = [(replace(config, out=out).directory / MODEL).read_bytes() for out in (config.out, config.out + "-whole")]
    assert names[0] == names[1]
    assert set(load_model(config.directory)[0].gated) == set(whole.model.gated)
    assert "encoder.body.0" not in run(replace(config, out=config.out + "-now")).model.gated


def test_a_run_with_an_idle_sigma_is_read(config, monkeypatch):
    config = replace(config, likelihood="discretized-gaussian", likelihood_options={"scale": "value"}, sigma=0.5)
    with monkeypatch.context() as earlier:
        earlier.setattr(TrainConfig, "check_new", TrainConfig.check)
        run(config)
    assert load_model(config.directory)[0].network.likelihood.numbers == 2
    assert run(replace(config, epochs=3), resume=True).steps == 18

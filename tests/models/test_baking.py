"""Baking into a directory: what it never replaces, and that it replaces a model by a checked one alone."""

from __future__ import annotations

import pytest
import torch
from mrvae_models import baking
from mrvae_models.baking import bake_run
from mrvae_models.cli import main
from mrvae_models.config import TrainConfig
from mrvae_models.run import LAST, build_model, describe, load_model, save_model, write_config

FILES = ["config.json", "decoder.pt2", "model.pt2", "model.safetensors"]


@pytest.fixture
def run(tmp_path):
    """A run's directory around an untrained model."""
    config = TrainConfig(out=str(tmp_path / "run"), network_options={"hidden": [6]}, latent=2)
    torch.manual_seed(0)
    description = describe(config, (1, 4, 4))
    write_config(config.directory, description, config=config.to_dict())
    save_model(config.directory, build_model(description), description)
    return config.directory


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


@pytest.mark.parametrize("force", [False, True])
def test_a_run_is_never_replaced_by_its_baked_model(run, tmp_path, monkeypatch, force):
    before = contents(run)
    monkeypatch.chdir(run)
    (tmp_path / "link").symlink_to(run)
    for out in (run, ".", tmp_path / "link", run / ".." / "run"):
        with pytest.raises(FileExistsError, match="is the run itself, .* leave out --out, or choose another"):
            bake_run(run, 0.5, out, force=force)
    other = tmp_path / "other"
    other.mkdir()
    (other / LAST).write_text("")
    with pytest.raises(FileExistsError, match=r"other holds a run \(last.ckpt\).*: choose another --out"):
        bake_run(run, 0.5, other, force=force)
    assert contents(run) == before and [path.name for path in other.iterdir()] == [LAST]


def test_the_command_refuses_to_replace_the_run(run, capsys):
    assert main(["bake", "--run", str(run), "--beta", "0.5", "--out", str(run), "--force"]) != 0
    assert "is the run itself" in capsys.readouterr().err


def test_a_model_is_replaced_by_a_checked_one_alone(run, tmp_path, monkeypatch):
    out = tmp_path / "deep" / "baked"
    bake_run(run, 0.5, out)
    (out / "notes.txt").write_text("mine")
    assert sorted(path.name for path in out.iterdir()) == [*FILES, "notes.txt"]
    before = contents(out)
    with monkeypatch.context() as patched:
        bake = baking.mk.bake
        patched.setattr(baking.mk, "bake", lambda model, beta, batches: bake(model, 2 * beta))
        with pytest.raises(RuntimeError, match="differs from the gated model at beta = 2 by .*; nothing was replaced"):
            bake_run(run, 2.0, out, force=True)
    assert contents(out) == before and sorted(path.name for path in out.iterdir()) == [*FILES, "notes.txt"]
    bake_run(run, 2.0, out, force=True)
    assert load_model(out)[1]["model"]["beta"] == 2.0 and (out / "notes.txt").read_text() == "mine"


def test_a_directory_that_is_a_link_is_written_into(run, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    bake_run(run, 0.5, tmp_path / "link")
    assert sorted(path.name for path in (tmp_path / "elsewhere").iterdir()) == FILES


@pytest.mark.parametrize("off", [0.0, 1e-3])
def test_an_output_that_is_0_throughout_is_compared(run, monkeypatch, off):
    """As the log variances of a network whose heads start at 0."""
    model, document = load_model(run)
    with torch.no_grad():
        for parameter in model.network.encoder.log_variance.parameters():
            parameter.zero_()
        for name, parameter in model.named_parameters():
            if "shift" in name:
                parameter.zero_()
    save_model(run, model, document["model"])
    bake = baking.mk.bake

    def baked(*arguments):
        network = bake(*arguments)
        with torch.no_grad():
            network.encoder.log_variance.bias.add_(off)
        return network

    monkeypatch.setattr(baking.mk, "bake", baked)
    if off:
        with pytest.raises(RuntimeError, match="differs from the gated model"):
            bake_run(run, 0.5)
        return
    assert bake_run(run, 0.5).difference <= 1e-6
    x = torch.rand(3, 1, 4, 4)
    assert not load_model(run / "baked-0.5")[0].encode(x)[1].any()

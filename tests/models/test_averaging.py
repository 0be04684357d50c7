"""The average of the weights: by its formula over a run, validated and kept, resumed to the bit."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from mrvae_models.averaging import KEY, WeightAverage
from mrvae_models.checkpoint import read_checkpoint
from mrvae_models.config import TrainConfig
from mrvae_models.curve import measure
from mrvae_models.lightning_module import TrainingModule
from mrvae_models.run import LAST, MODEL, load_model, load_split
from mrvae_models.training import train
from safetensors.torch import load_file

DECAY = 0.8


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "images.npz"
    images = np.random.default_rng(0).integers(0, 256, (44, 5, 5), dtype=np.uint8)
    np.savez(path, train_images=images[:36], test_images=images[36:])
    return TrainConfig(
        data=str(path), out=str(tmp_path / "run"), epochs=3, batch_size=8, latent=2, network_options={"hidden": [6]},
        validate_every=1, validation_betas=2, log_to=(), schedule="constant", ema=DECAY,
    )


def weights_of(directory) -> dict[str, torch.Tensor]:
    return load_file(directory / MODEL)


@pytest.mark.parametrize("beta", [None, 0.5])
def test_the_kept_weights_are_the_average_and_training_goes_on_from_its_own(config, monkeypatch, beta):
    """a_1 = w_1, a_t = decay a_{t-1} + (1 - decay) w_t, over the w of the same run without an average."""
    config = replace(config, beta=beta)
    steps: list[dict[str, torch.Tensor]] = []

    def record(self, *rest):
        steps.append({name: value.detach().clone() for name, value in self.model.named_parameters()})

    monkeypatch.setattr(TrainingModule, "on_train_batch_end", record)
    plain = train(replace(config, ema=0.0, out=config.out + "-plain"), progress=False)
    alone, steps[:] = list(steps), []
    result = train(config, progress=False)
    assert len(steps) == len(alone) > 10
    for one, other in zip(steps, alone, strict=True):
        for name in one:
            assert torch.equal(one[name], other[name]), "an average changes nothing of the training itself"
    average = dict(alone[0])
    for weights in alone[1:]:
        average = {name: DECAY * average[name] + (1 - DECAY) * weights[name] for name in average}
    kept = dict(result.model.named_parameters())
    for name, value in average.items():
        torch.testing.assert_close(kept[name].detach(), value, rtol=1e-5, atol=1e-6)
        assert torch.equal(weights_of(config.directory)[name], kept[name].detach())
    assert plain.objective != result.objective, "validation is of the average"
    model, _ = load_model(config.directory)
    assert torch.equal(next(model.parameters()), next(result.model.parameters()))


def test_a_resumed_average_is_the_same_to_the_bit(config):
    whole = train(config, progress=False)
    other = replace(config, out=config.out + "-parts")
    part = train(replace(other, epochs=config.epochs - 1), progress=False)
    assert part.steps < whole.steps
    train(other, resume=True, progress=False)
    one, two = weights_of(config.directory), weights_of(other.directory)
    assert set(one) == set(two) and all(torch.equal(one[name], two[name]) for name in one)


class Stopped(Exception):
    """Where a run is killed."""


def train_until(config, monkeypatch, step):
    """Train, and be killed at this step, of which a checkpoint is then left every two."""
    training_step = TrainingModule.training_step

    def stop(self, x):
        if self.global_step == step:
            raise Stopped
        return training_step(self, x)

    monkeypatch.setattr(TrainingModule, "training_step", stop)
    with pytest.raises(Stopped):
        train(config, progress=False)
    monkeypatch.setattr(TrainingModule, "training_step", training_step)


@pytest.mark.parametrize("ema", [0.9995, 0.0])
@pytest.mark.parametrize(
    ("precision", "kept"), [("64-true", torch.float64), ("bf16-true", torch.float32), ("bf16-mixed", torch.float32)]
)
def test_averages_of_other_number_formats_move_and_resume_to_the_bit(config, monkeypatch, precision, kept, ema):
    """In bfloat16 1 - 0.9995 is less than half of the last digit of a weight: an average there would stay the first."""
    config = replace(config, precision=precision, ema=ema, checkpoint_every_steps=2)
    train(config, progress=False)
    other = replace(config, out=config.out + "-killed")
    train_until(other, monkeypatch, 8)
    train(other, resume=True, progress=False)
    one, two = (read_checkpoint(run.directory / LAST) for run in (config, other))
    for name, value in one["state_dict"].items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, two["state_dict"][name])
    first, second = weights_of(config.directory), weights_of(other.directory)
    assert all(torch.equal(first[name], second[name]) for name in first)
    if ema:
        names = [name for name, _ in load_model(config.directory)[0].named_parameters()]
        assert {one["state_dict"]["model." + name].dtype for name in names} == {kept}
        moved = [not torch.equal(one["state_dict"]["model." + name], one[KEY]["weights"]["model." + name].to(kept))
                 for name in names]
        assert any(moved)


@pytest.mark.parametrize("likelihood", ["gaussian-shared", "gaussian-optimal"])
def test_a_sigma_from_validation_is_that_of_the_average(config, likelihood):
    """D + R that validation says is what the saved model has, with the likeliest sigma for the same examples."""
    config = replace(
        config, objective="sigma-vae", likelihood=likelihood, beta=1.0, sigma_from="validation", ema=0.9, lr=0.02,
        keep="best",
    )
    result = train(config, progress=False)
    validation_set = load_split(config, "validation")
    measured = measure(result.model, validation_set.examples, 1.0, torch.Generator().manual_seed(0))
    found = (measured.distortion + measured.rate).mean().item()
    assert found == pytest.approx(float(read_checkpoint(config.directory / LAST)["mrvae"]["best"]), rel=1e-4)


def test_the_checkpoint_holds_the_average_and_the_weights_beside_it(config):
    train(config, progress=False)
    checkpoint = read_checkpoint(config.directory / LAST)
    kept = checkpoint[KEY]
    assert set(kept["weights"]) == {name for name in checkpoint["state_dict"] if name.startswith("model.")}
    assert int(kept["updates"]) == checkpoint["global_step"]
    differing = [
        name for name, value in kept["weights"].items() if not torch.equal(value, checkpoint["state_dict"][name])
    ]
    assert differing


@pytest.mark.parametrize("decay", [1.0, -0.5, 2.0])
def test_a_decay_that_is_none_is_refused(config, decay):
    with pytest.raises(ValueError, match=f"ema is {decay}; expected"):
        replace(config, ema=decay).check()


def test_buffers_are_those_of_the_last_step():
    model = torch.nn.BatchNorm1d(2)

    class Module:
        device = torch.device("cpu")

        def __init__(self):
            self.model = model

    class Trainer:
        global_step = 0
        precision = "32-true"

    average, module, trainer = WeightAverage(0.5), Module(), Trainer()
    average.setup(trainer, module, "fit")
    for step in (1, 2):
        trainer.global_step = step
        with torch.no_grad():
            model.weight.fill_(float(step))
        model(torch.randn(4, 2))
        average.on_train_batch_end(trainer, module, None, None, 0)
    assert torch.equal(average.average.weight, torch.full((2,), 1.5))
    assert torch.equal(average.average.running_mean, model.running_mean)

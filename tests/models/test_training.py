"""train(): the loss that it minimises, what it writes, early stopping, precision, and several processes."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from mrvae_models import lightning_module, training
from mrvae_models.config import TrainConfig, changes_of_resume
from mrvae_models.data import DataError, ImageDataset, batches
from mrvae_models.lightning_module import TrainingModule, learning_rate_factor
from mrvae_models.objectives import rate as rate_of
from mrvae_models.options import parse_duration, parse_setting
from mrvae_models.progress import ProgressLine, clock
from mrvae_models.run import build_model, calibration_images, describe, load_model, load_split
from mrvae_models.training import train

import mrvae_kernels as mk


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Blurred bars: 81 training, 9 validation and 12 test images of 6x6, with something to learn."""
    path = tmp_path_factory.mktemp("data") / "bars.npz"
    generator = np.random.default_rng(0)
    rows = generator.integers(0, 6, (102, 1, 1))
    bars = np.exp(-((np.arange(6)[None, :, None] - rows) ** 2) / 2) * np.ones((1, 1, 6))
    bars = (255 * bars * generator.uniform(0.8, 1, bars.shape)).astype(np.uint8)
    np.savez(path, train_images=bars[:90], test_images=bars[90:])
    return path


@pytest.fixture
def config(images, tmp_path):
    return TrainConfig(
        data=str(images),
        out=str(tmp_path / "run"),
        epochs=2,
        batch_size=16,
        network_options={"hidden": [12]},
        latent=3,
        validate_every=1,
        validation_betas=3,
        log_to=(),
        margin=(1.0, 1.0),
        weight_power=0.0,
    )


def module_of(config):
    train_set = load_split(config, "train")
    torch.manual_seed(0)
    model = build_model(describe(config, train_set.input_shape))
    return TrainingModule(model, config, batches(train_set, config.batch_size)), train_set.examples[:16]


def run(config, **options):
    return train(config, progress=False, **options)


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(("sample", "distinct"), [("example", 16), ("step", 1)])
def test_loss_is_the_mean_of_distortion_plus_beta_rate(config, monkeypatch, sample, distinct):
    module, x = module_of(replace(config, sample=sample))
    seen = []
    draw = lightning_module.sample_beta
    monkeypatch.setattr(
        lightning_module, "sample_beta", lambda *args, **more: seen.append(draw(*args, **more)) or seen[-1]
    )
    torch.manual_seed(1)
    loss = module.training_step(x)
    (beta,) = seen
    assert beta.unique().numel() == distinct
    assert 0.01 <= beta.min() <= beta.max() <= 10
    torch.manual_seed(1)
    again = draw(16, (0.01, 10.0), sample, stratified=sample == "example")  # the noise comes after the betas
    assert torch.equal(again, beta)
    output = module.model(x, beta=beta)
    p = torch.sigmoid(output.parameters)
    distortion = -(x * p.log() + (1 - x) * (1 - p).log()).flatten(1).sum(1)
    expected = (distortion + beta * rate_of(output.mean, output.log_variance)).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)


def test_beta_vae_baseline_has_no_gates_and_one_beta(config):
    module, x = module_of(replace(config, beta=0.5))
    assert not isinstance(module.model, mk.MultiRate)
    torch.manual_seed(1)
    loss = module.training_step(x)
    torch.manual_seed(1)
    output = module.model(x)
    distortion = module.model.likelihood.distortion(output.parameters, x)
    torch.testing.assert_close(loss, (distortion + 0.5 * rate_of(output.mean, output.log_variance)).mean())
    assert module.betas_of_validation == [0.5]


def test_gates_have_a_learning_rate_of_their_own(config):
    module, _ = module_of(replace(config, lr=1e-3, gate_lr_factor=7.0))
    network, gates = module.configure_optimizers()["optimizer"].param_groups
    assert (network["initial_lr"], gates["initial_lr"]) == (1e-3, 7e-3)
    assert {id(p) for p in gates["params"]} == {id(module.model.gate_weight), id(module.model.gate_bias)}
    assert len(network["params"]) + 2 == len(list(module.model.parameters()))


def test_betas_are_drawn_from_the_widened_range(config):
    config = replace(config, margin=(2.0, 4.0))
    assert config.sampled_range == (0.005, 40.0)
    module, _ = module_of(config)
    assert tuple(module.model.beta_range) == (0.01, 10.0)  # eta stays that of the range asked for
    assert (module.betas_of_validation[0], module.betas_of_validation[-1]) == (0.01, 10.0)


def test_gates_by_module_the_most_specific_counts(config):
    config = replace(config, gates={"encoder": "sigmoid", "encoder.mean": "softplus+shift", "decoder": "sqrt+shift"})
    module, _ = module_of(config)
    specs = {entry.name: entry.spec for entry in module.model._entries}
    assert {(specs[name].kind, specs[name].shift) for name in specs if name.startswith("decoder")} == {("sqrt", True)}
    assert (specs["encoder.mean"].kind, specs["encoder.mean"].shift) == ("softplus", True)
    assert (specs["encoder.log_variance"].kind, specs["encoder.log_variance"].shift) == ("sigmoid", False)


def test_weight_power_weighs_each_example(config, monkeypatch):
    module, x = module_of(replace(config, weight_power=0.5))
    beta = torch.logspace(-2, 1, 16)
    monkeypatch.setattr(lightning_module, "sample_beta", lambda *args, **more: beta)
    torch.manual_seed(1)
    loss = module.training_step(x)
    torch.manual_seed(1)
    output = module.model(x, beta=beta)
    distortion = module.model.network.likelihood.distortion(output.parameters, x)
    unweighted = distortion + beta * rate_of(output.mean, output.log_variance)
    torch.testing.assert_close(loss, ((1 + beta).sqrt() * unweighted).mean())
    assert module.epoch_averages.take().loss == pytest.approx(unweighted.mean().item())


def test_range_grows_from_its_low_end(config, monkeypatch):
    module, _ = module_of(replace(config, range_warmup=0.5, margin=(1.0, 2.0)))
    module.steps = 100
    ranges = []
    for step in (0, 24, 49, 99):
        monkeypatch.setattr(TrainingModule, "global_step", step)
        ranges.append(module._range_now())
    low = [low for low, _ in ranges]
    high = [math.log(high / 0.01) / math.log(20 / 0.01) for _, high in ranges]
    assert low == [0.01] * 4
    assert high == pytest.approx([0.02, 0.5, 1.0, 1.0])


def test_recipes_set_what_is_not_given():
    assert TrainConfig().recipe == "ranked" and TrainConfig(network="linear").recipe == "linear"
    paper = TrainConfig(recipe="paper", lr=0.5)
    assert (paper.gates, paper.gate_init, paper.lr) == ({"encoder": "sigmoid", "decoder": "sqrt"}, "paper", 0.5)
    model = build_model(describe(TrainConfig(), (1, 4, 4)))
    assert list(model.inputs) == ["decoder.0"] and "encoder.mean" in model.shifts
    assert model.gate_weight.shape[0] == TrainConfig().gate_degree == 3
    assert (model.gate_weight[0, model.inputs["decoder.0"]] == -4).all() and not model.gate_weight[1:].any()
    affine = build_model(describe(TrainConfig(gate_degree=1), (1, 4, 4)))
    assert affine.gate_weight.shape == affine.gate_bias.shape and paper.gate_degree == 1
    with pytest.raises(ValueError, match="gate_degree is 4; expected one of 1, 2, 3"):
        TrainConfig(gate_degree=4).check()


def test_schedule_warms_up_and_falls_to_the_final_rate(config):
    factor = learning_rate_factor(replace(config, warmup=0.2, schedule="cosine", lr=1e-3, final_lr=1e-5), 100)
    assert [factor(step) for step in (0, 9, 19)] == pytest.approx([0.05, 0.5, 1.0])
    assert factor(20) == 1.0
    assert factor(60) == pytest.approx(0.01 + 0.99 * 0.5)
    assert factor(100) == factor(200) == pytest.approx(0.01)
    assert learning_rate_factor(replace(config, schedule="constant"), 100)(77) == 1.0
    linear = learning_rate_factor(replace(config, schedule="linear", lr=1e-3, final_lr=1e-5), 100)
    assert [linear(step) for step in (0, 70, 85, 100)] == pytest.approx([1.0, 1.0, 0.505, 0.01])


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


def test_same_seed_same_weights_other_seed_others(config, tmp_path):
    first = run(config).model.state_dict()
    second = run(replace(config, out=str(tmp_path / "second"))).model.state_dict()
    third = run(replace(config, out=str(tmp_path / "third"), seed=1)).model.state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["gate_weight"], third["gate_weight"])


def test_every_epoch_visits_every_image_once_in_another_order(config):
    loader = batches(load_split(config, "train"), 16, shuffle=True, seed=0)
    iter(loader)  # Lightning makes iterators that it does not use
    epochs = []
    for epoch in (0, 1):
        loader.set_epoch(epoch)
        epochs.append(torch.cat(list(loader)))
    everything = load_split(config, "train").examples
    assert not torch.equal(*epochs)
    for epoch in epochs:
        assert torch.equal(epoch.flatten(1).sum(1).sort().values, everything.flatten(1).sum(1).sort().values)
    loader.load_state_dict({"epoch": 1, "position": 4})
    assert torch.equal(torch.cat(list(loader)), epochs[1][64:])
    assert len(list(loader)) == len(loader) == 6


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


@pytest.mark.parametrize(
    ("precision", "dtype"), [("bf16-mixed", torch.float32), ("64-true", torch.float64), ("bf16-true", torch.bfloat16)]
)
def test_precisions(config, precision, dtype, monkeypatch):
    seen = []
    step = TrainingModule.training_step

    def look(self, x):
        hook = self.model.network.decoder[0].register_forward_hook(
            lambda layer, x, y: seen.append((layer.weight.dtype, y.dtype))
        )
        loss = step(self, x)
        hook.remove()
        return loss

    monkeypatch.setattr(TrainingModule, "training_step", look)
    result = run(replace(config, precision=precision, epochs=1))
    output = torch.bfloat16 if "bf16" in precision else dtype
    assert set(seen) == {(dtype, output)}
    assert math.isfinite(result.objective)
    assert load_model(config.directory)[0].gate_weight.isfinite().all()


def test_clipping_bounds_the_gradient(config, monkeypatch):
    norms = []

    def record(self, optimizer):
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norms.append(torch.cat([g.flatten() for g in gradients]).norm().item())

    monkeypatch.setattr(TrainingModule, "on_before_optimizer_step", lambda self, optimizer: None)
    monkeypatch.setattr(
        TrainingModule,
        "optimizer_step",
        lambda self, epoch, batch, optimizer, closure: (optimizer.step(closure), record(self, optimizer)),
    )
    run(replace(config, epochs=1, clip=0.5))
    assert max(norms) == pytest.approx(0.5, rel=1e-3)
    norms.clear()
    run(replace(config, epochs=1), force=True)
    assert max(norms) > 1


def test_batch_norm_is_recalibrated_for_validation_and_left_alone(config, tmp_path):
    generator = np.random.default_rng(1)
    np.savez(
        tmp_path / "images.npz",
        train_images=generator.integers(0, 256, (20, 16, 16), dtype=np.uint8),
        test_images=generator.integers(0, 256, (4, 16, 16), dtype=np.uint8),
    )
    config = replace(
        config,
        data=str(tmp_path / "images.npz"),
        network="cnn",
        network_options={"channels": [4, 8]},
        epochs=1,
        batch_size=6,
        beta_range=(0.1, 1.0),
    )
    validated = run(config).model
    other = run(replace(config, out=str(tmp_path / "other"), validate_every=2)).model
    statistics = {name: value for name, value in validated.state_dict().items() if "running_var" in name}
    assert statistics
    for name, value in statistics.items():
        assert torch.equal(value, other.state_dict()[name])


def test_calibration_images_are_the_datasets_own(config):
    data = load_split(replace(config, binarize="dynamic"), "train", anew=True)
    images = calibration_images(data)
    assert len(images) == 81
    assert set(images.unique().tolist()) <= {0.0, 1.0}
    assert torch.equal(images, calibration_images(data))
    assert len(calibration_images(ImageDataset(torch.rand(2500, 1, 1, 1)))) == 2000


def test_dynamic_binarisation_is_for_training_only(config):
    config = replace(config, binarize="dynamic")
    assert load_split(config, "train", anew=True).binarize == "dynamic"
    assert set(load_split(config, "train").examples.unique().tolist()) == {0.0, 1.0}
    assert set(load_split(config, "test").examples.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(load_split(config, "test").examples, load_split(config, "test").examples)


def test_train_on_all_is_the_whole_of_an_undivided_set(config):
    config = replace(config, data="dsprites-generated:1,3,20,16,16", train_on="all", binarize="dynamic", latent=3)
    whole, part = (load_split(replace(config, train_on=name), "train", anew=True) for name in ("all", "train"))
    assert (len(whole), len(part)) == (48, 40) and whole.binarize == "dynamic"
    assert [len(load_split(config, split)) for split in ("validation", "test")] == [4, 4]
    result = run(replace(config, epochs=1, batch_size=12, validate_every=1))
    assert result.steps == 4
    with pytest.raises(DataError, match="split 'all' is for a set that is not divided"):
        run(replace(config, data="digits"), force=True)


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


@pytest.mark.parametrize("name", ["adam", "adamax", "adamw"])
def test_the_optimizer_is_the_one_asked_for(config, name):
    module, _ = module_of(replace(config, optimizer=name, gate_lr_factor=4.0, lr=0.01))
    optimizer = module.configure_optimizers()["optimizer"]
    assert type(optimizer).__name__.lower() == name
    assert [group["initial_lr"] for group in optimizer.param_groups] == [0.01, 0.04]
    assert bool(optimizer.param_groups[0].get("fused")) == (name != "adamax")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beta": -1.0}, r"beta is -1.0; expected a positive KL weight"),
        ({"beta": math.nan}, "beta is nan"),
        ({"beta_range": (1.0, 0.1)}, r"beta_range is \(1.0, 0.1\); expected 0 < LOW < HIGH"),
        ({"beta_range": (0.0, 1.0)}, "beta_range"),
        ({"beta_range": (0.1, math.inf)}, "beta_range"),
        ({"epochs": 0}, "epochs is 0; expected a positive integer"),
        ({"epochs": 1.5}, "epochs is 1.5; expected int"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": 15, "devices": 2}, "batch_size is 15; expected a multiple of 2"),
        ({"lr": 0.0}, "lr is 0.0; expected a positive number"),
        ({"lr": math.nan}, "lr is nan"),
        ({"final_lr": 1.0}, "final_lr is 1.0; expected at most lr"),
        ({"warmup": 1.0}, "warmup is 1.0; expected a part of the run"),
        ({"range_warmup": -0.1}, "range_warmup is -0.1; expected a part of the run"),
        ({"gates": {"encoder": "relu"}}, "gate of encoder is 'relu'; expected one of sigmoid, sqrt, softplus"),
        ({"gates": {"encoder": "sqrt+"}}, r"gate is 'sqrt\+'; after its kind it may have \+shift"),
        ({"gates": {"encoder": "sqrt+ranked"}}, "only sigmoid gates can be ranked"),
        ({"gates": {"encodr": "sqrt"}}, "encodr"),
        ({"sample": "batch"}, "sample is 'batch'"),
        ({"precision": "8"}, "precision is '8'"),
        ({"seed": -1}, "seed is -1"),
        ({"margin": (0.5, 1.0)}, r"margin is \(0.5, 1.0\); expected two factors of at least 1"),
        ({"latent": 0}, "latent is 0; expected a positive integer"),
        ({"log_to": ("wandb",)}, "log_to is 'wandb'"),
        ({"max_time": -1.0}, "max_time is -1.0"),
        ({"network": "mpl"}, "network 'mpl' is not known"),
        ({"network_options": {"hiden": 3}}, "has no option 'hiden'"),
        ({"exclude": ("encoder.nothing",)}, "encoder.nothing"),
        ({"include": ("encoder.nothing",)}, "include names 'encoder.nothing'"),
        ({"optimizer": "sgd"}, "optimizer is 'sgd'; expected one of adam, adamax, adamw"),
        ({"accelerator": "abacus"}, "abacus"),
    ],
)
def test_options_that_make_no_sense_are_named_before_training(config, change, message):
    with pytest.raises(ValueError, match=message):
        run(replace(config, **change))
    assert not (config.directory / "last.ckpt").exists()


def test_unknown_key_of_a_config_file_is_named(config, tmp_path):
    path = tmp_path / "options.json"
    path.write_text(json.dumps({"epochs": 3, "bach_size": 4}))
    with pytest.raises(ValueError, match="unknown option 'bach_size' in .*options.json; did you mean 'batch_size'"):
        TrainConfig.load(path)
    path.write_text('{"epochs": 3, "beta_range": [0.1, 1]}')
    assert TrainConfig.load(path) == TrainConfig(epochs=3, beta_range=(0.1, 1))
    path.write_text('{"epochs": 3,')
    with pytest.raises(ValueError, match="is no JSON"):
        TrainConfig.load(path)
    path.write_text('{"format": "other/1", "config": {}}')
    with pytest.raises(ValueError, match="format 'other/1'; expected 'mrvae-run/1'"):
        TrainConfig.load(path)


def test_config_survives_json(config):
    config = replace(config, exclude=("encoder.mean",), beta_range=(0.1, 3.0), max_time=5.0)
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_resume_may_change_what_no_step_depends_on(config):
    assert changes_of_resume(config, replace(config, epochs=9, patience=3)) == []
    assert changes_of_resume(config, replace(config, lr=1.0, seed=4)) == ["seed", "lr"]


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("1.5m", 90), ("2h30m", 9000), ("1d", 86400), ("1h0.5s", 3600.5)]
)
def test_durations(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "5x", "-3", "1h 2m"])
def test_no_durations(text):
    with pytest.raises(ValueError, match="is no duration"):
        parse_duration(text)


def test_settings_of_networks():
    assert parse_setting("hidden=600,300") == ("hidden", [600, 300])
    assert parse_setting("activation=silu") == ("activation", "silu")
    with pytest.raises(ValueError, match="expected NAME=VALUE"):
        parse_setting("hidden")
    one = build_model(describe(TrainConfig(network_options=dict([parse_setting("hidden=7")])), (1, 4, 4)))
    assert one.network.decoder[0].out_features == 7


def test_progress_without_a_terminal_is_lines_with_everything(config, monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(ProgressLine.__init__, "__defaults__", (0.0, stream))
    train(config)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2 * 6 + 1  # every step, and the end
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
        "--data",
        images,
        "--epochs",
        3,
        "--batch-size",
        16,
        "--set",
        "hidden=12",
        "--latent",
        3,
        "--validate-every",
        2,
        "--log-to",
        "none",
        "--devices",
        2,
        "--strategy",
        "ddp",
        "--accelerator",
        "cpu",
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

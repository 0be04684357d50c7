"""The training module: the loss that it minimises, its optimizer and betas, precision, the data of each epoch."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from mrvae_models import lightning_module
from mrvae_models.data import DataError, ImageDataset, batches
from mrvae_models.lightning_module import TrainingModule, learning_rate_factor
from mrvae_models.objectives import rate as rate_of
from mrvae_models.run import calibration_images, load_model, load_split
from training_cases import module_of, run

import mrvae_kernels as mk


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
    again = draw(16, (0.01, 10.0), sample, sample == "example")  # the noise comes after the betas
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


def test_schedule_warms_up_and_falls_to_the_final_rate(config):
    factor = learning_rate_factor(replace(config, warmup=0.2, schedule="cosine", lr=1e-3, final_lr=1e-5), 100)
    assert [factor(step) for step in (0, 9, 19)] == pytest.approx([0.05, 0.5, 1.0])
    assert factor(20) == 1.0
    assert factor(60) == pytest.approx(0.01 + 0.99 * 0.5)
    assert factor(100) == factor(200) == pytest.approx(0.01)
    assert learning_rate_factor(replace(config, schedule="constant"), 100)(77) == 1.0
    linear = learning_rate_factor(replace(config, schedule="linear", lr=1e-3, final_lr=1e-5), 100)
    assert [linear(step) for step in (0, 70, 85, 100)] == pytest.approx([1.0, 1.0, 0.505, 0.01])


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
    in_order = ImageDataset(torch.linspace(0, 1, 4000).reshape(4000, 1, 1, 1))
    drawn = calibration_images(in_order)
    assert len(drawn) == len(drawn.unique()) == 2000
    assert (drawn < 0.5).float().mean() == pytest.approx(0.5, abs=0.05), "of all of a set that is in order"


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


@pytest.mark.parametrize("name", ["adam", "adamax", "adamw"])
def test_the_optimizer_is_the_one_asked_for(config, name):
    module, _ = module_of(replace(config, optimizer=name, gate_lr_factor=4.0, lr=0.01))
    optimizer = module.configure_optimizers()["optimizer"]
    assert type(optimizer).__name__.lower() == name
    assert [group["initial_lr"] for group in optimizer.param_groups] == [0.01, 0.04]
    assert bool(optimizer.param_groups[0].get("fused")) == (name != "adamax")

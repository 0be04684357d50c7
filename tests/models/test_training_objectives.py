"""train() with the other objectives: what a step minimises, what validation says, resuming, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from mrvae_models import lightning_module
from mrvae_models.checkpoint import read_checkpoint
from mrvae_models.config import TrainConfig
from mrvae_models.curve import measure
from mrvae_models.data import batches
from mrvae_models.lightning_module import TrainingModule
from mrvae_models.preflight import check_objective
from mrvae_models.run import LAST, MODEL, build_model, describe, load_model, load_split
from mrvae_models.total_correlation import decompose
from mrvae_models.training import train
from torch import nn
from training_cases import small


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "images.npz"
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (61, 5, 5), dtype=np.uint8)
    np.savez(path, train_images=images[:49], test_images=images[49:])
    return small(path, tmp_path, epochs=2, batch_size=8, validate_every=1, validation_betas=2, weight_power=0.0)


TCVAE = {"objective": "beta-tcvae", "sample": "step"}


def module_of(config, step=0, steps=100):
    train_set = load_split(config, "train")
    torch.manual_seed(0)
    model = build_model(describe(config, train_set.input_shape))
    module = TrainingModule(model, config, batches(train_set, config.batch_size))
    module.steps = steps
    return module, train_set.examples[:8]


def step_at(monkeypatch, module, x, beta, step=0):
    """The loss of a step with these betas, and the output that it is made of."""
    seen = []
    monkeypatch.setattr(lightning_module, "sample_beta", lambda *args, **more: beta)
    monkeypatch.setattr(TrainingModule, "global_step", property(lambda self: step))
    handle = module.model.register_forward_hook(
        lambda model, args, kwargs, out: seen.append((kwargs, out)), with_kwargs=True
    )
    loss = module.training_step(x)
    handle.remove()
    ((kwargs, output),) = seen
    return loss, output, kwargs


@pytest.mark.parametrize("sampling", ["weighted", "stratified"])
def test_tcvae_step_weighs_the_total_correlation_of_the_batch(config, monkeypatch, sampling):
    module, x = module_of(replace(config, **TCVAE, tcvae_weights=(0.5, 2.0), tcvae_sampling=sampling))
    loss, output, _ = step_at(monkeypatch, module, x, torch.tensor(3.0))
    parts = decompose(output.z, output.mean, output.log_variance, 45, sampling)
    distortion = module.model.network.likelihood.distortion(output.parameters, x)
    expected = (distortion + 0.5 * parts[0] + 3.0 * parts[1] + 2.0 * parts[2]).mean()
    torch.testing.assert_close(loss, expected)
    averages = module.epoch_averages.means()
    assert averages.loss == pytest.approx(expected.item())
    rate = sum(part.mean().item() for part in parts)  # of parts that cancel
    assert averages.rate == pytest.approx(rate, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("beta", [torch.tensor(2.0), torch.logspace(-2, 1, 8)])
def test_annealing_weighs_the_loss_and_gives_the_gates_the_whole_beta(config, monkeypatch, beta):
    module, x = module_of(replace(config, annealing=0.5, weight_power=0.5))
    for step, factor in ((0, 0.0), (25, 0.5), (50, 1.0), (99, 1.0)):
        loss, output, kwargs = step_at(monkeypatch, module, x, beta, step)
        assert torch.equal(kwargs["beta"], beta)
        distortion = module.model.network.likelihood.distortion(output.parameters, x)
        expected = ((1 + beta) ** 0.5 * (distortion + factor * beta * output.rates.sum(1))).mean()
        torch.testing.assert_close(loss, expected)


def test_baseline_of_one_beta_is_annealed_and_has_free_bits(config, monkeypatch):
    module, x = module_of(replace(config, beta=4.0, annealing=1.0, annealing_cycles=2, free_bits=0.3))
    loss, output, _ = step_at(monkeypatch, module, x, None, step=60)  # 10 of 50 steps into the second cycle
    distortion = module.model.likelihood.distortion(output.parameters, x)
    expected = distortion.mean() + 0.2 * 4.0 * output.rates.mean(0).clamp_min(0.3).sum()
    torch.testing.assert_close(loss, expected)


def test_free_bits_over_a_range_compare_prices(config, monkeypatch):
    module, x = module_of(replace(config, free_bits=0.3, weight_power=0.5))
    beta = torch.logspace(-2, 1, 8)
    loss, output, _ = step_at(monkeypatch, module, x, beta)
    weights = (1 + beta) ** 0.5
    distortion = (weights * module.model.network.likelihood.distortion(output.parameters, x)).mean()
    price = weights * beta
    paid = (price[:, None] * output.rates).mean(0)
    torch.testing.assert_close(loss, distortion + paid.clamp_min((0.3 * price.mean()).item()).sum())


@pytest.mark.parametrize(
    "options",
    [
        {**TCVAE, "annealing": 0.5, "checkpoint_every_steps": 2},
        {"free_bits": 0.2, "annealing": 0.5, "annealing_cycles": 2, "checkpoint_every_steps": 2},
    ],
)
def test_resumed_run_ends_with_the_same_bits(config, tmp_path, monkeypatch, options):
    config = replace(config, **options)
    whole = replace(config, out=str(tmp_path / "whole"))
    train(whole, progress=False)
    step = TrainingModule.training_step

    def fail(self, x):
        if self.global_step == 9:
            raise RuntimeError("stopped here")
        return step(self, x)

    monkeypatch.setattr(TrainingModule, "training_step", fail)
    with pytest.raises(RuntimeError, match="stopped here"):
        train(config, progress=False)
    assert read_checkpoint(config.directory / LAST)["global_step"] == 8
    monkeypatch.setattr(TrainingModule, "training_step", step)
    train(config, resume=True, progress=False)
    assert (config.directory / MODEL).read_bytes() == (whole.directory / MODEL).read_bytes()


def test_validation_of_a_tcvae_is_its_objective_within_the_validation_set(config):
    config = replace(config, **TCVAE, tcvae_weights=(0.5, 2.0), epochs=1)
    result = train(config, progress=False)
    model, _ = load_model(result.directory)
    x = load_split(config, "validation").examples
    expected = []
    for beta in (0.01, 10.0):
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad(), model.at(beta):
            distortion = measure(model, x, beta, generator).distortion
            mean, log_variance = model.network.encode(x)
            z = mean + torch.exp(log_variance / 2) * torch.randn(mean.shape, generator=generator)
            parts = decompose(z, mean, log_variance)
        expected.append((distortion + 0.5 * parts[0] + beta * parts[1] + 2.0 * parts[2]).mean().item())
    assert result.objective == pytest.approx(sum(expected) / 2, rel=1e-5)


@pytest.mark.parametrize(("step", "balanced"), [(0, True), (29, False), (60, False)])
def test_the_groups_of_a_hierarchy_are_balanced_while_betas_are_warmed_up(config, monkeypatch, step, balanced):
    tiny = {"channels": 4, "groups": 2, "cells": 1, "process_cells": 1, "regularisation": 0.0}
    gates = {"encoder": "softplus", "decoder": "softplus"}
    config = replace(config, network="nvae", latent=2, network_options=tiny, gates=gates, range_warmup=0.3)
    module, x = module_of(config)
    network = module.model.network
    beta = torch.linspace(0.1, 2.0, len(x))
    loss, output, _ = step_at(monkeypatch, module, x, beta, step)
    rates = output.rates
    priced = rates * network.balance(rates) if balanced else rates
    expected = network.likelihood.distortion(output.parameters, x) + beta * priced.sum(1)
    torch.testing.assert_close(loss, expected.mean())
    assert not torch.allclose(network.balance(rates), torch.ones(rates.shape[1]))


def test_beta_tcvae_draws_one_beta_a_step_unless_told_otherwise():
    assert TrainConfig(objective="beta-tcvae").sample == "step"
    assert TrainConfig(objective="beta-tcvae", beta=2.0, sample="example").check() is None
    assert TrainConfig().sample == "example"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "vae"}, "objective is 'vae'; expected one of beta-vae, beta-tcvae"),
        ({"objective": "beta-tcvae", "sample": "example"}, "sample is 'example'; expected 'step'"),
        ({**TCVAE, "free_bits": 0.1}, "free_bits is 0.1; expected 0 with objective = 'beta-tcvae'"),
        ({**TCVAE, "tcvae_weights": (-1.0, 1.0)}, "tcvae_weights is"),
        ({**TCVAE, "batch_size": 1}, "batch_size is 1; expected 2 examples"),
        ({"tcvae_weights": (0.0, 1.0)}, "tcvae_weights is .*unless objective = 'beta-tcvae'"),
        ({"tcvae_sampling": "stratified"}, "tcvae_sampling is 'stratified'; expected weighted unless"),
        ({"free_bits": -0.1}, "free_bits is -0.1; expected zero or more"),
        ({"annealing": 1.5}, "annealing is 1.5; expected a part of the run"),
        ({"annealing": 0.5, "annealing_cycles": 0}, "annealing_cycles is 0; expected a positive integer"),
        ({"annealing_cycles": 4}, "annealing_cycles is 4; expected 1 without annealing"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**options).check()


def test_network_and_data_that_have_no_total_correlation_are_refused_before_training(config):
    config = replace(config, **TCVAE)
    with pytest.raises(ValueError, match="network 'mlp'; expected a network with one Gaussian latent vector"):
        check_objective(nn.Linear(2, 2), 45, config)
    with pytest.raises(ValueError, match="leave a batch of 1 example"):
        train(replace(config, batch_size=44, tcvae_sampling="stratified"), progress=False)
    assert not config.directory.exists()


def test_annealing_of_a_tcvae_weighs_all_three_parts(config, monkeypatch):
    module, x = module_of(replace(config, **TCVAE, tcvae_weights=(0.5, 2.0), annealing=0.5))
    loss, output, kwargs = step_at(monkeypatch, module, x, torch.tensor(3.0), step=10)
    parts = decompose(output.z, output.mean, output.log_variance, 45)
    distortion = module.model.network.likelihood.distortion(output.parameters, x)
    expected = (distortion + 0.2 * (0.5 * parts[0] + 3.0 * parts[1] + 2.0 * parts[2])).mean()
    torch.testing.assert_close(loss, expected)
    assert kwargs["beta"] == 3.0

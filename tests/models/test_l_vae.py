"""L-VAE: loss and gradients against the formula, the fixed point, forms, collapse, and whole runs."""

from __future__ import annotations

import csv
import json
import math
import warnings
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mrvae_models import checkpoint
from mrvae_models.arguments import parser
from mrvae_models.cli import config_of, main
from mrvae_models.config import TrainConfig
from mrvae_models.l_vae import BOUND, LearnedTerms, LearnedWeights, Scale, learned_weights
from mrvae_models.lightning_module import TrainingModule
from mrvae_models.likelihoods import Bernoulli, Gaussian, GaussianOptimal
from mrvae_models.networks import build
from mrvae_models.preflight import check_objective
from mrvae_models.run import MODEL, build_model, describe, load_model
from mrvae_models.training import train

D = 6


def weights(form="sum", likelihood=None, **options):
    return LearnedWeights(Scale(likelihood or Gaussian(), D, form), **options).double()


def terms(learned, seed=0):
    generator = torch.Generator().manual_seed(seed)
    squares = 4 * torch.rand(5, generator=generator, dtype=torch.float64)
    least = learned.scale.least
    rate = 3 * torch.rand(5, generator=generator, dtype=torch.float64)
    return LearnedTerms(0.5 * squares + least, rate, learned), squares


@pytest.mark.parametrize("form", ["sum", "mean"])
@pytest.mark.parametrize("regulariser", [True, False])
def test_loss_and_gradients_are_the_formula(form, regulariser):
    learned = weights(form, beta=0.3, regulariser=regulariser)
    found, squares = terms(learned)
    loss = found.loss()
    loss.backward()
    reconstruction = (0.5 * squares if form == "sum" else squares / D).mean().item()
    rate = found.rate.mean().item()
    s0, s1 = math.sqrt(0.3), 1.0
    expected = reconstruction / s0**2 + rate / s1**2 + regulariser * (s0**2 + s1**2)
    assert loss.item() == pytest.approx(expected, rel=1e-6)  # log_s starts as a float32
    # dL/ds_i = -2 L_i / s_i^3 + 2 s_i, and of log s_i that times s_i
    slopes = [-2 * reconstruction / s0**2 + regulariser * 2 * s0**2, -2 * rate / s1**2 + regulariser * 2 * s1**2]
    torch.testing.assert_close(learned.log_s.grad.tolist(), slopes, rtol=1e-6, atol=1e-6)


def test_gradcheck():
    learned = weights()
    found, _ = terms(learned)

    def loss(log_s, distortion, rate):
        with torch.no_grad():
            learned.log_s.copy_(log_s)
        return torch.func.functional_call(
            learned, {"log_s": log_s}, (learned.scale.reconstruction(distortion).mean(), rate.mean())
        )

    inputs = (torch.tensor([0.2, -0.4]).double(), found.distortion, found.rate)
    assert torch.autograd.gradcheck(loss, [each.clone().requires_grad_() for each in inputs])


@pytest.mark.parametrize("form", ["sum", "mean"])
def test_descent_ends_where_s4_is_the_loss_and_beta_is_in_the_units_of_d_plus_beta_r(form):
    learned = weights(form)
    found, squares = terms(learned)
    optimizer = torch.optim.Adam(learned.parameters(), lr=0.02)
    for _ in range(1500):
        optimizer.zero_grad()
        found.loss().backward()
        optimizer.step()
    reconstruction = (0.5 * squares if form == "sum" else squares / D).mean().item()
    rate = found.rate.mean().item()
    values = learned.values()
    assert values["s0"] ** 4 == pytest.approx(reconstruction, rel=1e-6)
    assert values["s1"] ** 4 == pytest.approx(rate, rel=1e-6)
    unit = 1 if form == "sum" else D / 2
    assert values["beta"] == pytest.approx(unit * math.sqrt(reconstruction / rate), rel=1e-6)
    assert found.loss().item() == pytest.approx(2 * math.sqrt(reconstruction) + 2 * math.sqrt(rate), rel=1e-9)


def test_the_reconstruction_loss_is_zero_at_a_perfect_one():
    x = torch.rand(3, 1, 2, 3, generator=torch.Generator().manual_seed(0)).double()
    for sigma in (1.0, 0.1):
        own = Gaussian(sigma)
        scale = Scale(own, D, "mean")
        assert scale.reconstruction(own.distortion(x, x)).abs().max() < 1e-9
        off = scale.reconstruction(own.distortion(x + 0.5, x))
        torch.testing.assert_close(off, torch.full((3,), 0.25).double())  # the MSE, whatever sigma is
    bits = (x > 0.5).double()
    assert Scale(Bernoulli(), D, "sum").reconstruction(Bernoulli().distortion(200 * bits - 100, bits)).max() < 1e-9
    with pytest.raises(ValueError, match="'l-vae' and the likelihood GaussianOptimal, a density that has no least"):
        Scale(GaussianOptimal(), D, "sum")
    with pytest.raises(ValueError, match="form of L_R is 'sums'; expected one of sum, mean"):
        Scale(Gaussian(), D, "sums")


def test_without_the_regulariser_the_weights_collapse_and_it_says_so():
    learned = weights(regulariser=False)
    found, _ = terms(learned)
    optimizer = torch.optim.Adam(learned.parameters(), lr=0.1)
    told = []
    for step in range(400):
        optimizer.zero_grad()
        loss = found.loss()
        loss.backward()
        optimizer.step()
        assert math.isfinite(loss.item())
        told += [step] if learned.trouble() else []
    assert loss.item() < 0.01 and told and told[-1] == 399, "and stays so"
    with torch.no_grad():
        learned.log_s.fill_(1e4)
    assert math.isfinite(found.loss().item())
    assert "both weights have collapsed" in learned.trouble() and "leave out --no-lvae-regulariser" in learned.trouble()
    values = learned.values()
    assert math.isfinite(values["beta"]) and values["s0"] == pytest.approx(math.exp(BOUND))


def test_collapsed_posteriors_are_told_of():
    learned = weights()
    assert learned.trouble() is None
    with torch.no_grad():
        learned.log_s[1] = -2.0
    assert "the posteriors have collapsed" in learned.trouble()


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("l-vae")
    generator = np.random.default_rng(0)
    ramp = generator.integers(0, 200, (61, 1, 1)) + 10 * np.arange(5)
    images = (ramp + generator.integers(0, 10, (61, 5, 5))).astype(np.uint8)
    np.savez(folder / "images.npz", train_images=images[:49], test_images=images[49:])
    return TrainConfig(
        data=str(folder / "images.npz"),
        out=str(folder / "run"),
        objective="l-vae",
        likelihood="gaussian",
        epochs=4,
        batch_size=8,
        lr=0.01,
        network_options={"hidden": [12]},
        latent=3,
        validate_every=1,
        log_to=("csv",),
    )


def test_a_run_logs_saves_and_resumes_its_weights_to_the_bit(config, tmp_path, monkeypatch):
    whole = replace(config, out=str(tmp_path / "whole"))
    first = train(whole, progress=False)
    with open(tmp_path / "whole" / "metrics.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    learned = json.loads((tmp_path / "whole" / "config.json").read_text())["learned"]
    assert [row["epoch"] for row in rows] == ["1", "2", "3", "4"]
    assert {name: float(rows[-1][f"train/{name}"]) for name in ("s0", "s1", "beta")} == learned
    assert learned["beta"] == pytest.approx(learned["s0"] ** 2 / learned["s1"] ** 2) and learned["s0"] != 1
    losses = [float(rows[-1][f"validation/{name}/beta=learned"]) for name in ("distortion", "rate")]
    profile = 2 * math.sqrt(losses[0] - 12.5 * math.log(2 * math.pi)) + 2 * math.sqrt(losses[1])
    assert float(rows[-1]["validation/objective"]) == pytest.approx(profile, rel=1e-4)
    model, document = load_model(tmp_path / "whole")
    assert document["model"]["beta"] == learned["beta"] and document["config"]["beta"] == 1.0
    assert first.model.likelihood.sigma == model.likelihood.sigma == 1.0

    stopped = replace(config, out=str(tmp_path / "stopped"))
    saves = []
    save = checkpoint.RunCheckpoint._save

    def cut(self, trainer, name):
        save(self, trainer, name)
        saves.append(name)
        if saves.count("last.ckpt") == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.RunCheckpoint, "_save", cut)
    with pytest.raises(KeyboardInterrupt):
        train(stopped, progress=False)
    monkeypatch.undo()
    train(stopped, resume=True, progress=False)
    assert (tmp_path / "stopped" / MODEL).read_bytes() == (tmp_path / "whole" / MODEL).read_bytes()
    assert json.loads((tmp_path / "stopped" / "config.json").read_text())["learned"] == learned
    train(stopped, resume=True, progress=False)  # of a finished run nothing changes
    assert (tmp_path / "stopped" / MODEL).read_bytes() == (tmp_path / "whole" / MODEL).read_bytes()


def test_a_run_without_the_regulariser_warns_once(config, tmp_path):
    ablation = replace(config, out=str(tmp_path / "run"), lvae_regulariser=False, lr=0.05)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = train(ablation, progress=False)
    assert sum("both weights have collapsed" in str(each.message) for each in caught) == 1
    assert all(parameter.isfinite().all() for parameter in result.model.parameters())


def test_the_weights_are_in_the_optimiser_with_a_learning_rate_of_their_own(config):
    model = build_model(describe(config, (1, 5, 5)))
    module = TrainingModule(model, replace(config, sigma_lr_factor=3.0), [])
    module.steps = 10
    module._can_fuse = lambda: False
    groups = module.configure_optimizers()["optimizer"].param_groups
    assert [len(group["params"]) for group in groups] == [len(list(model.parameters())), 1]
    assert groups[1]["params"][0] is module.learned.log_s
    assert groups[1]["initial_lr"] == pytest.approx(3 * groups[0]["initial_lr"])


@pytest.mark.parametrize("objective", ["l-vae", "sigma-vae"])
def test_decay_of_the_weights_leaves_learned_sigmas_alone(config, objective):
    likelihood = {"l-vae": "gaussian", "sigma-vae": "gaussian-shared"}[objective]
    ours = replace(config, objective=objective, likelihood=likelihood, optimizer="adamw", beta=1.0)
    model = build_model(describe(ours, (1, 5, 5)))
    module = TrainingModule(model, ours, [])
    module.steps = 10
    module._can_fuse = lambda: False
    optimizer = module.configure_optimizers()["optimizer"]
    sigma = module.learned.log_s if objective == "l-vae" else model.likelihood.scale.log_sigma
    with torch.no_grad():
        sigma.fill_(-2.0)
    weight = model.encoder.mean.weight
    before = weight.detach().clone()
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert (sigma == -2.0).all() and not torch.equal(weight, before)


def test_validation_of_a_rate_of_single_draws_below_zero_is_finite(config, monkeypatch):
    module = TrainingModule(build_model(describe(config, (1, 5, 5))), config, [])
    module.trainer = SimpleNamespace(
        strategy=SimpleNamespace(reduce=lambda sums, reduce_op: sums), current_epoch=0, fit_loop=None
    )
    logged = {}
    monkeypatch.setattr(module, "log_dict", logged.update)
    module._validation = [torch.tensor([[2 * 9.0, 2 * 11.0, 2 * -0.1, 2.0]], dtype=torch.float64)]
    module.on_validation_epoch_end()
    assert logged["validation/objective"] == 6.0 and logged["validation/rate/beta=learned"] == pytest.approx(-0.1)


def test_a_network_in_half_precision_learns_its_weights_in_float32():
    weights = LearnedWeights(Scale(Gaussian(), 4, "sum")).bfloat16()
    assert weights.log_s.dtype == torch.float32
    optimizer = torch.optim.Adam(weights.parameters(), lr=1e-3)
    for _ in range(4000):
        optimizer.zero_grad()
        weights(torch.tensor(40.0), torch.tensor(8.0)).backward()
        optimizer.step()
    assert weights.values()["beta"] == pytest.approx(math.sqrt(5), rel=1e-2)


def test_options_go_together(config, tmp_path, capsys):
    chosen = TrainConfig(objective="l-vae", network="sigma-cnn")
    assert (chosen.beta, chosen.likelihood) == (1.0, "gaussian")
    assert TrainConfig(objective="sigma-vae").likelihood == "gaussian-optimal"
    assert TrainConfig(objective="bs-vae", network="sigma-cnn").likelihood == "gaussian-image"
    assert TrainConfig(objective="bs-vae").beta is None, "a BS-VAE has a beta, or a range of them"
    for options, message in (
        (dict(objective="l-vae", beta_range=(0.1, 1.0)), r"beta_range is \(0.1, 1.0\); expected none with objective"),
        (dict(objective="l-vae", free_bits=1.0), "free_bits is 1.0; expected 0 with objective = 'l-vae'"),
        (dict(objective="sigma-vae", beta=2.0), "beta is 2.0; expected 1 with objective = 'sigma-vae'"),
        (dict(objective="sigma-vae", likelihood="bernoulli"), "likelihood is 'bernoulli'; expected gaussian-"),
        (dict(lvae_form="mean"), "lvae_form is 'mean'; expected sum unless objective = 'l-vae'"),
    ):
        with pytest.raises(ValueError, match=message):
            TrainConfig(**options).check()
    gated = build_model(describe(TrainConfig(network_options={"hidden": [4]}), (1, 5, 5)))
    with pytest.raises(ValueError, match="objective is 'l-vae' and the network has gates"):
        check_objective(gated, 10, TrainConfig(objective="l-vae"))
    plain = build("mlp", (4,), 2, likelihood="gaussian-optimal")
    with pytest.raises(ValueError, match="no least distortion"):
        learned_weights(TrainConfig(objective="l-vae"), plain)
    sentences = build("lstm", (9, 14), latent=2, embedding=3, hidden=4)
    with pytest.raises(ValueError, match="lvae_form is 'mean' and the data are sentences, which differ in length"):
        learned_weights(TrainConfig(objective="l-vae", lvae_form="mean"), sentences)
    assert learned_weights(TrainConfig(objective="l-vae"), sentences).scale.unit == 1
    arguments = ["train", "--data", config.data, "--out", str(tmp_path / "new"), "--objective", "l-vae"]
    assert main([*arguments, "--beta-range", "0.1", "1"]) == 2
    assert "of which a multi-rate network has no single one" in capsys.readouterr().err
    with pytest.warns(UserWarning, match="--objective l-vae trains one network without gates"):
        config_of(parser().parse_args([*arguments, "--margin", "1", "1"]))

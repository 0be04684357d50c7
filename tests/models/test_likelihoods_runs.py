"""Each likelihood in a run: trained plain and multi-rate, resumed, evaluated and baked."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from mrvae_models.baking import bake_run
from mrvae_models.checkpoint import CheckpointError
from mrvae_models.cli import main
from mrvae_models.config import TrainConfig
from mrvae_models.curve import evaluate
from mrvae_models.likelihood_names import LIKELIHOOD_NAMES
from mrvae_models.metrics import bound
from mrvae_models.networks import NETWORKS, build
from mrvae_models.operating import landing
from mrvae_models.pictures import pictures
from mrvae_models.run import load_model, load_split
from mrvae_models.scored import squared_errors
from mrvae_models.training import train

import mrvae_kernels as mk

OF_BETA = ("gaussian-shared", "gaussian-optimal", "gaussian-image", "discretized-gaussian")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Coloured bars: 48 training and 12 test images of 3x5x5, 8-bit."""
    path = tmp_path_factory.mktemp("data") / "bars.npz"
    generator = np.random.default_rng(0)
    rows = generator.integers(0, 5, (60, 1, 1, 1))
    bars = np.exp(-((np.arange(5)[None, None, :, None] - rows) ** 2) / 2) * np.ones((1, 3, 1, 5))
    bars = (255 * bars * generator.uniform(0.5, 1, (60, 3, 1, 1))).astype(np.uint8)
    np.savez(path, train_images=bars[:48], test_images=bars[48:])
    return path


@pytest.fixture
def config(images, tmp_path):
    return TrainConfig(
        data=str(images), out=str(tmp_path / "run"), layout="NCHW", epochs=2, batch_size=16, latent=3,
        network_options={"hidden": [8]}, validate_every=2, validation_betas=2, log_to=(), schedule="constant",
    )


@pytest.mark.parametrize("beta", [None, 0.5])
@pytest.mark.parametrize("name", LIKELIHOOD_NAMES)
def test_each_trains_plain_and_multi_rate(config, name, beta):
    result = train(replace(config, likelihood=name, beta=beta), progress=False)
    assert np.isfinite(result.objective)
    model, document = load_model(result.directory)
    network = model.network if beta is None else model
    assert isinstance(model, mk.MultiRate) == (beta is None) and network.likelihood.name == name
    assert ("sigma_range" in document["model"]) == (beta is None and name in (*OF_BETA, "discretized-logistic"))
    assert network.likelihood.depends_on_beta == ("sigma_range" in document["model"])
    test_set = load_split(config, "test")
    betas = [0.01, 10.0] if beta is None else [0.5]
    curve = evaluate(model, test_set, betas)
    again = evaluate(result.model, test_set, betas)
    assert [p.distortion for p in curve.points] == [p.distortion for p in again.points]  # saved to the bit
    assert all(np.isfinite(p.distortion) for p in curve.points)
    made = pictures(model, test_set, betas, count=4)
    assert made.samples.shape == (len(betas), 4, 3, 5, 5)
    if not name.startswith(("gaussian", "student")):
        assert made.samples.min() >= 0 and made.samples.max() <= 1


@pytest.mark.parametrize("name", ["gaussian-shared", "gaussian-optimal", "discretized-logistic"])
@pytest.mark.parametrize("beta", [None, 0.5])
def test_parameters_and_averages_are_learned_and_resumed(config, name, beta):
    whole = train(replace(config, likelihood=name, beta=beta), progress=False)
    config = replace(config, likelihood=name, beta=beta, out=str(whole.directory) + "-resumed")
    train(replace(config, epochs=1), progress=False)
    resumed = train(config, resume=True, progress=False)
    for (key, value), other in zip(whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True):
        assert torch.equal(value, other) if torch.is_tensor(value) else value == other, key
    fresh = build("mlp", (3, 5, 5), 3, hidden=(8,), likelihood=name).likelihood.state_dict()
    network = whole.model.network if beta is None else whole.model
    learned = network.likelihood.state_dict()
    assert set(learned) == set(fresh) and learned
    for key, value in learned.items():
        assert not torch.isclose(value, fresh[key].expand_as(value)).any(), key


@pytest.mark.parametrize("name", ["gaussian-shared", "gaussian-optimal", "logistic-mixture"])
def test_baking_keeps_the_sigma_of_its_beta(config, name):
    options = {"components": 2} if name == "logistic-mixture" else {}
    run = train(replace(config, likelihood=name, likelihood_options=options), progress=False).directory
    model, _ = load_model(run)
    baked = bake_run(run, 0.3)
    plain, document = load_model(baked.directory)
    assert not plain.likelihood.depends_on_beta and "sigma_range" not in document["model"]
    if name.startswith("gaussian") and name != "gaussian-pixel":
        assert plain.likelihood.sigma == pytest.approx(model.network.likelihood.sigma_at(0.3).item(), rel=1e-6)
    test_set = load_split(config, "test")
    (one,), (other,) = (evaluate(m, test_set, [0.3]).points for m in (plain, model))
    assert one.distortion == pytest.approx(other.distortion, rel=1e-4, abs=1e-3)
    program = torch.export.load(baked.directory / "decoder.pt2").module()
    assert program(torch.zeros(7, 3)).shape == (7, 3, 5, 5)


def test_command_line_from_training_to_a_baked_network(images, tmp_path, capsys):
    run = tmp_path / "run"
    common = ["--data", str(images), "--layout", "NCHW", "--out", str(run), "--epochs", "1", "--quiet"]
    more = ["--likelihood", "gaussian-shared", "--sigma", "0.2", "--likelihood-set", "knots=3", "--set", "hidden=8"]
    assert main(["train", *common, *more, "--latent", "2"]) == 0
    model, document = load_model(run)
    assert document["model"]["likelihood_options"] == {"knots": 3}
    assert model.network.likelihood.scale.log_sigma.shape == (3,)
    assert document["model"]["sigma_range"] == [0.005, 15.0]  # all that the recipe draws from
    assert main(["bake", "--run", str(run), "--beta", "1", "--out", str(tmp_path / "one")]) == 0
    compared = ["--compare", str(tmp_path / "one"), "--no-images"]
    assert main(["curve", "--run", str(run), "--betas", "0.1", "1", *compared]) == 0  # one likelihood, by its repr
    capsys.readouterr()
    assert main(["select", "--run", str(run), "--elbo", "--grid", "3", "--resamples", "0"]) == 0
    assert main(["train", *common, "--force", "--likelihood", "bitwise", "--likelihood-set", "knots=3"]) == 2
    assert "'knots'" in capsys.readouterr().err
    assert main(["train", *common, "--force", "--likelihood", "bitwise", "--sigma", "1"]) == 2
    assert "sigma is 1.0" in capsys.readouterr().err


def test_training_on_data_of_another_measure_is_refused(config, tmp_path):
    path = tmp_path / "real.npy"
    np.save(path, np.random.default_rng(0).random((40, 5, 5), dtype=np.float32))
    with pytest.raises(ValueError, match="of a level.*categorical"):
        train(replace(config, data=str(path), layout=None, likelihood="categorical"), progress=False)
    with pytest.warns(UserWarning, match="0 and 1 only"):
        drawn = replace(config, data=str(path), layout=None, likelihood="bitwise", binarize="dynamic", epochs=1)
        train(drawn, progress=False)  # what the network sees is 0 and 1
    limited = replace(config, likelihood="categorical", likelihood_options={"memory_limit": 1e-4}, out=None)
    with pytest.raises(ValueError, match="memory_limit"):
        train(replace(limited, out=str(tmp_path / "limited")), progress=False)
    assert not (tmp_path / "limited").exists()


def test_bound_of_a_likelihood_that_is_no_density_is_refused(config):
    network = build("mlp", (3, 5, 5), 2, hidden=(4,), likelihood="gaussian-image")
    with pytest.raises(ValueError, match="gaussian-image makes its sigma of x"):
        bound.log_likelihoods(network, load_split(config, "test"), 1.0, draws=2)


def test_decoding_in_parts_gives_the_same_distortion(config, monkeypatch):
    from mrvae_models import curve

    torch.manual_seed(0)
    network = build("mlp", (3, 5, 5), 2, hidden=(4,), likelihood="categorical")
    data = load_split(config, "test")
    whole = evaluate(network, data, [1.0]).points[0]
    monkeypatch.setattr(curve, "DECODED", 5 * 75 * 256)
    parts = evaluate(network, data, [1.0]).points[0]
    assert parts.distortion == pytest.approx(whole.distortion, rel=1e-6) and parts.rate == whole.rate


@pytest.mark.parametrize("name", ["gaussian-pixel", "categorical", "logistic-mixture"])
@pytest.mark.parametrize("network", [name for name in NETWORKS if name not in ("lstm", "linear")])
def test_every_network_makes_the_numbers_that_a_likelihood_takes(network, name):
    shape = (4, 3, 64, 64) if network == "svg-lp" else (3, 64, 64)
    options = {"channels": 4, "groups": 2, "cells": 1, "process_cells": 1} if network == "nvae" else {}
    with torch.device("meta"):
        vae = build(network, shape, 4, likelihood=name, **options)
        channels, *rest = vae.likelihood.parameter_shape(shape[-3:])
        frames = [shape[0] - 1] if network == "svg-lp" else []  # those that a video's first is the condition of
        assert vae(torch.zeros(2, *shape)).parameters.shape == (2, channels, *frames, *rest)


def test_a_linear_vae_has_one_number_a_value():
    assert build("linear", (6,), 2, likelihood="gaussian-optimal").likelihood.name == "gaussian-optimal"
    with pytest.raises(ValueError, match="gaussian-pixel.*linear VAE makes one a value"):
        build("linear", (6,), 2, likelihood="gaussian-pixel")


def test_options_of_a_likelihood_go_with_its_name():
    network = build("mlp", (4,), likelihood="logistic-mixture", likelihood_options={"components": 2})
    assert network.likelihood.components == 2
    with pytest.raises(ValueError, match="likelihood_options.*need a likelihood's name"):
        build("mlp", (4,), likelihood_options={"components": 2})


@pytest.mark.parametrize("name", ["gaussian-shared", "gaussian-optimal", "gaussian-image"])
def test_sigma_from_validation_is_the_likeliest_there(config, name, tmp_path):
    config = replace(config, likelihood=name, beta=0.7, epochs=6, keep="best")
    learned = train(config, progress=False)
    measured = replace(config, sigma_from="validation", out=str(tmp_path / "measured"))
    result = train(measured, progress=False)
    model, document = load_model(result.directory)
    sigma = model.likelihood.sigma
    errors = squared_errors(model, load_split(config, "validation"), 0.7).distortion
    assert sigma == result.model.likelihood.sigma == pytest.approx(errors.mean().sqrt().item(), rel=1e-6)
    assert document["learned"]["sigma"] == pytest.approx(landing(result.directory).variance ** 0.5)
    assert abs(np.log(sigma / document["learned"]["sigma"])) > 0.01
    assert "learned" not in load_model(learned.directory)[1]
    before, at, beyond = (objective_of(model, config, factor) for factor in (0.9, 1.0, 1.1))
    assert result.objective == pytest.approx(at, rel=0.02)  # another draw of z
    assert name == "gaussian-image" or at < min(before, beyond)
    with pytest.raises(CheckpointError, match="sigma_from"):
        train(replace(measured, sigma_from="training"), resume=True, progress=False)


def objective_of(model, config, factor):
    """D + beta R on the validation split at so many times the sigma that there is; sigma is put back."""
    validation = load_split(config, "validation")
    sigma = model.likelihood.sigma
    model.likelihood.set_sigma(factor * sigma)
    (point,) = evaluate(model, validation, [0.7]).points
    model.likelihood.set_sigma(sigma)
    return point.objective


REFUSED = {
    "a fixed sigma": ({"likelihood": "gaussian", "beta": 1.0}, "with likelihood = 'gaussian'"),
    "the network's likelihood": ({"beta": 1.0}, "with likelihood = None"),
    "l-vae": ({"objective": "l-vae"}, "with likelihood = None"),
    "a sigma a pixel": ({"objective": "sigma-vae", "likelihood": "gaussian-pixel"}, "likelihood = 'gaussian-pixel'"),
    "many betas": ({"likelihood": "gaussian-shared"}, "without a beta"),
    "no validation apart": ({"objective": "sigma-vae", "train_on": "all"}, "with train_on = 'all'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_sigma_from_validation_is_refused_where_there_is_no_one_sigma(config, case):
    options, why = REFUSED[case]
    with pytest.raises(ValueError, match=f"sigma_from is 'validation'; expected 'training'.*{why}"):
        replace(config, sigma_from="validation", **options).check()


def test_distortions_at_the_likeliest_sigma():
    likelihood = build("mlp", (3, 5, 5), 3, likelihood="gaussian-shared").likelihood
    x, mean = torch.rand(2, 20, 3, 5, 5, dtype=torch.float64)
    likelihood.set_sigma(0.3)
    moved = likelihood.at_likeliest(likelihood.distortion(mean, x).mean(), 75)
    likelihood.set_sigma((x - mean).square().mean().sqrt().item())
    torch.testing.assert_close(moved, likelihood.distortion(mean, x).mean(), rtol=1e-5, atol=1e-5)
    image = build("mlp", (3, 5, 5), 3, likelihood="gaussian-image").likelihood.eval()
    own = image.distortion(mean, x).mean()
    assert image.at_likeliest(own, 75) is own and own < moved


def test_set_sigma_is_one_positive_number_of_a_likelihood_with_one_sigma(config):
    for name in ("gaussian-shared", "gaussian-optimal", "gaussian-image"):
        one, many = (build("mlp", (3, 5, 5), 3, likelihood=name, likelihood_options=options).likelihood
                     for options in ({}, {"beta_range": (0.1, 1.0)}))  # fmt: skip
        for sigma in (0.05, 3.0):
            one.set_sigma(sigma)
            assert one.sigma == pytest.approx(sigma, rel=1e-5)
        one.set_sigma(1e-30)
        least = one.scale.minimum if name == "gaussian-shared" else one.min_log_sigma
        assert one.sigma == pytest.approx(np.exp(least), rel=1e-4)
        for sigma in (0.0, -1.0, float("nan"), float("inf")):
            with pytest.raises(ValueError, match=f"sigma is {sigma}; expected a positive, finite"):
                one.set_sigma(sigma)
        with pytest.raises(ValueError, match="a function of beta here"):
            many.set_sigma(0.1)

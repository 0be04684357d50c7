"""The curve: its numbers against their definitions, its files, and baking."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mrvae_models import baking
from mrvae_models.baking import bake_run
from mrvae_models.config import TrainConfig
from mrvae_models.curve import (
    Curve,
    Point,
    active_units,
    calibrated,
    calibration_batches,
    evaluate,
    log_spaced,
    recalibration_noise,
    round_betas,
)
from mrvae_models.networks import build
from mrvae_models.report import _same_source, report
from mrvae_models.run import build_model, describe, load_model, save_model, write_config

import mrvae_kernels as mk

BETAS = [0.01, 0.3, 10.0]


def images(n=40, shape=(1, 5, 5), seed=0):
    return SimpleNamespace(examples=torch.rand(n, *shape, generator=torch.Generator().manual_seed(seed)))


def multirate(name="mlp", shape=(1, 5, 5), **options):
    torch.manual_seed(0)
    return mk.multirate(build(name, shape, 4, **({"hidden": (12,)} if name == "mlp" else {}), **options))


@pytest.fixture
def model():
    return multirate()


def test_points_are_means_and_standard_errors_of_their_definitions(model):
    data = images()
    curve = evaluate(model, data, BETAS, batch_size=64, samples=3, seed=7)
    for point in curve.points:
        noise = torch.randn((3, 40, 4), generator=torch.Generator().manual_seed(7 * 1_000_003))
        with torch.no_grad(), model.at(point.beta):
            mean, log_variance = model.network.encode(data.examples)
            logits = [model.network.decode(mean + (log_variance / 2).exp() * draw) for draw in noise]
        p = torch.sigmoid(torch.stack(logits).double())
        x = data.examples.double()
        distortion = -(x * p.log() + (1 - x) * (1 - p).log()).sum((2, 3, 4)).mean(0)
        rate = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).sum(1).double()
        for value, error, per_example in (
            (point.rate, point.rate_se, rate),
            (point.distortion, point.distortion_se, distortion),
            (point.elbo, point.elbo_se, -(distortion + rate)),
            (point.objective, point.objective_se, distortion + point.beta * rate),
        ):
            assert value == pytest.approx(per_example.mean().item(), rel=1e-5)
            assert error == pytest.approx(per_example.std().item() / math.sqrt(40), rel=1e-3)


def test_batch_size_changes_only_the_noise_and_order_of_betas_nothing(model):
    data = images(300)
    first = evaluate(model, data, [10.0, 0.01])
    second = evaluate(model, data, [0.01, 0.3, 10.0])
    assert [p.beta for p in first.points] == [0.01, 10.0]
    assert first.points[0] == second.points[0]
    assert first.points[1] == second.points[2]
    other = evaluate(model, data, [0.01], batch_size=32).points[0]
    assert other.rate == pytest.approx(first.points[0].rate, rel=1e-6)
    assert abs(other.distortion - first.points[0].distortion) < 0.2


def test_noise_is_the_same_at_every_beta():
    """With gates that do not depend on beta the curve is flat to the bit."""
    model = multirate()
    with torch.no_grad():
        model.gate_weight.zero_()
    low, middle, high = evaluate(model, images(), BETAS).points
    assert low.distortion == middle.distortion == high.distortion
    assert low.rate == high.rate


def test_more_samples_of_z_estimate_the_same_distortion(model):
    data = images(200)
    one, many = (evaluate(model, data, [0.3], samples=k).points[0] for k in (1, 50))
    assert many.rate == one.rate
    assert abs(many.distortion - one.distortion) < 4 * one.distortion_se


def test_active_units_follow_burda_et_al():
    generator = torch.Generator().manual_seed(0)
    scales = torch.tensor([0.0, 0.05, 0.09, 0.11, 0.5, 2.0])  # active above 0.1, the root of 0.01
    count, error = active_units(1000 + scales * torch.randn(5000, 6, generator=generator))
    assert count == 3
    assert error < 0.1
    borderline = 0.1 * torch.randn(500, 40, generator=generator)
    count, error = active_units(borderline)
    assert 0 < count < 40
    assert 1 < error < 6  # 40 units at the threshold: about sqrt(40 / 4)
    assert active_units(torch.ones(1, 3)) == (0, 0.0)


def test_training_mode_and_weights_are_left_as_they_were(model):
    model.train()
    model.network.decoder.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    evaluate(model, images(), BETAS)
    assert model.training
    assert not model.network.decoder.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_plain_model_is_one_point():
    torch.manual_seed(0)
    plain = build("mlp", (1, 5, 5), 4, hidden=(12,))
    (point,) = evaluate(plain, images(), [0.5]).points
    assert point.objective == pytest.approx(point.distortion + 0.5 * point.rate)
    with pytest.raises(ValueError, match="2 betas for a plain model"):
        evaluate(plain, images(), [0.5, 1.0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"betas": []}, "no betas given"),
        ({"betas": [0.0]}, "beta is 0.0; expected a positive"),
        ({"betas": [math.nan]}, "beta is nan"),
        ({"dataset": images(0)}, "the dataset is empty"),
        ({"samples": 0}, "samples 0; expected positive"),
        ({"dataset": images(3, (1, 4, 4))}, r"x has shape \(3, 1, 4, 4\)"),
    ],
)
def test_wrong_arguments(model, change, message):
    with pytest.raises(ValueError, match=message):
        evaluate(**{"model": model, "dataset": images(), "betas": BETAS, **change})


def test_batch_norm_needs_calibration_and_gets_it_for_each_beta():
    shape = (1, 16, 16)
    model = multirate("cnn", shape, channels=(4, 8))
    data, train = images(20, shape), images(30, shape, seed=1).examples
    with pytest.raises(ValueError, match="the network has norms whose running.*pass calibration="):
        evaluate(model, data, BETAS)
    before = {name: value.clone() for name, value in model.named_buffers()}
    points = evaluate(model, data, [0.3], calibration=train).points
    assert all(torch.equal(before[name], value) for name, value in model.named_buffers())
    with calibrated(model, train, 0.3):
        assert any(not torch.equal(before[name], value) for name, value in model.named_buffers())
    with recalibration_noise(torch.device("cpu")):
        baked = evaluate(mk.bake(model, 0.3, [train]), data, [0.3]).points
    assert points[0].distortion == pytest.approx(baked[0].distortion, rel=1e-5)
    assert points[0].rate == pytest.approx(baked[0].rate, rel=1e-4)


@pytest.mark.parametrize(("n", "parts"), [(501, [251, 250]), (1000, [500, 500]), (1001, [334, 334, 333]), (3, [3])])
def test_calibration_batches_are_even(n, parts):
    assert [len(part) for part in calibration_batches(torch.zeros(n, 1))] == parts


def test_calibration_with_one_image_over(tmp_path):
    run = saved_run(tmp_path / "run", network="cnn", network_options={"channels": [4, 4, 4, 4]})  # maps of 1x1 inside
    calibration = torch.rand(501, 1, 28, 28)
    model, _ = load_model(run)
    with calibrated(model, calibration, 0.5):
        measured = next(value for name, value in model.named_buffers() if name.endswith("running_mean")).clone()
    bake_run(run, 0.5, calibration=calibration)
    convolution = next(module for module in model.modules() if isinstance(module, torch.nn.Conv2d))
    with torch.no_grad():
        exact = convolution(calibration).mean((0, 2, 3))
    torch.testing.assert_close(measured, exact, rtol=1e-3, atol=1e-3)


def test_betas():
    assert round_betas(0.01, 10) == [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10]
    assert round_betas(0.03, 0.9) == [0.03, 0.05, 0.1, 0.2, 0.5, 0.9]
    assert round_betas(1, 2) == log_spaced(1, 2, 10)
    spaced = log_spaced(0.01, 10, 7)
    assert (spaced[0], spaced[-1], len(spaced)) == (0.01, 10, 7)
    assert np.diff(np.log(spaced)) == pytest.approx(np.log(1000) / 6, rel=1e-4)
    assert log_spaced(0.01, 1, 1) == pytest.approx([0.1])


def test_files_hold_every_digit_and_where_they_come_from(model, tmp_path):
    curve = evaluate(model, images(), BETAS, seed=5, about={"run": "runs/x"})
    curve.write_csv(tmp_path / "curve.csv")
    curve.write_json(tmp_path / "curve.json")
    with open(tmp_path / "curve.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["objective"]) for row in rows] == curve.column("objective")
    of_text = {"nats_per_token", "perplexity"}
    assert list(rows[0]) == [name for name in Point.__dataclass_fields__ if name not in of_text]
    document = json.loads((tmp_path / "curve.json").read_text())
    assert document["about"]["versions"]["torch"] == torch.__version__
    assert document["about"]["evaluation"] == {"examples": 40, "samples": 1, "seed": 5, "calibration_examples": 0}
    assert Curve.read_json(tmp_path / "curve.json").points == curve.points
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match="holds no curve"):
        Curve.read_json(tmp_path / "other.json")


def saved_run(directory: Path, **options) -> Path:
    """A run's directory around an untrained model."""
    config = TrainConfig(**{"out": str(directory), "network_options": {"hidden": [12]}, "latent": 3, **options})
    torch.manual_seed(0)
    description = describe(config, (1, 28, 28))
    write_config(directory, description, config=config.to_dict())
    save_model(directory, build_model(description), description)
    return directory


def test_report_of_a_run_with_runs_to_compare(tmp_path):
    run = saved_run(tmp_path / "run")
    single = saved_run(tmp_path / "single", beta=0.1)
    bake_run(run, 1.0, tmp_path / "baked")
    curve, files = report(run, compare=[single, tmp_path / "baked"], out=tmp_path / "report")
    assert curve.column("beta") == [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10]
    assert [path.name for path in files] == ["curve.csv", "curve.json", "curve.png"]
    assert all(path.stat().st_size > 0 for path in files)
    about = json.loads(files[1].read_text())["about"]
    assert about["evaluation"]["examples"] == 1000
    assert about["config"]["latent"] == 3
    alone, _ = report(tmp_path / "baked", images=False)
    assert alone.column("beta") == [1.0]
    assert alone.points[0].objective == pytest.approx(curve.points[6].objective, rel=1e-5)
    with pytest.raises(ValueError, match="has gates; --compare takes runs at one beta"):
        report(single, compare=[run], out=tmp_path / "wrong")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"likelihood": "gaussian", "sigma": 0.5}, r"likelihood is Gaussian\(sigma=0.5\) there and Bernoulli\(\) here"),
        ({"binarize": "fixed"}, "binarize is fixed there and none here"),
        ({"data": "other.npz"}, "data is other.npz there and digits here"),
    ],
)
def test_runs_that_cannot_be_compared_are_refused(tmp_path, options, message):
    run = saved_run(tmp_path / "run", binarize="none")
    single = saved_run(tmp_path / "single", **{"beta": 0.1, "binarize": "none", **options})
    with pytest.raises(ValueError, match=f"no curve in common: {message}"):
        report(run, betas=[1.0], compare=[single], out=tmp_path / "report")


def test_one_file_by_two_paths_is_the_same_data(tmp_path):
    (tmp_path / "data.npz").write_text("")
    assert _same_source(str(tmp_path / "data.npz"), str(tmp_path / "." / ".." / tmp_path.name / "data.npz"))


def test_baked_files_agree_with_the_gated_model(tmp_path):
    run = saved_run(tmp_path / "run", gates={"encoder": "sigmoid", "decoder": "softplus+shift"})
    baked = bake_run(run, 0.5)
    assert baked.directory == run / "baked-0.5"
    assert baked.difference <= 1e-6
    plain, document = load_model(baked.directory)
    assert not any("gate" in name for name, _ in plain.named_parameters())
    assert {type(m) for m in plain.modules()} == {type(m) for m in build("mlp", (1, 28, 28), 3, hidden=(12,)).modules()}
    assert document["model"]["beta"] == document["baked"]["beta"] == 0.5
    gated, _ = load_model(run)
    program, decoder = (torch.export.load(baked.directory / name).module() for name in ("model.pt2", "decoder.pt2"))
    for n in (1, 2, 33):
        x, z = torch.rand(n, 1, 28, 28), torch.randn(n, 3)
        with torch.no_grad(), gated.at(0.5):
            mean, log_variance = gated.network.encode(x)
            expected = torch.sigmoid(gated.network.decode(mean)), mean, log_variance
            image = torch.sigmoid(gated.network.decode(z))
        for found, wanted in zip((*program(x), decoder(z)), (*expected, image), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    with pytest.raises(FileExistsError, match="holds a model already.*--force"):
        bake_run(run, 0.5)
    bake_run(run, 0.5, force=True)


@pytest.mark.parametrize("choices", [{}, {"norms": "conditional", "gated": "paper"}])
def test_baking_a_network_with_batch_norm_uses_the_calibration(tmp_path, choices):
    run = saved_run(tmp_path / "run", network="cnn", network_options={"channels": [4, 8]}, **choices)
    calibration = torch.rand(40, 1, 28, 28)
    assert bake_run(run, 0.5, calibration=calibration).difference <= 1e-5
    assert not set(choices) & set(load_model(run / "baked-0.5")[1]["model"])


def test_a_baked_model_that_differs_is_reported(tmp_path, monkeypatch):
    run = saved_run(tmp_path / "run")
    bake = mk.bake
    monkeypatch.setattr(baking.mk, "bake", lambda model, beta, batches: bake(model, 2 * beta))
    with pytest.raises(RuntimeError, match="differs from the gated model at beta = 0.5"):
        bake_run(run, 0.5)


def test_what_cannot_be_baked(tmp_path):
    single = saved_run(tmp_path / "single", beta=0.1)
    with pytest.raises(ValueError, match="holds a plain model, without gates"):
        bake_run(single, 0.5)
    with pytest.raises(FileNotFoundError, match="holds no config.json"):
        bake_run(tmp_path / "nothing", 0.5)
    run = saved_run(tmp_path / "run")
    with pytest.raises(ValueError, match="beta"):
        bake_run(run, -1.0)
    (run / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="has not finished; continue it with mrvae train --resume"):
        bake_run(run, 0.5)

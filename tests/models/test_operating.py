"""Where methods land on a multi-rate curve: a curve whose fixed points are known, runs that were trained, and marks."""

from __future__ import annotations

import contextlib
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from mrvae_models import plot
from mrvae_models.baking import bake_run
from mrvae_models.cli import main
from mrvae_models.config import TrainConfig
from mrvae_models.curve import Curve, Measurement, evaluate, point_of
from mrvae_models.data import load
from mrvae_models.likelihoods import Gaussian, GaussianImage, GaussianOptimal, GaussianPixel
from mrvae_models.metrics import calibration
from mrvae_models.metrics.calibration import calibrate
from mrvae_models.networks import build
from mrvae_models.operating import FIXED_POINTS, Landing, landing, method, own_beta
from mrvae_models.run import load_model
from mrvae_models.scored import gaussian_nats, scored_as, squared_errors
from mrvae_models.selection import landed, select_beta
from mrvae_models.vae import VAE
from scipy.optimize import brentq
from torch import nn

import mrvae_kernels as mk

D, K = 6, 2
SHARES, WIDE = (0.5, 0.3), (50.0, 30.0)
"""Variances of the data's two first dimensions, which two latent variables can code; of the other four it is 0.02."""


class Encoder(nn.Module):
    """q(z | x) of the optimal linear VAE at beta for data of independent dimensions, of which K are coded."""

    def __init__(self, owner):
        super().__init__()
        self.owner = [owner]
        self.unused = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x):
        owner = self.owner[0]
        variances, beta = owner.variances, owner.beta
        gain = (1 - beta / variances).clamp_min(0)  # posterior variance beta / l where l > beta, else the prior's
        mean = (gain / variances).sqrt() * x.flatten(1)[:, :K]
        return mean, torch.log(1 - gain).expand_as(mean)


class Decoder(nn.Module):
    def __init__(self, owner):
        super().__init__()
        self.owner = [owner]

    def forward(self, z):
        owner = self.owner[0]
        weight = (owner.variances - owner.beta).clamp_min(0).sqrt()
        return torch.cat([weight * z, z.new_zeros(len(z), D - K)], 1).view(-1, 1, 2, 3)


class Known(mk.MultiRate):
    """A multi-rate model in name: at each beta the best linear VAE (closed_form.py), with sigma_0 of its own."""

    def __init__(self, sigma=1.0, shares=SHARES):
        nn.Module.__init__(self)
        self.sigma, self.beta = sigma, 1.0
        self.variances = torch.tensor(shares, dtype=torch.float64)
        self.network = VAE(Encoder(self), Decoder(self), Gaussian(sigma), K, (1, 2, 3))
        self.beta_range = (0.001, 10.0)

    @contextlib.contextmanager
    def at(self, beta):
        before, self.beta = self.beta, beta * self.sigma**2
        try:
            yield
        finally:
            self.beta = before


def examples(shares):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2000, D, dtype=torch.float64, generator=generator)
    x = (x - x.mean(0)) / x.std(0, correction=0)
    return SimpleNamespace(examples=(x * torch.tensor([*shares, *[0.02] * 4]).double().sqrt()).view(-1, 1, 2, 3))


@pytest.fixture(scope="module")
def data():
    return examples(SHARES)


def mse_of(beta, shares=SHARES):
    """MSE of the closed form: min(l, beta) of what is coded, all of the rest, over D dimensions."""
    return (sum(min(share, beta) for share in shares) + 4 * 0.02) / D


def rate_of(beta, shares=SHARES):
    return 0.5 * sum(max(0.0, math.log(share / beta)) for share in shares)


@pytest.mark.parametrize("sigma", [1.0, 0.5])
def test_the_sigma_vae_lands_where_its_variance_is_its_squared_error(data, sigma):
    # (2 b + 0.08) / 6 = b where both dimensions are in use: b = 0.02, the variance that nothing explains
    found = select_beta(Known(sigma), data, "sigma-vae", samples=4)
    assert found.beta * sigma**2 == pytest.approx(0.02, rel=0.02)
    assert found.interval[0] < found.beta < found.interval[1] < 1.1 * found.beta
    assert abs(found.value) < 1e-3 and not found.notes
    mse = squared_errors(Known(sigma), data, found.beta, samples=4).distortion.mean().item()
    assert mse == pytest.approx(found.beta * sigma**2, rel=1e-3)
    # the bound with the best sigma is lowest there, though nothing was said of bounds
    losses = {
        beta: gaussian_nats(mse_of(beta), D, mse_of(beta)) + rate_of(beta)
        for beta in np.geomspace(0.001, 1, 400)
    }
    assert min(losses, key=losses.get) == pytest.approx(0.02, rel=0.02)


def own_l_vae(beta, sigma):
    error = D * mse_of(beta * sigma**2, WIDE) / (2 * sigma**2)
    return math.sqrt(error / rate_of(beta * sigma**2, WIDE))


@pytest.mark.parametrize("sigma", [1.0, 0.5])
def test_l_vae_lands_where_beta_is_the_root_of_error_over_rate(sigma):
    model = Known(sigma, WIDE)
    expected = brentq(lambda beta: own_l_vae(beta, sigma) - beta, 0.01, 10)
    found = select_beta(model, examples(WIDE), "l-vae", samples=2)
    assert found.beta == pytest.approx(expected, rel=0.02) and not found.notes
    assert own_beta(model, "l-vae").likelihood.sigma == sigma


def test_of_two_fixed_points_the_one_with_the_lower_loss():
    """Near beta = 50, where the last latent variable switches off, R goes to 0 and sqrt(E / R) past any beta."""
    found = select_beta(Known(1.0, WIDE), examples(WIDE), "l-vae", beta_range=(0.01, 60.0), grid=60)
    first, second = (brentq(lambda beta: own_l_vae(beta, 1.0) - beta, *ends) for ends in ((0.01, 10), (45, 49.99)))
    losses = [
        FIXED_POINTS["l-vae"].loss(D * mse_of(beta, WIDE) / 2, rate_of(beta, WIDE), D) for beta in (first, second)
    ]
    assert losses[0] < losses[1] and found.beta == pytest.approx(first, rel=0.03)
    (note,) = [note for note in found.notes if "is met at beta" in note]
    other = float(note.split("at beta = ")[1].split()[0])
    assert other == pytest.approx(second, rel=0.05) and "the lower loss" in note


def test_a_rate_of_single_draws_that_is_below_zero_counts_as_none():
    method = own_beta(Known(), "l-vae")
    distortion = torch.full((3,), 0.5 * D * math.log(2 * math.pi) + 4.0, dtype=torch.float64)
    below, none = (
        Measurement(distortion, torch.full((3,), rate, dtype=torch.float64), torch.zeros(3, K)) for rate in (-0.1, 0.0)
    )
    assert method.loss(below) == method.loss(none) == pytest.approx(4.0, abs=1e-5)
    assert method.excess(1.0, below) == method.excess(1.0, none) > 10


def test_out_of_range_says_on_which_side(data):
    with pytest.raises(ValueError, match="sigma-VAE lands below the range, 0.1 to 10: at beta = 0.1 its own beta "):
        select_beta(Known(), data, "sigma-vae", beta_range=(0.1, 10.0))
    with pytest.raises(ValueError, match="sigma-VAE lands above the range.*higher end"):
        select_beta(Known(), data, "sigma-vae", beta_range=(0.001, 0.01))
    with pytest.raises(ValueError, match="has a beta of its own: expected no target"):
        select_beta(Known(), data, "sigma-vae", 3.0)
    model = Known()
    model.network.likelihood = GaussianOptimal(beta_range=(0.01, 10.0))
    with pytest.raises(ValueError, match="learns sigma at every beta: its sigma-VAE is beta = 1, mrvae bake --beta 1"):
        select_beta(model, data, "sigma-vae")
    with pytest.raises(ValueError, match="beta = 20 on this curve, outside its range"):
        landed(Known(), data, 20.0, "it")


def test_a_landing_is_a_beta_of_the_curve():
    found = Landing("BS-VAE, beta = 10", 10.0, 0.03, "gaussian-image")
    assert found.unit_beta == pytest.approx(0.3) and found.on(Known(0.5)) == pytest.approx(1.2)
    bits = Landing("beta-VAE, beta = 2", 2.0, None, "bernoulli")
    assert bits.on(build("mlp", (4,), 2)) == 2.0
    with pytest.raises(ValueError, match="has likelihood bernoulli and the curve gaussian"):
        bits.on(Known())
    with pytest.raises(ValueError, match="has likelihood bernoulli, no Gaussian"):
        bits.unit_beta  # noqa: B018


def test_means_are_scored_by_another_density():
    x = torch.rand(5, 2, 3, 3, generator=torch.Generator().manual_seed(0)).double()
    model = build("mlp", (2, 3, 3), 2, hidden=(4,), likelihood=GaussianPixel()).double()
    own = model.likelihood
    measured = squared_errors(model, SimpleNamespace(examples=x), 1.0)
    torch.manual_seed(0)
    z = torch.randn(5, 2).double()
    parameters = model.decode(z)
    with scored_as(model, Gaussian(0.3)):
        found = model.likelihood.distortion(parameters, x)
        assert model.likelihood.parameter_shape((2, 3, 3)) == (4, 3, 3)
    squares = (x - own.mean(parameters)).square().flatten(1).sum(1)
    torch.testing.assert_close(found, squares / (2 * 0.09) + 9 * math.log(2 * math.pi * 0.09))
    assert model.likelihood is own
    assert measured.distortion.shape == (5,) and (measured.distortion > 0).all()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A multi-rate run, and one of each method, on small images with a shade and noise."""
    folder = tmp_path_factory.mktemp("operating")
    generator = np.random.default_rng(0)
    shade = generator.integers(30, 220, (300, 1, 1))
    images = np.clip(shade + generator.normal(0, 20, (300, 4, 4)), 0, 255).astype(np.uint8)
    np.savez(folder / "images.npz", train_images=images[:200], test_images=images[200:])
    np.savez(folder / "others.npz", train_images=images[100:], test_images=images[:100])
    common = ["--data", str(folder / "images.npz"), "--set", "hidden=16", "--latent", "2", "--quiet", "--threads", "1"]
    common += ["--log-to", "none", "--batch-size", "20", "--lr", "0.003", "--validate-every", "100"]
    for name, options in {
        "multi": ["--likelihood", "gaussian", "--beta-range", "0.0005", "1", "--epochs", "8"],
        "sigma": ["--objective", "sigma-vae", "--epochs", "3"],
        "image": ["--objective", "bs-vae", "--beta", "4", "--epochs", "3"],
        "pixel": ["--objective", "sigma-vae", "--likelihood", "gaussian-pixel", "--epochs", "3"],
        "learned": ["--objective", "l-vae", "--likelihood", "gaussian", "--epochs", "3"],
        "others": ["--objective", "sigma-vae", "--epochs", "1", "--data", str(folder / "others.npz")],
    }.items():
        assert main(["train", *common, *options, "--out", str(folder / name)]) == 0
    return folder


def test_select_like_a_method_and_like_a_run(runs, tmp_path, capsys):
    arguments = ["select", "--run", str(runs / "multi"), "--out", str(tmp_path), "--like"]
    assert main([*arguments, "sigma-vae", "--bake"]) == 0
    said = capsys.readouterr().out
    document = json.loads((tmp_path / "select.json").read_text())
    assert document["split"] == "train" and document["quantity"] == "sigma-vae" and "where sigma-vae lands" in said
    training = load(str(runs / "images.npz"), "train")
    mse = squared_errors(load_model(runs / "multi")[0], training, document["beta"]).distortion.mean().item()
    assert mse == pytest.approx(document["beta"], rel=1e-3)
    assert load_model(document["baked"])[1]["model"]["beta"] == document["beta"]

    assert main([*arguments, str(runs / "sigma")]) == 0
    document = json.loads((tmp_path / "select.json").read_text())
    sigma = load_model(runs / "sigma")[0].likelihood.sigma
    assert document["beta"] == pytest.approx(sigma**2) and document["quantity"] == "sigma-VAE, optimal"
    assert "where sigma-VAE, optimal has landed" in capsys.readouterr().out
    for name, code, message in (
        ("nothing", 2, "is no directory of a run, and no method; expected sigma-vae or l-vae"),
        ("multi", 1, "has gates, and so many betas"),
        ("others", 1, "no curve in common: data is"),
    ):
        assert main([*arguments, str(runs / name)]) == code
        assert message in capsys.readouterr().err


def test_landings_of_trained_runs(runs, monkeypatch):
    whole = calibration._calibrate
    monkeypatch.setattr(calibration, "_calibrate", None)  # which holds every value: of a training set, gigabytes
    names = {name: landing(runs / name) for name in ("sigma", "image", "pixel", "learned")}
    assert [found.name for found in names.values()] == [
        "sigma-VAE, optimal", "BS-VAE, beta = 4", "sigma-VAE, per pixel", "L-VAE"
    ]
    image = load_model(runs / "image")[0].likelihood
    assert isinstance(image, GaussianImage) and names["image"].unit_beta == pytest.approx(4 * image.sigma**2)
    assert names["learned"].variance == 1.0
    assert names["learned"].beta == json.loads((runs / "learned" / "config.json").read_text())["learned"]["beta"]
    monkeypatch.setattr(calibration, "_calibrate", whole)
    training = load(str(runs / "images.npz"), "train")
    pixel = calibrate(load_model(runs / "pixel")[0], training, 1.0)
    assert names["pixel"].variance == pytest.approx(pixel.predicted, rel=1e-12) and 0 < pixel.predicted < 1
    baked = bake_run(runs / "multi", 0.01, runs / "baked")
    assert landing(baked.directory).name == "baked" and landing(baked.directory).unit_beta == 0.01
    assert method(TrainConfig(likelihood="gaussian"), 0.1) == "beta-VAE, beta = 0.1"


def test_the_curve_marks_runs_where_they_land(runs, tmp_path, monkeypatch, capsys):
    drawn = {}
    draw = plot.draw
    monkeypatch.setattr(plot, "draw", lambda *args: (drawn.update(args[4]), draw(*args)))
    marked = [str(runs / name) for name in ("sigma", "image", "pixel", "learned")]
    arguments = ["curve", "--run", str(runs / "multi"), "--betas", "0.001", "0.1", "1", "--no-images"]
    assert main([*arguments, "--out", str(tmp_path), "--mark", *marked]) == 0
    assert list(drawn) == ["sigma-VAE, optimal", "BS-VAE, beta = 4", "sigma-VAE, per pixel", "L-VAE"]
    about = {each["name"]: each for each in json.loads((tmp_path / "curve.json").read_text())["about"]["marked"]}
    lines = capsys.readouterr().out.splitlines()
    others = lines[lines.index("where others land on the curve, with the curve's likelihood:") + 2 :]
    assert [line.split("  ")[0] for line in others[:4]] == list(drawn)
    for name, line in zip(drawn, others, strict=False):
        assert float(line[22:].split()[0]) == pytest.approx(about[name]["beta"], rel=1e-3)
    assert [about[name]["run"] for name in drawn] == marked
    assert f"{about['L-VAE']['distortion']:.2f}" in others[3]
    model = load_model(runs / "sigma")[0]
    with scored_as(model, Gaussian()):
        expected = evaluate(model, load(str(runs / "images.npz"), "test"), [model.likelihood.own.sigma ** 2]).points[0]
    assert about["sigma-VAE, optimal"]["distortion"] == expected.distortion
    assert drawn["sigma-VAE, optimal"].points == (expected,)
    assert (tmp_path / "curve.png").stat().st_size > 20_000


def point(beta):
    generator = torch.Generator().manual_seed(0)
    distortion = torch.rand(20, generator=generator).double() + beta
    return point_of(beta, Measurement(distortion, 1 / distortion, torch.randn(20, 2, generator=generator)))


def test_marks_are_drawn_with_their_names():
    figure = Figure()
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 3)
    found = point(0.4)
    plot._curves(axes, Curve((point(0.1), point(1.0))), {}, {"L-VAE": Curve((found,))})
    assert [text.get_text() for text in axes[0].get_legend().get_texts()] == ["L-VAE"]
    places = [line.get_xydata().tolist() for line in axes[0].get_lines() if line.get_label() == "L-VAE"]
    assert places == [[[found.rate, found.distortion]]]
    assert [line.get_xdata()[0] for line in axes[1].get_lines() if line.get_linestyle() == ":"] == [0.4]

"""Frechet distances against the closed form, their extractors, and the area under a curve."""

from __future__ import annotations

import math
import sys
from types import SimpleNamespace

import pytest
import torch
from mrvae_models.data import load
from mrvae_models.likelihoods import Gaussian
from mrvae_models.metrics import (
    METRICS,
    area_under_curve,
    area_with_error,
    common_interval,
    digits,
    frechet_distance,
)
from mrvae_models.metrics.area import lower_hull
from mrvae_models.metrics.digits import digit_features, trained_digit_features
from mrvae_models.metrics.frechet import INCEPTION_FILE, inception_path
from mrvae_models.networks import build
from mrvae_models.vae import VAE
from torch import nn

import mrvae_kernels as mk

SHAPE = (1, 1, 3)


class Same(nn.Module):
    """Three pixels are three features."""

    def forward(self, images):
        return images.flatten(1)


def sampler(mean, factor):
    """A VAE whose samples are N(mean, factor factor^T), in pixels."""
    decoder = nn.Linear(3, 3).double()
    with torch.no_grad():
        decoder.weight.copy_(factor)
        decoder.bias.copy_(mean)
    return VAE(nn.Identity(), nn.Sequential(decoder, nn.Unflatten(1, SHAPE)), Gaussian(), 3, SHAPE)


def test_distance_of_gaussians_is_the_closed_form():
    """|m - m'|^2 + sum_d (s_d - s'_d)^2 for covariances that share their axes; pixels stay within [0, 1]."""
    axes, _ = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    scales = torch.tensor([[0.08, 0.04, 0.02], [0.03, 0.05, 0.06]], dtype=torch.float64)
    means = torch.tensor([[0.4, 0.5, 0.5], [0.5, 0.5, 0.6]], dtype=torch.float64)
    noise = torch.randn(20_000, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    real = (means[0] + noise * scales[0] @ axes.T).reshape(-1, *SHAPE)
    model = sampler(means[1], axes * scales[1])
    expected = (means[0] - means[1]).square().sum() + (scales[0] - scales[1]).square().sum()
    data = SimpleNamespace(examples=real)
    found = frechet_distance(model, data, 1.0, Same(), batch_size=999)
    assert found == pytest.approx(expected.item(), rel=0.03)
    assert frechet_distance(model, data, 1.0, Same(), batch_size=20_000) == pytest.approx(found, rel=0.03)
    own = frechet_distance(sampler(means[0], axes * scales[0]), data, 1.0, Same())
    assert 0 <= own < 1e-5 < expected


def test_samples_are_those_of_beta_and_the_same_at_each():
    torch.manual_seed(0)
    model = mk.multirate(build("mlp", (1, 5, 5), 3, hidden=(12,)))
    data = SimpleNamespace(examples=torch.rand(30, 1, 5, 5))
    one, again, other = (frechet_distance(model, data, beta, nn.Flatten()) for beta in (0.1, 0.1, 10.0))
    assert one == again != other
    assert frechet_distance(model, data, 0.1, nn.Flatten(), generated=9) != one


def test_what_is_not_finite_has_no_distance():
    model, data = build("mlp", (1, 5, 5), 3, hidden=(12,)), SimpleNamespace(examples=torch.rand(30, 1, 5, 5))

    class Broken(nn.Module):
        def forward(self, images):
            return images.flatten(1) * torch.nan

    with pytest.raises(ValueError, match="distance at beta = 1 is NaN: the extractor Broken gives features"):
        frechet_distance(model, data, 1.0, Broken())
    with torch.no_grad():
        next(model.decoder.parameters()).fill_(torch.nan)
    with pytest.raises(ValueError, match="a sample at beta = 1 has NaN or infinite values: .* diverged"):
        frechet_distance(model, data, 1.0, nn.Flatten())


@pytest.fixture(scope="module")
def features():
    return trained_digit_features()


@pytest.mark.slow
def test_digit_features_know_digits(features):
    digits_ = load("digits", "test")
    with torch.no_grad():
        guesses = features.classes(features(digits_.examples)).argmax(1)
    assert (guesses == digits_.labels).double().mean() > 0.95


@pytest.mark.slow
def test_digit_features_are_made_once_and_kept(features, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(digits, "trained_digit_features", lambda: made.append(1) or features)
    monkeypatch.setenv("MRVAE_CACHE", str(tmp_path))
    first, second = digit_features(), digit_features()
    assert made == [1]
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    images = torch.rand(4, 3, 14, 14)  # another size, in colour
    assert second(images).shape == (4, 64)
    model = build("mlp", (1, 28, 28), 4, hidden=(12,))
    data = SimpleNamespace(examples=load("digits", "test").examples[:300])
    assert METRICS["frechet_digits"](model, data, 1.0) > 10
    (tmp_path / digits.FILE).write_bytes(b"no safetensors")
    with pytest.raises(ValueError, match="delete it"):
        digit_features()


def test_digit_features_that_cannot_be_kept_are_used_all_the_same(tmp_path, monkeypatch):
    made = digits.DigitFeatures()
    monkeypatch.setattr(digits, "trained_digit_features", lambda: made)
    (tmp_path / "file").touch()
    with pytest.warns(UserWarning, match="cannot be written .*trained at every call"):
        assert digit_features(tmp_path / "file" / "features") is made


def test_fid_without_its_weights_says_what_to_put_where(tmp_path, monkeypatch):
    model, data = build("mlp", (1, 8, 8), 4, hidden=(12,)), SimpleNamespace(examples=torch.rand(5, 1, 8, 8))
    monkeypatch.setenv("MRVAE_CACHE", str(tmp_path))
    monkeypatch.delenv("MRVAE_INCEPTION", raising=False)
    with pytest.raises(FileNotFoundError, match=rf"{tmp_path}/{INCEPTION_FILE} does not exist: put .*frechet_digits"):
        METRICS["fid"](model, data, 1.0)
    monkeypatch.setenv("MRVAE_INCEPTION", str(tmp_path / "other.pth"))
    assert inception_path() == tmp_path / "other.pth"
    with pytest.raises(FileNotFoundError, match=r"mine\.pth does not exist"):
        METRICS["fid"](model, data, 1.0, weights=tmp_path / "mine.pth")


def test_fid_without_torch_fidelity_names_the_extra(tmp_path, monkeypatch):
    weights = tmp_path / INCEPTION_FILE
    weights.write_bytes(b"")
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    model, data = build("mlp", (1, 8, 8), 4, hidden=(12,)), SimpleNamespace(examples=torch.rand(5, 1, 8, 8))
    wanted = r"FID needs the package torch-fidelity: pip install 'mrvae-kernels\[fid\]'; or take .*frechet_digits"
    with pytest.raises(ModuleNotFoundError, match=wanted):
        METRICS["fid"](model, data, 1.0, weights=weights)


def test_what_has_no_frechet_distance_is_refused():
    model, images = build("mlp", (1, 5, 5), 3, hidden=(12,)), torch.rand(6, 1, 5, 5)
    with pytest.raises(ValueError, match="of images"):
        frechet_distance(model, SimpleNamespace(examples=images.flatten(1)), 1.0, nn.Flatten())
    with pytest.raises(ValueError, match="6 images and 1 samples"):
        frechet_distance(model, SimpleNamespace(examples=images), 1.0, nn.Flatten(), generated=1)
    with pytest.raises(ValueError, match=r"Identity makes \(2, 1, 5, 5\).*expected one row"):
        frechet_distance(model, SimpleNamespace(examples=images), 1.0, nn.Identity())


RATES, DISTORTIONS = [30.0, 0.0, 10.0], [10.0, 100.0, 40.0]


def test_area_is_that_of_the_trapezoids():
    assert area_under_curve(RATES, DISTORTIONS) == pytest.approx(10 * 70 + 20 * 25)
    assert area_under_curve(RATES, DISTORTIONS, (5.0, 20.0)) == pytest.approx(5 * 55 + 10 * 32.5)
    assert area_under_curve([*RATES, 10.0], [*DISTORTIONS, 90.0]) == pytest.approx(1200)  # the lower of two counts
    exact = [math.exp(-r) for r in torch.linspace(0, 5, 2001).tolist()]
    assert area_under_curve(torch.linspace(0, 5, 2001).tolist(), exact) == pytest.approx(1 - math.exp(-5), rel=1e-6)


def test_area_of_the_hull_leaves_out_what_mixing_beats():
    rates, distortions = [0.0, 10.0, 20.0, 30.0], [100.0, 90.0, 40.0, 10.0]
    x, y = lower_hull(rates, distortions)
    assert (x.tolist(), y.tolist()) == ([0.0, 30.0], [100.0, 10.0])  # (20, 40) lies on the line between
    assert area_under_curve(rates, distortions, hull=True) == pytest.approx(30 * 55)
    assert area_under_curve(rates, distortions) == pytest.approx(10 * 95 + 10 * 65 + 10 * 25)
    assert area_under_curve(RATES, DISTORTIONS, hull=True) == area_under_curve(RATES, DISTORTIONS)


def test_curves_compare_over_the_rates_that_all_reach():
    assert common_interval([1.0, 30.0], [25.0, 0.5, 3.0]) == (1.0, 25.0)
    with pytest.raises(ValueError, match="no interval of rates in common.*20 nats"):
        common_interval([20.0, 30.0], [1.0, 5.0])


def test_error_of_an_area_is_that_of_the_mean_of_the_examples_areas():
    """With the same rates for all examples an area is linear in the distortions: std / sqrt(n)."""
    n, generator = 400, torch.Generator().manual_seed(0)
    base = torch.tensor([[10.0, 100.0], [20.0, 50.0], [40.0, 20.0]], dtype=torch.float64)
    shift, noise = (torch.randn(k, n, generator=generator).double() for k in (1, 3))  # shift: the same at all betas
    rates, distortions = base[:, :1].expand(3, n), base[:, 1:] + 5 * shift + noise
    alone = torch.tensor([area_under_curve(rates[:, i].tolist(), distortions[:, i].tolist()) for i in range(n)])
    found = area_with_error(rates, distortions)
    assert found.error == pytest.approx(alone.std().item() / math.sqrt(n), rel=0.15)
    assert found.value == pytest.approx(alone.mean().item())
    assert area_with_error(rates, distortions, (15.0, 30.0)).error < found.error
    with pytest.raises(ValueError, match="two examples"):
        area_with_error(rates[:, :1], distortions[:, :1])


@pytest.mark.parametrize(
    ("rates", "distortions", "interval", "message"),
    [
        ([1.0], [2.0], None, "1 different rates"),
        ([1.0, 1.0], [2.0, 3.0], None, "1 different rates"),
        ([1.0, 2.0], [2.0], None, "expected one of each"),
        ([1.0, math.nan], [2.0, 1.0], None, "not finite"),
        ([1.0, 2.0], [2.0, 1.0], (0.5, 2.0), r"interval is \(0.5, 2\); .*1 to 2"),
        ([1.0, 2.0], [2.0, 1.0], (2.0, 1.0), "interval is"),
    ],
)
def test_what_has_no_area_is_refused(rates, distortions, interval, message):
    with pytest.raises(ValueError, match=message):
        area_under_curve(rates, distortions, interval)

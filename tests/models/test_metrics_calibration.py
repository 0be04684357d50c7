"""Calibration of a decoder's variance, and bounds at a constant one, on decoders of which the answer is known."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from metric_cases import normal
from mrvae_models.cli import main
from mrvae_models.curve import evaluate
from mrvae_models.likelihoods import (
    Bernoulli,
    DiscretizedGaussian,
    Gaussian,
    GaussianImage,
    GaussianOptimal,
    GaussianPixel,
    StudentT,
)
from mrvae_models.metrics import METRICS
from mrvae_models.metrics.bound import importance_weighted_bound
from mrvae_models.metrics.calibration import binned, calibrate
from mrvae_models.metrics.gaussian_bound import bound_at, nll_discretised, nll_implied, nll_optimal
from mrvae_models.scored import scored_as
from mrvae_models.vae import VAE
from torch import nn

SHAPE = (1, 10, 10)


class Nothing(nn.Module):
    """q(z | x) = N(0, I): a rate of 0."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x):
        return x.new_zeros(len(x), 1), x.new_zeros(len(x), 1)


class Constant(nn.Module):
    """The same parameters whatever z is."""

    def __init__(self, parameters):
        super().__init__()
        self.register_buffer("values", parameters)

    def forward(self, z):
        return self.values.expand(len(z), *self.values.shape)


def decoder(likelihood, parameters=None):
    parameters = torch.full(SHAPE, 0.5, dtype=torch.float64) if parameters is None else parameters
    return VAE(Nothing(), Constant(parameters), likelihood, 1, SHAPE).double()


def spread(sigma, n=200, seed=0):
    """n examples around 0.5, of a standard deviation of sigma."""
    return SimpleNamespace(examples=0.5 + sigma * normal(n, *SHAPE, seed=seed))


@pytest.mark.parametrize("sigma", [0.05, 0.1, 0.2])
def test_one_variance_against_another(sigma):
    data = spread(0.1)
    found = calibrate(decoder(Gaussian(sigma)), data, 1.0)
    empirical = (data.examples - 0.5).square().mean().item()
    assert found.ratio == pytest.approx(sigma**2 / empirical, rel=1e-9) and len(found.bins) == 1
    assert found.bin_error == pytest.approx(abs(math.log(sigma**2 / empirical)), rel=1e-9)
    for level, inside in found.coverage:
        quantile = math.sqrt(2) * torch.erfinv(torch.tensor(level, dtype=torch.float64)).item()
        expected = math.erf(quantile * sigma / 0.1 / math.sqrt(2))  # P(|N(0, 0.1)| <= quantile sigma)
        assert inside == pytest.approx(expected, abs=0.012), "20,000 values: three standard errors are 0.011"
    if sigma == 0.1:
        assert found.coverage_error < 0.005
    assert METRICS["variance_ratio"](decoder(Gaussian(sigma)), data, 1.0) == found.ratio
    assert METRICS["coverage_error"](decoder(Gaussian(sigma)), data, 1.0) == found.coverage_error


def test_bins_tell_a_decoder_that_is_right_on_average_alone():
    """Half of the values have sigma 0.05 and half 0.2; one decoder says so, one has it the wrong way round."""
    sigmas = torch.where(torch.arange(10) < 5, 0.05, 0.2).double().expand(SHAPE)
    data = SimpleNamespace(examples=0.5 + sigmas * normal(400, *SHAPE))
    likelihood = GaussianPixel(min_log_sigma=-30.0)

    def says(values):
        raw = 6 - torch.log(torch.expm1(6 - values.log()))  # the upper soft clip backwards; the lower is out of the way
        return decoder(likelihood, torch.cat([torch.full(SHAPE, 0.5).double(), raw]))

    right, wrong = (calibrate(says(values), data, 1.0) for values in (sigmas, sigmas.flip(2)))
    assert right.predicted == pytest.approx((0.05**2 + 0.2**2) / 2, rel=1e-6)
    assert right.ratio == pytest.approx(1, abs=0.02) and wrong.ratio == pytest.approx(1, abs=0.02)
    assert right.bin_error < 0.05 and wrong.bin_error == pytest.approx(2 * math.log(4), abs=0.05)
    assert len(right.bins) == 10 and sum(each.values for each in right.bins) == data.examples.numel()
    assert right.bins[0].predicted == pytest.approx(0.0025, rel=1e-6)
    assert right.coverage_error < 0.005 < 0.1 < wrong.coverage_error


def test_variances_that_are_learned_or_made_of_x():
    optimal = decoder(GaussianOptimal())
    optimal.train()
    optimal.likelihood.distortion(torch.full((200, *SHAPE), 0.5).double(), spread(0.1, seed=1).examples)
    found = calibrate(optimal, spread(0.1), 1.0)
    assert found.predicted == pytest.approx(optimal.likelihood.sigma**2) and found.ratio == pytest.approx(1, abs=0.03)
    image = calibrate(decoder(GaussianImage()), spread(0.1), 1.0)
    assert image.ratio == pytest.approx(1, rel=1e-9) and len(image.bins) == 10
    assert calibrate(decoder(Gaussian(1.0)), spread(0.1), 0.01, variance=0.01).ratio == pytest.approx(1, abs=0.03)
    with pytest.raises(ValueError, match="the likelihood is bernoulli; expected a gaussian one, or give variance="):
        calibrate(decoder(Bernoulli()), spread(0.1), 1.0)
    assert calibrate(decoder(StudentT(), torch.zeros(3, 10, 10).double()), spread(0.1), 1.0, variance=0.26).ratio > 0
    for options in (dict(levels=(1.0,)), dict(levels=()), dict(bins=0)):
        with pytest.raises(ValueError, match=r"levels within \(0, 1\)"):
            calibrate(decoder(Gaussian()), spread(0.1), 1.0, **options)


def test_bins_have_equal_numbers_and_rise():
    v = torch.tensor([4.0, 1.0, 3.0, 2.0, 5.0])
    bins = binned(v, 2 * v, 2)
    assert [(each.values, each.predicted, each.ratio) for each in bins] == [(2, 1.5, 0.5), (3, 4.0, 0.5)]
    assert len(binned(v, v, 50)) == 5 and len(binned(torch.ones(4), v[:4], 3)) == 1


def test_bounds_are_the_formula():
    data, train = spread(0.1), spread(0.12, seed=1)
    model = decoder(Gaussian(0.5))
    mse, best = ((each.examples - 0.5).square().mean().item() for each in (data, train))

    def expected(variance):
        return 50 * (math.log(2 * math.pi * variance) + mse / variance)

    beta = 0.3
    assert nll_implied(model, data, beta) == pytest.approx(expected(beta * 0.25), rel=1e-6)
    assert nll_optimal(model, data, beta, train) == pytest.approx(expected(best), rel=1e-6)
    assert nll_optimal(model, data, beta) == pytest.approx(50 * (math.log(2 * math.pi * mse) + 1), rel=1e-6)
    assert bound_at(model, data, beta, 0.02) == pytest.approx(expected(0.02), rel=1e-6)
    assert nll_optimal(model, data, beta) < min(bound_at(model, data, beta, mse * factor) for factor in (0.9, 1.1))
    # z says nothing of x, so that one draw is as good as a hundred
    weighted = METRICS["nll_optimal_iw"](model, data, beta, train=train, draws=3)
    assert weighted == pytest.approx(expected(best), rel=1e-6)
    with scored_as(model, Gaussian(0.7)):
        assert importance_weighted_bound(model, data, beta, 1) == pytest.approx(-expected(0.49), rel=1e-6)
    with pytest.raises(ValueError, match="gaussian-optimal has no fixed sigma"):
        nll_implied(decoder(GaussianOptimal()), data, beta)


def test_the_discretised_bound_is_of_levels():
    data = SimpleNamespace(examples=(spread(0.1).examples.clamp(0, 1) * 255).round() / 255)
    model = decoder(Gaussian())
    sigma = (data.examples - 0.5).square().mean().sqrt().item()
    found = nll_discretised(model, data, 1.0)
    # a bin is narrow beside sigma: its mass is the density over 255
    assert found == pytest.approx(nll_optimal(model, data, 1.0) + 100 * math.log(255), abs=1.0)
    own = decoder(DiscretizedGaussian(sigma=sigma))
    assert nll_discretised(own, data, 1.0) == pytest.approx(found, rel=1e-6)
    assert -evaluate(own, data, [1.0]).points[0].elbo == pytest.approx(found, rel=1e-6)
    with pytest.raises(ValueError, match="of a level from the nearest of 256"):
        nll_discretised(model, spread(0.01), 1.0)


def test_the_command_takes_the_variance_of_the_training_examples(tmp_path, capsys):
    out = tmp_path / "run"
    train = ["train", "--epochs", "1", "--set", "hidden=8", "--latent", "2", "--log-to", "none", "--quiet"]
    assert main([*train, "--likelihood", "gaussian", "--threads", "1", "--out", str(out)]) == 0
    names = ["nll_implied", "nll_optimal", "nll_discretised", "variance_ratio", "variance_bin_error", "coverage_error"]
    assert main(["metrics", "--run", str(out), "--metrics", *names, "--betas", "0.1"]) == 0
    from mrvae_models.data import load
    from mrvae_models.run import load_model

    model = load_model(out)[0]
    test_set, train_set = load("digits", "test"), load("digits", "train")
    expected = nll_optimal(model, test_set, 0.1, train_set)
    values = capsys.readouterr().out.splitlines()[1].split()
    assert float(values[2]) == pytest.approx(expected, abs=1e-3) != pytest.approx(nll_optimal(model, test_set, 0.1))
    assert float(values[1]) == pytest.approx(nll_implied(model, test_set, 0.1), abs=1e-3)

"""Both MIGs, the beta-VAE score and the probe, on cases worked out by hand."""

from __future__ import annotations

import itertools
import math
import sys

import pytest
import torch
from metric_cases import coded, normal
from mrvae_models.metrics import METRICS
from mrvae_models.metrics.factors import factors_of
from mrvae_models.metrics.gap import discretised_information, factor_information
from mrvae_models.metrics.posteriors import Posteriors
from mrvae_models.metrics.probes import factor_differences

GRID = torch.tensor(list(itertools.product(range(2), range(4), range(8))))  # 64 examples, sizes 2, 4, 8
LOGS = torch.tensor([2.0, 4.0, 8.0], dtype=torch.float64).log()
NAMES = ("shape", "scale", "x")
SURE = -8.0  # a variance of 3e-4 between codes that are 10 apart


def grid(mean, log_variance=SURE, **more):
    more = {"factors": GRID, "factor_names": NAMES, **more}
    return coded(mean, log_variance, **more)


def test_one_dimension_a_factor_has_a_gap_of_one():
    model, data = grid(10.0 * GRID)
    assert METRICS["mig"](model, data, 1.0) == pytest.approx(1.0)
    assert METRICS["mig"](model, data, 1.0, leave_out=()) == pytest.approx(1.0)
    assert METRICS["mig_discretised"](model, data, 1.0) == pytest.approx(1.0)


def test_two_dimensions_for_one_factor_have_no_gap():
    model, data = grid(10.0 * torch.cat([GRID, GRID], 1))
    assert METRICS["mig"](model, data, 1.0) == pytest.approx(0.0, abs=1e-9)
    assert METRICS["mig_discretised"](model, data, 1.0) == pytest.approx(0.0, abs=1e-9)


def test_information_of_part_of_a_factor():
    """Dimension 0 holds scale; 1 its upper bit, log 2 of log 4; 2 says nothing: the gap of scale is 1 - 1/2."""
    scale = GRID[:, 1]
    mean = torch.stack([10.0 * scale, 10.0 * (scale // 2), torch.zeros(64)], 1)
    model, data = grid(mean)
    half = math.log(2) / math.log(4)
    got = factor_information(Posteriors(mean.double(), torch.full((64, 3), SURE, dtype=torch.float64)), GRID)
    expected = torch.tensor([[0.0, 1.0, 0.0], [0.0, half, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(got, expected, atol=1e-9, rtol=0)
    assert METRICS["mig"](model, data, 1.0) == pytest.approx((1 - half) / 2)  # of scale and x: shape is left out
    torch.testing.assert_close(discretised_information(mean, GRID), expected, atol=1e-9, rtol=0)
    assert METRICS["mig_discretised"](model, data, 1.0) == pytest.approx((1 - half) / 3)


def test_uncertain_codes_hold_less_which_means_do_not_show():
    """z = +-1 + N(0, 1) by a factor of two values: I = H(mixture) - H(normal), by numerical integration."""
    n = 4000
    factor = torch.arange(n) % 2
    mean = torch.stack([2.0 * factor - 1, torch.zeros(n)], 1)
    model, data = coded(mean, 0.0, factors=factor[:, None])
    z = torch.linspace(-9, 9, 20_001, dtype=torch.float64)
    density = sum(torch.exp(-((z - m) ** 2) / 2) for m in (-1, 1)) / (2 * math.sqrt(2 * math.pi))
    entropy = -torch.trapezoid(density * density.log(), z).item()
    expected = (entropy - 0.5 * math.log(2 * math.pi * math.e)) / math.log(2)
    assert 0.4 < expected < 0.6
    assert METRICS["mig"](model, data, 1.0) == pytest.approx(expected, abs=0.04)
    assert METRICS["mig"](model, data, 1.0, entropy_samples=1000) == pytest.approx(expected, abs=0.08)
    assert METRICS["mig_discretised"](model, data, 1.0) == pytest.approx(1.0)


def test_values_that_are_rarer_count_less():
    """Three of four examples have value 0: H(v) and the conditional entropies weigh them so."""
    factor = torch.tensor([0, 0, 0, 1] * 16)
    mean = torch.stack([10.0 * factor, torch.zeros(64)], 1)
    got = factor_information(Posteriors(mean.double(), torch.full((64, 2), SURE).double()), factor[:, None])
    assert got[0, 0].item() == pytest.approx(1.0)


def test_discretised_codes_lose_what_falls_into_one_bin():
    codes = torch.cat([torch.linspace(0, 1, 63), torch.tensor([100.0])])[:, None].double()  # 63 of 64 in bin 0
    found = discretised_information(codes, torch.arange(64)[:, None])
    p = 1 / 64
    expected = -(p * math.log(p) + (1 - p) * math.log(1 - p)) / math.log(64)
    assert found.item() == pytest.approx(expected)


def test_beta_vae_score_tells_factors_that_have_dimensions_of_their_own():
    model, data = grid(10.0 * GRID)
    assert METRICS["beta_vae_score"](model, data, 1.0, votes=400) > 0.99
    blind, data = grid(normal(64, 3))  # codes that have nothing to do with the factors
    assert METRICS["beta_vae_score"](blind, data, 1.0, votes=400) < 0.75
    constant, data = grid(torch.zeros(64, 3))
    assert METRICS["beta_vae_score"](constant, data, 1.0, votes=400) == pytest.approx(1 / 3, abs=0.1)


def test_pairs_share_the_factor_and_nothing_else():
    differences, shared = factor_differences(
        GRID.double(), GRID, 300, 64, torch.Generator().manual_seed(0)
    )  # codes are the factors themselves
    sizes = torch.tensor([2.0, 4.0, 8.0], dtype=torch.float64)
    apart = (sizes**2 - 1) / (3 * sizes)  # mean |a - b| of two independent draws from 0 .. size - 1
    for factor in range(3):
        found = differences[shared == factor].mean(0)
        assert found[factor] == 0.0
        for other in {0, 1, 2} - {factor}:
            assert found[other].item() == pytest.approx(apart[other].item(), rel=0.05)
    assert torch.bincount(shared).min() > 60


def test_probe_reads_what_is_linear_in_the_codes():
    labels = torch.arange(300) % 3
    mean = normal(300, 4) + 12.0 * torch.nn.functional.one_hot(labels, 4)
    model, data = coded(mean, 0.0, labels=labels)
    assert METRICS["probe"](model, data, 1.0) == 1.0
    _, mixed = coded(mean, 0.0, labels=labels[torch.randperm(300)])
    assert METRICS["probe"](model, mixed, 1.0) < 0.6
    _, train = coded(mean[:150], 0.0, labels=labels[:150])
    _, test = coded(mean[150:], 0.0, labels=(labels[150:] + 1) % 3)  # every label wrong: it must be these that count
    assert METRICS["probe"](model, test, 1.0, train=train) == 0.0


@pytest.mark.parametrize("name", ["probe", "beta_vae_score", "mig_discretised"])
def test_without_scikit_learn_they_say_what_to_install_before_any_work(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    wanted = rf"{name} needs the package scikit-learn: pip install 'mrvae-kernels\[metrics\]'"
    with pytest.raises(ModuleNotFoundError, match=wanted):
        METRICS[name](None, None, 1.0)


def test_sets_without_factors_or_labels_are_refused():
    model, data = coded(normal(8, 2), 0.0)
    for name in ("mig", "mig_discretised", "beta_vae_score"):
        with pytest.raises(ValueError, match=f"{name} needs a set whose factors are known.*SimpleNamespace has none"):
            METRICS[name](model, data, 1.0)
    with pytest.raises(ValueError, match="probe needs labels"):
        METRICS["probe"](model, data, 1.0)
    data.labels = torch.zeros(8)
    with pytest.raises(ValueError, match="8 labels of 1 classes"):
        METRICS["probe"](model, data, 1.0)
    data.factors = torch.rand(8, 2)
    with pytest.raises(ValueError, match="expected whole numbers"):
        METRICS["mig"](model, data, 1.0)
    data.factors, data.factor_names = torch.tensor([[0, 0], [1, 0]] * 4), ("shape", "colour")
    with pytest.raises(ValueError, match="no factor of two values or more, of shape, colour without shape"):
        METRICS["mig"](model, data, 1.0)
    assert factors_of(data).names == ("shape",)
    single, data = coded(normal(8, 1), 0.0, factors=data.factors)
    with pytest.raises(ValueError, match="two latent dimensions at least"):
        METRICS["mig"](single, data, 1.0, leave_out=())
    with pytest.raises(ValueError, match="the factors is .*expected two or more"):
        METRICS["beta_vae_score"](single, data, 1.0)

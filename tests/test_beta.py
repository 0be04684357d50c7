"""beta and its range: standardisation, every way to give it, and what is refused."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from helpers import RANGE

import mrvae_kernels as mk

BOUNDS = mk.BetaRange(*RANGE)


def test_eta_has_mean_0_and_variance_1_over_the_range():
    quantiles = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    beta = torch.exp(math.log(0.01) + quantiles * math.log(1000))
    eta = mk.standardize(beta, RANGE, dtype=torch.float64)
    assert abs(eta.mean().item()) < 1e-9
    assert eta.square().mean().item() == pytest.approx(1, abs=1e-6)
    ends = mk.standardize([0.01, 10.0], RANGE, dtype=torch.float64)
    torch.testing.assert_close(ends, torch.tensor([-1.0, 1.0], dtype=torch.float64) * math.sqrt(3))


@pytest.mark.parametrize(
    "beta", [0.3, torch.tensor(0.3), torch.tensor(0.3, dtype=torch.float64), np.float32(0.3), np.array(0.3)], ids=repr
)
def test_one_beta_gives_a_0d_eta_of_the_asked_dtype(beta):
    for dtype in (torch.float32, torch.float64):
        eta = mk.standardize(beta, (0.1, 5.0), dtype=dtype)
        expected = (math.log(0.3) - (math.log(0.1) + math.log(5)) / 2) / (math.log(50) / math.sqrt(12))
        assert eta.shape == () and eta.dtype == dtype
        assert eta.item() == pytest.approx(expected, rel=1e-6)


def test_integers_are_betas():
    assert mk.standardize(1).item() == mk.standardize(torch.tensor(1)).item() == mk.standardize(1.0).item()


@pytest.mark.parametrize(
    "beta", [[0.1, 0.2, 3.0], (0.1, 0.2, 3.0), np.array([0.1, 0.2, 3.0]), torch.tensor([0.1, 0.2, 3.0])]
)
def test_one_beta_a_sample_gives_eta_of_shape_n(beta):
    assert mk.standardize(beta).tolist() == pytest.approx([mk.standardize(b).item() for b in (0.1, 0.2, 3.0)], rel=1e-5)


def test_an_empty_batch_of_betas_is_empty():
    assert mk.standardize(torch.empty(0)).shape == (0,)
    assert mk.gate_values(torch.ones(3), torch.ones(3), torch.empty(0)).shape == (0, 3)


BAD = [
    0,
    0.0,
    -1.0,
    math.nan,
    math.inf,
    -math.inf,
    torch.tensor(0.0),
    torch.tensor(math.nan),
    torch.tensor([0.5, math.nan, 1]),
    torch.tensor([0.5, -2.0]),
    [0.5, 0.0],
    torch.ones(2, 1),
    torch.tensor(1j),
    torch.tensor(True),
    True,
    None,
    "0.5",
    [0.5, "x"],
    [[0.5], [1.0]],
    torch.tensor([math.inf, 1.0]),
]


@pytest.mark.parametrize("beta", BAD, ids=repr)
def test_a_beta_that_is_none_is_a_value_error(beta):
    with pytest.raises(ValueError, match="beta"):
        mk.standardize(beta)


@pytest.mark.parametrize(("beta", "named"), [(-1.5, "-1.5"), (torch.tensor([0.5, -2.25]), "-2.25"), (math.nan, "nan")])
def test_the_error_names_the_value(beta, named):
    with pytest.raises(ValueError, match=f"beta is {named}; expected a positive"):
        mk.standardize(beta)


@pytest.mark.parametrize(
    "bounds", [(0, 1), (1, 1), (2, 1), (-1, 1), (1, math.inf), (math.nan, 1), (1,), 3, None, "ab", mk.BetaRange(0, 1)]
)
def test_a_bad_range_is_a_value_error(bounds):
    with pytest.raises(ValueError, match="beta_range"):
        mk.standardize(1.0, bounds)


def test_outside_the_range_warns_and_inside_does_not():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for inside in (
            0.01,
            10.0,
            torch.tensor(0.01),
            torch.tensor([0.01, 10.0]),
            torch.tensor(10.0, dtype=torch.bfloat16),
        ):
            mk.standardize(inside)
        for outside in (0.0099, 10.1, torch.tensor([1.0, 11.0]), [0.001, 1.0]):
            with pytest.raises(UserWarning, match=r"lies outside the range \[0.01, 10\]"):
                mk.standardize(outside)


def test_eta_is_differentiable_in_beta():
    beta = torch.rand(4, dtype=torch.float64) + 0.1
    assert torch.autograd.gradcheck(lambda b: mk.standardize(b, dtype=torch.float64), beta.requires_grad_())


@pytest.mark.filterwarnings("ignore:beta = ")
@pytest.mark.parametrize("beta", [1e-300, 1e-46, 1e300])
def test_betas_beyond_float32_keep_a_finite_eta(beta):
    for given_as in (beta, torch.tensor(beta, dtype=torch.float64), [beta]):
        eta = mk.standardize(given_as)
        assert eta.dtype == torch.float32
        torch.testing.assert_close(
            eta.flatten()[0].item(), (math.log(beta) - BOUNDS.mean) / BOUNDS.std, rtol=1e-6, atol=0
        )

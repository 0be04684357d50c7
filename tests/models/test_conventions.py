"""sigma^2 and beta by each paper's convention, against numbers worked out by hand and the objectives themselves."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mrvae_models.conventions import CONVENTIONS, beta_of, convert, learned_beta, unit_beta, variance_of

D = 12


@pytest.mark.parametrize(
    ("convention", "beta"),
    [
        ("mrvae_kernels", 0.06),
        ("sigma-vae-eq7", 0.06),
        ("sigma-vae-text", 0.12),
        ("mr-vae", 0.12),
        ("pythae", 0.06),
        ("bs-vae-constant", 0.12),
        ("l-vae", 0.01),  # 2 * 0.06 / 12
        ("l-vae-sum", 0.06),
    ],
)
def test_a_variance_of_six_hundredths_by_each_name(convention, beta):
    assert beta_of(0.06, convention, D) == pytest.approx(beta, rel=1e-12)
    assert variance_of(beta, convention, D) == pytest.approx(0.06, rel=1e-12)


LOSSES = {
    "mrvae_kernels": lambda sse: 0.5 * sse,
    "sigma-vae-eq7": lambda sse: D / 2 * (sse / D),
    "sigma-vae-text": lambda sse: D * (sse / D),
    "mr-vae": lambda sse: sse,
    "pythae": lambda sse: 0.5 * sse,
    "bs-vae-constant": lambda sse: sse,
    "l-vae": lambda sse: sse / D,
    "l-vae-sum": lambda sse: 0.5 * sse,
}


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_each_objective_has_the_minimum_of_its_decoder(convention):
    """On SSE = e^-r + 0.1, R = r, the minimum over r: where SSE'(r) / (2 v) = -1."""
    variance = 0.06
    r = torch.linspace(0, 8, 800_001, dtype=torch.float64)
    sse = torch.exp(-r) + 0.1
    nats = sse / (2 * variance) + D / 2 * math.log(2 * math.pi * variance) + r
    objective = LOSSES[convention](sse) + beta_of(variance, convention, D) * r
    assert r[objective.argmin()].item() == pytest.approx(r[nats.argmin()].item(), abs=2e-5)
    assert r[nats.argmin()].item() == pytest.approx(-math.log(2 * variance), abs=2e-5)


@given(st.floats(1e-6, 1e6), st.sampled_from(sorted(CONVENTIONS)), st.sampled_from(sorted(CONVENTIONS)))
def test_there_and_back(beta, source, target):
    assert convert(convert(beta, source, target, D), target, source, D) == pytest.approx(beta, rel=1e-12)


def test_a_decoder_with_a_variance_of_its_own_and_a_beta():
    assert unit_beta(10.0, 0.02) == pytest.approx(0.2)
    assert learned_beta(0.5, 2.0) == pytest.approx(0.0625)
    assert convert(0.5, "sigma-vae-text") == 0.25


def test_table_1_of_sigma_vae_is_scored_with_half_of_beta():
    """At beta = 10 the rate is near 0: -log p of its 4056 nats is d/2 log(2 pi v) and |x - mean|^2 / (2 v)."""
    d = 3 * 28 * 28
    by_text = 0.5 * d * math.log(2 * math.pi * variance_of(10, "sigma-vae-text"))
    by_equation = 0.5 * d * math.log(2 * math.pi * variance_of(10, "sigma-vae-eq7"))
    assert by_text == pytest.approx(4054, abs=1) and by_text < 4056 < by_equation


def test_errors_name_the_value():
    for call, message in (
        (lambda: beta_of(0.1, "mine"), "convention 'mine' is not known; expected one of mrvae_kernels"),
        (lambda: beta_of(-1.0), "variance is -1.0; expected a positive"),
        (lambda: variance_of(math.nan), "beta is nan"),
        (lambda: variance_of(1.0, "l-vae"), "averages over an example's dimensions: give their number"),
        (lambda: learned_beta(1.0, 0.0), "s1 is 0.0"),
    ):
        with pytest.raises(ValueError, match=message):
            call()

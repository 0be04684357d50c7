"""The runs of `calibrated`: methods that learn their decoder's variance, or beta, beside one multi-rate run. No torch
here.

Table 1 of sigma-VAE (Rybkin et al., 2021) has beta-VAEs at five betas and a sigma-VAE; here all three kinds of
sigma-VAE, BS-VAEs and an L-VAE are trained too, and one multi-rate network, on whose curve each of them has a place.
"""

from __future__ import annotations

from .plan import Run, Settings, multirate

RANGE = (0.001, 10.0)
"""The numbers of Table 1, as betas of this project's convention, by which those of the table itself are half as large
(conventions.py)."""

BETA_VAE, L_VAE, BS_VAE = "beta-VAE", "L-VAE", "BS-VAE"
SIGMA_VAES = {
    "sigma-VAE, shared": "gaussian-shared",
    "sigma-VAE, optimal": "gaussian-optimal",
    "sigma-VAE, per image": "gaussian-image",
}
BS_BETAS = (0.1, 10.0)
"""Beside 1, where a BS-VAE is the sigma-VAE with a variance per image."""

NOTE = """\
Weights are those of the epoch with the best objective on the validation split (--option keep=last: the last). The plane
is of every decoder's means with sigma = 1; a run's own beta is beta sigma^2 for the sigma^2 of its training, or L-VAE's
learned beta, and 'beta' in the tables what it was trained with (L-VAE: what it started from). -log p is bounded with
single draws of z: for beta-VAEs and the multi-rate run with the variance that beta implies, sigma^2 = beta in this
code's convention, as in sigma-VAE's Table 1, whose betas are twice ours; for decoders that learn a variance with that
which is likeliest for the validation split, since a network errs less on its training examples than on others (for a
variance per image, which is no density of x, with their mean). Photographs: --data FILE.npz; --full is SVHN."""

SETS = ("likelihood", "log_to", "objective", "sigma", "sigma_from")
"""Options of the methods: every run is given its own, and sigma is 1 where it is not learned."""

BETWEEN = 4
"""The curve has so many betas for each step between those of the beta-VAEs."""


def runs(settings: Settings) -> list[Run]:
    """All runs, one a seed of each; the beta-VAEs at `settings.count` betas over the range."""
    own = ("beta_range", "likelihood", "sigma")
    shared = {name: value for name, value in settings.options.items() if name not in own}
    logged = {**shared, "log_to": ("csv",)}
    own_sigma = {**logged, "sigma_from": "validation"}
    low, high = settings.options.get("beta_range", RANGE)
    betas = settings.betas((low, high))
    fine = Settings(settings.seeds, BETWEEN * (len(betas) - 1) + 1, {**shared, "beta_range": (low, high)})
    found = multirate(fine, likelihood="gaussian")
    for seed in settings.seeds:
        for beta in betas:
            found.append(_run(BETA_VAE, seed, beta, shared, likelihood="gaussian"))
        for line, likelihood in SIGMA_VAES.items():
            found.append(_run(line, seed, 1.0, own_sigma, objective="sigma-vae", likelihood=likelihood))
        for beta in BS_BETAS:
            found.append(_run(BS_VAE, seed, beta, own_sigma, objective="bs-vae", likelihood="gaussian-image"))
        found.append(_run(L_VAE, seed, 1.0, logged, objective="l-vae", likelihood="gaussian"))
    return found


def _run(line: str, seed: int, beta: float, options: dict[str, object], **own: object) -> Run:
    return Run(line, seed, {**options, **own, "beta": beta, "seed": seed}, (beta,))

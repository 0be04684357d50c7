"""Which options of the objective go together. No torch here: `mrvae --help` reads the names."""

from __future__ import annotations

from typing import Any

from .options import expect

OBJECTIVES = ("beta-vae", "beta-tcvae", "sigma-vae", "bs-vae", "l-vae")
TCVAE_SAMPLING = ("weighted", "stratified")
LVAE_FORMS = ("sum", "mean")
SIGMAS = ("training", "validation")

OPTIONS_OF: dict[str, dict[str, Any]] = {
    "beta-tcvae": {"tcvae_weights": (1.0, 1.0), "tcvae_sampling": "weighted"},
    "l-vae": {"lvae_form": "sum", "lvae_regulariser": True},
}
"""Options that other objectives have no use for, and their defaults."""

CALIBRATED: dict[str, tuple[str, ...]] = {
    "sigma-vae": ("gaussian-optimal", "gaussian-shared", "gaussian-image", "gaussian-pixel"),
    "bs-vae": ("gaussian-image",),
}
"""Likelihoods of the objectives that are one with a decoder's variance, the first being taken unless told."""

OF_ONE_SIGMA = ("gaussian-shared", "gaussian-optimal", "gaussian-image")
"""Likelihoods whose sigma, or that of their samples, is one number in a network of one beta."""

OF_ONE_BETA = ("sigma-vae", "l-vae")
"""Objectives of one network without gates: the first weighs the rate by 1, the second learns what it weighs it by."""


def chosen_together(config: Any, usual: str | None) -> dict[str, Any]:
    """What the objective of a TrainConfig sets of the options that were left out: name -> value.

    usual: the network's own likelihood; L-VAE takes the unit Gaussian in place of one that learns its variance.
    """
    chosen: dict[str, Any] = {}
    if config.objective in CALIBRATED and config.likelihood is None:
        chosen["likelihood"] = CALIBRATED[config.objective][0]
    if config.objective == "l-vae" and config.likelihood is None and usual in CALIBRATED["sigma-vae"]:
        chosen["likelihood"] = "gaussian"
    if config.objective in OF_ONE_BETA and config.beta is None:
        chosen["beta"] = 1.0
    return chosen


def check_objective(config: Any) -> None:
    """ValueError, naming the option, for options of a TrainConfig's objective that make no sense together."""
    for name in ("free_bits", "annealing"):
        expect(getattr(config, name) >= 0, name, getattr(config, name), "zero or more")
    expect(config.annealing <= 1, "annealing", config.annealing, "a part of the run: from 0 to 1")
    expect(config.annealing_cycles >= 1, "annealing_cycles", config.annealing_cycles, "a positive integer")
    expect(
        config.annealing_cycles == 1 or config.annealing > 0,
        "annealing_cycles",
        config.annealing_cycles,
        "1 without annealing: give the part of each cycle over which the weight rises, e.g. annealing = 0.5",
    )
    for objective, options in OPTIONS_OF.items():
        for name, default in options.items():
            value = getattr(config, name)
            alone = config.objective == objective
            expect(alone or value == default, name, value, f"{default} unless objective = {objective!r}")
    if config.objective == "beta-tcvae":
        _check_tcvae(config)
    if config.objective in CALIBRATED:
        names = CALIBRATED[config.objective]
        expected = f"{' or '.join(names)} with objective = {config.objective!r}"
        expect(config.likelihood in names, "likelihood", config.likelihood, expected)
    if config.objective in OF_ONE_BETA:
        _check_one_beta(config)
    _check_sigma(config)


def _check_sigma(config: Any) -> None:
    """A sigma from validation is one number, of examples that were not trained on."""
    if config.sigma_from == "training":
        return
    expect(
        config.beta is not None,
        "sigma_from",
        config.sigma_from,
        "'training' without a beta: the sigma of a multi-rate network is a function of beta",
    )
    expect(
        config.likelihood in OF_ONE_SIGMA,
        "sigma_from",
        config.sigma_from,
        f"'training' with likelihood = {config.likelihood!r}, as {', '.join(OF_ONE_SIGMA)} alone have one sigma to set",
    )
    expect(
        config.train_on == "train",
        "sigma_from",
        config.sigma_from,
        f"'training' with train_on = {config.train_on!r}, of which the validation examples are a part",
    )


def _check_one_beta(config: Any) -> None:
    """A sigma-VAE or L-VAE is one network at one beta."""
    objective = config.objective
    usual = type(config)().beta_range
    expect(
        config.beta_range == usual,
        "beta_range",
        config.beta_range,
        f"none with objective = {objective!r}, of which a multi-rate network has no single one: it trains a network "
        "without gates; leave the range out, or choose objective = 'beta-vae'",
    )
    if objective == "sigma-vae":
        expect(
            config.beta == 1,
            "beta",
            config.beta,
            "1 with objective = 'sigma-vae', whose variance takes the place of beta; 'bs-vae' has both",
        )
        return
    for name in ("free_bits", "annealing"):
        value = getattr(config, name)
        expect(value == 0, name, value, "0 with objective = 'l-vae', which learns what the rate costs")


def _check_tcvae(config: Any) -> None:
    expect(min(config.tcvae_weights) >= 0, "tcvae_weights", config.tcvae_weights, "two weights of zero or more")
    expect(
        config.free_bits == 0,
        "free_bits",
        config.free_bits,
        "0 with objective = 'beta-tcvae', whose penalty is not a sum over latent variables",
    )
    expect(
        config.beta is not None or config.sample == "step",
        "sample",
        config.sample,
        "'step' with objective = 'beta-tcvae': the total correlation is that of a batch, all at one beta",
    )
    expect(
        config.batch_size > config.devices * config.num_nodes,
        "batch_size",
        config.batch_size,
        "2 examples a device or more with objective = 'beta-tcvae', which compares the examples of a batch",
    )

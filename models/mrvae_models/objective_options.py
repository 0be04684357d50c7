"""Which options of the objective go together. No torch here: `mrvae --help` reads the names."""

from __future__ import annotations

from typing import Any

from .options import expect

OBJECTIVES = ("beta-vae", "beta-tcvae")
TCVAE_SAMPLING = ("weighted", "stratified")
TCVAE_ONLY: dict[str, Any] = {"tcvae_weights": (1.0, 1.0), "tcvae_sampling": "weighted"}
"""Options that the beta-VAE has no use for, and their defaults."""


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
    if config.objective == "beta-tcvae":
        _check_tcvae(config)
        return
    for name, default in TCVAE_ONLY.items():
        value = getattr(config, name)
        expect(value == default, name, value, f"{default} unless objective = 'beta-tcvae'")


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

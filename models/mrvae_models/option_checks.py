"""What the options of a training run must be, one by one and together. No torch here."""

from __future__ import annotations

from typing import Any

from .likelihood_names import check_likelihood_options
from .objective_options import check_objective
from .options import expect
from .recipes import gate_fields

GATE_KINDS = ("sigmoid", "sqrt", "softplus")
LOGS = ("csv", "tensorboard")
OWN_OPTIONS = frozenset(("network", "latent", "likelihood", "sigma"))
"""Options of a run that are no `--set` of a network's."""


def check_together(config: Any) -> None:
    """ValueError, naming the option, its value and what was expected, for options of a TrainConfig out of their bounds.

    Their types and choices are right already.
    """
    low, high = config.beta_range
    expect(0 < low < high, "beta_range", config.beta_range, "0 < LOW < HIGH")
    expect(config.beta is None or config.beta > 0, "beta", config.beta, "a positive KL weight")
    check_objective(config)
    expect(min(config.margin) >= 1, "margin", config.margin, "two factors of at least 1")
    for name, gate in config.gates.items():
        kind = gate_fields(gate, config.gate_init, config.gate_degree)["kind"]
        expect(kind in GATE_KINDS, f"the gate of {name}", gate, f"one of {', '.join(GATE_KINDS)}")
    expect(config.vocabulary_size > 4, "vocabulary_size", config.vocabulary_size, "at least 5, four of them specials")
    expect(config.max_length is None or config.max_length > 1, "max_length", config.max_length, "at least 2")
    expect(config.warmup == 0 or config.schedule != "plateau", "warmup", config.warmup, "0 with schedule = 'plateau'")
    at_least_one = ("epochs", "batch_size", "validate_every", "validation_betas", "devices", "num_nodes")
    for name in ("min_count", "frame_stride", *at_least_one):
        expect(getattr(config, name) >= 1, name, getattr(config, name), "a positive integer")
    for name in ("latent", "patience", "checkpoint_every_steps", "threads", "resize", "frames"):
        value = getattr(config, name)
        expect(value is None or value >= 1, name, value, "a positive integer")
    for name in ("lr", "gate_lr_factor", "sigma_lr_factor"):
        expect(getattr(config, name) > 0, name, getattr(config, name), "a positive number")
    for name in ("clip", "max_time", "sigma"):
        value = getattr(config, name)
        expect(value is None or value > 0, name, value, "a positive number")
    for name in OWN_OPTIONS & {*config.network_options}:
        expected = f"none of that name: it is no option of the network's alone, use --{name.replace('_', '-')}"
        expect(False, f"network_options: {name}", config.network_options[name], expected)
    check_likelihood_options(config.likelihood, config.sigma, config.likelihood_options)
    expect(0 <= config.ema < 1, "ema", config.ema, "0 for none, or a decay below 1, e.g. 0.999")
    for name in ("warmup", "range_warmup"):
        expect(0 <= getattr(config, name) < 1, name, getattr(config, name), "a part of the run: from 0 to less than 1")
    expect(config.final_lr >= 0, "final_lr", config.final_lr, "zero or more")
    for name in ("seed", "data_seed"):
        expect(0 <= getattr(config, name) < 2**32, name, getattr(config, name), "a whole number from 0 to 2**32 - 1")
    expect(
        config.schedule == "constant" or config.final_lr <= config.lr,
        "final_lr",
        config.final_lr,
        f"at most lr, {config.lr}",
    )
    processes = config.devices * config.num_nodes
    expect(
        config.batch_size % processes == 0,
        "batch_size",
        config.batch_size,
        f"a multiple of {processes}, the number of devices that share a batch",
    )
    for log in config.log_to:
        expect(log in LOGS, "log_to", log, f"one of {', '.join(LOGS)}, or none alone")


def check_acting(config: Any) -> None:
    """ValueError for options of a TrainConfig that never act: a run which is there may have them, a new one may not."""
    for name, goes_by_it in (
        ("keep", config.keep == "best"),
        ("patience", config.patience is not None),
        ("schedule", config.schedule == "plateau"),
    ):
        expect(
            not goes_by_it or config.validate_every <= config.epochs,
            "validate_every",
            config.validate_every,
            f"at most epochs, {config.epochs}, with {name} = {getattr(config, name)!r}, which goes by validations: "
            "there would be none",
        )
    if config.likelihood_options.get("scale") == "value":
        idle = {"sigma": config.sigma, "knots": config.likelihood_options.get("knots")}
        for name, value in idle.items():
            expect(value is None, name, value, "none with scale=value, where every value has a scale of its own")

"""Options of a run that is there: those of an earlier version, and those that --resume may change. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

FORMERLY: dict[str, Any] = {"gate_degree": 1}
"""What an option was in runs from before there was a choice."""

GONE: dict[str, Any] = {"ends": 0.0}
"""Options that there are no more, and the value that did nothing."""

OF_MANY_BETAS = frozenset(
    ("beta_range", "validation_betas", "sample", "stratified", "margin", "range_warmup", "weight_power")
    + ("gates", "gate_degree", "gate_init", "gate_lr_factor", "exclude", "include", "gated", "norms")
)
"""Options that say nothing to a run at one beta."""

CHANGEABLE = frozenset(
    ("out", "data", "epochs", "max_time", "patience", "checkpoint_every_steps", "keep", "log_to")
    + ("accelerator", "devices", "num_nodes", "strategy", "threads")
)
"""Options that --resume may change: none of them changes what a step computes, except that another number of epochs
stretches the cosine and other devices round differently. Data may have moved; that they are the same is checked."""


def as_now(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Options as an earlier version may have saved them: later ones as they were then, without idle ones now gone."""
    options = {**FORMERLY, **saved}
    return {name: value for name, value in options.items() if name not in GONE or value != GONE[name]}


def changes_of_resume(saved: Any, wanted: Any) -> list[str]:
    """Names of the options in which the TrainConfig `wanted` differs from `saved` though --resume cannot."""
    return [
        entry.name
        for entry in fields(saved)
        if entry.name not in CHANGEABLE and getattr(saved, entry.name) != getattr(wanted, entry.name)
    ]

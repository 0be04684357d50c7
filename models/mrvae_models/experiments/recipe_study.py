"""The study behind the default recipe: one thing of it changed at a time, each against retraining. No torch here.

`mrvae experiment recipe`; docs/response-quality.md has its result.
"""

from __future__ import annotations

from typing import Any

from ..recipes import RECIPES
from .plan import Run, Settings, multirate, retrained

RECIPE = "the recipe"
"""Name of the line that the default recipe draws."""

PLAIN_GATES = "softplus+shift"


def _gates(**changed: str) -> dict[str, dict[str, str]]:
    """The option `gates` of the default recipe, some changed; `heads` are both heads of the posterior."""
    gates: dict[str, str] = dict(RECIPES["ranked"]["gates"])
    for place, kind in changed.items():
        places = {"heads": ("encoder.mean", "encoder.log_variance"), "first": ("decoder.0",)}.get(place, (place,))
        gates |= dict.fromkeys(places, kind)
    return {"gates": gates}


VARIANTS: dict[str, dict[str, Any]] = {
    RECIPE: {},
    "no latent variable switches off": _gates(heads=PLAIN_GATES, first=PLAIN_GATES),
    "heads alone switch off": _gates(first=PLAIN_GATES),
    "decoder's inputs alone switch off": _gates(heads=PLAIN_GATES),
    "no shifts": _gates(
        encoder="softplus", heads="sigmoid+ranked", decoder="softplus", first="softplus+latent"
    ),
    "sigmoid encoder": _gates(encoder="sigmoid+shift"),
    "sigmoid encoder, sqrt decoder": _gates(
        encoder="sigmoid+shift", decoder="sqrt+shift", first="sqrt+shift+latent"
    ),
    "gates affine in log beta": {"gate_degree": 1},
    "gates quadratic in log beta": {"gate_degree": 2},
    "gates start as in Listing 1": {"gate_init": "paper"},
    "gates learn as fast as the rest": {"gate_lr_factor": 1.0},
    "gates learn 3 times as fast": {"gate_lr_factor": 3.0},
    "gates learn 30 times as fast": {"gate_lr_factor": 30.0},
    "one beta a step": {"sample": "step"},
    "betas not stratified": {"stratified": False},
    "betas from the range alone": {"margin": (1.0, 1.0)},
    "betas to 4 times the range's end": {"margin": (2.0, 4.0)},
    "betas to twice the range's end, as from half its start": {"margin": (2.0, 2.0)},
    "range grows over 30 % of the run": {"range_warmup": 0.3},
    "all betas weigh the same": {"weight_power": 0.0},
    "weights (1 + beta)^(1/2)": {"weight_power": 0.5},
    "weights 1 + beta": {"weight_power": 1.0},
    "cosine schedule": {"schedule": "cosine"},
    "constant learning rate": {"schedule": "constant"},
    "the paper's recipe": {"recipe": "paper"},
    "the paper's gates, opened": {
        "recipe": "paper",
        "gate_init": "open",
        "gate_lr_factor": 10.0,
        "sample": "example",
        "schedule": "linear",
        "warmup": 0.0,
    },
}
"""Line -> what differs from the default recipe, or the recipe that it is instead."""


def runs(settings: Settings) -> list[Run]:
    """The beta-VAEs, and a multi-rate run of each variant and seed, of as many epochs."""
    epochs = {"epochs": settings.options.get("epochs", RECIPES["ranked"]["epochs"])}
    variants = [run for line, changed in VARIANTS.items() for run in multirate(settings, line, **epochs, **changed)]
    return [*retrained(settings), *variants]

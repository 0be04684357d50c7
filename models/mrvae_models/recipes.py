"""Recipes: the options that make multi-rate training work, chosen together by measurement. No torch here.

    ranked  the default: on the embedded digits one run's D + beta R is 0.5 % below retraining's on average over ten
            betas and 1.4 % above it at worst (three seeds, `python -m bench.retraining`)
    linear  for the linear VAE, whose optimum is known in closed form
    paper   Algorithm 1 and Listing 1 of Bae et al. (2022) as printed

What `ranked` changes, and why: in a plain multi-rate VAE no latent variable switches off at large beta, since nothing
tells them apart and since a collapsed one still feeds its noise to the decoder, whose gates scale outputs only. So the
posterior's heads and a gate on the decoder's inputs start with one threshold in beta for each latent variable; large
betas weigh more and are drawn beyond the range's end.
"""

from __future__ import annotations

import re
from typing import Any

RECIPES: dict[str, dict[str, Any]] = {
    "ranked": {
        "gates": {
            "encoder": "softplus+shift",
            "encoder.mean": "sigmoid+shift+ranked",
            "encoder.log_variance": "sigmoid+shift+ranked",
            "decoder": "softplus+shift",
            "decoder.0": "softplus+shift+latent",
        },
        "gate_init": "open",
        "gate_lr_factor": 10.0,
        "sample": "example",
        "margin": (1.0, 2.0),
        "range_warmup": 0.0,
        "weight_power": 0.5,
        "epochs": 150,
        "lr": 1e-3,
        "schedule": "linear",
        "final_lr": 1e-6,
        "warmup": 0.0,
    },
    "linear": {
        "gates": {"encoder": "sigmoid", "decoder": "sqrt"},
        "gate_init": "open",
        "gate_lr_factor": 3.0,
        "sample": "example",
        "margin": (1.0, 1.0),
        "range_warmup": 0.3,
        "weight_power": 0.0,
        "epochs": 200,
        "lr": 1e-2,
        "schedule": "cosine",
        "final_lr": 0.0,
        "warmup": 0.05,
    },
    "paper": {
        "gates": {"encoder": "sigmoid", "decoder": "sqrt"},
        "gate_init": "paper",
        "gate_lr_factor": 1.0,
        "sample": "step",
        "margin": (1.0, 1.0),
        "range_warmup": 0.0,
        "weight_power": 0.0,
        "epochs": 200,
        "lr": 1e-3,
        "schedule": "cosine",
        "final_lr": 1e-6,
        "warmup": 0.05,
    },
}

GATE_FEATURES = ("shift", "ranked", "latent", "shared")
"""What may follow a gate's kind: a FiLM shift; thresholds in beta, one a feature, to start from; a ranked sigmoid gate
on the layer's inputs too, the latent variables where it is the decoder's first; and, with hidden layers (hidden64, or
hidden64x64 for two), that all layers share them."""


def default_recipe(network: str) -> str:
    """The recipe for a network, by its name."""
    return "linear" if network == "linear" else "ranked"


def gate_fields(text: str, init: str) -> dict[str, Any]:
    """The fields of a GateSpec from "softplus+shift+latent"; ValueError for a word that is none of them."""
    kind, *features = text.split("+")
    hidden = [feature for feature in features if re.fullmatch(r"hidden[1-9]\d*(x[1-9]\d*)*", feature)]
    for feature in features:
        if (feature not in GATE_FEATURES and feature not in hidden) or features.count(feature) > 1 or len(hidden) > 1:
            raise ValueError(
                f"gate is {text!r}; after its kind it may have +{', +'.join(GATE_FEATURES)} and +hidden64, each once"
            )
    if "ranked" in features and kind != "sigmoid":
        raise ValueError(f"gate is {text!r}; only sigmoid gates can be ranked: sigmoid+ranked")
    if "shared" in features and not hidden:
        raise ValueError(f"gate is {text!r}; there is nothing to share without hidden layers: {text}+hidden64")
    if hidden and {"ranked", "latent"} & set(features):
        raise ValueError(f"gate is {text!r}; one with hidden layers can be neither ranked nor latent")
    fields: dict[str, Any] = {"kind": kind, "shift": "shift" in features}
    fields["init"] = "ranked" if "ranked" in features else init
    if "latent" in features:
        fields["inputs"] = {"kind": "sigmoid", "init": "ranked"}
    if hidden:
        fields["hidden"] = [int(size) for size in hidden[0].removeprefix("hidden").split("x")]
        fields["shared"] = "shared" in features
    return fields

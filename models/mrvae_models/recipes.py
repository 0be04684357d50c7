"""Recipes: the options that make multi-rate training work, chosen together by measurement. No torch here.

    ranked  the default: on the embedded digits one run's D + beta R is 0.6 % below retraining's on average over ten
            betas and 1.7 % above it at worst (three seeds, `python -m bench.retraining`)
    linear  for the linear VAE, whose optimum is known in closed form
    text    for the LSTM on sentences: begins with small betas, below
    hierarchy  for NVAE: Adamax, 400 epochs and a cosine as published, betas grown from the small end as its KL
               annealing; trained stably on the digits, not compared with retraining
    layers  for HVAE: Adamax, batches of 48, free bits and an average of the weights as published; gates as in hierarchy
    video   for SVG-LP: Adam at 2e-3 and batches of 100, as the authors' code has them
    paper   Algorithm 1 and Listing 1 of Bae et al. (2022) as printed

What `ranked` changes, and why: in a plain multi-rate VAE no latent variable switches off at large beta, since nothing
tells them apart and since a collapsed one still feeds its noise to the decoder, whose gates scale outputs only. So the
posterior's heads and a gate on the decoder's inputs start with one threshold in beta for each latent variable; large
betas weigh a little more, and betas are drawn beyond both ends of the range, at whose edge the response is learnt
worst. Affine gates only rise or only fall along beta, which costs 1 % of D + beta R (docs/response-quality.md): these
are cubic.

What `text` changes: a decoder that sees the words before it soon does without z, at any beta (posterior collapse). So
betas are drawn from a tenth of the range's low end on, and the range grows to its whole only over half of the run: what
small betas have taught the decoder to read, larger ones then keep. After one epoch on 30,806 dictionary examples of 7
words, rate and distortion of 2,000 others in nats at beta = 0.01, 0.3 and 1: 45.8 and 20.1, 5.9 and 23.2, 0.88 and
25.9; from the whole range at once 13.2 and 24.6, 1.1 and 25.7, 0.09 and 26.3. D + beta R at beta = 3 and 10 is 1 %
higher in exchange. (`mrvae train --network lstm --vocabulary-size 1000 --set hidden=128 --set embedding=128
--set dropout=0.3 --schedule linear --epochs 1`, and the same with `--range-warmup 0 --margin 1 2`; `mrvae curve`.)
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
        "gate_degree": 3,
        "gate_init": "open",
        "gate_lr_factor": 10.0,
        "sample": "example",
        "stratified": True,
        "margin": (2.0, 1.5),
        "range_warmup": 0.0,
        "weight_power": 0.25,
        "epochs": 150,
        "optimizer": "adam",
        "lr": 1e-3,
        "schedule": "linear",
        "final_lr": 1e-6,
        "warmup": 0.0,
        "batch_size": 128,
        "clip": None,
        "ema": 0.0,
        "free_bits": 0.0,
        "validate_every": 5,
    },
    "linear": {
        "gates": {"encoder": "sigmoid", "decoder": "sqrt"},
        "gate_degree": 1,
        "gate_init": "open",
        "gate_lr_factor": 3.0,
        "sample": "example",
        "stratified": False,
        "margin": (1.0, 1.0),
        "range_warmup": 0.3,
        "weight_power": 0.0,
        "epochs": 200,
        "optimizer": "adam",
        "lr": 1e-2,
        "schedule": "cosine",
        "final_lr": 0.0,
        "warmup": 0.05,
    },
    "text": {
        "gates": {
            "encoder": "softplus",
            "encoder.mean": "sigmoid+shift+ranked",
            "encoder.log_variance": "sigmoid+shift+ranked",
            "decoder.initial": "softplus+shift+latent",
            "decoder.lstm": "softplus",
        },
        "gate_degree": 1,
        "gate_init": "open",
        "gate_lr_factor": 3.0,
        "sample": "example",
        "stratified": False,
        "margin": (10.0, 2.0),
        "range_warmup": 0.5,
        "weight_power": 0.5,
        "epochs": 30,
        "lr": 3e-3,
        "schedule": "plateau",
        "final_lr": 1e-6,
        "warmup": 0.0,
        "batch_size": 32,
        "clip": 5.0,
        "validate_every": 1,
    },
    "hierarchy": {
        "gates": {"encoder": "softplus+shift", "decoder": "softplus+shift"},
        "gate_degree": 1,
        "gate_init": "open",
        "gate_lr_factor": 3.0,
        "sample": "example",
        "stratified": False,
        "margin": (1.0, 2.0),
        "range_warmup": 0.3,
        "weight_power": 0.0,
        "epochs": 400,
        "optimizer": "adamax",
        "lr": 3e-3,
        "schedule": "cosine",
        "final_lr": 1e-4,
        "warmup": 0.05,
    },
    "layers": {
        "gates": {"encoder": "softplus+shift", "decoder": "softplus+shift"},
        "gate_degree": 1,
        "gate_init": "open",
        "gate_lr_factor": 3.0,
        "sample": "example",
        "stratified": False,
        "margin": (1.0, 2.0),
        "range_warmup": 0.3,
        "weight_power": 0.0,
        "epochs": 100,
        "optimizer": "adamax",
        "lr": 2e-3,
        "schedule": "constant",
        "batch_size": 48,
        "ema": 0.9995,
        "free_bits": 2.0,
    },
    "video": {
        "gates": {"encoder": "softplus+shift", "decoder": "softplus+shift"},
        "gate_degree": 1,
        "gate_init": "open",
        "gate_lr_factor": 3.0,
        "sample": "example",
        "stratified": False,
        "margin": (1.0, 2.0),
        "range_warmup": 0.0,
        "weight_power": 0.0,
        "epochs": 300,
        "optimizer": "adam",
        "lr": 2e-3,
        "schedule": "constant",
        "batch_size": 100,
    },
    "paper": {
        "gates": {"encoder": "sigmoid", "decoder": "sqrt"},
        "gate_degree": 1,
        "gate_init": "paper",
        "gate_lr_factor": 1.0,
        "sample": "step",
        "stratified": False,
        "margin": (1.0, 1.0),
        "range_warmup": 0.0,
        "weight_power": 0.0,
        "epochs": 200,
        "optimizer": "adam",
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
    own = {"linear": "linear", "lstm": "text", "nvae": "hierarchy", "hvae": "layers", "svg-lp": "video"}
    return own.get(network, "ranked")


def recipe_options(name: str) -> dict[str, Any]:
    """The options of a recipe; what it does not name is as in "ranked"."""
    return {**RECIPES["ranked"], **RECIPES[name]}


def gate_fields(text: str, init: str, degree: int = 1) -> dict[str, Any]:
    """The fields of a GateSpec from "softplus+shift+latent"; ValueError for a word that is none of them.

    degree: of gates without hidden layers, which bend a gate by themselves.
    """
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
    if degree > 1 and not hidden:
        fields["degree"] = degree
    if hidden:
        fields["hidden"] = [int(size) for size in hidden[0].removeprefix("hidden").split("x")]
        fields["shared"] = "shared" in features
    return fields

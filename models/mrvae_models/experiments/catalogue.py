"""The experiments of the MR-VAE paper (Bae et al., 2022), each with the figure that it reproduces. No torch here.

By default they run on the embedded digits with an MLP, on a CPU; `full` has the paper's networks and data.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import calibrated, recipe_study
from .plan import Evaluation, Experiment, Run, Settings, multirate, retrained

RESNET = {"network": "resnet", "recipe": "paper", "gated": "paper", "epochs": 200}
"""The paper's image experiments: Adam, 200 epochs of 128, 5 % warm-up, cosine (Appendix C.2)."""

OPENED = {
    "recipe": "paper",
    "gate_init": "open",
    "gate_lr_factor": 10.0,
    "sample": "example",
    "schedule": "linear",
    "warmup": 0.0,
    "epochs": 150,
}
"""The paper's gates, started open: as drawn in Listing 1 many sqrt gates are dead, which would hide any difference."""

SMALL_NETWORKS: dict[str, dict[str, Any]] = {
    "mlp": {"hidden": [16]},
    "cnn": {"channels": [4, 4]},
    "sigma-cnn": {"channels": 2},
}


def _compared(settings: Settings) -> list[Run]:
    return [*multirate(settings), *retrained(settings)]


def _ranges(settings: Settings) -> list[Run]:
    ends = [(0.01, 10.0)] + [(a, 10.0) for a in (0.001, 0.1, 1.0)] + [(0.01, b) for b in (1.0, 0.1)]
    return [run for low, high in ends for run in multirate(settings, f"{low:g} to {high:g}", beta_range=(low, high))]


def _gates(lines: Mapping[str, tuple[str, str]]) -> Any:
    """Runs that differ in their gates: line -> (encoder's, decoder's)."""
    return lambda settings: [
        run
        for line, (encoder, decoder) in lines.items()
        for run in multirate(settings, line, gates={"encoder": encoder, "decoder": decoder})
    ]


ARCHITECTURES = {
    "affine": ("sigmoid", "sqrt"),
    "2-layer MLP": ("sigmoid+hidden64", "sqrt+hidden64"),
    "2-layer MLP, first layer shared": ("sigmoid+hidden64+shared", "sqrt+hidden64+shared"),
    "5-layer MLP": ("sigmoid+hidden64x64x64x64", "sqrt+hidden64x64x64x64"),
}
ACTIVATIONS = {
    "sigmoid, sqrt": ("sigmoid", "sqrt"),
    "sigmoid, sigmoid": ("sigmoid", "sigmoid"),
    "sqrt, sqrt": ("sqrt", "sqrt"),
    "sqrt, sigmoid": ("sqrt", "sigmoid"),
    "FiLM: sigmoid, sqrt, shifts": ("sigmoid+shift", "sqrt+shift"),
    "FiLM: softplus, shifts": ("softplus+shift", "softplus+shift"),
}

_LIST = [
    Experiment(
        "retraining",
        "the comparison of Section 5.2",
        "D + beta R of one multi-rate run over that of beta-VAEs retrained at every beta.",
        _compared,
        "objective",
        ("ratios",),
        full={**RESNET, "data": "binarized-mnist"},
        baselines=("constant", "annealed"),
    ),
    Experiment(
        "rate-distortion",
        "Figure 5",
        "The rate-distortion curve of one multi-rate run and the points of beta-VAEs retrained at every beta.",
        _compared,
        "plane",
        ("area", "curve"),
        full={**RESNET, "data": "binarized-mnist"},
        baselines=("constant", "annealed"),
    ),
    Experiment(
        "active-units",
        "Figure 6, top",
        "Latent dimensions in use along beta, of one multi-rate run and of beta-VAEs retrained at every beta.",
        _compared,
        "active_units",
        ("active_units",),
        full={**RESNET, "data": "svhn", "likelihood": "gaussian", "latent": 32},
        baselines=("annealed",),
    ),
    Experiment(
        "fid",
        "Figure 6, bottom",
        "Frechet distance of samples along beta, lower being better: by Inception, of digits by a digit classifier.",
        _compared,
        "metric",
        ("metric",),
        Evaluation("metric", "frechet_digits"),
        Evaluation("metric", "fid"),
        full={**RESNET, "data": "svhn", "likelihood": "gaussian", "latent": 32},
        baselines=("annealed",),
    ),
    Experiment(
        "samples",
        "Figure 7",
        "Samples along beta from the same latent variables, of one multi-rate run and of retrained beta-VAEs.",
        _compared,
        "samples",
        ("curve",),
        Evaluation("samples"),
        full={**RESNET, "data": "celeba", "likelihood": "gaussian", "batch_size": 16},
        seeds=(0,),
        baselines=("constant",),
    ),
    Experiment(
        "sampling-range",
        "Figure 8, left and middle",
        "Multi-rate runs that draw beta from [a, 10] and from [0.01, b].",
        _ranges,
        "ranges",
        ("area", "curve"),
        sets=("beta_range",),
        full={**RESNET, "data": "omniglot", "binarize": "dynamic"},
    ),
    Experiment(
        "mig",
        "Figure 8, right",
        "Mutual information gap of beta-TCVAEs along beta: one multi-rate run against retraining.",
        _compared,
        "metric",
        ("metric",),
        Evaluation("metric", "mig", "all"),
        options={
            "network": "tcvae-mlp",
            "data": "dsprites",
            "objective": "beta-tcvae",
            "beta_range": (0.1, 10.0),
            "batch_size": 2048,
            "epochs": 50,
        },
        baselines=("constant",),
        full={"train_on": "all"},
        note="On the 737,280 images of dSprites, of all of which the gap is: for a GPU. Trained on eight tenths of "
        "them; with --full on all, as Chen et al. (2018) did.",
    ),
    Experiment(
        "gate-architecture",
        "Figure 9, left",
        "What computes the gates from log beta: an affine map, or an MLP of 2 or 5 layers.",
        _gates(ARCHITECTURES),
        "plane",
        ("area", "objective"),
        sets=("gates",),
        options=OPENED,
        full={**RESNET, "data": "omniglot", "binarize": "dynamic"},
    ),
    Experiment(
        "gate-activation",
        "Figure 9, middle and right",
        "The gates' activation in encoder and decoder, and FiLM, which shifts too.",
        _gates(ACTIVATIONS),
        "plane",
        ("area", "objective"),
        sets=("gates",),
        options=OPENED,
        full={**RESNET, "data": "omniglot", "binarize": "dynamic"},
        note="The paper's FiLM scales without an activation; here its scale goes through one, as every gate does.",
    ),
    Experiment(
        "linear",
        "Figure 4",
        "Linear VAEs: one multi-rate run and retraining against the optimum in closed form, on the training images.",
        _compared,
        "linear",
        ("optimum",),
        Evaluation("linear"),
        options={"network": "linear"},
        full={"data": "mnist"},
        baselines=("constant",),
    ),
    Experiment(
        "recipe",
        "a study of the default recipe",
        "What each part of the default recipe is good for: one changed at a time, against retraining at every beta.",
        recipe_study.runs,
        "against",
        ("against",),
        sets=tuple(sorted({name for changed in recipe_study.VARIANTS.values() for name in changed})),
        full={"network": "mlp", "data": "mnist", "binarize": "fixed", "epochs": 8, "batch_size": 64},
        baselines=("constant",),
        of_paper=False,
    ),
    Experiment(
        "calibrated",
        "Table 1 of sigma-VAE on the curve of one multi-rate run",
        "Where sigma-VAEs, BS-VAEs and an L-VAE, which learn their variance or beta, land on the rate-distortion curve "
        "of one multi-rate run, and how their bounds on -log p compare with those of beta-VAEs at fixed betas.",
        calibrated.runs,
        "calibrated",
        ("landings", "learned_betas"),
        Evaluation("calibrated", draws=4),
        sets=calibrated.SETS,
        options={
            "network": "sigma-cnn",
            "network_options": {"channels": 8},
            "beta_range": calibrated.RANGE,
            "epochs": 60,
            "validate_every": 1,
            "keep": "best",
        },
        full={"data": "svhn", "network_options": {"channels": 32}, "epochs": 10},
        seeds=(0,),
        count=5,
        note=calibrated.NOTE,
        of_paper=False,
    ),
]

EXPERIMENTS = {experiment.name: experiment for experiment in _LIST}


def experiment_called(name: str) -> Experiment:
    """The experiment of that name; ValueError with those there are."""
    if name not in EXPERIMENTS:
        raise ValueError(f"experiment {name!r} is not known; expected one of {', '.join(EXPERIMENTS)}")
    return EXPERIMENTS[name]


def options_of(experiment: Experiment, given: Mapping[str, Any], full: bool, small: bool) -> dict[str, Any]:
    """Options of every run: the experiment's, those of its size, and those given, each over the ones before."""
    options = {**experiment.options, **(experiment.full if full else {})}
    network = given.get("network", options.get("network", "mlp"))
    if small:
        options |= {"epochs": 1, "batch_size": 500, "latent": 3, **experiment.small}
        options["network_options"] = SMALL_NETWORKS.get(network, {})
    return {**options, **given}

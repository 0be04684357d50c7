"""What an experiment is: a list of runs, what is evaluated of each, and how it is shown. No torch here."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..spacing import log_spaced

RANGE = (0.01, 10.0)

MULTIRATE = "multi-rate"
"""Name of the line that one multi-rate run draws."""


@dataclass(frozen=True)
class Run:
    """One training run and the betas that it is evaluated at."""

    line: str  # what it is a part of in tables and pictures: runs that differ in seed, or in beta, are one line
    seed: int
    options: Mapping[str, Any]  # of TrainConfig, less out
    betas: tuple[float, ...]

    @property
    def name(self) -> str:
        """Of its directory; one run of an experiment has it."""
        words = re.sub(r"[^a-z0-9.]+", "-", self.line.lower()).strip("-")
        beta = self.options.get("beta")
        return f"{words}-{self.seed}" if beta is None else f"{words}-beta-{beta:g}-{self.seed}"


@dataclass(frozen=True)
class Evaluation:
    """What is evaluated of a trained run: the curve on the test split, and more by kind.

    kind     "curve"; "metric": the metric besides; "samples": images from the prior besides; "linear": in place of it,
             rate and expected distortion on the training split, and the closed form's; "calibrated": the curve that all
             Gaussian decoders share, bounds on -log p, information and calibration (calibrated_evaluation.py)
    metric   name of a metric, or file.py:function
    split    examples that the metric is of: "test"; or "all", of a set with factors, and its test split of any other
    draws    of z an example that a distortion averages over
    pictures samples a beta
    """

    kind: str = "curve"
    metric: str | None = None
    split: str = "test"
    draws: int = 8
    pictures: int = 10


@dataclass(frozen=True)
class Settings:
    """What an experiment is asked for."""

    seeds: tuple[int, ...] = (0, 1, 2)
    count: int = 10  # betas
    options: Mapping[str, Any] = field(default_factory=dict)  # of TrainConfig, for every run
    baselines: tuple[str, ...] = ("constant",)

    def betas(self, beta_range: tuple[float, float]) -> tuple[float, ...]:
        """The betas over a range, log-spaced."""
        return tuple(log_spaced(*beta_range, self.count))


@dataclass(frozen=True)
class Experiment:
    """An experiment: `runs(settings)` are its runs; tables and figure are names in tables.py and figures.py."""

    name: str
    shows: str  # the figure of the MR-VAE paper, or what else
    question: str
    runs: Callable[[Settings], list[Run]]
    figure: str
    tables: tuple[str, ...]
    evaluation: Evaluation = Evaluation()
    full_evaluation: Evaluation | None = None  # of the paper's size, where it is another
    options: Mapping[str, Any] = field(default_factory=dict)
    full: Mapping[str, Any] = field(default_factory=dict)  # the paper's size
    small: Mapping[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0, 1, 2)
    count: int = 10  # betas
    baselines: tuple[str, ...] = ()
    note: str = ""
    of_paper: bool = True
    sets: tuple[str, ...] = ()  # options that `runs` gives its runs itself, whatever is in Settings.options


BASELINES: dict[str, tuple[str, dict[str, Any]]] = {
    "constant": ("retrained", {}),
    "annealed": ("retrained, KL annealed", {"annealing": 0.3}),
}
"""Line and options of the beta-VAEs that a multi-rate run is compared with; annealed: over 30 % of the run."""

SET_BY_ALL = {
    "out": "--out, in which each run has a directory",
    "seed": "--seeds",
    "beta": "--betas, the number of betas, over beta_range",
}
"""Options that every experiment gives its runs itself, and what to use in place of them."""


def check_given(experiment: Experiment, given: Mapping[str, Any], baselines: tuple[str, ...]) -> None:
    """ValueError, with what to use instead, for an option given to all runs that the experiment gives each of its runs
    itself: it would be ignored, and the page would say that it was not."""
    of_baselines = {option: name for name in baselines for option in BASELINES[name][1]}
    for name, value in given.items():
        if name in SET_BY_ALL:
            instead = f"use {SET_BY_ALL[name]}"
        elif name in experiment.sets:
            instead = "it is what the runs differ in, or what makes them comparable: leave it out"
        elif name in of_baselines:
            others = [other for other in BASELINES if other != of_baselines[name]]
            instead = f"the baseline {of_baselines[name]!r} sets it: give --baselines {' '.join(others)} alone"
        else:
            continue
        raise ValueError(f"the option {name} is {value!r}, and {experiment.name} sets {name} itself; {instead}")


def multirate(settings: Settings, line: str = MULTIRATE, **options: Any) -> list[Run]:
    """One multi-rate run a seed."""
    merged = {**settings.options, **options}
    betas = settings.betas(tuple(merged.get("beta_range", RANGE)))
    return [Run(line, seed, {**merged, "seed": seed}, betas) for seed in settings.seeds]


def retrained(settings: Settings) -> list[Run]:
    """A beta-VAE a beta and seed, for each of the baselines."""
    betas = settings.betas(tuple(settings.options.get("beta_range", RANGE)))
    return [
        Run(line, seed, {**settings.options, **options, "beta": beta, "seed": seed}, (beta,))
        for line, options in (BASELINES[name] for name in settings.baselines)
        for seed in settings.seeds
        for beta in betas
    ]

"""`mrvae experiment`: the paper's experiments, each one command."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
from pathlib import Path
from typing import Any

from ..config import TrainConfig
from ..experiments.catalogue import EXPERIMENTS, experiment_called, options_of
from ..experiments.command_lines import setting
from ..experiments.plan import BASELINES, Settings, check_given
from ..options import UsageError, parse_setting

HELP = "repeat an experiment of the MR-VAE paper"

TEXT = """\
Train and evaluate the runs of an experiment, and write results.csv, figure.png, config.json and a page about them. By
default on the embedded digits with an MLP; --full is the paper's network and data. Killed and started again, it goes
on.

examples:
  mrvae experiment --list                                    names, the figures they reproduce, and their cost
  mrvae experiment rate-distortion --processes 4             on four cores
  mrvae experiment gate-architecture --seeds 0 --epochs 20   shorter
  mrvae experiment sampling-range --full --launcher slurm --processes 18 --gpus 1
"""


def add(command: argparse.ArgumentParser) -> None:
    """The arguments."""
    command.add_argument("name", metavar="NAME", nargs="?", help=f"one of {', '.join(EXPERIMENTS)}")
    command.add_argument("--list", action="store_true", help="list the experiments and stop")
    command.add_argument(
        "--out", metavar="DIR", type=Path, help="directory, of this experiment alone (default: runs/NAME)"
    )
    size = command.add_mutually_exclusive_group()
    size.add_argument("--full", action="store_true", help="the paper's network, data and epochs")
    size.add_argument("--small", action="store_true", help="seconds: one epoch of a tiny network, two betas, one seed")
    command.add_argument("--seeds", metavar="N", type=int, nargs="+", help="seeds (default: 0 1 2 for most)")
    command.add_argument("--betas", metavar="N", type=int, help="number of betas (default: 10 for most)")
    command.add_argument(
        "--baselines",
        nargs="+",
        choices=tuple(BASELINES),
        help="beta-VAEs to compare with: trained at a constant KL weight, or with it annealed (default: the paper's)",
    )
    command.add_argument(
        "--metric", metavar="NAME", help="of fid, mig and calibrated: another metric, or file.py:function"
    )
    group = command.add_argument_group("options of every run")
    for name, kind in (("epochs", int), ("network", str), ("data", str), ("recipe", str)):
        group.add_argument(f"--{name}", type=kind, default=argparse.SUPPRESS, help=f"as --{name} of mrvae train")
    group.add_argument(
        "--option",
        metavar="NAME=VALUE",
        type=_setting,
        action="append",
        default=[],
        help="any other option of mrvae train that the experiment does not set itself, such as lr=0.0003 or "
        "batch_size=64; may be repeated",
    )
    where = command.add_argument_group("where it runs")
    where.add_argument("--processes", metavar="N", type=int, default=1, help="runs at a time (default: 1)")
    where.add_argument("--launcher", choices=("local", "slurm"), default="local", help="this machine, or a cluster")
    where.add_argument("--hours", metavar="H", type=float, default=24.0, help="slurm: limit of a run (default: 24)")
    where.add_argument("--cpus", metavar="N", type=int, default=1, help="slurm: cores of a run (default: 1)")
    where.add_argument("--gpus", metavar="N", type=int, default=0, help="slurm: GPUs of a run (default: 0)")
    where.add_argument("--partition", metavar="NAME", help="slurm: partition")


def _setting(text: str) -> tuple[str, Any]:
    try:
        return parse_setting(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def listing() -> str:
    """Names, figures, and what they cost: runs and epochs, by default and of the paper's size."""
    lines = []
    for experiment in EXPERIMENTS.values():
        settings = Settings(experiment.seeds, experiment.count, baselines=experiment.baselines)
        costs = []
        for size, full in (("default", False), ("--full", True)):
            options = options_of(experiment, {}, full, False)
            runs = experiment.runs(dataclasses.replace(settings, options=options))
            chosen = {name: options[name] for name in ("network", "recipe", "epochs", "data") if name in options}
            config = TrainConfig(**chosen)
            costs.append(f"    {size}: {len(runs)} runs of {config.epochs} epochs, {config.network} on {config.data}")
        lines += [f"{experiment.name}: {experiment.shows}", f"    {experiment.question}", *dict.fromkeys(costs)]
        if experiment.note:
            lines.append(f"    {experiment.note}")
    return "\n".join(lines)


def usage_error(options: argparse.Namespace) -> str | None:
    """What is wrong with the arguments taken together, if anything."""
    if options.list:
        return None
    if options.name is None:
        return f"no NAME given; expected one of {', '.join(EXPERIMENTS)}, or --list"
    if options.name not in EXPERIMENTS:
        return f"experiment {options.name!r} is not known; expected one of {', '.join(EXPERIMENTS)}"
    for name in ("processes", "betas", "cpus"):
        value = getattr(options, name)
        if value is not None and value < 1:
            return f"--{name} is {value}; expected a positive integer"
    if options.metric is not None and EXPERIMENTS[options.name].evaluation.kind not in ("metric", "calibrated"):
        return f"--metric is for fid, mig and calibrated; {options.name} has none"
    return None


def run(options: argparse.Namespace) -> int:
    """List, or execute an experiment and write its page."""
    if wrong := usage_error(options):
        raise UsageError(wrong)
    if options.list:
        print(listing())
        return 0
    experiment = experiment_called(options.name)
    given = {name: getattr(options, name) for name in ("epochs", "network", "data", "recipe") if hasattr(options, name)}
    given |= dict(options.option)
    baselines = tuple(options.baselines or experiment.baselines)
    try:
        check_given(experiment, given, baselines)
    except ValueError as error:
        raise UsageError(str(error)) from None
    settings = Settings(
        seeds=tuple(options.seeds or ((0,) if options.small else experiment.seeds)),
        count=options.betas or (2 if options.small else experiment.count),
        options=options_of(experiment, given, options.full, options.small),
        baselines=baselines,
    )
    evaluation = (experiment.full_evaluation if options.full else None) or experiment.evaluation
    if options.metric is not None:
        evaluation = dataclasses.replace(evaluation, metric=options.metric)
    if options.small:
        evaluation = dataclasses.replace(evaluation, draws=1)
    experiment = dataclasses.replace(experiment, evaluation=evaluation)
    out = options.out or Path("runs") / experiment.name
    runs = experiment.runs(settings)
    cluster = {name: getattr(options, name) for name in ("hours", "cpus", "gpus", "partition")}

    from ..experiments.execution import execute
    from ..experiments.page import check_out, write_page
    from ..training import TrainingInterrupted

    check_out(experiment.name, out)
    try:
        results = execute(
            runs,
            evaluation,
            out,
            options.processes,
            options.launcher,
            lambda line: print(line, file=sys.stderr, flush=True),
            **(cluster if options.launcher == "slurm" else {}),
        )
    except (KeyboardInterrupt, TrainingInterrupted):
        raise KeyboardInterrupt("give the same command again to go on") from None
    for path in write_page(experiment, runs, results, out, command_line(options)):
        print(path)
    return 0


def command_line(options: argparse.Namespace) -> str:
    """The command that the arguments were, less where it ran."""
    words = ["mrvae", "experiment", options.name]
    words += [f"--{name}" for name in ("full", "small") if getattr(options, name)]
    for name in ("seeds", "betas", "baselines", "metric", "epochs", "network", "data", "recipe"):
        value = getattr(options, name, None)
        if value is not None:
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    for name, value in options.option:
        words += ["--option", f"{name}={setting(value)}"]
    return shlex.join(words)

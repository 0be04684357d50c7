"""`mrvae metrics`: any metrics of a run along beta, as a table of one row a beta."""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path
from typing import Any

from ..options import UsageError

HELP = "measure metrics of a run along beta: information, likelihood bounds, probes, Frechet distances, ..."

TEXT = """\
Measure metrics of a trained run at several betas. Prints a table of one row a beta and writes it as metrics-by-beta.csv
and metrics-by-beta.json (metrics.csv is the log of training).

metrics:
  rate distortion objective elbo        as mrvae curve has them, nats
  iwae                                  importance-weighted bound on log p(x), nats
  nll_implied nll_optimal               bounds on -log p(x) of the decoder's means as a Gaussian: of the variance that
                                        beta stands for, and of the best in training (nll_optimal_iw: importance-
                                        weighted)
  nll_discretised                       bound on -log p(x) of 256 levels, of a density by the mass of each level's bin
  variance_ratio                        predicted variance of a Gaussian decoder over its mean squared error
  variance_bin_error coverage_error     the same by bins of the predicted variance, and how far the coverage of central
                                        intervals is from their probability
  active_units                          latent dimensions in use
  mi marginal_kl                        mutual information of x and z, and KL(q(z) || p(z)): they add up to the rate
  tc dimension_wise_kl                  total correlation, and the dimensions' own KL: they add up to marginal_kl
  fid frechet_digits                    Frechet distances of samples: Inception's, and that of a digit classifier
  mig mig_discretised beta_vae_score    disentanglement, of sets with known factors
  probe                                 accuracy of a linear classifier of the labels
  FILE.py:FUNCTION                      your own FUNCTION(model, dataset, beta) -> number; this RUNS the code in FILE.py

examples:
  mrvae metrics --run runs/digits --metrics mi iwae probe
  mrvae metrics --run runs/digits --metrics frechet_digits --betas 0.01 0.1 1 10
  mrvae metrics --run runs/sprites --metrics mig --split all --device cuda
  mrvae metrics --run runs/digits --metrics mine.py:sharpness
"""

FILES = ("metrics-by-beta.csv", "metrics-by-beta.json")


def add(command: argparse.ArgumentParser) -> None:
    """The arguments."""
    command.add_argument(
        "--run", metavar="RUN", type=Path, required=True, help="directory of a run, or of a baked model"
    )
    command.add_argument("--metrics", metavar="NAME", nargs="+", required=True, help="what to measure")
    command.add_argument(
        "--betas", metavar="BETA", type=float, nargs="+", help="KL weights (default: those of mrvae curve)"
    )
    command.add_argument(
        "--split",
        choices=("train", "validation", "test", "all"),
        default="test",
        help="examples to measure on (default: test); all: of a set that is not divided, such as dsprites, on whose "
        "whole grid of factors mig is defined; probe is fitted on the training ones, or, where they are among the "
        "examples, on four fifths of these",
    )
    command.add_argument("--batch-size", metavar="N", type=int, default=500, help="examples at a time (default: 500)")
    command.add_argument(
        "--seed", metavar="N", type=int, default=0, help="seed of the noise, the same at all betas (default: 0)"
    )
    command.add_argument("--device", metavar="NAME", default="cpu", help="cpu, cuda, ... (default: cpu)")
    command.add_argument("--out", metavar="DIR", type=Path, help="where to write (default: the run's directory)")


def usage_error(options: argparse.Namespace) -> str | None:
    """What is wrong with the arguments, if anything."""
    if options.batch_size < 1:
        return f"--batch-size is {options.batch_size}; expected a positive integer"
    for beta in options.betas or ():
        if not 0 < beta < float("inf"):
            return f"--betas holds {beta:g}; expected positive, finite KL weights"
    return None


def run(options: argparse.Namespace) -> int:
    """Measure, print and write."""
    if wrong := usage_error(options):
        raise UsageError(wrong)
    from ..baking import source_config
    from ..report import betas_of, calibration_for, check_betas, dataset_for, to_device, training_examples
    from ..run import load_model, output_directory, replace_file, versions, write_json
    from ..selection import call_metric, metric_called

    out = output_directory(options.run, options.out)
    functions = {name: metric_called(name) for name in options.metrics}  # a mistyped one before anything heavy
    model, document = load_model(options.run)
    config = source_config(document)
    check_betas(options.run, document["model"], options.betas)
    model = to_device(model, options.device)
    dataset = dataset_for(model, config, options.split, options.run)
    settings: dict[str, Any] = {"batch_size": options.batch_size, "seed": options.seed}
    settings |= training_examples(functions.values(), model, config, options.split, options.run)
    calibration = calibration_for(model, config)
    betas = betas_of(document["model"], config) if options.betas is None else sorted(set(options.betas))
    rows: list[dict[str, float]] = []
    table, whole = (out / name for name in FILES)
    about = {
        "run": str(options.run),
        "split": options.split,
        "examples": len(dataset),
        "seed": options.seed,
        "units": {name: getattr(function, "unit", "") for name, function in functions.items()},
        "versions": versions(),
    }

    def write(temporary: Path) -> None:
        with open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["beta", *functions])
            writer.writeheader()
            writer.writerows(rows)

    out.mkdir(parents=True, exist_ok=True)
    width = [max(len(name), 12) for name in functions]
    print(f"{'beta':>8} " + " ".join(f"{name:>{w}}" for name, w in zip(functions, width, strict=True)))
    for beta in betas:
        row = {
            name: float(call_metric(function, model, dataset, beta, calibration, **settings))
            for name, function in functions.items()
        }
        print(f"{beta:8.4g} " + " ".join(f"{row[name]:{w}.4f}" for name, w in zip(functions, width, strict=True)))
        rows.append({"beta": beta, **row})
        replace_file(table, write)  # after every row: one of the next may fail, and a row may have taken an hour
        write_json(whole, {"about": about, "rows": rows})
    print(f"wrote {table}, {whole}", file=sys.stderr)
    return 0

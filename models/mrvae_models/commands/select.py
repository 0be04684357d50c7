"""`mrvae select`: the beta at which a run has the rate, distortion, active units or metric that is wanted."""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..objective_options import OF_ONE_BETA
from ..options import UsageError

HELP = "choose beta by a rate, a distortion, active units, the ELBO, a metric, or where another method lands"

TEXT = """\
Find the KL weight at which a trained run has what you want of it, without training again: a grid over the run's range,
then a search in log beta, on the validation split. Prints beta with a 95 % interval (the examples resampled), and rate,
distortion, D + beta R, ELBO and active units there, on the test split too. Writes select.json.

examples:
  mrvae select --run runs/digits --rate 25                  as many nats as the latent variables may hold
  mrvae select --run runs/digits --distortion 90            as much distortion as you accept
  mrvae select --run runs/digits --active-units 8           the betas at which eight latent variables are in use
  mrvae select --run runs/digits --elbo                     the best ELBO
  mrvae select --run runs/digits --metric fid --best min    the best value of a metric
  mrvae select --run runs/digits --metric mine.py:sharpness --target 0.8    function(model, dataset, beta) -> number
  mrvae select --run runs/digits --rate 25 --bake           and write the plain network at that beta
  mrvae select --run runs/photos --like sigma-vae --bake    where a sigma-VAE lands, sigma^2 = beta = its squared error
  mrvae select --run runs/photos --like runs/other          where a trained sigma-VAE, L-VAE or BS-VAE has landed
"""

FILE = "select.json"


def add(command: argparse.ArgumentParser) -> None:
    """The arguments."""
    command.add_argument("--run", metavar="RUN", type=Path, required=True, help="directory of a multi-rate run")
    wanted = command.add_argument_group("what is wanted, one of").add_mutually_exclusive_group(required=True)
    wanted.add_argument("--rate", metavar="NATS", type=float, help="rate R, nats an example")
    wanted.add_argument("--distortion", metavar="NATS", type=float, help="distortion D, nats an example")
    wanted.add_argument("--active-units", metavar="N", type=int, help="number of latent dimensions in use")
    wanted.add_argument("--elbo", action="store_true", help="the highest ELBO, -(D + R)")
    wanted.add_argument(
        "--metric", metavar="NAME", help="a metric, or file.py:function; with --target, or --best min or max"
    )
    wanted.add_argument(
        "--like",
        metavar="METHOD",
        help="where a method lands that learns its beta: sigma-vae or l-vae, solved for on this curve without training "
        "(of runs with --likelihood gaussian); or the directory of such a run that was trained",
    )
    command.add_argument("--target", metavar="VALUE", type=float, help="value of the metric")
    command.add_argument("--best", choices=("min", "max"), help="look for the metric's lowest or highest value")
    command.add_argument(
        "--split",
        choices=("train", "validation", "test"),
        help="examples to choose on (default: validation; train with --like sigma-vae or l-vae, which learn theirs "
        "there)",
    )
    command.add_argument("--grid", metavar="N", type=int, default=13, help="betas of the first look (default: 13)")
    command.add_argument(
        "--resamples",
        metavar="N",
        type=int,
        help="resampled sets of examples behind the interval, of a metric halves of them (default: 200; for --metric "
        "0, each costs as many "
        "evaluations of the metric as betas are looked at)",
    )
    command.add_argument("--samples", metavar="N", type=int, default=1, help="draws of z an example (default: 1)")
    command.add_argument("--batch-size", metavar="N", type=int, default=500, help="examples at a time (default: 500)")
    command.add_argument("--seed", metavar="N", type=int, default=0, help="seed of noise and resamples (default: 0)")
    command.add_argument("--device", metavar="NAME", default="cpu", help="cpu, cuda, ... (default: cpu)")
    command.add_argument("--bake", action="store_true", help="write the plain network at the chosen beta")
    command.add_argument("--force", action="store_true", help="with --bake: replace the model that is there already")
    command.add_argument("--out", metavar="DIR", type=Path, help="where to write (default: the run's directory)")


def usage_error(options: argparse.Namespace) -> str | None:
    """What is wrong with the arguments taken together, if anything."""
    if options.metric is None and (options.target is not None or options.best is not None):
        return "--target and --best belong to --metric"
    if options.metric is not None and (options.target is None) == (options.best is None):
        return f"--metric {options.metric} needs one of --target VALUE and --best min|max"
    if options.like is not None and options.like not in OF_ONE_BETA and not Path(options.like).is_dir():
        return f"--like {options.like} is no directory of a run, and no method; expected {' or '.join(OF_ONE_BETA)}"
    for name in ("samples", "batch_size"):
        if getattr(options, name) < 1:
            return f"--{name.replace('_', '-')} is {getattr(options, name)}; expected a positive integer"
    if options.grid < 3:
        return f"--grid is {options.grid}; expected at least 3, the ends of the range and one between"
    if options.resamples is not None and (options.resamples < 0 or options.resamples == 1):
        return f"--resamples is {options.resamples}; expected 0 for no interval, or at least 2"
    return None


def _wanted(options: argparse.Namespace) -> tuple[str, float | None, str | None]:
    for name in ("rate", "distortion", "active_units"):
        if getattr(options, name) is not None:
            return name, getattr(options, name), None
    if options.like is not None:
        return options.like, None, None
    return ("elbo", None, "max") if options.elbo else (options.metric, options.target, options.best)


def run(options: argparse.Namespace) -> int:
    """Choose, print, write select.json, and bake where asked."""
    if wrong := usage_error(options):
        raise UsageError(wrong)
    from ..baking import bake_run, source_config
    from ..curve import evaluate
    from ..operating import landing_of
    from ..report import calibration_for, check_comparable, dataset_for, points_table, to_device, training_examples
    from ..run import load_model, output_directory, versions, write_json
    from ..selection import landed, metric_called, select_beta

    path = output_directory(options.run, options.out) / FILE
    metrics = [] if options.metric is None else [metric_called(options.metric)]  # a mistyped one before anything heavy
    model, document = load_model(options.run)
    config = source_config(document)
    model = to_device(model, options.device)
    calibration = calibration_for(model, config)
    settings: dict[str, Any] = {
        name: getattr(options, name) for name in ("samples", "batch_size", "seed")
    } | {"calibration": calibration}
    quantity, target, best = _wanted(options)
    split = options.split or ("train" if options.like in OF_ONE_BETA else "validation")
    dataset = dataset_for(model, config, split, options.run)
    if options.like is not None and options.like not in OF_ONE_BETA:
        directory = Path(options.like)
        trained, its_document = load_model(directory)
        other = landing_of(trained, its_document, directory)
        check_comparable(directory, trained, its_document, options.run, model, document, likelihood=False)
        note = f"of {options.like}: {other}"
        chosen = landed(model, dataset, other.on(model), other.name, [note], **settings)
    else:
        fitted = training_examples(metrics, model, config, split, options.run)
        chosen = select_beta(
            model, dataset, quantity, target, best, grid=options.grid, resamples=options.resamples,
            **settings, **fitted,
        )
    points = {split: chosen.point}
    if split != "test":
        test_set = dataset_for(model, config, "test", options.run)
        (points["test"],) = evaluate(model, test_set, [chosen.beta], **settings).points
    baked = None
    if options.bake:
        out = None if options.out is None else options.out / f"baked-{chosen.beta:g}"
        baked = bake_run(options.run, chosen.beta, out, calibration, options.force).directory
    selection = asdict(chosen)
    del selection["point"]
    write_json(
        path,
        {
            **selection,
            "points": {split: asdict(point) for split, point in points.items()},
            "run": str(options.run),
            "split": split,
            "settings": {name: value for name, value in settings.items() if name != "calibration"},
            "baked": None if baked is None else str(baked),
            "versions": versions(),
        },
    )
    print(sentence(chosen))
    for note in chosen.notes:
        print(f"note: {note}")
    print(points_table(list(points.values()), list(points)))
    if baked is not None:
        print(f"baked: {baked}")
    print(f"wrote {path}", file=sys.stderr)
    return 0


def sentence(chosen: Any) -> str:
    """The beta, its interval, and what the quantity is there."""
    text = f"beta = {chosen.beta:.4g}"
    if chosen.interval is not None:
        low, high = chosen.interval
        counted = chosen.standard_error is None
        text += f" ({'all' if counted else '95 % interval'} from {low:.4g} to {high:.4g})"
    if chosen.target is None and chosen.best is None:
        low, high = chosen.reach
        return f"{text}, where {chosen.quantity} has landed; the curve goes from {low:g} to {high:g}"
    if chosen.quantity in OF_ONE_BETA:
        own = chosen.beta * math.exp(chosen.value)
        return f"{text}, where {chosen.quantity} lands: its own beta there is {own:.4g}"
    text += f": {chosen.quantity.replace('_', ' ')} {chosen.value:.6g}"
    if chosen.standard_error is not None:
        text += f" ± {chosen.standard_error:.2g}"
    wanted = f"wanted {chosen.target:g}" if chosen.target is not None else f"the {chosen.best}imum"
    return f"{text}, {wanted}; from {chosen.reach[0]:.4g} to {chosen.reach[1]:.4g} are within reach"

"""The `mrvae` command: train, curve, select, metrics, bake, data, experiment, doctor.

Nothing heavy is imported before the arguments are read, so that --help and a mistyped option answer at once.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from .arguments import parser
from .commands import MODULES
from .config import TrainConfig
from .objective_options import OF_ONE_BETA
from .option_changes import OF_MANY_BETAS, changes_of_resume
from .options import UsageError, config_file
from .recipes import recipe_options

ERROR, USAGE, INTERRUPTED = 1, 2, 130

DICTIONARIES = ("network_options", "likelihood_options", "gates")
"""Options that hold entries by name."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code: 0, 1 for an error, 2 for wrong usage, 130 when interrupted."""
    options = parser().parse_args(argv)
    if not options.debug:
        warnings.showwarning = _warn_once()
    try:
        commands = {"train": _train, "curve": _curve, "bake": _bake, "doctor": _doctor}
        commands |= {name: module.run for name, module in MODULES.items()}
        return commands[options.command](options)
    except UsageError as error:
        print(f"mrvae {options.command}: {error}", file=sys.stderr)
        return USAGE
    except KeyboardInterrupt as stop:
        if options.debug:
            raise
        advice = f"; {stop}" if str(stop) else ""
        print(f"mrvae {options.command}: interrupted{advice}", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if options.debug:
            raise
        print(f"mrvae {options.command}: {_sentence(error)}", file=sys.stderr)
        return ERROR


def _warn_once() -> Callable[..., None]:
    """What shows a warning in one line, and each once."""
    shown: set[str] = set()

    def show(message: Warning | str, *where: Any, **more: Any) -> None:
        if str(message) not in shown:
            shown.add(str(message))
            print(f"mrvae: warning: {message}", file=sys.stderr)

    return show


def _sentence(error: Exception) -> str:
    """One line for an error: its own message where we or a library meant it for users, with its type otherwise."""
    text = " ".join(str(error).split())
    of_ours = isinstance(error, ModuleNotFoundError) and "pip install" in text
    if text and (of_ours or isinstance(error, (ValueError, OSError, RuntimeError))):
        return text
    return f"{type(error).__name__}: {text} (run again with --debug for the traceback)"


def config_of(options: argparse.Namespace) -> TrainConfig:
    """The configuration that the arguments of `train` ask for: a file's or a run's, changed by the options given."""
    given = {entry.name: getattr(options, entry.name) for entry in fields(TrainConfig) if hasattr(options, entry.name)}
    for name in ("beta_range", "margin"):
        if name in given:
            given[name] = tuple(given[name])
    entries: dict[str, dict[str, Any]] = {
        name: dict(given.pop(name)) for name in DICTIONARIES if name in given
    }
    try:
        if options.resume is None:
            start = {name: given[name] for name in ("recipe", "network", "objective") if name in given}
            if options.config is None:
                base = TrainConfig(**start)
            else:
                base = TrainConfig.load(options.config)
                if "recipe" in given:
                    base = replace(base, **recipe_options(given["recipe"]))
            config = _changed(base, given, entries)
            _warn_of_unused(given, entries)
            if given.get("stratified") and config.sample == "step":
                warnings.warn("one beta a step cannot be spread over the range: --stratified not used", stacklevel=2)
        else:
            if options.config is not None or options.force:
                raise ValueError("--resume takes the run's own configuration; leave out --config and --force")
            saved = replace(TrainConfig.load(config_file(options.resume)), out=str(options.resume))
            config = _changed(saved, given, entries)
            if changed := changes_of_resume(saved, config):
                name = changed[0]
                raise ValueError(
                    f"{name} is {getattr(saved, name)!r} in {options.resume} and cannot become "
                    f"{getattr(config, name)!r} with --resume; start another run for that"
                )
            if "out" in given and Path(given["out"]) != options.resume:
                raise ValueError(f"--resume continues in {options.resume}; leave out --out")
        config.check() if options.resume is not None else config.check_new()
    except ValueError as error:
        raise UsageError(str(error)) from None
    return config


def _warn_of_unused(given: dict[str, Any], entries: dict[str, dict[str, Any]]) -> None:
    """A warning for options of gates and of the range of betas where a network without either is trained."""
    named = OF_MANY_BETAS & {*given, *entries}
    unused = [entry for entry in fields(TrainConfig) if entry.name in named]
    objective = given.get("objective")
    if unused and ("beta" in given or objective in OF_ONE_BETA):
        names = ", ".join(entry.metadata.get("flag", "--" + entry.name.replace("_", "-")) for entry in unused)
        one = "--beta" if "beta" in given else f"--objective {objective}"
        warnings.warn(f"{one} trains one network without gates at one KL weight: {names} not used", stacklevel=2)


def _changed(base: TrainConfig, given: dict[str, Any], entries: dict[str, dict[str, Any]]) -> TrainConfig:
    """`base` with the options given; those that hold entries by name change in the entries given only."""
    return replace(base, **given, **{name: getattr(base, name) | changes for name, changes in entries.items()})


def _train(options: argparse.Namespace) -> int:
    config = config_of(options)
    from .training import TrainingInterrupted, is_first_process, train

    try:
        result = train(config, resume=options.resume is not None, force=options.force, progress=not options.quiet)
    except TrainingInterrupted as stop:
        if is_first_process():
            print(f"mrvae train: {stop}", file=sys.stderr)
        return INTERRUPTED
    if is_first_process() and not options.quiet:
        if result.seconds_per_step is None:
            speed = f", nothing left to do: more --epochs than {config.epochs} go on, unless --patience ended the run"
        else:
            speed = f", {1000 * result.seconds_per_step:.2f} ms a step"
        best = "" if result.objective is None else f"; best validation objective {result.objective:.2f} nats"
        print(f"{result.steps} steps{speed}{best}\nwrote {result.directory / 'model.safetensors'}", file=sys.stderr)
        print(f"next: mrvae curve --run {shlex.quote(str(result.directory))}", file=sys.stderr)
    return 0


def _curve(options: argparse.Namespace) -> int:
    from .curve import Point
    from .report import points_table, report

    curve, written = report(
        options.run,
        options.betas,
        options.compare,
        options.mark,
        options.split,
        options.samples,
        options.batch_size,
        options.seed,
        options.device,
        not options.no_images,
        options.out,
    )
    print(points_table(curve.points))
    if marked := curve.about.get("marked"):
        print("\nwhere others land on the curve, with the curve's likelihood:")
        points = [Point(**{entry.name: each[entry.name] for entry in fields(Point)}) for each in marked]
        print(points_table(points, [each["name"] for each in marked]))
    print(f"nats an example, ± one standard error over {curve.about['evaluation']['examples']} examples")
    print("wrote " + ", ".join(str(path) for path in written), file=sys.stderr)
    return 0


def _bake(options: argparse.Namespace) -> int:
    if not 0 < options.beta < float("inf"):
        raise UsageError(f"--beta is {options.beta:g}; expected a positive, finite KL weight")
    from .baking import bake_run
    from .report import calibration_of

    baked = bake_run(options.run, options.beta, options.out, calibration_of(options.run), options.force)
    print(
        f"wrote {baked.directory}: read back, it differs from the gated model at beta = {options.beta:g} by "
        f"{baked.difference:.1e} of the largest output",
        file=sys.stderr,
    )
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from mrvae_kernels import doctor

    arguments = [f"--device={options.device}"]
    arguments += [f"--layer={options.layer}"] if options.layer is not None else []
    arguments += [f"--input={options.input}"] if options.input is not None else []
    arguments += ["--per-sample"] if options.per_sample else []
    return doctor.main(arguments)


if __name__ == "__main__":
    sys.exit(main())

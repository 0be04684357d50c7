"""The `mrvae` command: train, curve, bake, doctor.

Nothing heavy is imported before the arguments are read, so that --help and a mistyped option answer at once.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from .config import CHANGEABLE, TrainConfig, changes_of_resume, parse_setting

ERROR, USAGE, INTERRUPTED = 1, 2, 130

DESCRIPTION = """\
Multi-Rate VAEs: train one VAE for a whole range of KL weights beta, draw its rate-distortion curve, and take out the
plain network at the beta you choose.

  mrvae train --out runs/digits               one run, all betas, on the embedded handwritten digits
  mrvae curve --run runs/digits               rate, distortion, D + beta R at ten betas: CSV, JSON and PNG
  mrvae bake  --run runs/digits --beta 0.5    the plain network at beta = 0.5, for deployment
  mrvae doctor                                what is installed, and what runs where
"""

TRAIN = """\
Train a multi-rate VAE (Algorithm 1 of Bae et al., 2022): beta is drawn log-uniformly for every example, and gates that
depend on it make the network the optimal one for each beta. The loss is mean(D + beta R), D the distortion and R the
rate, in nats summed over an example's dimensions.

examples:
  mrvae train --out runs/digits                           the embedded digits, an MLP, beta from 0.01 to 10
  mrvae train --data photos/ --network cnn --latent 64    a folder of images, a convolutional network
  mrvae train --data fashion.npz --set hidden=600,300     arrays of your own, an MLP with two hidden layers
  mrvae train --beta 0.5 --out runs/single                a plain beta-VAE at one beta, to compare with
  mrvae train --config runs/digits/config.json --seed 1 --out runs/seed1        the same again, with another seed
  mrvae train --resume runs/digits                        continue after Ctrl-C, --max-time or kill -9, to the same bits
  torchrun --nproc-per-node 4 -m mrvae_models train --devices 4 --strategy ddp  four GPUs; --batch-size is shared

A run's directory holds config.json (every option, with versions), last.ckpt and best.ckpt (to resume), model.safetensors
(for curve and bake), metrics.csv and tensorboard/.
"""

CURVE = """\
Evaluate a trained run at several betas and draw its curve. Writes curve.csv, curve.json and curve.png.

examples:
  mrvae curve --run runs/digits
  mrvae curve --run runs/digits --betas 0.01 0.1 1 10 --samples 10
  mrvae curve --run runs/digits --compare runs/single-0.1 runs/single-1      with separately trained beta-VAEs beside it
"""

BAKE = """\
Fold the gates of a run into its weights at one beta. Writes a directory with model.safetensors and config.json (the plain
network, no gate left), and model.pt2 (x -> reconstruction, mean, log variance) and decoder.pt2 (z -> image), torch.export
programs for any batch size. What was written is read back and compared with the gated model.

examples:
  mrvae bake --run runs/digits --beta 0.5
  mrvae bake --run runs/digits --beta 0.5 --out deploy/
"""

DOCTOR = """\
Print versions, what was built, and what would run for a layer and why.

example:
  mrvae doctor --layer "Conv2d(64, 128, 3, padding=1)" --input 16x64x14x14
"""

EPILOG = "exit codes: 0 done, 1 error, 2 wrong usage, 130 interrupted (and resumable)"


def parser() -> argparse.ArgumentParser:
    """The whole command line; the options of `train` come from TrainConfig."""
    top = _parser(argparse.ArgumentParser, "mrvae", DESCRIPTION)
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, text, help, add in (
        ("train", TRAIN, "train one VAE for a range of betas", _add_train),
        ("curve", CURVE, "evaluate a run along beta and draw its rate-distortion curve", _add_curve),
        ("bake", BAKE, "write the plain network at one beta", _add_bake),
        ("doctor", DOCTOR, "say what is installed and what would run", _add_doctor),
    ):
        command = _parser(commands.add_parser, name, text, help=help)
        add(command)
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return top


def _parser(make: Any, name: str, description: str, **more: Any) -> argparse.ArgumentParser:
    return make(
        name, description=description, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False, **more,
    )


def _add_train(command: argparse.ArgumentParser) -> None:
    start = command.add_argument_group("where to start")
    start.add_argument("--config", metavar="FILE", type=Path, help="take options from a run's config.json, or a JSON of options")
    start.add_argument("--resume", metavar="RUN", type=Path, help="continue this run; few options may change: "
                       + ", ".join("--" + name.replace("_", "-") for name in sorted(CHANGEABLE - {"out"})))
    start.add_argument("--force", action="store_true", help="replace the run in the directory, if there is one")
    start.add_argument("--quiet", action="store_true", help="no progress line")
    groups: dict[str, Any] = {}
    for entry in fields(TrainConfig):
        details = dict(entry.metadata)
        group = details.pop("group")
        if group not in groups:
            groups[group] = command.add_argument_group(group)
        _add_option(groups[group], entry.name, str(entry.type), entry.default, details)


def _add_option(group: Any, name: str, annotation: str, default: Any, details: dict[str, Any]) -> None:
    """One field of TrainConfig. Defaults stay out of the namespace: what is in it, the user has given."""
    flag = details.pop("flag", "--" + name.replace("_", "-"))
    arguments: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS, "help": details["help"].replace("%", "%%")}
    if annotation == "bool":
        group.add_argument(flag, action=argparse.BooleanOptionalAction, **arguments)
        return
    if isinstance(default, (int, float, str)):
        arguments["help"] += f" (default: {default:g})" if isinstance(default, float) else f" (default: {default})"
    elif isinstance(default, tuple) and default:
        arguments["help"] += f" (default: {' '.join(str(value) for value in default)})"
    convert = details.get("parse") or (int if annotation.startswith("int") else str)
    arguments |= {"type": _typed(convert), "metavar": details.get("metavar")}
    if "choices" in details:
        arguments |= {"choices": details["choices"], "metavar": None}
    if annotation == "tuple[float, float]":
        arguments["nargs"] = 2
    elif details.get("many"):
        arguments["nargs"] = "+"
    elif convert is parse_setting:
        arguments["action"] = "append"
    group.add_argument(flag, **arguments)


def _typed(convert: Any) -> Any:
    """argparse says "invalid NAME value" for a ValueError; this keeps what the ValueError says."""
    if convert in (int, float, str):
        return convert

    def read(text: str) -> Any:
        try:
            return convert(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return read


def _add_curve(command: argparse.ArgumentParser) -> None:
    command.add_argument("--run", metavar="RUN", type=Path, required=True, help="directory of a run, or of a baked model")
    command.add_argument("--betas", metavar="BETA", type=float, nargs="+", help="KL weights (default: 1, 2, 5 in every decade of "
                         "the run's range; ten for 0.01 to 10)")
    command.add_argument("--compare", metavar="RUN", type=Path, nargs="+", default=[], help="runs at one beta, to draw beside it")
    command.add_argument("--split", choices=("train", "validation", "test"), default="test", help="images to evaluate on "
                         "(default: test)")
    command.add_argument("--samples", metavar="N", type=_positive, default=1, help="draws of z an image (default: 1)")
    command.add_argument("--batch-size", metavar="N", type=_positive, default=500, help="images at a time (default: 500)")
    command.add_argument("--seed", metavar="N", type=int, default=0, help="seed of the noise, the same at all betas (default: 0)")
    command.add_argument("--device", metavar="NAME", default="cpu", help="cpu, cuda, ... (default: cpu)")
    command.add_argument("--no-images", action="store_true", help="draw no reconstructions and samples")
    command.add_argument("--out", metavar="DIR", type=Path, help="where to write (default: the run's directory)")


def _add_bake(command: argparse.ArgumentParser) -> None:
    command.add_argument("--run", metavar="RUN", type=Path, required=True, help="directory of a run")
    command.add_argument("--beta", metavar="BETA", type=float, required=True, help="KL weight to keep")
    command.add_argument("--out", metavar="DIR", type=Path, help="where to write (default: RUN/baked-BETA)")
    command.add_argument("--force", action="store_true", help="replace the model in the directory, if there is one")


def _add_doctor(command: argparse.ArgumentParser) -> None:
    command.add_argument("--layer", help="a layer as its torch.nn call, such as 'Linear(784, 300)' (default: the bundled networks')")
    command.add_argument("--input", help="shape of its input, such as 128x784 (with --layer)")
    command.add_argument("--per-sample", action="store_true", help="one beta an example instead of one a batch")
    command.add_argument("--device", default="cpu", help="where the layer would run (default: cpu)")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is no positive integer")
    return value


class UsageError(Exception):
    """Arguments that parse but make no sense: exit code 2."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code: 0, 1 for an error, 130 when interrupted (argparse itself exits with 2)."""
    options = parser().parse_args(argv)
    if not options.debug:
        warnings.showwarning = lambda message, *where, **more: print(f"mrvae: warning: {message}", file=sys.stderr)
    try:
        return {"train": _train, "curve": _curve, "bake": _bake, "doctor": _doctor}[options.command](options)
    except UsageError as error:
        print(f"mrvae {options.command}: {error}", file=sys.stderr)
        return USAGE
    except KeyboardInterrupt:
        if options.debug:
            raise
        print(f"mrvae {options.command}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if options.debug:
            raise
        print(f"mrvae {options.command}: {_sentence(error)}", file=sys.stderr)
        return ERROR


def _sentence(error: Exception) -> str:
    """One line for an error: its own message where we or a library meant it for users, with its type otherwise."""
    text = " ".join(str(error).split())
    if isinstance(error, (ValueError, OSError, RuntimeError)) and text:
        return text
    return f"{type(error).__name__}: {text} (run again with --debug for the traceback)"


def config_of(options: argparse.Namespace) -> TrainConfig:
    """The configuration that the arguments of `train` ask for: a file's or a run's, changed by the options given."""
    given = {entry.name: getattr(options, entry.name) for entry in fields(TrainConfig) if hasattr(options, entry.name)}
    if "network_options" in given:
        given["network_options"] = dict(given["network_options"])
    if "beta_range" in given:
        given["beta_range"] = tuple(given["beta_range"])
    try:
        if options.resume is None:
            base = TrainConfig() if options.config is None else TrainConfig.load(options.config)
            config = replace(base, **given)
        else:
            if options.config is not None or options.force:
                raise ValueError("--resume takes the run's own configuration; leave out --config and --force")
            saved = replace(TrainConfig.load(options.resume / "config.json"), out=str(options.resume))
            config = replace(saved, **given)
            if changed := changes_of_resume(saved, config):
                name = changed[0]
                raise ValueError(
                    f"{name} is {getattr(saved, name)!r} in {options.resume} and cannot become {getattr(config, name)!r} with "
                    "--resume; start another run for that"
                )
            if "out" in given and Path(given["out"]) != options.resume:
                raise ValueError(f"--resume continues in {options.resume}; leave out --out")
        config.check()
    except ValueError as error:
        raise UsageError(str(error)) from None
    return config


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
        speed = "" if result.seconds_per_step is None else f", {1000 * result.seconds_per_step:.2f} ms a step"
        best = "" if result.objective is None else f"; best validation objective {result.objective:.2f} nats"
        print(f"{result.steps} steps{speed}{best}\nwrote {result.directory / 'model.safetensors'}", file=sys.stderr)
        print(f"next: mrvae curve --run {result.directory}", file=sys.stderr)
    return 0


def _curve(options: argparse.Namespace) -> int:
    from .report import report

    curve, written = report(
        options.run, options.betas, options.compare, options.split, options.samples, options.batch_size, options.seed,
        options.device, not options.no_images, options.out,
    )
    print(f"{'beta':>8} {'rate':>16} {'distortion':>16} {'D + beta R':>16} {'ELBO':>17}  active units")
    for p in curve.points:
        numbers = [(p.rate, p.rate_se), (p.distortion, p.distortion_se), (p.objective, p.objective_se), (p.elbo, p.elbo_se)]
        print(f"{p.beta:8.4g} " + "  ".join(f"{value:8.2f} ±{error:5.2f}" for value, error in numbers) + f"  {p.active_units:12d}")
    print(f"nats an image, ± one standard error over {curve.about['evaluation']['examples']} images")
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
        f"{baked.difference:.1e} of the largest output", file=sys.stderr,
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

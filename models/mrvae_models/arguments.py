"""The arguments of the `mrvae` command, and their help. Nothing heavy is imported here."""

from __future__ import annotations

import argparse
import difflib
import textwrap
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, NoReturn

from .commands import data, experiment, metrics, select
from .config import FROM_RECIPE, TrainConfig
from .option_changes import CHANGEABLE
from .options import parse_setting
from .recipes import RECIPES

DESCRIPTION = """\
Multi-Rate VAEs: train one VAE for a whole range of KL weights beta, draw its rate-distortion curve, and take out the
plain network at the beta you choose.

  mrvae train --out runs/digits               one run, all betas, on the embedded handwritten digits
  mrvae curve --run runs/digits               rate, distortion, D + beta R at ten betas: CSV, JSON and PNG
  mrvae select --run runs/digits --rate 25    the beta at which the rate is 25 nats
  mrvae metrics --run runs/digits --metrics mi iwae    mutual information, likelihood bounds and others along beta
  mrvae bake  --run runs/digits --beta 0.5    the plain network at beta = 0.5, for deployment
  mrvae data                                  public sets by name, and where their files are looked for
  mrvae experiment --list                     the experiments of the MR-VAE paper, each repeated by one command
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
  mrvae train --data corpus/ --network lstm               train.txt, valid.txt, test.txt: one tokenised sentence a line
  mrvae train --beta 0.5 --out runs/single                a plain beta-VAE at one beta, to compare with
  mrvae train --config runs/digits/config.json --seed 1 --out runs/seed1        the same again, with another seed
  mrvae train --resume runs/digits                        continue after Ctrl-C, --max-time or kill -9, to the same bits
  torchrun --nproc-per-node 4 -m mrvae_models train --devices 4 --strategy ddp  four GPUs; --batch-size is shared

A run's directory holds config.json (every option, with versions), last.ckpt and best.ckpt (to resume),
model.safetensors (for curve and bake), metrics.csv and tensorboard/.
"""

CURVE = """\
Evaluate a trained run at several betas and draw its curve. Writes curve.csv, curve.json and curve.png, and, of a run on
text, its perplexity, and sentences.md with reconstructions and samples in place of the pictures.

examples:
  mrvae curve --run runs/digits
  mrvae curve --run runs/digits --betas 0.01 0.1 1 10 --samples 10
  mrvae curve --run runs/digits --compare runs/single-0.1 runs/single-1      with separately trained beta-VAEs beside it
  mrvae curve --run runs/photos --mark runs/sigma-vae runs/l-vae             and where other methods land on it
"""

BAKE = """\
Fold the gates of a run into its weights at one beta. Writes a directory with model.safetensors and config.json (the
plain network, no gate left), and model.pt2 (x -> reconstruction, mean, log variance) and decoder.pt2 (z -> image),
torch.export programs for any batch size. What was written is read back and compared with the gated model.

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


class _Parser(argparse.ArgumentParser):
    """One that says what is wrong in one line, and leaves the list of all options to --help."""

    commands: Any = None  # of the top one: its parsers, by name

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's, but what a command does not know is its own error, with the nearest option that it has."""
        found, unknown = self.parse_known_args(args, namespace)
        if not unknown:
            return found
        command = self if self.commands is None else self.commands.choices[found.command]
        named = next((word.partition("=")[0] for word in unknown if word.startswith("-") and word != "--"), "")
        near = difflib.get_close_matches(named, command._option_string_actions, n=1)
        hint = f": did you mean {near[0]}?" if near else ""
        if near == [named]:
            hint = f": {named} goes behind {found.command}"
        command.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}; see {self.prog} --help\n")


class _Help(argparse.RawDescriptionHelpFormatter):
    """One that breaks lines at spaces only: a name with a hyphen, such as of a network, stays whole."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False, break_long_words=False)


def parser() -> argparse.ArgumentParser:
    """The whole command line; the options of `train` come from TrainConfig."""
    top: Any = _parser(_Parser, "mrvae", DESCRIPTION)
    commands = top.commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, text, help, add in (
        ("train", TRAIN, "train one VAE for a range of betas", _add_train),
        ("curve", CURVE, "evaluate a run along beta and draw its rate-distortion curve", _add_curve),
        ("select", select.TEXT, select.HELP, select.add),
        ("metrics", metrics.TEXT, metrics.HELP, metrics.add),
        ("bake", BAKE, "write the plain network at one beta", _add_bake),
        ("data", data.TEXT, data.HELP, data.add),
        ("experiment", experiment.TEXT, experiment.HELP, experiment.add),
        ("doctor", DOCTOR, "say what is installed and what would run", _add_doctor),
    ):
        command = _parser(commands.add_parser, name, text, help=help)
        add(command)
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return top


def _parser(make: Any, name: str, description: str, **more: Any) -> argparse.ArgumentParser:
    return make(
        name,
        description=description,
        epilog=EPILOG,
        formatter_class=_Help,
        allow_abbrev=False,
        **more,
    )


def _add_train(command: argparse.ArgumentParser) -> None:
    start = command.add_argument_group("where to start")
    start.add_argument(
        "--config", metavar="FILE", type=Path, help="take options from a run's config.json, or a JSON of options"
    )
    start.add_argument(
        "--resume",
        metavar="RUN",
        type=Path,
        help="continue this run; few options may change: "
        + ", ".join("--" + name.replace("_", "-") for name in sorted(CHANGEABLE - {"out"})),
    )
    start.add_argument("--force", action="store_true", help="replace the run in the directory, if there is one")
    start.add_argument("--quiet", action="store_true", help="no progress line")
    groups: dict[str, Any] = {}
    for entry in fields(TrainConfig):
        details = dict(entry.metadata)
        group = details.pop("group")
        if group not in groups:
            groups[group] = command.add_argument_group(group)
        default = entry.default if entry.default_factory is MISSING else entry.default_factory()
        _add_option(groups[group], entry.name, str(entry.type), default, details)


def _add_option(group: Any, name: str, annotation: str, default: Any, details: dict[str, Any]) -> None:
    """One field of TrainConfig. Defaults stay out of the namespace: what is in it, the user has given."""
    flag = details.pop("flag", "--" + name.replace("_", "-"))
    arguments: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS, "help": details["help"].replace("%", "%%")}
    if default is FROM_RECIPE:
        default = RECIPES["ranked"].get(name)
    if annotation == "bool":
        arguments["help"] += f" (default: {'yes' if default else 'no'})"
        group.add_argument(flag, action=argparse.BooleanOptionalAction, **arguments)
        return
    if isinstance(default, (int, float, str)):
        arguments["help"] += f" (default: {default:g})" if isinstance(default, float) else f" (default: {default})"
    elif isinstance(default, tuple) and default:
        arguments["help"] += f" (default: {' '.join(f'{v:g}' if isinstance(v, float) else str(v) for v in default)})"
    elif isinstance(default, dict) and default:
        arguments["help"] += f" (default: {' '.join(f'{key}={value}' for key, value in default.items())})"
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
    command.add_argument(
        "--run", metavar="RUN", type=Path, required=True, help="directory of a run, or of a baked model"
    )
    command.add_argument(
        "--betas",
        metavar="BETA",
        type=float,
        nargs="+",
        help="KL weights (default: 1, 2, 5 in every decade of the run's range; ten for 0.01 to 10)",
    )
    command.add_argument(
        "--compare", metavar="RUN", type=Path, nargs="+", default=[], help="runs at one beta, to draw beside it"
    )
    command.add_argument(
        "--mark",
        metavar="RUN",
        type=Path,
        nargs="+",
        default=[],
        help="runs of sigma-VAEs, L-VAEs, BS-VAEs or beta-VAEs, each marked where it lands on the curve, by the beta "
        "that its sigma^2 or learned weights stand for",
    )
    command.add_argument(
        "--split", choices=("train", "validation", "test"), default="test", help="data to evaluate on (default: test)"
    )
    command.add_argument("--samples", metavar="N", type=_positive, default=1, help="draws of z an example (default: 1)")
    command.add_argument(
        "--batch-size", metavar="N", type=_positive, default=500, help="examples at a time (default: 500)"
    )
    command.add_argument(
        "--seed", metavar="N", type=int, default=0, help="seed of the noise, the same at all betas (default: 0)"
    )
    command.add_argument("--device", metavar="NAME", default="cpu", help="cpu, cuda, ... (default: cpu)")
    command.add_argument("--no-images", action="store_true", help="draw no reconstructions and samples")
    command.add_argument("--out", metavar="DIR", type=Path, help="where to write (default: the run's directory)")


def _add_bake(command: argparse.ArgumentParser) -> None:
    command.add_argument("--run", metavar="RUN", type=Path, required=True, help="directory of a run")
    command.add_argument("--beta", metavar="BETA", type=float, required=True, help="KL weight to keep")
    command.add_argument("--out", metavar="DIR", type=Path, help="where to write (default: RUN/baked-BETA)")
    command.add_argument("--force", action="store_true", help="replace the model in the directory, if there is one")


def _add_doctor(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--layer", help="a layer as its torch.nn call, such as 'Linear(784, 300)' (default: the bundled networks')"
    )
    command.add_argument("--input", help="shape of its input, such as 128x784 (with --layer)")
    command.add_argument("--per-sample", action="store_true", help="one beta an example instead of one a batch")
    command.add_argument("--device", default="cpu", help="where the layer would run (default: cpu)")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is no positive integer")
    return value

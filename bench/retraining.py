"""One multi-rate run against beta-VAEs retrained at every beta, equal steps each: `python -m bench.retraining`.

For each seed: one run of `mrvae train` with its defaults, and one plain network trained at each of ten betas with the
same options. Reported is D + beta R on held-out digits (nats), its mean over seeds, and the ratio of the two. The runs
are those of `mrvae experiment retraining`, whose framework this is; here they become a result file of the benchmarks.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mrvae_models.config import TrainConfig
from mrvae_models.experiments.execution import configured, execute
from mrvae_models.experiments.plan import MULTIRATE, RANGE, Evaluation, Run, Settings, multirate, retrained
from mrvae_models.experiments.tables import retraining_table

if TYPE_CHECKING:  # a process that only lists the runs needs no torch
    from mrvae_models.training import TrainResult
    from torch import nn

BETAS = Settings().betas(RANGE)
"""Ten betas, log-spaced from 0.01 to 10."""

COLUMNS = ("objective", "rate", "distortion")


def trained(directory: Path, options: dict[str, Any]) -> tuple[TrainConfig, TrainResult]:
    """One training run, in place of what the directory holds."""
    from mrvae_models.training import train

    config = configured(directory, options)
    return config, train(config, force=True, progress=False)


def evaluated(config: TrainConfig, model: nn.Module, betas: Sequence[float]) -> dict[str, list[float]]:
    """Objective, rate and distortion on the test split, by beta, in nats an example."""
    from mrvae_models.experiments.evaluation import curve_columns

    columns = curve_columns(config, model, betas, Evaluation(), config.directory)
    return {name: columns[name] for name in COLUMNS}


def planned(seeds: Sequence[int], options: dict[str, Any]) -> list[Run]:
    """The runs: for each seed one multi-rate, and one at each beta."""
    settings = Settings(seeds=tuple(seeds), options=options)
    return [*multirate(settings), *retrained(settings)]


def by_beta(runs: Sequence[Run], results: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """"multi-rate" and each beta -> seed -> columns, as retraining_table() takes them."""
    found: dict[str, dict[str, Any]] = {}
    for run, result in zip(runs, results, strict=True):
        who = MULTIRATE if run.line == MULTIRATE else f"{run.options['beta']:g}"
        found.setdefault(who, {})[str(run.seed)] = {name: result["columns"][name] for name in COLUMNS}
    return found


def table_of(name: str) -> str:
    """The table of a result file. ArgumentTypeError, naming the file, where it is none of these."""
    try:
        document = json.loads(Path(name).read_text())
        return retraining_table(document["runs"], document["betas"])
    except OSError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise argparse.ArgumentTypeError(
            f"{name} is no result file of bench.retraining: {type(error).__name__}: {error}"
        ) from None


def main() -> int:
    """The command."""
    from .arguments import EachOnce, out_file
    from .records import machine

    parser = argparse.ArgumentParser(prog="python -m bench.retraining", description=__doc__)
    parser.add_argument("--seeds", nargs="+", action=EachOnce, type=int, default=[0, 1, 2])
    parser.add_argument("--processes", type=int, default=2, help="runs at a time, one thread each (default 2)")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="OPTION=JSON", help="options of TrainConfig, such as epochs=20"
    )
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/retraining"), help="runs already there are not repeated"
    )
    parser.add_argument("--out", type=out_file, help="write a JSON result file there")
    parser.add_argument("--table", type=table_of, metavar="FILE", help="print the table of a result file and stop")
    arguments = parser.parse_args()
    if arguments.table:
        print(arguments.table)
        return 0
    options = {key: json.loads(value) for key, _, value in (item.partition("=") for item in arguments.set)}
    runs = planned(arguments.seeds, options)
    found = by_beta(runs, execute(runs, Evaluation(), arguments.runs, arguments.processes))
    print(retraining_table(found, BETAS))
    if arguments.out:
        document = {"machine": machine(), "config": TrainConfig(**options).to_dict(), "betas": BETAS, "runs": found}
        arguments.out.write_text(json.dumps(document))
    return 0


if __name__ == "__main__":
    sys.exit(main())

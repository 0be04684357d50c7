"""One multi-rate run against beta-VAEs retrained at every beta, equal steps each: `python -m bench.retraining`.

For each seed: one run of `mrvae train` with its defaults, and one plain network trained at each of ten betas with the
same options. Reported is D + beta R on held-out digits (nats), its mean over seeds, and the ratio of the two.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mrvae_models.config import TrainConfig

if TYPE_CHECKING:  # a process that only lists the runs needs no torch
    from mrvae_models.training import TrainResult
    from torch import nn

BETAS = tuple(round(0.01 * 1000 ** (i / 9), 6) for i in range(10))
"""Ten betas, log-spaced from 0.01 to 10."""

SAMPLES = 8
"""Draws of z an example that a distortion averages over."""


def configured(directory: Path, options: dict[str, Any]) -> TrainConfig:
    """A run's options, in that directory: no logs, next to no validation, one thread unless told otherwise."""
    return TrainConfig(**{"out": str(directory), "threads": 1, "log_to": (), "validate_every": 1000, **options})


def trained(config: TrainConfig) -> TrainResult:
    """One training run, in place of what the directory holds."""
    from mrvae_models.training import train

    return train(config, force=True, progress=False)


def evaluated(config: TrainConfig, model: nn.Module, betas: Sequence[float]) -> dict[str, list[float]]:
    """Objective, rate and distortion on the test split, by beta, in nats an example."""
    from mrvae_models.curve import evaluate
    from mrvae_models.training import calibration_images, load_split

    images = calibration_images(load_split(config, "train"))
    curve = evaluate(model, load_split(config, "test"), betas, samples=SAMPLES, calibration=images)
    return {name: curve.column(name) for name in ("objective", "rate", "distortion")}


def run(directory: Path, options: dict[str, Any], betas: Sequence[float]) -> dict[str, list[float]]:
    """Train (unless the run is there) and evaluate."""
    config = configured(directory, options)
    done = directory / "test.json"
    if done.exists() and json.loads(done.read_text())["config"] == config.to_dict():
        return json.loads(done.read_text())["curve"]
    columns = evaluated(config, trained(config).model, betas)
    done.write_text(json.dumps({"config": config.to_dict(), "curve": columns}))
    return columns


def jobs(
    seeds: Sequence[int], options: dict[str, Any], out: Path
) -> list[tuple[str, int, Path, dict[str, Any], Sequence[float]]]:
    """(who, seed, directory, options, betas) of every run."""
    found = []
    for seed in seeds:
        found.append(("multi-rate", seed, out / f"mr-{seed}", {**options, "seed": seed}, BETAS))
        found += [
            (f"{beta:g}", seed, out / f"beta-{beta:g}-{seed}", {**options, "seed": seed, "beta": beta}, [beta])
            for beta in BETAS
        ]
    return found


def table(runs: dict[str, dict[str, Any]], betas: Sequence[float] = BETAS) -> str:
    """Markdown: a row a beta; mean over seeds and their standard deviation, and the ratio of the means."""
    lines = ["| beta | retrained | one multi-rate run | ratio | rate: retrained, multi-rate |", "|---|---|---|---|---|"]
    ratios = []
    for i, beta in enumerate(betas):
        plain = [curve["objective"][0] for curve in runs[f"{beta:g}"].values()]
        multi = [curve["objective"][i] for curve in runs["multi-rate"].values()]
        rates = [statistics.mean(c["rate"][0] for c in runs[f"{beta:g}"].values())]
        rates.append(statistics.mean(c["rate"][i] for c in runs["multi-rate"].values()))
        ratios.append(statistics.mean(multi) / statistics.mean(plain))
        cells = [f"{statistics.mean(v):.2f} ({statistics.stdev(v) if len(v) > 1 else 0:.2f})" for v in (plain, multi)]
        lines.append(f"| {beta:.3g} | {cells[0]} | {cells[1]} | {ratios[-1]:.3f} | {rates[0]:.2f}, {rates[1]:.2f} |")
    lines.append(f"\nmean ratio {statistics.mean(ratios):.3f}, worst {max(ratios):.3f}")
    return "\n".join(lines)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m bench.retraining", description=__doc__)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--processes", type=int, default=2, help="runs at a time, one thread each (default 2)")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="OPTION=JSON", help="options of TrainConfig, such as epochs=20"
    )
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/retraining"), help="runs already there are not repeated"
    )
    parser.add_argument("--out", type=Path, help="write a JSON result file there")
    parser.add_argument("--table", type=Path, help="print the table of a result file and stop")
    arguments = parser.parse_args()
    if arguments.table:
        print(table(json.loads(arguments.table.read_text())["runs"]))
        return 0
    options = {key: json.loads(value) for key, _, value in (item.partition("=") for item in arguments.set)}
    runs: dict[str, dict[str, Any]] = {}
    with ProcessPoolExecutor(arguments.processes, mp_context=get_context("spawn")) as pool:
        planned = jobs(arguments.seeds, options, arguments.runs)
        futures = {pool.submit(run, *job[2:]): job for job in planned}
        for count, future in enumerate(as_completed(futures), 1):
            who, seed, *_ = futures[future]
            runs.setdefault(who, {})[str(seed)] = future.result()
            print(f"{count}/{len(planned)}: {who}, seed {seed}", flush=True)
    print(table(runs))
    if arguments.out:
        from .records import machine

        document = {"machine": machine(), "config": TrainConfig(**options).to_dict(), "betas": BETAS, "runs": runs}
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(document))
    return 0


if __name__ == "__main__":
    sys.exit(main())

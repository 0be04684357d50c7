"""The price of a rate-distortion curve: one multi-rate run against ten beta-VAEs: `python -m bench.curve_cost`.

All runs are those of `mrvae train`: same network, data, steps, batch and threads, one after the other in one process.
Timed is the training alone, from its first step to its last, with the trainer's own work (a checkpoint an epoch) and
without loading or evaluating; a short run of either kind goes ahead. Each beta's network is trained right beside a
multi-rate run, before it and after it by turns, so that the machine's drift hits both alike:

    one over one     a multi-rate run's time over that of the beta-VAE beside it, median over all pairs
    ten over one     the time of the ten beta-VAEs over that of one multi-rate run, mean over the ten beside them

D + beta R on held-out images comes with it (bench.retraining is about that alone). The default, a few epochs of the
embedded digits, shows the times; networks are not converged then, and the objectives say so little: --epochs 150 is
the recipe's length.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from mrvae_models.config import TrainConfig
from mrvae_models.experiments.tables import retraining_table
from mrvae_models.training import TrainingInterrupted

from . import records
from .arguments import interrupted, out_file, result_file
from .report_tables import interval
from .retraining import BETAS, evaluated, trained
from .timing import Ratio, ratio

WHAT = "curve-cost"
EPOCHS = 8
"""By default: about 90 seconds on two CPU cores."""
CONVERGED = 150
"""Epochs of the default recipe."""


def seconds_and_model(directory: Path, options: dict[str, Any]) -> tuple[float, Any, Any]:
    """Seconds that a run's training took, its options and its model."""
    config, result = trained(directory, options)
    if result.seconds_per_step is None:
        raise RuntimeError(f"the run in {directory} trained nothing; its time is unknown")
    return result.seconds_per_step * result.steps, config, result.model


def measure(
    network: str, seeds: Sequence[int], epochs: int, threads: int, betas: Sequence[float] = BETAS, **others: Any
) -> dict[str, Any]:
    """The result file's entry; `others` are further options of TrainConfig.

    one_run_seconds and retrained_seconds: [seed][beta], the pairs. config: the options that all runs share.
    """
    options = {"network": network, "epochs": epochs, "threads": threads, **others}
    once: list[list[float]] = []
    again: list[list[float]] = []
    runs: dict[str, dict[str, Any]] = {"multi-rate": {}, **{f"{beta:g}": {} for beta in betas}}
    order, turns = random.Random(0), itertools.cycle(((True, False), (False, True)))
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder) / "run"
        for beta in (None, betas[0]):
            seconds_and_model(where, {**options, "epochs": 1, "beta": beta})
        for seed in seeds:
            both: dict[bool, list[float]] = {True: [0.0] * len(betas), False: [0.0] * len(betas)}
            for i in order.sample(range(len(betas)), len(betas)):
                for gated in next(turns):
                    beta = None if gated else betas[i]
                    both[gated][i], config, model = seconds_and_model(where, {**options, "seed": seed, "beta": beta})
                    who = "multi-rate" if gated else f"{betas[i]:g}"
                    if str(seed) not in runs[who]:  # every multi-rate run of a seed ends with the same weights
                        runs[who][str(seed)] = evaluated(config, model, list(betas) if gated else [betas[i]])
                times = f"multi-rate {both[True][i]:.2f} s, beta-VAE {both[False][i]:.2f} s"
                print(f"seed {seed}, beta {betas[i]:g}: {times}", flush=True)
            once.append(both[True])
            again.append(both[False])
    return {
        "network": network, "seeds": list(seeds), "epochs": epochs, "threads": threads, "betas": list(betas),
        "one_run_seconds": once, "retrained_seconds": again, "objective": runs,
        "ratio": {name: value._asdict() for name, value in ratios(once, again).items()},
        "config": TrainConfig(**options).to_dict(),
    }


def earlier_recipe(result: dict[str, Any]) -> str | None:
    """A sentence where an entry's runs have other options than `mrvae train` gives them today, or none recorded."""
    then = result.get("config")
    if then is None:
        return "The file does not say which options its runs had: read it as of an earlier recipe than today's."
    now = TrainConfig(**{name: result[name] for name in ("network", "epochs", "threads")}).to_dict()
    changed = [
        f"`{name}` ({then.get(name, 'not there')!r}, today {now.get(name, 'not there')!r})"
        for name in dict.fromkeys((*then, *now)) if name not in then or name not in now or then[name] != now[name]
    ]
    return f"These runs are of an earlier recipe: today's differs in {', '.join(changed)}." if changed else None


def ratios(once: Sequence[Sequence[float]], again: Sequence[Sequence[float]]) -> dict[str, Ratio]:
    """"one over one" with its bootstrap interval, and "ten over one", whose interval is the range over seeds."""
    pairs = {"one": [t for row in once for t in row], "again": [t for row in again for t in row]}
    totals = [sum(theirs) / statistics.fmean(ours) for ours, theirs in zip(once, again, strict=True)]
    return {
        "one over one": ratio(pairs, "one", "again"),
        "ten over one": Ratio(statistics.median(totals), min(totals), max(totals)),
    }


def summary(result: dict[str, Any]) -> str:
    """Markdown: the times in two sentences, then D + beta R by beta."""
    one, ten = (result["ratio"][name] for name in ("one over one", "ten over one"))
    seconds = statistics.fmean(t for row in result["one_run_seconds"] for t in row)
    totals = f"{ten['median']:.2f}"
    if len(result["seeds"]) > 1:
        totals += f" ({ten['low']:.2f} to {ten['high']:.2f} over seeds)"
    lines = [
        f"`{result['network']}`, {result['epochs']} epochs, seeds {', '.join(map(str, result['seeds']))}, threads "
        f"{result['threads']}: one multi-rate run takes {seconds:.2f} s, {interval(one)} of a beta-VAE's time; "
        f"{len(result['betas'])} beta-VAEs take {totals} times as long as that run. The trainer's own work is part "
        "of both; `bench.overhead` has the step by itself, of such a run as \"recipe\".",
        "",
        "D + beta R on held-out images, in nats (standard deviation over seeds):",
        "",
        retraining_table(result["objective"], result["betas"]),
    ]
    if earlier := earlier_recipe(result):
        lines += ["", earlier]
    if result["epochs"] < CONVERGED:
        lines += ["", f"After {result['epochs']} epochs neither is converged: these objectives show that the runs are "
                  f"comparable, not which is better. `--epochs {CONVERGED}` is the recipe's length."]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 130 where it was interrupted."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.curve_cost", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", default="mlp", help="a bundled network (default mlp)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="one curve each (default 0)")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help=f"passes over the digits a run (default {EPOCHS})")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(),
                        help="of torch, for every run (default: torch's own number)")
    parser.add_argument("--out", type=out_file, help="write a JSON result file there")
    parser.add_argument("--table", type=result_file(WHAT), metavar="FILE",
                        help="print the Markdown of a result file and stop")
    options = parser.parse_args(arguments)
    if options.table:
        print(*(summary(result) for result in options.table.results), sep="\n\n")
        return 0
    for name in ("epochs", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} is {getattr(options, name)}; expected a whole number of at least 1")
    if len(set(options.seeds)) < len(options.seeds):
        parser.error(f"--seeds are {options.seeds}; expected each once")
    try:
        result = measure(options.network, options.seeds, options.epochs, options.threads)
    except ValueError as error:
        parser.error(str(error))
    except (TrainingInterrupted, KeyboardInterrupt):  # a curve is measured whole or not at all
        return interrupted("curve_cost", None)
    print("\n" + summary(result))
    if options.out:
        records.write(options.out, WHAT, [result])
        print(f"written: {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

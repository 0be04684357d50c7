"""What an experiment leaves: results.csv with every number, a picture, config.json, and a Markdown page about them."""

from __future__ import annotations

import csv
import datetime
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..options import read_json
from ..run import LAST, MODEL, check_directory, replace_file, versions, write_json
from .command_lines import command_of
from .execution import configured
from .plan import Experiment, Run
from .rows import rows_of
from .tables import TABLES, seconds

CSV, PICTURE, CONFIG = "results.csv", "figure.png", "config.json"


def check_out(experiment: str, out: Path) -> None:
    """FileExistsError where `out` holds what write_page() would replace and is not of this experiment: a run, whose
    config.json has the same name, another experiment, or a config.json of something else."""
    check_directory(out)
    document = read_json(out / CONFIG) if (out / CONFIG).exists() else {}
    named = document.get("experiment")
    of_run = str(document.get("format")).startswith("mrvae-run/")
    if named == experiment:
        return
    if named is not None:
        held = f"the experiment {named!r}"
    elif of_run or any((out / name).exists() for name in (LAST, MODEL)):
        held = "a training run"
    elif document:
        held = f"a {CONFIG} of something else"
    else:
        return
    raise FileExistsError(
        f"{out} holds {held}, whose files those of the experiment {experiment!r} would replace; give another --out"
    )


def write_page(
    experiment: Experiment, runs: Sequence[Run], results: Sequence[Mapping[str, Any]], out: Path, command: str
) -> list[Path]:
    """Write all files of an experiment to its directory; returns them.

    command: what the experiment was started with, for the page.
    """
    from .figures import draw

    rows = rows_of(runs, results)
    page = out / f"{experiment.name}.md"
    files = [out / CSV, out / PICTURE, out / CONFIG, page]
    _write_csv(files[0], rows)
    draw(experiment, rows, out, files[1])
    write_json(
        files[2],
        {
            "experiment": experiment.name,
            "command": command,
            "evaluation": results[0]["evaluation"],
            "versions": versions(),
            "runs": [
                {"name": run.name, "line": run.line, "seed": run.seed, "betas": run.betas, "config": result["config"]}
                for run, result in zip(runs, results, strict=True)
            ],
        },
    )
    text = _text(experiment, runs, results, rows, out, command)
    replace_file(page, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    return files


def _write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Numbers with all their digits; no time and no path, so that equal runs give an equal file."""
    names = list(dict.fromkeys(name for row in rows for name in row))

    def write(temporary: Path) -> None:
        with open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(rows)

    replace_file(path, write)


def _text(
    experiment: Experiment,
    runs: Sequence[Run],
    results: Sequence[Mapping[str, Any]],
    rows: Sequence[Mapping[str, Any]],
    out: Path,
    command: str,
) -> str:
    parts = [
        f"# {experiment.name}",
        experiment.question
        + (f" Reproduces {experiment.shows} of Bae et al., 2022." if experiment.of_paper else ""),
        f"![{experiment.name}]({PICTURE})",
        "Means over seeds, with standard deviations in parentheses and as error bars.\n"
        if len({run.seed for run in runs}) > 1
        else "One seed: no spread is known.\n",
        "## Result",
        *(TABLES[name](rows) for name in experiment.tables),
        "## What was compared",
        _compared(experiment, runs, results),
        *([experiment.note] if experiment.note else []),
        "## Reproduce",
        f"```\n{command}\n```",
        f"or one run at a time; numbers of all of them are in {CSV}:",
        "```\n" + "\n".join(command_of(configured(out / "runs" / run.name, run.options)) for run in runs) + "\n```",
        ", ".join(f"{name} {version}" for name, version in versions().items())
        + f"; written {datetime.date.today().isoformat()}",
    ]
    return "\n\n".join(part.rstrip() for part in parts) + "\n"


def _counts(results: Sequence[Mapping[str, Any]]) -> str:
    """On how many examples the runs' metric was measured."""
    counts = {int(count) for result in results for count in result["columns"].get("metric_examples", [])}
    return " or ".join(f"{count:,}" for count in sorted(counts)) or "an unknown number of"


def counted(number: int, noun: str) -> str:
    """A number with its noun."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _compared(experiment: Experiment, runs: Sequence[Run], results: Sequence[Mapping[str, Any]]) -> str:
    """Sentences from the runs: lines, seeds, network, data, epochs, betas, what they were evaluated by, and times."""
    configs = [result["config"] for result in results]

    def all_of(name: str) -> str:
        return ", ".join(dict.fromkeys(str(config[name]) for config in configs))

    lines = dict.fromkeys(run.line for run in runs)
    counts = [f"{line} ({counted(sum(run.line == line for run in runs), 'run')})" for line in lines]
    betas = sorted({beta for run in runs for beta in run.betas})
    evaluation = experiment.evaluation
    measured = {
        "linear": "rate and expected distortion on the training split",
        "metric": f"the metric {evaluation.metric} on {_counts(results)} examples, the curve on the test split",
    }.get(evaluation.kind, "the curve on the test split")
    draws = "" if evaluation.kind == "linear" else f", {counted(evaluation.draws, 'draw')} of z an example"
    text = (
        f"{'; '.join(counts)}. Seeds {', '.join(map(str, sorted({run.seed for run in runs})))}; network "
        f"{all_of('network')}, data {all_of('data')}, recipe {all_of('recipe')}, epochs {all_of('epochs')}, batches "
        f"of {all_of('batch_size')}. Evaluated: {measured}{draws}, at {len(betas)} betas from {betas[0]:g} to "
        f"{betas[-1]:g}."
    )
    for line in lines:
        times = [result["seconds"] for run, result in zip(runs, results, strict=True) if run.line == line]
        known = [time for time in times if time is not None]
        if known:
            text += f" Training of {line}: {seconds(statistics.fmean(known))} a run, {seconds(sum(known))} in all."
    return text

"""Rows of an experiment, one a run and beta, and what tables and pictures take from them. No torch here."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from .plan import Run

Row = Mapping[str, Any]


def rows_of(runs: Sequence[Run], results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row a run and beta, in the order of the runs."""
    return [
        {
            "line": run.line,
            "run": run.name,
            "seed": run.seed,
            "beta": beta,
            **{name: values[i] for name, values in result["columns"].items()},
        }
        for run, result in zip(runs, results, strict=True)
        for i, beta in enumerate(run.betas)
    ]


def by_line(rows: Sequence[Row]) -> dict[str, dict[int, list[Row]]]:
    """line -> seed -> rows in order of beta; a line of beta-VAEs has a row a run."""
    found: dict[str, dict[int, list[Row]]] = {}
    for row in rows:
        found.setdefault(row["line"], {}).setdefault(row["seed"], []).append(row)
    return {
        line: {seed: sorted(its, key=lambda row: row["beta"]) for seed, its in seeds.items()}
        for line, seeds in found.items()
    }


def along_beta(rows: Sequence[Row], column: str) -> dict[str, dict[float, list[float]]]:
    """line -> beta -> values of a column, one a seed."""
    found: dict[str, dict[float, list[float]]] = {}
    for row in sorted(rows, key=lambda row: row["beta"]):
        found.setdefault(row["line"], {}).setdefault(row["beta"], []).append(row[column])
    return {line: found[line] for line in by_line(rows)}  # in the order of the experiment


def cell(values: Sequence[float], digits: int = 2) -> str:
    """Mean, and the standard deviation where there are several."""
    if not values:
        return ""
    spread = f" ({statistics.stdev(values):.{digits}f})" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{spread}"


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    first, *rest = (f"| {' | '.join(cells)} |" for cells in [header, *lines])
    return "\n".join([first, "|" + "---|" * len(header), *rest])

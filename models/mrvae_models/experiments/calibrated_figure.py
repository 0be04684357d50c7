"""The picture of `calibrated`: every method on the plane and the beta axis of one multi-rate run, and its way there."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..plot import LINE, MARK_COLOURS, log_axis, mark, mark_beta, mark_betas
from ..progress import METRICS
from .calibrated import BETA_VAE, BS_VAE, L_VAE
from .calibrated_tables import fixed_points
from .plan import MULTIRATE, Experiment
from .rows import Row, along_beta


def calibrated(figure: Figure, experiment: Experiment, rows: Sequence[Row], out: Path) -> None:
    """Rate and distortion; bounds on -log p along beta, of test and training; beta as it is learned, epoch by epoch."""
    figure.set_size_inches(10.0, 7.6)
    (plane, course), (training, test) = figure.subplots(2, 2)
    lines = [line for line in along_beta(rows, "rate") if line != MULTIRATE]
    multi = [row for row in rows if row["line"] == MULTIRATE and row["seed"] == rows[0]["seed"]]
    multi.sort(key=lambda row: row["beta"])
    panels = ((plane, "rate", "distortion"), (training, "own_beta", "nll_train"), (test, "own_beta", "nll"))
    for axis, x, y in panels:
        axis.plot(_column(multi, x), _column(multi, y), "o-", color=LINE, markersize=2.5, label="multi-rate, one run")
        for index, line in enumerate(lines):
            its = [row for row in rows if row["line"] == line]
            mark(axis, index, line, _column(its, x), _column(its, y))
            if axis is not plane and line not in (BETA_VAE, BS_VAE):
                mark_beta(axis, index, _column(its, "own_beta"))
    plane.set(title="Means of all decoders, sigma = 1", xlabel="rate R (nats)", ylabel="distortion D (nats)")
    for axis, where, column in ((training, "training examples", "nll_train"), (test, "the test split", "nll")):
        axis.set(title=f"Where each lands, {where}", xlabel=r"own $\beta$", ylabel=r"bound on $-\log p$ (nats)")
        axis.set_xscale("log")
        log_axis(axis, _column(rows, "own_beta"))
        _zoom(axis, _column(rows, column))
    _course(course, rows, lines, out)
    figure.legend(*plane.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    at = [row for row in multi if row["beta"] in {row["beta"] for row in rows if row["line"] == BETA_VAE}]
    mark_betas(plane, _column(at, "beta"), np.column_stack([_column(at, "rate"), _column(at, "distortion")]))


def _column(rows: Sequence[Row], name: str) -> list[float]:
    return [row[name] for row in rows]


def _zoom(axis: Axes, values: Sequence[float]) -> None:
    """The lower part of the bounds: at the smallest betas they rise far above all others, by 1 / beta."""
    low, high = min(values), float(np.quantile(values, 0.8))
    if max(values) > high + 2 * (high - low) > low:
        axis.set_ylim(low - 0.08 * (high - low), high + 0.5 * (high - low))


def _course(axis: Axes, rows: Sequence[Row], lines: Sequence[str], out: Path) -> None:
    """own beta by epoch, beta sigma^2 of each run or L-VAE's learned beta, and where the curve says it ends."""
    axis.set(title=r"$\beta$ as it is learned", xlabel="epoch", ylabel=r"own $\beta$", yscale="log")
    for row in rows:
        path = out / "runs" / row["run"] / METRICS
        if row["line"] in (MULTIRATE, BETA_VAE) or not path.exists():
            continue
        epochs, betas = course_of(path, row)
        index = lines.index(row["line"])
        axis.plot(epochs, betas, color=MARK_COLOURS[index % len(MARK_COLOURS)], linewidth=1.1)
        mark(axis, index, row["line"], epochs[-1:], betas[-1:])
        if row["line"] == BS_VAE:
            label = rf"BS-VAE, $\beta$ = {row['beta']:g}"
            axis.annotate(label, (epochs[0], betas[0]), (0, 4), textcoords="offset points", fontsize=7)
    for method, values in fixed_points(rows).items():
        for value in values:
            axis.axhline(value, color=LINE, linewidth=0.9, linestyle="--", zorder=1)
            axis.annotate(
                f"{method}, solved for", (0.02, value), xycoords=("axes fraction", "data"), fontsize=7, va="bottom"
            )


def course_of(path: Path, row: Row) -> tuple[list[int], list[float]]:
    """Epochs and own betas of a run's metrics.csv: L-VAE's beta, or beta sigma^2."""
    with open(path, newline="", encoding="utf-8") as file:
        log = list(csv.DictReader(file))
    of_l_vae = row["line"] == L_VAE
    betas = [float(each["train/beta"]) if of_l_vae else row["beta"] * float(each["train/sigma"]) ** 2 for each in log]
    return [int(each["epoch"]) for each in log], betas

"""Pictures of an experiment: means over seeds, error bars of one standard deviation; the look is plot.py's."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..plot import BASELINES, LINE, STYLE, log_axis, mark_betas, mosaic, write_figure
from .calibrated_figure import calibrated
from .evaluation import SAMPLES
from .plan import MULTIRATE, Experiment
from .rows import Row, along_beta, by_line
from .tables import are_ratios, over_retraining

MARKERS = "oDs^v<>"
BETA = r"KL weight $\beta$"
OBJECTIVE = r"D + $\beta$R (nats)"

PICTURED_BETAS = 6


def draw(experiment: Experiment, rows: Sequence[Row], out: Path, path: Path) -> None:
    """Write the experiment's picture. out: its directory, where its runs left their samples."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10.0, 4.0), layout="constrained")
        FigureCanvasAgg(figure)
        FIGURES[experiment.figure](figure, experiment, rows, out)
        write_figure(figure, path)


def _look(index: int) -> dict[str, Any]:
    """Colour and marker of a line, by its place in the experiment."""
    colours = (LINE, *BASELINES, "#3a9188", "#7a7a7a")
    return {
        "color": colours[index % len(colours)],
        "marker": MARKERS[index % len(MARKERS)],
        "markerfacecolor": "none" if index else None,
    }


def _means(values: Sequence[Sequence[float]]) -> tuple[list[float], list[float]]:
    """Means and standard deviations, 0 of one value."""
    return (
        [statistics.fmean(its) for its in values],
        [statistics.stdev(its) if len(its) > 1 else 0.0 for its in values],
    )


def _plot(axis: Axes, index: int, label: str, x: Any, y: Any, x_error: Any = None, y_error: Any = None) -> None:
    # points of separate runs are joined thinly: between them nothing was trained
    joined = 1.4 if label == MULTIRATE or index == 0 else 0.7
    axis.errorbar(x, y, y_error, x_error, label=label, linewidth=joined, elinewidth=0.8, **_look(index))


def along(axis: Axes, rows: Sequence[Row], column: str, title: str, label: str) -> None:
    """A column against beta, a line each."""
    lines = along_beta(rows, column)
    axis.set(title=title, xlabel=BETA, ylabel=label, xscale="log")
    log_axis(axis, [beta for betas in lines.values() for beta in betas])
    for index, (line, betas) in enumerate(lines.items()):
        means, errors = _means(list(betas.values()))
        _plot(axis, index, line, list(betas), means, y_error=errors)


def plane(axis: Axes, rows: Sequence[Row], title: str = "Rate-distortion curve") -> None:
    """Distortion against rate, a line each; betas are written beside the first."""
    mark_betas(axis, *_lines(axis, rows, title))


def _lines(axis: Axes, rows: Sequence[Row], title: str) -> tuple[list[float], np.ndarray]:
    """The plane without betas; returns those of the first line, and its points."""
    rates, distortions = along_beta(rows, "rate"), along_beta(rows, "distortion")
    marked: list[tuple[list[float], np.ndarray]] = []
    for index, line in enumerate(rates):
        (x, x_error), (y, y_error) = (_means(list(values[line].values())) for values in (rates, distortions))
        _plot(axis, index, line, x, y, x_error, y_error)
        marked.append((list(rates[line]), np.column_stack([x, y])))
    axis.set(title=title, xlabel="rate R (nats)", ylabel="distortion D (nats)")
    axis.margins(0.08)
    return marked[0]


def relative(axis: Axes, rows: Sequence[Row]) -> None:
    """D + beta R of each line over that of the first, along beta; the band is the first's own spread over seeds. Where
    a mean is not positive, differences in nats in place of ratios."""
    lines = along_beta(rows, "objective")
    reference, *others = lines
    means, errors = _means(list(lines[reference].values()))
    base = dict(zip(lines[reference], means, strict=True))
    ratios = are_ratios(mean for its in lines.values() for mean in _means(list(its.values()))[0])
    spread, level = (np.array(errors) / np.array(means), 1) if ratios else (np.array(errors), 0)
    axis.set(title=rf"D + $\beta$R {'over' if ratios else 'less'} that of {reference}", xlabel=BETA, xscale="log")
    axis.set_ylabel("ratio" if ratios else "difference (nats)")
    log_axis(axis, list(base))
    axis.fill_between(list(base), level - spread, level + spread, color=LINE, alpha=0.15, linewidth=0)
    axis.axhline(level, color=LINE, linewidth=1.4, label=reference)
    for index, line in enumerate(others, 1):
        shared = [beta for beta in lines[line] if beta in base]
        values = [
            [value / base[beta] if ratios else value - base[beta] for value in lines[line][beta]] for beta in shared
        ]
        mean, error = _means(values)
        _plot(axis, index, line, shared, mean, y_error=error)


def _legend(axis: Axes) -> None:
    axis.legend(loc="best", fontsize=8)


def _plane(figure: Figure, experiment: Experiment, rows: Sequence[Row], out: Path) -> None:
    left, right = figure.subplots(1, 2)
    plane(left, rows)
    relative(right, rows)
    _legend(left)


def _objective(figure: Figure, experiment: Experiment, rows: Sequence[Row], out: Path) -> None:
    left, right = figure.subplots(1, 2)
    along(left, rows, "objective", r"Objective at each $\beta$", OBJECTIVE)
    relative(right, rows)
    _legend(left)


def _active_units(figure: Figure, experiment: Experiment, rows: Sequence[Row], out: Path) -> None:
    left, right = figure.subplots(1, 2)
    along(left, rows, "active_units", "Active units", "latent dimensions in use")
    left.yaxis.set_major_locator(MaxNLocator(integer=True))
    top = left.get_ylim()[1]
    left.set_ylim(-0.05 * top, top)  # points at 0 are drawn whole
    plane(right, rows)
    _legend(left)


def _metric(figure: Figure, experiment: Experiment, rows: Sequence[Row], out: Path) -> None:
    left, right = figure.subplots(1, 2)
    name = (experiment.evaluation.metric or "metric").rpartition("/")[2]
    along(left, rows, "metric", r"Metric along $\beta$", name)
    plane(right, rows)
    _legend(left)


def _ranges(figure: Figure, experiment: Experiment, rows: Sequence[Row], out: Path) -> None:
    left, right = figure.subplots(1, 2, sharex=True, sharey=True)
    marked = []
    for axis, same, title in ((left, 1, "[a, 10]"), (right, 0, "[0.01, b]")):
        ends = [line.split(" to ") for line in by_line(rows)]
        wanted = {" to ".join(end) for end in ends if end[same] == ("0.01", "10")[same]}
        chosen = [row for row in rows if row["line"] in wanted]
        marked.append(_lines(axis, chosen, rf"$\beta$ drawn from {title}"))
        _legend(axis)
    for axis, places in zip((left, right), marked, strict=True):  # it fixes the limits, which both share
        mark_betas(axis, *places)


def _linear(figure: Figure, experiment: Experiment, rows: Sequence[Row], out: Path) -> None:
    left, right = figure.subplots(1, 2)
    places = _lines(left, rows, "Rate-distortion curve, training images")
    best = sorted({(row["optimal_rate"], row["optimal_distortion"]) for row in rows})
    left.plot(*zip(*best, strict=True), "x:", color="black", linewidth=1.0, label="optimum", zorder=5)
    mark_betas(left, *places)  # it fixes the limits
    excess = [{**row, "excess": 100 * (row["objective"] / row["optimal_objective"] - 1)} for row in rows]
    along(right, excess, "excess", r"D + $\beta$R above the optimum", "excess (%)")
    right.axhline(0, color="black", linestyle=":", linewidth=1.2)
    _legend(left)


def _samples(figure: Figure, experiment: Experiment, rows: Sequence[Row], out: Path) -> None:
    """Blocks side by side, a line each, of its first seed: a row a beta, the same latent variables throughout."""
    blocks: dict[str, dict[float, torch.Tensor]] = {}
    for line, seeds in by_line(rows).items():
        its = next(iter(seeds.values()))
        for name in dict.fromkeys(row["run"] for row in its):
            betas = [row["beta"] for row in its if row["run"] == name]
            drawn = torch.from_numpy(np.load(out / "runs" / name / SAMPLES, allow_pickle=False))
            blocks.setdefault(line, {}).update(zip(betas, drawn, strict=True))
    betas = sorted(next(iter(blocks.values())))
    count = min(PICTURED_BETAS, len(betas))
    chosen = [betas[round(i * (len(betas) - 1) / max(1, count - 1))] for i in range(count)]
    images = next(iter(blocks.values()))[chosen[0]]
    width = 10.0 / len(blocks) - 0.7  # inches, the names of the betas stand before it
    figure.set_size_inches(10.0, 0.4 + count * width / len(images) * images.shape[2] / images.shape[3])
    axes = figure.subplots(1, len(blocks), squeeze=False)[0]
    names = [rf"$\beta$ = {beta:.3g}" for beta in chosen]
    for axis, (line, block) in zip(axes, blocks.items(), strict=True):
        mosaic(axis, line, [block[beta] for beta in chosen], names, count)


def _against(figure: Figure, experiment: Experiment, rows: Sequence[Row], out: Path) -> None:
    """A cell a line and beta: by how many per cent D + beta R is above retraining's; by how many nats, where one is not
    positive."""
    _, betas, over, ratios = over_retraining(rows)
    values = np.array(list(over.values()))
    excess = 100 * (values - 1) if ratios else values
    figure.set_size_inches(10.0, 1.2 + 0.27 * len(over))
    axis = figure.subplots()
    # beyond it the colour says no more than "lost": 5 per cent, or what nine tenths of the differences are within
    reach = 5.0 if ratios else float(np.quantile(np.abs(excess), 0.9)) or 1.0
    image = axis.imshow(excess, cmap="RdBu_r", vmin=-reach, vmax=reach, aspect="auto")
    for (i, j), value in np.ndenumerate(excess):
        colour = "white" if abs(value) > 0.7 * reach else "black"
        axis.text(j, i, f"{value:+.1f}", ha="center", va="center", color=colour, fontsize=7)
    axis.set_xticks(range(len(betas)), [f"{beta:.3g}" for beta in betas])
    axis.set_yticks(range(len(over)), list(over))
    axis.grid(False)
    axis.set(title=rf"D + $\beta$R above retraining's ({'%' if ratios else 'nats'})", xlabel=BETA)
    figure.colorbar(image, ax=axis, extend="both", shrink=0.8)


FIGURES: dict[str, Callable[[Figure, Experiment, Sequence[Row], Path], None]] = {
    "plane": _plane,
    "objective": _objective,
    "active_units": _active_units,
    "metric": _metric,
    "ranges": _ranges,
    "linear": _linear,
    "samples": _samples,
    "against": _against,
    "calibrated": calibrated,
}

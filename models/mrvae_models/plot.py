"""The figure of a curve: rate against distortion, D + beta R and active units against beta, and images along beta."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure, SubFigure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator, NullFormatter
from torch import Tensor

from .curve import Curve
from .pictures import Pictures
from .run import replace_file

STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "lines.markersize": 4.5,
    "savefig.dpi": 200,
}
COLOURS = "viridis"
LINE = "#35506b"
MARKS = "DsP^vXp*<>"
MARK_COLOURS = ("#c8553d", "#8c5e99", "#6a8d3c", "#b8860b", "#3a9188", "#d17aa5", "#5b5b5b")
BASELINES = ("#c8553d", "#6a8d3c", "#8c5e99", "#b8860b")
MANY = 40
"""Betas from which on their points touch each other."""

LABELS = 6
"""Numbers along an axis of betas, at most."""


def draw(
    curve: Curve,
    path: str | Path,
    images: Pictures | None = None,
    others: Mapping[str, Curve] | None = None,
    marks: Mapping[str, Curve] | None = None,
) -> None:
    """Write the figure of `curve` to a PNG (or PDF, SVG: by the name's ending), with `images` along beta below.

    others: label -> curve, such as separately trained beta-VAEs of one point each, drawn beside it.
    marks: label -> points of a method where it lands on the curve, drawn on it, with a line at its beta.
    Error bars are one standard error. Nothing is written when drawing fails.
    """
    path = Path(path)
    curves = 3.1  # inches
    grid = 0.0
    if images is not None:
        _, _, height, width = images.originals.shape
        count = _columns(images)
        grid = 0.35 + (len(images.betas) + 1) * 4.15 / count * height / width  # 4.15 inches for a row of images
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10.0, curves + grid), layout="constrained")
        FigureCanvasAgg(figure)
        if images is None:
            _curves(figure.subplots(1, 3), curve, others or {}, marks or {})
        else:
            top, bottom = cast(Any, figure.subfigures(2, 1, height_ratios=[curves, grid]))
            _curves(top.subplots(1, 3), curve, others or {}, marks or {})
            _images(bottom.subplots(1, 2), images)
        write_figure(figure, path)


def write_figure(figure: Figure, path: Path) -> None:
    """The figure as PNG, or what the name's ending says; whole or not at all."""
    kind = path.suffix.removeprefix(".") or "png"
    replace_file(path, lambda temporary: figure.savefig(temporary, format=kind))


def mark(axis: Axes, index: int, label: str, x: Sequence[float], y: Sequence[float]) -> None:
    """The points of one method, by its place among the methods: a colour and a shape of its own."""
    axis.plot(
        x,
        y,
        linestyle="none",
        marker=MARKS[index % len(MARKS)],
        markersize=8,
        color=MARK_COLOURS[index % len(MARK_COLOURS)],
        markeredgecolor="white",
        markeredgewidth=0.7,
        zorder=6,
        label=label,
    )


def mark_beta(axis: Axes, index: int, betas: Sequence[float]) -> None:
    """A thin line at each beta of the method, in its colour."""
    for beta in betas:
        axis.axvline(beta, color=MARK_COLOURS[index % len(MARK_COLOURS)], linewidth=0.8, linestyle=":", zorder=1)


def _curves(
    axes: Sequence[Axes], curve: Curve, others: Mapping[str, Curve], marks: Mapping[str, Curve]
) -> None:
    plane, objective, active = axes
    betas = curve.column("beta")
    norm = LogNorm(min(betas), max(betas)) if len(betas) > 1 else LogNorm(betas[0] / 10, betas[0] * 10)
    name = "multi-rate, one run" if len(betas) > 1 else f"$\\beta$ = {betas[0]:.3g}"

    plane.set(title="Rate-distortion curve", xlabel="rate R (nats)", ylabel="distortion D (nats)")
    objective.set(
        title=r"Objective at each $\beta$", xlabel=r"KL weight $\beta$", ylabel=r"D + $\beta$R (nats)", xscale="log"
    )
    active.set(title="Active units", xlabel=r"KL weight $\beta$", ylabel="latent dimensions in use", xscale="log")
    drawn = (*others.values(), *marks.values())
    for axis in (objective, active):  # before what is drawn: of a single beta no limits can be found
        log_axis(axis, [*betas, *(beta for other in drawn for beta in other.column("beta"))])
    panels = [
        (plane, "rate", "distortion", "rate_se", "distortion_se"),
        (objective, "beta", "objective", None, "objective_se"),
        (active, "beta", "active_units", None, "active_units_se"),
    ]
    for axis, x, y, x_error, y_error in panels:
        axis.plot(curve.column(x), curve.column(y), color=LINE, zorder=2, label=name, marker="o", markersize=0)
        axis.errorbar(
            curve.column(x),
            curve.column(y),
            curve.column(y_error),
            curve.column(x_error) if x_error else None,
            fmt="none",
            ecolor=LINE,
            elinewidth=0.8,
            zorder=2,
        )
        many = len(betas) > MANY  # white edges would cover the neighbours' colours
        axis.scatter(
            curve.column(x),
            curve.column(y),
            c=betas,
            cmap=COLOURS,
            norm=norm,
            s=10 if many else 26,
            zorder=3,
            edgecolors="none" if many else "white",
            linewidths=0.6,
        )
        for index, (label, other) in enumerate(others.items()):
            axis.errorbar(
                other.column(x),
                other.column(y),
                other.column(y_error),
                other.column(x_error) if x_error else None,
                fmt="D",
                markersize=4.5,
                markerfacecolor="none",
                color=BASELINES[index % len(BASELINES)],
                elinewidth=0.8,
                zorder=4,
                label=label,
            )
        for index, (label, found) in enumerate(marks.items()):
            mark(axis, index, label, found.column(x), found.column(y))
            if axis is not plane:
                mark_beta(axis, index, found.column("beta"))
        axis.margins(0.08)
    plane.xaxis.set_major_locator(MaxNLocator(5))
    plane.ticklabel_format(axis="x", scilimits=(-2, 5))  # of tiny rates the zeros would run into each other
    active.yaxis.set_major_locator(MaxNLocator(integer=True))
    points = [point for each in (curve, *drawn) for point in each.points]
    most = max(1, *(point.active_units + np.nan_to_num(point.active_units_se) for point in points))
    active.set_ylim(-0.05 * most, 1.1 * most)  # points at 0 are drawn whole
    if others:
        objective.legend(loc="best")
    if marks:
        handles = [pair for pair in zip(*plane.get_legend_handles_labels(), strict=True) if pair[1] in marks]
        legend = plane.legend(*zip(*handles, strict=True), loc="upper right", fontsize=7, frameon=True)
        legend.get_frame().set(edgecolor="#cccccc", alpha=0.9)  # its markers are no points of the plane
    mark_betas(plane, betas, np.column_stack([curve.column("rate"), curve.column("distortion")]))


def log_axis(axis: Axes, betas: Sequence[float]) -> None:
    """A log axis with plain numbers at powers of ten, at every k-th where there would be more than LABELS, and between
    them where there would be fewer than three; of a single beta, that number."""
    low, high = min(betas) / 1.5, max(betas) * 1.5
    axis.set_xlim(low, high)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [betas[0]]
    if min(betas) < max(betas):
        for digits in ((1,), (1, 2, 5), (1, 2, 3, 4, 5, 6, 7, 8, 9)):
            ticks = [float(f"{digit}e{power}") for power in powers for digit in digits]
            ticks = [tick for tick in ticks if low <= tick <= high]
            if len(ticks) >= 3:
                break
        ticks = ticks[:: math.ceil(len(ticks) / LABELS)]
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.xaxis.set_minor_formatter(NullFormatter())


def mark_betas(axis: Axes, betas: Sequence[float], places: np.ndarray) -> None:
    """Write beta beside the points of a plane, as many as fit without touching each other or a point.

    places: (betas, 2), in order of beta.
    """
    figure: Any = axis.figure
    while isinstance(figure, SubFigure):
        figure = figure.figure
    low, high = axis.get_xlim()
    axis.set_xlim(low, high + 0.12 * (high - low))  # room for the last label
    renderer: Any = figure.canvas.get_renderer()
    figure.draw_without_rendering()
    points = axis.transData.transform(places)
    taken: list[Any] = []
    count = len(betas)
    # the ends first, then the middle outwards: what is left out lies between two that are there
    order = sorted(range(count), key=lambda i: (i not in (0, count - 1), abs(i - count // 2)))
    for index in order:
        text = axis.annotate(
            f"$\\beta$ = {betas[index]:.3g}" if index in (0, count - 1) else f"{betas[index]:.3g}",
            tuple(places[index]),
            xytext=(5, 4),
            textcoords="offset points",
            fontsize=8,
            color="#333333",
            path_effects=[withStroke(linewidth=2.2, foreground="white")],  # lines and error bars run below it
            zorder=5,
        )
        box = text.get_window_extent(renderer).padded(2)
        if any(box.overlaps(other) for other in taken) or any(
            box.contains(*where) for i, where in enumerate(points) if i != index
        ):
            text.remove()
        else:
            taken.append(box)


def _images(axes: Sequence[Axes], images: Pictures) -> None:
    labels = [rf"$\beta$ = {beta:.3g}" for beta in images.betas]
    total = len(labels) + 1
    titles = ["Reconstructions of held-out images", r"Samples, the same z at every $\beta$"]
    if images.given is not None:
        before = "frame" if images.given == 1 else f"{images.given} frames"
        titles = [
            "A held-out clip, each frame from the true one before",
            f"Predicted from the {before} left of the line",
        ]
    blocks = [([images.originals, *images.reconstructions], ["data", *labels]), ([*images.samples], labels)]
    for axis, title, (rows, names) in zip(axes, titles, blocks, strict=True):
        mosaic(axis, title, rows, names, total, _columns(images))
    if images.given is not None:
        width = _tiles(images.originals[:1]).shape[2]
        for axis, frames in zip(axes, (1, images.given), strict=True):  # what is before the line is the clip's own
            axis.axvline(frames * width, 0, 1 - 1 / total, color=MARK_COLOURS[0], linewidth=1.6)


def _columns(images: Pictures) -> int:
    """Images in a row: there may be fewer examples than samples."""
    return max(len(images.originals), images.samples.shape[1])


def mosaic(
    axis: Axes, title: str, rows: Sequence[Tensor], names: Sequence[str], total: int, columns: int | None = None
) -> None:
    """Rows of images, (n, C, H, W) each, with their names.

    They stand in the lowest of `total` rows, and the first of `columns` (default: n), so that rows of the same name
    line up between axes side by side, and images are of one size.
    """
    tiles = [_tiles(row) for row in rows]
    pixels = np.concatenate([np.concatenate(list(row), axis=1) for row in tiles], axis=0)
    count, height, width = tiles[0].shape[:3]
    first = (total - len(rows)) * height
    axis.imshow(
        np.clip(pixels, 0, 1).squeeze(-1) if pixels.shape[-1] == 1 else np.clip(pixels, 0, 1),
        cmap="gray",
        vmin=0,
        vmax=1,
        interpolation="nearest",
        extent=(0, count * width, total * height, first),
    )
    axis.set_xlim(0, (columns or count) * width)
    axis.set_ylim(total * height, 0)
    axis.set_title(title, y=1 - first / (total * height))
    axis.set_yticks([first + height * (i + 0.5) for i in range(len(rows))], names)
    axis.set_xticks([])
    axis.tick_params(length=0)
    for spine in axis.spines.values():
        spine.set_visible(False)


def _tiles(images: Tensor) -> np.ndarray:
    """(n, C, H, W) as (n, H, W, C), with one channel or three; colour images, which fill their squares, with a gap."""
    array = images.movedim(1, -1).numpy()
    if array.shape[-1] != 3:
        return array[..., :1]
    gap = max(1, round(min(array.shape[1:3]) / 24))
    return np.pad(array, ((0, 0), (0, gap), (0, gap), (0, 0)), constant_values=1.0)

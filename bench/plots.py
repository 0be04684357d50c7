"""PNG plots of result files: ratios with their 95 % intervals, lines at 1.00 (free) and 1.05 (the paper's promise).

Each carries a digest of the results that it was drawn from, by which `drawn_from` tells a plot that is out of date.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter
from mrvae_models.plot import STYLE
from mrvae_models.run import replace_file
from PIL import Image

Results = Sequence[Mapping[str, Any]]

COLOURS = {
    "gated": "#2a6f97", "per-sample": "#c8553d", "recipe": "#5f0f40", "listing1": "#8a8a8a", "plain-fold": "#b8860b",
    "baked": "#6a8d3c",
}
MARKERS = {"gated": "o", "per-sample": "s", "recipe": "P", "listing1": "v", "plain-fold": "^", "baked": "D"}
OTHERS = ("#8c5e99", "#6a8d3c", "#3d405b", "#e07a5f", "#81b29a", "#577590", "#bc6c25")
PROMISED = 1.05
DPI = 110
KEY = "Description"
"""The PNG text that holds the digest."""


def digest(results: Results) -> str:
    """Of the results, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(results, sort_keys=True).encode()).hexdigest()


def drawn_from(path: Path) -> str | None:
    """The digest in a plot; None for a file that is not there or was not drawn here."""
    if not path.exists():
        return None
    with Image.open(path) as image:
        return getattr(image, "text", {}).get(KEY)


def save(figure: Figure, path: Path, results: Results) -> None:
    """The figure as a PNG of a few dozen kilobytes, whole or not at all."""
    FigureCanvasAgg(figure)
    options: dict[str, Any] = {
        "format": "png", "dpi": DPI, "metadata": {KEY: digest(results)}, "pil_kwargs": {"optimize": True}
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, lambda temporary: figure.savefig(temporary, **options))


def colour(variant: str, index: int) -> str:
    return COLOURS.get(variant, OTHERS[index % len(OTHERS)])


def names_of(results: Results) -> list[str]:
    """All variants with a ratio, in order of appearance."""
    return list(dict.fromkeys(name for result in results for name in result["ratio"]))


# ---- overhead and layers: one row an entry ---------------------------------------------------------------------------


def rows(
    results: Results, path: Path, label: Callable[[Mapping[str, Any]], str],
    panel: Callable[[Mapping[str, Any]], str], baselines: Sequence[str], title: str, source: Results | None = None,
) -> None:
    """Ratios as points with their intervals: a row a label, a panel beside the other for each `panel`.

    source: all results of the file, where not all are drawn.
    """
    panels = list(dict.fromkeys(map(panel, results)))
    labels = list(dict.fromkeys(map(label, results)))
    variants = [name for name in names_of(results) if name not in baselines]
    height = max(2.6, 1.3 + len(labels) * (0.16 + 0.07 * len(variants)))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(1.6 + 3.0 * len(panels), height), layout="constrained")
        axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axis, name in zip(axes, panels, strict=True):
            mine = [result for result in results if panel(result) == name]
            slots = [variant for variant in variants if any(variant in result["ratio"] for result in mine)]
            for result in mine:
                _row(axis, result, labels.index(label(result)), slots)
            axis.set_title(name)
            _ratio_axis(axis)
        axes[0].set_yticks(range(len(labels)), labels)
        axes[0].set_ylim(len(labels) - 0.5, -0.5)
        drawn = {handle.get_label(): handle for axis in axes for handle in axis.get_legend_handles_labels()[0]}
        handles = [drawn[name] for name in variants if name in drawn]
        figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 5))
        figure.suptitle(title, fontsize=10)
        save(figure, path, results if source is None else source)


def _row(axis: Axes, result: Mapping[str, Any], row: int, variants: Sequence[str]) -> None:
    for index, name in enumerate(variants):
        if name in result["ratio"]:
            value = result["ratio"][name]
            place = row + 0.62 * ((index + 0.5) / len(variants) - 0.5)
            axis.errorbar(
                value["median"], place, xerr=[[value["median"] - value["low"]], [value["high"] - value["median"]]],
                fmt=MARKERS.get(name, "o"), color=colour(name, index), markersize=3.5, elinewidth=1.0, label=name,
            )


def _ratio_axis(axis: Axes) -> None:
    axis.set_xscale("log")
    for ratio, style in ((1.0, "-"), (PROMISED, ":")):
        axis.axvline(ratio, color="#444444", linewidth=0.8, linestyle=style, zorder=0)
    axis.grid(axis="y", color="#eeeeee", zorder=0)
    low, high = axis.get_xlim()
    low, high = min(low, 0.96), max(high, 1.12)
    axis.set_xlim(low, high)
    steps = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.5, 1.7, 2.0, 2.5, 3.0, 4.0, 6.0, 10.0, 20.0, 50.0)
    ticks = [tick for tick in steps if low <= tick <= high]
    while len(ticks) > 6:
        ticks = [tick for i, tick in enumerate(ticks) if tick == 1.0 or i % 2 == ticks.index(1.0) % 2]
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.tick_params(axis="x", which="minor", length=0)


# ---- growth ----------------------------------------------------------------------------------------------------------


def growth(results: Results, path: Path, title: str) -> None:
    """Ratio against depth, width, batch or image side, a panel for each series that has at least one value."""
    timed = [result for result in results if result["ratio"]]
    series = list(dict.fromkeys((result["case"], result["axis"]) for result in timed))
    columns = min(4, max(1, len(series)))
    count = max(1, math.ceil(len(series) / columns))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(0.6 + 2.7 * columns, 0.9 + 2.3 * count), layout="constrained")
        axes = figure.subplots(count, columns, squeeze=False).ravel()
        for axis, (case, name) in zip(axes, series, strict=False):
            _series(axis, [result for result in timed if (result["case"], result["axis"]) == (case, name)])
            axis.set_title(f"{case}: {name}")
        for axis in axes[len(series):]:
            axis.set_visible(False)
        handles = {
            handle.get_label(): handle for axis in axes[: len(series)] for handle in axis.get_legend_handles_labels()[0]
        }
        figure.legend(handles=list(handles.values()), loc="outside lower center", ncols=4)
        figure.suptitle(title, fontsize=10)
        save(figure, path, results)


def _series(axis: Axes, results: Results) -> None:
    for mode in dict.fromkeys(result["mode"] for result in results):
        mine = [result for result in results if result["mode"] == mode]
        for index, name in enumerate(name for name in names_of(mine) if name != "ungated"):
            points = [(result["value"], result["ratio"][name]) for result in mine if name in result["ratio"]]
            values = [value for value, _ in points]
            style: dict[str, Any] = {"color": colour(name, index), "linestyle": "-" if mode == "eager" else "--"}
            medians = [ratio["median"] for _, ratio in points]
            axis.plot(values, medians, marker=MARKERS.get(name, "o"), markersize=3, label=f"{name} {mode}", **style)
            axis.fill_between(
                values, [ratio["low"] for _, ratio in points], [ratio["high"] for _, ratio in points],
                color=style["color"], alpha=0.15, linewidth=0,
            )
    for ratio, line in ((1.0, "-"), (PROMISED, ":")):
        axis.axhline(ratio, color="#444444", linewidth=0.8, linestyle=line, zorder=0)
    low, high = axis.get_ylim()
    axis.set_ylim(min(low, 0.95), max(high, 1.1))
    axis.set_xscale("log", base=2)
    values = sorted({result["value"] for result in results})
    axis.set_xticks(values[:: max(1, math.ceil(len(values) / 6))])
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_ylabel("step time / ungated")


# ---- the cost of a curve ---------------------------------------------------------------------------------------------


def curve_cost(results: Results, path: Path, title: str) -> None:
    """Left: seconds of one multi-rate run and of ten retrained networks; right: D + beta R at the ten betas."""
    result = results[0]
    betas = result["betas"]
    count = len(result["seeds"])
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.2, 3.2), layout="constrained")
        time, objective = figure.subplots(1, 2)
        once = sum(map(sum, result["one_run_seconds"])) / sum(map(len, result["one_run_seconds"]))
        each = [sum(seconds[i] for seconds in result["retrained_seconds"]) / count for i in range(len(betas))]
        left = 0.0
        for i, seconds in enumerate(each):
            time.barh(0, seconds, left=left, color="#b9c6d2" if i % 2 else "#d3dce4", edgecolor="white")
            time.text(left + seconds / 2, 0, f"{betas[i]:.2g}", ha="center", va="center", fontsize=6.5)
            left += seconds
        time.barh(1, once, color=COLOURS["gated"])
        time.set_yticks([0, 1], [f"{len(betas)} beta-VAEs\n(one a beta)", "one multi-\nrate VAE"])
        time.set(xlabel="seconds of training, mean over seeds", title="Time for the curve")
        runs = result["objective"]
        multi = [
            sum(curve["objective"][i] for curve in runs["multi-rate"].values()) / count for i in range(len(betas))
        ]
        plain = [sum(c["objective"][0] for c in runs[f"{b:g}"].values()) / count for b in betas]
        objective.plot(betas, plain, "s--", color="#8a8a8a", label="retrained at each beta")
        objective.plot(betas, multi, "o-", color=COLOURS["gated"], label="one multi-rate run")
        objective.set_xscale("log")
        objective.set(
            xlabel=r"KL weight $\beta$", ylabel=r"D + $\beta$R (nats)",
            title=f"Objective after {result['epochs']} epochs",
        )
        objective.legend()
        figure.suptitle(title, fontsize=10)
        save(figure, path, results)

"""Tables of an experiment, in Markdown, and what they say in a sentence; every figure comes from the rows.

A row is one run at one beta: line, run, seed, beta, and the columns that were evaluated. Means and standard deviations
are over seeds.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from .calibrated_tables import landings, learned_betas
from .plan import MULTIRATE
from .rows import Row, along_beta, by_line, cell, table


def retraining_table(runs: Mapping[str, Mapping[str, Any]], betas: Sequence[float]) -> str:
    """D + beta R of retraining and of one multi-rate run, a row a beta, the ratio of their means, and its mean.

    runs: "multi-rate" and each beta, as {beta:g} -> seed -> columns (objective, rate), of one value for a beta.
    """
    header = ["beta", "retrained", "one multi-rate run", "ratio", "rate: retrained, multi-rate"]
    lines, ratios = [], []
    for i, beta in enumerate(betas):
        plain, multi = runs[f"{beta:g}"].values(), runs[MULTIRATE].values()
        objectives = [[c["objective"][0] for c in plain], [c["objective"][i] for c in multi]]
        rates = [statistics.fmean(c["rate"][0] for c in plain), statistics.fmean(c["rate"][i] for c in multi)]
        ratios.append(statistics.fmean(objectives[1]) / statistics.fmean(objectives[0]))
        lines.append([f"{beta:.3g}", *map(cell, objectives), f"{ratios[-1]:.3f}", f"{rates[0]:.2f}, {rates[1]:.2f}"])
    return f"{table(header, lines)}\n\nmean ratio {statistics.fmean(ratios):.3f}, worst {max(ratios):.3f}"


def ratios(rows: Sequence[Row]) -> str:
    """retraining_table() of each line of beta-VAEs."""
    lines = by_line(rows)
    texts = []
    for line, seeds in lines.items():
        if line == MULTIRATE:
            continue
        betas = sorted({row["beta"] for its in seeds.values() for row in its})
        runs: dict[str, dict[str, Any]] = {MULTIRATE: {}}
        for seed, its in lines[MULTIRATE].items():
            runs[MULTIRATE][str(seed)] = {name: [row[name] for row in its] for name in ("objective", "rate")}
        for seed, its in seeds.items():
            for row in its:
                columns = {name: [row[name]] for name in ("objective", "rate")}
                runs.setdefault(f"{row['beta']:g}", {})[str(seed)] = columns
        texts.append(f"### {line}\n\nD + beta R on the test split, nats an example.\n\n{retraining_table(runs, betas)}")
    return "\n\n".join(texts)


def over_retraining(rows: Sequence[Row]) -> tuple[list[float], dict[str, list[float]]]:
    """betas, and line -> D + beta R over that of the first line, the beta-VAEs, by beta; ratios of means over seeds."""
    means = {
        line: {beta: statistics.fmean(values) for beta, values in its.items()}
        for line, its in along_beta(rows, "objective").items()
    }
    first, *others = means
    betas = sorted(means[first])
    return betas, {line: [means[line][beta] / means[first][beta] for beta in betas] for line in others}


def against(rows: Sequence[Row]) -> str:
    """over_retraining(), a row a line, with its mean and its largest ratio; and the lines that are best by either."""
    betas, ratios_of = over_retraining(rows)
    body = [
        [line, *(f"{ratio:.3f}" for ratio in its), f"{statistics.fmean(its):.4f}", f"{max(its):.3f}"]
        for line, its in ratios_of.items()
    ]
    best = min(ratios_of, key=lambda line: statistics.fmean(ratios_of[line]))
    evenest = min(ratios_of, key=lambda line: max(ratios_of[line]))
    return (
        f"D + beta R on the test split over that of {next(iter(along_beta(rows, 'objective')))}, by beta.\n\n"
        f"{table(['line', *(f'{beta:.3g}' for beta in betas), 'mean', 'largest'], body)}\n\n"
        f"Lowest mean: {best}. Lowest largest ratio: {evenest}."
    )


def mean_distortion(points: Sequence[tuple[float, float]], low: float, high: float) -> float:
    """Area under the rate-distortion curve from rate `low` to `high`, over its width: a mean distortion, nats.

    points: (rate, distortion), joined by straight lines in order of rate. Outside them the last distortion holds.
    """
    ordered = sorted(points)
    rates, distortions = [list(part) for part in zip(*ordered, strict=True)]
    at = sorted({low, high, *(rate for rate in rates if low < rate < high)})
    return float(np.trapezoid(np.interp(at, rates, distortions), at) / (high - low))


def area(rows: Sequence[Row]) -> str:
    """Area under each line's curve and under the first line's, over the rates that all runs of the two reach."""
    curves = {
        line: [[(row["rate"], row["distortion"]) for row in its] for its in seeds.values()]
        for line, seeds in by_line(rows).items()
    }
    first, *others = curves
    body = []
    for line in others:
        every = [[rate for rate, _ in points] for points in (*curves[first], *curves[line])]
        low, high = max(map(min, every)), min(map(max, every))
        if not low < high:
            body.append([line, "none in common", "", "", ""])
            continue
        theirs, ours = ([mean_distortion(points, low, high) for points in curves[name]] for name in (line, first))
        ratio = statistics.fmean(theirs) / statistics.fmean(ours)
        body.append([line, f"{low:.2f} to {high:.2f}", cell(theirs), cell(ours), f"{ratio:.4f}"])
    return (
        "Area under the rate-distortion curve over its width, which is the mean distortion at equal rates, in nats; "
        f"over the rates that all runs of a line and of {first} reach.\n\n"
        f"{table(['line', 'rates (nats)', 'mean distortion', f'of {first}', f'over {first}'], body)}"
    )


def curve(rows: Sequence[Row]) -> str:
    """Rate, distortion, D + beta R, ELBO and active units, a row a line and beta."""
    names = ("rate", "distortion", "objective", "elbo", "active_units")
    columns = {name: along_beta(rows, name) for name in names}
    body = [
        [line, f"{beta:.3g}", *(cell(columns[name][line][beta], 1 if name == "active_units" else 2) for name in names)]
        for line, betas in columns["rate"].items()
        for beta in betas
    ]
    return table(["line", "beta", "rate", "distortion", "D + beta R", "ELBO", "active units"], body)


def _column(column: str, title: str, digits: int) -> Callable[[Sequence[Row]], str]:
    """A table of one column: a row a beta, a column a line, and each line's mean over the betas that all have."""

    def text(rows: Sequence[Row]) -> str:
        lines = along_beta(rows, column)
        betas = sorted({beta for its in lines.values() for beta in its})
        shared = [beta for beta in betas if all(beta in its for its in lines.values())]
        body = [[f"{beta:.3g}", *(cell(its.get(beta, []), digits) for its in lines.values())] for beta in betas]
        if shared:
            means = [statistics.fmean(statistics.fmean(its[beta]) for beta in shared) for its in lines.values()]
            body.append(["mean", *(f"{mean:.{digits}f}" for mean in means)])
        return f"{title}\n\n{table(['beta', *lines], body)}"

    return text


def optimum(rows: Sequence[Row]) -> str:
    """Linear VAEs: by how much D + beta R is above the optimum, in per cent."""
    lines, best = along_beta(rows, "objective"), along_beta(rows, "optimal_objective")
    excess = {
        line: {
            beta: [100 * (value / least - 1) for value, least in zip(values, best[line][beta], strict=True)]
            for beta, values in its.items()
        }
        for line, its in lines.items()
    }
    optimal = {beta: values[0] for its in best.values() for beta, values in its.items()}
    body = [
        [f"{beta:.3g}", f"{value:.3f}", *(cell(excess[line].get(beta, [])) for line in lines)]
        for beta, value in sorted(optimal.items())
    ]
    said = [
        f"{line}: on average {statistics.fmean(v for its in excess[line].values() for v in its):.2f} % above the "
        f"optimum, at worst {max(v for its in excess[line].values() for v in its):.2f} %."
        for line in lines
    ]
    header = ["beta", "optimum (nats)", *(f"{line}, excess (%)" for line in lines)]
    return "\n\n".join(["D + beta R on the training images, without d/2 log 2 pi.", table(header, body), *said])


TABLES: dict[str, Callable[[Sequence[Row]], str]] = {
    "ratios": ratios,
    "against": against,
    "area": area,
    "curve": curve,
    "objective": _column("objective", "D + beta R on the test split, nats an example.", 2),
    "active_units": _column("active_units", "Active units on the test split.", 1),
    "metric": _column("metric", "The metric, a row a beta.", 4),
    "optimum": optimum,
    "landings": landings,
    "learned_betas": learned_betas,
}


def seconds(value: float) -> str:
    """A duration to read."""
    if not math.isfinite(value) or value < 120:
        return f"{value:.1f} s"
    return f"{value / 60:.1f} min" if value < 7200 else f"{value / 3600:.1f} h"

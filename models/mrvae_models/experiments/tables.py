"""Tables of an experiment, in Markdown, and what they say in a sentence; every figure comes from the rows.

A row is one run at one beta: line, run, seed, beta, and the columns that were evaluated. Means and standard deviations
are over seeds.
"""

from __future__ import annotations

import math
import operator
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from .calibrated_tables import landings, learned_betas
from .plan import MULTIRATE
from .rows import Row, along_beta, by_line, cell, table


def are_ratios(means: Iterable[float]) -> bool:
    """Whether such means compare by their ratios: all are positive. Of a density D, and D + beta R with it, may be 0 or
    less, where a ratio says nothing or the opposite; differences, in nats, do then."""
    return min(means) > 0


def retraining_table(runs: Mapping[str, Mapping[str, Any]], betas: Sequence[float]) -> str:
    """D + beta R of retraining and of one multi-rate run, a row a beta, the ratio of their means (the difference, where
    one is not positive), and its mean.

    runs: "multi-rate" and each beta, as {beta:g} -> seed -> columns (objective, rate), of one value for a beta.
    """
    cells, rates, means = [], [], []
    for i, beta in enumerate(betas):
        plain, multi = runs[f"{beta:g}"].values(), runs[MULTIRATE].values()
        cells.append([[c["objective"][0] for c in plain], [c["objective"][i] for c in multi]])
        rates.append([statistics.fmean(c["rate"][0] for c in plain), statistics.fmean(c["rate"][i] for c in multi)])
        means.append([statistics.fmean(values) for values in cells[-1]])
    if are_ratios(mean for pair in means for mean in pair):
        word, head, unit, form = "ratio", "ratio", "", ".3f"
        found = [multi / plain for plain, multi in means]
    else:
        word, head, unit, form = "difference", "difference (nats)", " nats", "+.2f"
        found = [multi - plain for plain, multi in means]
    header = ["beta", "retrained", "one multi-rate run", head, "rate: retrained, multi-rate"]
    lines = [
        [f"{beta:.3g}", *map(cell, objectives), f"{value:{form}}", f"{rate[0]:.2f}, {rate[1]:.2f}"]
        for beta, objectives, value, rate in zip(betas, cells, found, rates, strict=True)
    ]
    said = f"mean {word} {statistics.fmean(found):{form}}{unit}, worst {max(found):{form}}{unit}"
    return f"{table(header, lines)}\n\n{said}"


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


class Comparison(NamedTuple):
    """D + beta R of lines against that of the first line, the beta-VAEs, by beta; of means over seeds."""

    first: str
    betas: list[float]
    values: dict[str, list[float]]  # line -> by beta
    ratios: bool  # values are ratios; else differences in nats


def over_retraining(rows: Sequence[Row]) -> Comparison:
    """All lines against the first: ratios where all means are positive, differences otherwise."""
    means = {
        line: {beta: statistics.fmean(values) for beta, values in its.items()}
        for line, its in along_beta(rows, "objective").items()
    }
    first, *others = means
    betas = sorted(means[first])
    ratios = are_ratios(mean for its in means.values() for mean in its.values())
    over: Callable[[float, float], float] = operator.truediv if ratios else operator.sub
    values = {line: [over(means[line][beta], means[first][beta]) for beta in betas] for line in others}
    return Comparison(first, betas, values, ratios)


def against(rows: Sequence[Row]) -> str:
    """over_retraining(), a row a line, with its mean and its largest value; and the lines that are best by either."""
    first, betas, over, are_quotients = over_retraining(rows)
    word, form, fine = ("ratio", ".3f", ".4f") if are_quotients else ("difference", "+.2f", "+.3f")
    body = [
        [line, *(f"{value:{form}}" for value in its), f"{statistics.fmean(its):{fine}}", f"{max(its):{form}}"]
        for line, its in over.items()
    ]
    best = min(over, key=lambda line: statistics.fmean(over[line]))
    evenest = min(over, key=lambda line: max(over[line]))
    told = f"over that of {first}, by beta" if are_quotients else f"less that of {first}, nats, by beta"
    unit = "" if are_quotients else " (nats)"
    return (
        f"D + beta R on the test split {told}.\n\n"
        f"{table(['line', *(f'{beta:.3g}' for beta in betas), f'mean{unit}', f'largest{unit}'], body)}\n\n"
        f"Lowest mean: {best}. Lowest largest {word}: {evenest}."
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
    ranges, found = {}, {}
    for line in others:
        every = [[rate for rate, _ in points] for points in (*curves[first], *curves[line])]
        low, high = max(map(min, every)), min(map(max, every))
        if low < high:
            ranges[line] = f"{low:.2f} to {high:.2f}"
            found[line] = [[mean_distortion(points, low, high) for points in curves[name]] for name in (line, first)]
    means = {line: [statistics.fmean(values) for values in pair] for line, pair in found.items()}
    ratios = not means or are_ratios(mean for pair in means.values() for mean in pair)
    compared = {line: f"{one / other:.4f}" if ratios else f"{one - other:+.2f}" for line, (one, other) in means.items()}
    body = [
        [line, ranges[line], *map(cell, found[line]), compared[line]]
        if line in found
        else [line, "none in common", "", "", ""]
        for line in others
    ]
    head = f"over {first}" if ratios else f"less that of {first} (nats)"
    return (
        "Area under the rate-distortion curve over its width, which is the mean distortion at equal rates, in nats; "
        f"over the rates that all runs of a line and of {first} reach.\n\n"
        f"{table(['line', 'rates (nats)', 'mean distortion', f'of {first}', head], body)}"
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

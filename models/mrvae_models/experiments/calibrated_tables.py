"""What `calibrated` says: a table of all methods, and where those that learn their beta have landed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence

from .calibrated import BETA_VAE, L_VAE, SIGMA_VAES
from .plan import MULTIRATE
from .rows import Row, along_beta, by_line, cell, table

COLUMNS = {
    "own beta": ("own_beta", 4),
    "-log p <, training": ("nll_train", 1),
    "-log p <": ("nll", 1),
    "at validation's sigma": ("nll_best", 1),
    "rate": ("rate", 2),
    "MSE": ("mse", 5),
    "mutual information": ("mi", 2),
    "marginal KL": ("marginal_kl", 2),
    "variance / MSE": ("variance_ratio", 3),
    "50 % covers": ("coverage_50", 3),
    "95 % covers": ("coverage_95", 3),
}
"""Header -> column and digits; `metric` where it was asked for."""


def landings(rows: Sequence[Row]) -> str:
    """A row a method and beta: where it landed, its bounds, the rate's parts, and the calibration of its variance."""
    plain = {row["beta"] for row in rows if row["line"] == BETA_VAE}
    shown = [row for row in rows if row["line"] != MULTIRATE or row["beta"] in plain]
    columns = dict(COLUMNS) | ({"metric": ("metric", 4)} if any("metric" in row for row in rows) else {})
    values = {header: along_beta(shown, column) for header, (column, _) in columns.items()}
    body = [
        [line, f"{beta:.3g}", *(cell(values[header][line][beta], digits) for header, (_, digits) in columns.items())]
        for line, betas in along_beta(shown, "own_beta").items()
        for beta in betas
    ]
    told = (
        "Nats an example, on the test split unless it says training. The mutual information is at most the log of the "
        "number of test examples: near it, it is a lower bound, and the marginal KL an upper one."
    )
    return f"{told}\n\n{table(['line', 'beta', *columns], body)}"


def solved(points: Sequence[Row], own: Callable[[Row], float]) -> float | None:
    """Where own(row) = beta along the rows of one multi-rate run in order of beta, log-linear between them.

    Of several places the last at which own beta falls below beta, where training goes to from either side; None where
    there is none.
    """
    logs = [math.log(row["beta"]) for row in points]
    excess = [math.log(own(row)) - log for row, log in zip(points, logs, strict=True)]
    found = None
    for i in range(len(points) - 1):
        if excess[i] >= 0 > excess[i + 1]:
            found = math.exp(logs[i] + excess[i] / (excess[i] - excess[i + 1]) * (logs[i + 1] - logs[i]))
    return found


OWN: Mapping[str, Callable[[Row], float]] = {
    "sigma-VAE": lambda row: row["mse_train"],
    L_VAE: lambda row: math.sqrt(row["error_train"] / max(row["rate_train"], 1e-12)),
}
"""A method's own beta on the multi-rate curve (operating.py)."""


def fixed_points(rows: Sequence[Row]) -> dict[str, list[float]]:
    """Method -> where it lands on the multi-rate curve, solved without training it; a value a seed that has one."""
    found = {}
    for method, own in OWN.items():
        its = [solved(points, own) for points in by_line(rows)[MULTIRATE].values()]
        found[method] = [value for value in its if value is not None]
    return found


BOUNDS = {"training examples": "nll_train", "the test split": "nll"}


def learned_betas(rows: Sequence[Row]) -> str:
    """Learned betas beside those solved for on the curve and the best fixed one, and what that says of the bounds.

    On training examples as well as on the test split, whose errors may be larger.
    """
    found = fixed_points(rows)
    own = {line: [row["own_beta"] for row in rows if row["line"] == line] for line in by_line(rows)}
    means = {
        where: {
            line: {beta: statistics.fmean(values) for beta, values in betas.items()}
            for line, betas in along_beta(rows, column).items()
        }
        for where, column in BOUNDS.items()
    }
    best = {where: _lowest(bounds[BETA_VAE]) for where, bounds in means.items()}
    parts = [
        f"On {where}, of the beta-VAEs beta = {best[where]:.3g} has the lowest bound, "
        f"{bounds[BETA_VAE][best[where]]:.1f} nats; along the multi-rate curve it is beta = "
        f"{_lowest(bounds[MULTIRATE]):.3g}, {min(bounds[MULTIRATE].values()):.1f} nats."
        for where, bounds in means.items()
    ]
    header = ["line", "learned beta", "solved for on the multi-rate curve"]
    for where, beta in best.items():
        header += [f"-log p <, {where}", f"above beta = {beta:.3g}"]
    body = []
    for line, method in (*dict.fromkeys(SIGMA_VAES, "sigma-VAE").items(), (L_VAE, L_VAE)):
        if line not in own:
            continue
        cells = [line, cell(own[line], 4), cell(found[method], 4)]
        for where, bounds in means.items():
            bound = bounds[line][1.0]
            cells += [f"{bound:.1f}", f"{bound - bounds[BETA_VAE][best[where]]:+.1f}"]
        body.append(cells)
    parts.append(table(header, body))
    parts += [
        f"L-VAE, seed {row['seed']}: s0 = {row['s0']:.4f} and s1 = {row['s1']:.4f}; s^4 = L on training examples would "
        f"be {row['s0_fixed']:.4f} and {row['s1_fixed']:.4f}."
        for row in rows
        if row["line"] == L_VAE
    ]
    return "\n\n".join(parts)


def _lowest(bounds: Mapping[float, float]) -> float:
    return min(bounds, key=lambda beta: bounds[beta])

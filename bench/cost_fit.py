"""The cost model's fit: from what gating was measured to add to networks of equal layers, its coefficients.

The formula and what is minimised: `fit_cost_model`, which measures.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from mrvae_kernels.cost_model import BYTES_MOVED, NUMBERS, CostModel, Extra, Models

STRATEGIES = ("fold", "epilogue")
NOISE = 0.5
"""Interquartile range of the rounds' differences, over the plain step, above which a network is left out of the fit:
another program had the cores."""
FEWEST = 8
"""Networks that a fit of three coefficients takes at least."""


class Point(NamedTuple):
    """A measured network: `layers` layers of a kind with `weights` and `outputs` elements each; seconds a step of
    "plain", "fold" and "epilogue" in every round."""

    name: str
    kind: str
    numbers: str
    batch: int
    layers: int
    weights: int
    outputs: int
    seconds: dict[str, list[float]]

    @property
    def plain(self) -> float:
        """The plain step's median seconds."""
        return statistics.median(self.seconds["plain"])

    def differences(self, strategy: str) -> list[float]:
        """Seconds that the strategy adds to a step, by round."""
        pairs = zip(self.seconds[strategy], self.seconds["plain"], strict=True)
        return [gated - plain for gated, plain in pairs]

    def extra(self, strategy: str) -> float:
        """Their median."""
        return statistics.median(self.differences(strategy))

    @property
    def noise(self) -> float:
        """The larger of the strategies' interquartile ranges of differences, over the plain step."""
        quartiles = [statistics.quantiles(self.differences(name), n=4) for name in STRATEGIES]
        return max(high - low for low, _, high in quartiles) / self.plain


class Fit(NamedTuple):
    """A strategy's fit: seconds a step, a layer, an element of the weight and one of the output."""

    step: float
    layer: float
    weight: float
    output: float

    def at(self, point: Point) -> float:
        """Predicted seconds that gating adds to the point's step."""
        a_layer = self.layer + self.weight * point.weights + self.output * point.outputs
        return self.step + point.layers * a_layer

    def extra(self) -> Extra:
        """The layer's part in whole picoseconds."""
        return Extra(*(round(value * 1e12) for value in self[1:]))


def non_negative(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The x >= 0 that minimises |a x - b|: the best of the least squares over each subset of the columns that has no
    negative value, of which x's own support is one."""
    columns = a.shape[1]
    best, least = np.zeros(columns), float(b @ b)
    for used in itertools.product((False, True), repeat=columns):
        if not any(used):
            continue
        x = np.zeros(columns)
        x[list(used)] = np.linalg.lstsq(a[:, list(used)], b, rcond=None)[0]
        error = a @ x - b
        if (x >= 0).all() and float(error @ error) < least:
            best, least = x, float(error @ error)
    return best


def fit(points: Sequence[Point], strategy: str) -> Fit:
    """What the strategy adds, by networks of one kind and in the same numbers.

    Folding does nothing to the outputs and the epilogue nothing to the weights: with both coefficients free for both,
    what they have in common hid what tells them apart (right picks for float32 linear layers 0.92 instead of 1.00).
    """
    folds = strategy == "fold"
    rows = [[1.0, p.layers, p.layers * p.weights * folds, p.layers * p.outputs * (not folds)] for p in points]
    plain = np.array([p.plain for p in points])
    a, b = np.array(rows) / plain[:, None], np.array([p.extra(strategy) for p in points]) / plain
    scale = np.abs(a).max(0)  # columns of 1 and of 10^6 would be of different rank to lstsq
    scale[scale == 0] = 1
    return Fit(*(non_negative(a / scale, b) / scale).tolist())


def judged(points: Sequence[Point], model: CostModel) -> dict[str, float]:
    """How well a cost model chooses: the share of right picks, and the mean regret of its picks, of always folding and
    of never, in shares of the plain step."""
    regrets: dict[str, list[float]] = {"model": [], "fold": [], "epilogue": []}
    for p in points:
        extra = {name: p.extra(name) for name in STRATEGIES}
        best = min(extra.values())
        for name, pick in (("model", model.cheaper(p.weights, p.outputs)), *zip(STRATEGIES, STRATEGIES, strict=True)):
            regrets[name].append((extra[pick] - best) / p.plain)
    right = sum(regret == 0 for regret in regrets["model"]) / len(points)
    return {"right": right, **{f"regret {name}": statistics.fmean(values) for name, values in regrets.items()}}


def held_out(points: Sequence[Point]) -> dict[str, float]:
    """As `judged`, each layer's picks by the model that all other layers' networks fit.

    ValueError for networks of one layer only.
    """
    parts: dict[tuple[str, int], list[Point]] = {}
    for p in points:
        parts.setdefault((p.name, p.weights), []).append(p)
    if len(parts) < 2:
        raise ValueError("all networks are of one layer; expected two or more, for a fit to be tried on one held out")
    found = []
    for own in parts.values():
        others = [p for p in points if p not in own]
        found.append((len(own), judged(own, CostModel(*(fit(others, name).extra() for name in STRATEGIES), ""))))
    return {name: sum(count * of[name] for count, of in found) / len(points) for name in found[0][1]}


def always_epilogue(model: CostModel) -> CostModel:
    """The model with folding at least as dear as the epilogue, for every size of layer."""
    fold, epilogue = model.fold, model.epilogue
    dearer = Extra(*(max(pair) for pair in zip(fold, epilogue, strict=True)))
    return model._replace(fold=dearer._replace(layer=dearer.layer + 1))


def fit_all(points: Sequence[Point], where: str) -> tuple[Models, list[dict[str, Any]]]:
    """The cost models by kind and dtype, and a result entry for each with its coefficients and its errors.

    ValueError where fewer than FEWEST networks of a kind were measured, or quietly enough.
    """
    models: Models = {}
    entries = []
    if not points:
        raise ValueError("nothing was measured")
    groups: dict[tuple[str, str], list[Point]] = {}
    for p in points:
        groups.setdefault((p.kind, p.numbers), []).append(p)
    for (kind, numbers), all_own in groups.items():
        own = [p for p in all_own if p.noise <= NOISE]
        if len(own) < FEWEST:
            raise ValueError(
                f"{kind} {numbers}: {len(own)} of {len(all_own)} networks were measured with a noise of at most "
                f"{NOISE} of the plain step; expected {FEWEST}: measure on an idle machine, or for longer"
            )
        fits = {name: fit(own, name) for name in STRATEGIES}
        model = CostModel(*(fits[name].extra() for name in STRATEGIES), where)
        held, always = held_out(own), judged(own, model)["regret epilogue"]
        better = held["regret model"] < always
        models[kind, NUMBERS[numbers]] = model if better else always_epilogue(model)
        error = {
            name: statistics.median(abs(fits[name].at(p) - p.extra(name)) / p.plain for p in own) for name in STRATEGIES
        }
        entries.append({
            "kind": kind, "numbers": numbers, "networks": len(own), "left_out": len(all_own) - len(own),
            "fit": {name: found._asdict() for name, found in fits.items()},
            "error": error, "picks": judged(own, model), "picks by bytes moved": judged(own, BYTES_MOVED),
            "picks held out": held, "chosen": "fit" if better else "epilogue",
        })
    return models, entries


def table(entries: Sequence[dict[str, Any]]) -> str:
    """The fits as Markdown."""
    lines = [
        "| kind | numbers | strategy | us a step | us a layer | ps a weight | ps an output | error |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for e in entries:
        for name, f in e["fit"].items():
            lines.append(
                f"| {e['kind']} | {e['numbers']} | {name} | {f['step'] * 1e6:.1f} | {f['layer'] * 1e6:.1f} "
                f"| {f['weight'] * 1e12:.0f} | {f['output'] * 1e12:.0f} | {e['error'][name]:.3f} |"
            )
    lines += [
        "",
        "| kind | numbers | networks | too noisy | right picks | regret | of the prior | of fold | of epilogue "
        "| right, held out | regret, held out | chosen |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for e in entries:
        picks = e["picks"]
        regrets = [e[by]["regret model"] for by in ("picks", "picks by bytes moved")]
        regrets += [picks[f"regret {name}"] for name in STRATEGIES]
        lines.append(
            f"| {e['kind']} | {e['numbers']} | {e['networks']} | {e['left_out']} | {picks['right']:.2f} | "
            f"{' | '.join(f'{regret:.4f}' for regret in regrets)} | {_held_out(e)} |"
        )
    return "\n".join(lines)


def _held_out(entry: dict[str, Any]) -> str:
    """Cells; of a file from before there were any they say so."""
    if (held := entry.get("picks held out")) is None:
        return "not recorded | not recorded | fit"
    return f"{held['right']:.2f} | {held['regret model']:.4f} | {entry['chosen']}"

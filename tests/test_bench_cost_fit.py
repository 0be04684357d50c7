"""The cost model's fit is judged on layers that it has not seen, and given up where it loses to the epilogue."""

from __future__ import annotations

import pytest
import torch

from bench import cost_fit, fit_cost_model, records
from bench.cost_fit import Point, always_epilogue, fit_all, held_out
from mrvae_kernels import ops
from mrvae_kernels.cost_model import CostModel, Extra

KEY = ("linear", torch.float32)


def point(name, weights, outputs, fold, epilogue):
    """A network of one layer, 1 ms a plain step, with these extra seconds."""
    seconds = {"plain": [1e-3] * 3, "fold": [1e-3 + fold] * 3, "epilogue": [1e-3 + epilogue] * 3}
    return Point(name, "linear", "float32", 16, 1, weights, outputs, seconds)


LAYERS = [(w, y) for w in (10**3, 10**5, 10**6) for y in (10**3, 10**5, 10**6)]
LINEAR = [point(f"{w} {y}", w, y, 1e-9 * w, 1e-9 * y) for w, y in LAYERS]
"""What each strategy adds is what the model says."""
ODD = [
    point(f"{i}", w, y, 2e-4, 3e-4 if i == 4 else 1e-4) for i, (w, y) in enumerate(LAYERS)
]
"""The epilogue is faster but for one layer, which its size does not tell."""


def test_held_out_regret_is_of_layers_that_the_fit_has_not_seen():
    assert held_out(LINEAR)["regret model"] == 0.0 and held_out(LINEAR)["right"] == 1.0
    # without the one layer where the epilogue is slow a fit says "epilogue" there, and loses 0.1 ms of 1
    found = held_out(ODD)
    assert found["regret model"] >= 0.1 / len(ODD) - 1e-9 and found["regret epilogue"] == pytest.approx(0.1 / len(ODD))
    same = [p._replace(name="one", weights=5) for p in LINEAR]
    with pytest.raises(ValueError, match="all networks are of one layer; expected two or more"):
        held_out(same)


def test_a_fit_that_is_no_better_than_the_epilogue_gives_way_to_it():
    models, (entry,) = fit_all(LINEAR, "here")
    assert entry["chosen"] == "fit" and models[KEY].cheaper(1000, 10**6) == "fold"
    models, (entry,) = fit_all(ODD, "here")
    assert entry["chosen"] == "epilogue"
    assert {models[KEY].cheaper(w, y) for w in (0, 1, 10**9) for y in (0, 1, 10**9)} == {"epilogue"}
    table = cost_fit.table([entry])
    assert "right, held out | regret, held out | chosen" in table and table.endswith("| epilogue |")
    del entry["picks held out"]
    assert cost_fit.table([entry]).endswith("| not recorded | not recorded | fit |"), "a file from before"


def test_always_the_epilogue_leaves_its_own_coefficients():
    model = CostModel(Extra(5, 3, 0), Extra(9, 0, 7), "here")
    assert always_epilogue(model) == CostModel(Extra(10, 3, 7), Extra(9, 0, 7), "here")


def test_without_out_the_fit_is_printed_and_not_written(monkeypatch, capsys):
    points = iter(LINEAR)
    monkeypatch.setattr(ops, "EXTENSION", True)
    monkeypatch.setattr(fit_cost_model, "networks", lambda: [(None, 16, 1)] * len(LINEAR))
    monkeypatch.setattr(fit_cost_model, "measure", lambda *_: next(points))
    monkeypatch.setattr(fit_cost_model, "keep_memory", lambda: None)
    monkeypatch.setattr(fit_cost_model, "write", lambda *_: pytest.fail("it wrote"))
    before = {path: path.stat().st_mtime_ns for path in records.RESULTS.iterdir()}
    assert fit_cost_model.main(["--numbers", "float32"]) == 0
    assert {path: path.stat().st_mtime_ns for path in records.RESULTS.iterdir()} == before
    said = capsys.readouterr().out
    assert "| linear | float32 | 9 |" in said and "written" not in said

"""One multi-rate run against ten retrained networks: pairs of runs, their ratios, and a real one of seconds."""

from __future__ import annotations

import json

import pytest
from mrvae_models.config import TrainConfig

from bench import curve_cost, plots, records, retraining
from bench.curve_cost import measure, ratios, summary

BETAS = (0.1, 1.0, 10.0)


@pytest.fixture
def runs(monkeypatch):
    """Training that takes no time: a multi-rate run 1.1 s, a beta-VAE 1 s, more for each run before it (a drift)."""
    done = []

    def seconds_and_model(directory, options):
        done.append(options)
        return (1.1 if options["beta"] is None else 1.0) * (1 + 0.05 * len(done)), options, options["beta"]

    def evaluated(config, model, betas):
        return {name: [100.0 + beta for beta in betas] for name in ("objective", "rate", "distortion")}

    monkeypatch.setattr(curve_cost, "seconds_and_model", seconds_and_model)
    monkeypatch.setattr(curve_cost, "evaluated", evaluated)
    return done


def test_every_beta_vae_runs_beside_a_multirate_run(runs):
    result = measure("mlp", [3, 4], 5, 1, BETAS)
    warm, timed = runs[:2], runs[2:]
    assert [run["epochs"] for run in warm] == [1, 1] and {run["beta"] is None for run in warm} == {True, False}
    assert all(run["epochs"] == 5 and run["threads"] == 1 and run["network"] == "mlp" for run in timed)
    pairs = list(zip(timed[::2], timed[1::2], strict=True))
    assert all(a["seed"] == b["seed"] and (a["beta"] is None) != (b["beta"] is None) for a, b in pairs)
    assert [a["beta"] is None for a, _ in pairs] == [True, False] * 3, "either kind goes first by turns"
    for seed in (3, 4):
        trained = sorted(run["beta"] for run in timed if run["seed"] == seed and run["beta"] is not None)
        assert trained == list(BETAS)
    assert all(len(row) == 3 and min(row) > 0 for row in result["one_run_seconds"] + result["retrained_seconds"])
    assert result["objective"]["multi-rate"]["3"]["objective"] == [100.1, 101.0, 110.0]
    assert result["objective"]["10"]["4"]["objective"] == [110.0]


def test_drift_does_not_move_the_ratio_of_neighbours(runs):
    result = measure("mlp", [0, 1, 2], 5, 1, BETAS)
    assert result["ratio"]["one over one"]["median"] == pytest.approx(1.1, rel=0.03)
    assert result["ratio"]["ten over one"]["median"] == pytest.approx(3 / 1.1, rel=0.03)


def test_ratios_by_hand():
    found = ratios([[2.0, 2.0], [3.0, 3.0]], [[1.0, 2.0], [3.0, 6.0]])
    assert found["one over one"].median == 1.0  # of 2, 1, 1 and 1/2
    assert found["ten over one"] == (2.25, 1.5, 3.0)  # 3 / 2 and 9 / 3


def test_the_summary_warns_of_few_epochs_only(runs):
    short, long = (summary(measure("mlp", [0], epochs, 1, BETAS)) for epochs in (5, 150))
    assert "neither is converged" in short and "converged" not in long
    assert "earlier recipe" not in short
    assert "3 beta-VAEs take 2.7" in short and "| 10 | 110.00 | 110.00 | 1.000 |" in short  # one seed: no spread


def test_a_curve_of_other_options_than_today_s_is_said_to_be_of_an_earlier_recipe(runs):
    result = json.loads(json.dumps(measure("mlp", [0], 5, 1, BETAS)))
    assert result["config"] == TrainConfig(network="mlp", epochs=5, threads=1).to_dict()
    assert curve_cost.earlier_recipe(result) is None
    result["config"] |= {"recipe": "paper", "gone": 3}
    del result["config"]["margin"]
    said = summary(result)
    assert "of an earlier recipe: today's differs in `recipe` ('paper', today 'ranked')" in said
    assert "`gone` (3, today 'not there')" in said and "`margin` ('not there', today [2.0, 1.5])" in said
    del result["config"]
    assert "does not say which options its runs had" in summary(result)


def test_a_real_curve_of_one_epoch(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(curve_cost, "BETAS", BETAS[1:])
    monkeypatch.setattr(measure, "__defaults__", (BETAS[1:],))
    out, plot = tmp_path / "curve.json", tmp_path / "curve.png"
    assert curve_cost.main(["--epochs", "1", "--out", str(out)]) == 0
    (result,) = records.read(out, "curve-cost").results
    assert result["betas"] == [1.0, 10.0] and min(result["one_run_seconds"][0] + result["retrained_seconds"][0]) > 0
    multi, plain = result["objective"]["multi-rate"]["0"], result["objective"]["1"]["0"]
    for curve, beta in ((multi, 1.0), (plain, 1.0)):
        assert curve["objective"][0] == pytest.approx(curve["distortion"][0] + beta * curve["rate"][0])
        assert 50 < curve["objective"][0] < 1000
    said = capsys.readouterr().out
    assert curve_cost.main(["--table", str(out)]) == 0
    assert capsys.readouterr().out.strip() in said
    plots.curve_cost([result], plot, "a title")
    assert plots.drawn_from(plot) == plots.digest([result])


@pytest.mark.parametrize(("arguments", "message"), [
    (["--epochs", "0"], "--epochs is 0"), (["--threads", "0"], "--threads is 0"), (["--seeds", "1", "1"], "each once"),
    (["--network", "abacus", "--epochs", "1"], "abacus"),
])
def test_bad_arguments_are_named(capsys, arguments, message):
    with pytest.raises(SystemExit) as ended:
        curve_cost.main(arguments)
    assert ended.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("error", [
    curve_cost.TrainingInterrupted("terminated; continue with: mrvae train --resume"), KeyboardInterrupt(),
])
def test_an_interrupted_curve_writes_nothing(tmp_path, monkeypatch, capsys, error):
    def interrupted(directory, options):
        raise error

    monkeypatch.setattr(curve_cost, "seconds_and_model", interrupted)
    assert curve_cost.main(["--out", str(tmp_path / "curve.json")]) == 130
    assert not list(tmp_path.iterdir()) and "interrupted; nothing was written" in capsys.readouterr().err


def test_retraining_writes_a_result_file_of_the_experiments_runs(tmp_path, monkeypatch, capsys):
    asked = []

    def execute(runs, evaluation, out, processes):
        asked.extend(runs)
        assert (evaluation.draws, out, processes) == (8, tmp_path / "runs", 3)
        return [
            {"columns": {name: [run.seed + beta for beta in run.betas] for name in (*retraining.COLUMNS, "elbo")}}
            for run in runs
        ]

    monkeypatch.setattr(retraining, "execute", execute)
    arguments = ["retraining", "--seeds", "0", "1", "--processes", "3", "--set", "epochs=7"]
    arguments += ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "result.json")]
    monkeypatch.setattr("sys.argv", arguments)
    assert retraining.main() == 0
    said = capsys.readouterr().out
    assert len(asked) == 22 and all(run.options["epochs"] == 7 for run in asked)
    assert "| 10 | 10.50 (0.71) | 10.50 (0.71) | 1.000 | 10.50, 10.50 |" in said and "worst 1.000" in said
    document = json.loads((tmp_path / "result.json").read_text())
    assert document["config"] == TrainConfig(epochs=7).to_dict() and len(document["betas"]) == 10
    assert document["runs"]["10"]["1"] == {name: [11.0] for name in retraining.COLUMNS}
    assert len(document["runs"]["multi-rate"]["0"]["objective"]) == 10
    monkeypatch.setattr("sys.argv", ["retraining", "--table", str(tmp_path / "result.json")])
    assert retraining.main() == 0
    assert capsys.readouterr().out == said

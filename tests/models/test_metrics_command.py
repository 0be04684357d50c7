"""`mrvae metrics` and the registry: rows that are the metrics, files, functions of the user's own, errors."""

from __future__ import annotations

import csv
import inspect
import json
import re
from dataclasses import replace

import numpy as np
import pytest
from mrvae_models.cli import main
from mrvae_models.commands.metrics import FILES
from mrvae_models.curve import evaluate
from mrvae_models.data import load
from mrvae_models.metrics import METRICS
from mrvae_models.report import report
from mrvae_models.run import load_model, load_split
from mrvae_models.selection import metric_called
from mrvae_models.training import TrainConfig, train


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("metrics")
    generator = np.random.default_rng(0)
    np.savez(
        folder / "images.npz",
        train_images=generator.integers(0, 256, (60, 6, 6), dtype=np.uint8),
        train_labels=np.arange(60) % 2,
        test_images=generator.integers(0, 256, (20, 6, 6), dtype=np.uint8),
        test_labels=np.arange(20) % 2,
    )
    config = TrainConfig(
        data=str(folder / "images.npz"),
        out=str(folder / "run"),
        epochs=1,
        batch_size=9,
        network_options={"hidden": [12]},
        latent=3,
    )
    return train(config, progress=False).directory


def rows_of(run):
    with open(run / FILES[0], newline="") as file:
        return list(csv.DictReader(file))


def test_one_row_a_beta_holds_what_the_metrics_return(run, capsys):
    log = (run / "metrics.csv").read_bytes()
    own = run / "own.py"
    own.write_text("def twice(model, dataset, beta):\n    return 2 * beta + len(dataset)\n")
    names = ["mi", "iwae", "probe", "objective", f"{own}:twice"]
    assert main(["metrics", "--run", str(run), "--betas", "10", "0.1", "--metrics", *names]) == 0
    model, _ = load_model(run)
    config = TrainConfig.load(run / "config.json")
    test, train_set = load_split(config, "test"), load_split(config, "train")
    rows = rows_of(run)
    assert [float(row["beta"]) for row in rows] == [0.1, 10.0]
    assert list(rows[0]) == ["beta", *names]
    for row in rows:
        beta = float(row["beta"])
        assert float(row["mi"]) == METRICS["mi"](model, test, beta)
        assert float(row["iwae"]) == METRICS["iwae"](model, test, beta)
        assert float(row["probe"]) == METRICS["probe"](model, test, beta, train=train_set)
        assert float(row["objective"]) == evaluate(model, test, [beta]).points[0].objective
        assert float(row[names[-1]]) == 2 * beta + 20
    document = json.loads((run / FILES[1]).read_text())
    assert document["rows"][1]["mi"] == float(rows[1]["mi"])
    assert document["about"]["units"]["mi"] == "nats" and document["about"]["split"] == "test"
    assert (run / "metrics.csv").read_bytes() == log  # the log of training stays
    assert "0.1 " in capsys.readouterr().out


def test_rows_that_are_done_stay_where_a_later_one_fails(run, tmp_path, capsys):
    own = tmp_path / "own.py"
    own.write_text("def once(model, dataset, beta):\n    assert beta < 1, 'too far'\n    return 7\n")
    arguments = ["metrics", "--run", str(run), "--betas", "0.1", "5", "--out", str(tmp_path), "--metrics"]
    assert main([*arguments, "mi", f"{own}:once"]) == 1
    assert "too far" in capsys.readouterr().err
    assert [row[f"{own}:once"] for row in rows_of(tmp_path)] == ["7.0"]
    assert [row["beta"] for row in json.loads((tmp_path / FILES[1]).read_text())["rows"]] == [0.1]


def test_what_a_metric_needs_is_asked_before_another_is_measured(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MRVAE_INCEPTION", str(tmp_path / "none.pth"))
    assert main(["metrics", "--run", str(run), "--metrics", "mi", "fid", "--out", str(tmp_path / "out")]) == 1
    said = capsys.readouterr()
    assert "FID needs Inception's weights" in said.err and said.out == "" and not (tmp_path / "out").exists()


def test_options_change_what_they_name(run, tmp_path):
    arguments = ["metrics", "--run", str(run), "--betas", "1", "--metrics", "mi", "--out", str(tmp_path)]
    found = []
    for more in ([], ["--seed", "1"], ["--split", "train"], ["--batch-size", "3"]):
        assert main([*arguments, *more]) == 0
        found.append(float(rows_of(tmp_path)[0]["mi"]))
    assert len(set(found[:3])) == 3
    assert found[3] == pytest.approx(found[0], rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--metrics", "mj"], 1, "metric 'mj' is not known; expected one of active_units, .*file.py:function"),
        (["--metrics", "mi", "--betas", "0"], 2, "--betas holds 0; expected positive"),
        (["--metrics", "mi", "--batch-size", "0"], 2, "--batch-size is 0"),
        (["--metrics", "none.py:f"], 1, "'none.py' of metric 'none.py:f' is no file of Python"),
        (["--metrics", "mig"], 1, "mig needs a set whose factors are known"),
        (["--metrics", "mi", "--device", "nowhere"], 1, "device 'nowhere' cannot be used"),
    ],
)
def test_errors_are_one_sentence(run, capsys, arguments, code, message):
    assert main(["metrics", "--run", str(run), *arguments]) == code
    error = capsys.readouterr().err
    assert error.startswith("mrvae metrics: ") and error.count("\n") == 1
    assert re.search(message, error)


def test_a_plain_run_has_its_own_beta_only(run, tmp_path, capsys):
    config = TrainConfig.load(run / "config.json")
    plain = train(TrainConfig.from_dict({**config.to_dict(), "out": str(tmp_path), "beta": 0.5}), progress=False)
    assert main(["metrics", "--run", str(plain.directory), "--metrics", "mi"]) == 0
    assert [row["beta"] for row in rows_of(plain.directory)] == ["0.5"]
    assert main(["metrics", "--run", str(plain.directory), "--metrics", "mi", "--betas", "1", "2"]) == 1
    assert "is of one beta, 0.5; leave out --betas" in capsys.readouterr().err


def test_force_removes_what_was_measured_of_the_run_that_it_replaces(run, tmp_path):
    config = TrainConfig.load(run / "config.json")
    config = TrainConfig.from_dict({**config.to_dict(), "out": str(tmp_path)})
    train(config, progress=False)
    assert main(["metrics", "--run", str(tmp_path), "--metrics", "rate", "--betas", "1"]) == 0
    assert all((tmp_path / name).exists() for name in FILES)
    train(config, force=True, progress=False)
    assert not any((tmp_path / name).exists() for name in FILES)


@pytest.mark.parametrize("name", METRICS)
def test_metrics_say_what_they_are_and_share_their_options(name):
    metric = METRICS[name]
    assert metric.unit and metric.help and metric.best in ("min", "max", None)
    if name != "fid":  # whose weights are not there: see below
        assert metric_called(name) is metric
    parameters = list(inspect.signature(metric).parameters.values())
    assert [parameter.name for parameter in parameters[:3]] == ["model", "dataset", "beta"]
    assert all(parameter.default is not inspect.Parameter.empty for parameter in parameters[3:])
    assert {"batch_size", "calibration"} <= {parameter.name for parameter in parameters}


@pytest.mark.parametrize("name", ["rate", "distortion", "elbo", "objective", "active_units"])
def test_metrics_of_the_curve_are_those_of_the_curve(run, name):
    model, _ = load_model(run)
    data = load_split(TrainConfig.load(run / "config.json"), "test")
    (point,) = evaluate(model, data, [0.3]).points
    assert METRICS[name](model, data, 0.3) == getattr(point, name)


@pytest.fixture(scope="module")
def sprites(tmp_path_factory):
    """A run on a grid of 3 x 2 x 2 x 2 x 2 sprites."""
    config = TrainConfig(
        data="dsprites-generated:1,3,20,16,16",
        out=str(tmp_path_factory.mktemp("sprites") / "run"),
        epochs=1,
        batch_size=8,
        network_options={"hidden": [12]},
        latent=3,
        train_on="all",
    )
    return train(config, progress=False).directory


def test_a_probe_is_not_tested_on_what_it_is_fitted_on(tmp_path):
    """Codes of as many dimensions as examples tell any labels of the examples that the probe is fitted on."""
    generator = np.random.default_rng(0)
    images, labels = generator.integers(0, 256, (60, 6, 6), dtype=np.uint8), generator.integers(0, 2, 60)
    np.savez(tmp_path / "images.npz", images=images, labels=labels)
    config = TrainConfig(data=str(tmp_path / "images.npz"), epochs=1, batch_size=20, latent=60, beta=0.01)
    for train_on, split in (("train", "all"), ("all", "test"), ("all", "all"), ("train", "test")):
        out = tmp_path / f"{train_on}-{split}"
        model = train(replace(config, train_on=train_on, out=str(out)), progress=False).model
        assert main(["metrics", "--run", str(out), "--metrics", "probe", "--split", split]) == 0
        found = float(rows_of(out)[0]["probe"])
        if (train_on, split) == ("train", "test"):
            expected = METRICS["probe"](model, load_split(config, "test"), 0.01, train=load_split(config, "train"))
        else:
            expected = METRICS["probe"](model, load_split(config, split), 0.01)
        assert found == expected < 0.95


def test_mig_is_of_the_whole_grid_where_all_is_asked_for(sprites, tmp_path):
    arguments = ["metrics", "--run", str(sprites), "--betas", "1", "--metrics", "mig", "--out", str(tmp_path)]
    assert main([*arguments, "--split", "all"]) == 0
    model, _ = load_model(sprites)
    whole = load("dsprites-generated:1,3,20,16,16", "all")
    assert len(whole) == 48
    assert float(rows_of(tmp_path)[0]["mig"]) == METRICS["mig"](model, whole, 1.0)
    assert json.loads((tmp_path / FILES[1]).read_text())["about"]["examples"] == 48


def test_all_of_a_divided_set_is_refused(run, capsys):
    assert main(["metrics", "--run", str(run), "--metrics", "mi", "--split", "all"]) == 1
    assert "split 'all' is for a set that is not divided" in capsys.readouterr().err


def test_the_train_split_of_a_dynamic_run_is_measured_as_drawn_once(run, tmp_path):
    config = TrainConfig.from_dict({**TrainConfig.load(run / "config.json").to_dict(), "out": str(tmp_path)})
    config = replace(config, binarize="dynamic")
    model = train(config, progress=False).model
    assert main(["metrics", "--run", str(tmp_path), "--betas", "1", "--metrics", "distortion", "--split", "train"]) == 0
    drawn = load_split(replace(config, binarize="fixed"), "train")  # the same draw, and no probabilities
    assert set(drawn.examples.unique().tolist()) == {0.0, 1.0}
    assert float(rows_of(tmp_path)[0]["distortion"]) == METRICS["distortion"](model, drawn, 1.0)
    curve, _ = report(tmp_path, [1.0], split="train", images=False, out=tmp_path / "curve")
    assert curve.points[0].distortion == METRICS["distortion"](model, drawn, 1.0)

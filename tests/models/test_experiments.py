"""The experiments: each one small, from the command to its page; numbers against the models on the disk; a kill."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import re
import shlex
import shutil
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from mrvae_models import training
from mrvae_models.arguments import parser
from mrvae_models.baking import bake_run
from mrvae_models.cli import config_of, main
from mrvae_models.closed_form import eigenvalues, linear_optimum
from mrvae_models.config import TrainConfig
from mrvae_models.curve import evaluate
from mrvae_models.data import load
from mrvae_models.experiments import launchers, recipe_study
from mrvae_models.experiments.catalogue import EXPERIMENTS, options_of
from mrvae_models.experiments.command_lines import command_of
from mrvae_models.experiments.evaluation import evaluated
from mrvae_models.experiments.execution import configured, execute, execute_one
from mrvae_models.experiments.figures import FIGURES
from mrvae_models.experiments.plan import (
    BASELINES,
    MULTIRATE,
    SET_BY_ALL,
    Evaluation,
    Run,
    Settings,
    multirate,
    retrained,
)
from mrvae_models.experiments.tables import TABLES, against, area, mean_distortion, ratios
from mrvae_models.networks import build
from mrvae_models.recipes import gate_fields
from mrvae_models.run import load_model
from PIL import Image

OPTIONS = {field.name for field in dataclasses.fields(TrainConfig)}
TINY = {"epochs": 1, "batch_size": 500, "latent": 3, "network_options": {"hidden": [16]}}


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """The directory of one experiment, whose runs others have too."""
    return tmp_path_factory.mktemp("experiments")


def small(out, name, *arguments):
    """Run an experiment by its command; its rows and its page."""
    assert main(["experiment", name, "--small", "--out", str(out), *arguments]) == 0
    with open(out / "results.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    document = json.loads((out / "config.json").read_text())
    page = (out / f"{name}.md").read_text()
    with Image.open(out / "figure.png") as picture:
        pixels = np.asarray(picture.convert("L"))
    assert document["experiment"] == name and len(document["runs"]) == len({row["run"] for row in rows})
    assert pixels.shape[1] == 2000 and 0.002 < (pixels < 128).mean() < 0.9, "a picture with something drawn"
    assert "![" in page and "## Result" in page and f"mrvae experiment {name} --small" in page
    assert page.count("mrvae train") == len(document["runs"])
    return rows, page


def numbers(rows, line, column):
    return [float(row[column]) for row in rows if row["line"] == line]


def test_retraining(shared):
    rows, page = small(shared, "retraining", "--baselines", "constant")
    assert [row["line"] for row in rows] == [MULTIRATE, MULTIRATE, "retrained", "retrained"]
    objectives = [numbers(rows, line, "objective") for line in (MULTIRATE, "retrained")]
    found = [multi / plain for multi, plain in zip(*objectives, strict=True)]
    assert f"mean ratio {statistics.fmean(found):.3f}, worst {max(found):.3f}" in page
    model, document = load_model(shared / "runs" / "multi-rate-0")
    curve = evaluate(model, load("digits", "test"), [0.01, 10.0])
    assert numbers(rows, MULTIRATE, "rate") == curve.column("rate")
    assert numbers(rows, MULTIRATE, "distortion") == curve.column("distortion")
    assert document["config"]["epochs"] == 1 and "Seeds 0; network mlp, data digits, recipe ranked" in page


@pytest.mark.parametrize("name", ["rate-distortion", "active-units"])
def test_experiments_of_the_same_runs_take_them(shared, name, tmp_path, monkeypatch):
    small(shared, "retraining", "--baselines", "constant")
    shutil.copytree(shared / "runs", tmp_path / "runs")
    monkeypatch.setattr(training, "train", lambda *_, **__: pytest.fail("a run that is there is trained again"))
    rows, page = small(tmp_path, name, "--baselines", "constant")
    assert len(rows) == 4
    if name == "active-units":
        assert f"| 0.01 | {float(rows[0]['active_units']):.1f} | {float(rows[2]['active_units']):.1f} |" in page
    else:
        assert "Area under the rate-distortion curve" in page and "| retrained | 0.01 |" in page


@pytest.mark.parametrize("name", ["fid", "mig"])
def test_metrics_along_beta(tmp_path, name, monkeypatch):
    monkeypatch.setitem(EXPERIMENTS, name, dataclasses.replace(EXPERIMENTS[name], options={"beta_range": (0.1, 10.0)}))
    file = tmp_path / "mine.py"
    file.write_text("def metric(model, dataset, beta):\n    return beta + len(dataset)\n")
    rows, page = small(tmp_path, name, "--baselines", "constant", "--metric", f"{file}:metric")
    assert numbers(rows, MULTIRATE, "metric") == numbers(rows, "retrained", "metric") == [1000.1, 1010.0]
    assert "| 0.1 | 1000.1000 | 1000.1000 |" in page and f"metric {file}:metric on 1,000 examples" in page


@pytest.mark.parametrize(("data", "examples"), [("dsprites-generated:1,3,20,16,16", 48), ("digits", 1000)])
def test_mig_is_of_the_whole_grid_and_of_the_test_split_where_there_is_none(tmp_path, data, examples):
    file = tmp_path / "mine.py"
    file.write_text("def metric(model, dataset, beta):\n    return len(dataset)\n")
    model = build("mlp", load(data, "test").input_shape, 3, hidden=(4,))
    evaluation = dataclasses.replace(EXPERIMENTS["mig"].evaluation, metric=f"{file}:metric", draws=1)
    columns = evaluated(TrainConfig(data=data, accelerator="cpu"), model, [1.0], evaluation, tmp_path)
    assert columns["metric"] == [examples]
    assert columns["metric_examples"] == [examples]
    assert options_of(EXPERIMENTS["mig"], {}, full=True, small=False)["train_on"] == "all"


def test_a_metric_that_is_fitted_has_the_training_examples(tmp_path):
    """Of `mrvae experiment` as of `mrvae metrics`."""
    file = tmp_path / "mine.py"
    file.write_text("def metric(model, dataset, beta, train=None):\n    return 0 if train is None else len(train)\n")
    model = build("mlp", (1, 28, 28), 3, hidden=(4,))
    evaluation = Evaluation("metric", f"{file}:metric", draws=1)
    assert evaluated(TrainConfig(accelerator="cpu"), model, [1.0], evaluation, tmp_path)["metric"] == [4500]
    whole = TrainConfig(accelerator="cpu", data="dsprites-generated:1,3,20,16,16", train_on="all")
    model = build("mlp", (1, 64, 64), 3, hidden=(4,))
    assert evaluated(whole, model, [1.0], evaluation, tmp_path)["metric"] == [0], "the test examples are among them"


def test_samples_are_of_the_same_latent_variables(tmp_path):
    rows, _ = small(tmp_path, "samples")
    assert len(rows) == 4
    drawn = np.load(tmp_path / "runs" / "multi-rate-0" / "samples.npy")
    assert drawn.shape == (2, 10, 1, 28, 28) and (drawn >= 0).all() and (drawn <= 1).all()
    alone = np.load(tmp_path / "runs" / "retrained-beta-10-0" / "samples.npy")
    assert alone.shape == (1, 10, 1, 28, 28) and not np.array_equal(alone[0], drawn[1])


def test_sampling_range(tmp_path):
    rows, page = small(tmp_path, "sampling-range", "--betas", "3")
    runs = json.loads((tmp_path / "config.json").read_text())["runs"]
    ranges = [[0.01, 10], [0.001, 10], [0.1, 10], [1, 10], [0.01, 1], [0.01, 0.1]]
    assert [run["config"]["beta_range"] for run in runs] == ranges and len(rows) == 18
    assert "## Result" in page and "of 0.01 to 10" in page
    assert [row["beta"] for row in rows if row["line"] == "0.1 to 10"] == ["0.1", "1.0", "10.0"]


@pytest.mark.parametrize(("name", "lines"), [("gate-architecture", 4), ("gate-activation", 6)])
def test_gates(tmp_path, name, lines):
    rows, page = small(tmp_path, name)
    runs = {run["line"]: run["config"]["gates"] for run in json.loads((tmp_path / "config.json").read_text())["runs"]}
    assert len(runs) == lines == len({json.dumps(gates) for gates in runs.values()})
    assert len({row["objective"] for row in rows}) == len(rows), "every gate trains another network"
    gated = {line: load_model(tmp_path / "runs" / row["run"])[0] for row in rows for line in [row["line"]]}
    sizes = [sum(p.numel() for p in model.gate_parameters()) for model in gated.values()]
    if name == "gate-architecture":
        affine, two, two_shared, five = sizes
        assert affine < two_shared < two and two_shared < five
    else:
        assert sizes == [sizes[0]] * 4 + [2 * sizes[0]] * 2, "FiLM has a shift for every gate"


def test_the_study_changes_one_thing_of_the_recipe_at_a_time(tmp_path):
    rows, page = small(tmp_path, "recipe")
    runs = {run["line"]: run["config"] for run in json.loads((tmp_path / "config.json").read_text())["runs"]}
    recipe = runs[recipe_study.RECIPE]
    assert recipe["recipe"] == "ranked" and set(runs) == {"retrained", *recipe_study.VARIANTS}
    for line, changed in recipe_study.VARIANTS.items():
        differ = {name for name in recipe if runs[line][name] != recipe[name]} - {"out"}
        if "recipe" in changed:
            assert "recipe" in differ and runs[line]["epochs"] == recipe["epochs"]
        else:
            assert differ == set(changed), line
    objective = {(row["line"], row["beta"]): float(row["objective"]) for row in rows}
    ratios = [objective["no shifts", beta] / objective["retrained", beta] for beta in ("0.01", "10.0")]
    cells = [f"{ratio:.3f}" for ratio in ratios] + [f"{statistics.fmean(ratios):.4f}", f"{max(ratios):.3f}"]
    assert f"| no shifts | {' | '.join(cells)} |" in page and "Reproduces" not in page
    over = {
        line: [objective[line, beta] / objective["retrained", beta] for beta in ("0.01", "10.0")]
        for line in recipe_study.VARIANTS
    }
    lowest, evenest = (min(over, key=lambda line: by(over[line])) for by in (statistics.fmean, max))
    assert f"Lowest mean: {lowest}. Lowest largest ratio: {evenest}." in page


def test_linear_is_held_to_its_closed_form(tmp_path):
    rows, page = small(tmp_path, "linear")
    spectrum = eigenvalues(load("digits", "train").examples)
    for row in rows:
        best = linear_optimum(spectrum, 3, float(row["beta"]))
        assert float(row["optimal_rate"]) == best.rate and float(row["optimal_distortion"]) == best.distortion
        assert float(row["objective"]) >= float(row["optimal_objective"])
    assert "above the optimum, at worst" in page


@pytest.mark.parametrize("name", EXPERIMENTS)
@pytest.mark.parametrize("size", ["default", "full", "small"])
def test_the_command_of_a_run_means_its_options(name, size, tmp_path):
    experiment = EXPERIMENTS[name]
    options = options_of(experiment, {}, size == "full", size == "small")
    settings = Settings(seeds=(3,), count=2, options=options, baselines=("constant",))
    for run in experiment.runs(settings):
        if set(run.options) <= OPTIONS:
            config = configured(tmp_path / run.name, run.options)
            words = shlex.split(command_of(config))
            assert words[:2] == ["mrvae", "train"]
            assert config_of(parser().parse_args(words[1:])) == config


def test_what_makes_no_sense_is_told_before_anything_is_trained(tmp_path, capsys, monkeypatch):
    def complaint(*arguments):
        assert main(["experiment", "linear", "--small", "--out", str(tmp_path / "new"), *arguments]) == 1
        return capsys.readouterr().err

    assert "run multi-rate-0: unknown option 'colour' in the options of the run" in complaint("--option", "colour=red")
    assert "run multi-rate-0: epochs is 0; expected a positive integer" in complaint("--epochs", "0")
    assert "give each seed once" in complaint("--seeds", "1", "1")
    assert "network mlp, likelihood its own, sigma 1: expected --network linear" in complaint("--network", "mlp")
    assert "expected --network linear with a gaussian of sigma 1" in complaint("--option", "likelihood=student-t")
    assert not (tmp_path / "new").exists(), "nothing was trained"
    arguments = ["experiment", "fid", "--small", "--out", str(tmp_path / "new"), "--metric"]
    assert main([*arguments, "typo"]) == 1 and "metric 'typo' is not known" in capsys.readouterr().err
    monkeypatch.setenv("MRVAE_INCEPTION", str(tmp_path / "none.pth"))
    assert main([*arguments, "fid"]) == 1 and "FID needs Inception's weights" in capsys.readouterr().err
    assert not (tmp_path / "new").exists(), "nothing was trained"
    for arguments, message in (
        (["abacus"], "experiment 'abacus' is not known; expected one of retraining"),
        ([], "no NAME given"),
        (["linear", "--processes", "0"], "--processes is 0"),
        (["linear", "--metric", "fid"], "--metric is for fid, mig and calibrated"),
    ):
        assert main(["experiment", *arguments]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_knows_which_options_it_sets(name):
    """Every other option reaches all of its runs; of these some run has another value."""
    experiment = EXPERIMENTS[name]
    values = {option: f"the {option} of the user" for option in OPTIONS} | {"beta_range": (0.02, 5.0)}
    settings = Settings(seeds=(3,), count=2, options=values, baselines=("constant",))
    runs = experiment.runs(settings)

    def reaches(option, run):  # a range says nothing to a run at one beta, which may be without it
        without = option == "beta_range" and isinstance(run.options["beta"], float) and option not in run.options
        return without or run.options.get(option) == values[option]

    kept = {option for option in OPTIONS if all(reaches(option, run) for run in runs)}
    assert OPTIONS - kept <= {*experiment.sets, *SET_BY_ALL}
    assert not kept & set(experiment.sets)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rate-distortion", "--option", "out=precious"], "the option out is 'precious'.*use --out"),
        (["rate-distortion", "--option", "seed=7"], "the option seed is 7, and rate-.* sets seed itself; use --seeds"),
        (["linear", "--option", "beta=0.5"], "the option beta is 0.5.*use --betas"),
        (["sampling-range", "--option", "beta_range=0.1,1"], "sampling-range sets beta_range itself; .*leave it out"),
        (["gate-activation", "--option", "gates=3"], "gate-activation sets gates itself"),
        (["calibrated", "--option", "likelihood=bernoulli"], "calibrated sets likelihood itself"),
        (["recipe", "--recipe", "paper"], "recipe sets recipe itself"),
        (["retraining", "--option", "annealing=0.5"], "the baseline 'annealed' sets it: give --baselines constant"),
    ],
)
def test_an_option_that_the_experiment_sets_is_refused_before_anything_is_touched(
    tmp_path, monkeypatch, capsys, arguments, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "model.safetensors").write_text("weights")
    assert main(["experiment", arguments[0], "--small", "--out", "new", *arguments[1:]]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert [path.name for path in tmp_path.rglob("*")] == ["precious", "model.safetensors"]
    with pytest.raises(ValueError, match="out is 'precious'; expected none"):
        configured(tmp_path / "new", {"out": "precious"})


def test_annealing_may_be_given_where_no_baseline_sets_it(tmp_path):
    small(tmp_path, "retraining", "--baselines", "constant", "--option", "annealing=0.5")
    runs = json.loads((tmp_path / "config.json").read_text())["runs"]
    assert {run["config"]["annealing"] for run in runs} == {0.5} and "annealing" in BASELINES["annealed"][1]


def test_an_experiment_replaces_neither_a_run_nor_another_experiment(shared, tmp_path, monkeypatch, capsys):
    small(shared, "retraining", "--baselines", "constant")
    before = {path: path.read_bytes() for path in shared.rglob("*") if path.is_file()}
    monkeypatch.setattr(training, "train", lambda *_, **__: pytest.fail("something is trained"))
    run = shared / "runs" / "multi-rate-0"
    only_checkpoint, other = tmp_path / "checkpoint", tmp_path / "other"
    for directory, name in ((only_checkpoint, "last.ckpt"), (other, "config.json")):
        directory.mkdir()
        (directory / name).write_text('{"epochs": 3}')
    for directory, held in (
        (run, "a training run"),
        (only_checkpoint, "a training run"),
        (other, "a config.json of something else"),
        (shared, "the experiment 'retraining'"),
    ):
        assert main(["experiment", "linear", "--small", "--out", str(directory)]) == 1
        said = capsys.readouterr().err
        assert f"{directory} holds {held}, whose files" in said and "give another --out" in said
    assert {path: path.read_bytes() for path in shared.rglob("*") if path.is_file()} == before


def test_it_is_told_which_runs_are_trained_again_and_why(tmp_path, capsys):
    small(tmp_path, "linear")
    assert "trained again" not in capsys.readouterr().err
    small(tmp_path, "linear")
    assert "trained again" not in capsys.readouterr().err
    small(tmp_path, "linear", "--option", "lr=0.02")
    said = capsys.readouterr().err
    run = tmp_path / "runs" / "multi-rate-0"
    assert f"{run} is trained again, with other options: lr was " in said and ", now 0.02\n" in said
    assert said.count("trained again") == 3


def test_what_cannot_be_evaluated_of_the_data_is_told_before_anything_is_trained(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(training, "train", lambda *_, **__: pytest.fail("something is trained"))
    text, halves = tmp_path / "text", tmp_path / "halves"
    for folder, splits in ((text, ("train", "valid", "test")), (halves, ("train", "valid"))):
        folder.mkdir()
        for split in splits:
            (folder / f"{split}.txt").write_text("a b c\nb a\nc\n" * 5)

    def complaint(name, data, *arguments):
        line = ["experiment", name, "--small", "--out", str(tmp_path / "new"), "--data", str(data), *arguments]
        assert main(line) == 1 and not (tmp_path / "new").exists()
        return capsys.readouterr().err

    of_text = ("--network", "lstm")
    assert "holds text, and the evaluation 'samples' is of images" in complaint("samples", text, *of_text)
    assert "holds text, and the evaluation 'calibrated' is of images" in complaint("calibrated", text, *of_text)
    assert "the Frechet distance is of images" in complaint("fid", text, *of_text)
    assert "mig needs a set whose factors are known" in complaint("mig", "digits", "--network", "mlp")
    said = complaint("rate-distortion", halves, *of_text)
    assert "no test set, only train, validation" in said and "--split validation" in said


def test_the_list_names_every_experiment_its_figure_and_cost(capsys):
    assert main(["experiment", "--list"]) == 0
    said = capsys.readouterr().out
    for name, experiment in EXPERIMENTS.items():
        assert f"{name}: {experiment.shows}\n" in said
    assert "63 runs of 150 epochs, mlp on digits" in said and "18 runs of 200 epochs, resnet on omniglot" in said


def test_the_slurm_launcher_submits_an_array(tmp_path, monkeypatch):
    updates, cancelled = {}, []

    class Job:
        def __init__(self, work, arguments):
            self.result = lambda: work(*arguments)

        def cancel(self):
            cancelled.append(self)

    class Executor:
        def __init__(self, folder, cluster):
            updates.update(folder=folder, cluster=cluster)

        def update_parameters(self, **parameters):
            updates.update(parameters)

        def batch(self):
            return open(os.devnull)

        def submit(self, work, *arguments):
            return Job(work, arguments)

    fake = SimpleNamespace(AutoExecutor=Executor, helpers=SimpleNamespace(as_completed=lambda jobs: reversed(jobs)))
    monkeypatch.setitem(sys.modules, "submitit", fake)
    found = dict(
        launchers.slurm(pow, [(2, 3), (3, 2)], processes=4, out=tmp_path, hours=1.5, gpus=1, partition="long")
    )
    assert found == {0: 8, 1: 9} and not cancelled
    assert updates == {
        "folder": tmp_path / "slurm", "cluster": "slurm", "timeout_min": 90, "cpus_per_task": 1, "gpus_per_node": 1,
        "slurm_array_parallelism": 4, "slurm_partition": "long",
    }
    with pytest.raises(ZeroDivisionError):
        list(launchers.slurm(divmod, [(1, 0), (1, 0)], out=tmp_path))
    assert len(cancelled) == 2, "a job that fails ends the others"


def test_without_submitit_the_error_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert main(["experiment", "linear", "--small", "--out", str(tmp_path), "--launcher", "slurm"]) == 1
    assert "needs the package submitit: pip install 'mrvae-kernels[cluster]'" in capsys.readouterr().err
    with pytest.raises(ValueError, match="launcher is 'cloud'; expected one of local, slurm"):
        execute([], Evaluation(), tmp_path, launcher="cloud")
    with pytest.raises(ValueError, match="processes is 0"):
        list(launchers.local(pow, [(1, 2)], processes=0))


def row(line, seed, beta, rate, distortion):
    return {
        "line": line, "run": f"{line}-{seed}", "seed": seed, "beta": beta, "rate": rate, "distortion": distortion,
        "objective": distortion + beta * rate,
    }


def test_both_planes_of_sampling_range_show_all_points():
    figure = Figure()
    FigureCanvasAgg(figure)
    lines = {"0.01 to 10": 10.0, "0.1 to 10": 11.0, "0.01 to 1": 40.0}  # the right plane's go far beyond the left's
    rows = [row(line, 0, beta, rate / beta, 100 + beta) for line, rate in lines.items() for beta in (0.5, 2.0)]
    FIGURES["ranges"](figure, EXPERIMENTS["sampling-range"], rows, Path())
    for axis in figure.axes:
        low, high = axis.get_xlim()
        assert low < min(r["rate"] for r in rows) and max(r["rate"] for r in rows) < high


def test_the_plane_of_linear_shows_the_whole_optimum():
    figure = Figure()
    FigureCanvasAgg(figure)
    rows = [
        {
            **row(MULTIRATE, 0, beta, 3.0 + beta, 5.0),
            "optimal_rate": 9 / beta, "optimal_distortion": beta, "optimal_objective": 9 + beta,
        }
        for beta in (0.5, 2.0)
    ]
    FIGURES["linear"](figure, EXPERIMENTS["linear"], rows, Path())
    assert figure.axes[0].get_xlim()[1] > 18 and figure.axes[0].get_ylim()[0] < 0.5


def test_one_seed_has_no_spread_in_the_table():
    rows = [row(line, 0, 1.0, 2.0, 5.0) for line in (MULTIRATE, "retrained")]
    assert "(" not in ratios(rows).split("|---|")[1]


def test_the_area_is_a_mean_distortion_over_the_rates_in_common():
    points = [(4.0, 0.0), (0.0, 8.0), (2.0, 2.0)]
    assert mean_distortion(points, 0.0, 4.0) == pytest.approx((10 + 2) / 4)
    assert mean_distortion(points, 1.0, 3.0) == pytest.approx((3.5 + 1.5) / 2)
    first = [row("a", 0, 1.0, 4.0, 0.0), row("a", 0, 2.0, 0.0, 8.0)]
    text = area([*first, row("b", 0, 1.0, 3.0, 1.0), row("b", 0, 2.0, 1.0, 5.0), row("c", 0, 1.0, 9.0, 0.0)])
    assert "| b | 1.00 to 3.00 | 3.00 | 4.00 | 0.7500 |" in text and "| c | none in common |" in text


def test_ratios_are_of_the_means_over_seeds():
    multi = [row(MULTIRATE, seed, beta, 1.0, 9.0 + seed) for seed in (0, 1) for beta in (1.0, 2.0)]
    plain = [row("retrained", seed, beta, 2.0, 8.0 + seed) for seed in (0, 1) for beta in (1.0, 2.0)]
    text = ratios([*multi, *plain])
    assert "| 1 | 10.50 (0.71) | 10.50 (0.71) | 1.000 | 2.00, 1.00 |" in text
    assert "| 2 | 12.50 (0.71) | 11.50 (0.71) | 0.920 | 2.00, 1.00 |" in text
    assert "mean ratio 0.960, worst 1.000" in text


def density(line, beta, objective):
    """A row of a density, whose D + beta R may be negative, at a rate of 1."""
    return row(line, 0, beta, 1.0, objective - beta)


def test_objectives_that_are_not_positive_are_compared_by_differences():
    """A ratio of negative ones calls the worst line the best."""
    plain = [density("retrained", beta, -100.0 + beta) for beta in (1.0, 2.0)]
    multi = [density(MULTIRATE, beta, -80.0 + 2 * beta) for beta in (1.0, 2.0)]
    text = ratios([*multi, *plain])
    assert "| difference (nats) |" in text and "mean difference +21.50 nats, worst +22.00 nats" in text
    assert "| 2 | -98.00 | -76.00 | +22.00 | 1.00, 1.00 |" in text and "ratio |" not in text
    better = [density("better", beta, -130.0) for beta in (1.0, 2.0)]
    text = against([*plain, *multi, *better])
    assert "less that of retrained, nats, by beta" in text and "| mean (nats) | largest (nats) |" in text
    assert "| better | -31.00 | -32.00 | -31.500 | -31.00 |" in text
    assert "Lowest mean: better. Lowest largest difference: better." in text
    zero = [density("retrained", 1.0, 0.0), density(MULTIRATE, 1.0, 3.0)]
    assert "mean difference +3.00 nats" in ratios(zero)


def test_areas_of_distortions_that_are_not_positive_are_compared_by_differences():
    lines = {"a": -100.0, "b": -90.0}
    text = area([row(line, 0, beta, 4 / beta, low) for line, low in lines.items() for beta in (1.0, 2.0)])
    assert "| less that of a (nats) |" in text and "| b | 2.00 to 4.00 | -90.00 | -100.00 | +10.00 |" in text


def test_pictures_of_objectives_that_are_not_positive_show_differences():
    plain = [density("retrained", beta, -100.0) for beta in (1.0, 2.0)]
    lines = [density(line, beta, low) for line, low in (("bad", -40.0), ("good", -160.0)) for beta in (1.0, 2.0)]
    figure = Figure()
    FigureCanvasAgg(figure)
    FIGURES["against"](figure, EXPERIMENTS["recipe"], [*plain, *lines], Path())
    axis = figure.axes[0]
    assert axis.get_title().endswith("(nats)")
    assert [text.get_text() for text in axis.texts] == ["+60.0", "+60.0", "-60.0", "-60.0"]
    assert axis.images[0].norm.vmax == 60
    figure = Figure()
    FigureCanvasAgg(figure)
    FIGURES["objective"](figure, EXPERIMENTS["retraining"], [*plain, *lines], Path())
    axis = figure.axes[1]
    assert axis.get_ylabel() == "difference (nats)" and "less that of retrained" in axis.get_title()
    drawn = {line.get_label(): line for line in axis.get_lines()}
    assert drawn["retrained"].get_ydata() == [0, 0]
    bad, good = (each.lines[0].get_ydata().tolist() for each in axis.containers)
    assert bad == [60, 60] and good == [-60, -60]


def test_a_column_has_a_mean_over_the_betas_that_all_lines_have():
    rows = [row("a", 0, 1.0, 1.0, 1.0), row("a", 0, 2.0, 1.0, 3.0), row("b", 0, 2.0, 2.0, 2.0)]
    text = TABLES["objective"](rows)
    assert "| 1 | 2.00 |  |" in text and "| mean | 5.00 | 6.00 |" in text


def test_runs_have_names_of_their_own():
    settings = Settings(seeds=(0, 1), count=3, options=TINY, baselines=("constant", "annealed"))
    runs = [*multirate(settings), *retrained(settings)]
    assert len({run.name for run in runs}) == len(runs) == 14
    assert runs[-1].name == "retrained-kl-annealed-beta-10-1" and runs[-1].options["annealing"] == 0.3
    assert Path(runs[0].name).name == runs[0].name


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sigmoid+hidden", "each once"),
        ("sigmoid+hidden0", "each once"),
        ("sigmoid+hidden8x", "each once"),
        ("sigmoid+hidden8+hidden16", "each once"),
        ("sigmoid+shared", "nothing to share without hidden layers"),
        ("sigmoid+ranked+hidden8", "neither ranked nor latent"),
        ("softplus+latent+hidden8", "neither ranked nor latent"),
    ],
)
def test_gates_with_hidden_layers_are_checked(text, message):
    assert gate_fields("sqrt+hidden64x32+shared+shift", "open") == {
        "kind": "sqrt", "shift": True, "init": "open", "hidden": [64, 32], "shared": True,
    }
    with pytest.raises(ValueError, match=message):
        TrainConfig(recipe="paper", gates={"encoder": text}).check()


def test_gates_with_hidden_layers_have_no_degree():
    assert gate_fields("sqrt+hidden8", "open", 3) == gate_fields("sqrt+hidden8", "open")
    assert gate_fields("sqrt", "open", 3) == {**gate_fields("sqrt", "open"), "degree": 3}


def test_gates_with_hidden_layers_are_baked(tmp_path):
    gates = {"encoder": "sigmoid+hidden8+shared", "decoder": "sqrt+hidden8+shared"}
    options = {**TINY, "recipe": "paper", "gates": gates, "seed": 0}
    execute_one(tmp_path, Run("line", 0, options, (1.0,)), Evaluation(draws=1))
    assert bake_run(tmp_path, 0.3).difference < 1e-5

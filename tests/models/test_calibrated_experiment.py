"""The experiment `calibrated`, small: its numbers against the models on the disk, its words, its picture, a kill."""

from __future__ import annotations

import csv
import json
import math

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from mrvae_models import checkpoint
from mrvae_models.cli import main
from mrvae_models.curve import evaluate
from mrvae_models.data import load
from mrvae_models.experiments.calibrated import BETA_VAE, BS_VAE, L_VAE, SIGMA_VAES
from mrvae_models.experiments.calibrated_figure import calibrated, course_of
from mrvae_models.experiments.calibrated_tables import fixed_points, landings, learned_betas, solved
from mrvae_models.experiments.catalogue import EXPERIMENTS
from mrvae_models.experiments.plan import MULTIRATE
from mrvae_models.likelihoods import Gaussian
from mrvae_models.metrics import METRICS
from mrvae_models.metrics.gaussian_bound import bound_at
from mrvae_models.run import load_model
from mrvae_models.scored import scored_as
from PIL import Image

from mrvae_kernels import cost_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small set, the arguments of the experiment on it, and the experiment's own files."""
    folder = tmp_path_factory.mktemp("calibrated")
    generator = np.random.default_rng(0)
    shade = generator.integers(30, 220, (90, 1, 1, 3))
    images = np.clip(shade + generator.normal(0, 20, (90, 6, 6, 3)), 0, 255).astype(np.uint8)
    np.savez(folder / "images.npz", train_images=images[:60], test_images=images[60:])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cost_model, "_fitted", {})  # as in every test: sums are then in one order
        assert main([*line(folder), "--out", str(folder / "whole")]) == 0
    return folder


def line(folder):
    arguments = ["experiment", "calibrated", "--small", "--network", "mlp", "--data", str(folder / "images.npz")]
    return [*arguments, "--epochs", "2", "--option", "batch_size=20", "--option", "lr=0.01"]


def rows_in(out):
    with open(out / "results.csv", encoding="utf-8") as file:
        return [
            {name: value if name in ("line", "run") else float(value) for name, value in row.items() if value}
            for row in csv.DictReader(file)
        ]


def test_all_methods_are_scored_the_same_way(folder):
    rows = rows_in(folder / "whole")
    lines = list(dict.fromkeys(row["line"] for row in rows))
    assert lines == [MULTIRATE, BETA_VAE, *SIGMA_VAES, BS_VAE, L_VAE]
    assert [row["beta"] for row in rows if row["line"] == MULTIRATE] == [0.001, 0.01, 0.1, 1.0, 10.0]
    test_set = load(str(folder / "images.npz"), "test")
    for row in rows:
        model, document = load_model(folder / "whole" / "runs" / row["run"])
        network = getattr(model, "network", model)
        likelihood = network.likelihood
        beta = row["own_beta"]
        with scored_as(model, Gaussian(1.0)):
            (point,) = evaluate(model, test_set, [beta]).points
        assert row["rate"] == point.rate and row["distortion"] == point.distortion
        assert row["objective"] == pytest.approx(point.distortion + beta * point.rate, rel=1e-9)
        if row["line"] in (MULTIRATE, BETA_VAE):
            assert beta == row["beta"] and row["nll"] == pytest.approx(
                METRICS["nll_implied"](model, test_set, beta), rel=1e-4
            )
        elif row["line"] == L_VAE:
            assert beta == document["learned"]["beta"] == pytest.approx(row["s0"] ** 2 / row["s1"] ** 2)
            assert row["s0_fixed"] ** 4 == pytest.approx(row["error_train"])
            assert row["s1_fixed"] ** 4 == pytest.approx(row["rate_train"])
        else:
            assert beta == pytest.approx(row["beta"] * document["learned"]["sigma"] ** 2)
            assert row["nll"] == pytest.approx(bound_at(model, test_set, 1.0, likelihood.sigma**2), rel=1e-4)
            training = load(str(folder / "images.npz"), "train")
            assert row["nll_train"] == pytest.approx(bound_at(model, training, 1.0, likelihood.sigma**2), rel=1e-4)
            assert row["variance_ratio"] == pytest.approx(METRICS["variance_ratio"](model, test_set, 1.0))
            if "image" not in row["line"] and row["line"] != BS_VAE:
                assert row["nll"] == pytest.approx(METRICS["elbo"](model, test_set, 1.0) * -1, rel=1e-4)
        validation = load(str(folder / "images.npz"), "validation")  # fewer than EXAMPLES: all of it
        best = METRICS["nll_optimal"](model, test_set, beta, train=validation)
        assert row["nll_best"] == pytest.approx(best, rel=0.02)  # another draw of z for validation examples
        if row["line"] in (*SIGMA_VAES, BS_VAE):
            assert likelihood.sigma**2 == pytest.approx(row["mse_validation"])
        assert row["rate"] == pytest.approx(row["mi"] + row["marginal_kl"], rel=0.3, abs=0.5)  # their z are draws


def test_the_page_and_the_picture_say_what_was_compared(folder):
    page = (folder / "whole" / "calibrated.md").read_text()
    assert "Table 1 of sigma-VAE" not in page and "Seeds 0; network mlp" in page and "One seed" in page
    for text in ("| sigma-VAE, optimal | 1 |", "| BS-VAE | 0.1 |", "| L-VAE | 1 |", "has the lowest bound", "s^4 = L"):
        assert text in page
    assert page.count("mrvae train") == len(json.loads((folder / "whole" / "config.json").read_text())["runs"]) == 9
    with Image.open(folder / "whole" / "figure.png") as picture:
        pixels = np.asarray(picture.convert("L"))
    assert pixels.shape[1] == 2000 and 0.002 < (pixels < 128).mean() < 0.9
    figure = Figure()
    FigureCanvasAgg(figure)
    rows = rows_in(folder / "whole")
    calibrated(figure, EXPERIMENTS["calibrated"], rows, folder / "whole")
    plane, course, training, test = figure.axes
    for axis, x, y in (
        (plane, "rate", "distortion"), (training, "own_beta", "nll_train"), (test, "own_beta", "nll")
    ):
        for name in (BETA_VAE, *SIGMA_VAES, BS_VAE, L_VAE):
            (drawn,) = (each for each in axis.get_lines() if each.get_label() == name)
            assert drawn.get_xydata().tolist() == [[row[x], row[y]] for row in rows if row["line"] == name]
    assert course.get_yscale() == "log"
    learned = next(row for row in rows if row["line"] == L_VAE)
    epochs, betas = course_of(folder / "whole" / "runs" / learned["run"] / "metrics.csv", learned)
    assert epochs == [1, 2] and betas[-1] == learned["own_beta"]
    optimal = next(row for row in rows if row["line"] == "BS-VAE" and row["beta"] == 10)
    sigmas = folder / "whole" / "runs" / optimal["run"] / "metrics.csv"
    in_training = [float(each["train/sigma"]) for each in csv.DictReader(sigmas.read_text().splitlines())]
    epochs, betas = course_of(sigmas, optimal)
    assert (epochs, betas) == ([1, 2], [10 * sigma**2 for sigma in in_training])
    assert any(beta == pytest.approx(optimal["own_beta"]) for beta in betas)  # that of the epoch which was kept


def test_killed_half_way_it_goes_on_and_ends_with_the_same_bytes(folder, monkeypatch):
    """A kill in the last run, after its first epoch was saved: eight results are there, and a checkpoint."""
    out = folder / "killed"
    save = checkpoint.RunCheckpoint._save

    def killed(self, trainer, name):
        save(self, trainer, name)
        if self.config.objective == "l-vae":
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.RunCheckpoint, "_save", killed)
    assert main([*line(folder), "--out", str(out)]) == 130
    monkeypatch.undo()
    runs = list((out / "runs").iterdir())
    assert sum((run / "result.json").exists() for run in runs) == len(runs) - 1 == 8
    assert not (out / "results.csv").exists()
    assert main([*line(folder), "--out", str(out)]) == 0
    for run in runs:
        weights = folder / "whole" / "runs" / run.name / "model.safetensors"
        assert (run / "model.safetensors").read_bytes() == weights.read_bytes()
    assert (out / "results.csv").read_bytes() == (folder / "whole" / "results.csv").read_bytes()


def row(line, beta, seed=0, **columns):
    return {"line": line, "run": f"{line}-{seed}", "seed": seed, "beta": beta, **columns}


def curve(seed=0):
    """A curve on which MSE = 0.02 + beta / 3, E = 50 MSE and R = 4 / beta^2: own betas are known."""
    betas = np.geomspace(0.001, 10, 33)
    return [
        row(
            MULTIRATE, beta, seed, own_beta=beta, mse_train=0.02 + beta / 3, error_train=50 * (0.02 + beta / 3),
            rate_train=4 / beta**2, nll=abs(math.log(beta / 0.1)), nll_train=abs(math.log(beta / 0.05)),
        )
        for beta in betas
    ]


def test_fixed_points_are_solved_for_on_the_rows():
    found = fixed_points(curve() + curve(1))
    assert found["sigma-VAE"] == pytest.approx([0.03, 0.03], rel=0.01)  # 0.02 + b / 3 = b
    assert found[L_VAE] == []  # sqrt(50 (0.02 + b / 3) / 4) = 1 would be own = beta: it crosses upwards, and leaves
    error = [{**each, "error_train": 9.0, "rate_train": 1.0} for each in curve()]
    assert fixed_points(error)[L_VAE] == pytest.approx([3.0])
    assert solved(curve(), lambda row: 100.0) is None and solved(curve(), lambda row: 1e-9) is None
    assert solved(curve(), lambda row: 0.5) == pytest.approx(0.5)


def test_tables_have_means_over_seeds_and_say_which_fixed_beta_is_best():
    common = dict(
        nll_best=1.0, rate=2.0, mse=0.1, mi=1.5, marginal_kl=0.5, variance_ratio=1.0, coverage_50=0.5, coverage_95=0.95
    )
    rows = [{**each, **common} for each in curve()]
    for beta, nll in ((0.001, 50.0), (0.1, -300.0), (10.0, 90.0)):
        rows.append(row(BETA_VAE, beta, own_beta=beta, nll=nll, nll_train=-beta, **common))
    for seed, nll in ((0, -310.0), (1, -320.0)):
        own = 0.031 + 0.002 * seed
        rows.append(row("sigma-VAE, optimal", 1.0, seed, own_beta=own, nll=nll, nll_train=5.0, **common))
    text = learned_betas(rows)
    assert "On the test split, of the beta-VAEs beta = 0.1 has the lowest bound, -300.0 nats; along the " in text
    assert "along the multi-rate curve it is beta = 0.1, " in text
    assert "On training examples, of the beta-VAEs beta = 10 has the lowest bound, -10.0 nats" in text
    assert "| sigma-VAE, optimal | 0.0320 (0.0014) | 0.0301 | 5.0 | +15.0 | -315.0 | -15.0 |" in text
    assert "L-VAE" not in text
    assert "| sigma-VAE, optimal | 1 | 0.0320 (0.0014) | 5.0 (0.0) | -315.0 (7.1) | 1.0 (0.0) |" in landings(rows)
    assert landings(rows).count("| multi-rate |") == 3, "at the betas of the beta-VAEs alone"
    withmetric = [{**each, "metric": 3.0} for each in rows]
    assert "| metric |" in landings(withmetric).splitlines()[2]

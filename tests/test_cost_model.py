"""The cost model: its files, whose fit counts, and the fit itself on timings that are made up."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from bench import cost_fit, fit_cost_model, records
from bench.cost_fit import Point, fit, fit_all, judged, non_negative
from mrvae_kernels import cost_model, measurements, ops
from mrvae_kernels.cost_model import BYTES_MOVED, CostModel, Extra, fitted

MODEL = CostModel(Extra(1_000_000, 10, 2), Extra(2_000_000, 1, 30), "AMD, 2 threads")
KEY = ("linear", torch.float32)


@pytest.fixture(autouse=True)
def folders(monkeypatch, tmp_path):
    """Folders for the package's and the user's fits, both empty."""
    monkeypatch.setattr(measurements, "SHIPPED", tmp_path / "package")
    monkeypatch.setenv("MRVAE_CACHE", str(tmp_path / "user"))
    monkeypatch.setattr(measurements, "generation", measurements.generation)
    monkeypatch.setattr(cost_model, "_fitted", {})
    yield tmp_path


def test_the_model_is_a_sum_and_a_tie_folds():
    assert MODEL.fold.at(100, 1000) == 1_000_000 + 10 * 100 + 2 * 1000
    assert MODEL.cheaper(0, 0) == "fold" and MODEL.cheaper(10**6, 10) == "epilogue"
    assert BYTES_MOVED.cheaper(4, 5) == "fold" and BYTES_MOVED.cheaper(5, 5) == "epilogue"
    assert MODEL.told(10**6, 0) == "fold adds 11.0 us a step, epilogue 3.0 us, by the cost model fitted on " + (
        "AMD, 2 threads"
    )
    assert BYTES_MOVED.told(10, 1000) == "fold moves 50 elements, epilogue 4,000"


def test_the_users_fit_wins_over_the_packages_and_other_numbers_stay(folders):
    assert fitted(*KEY) is BYTES_MOVED
    before = measurements.generation
    shipped = {KEY: MODEL, ("linear", torch.bfloat16): MODEL, ("convolution", torch.float32): MODEL}
    cost_model.write(measurements.SHIPPED / cost_model.FILE, shipped)
    assert fitted(*KEY) == MODEL and measurements.generation == before + 1, "plans are made anew"
    own = MODEL._replace(fold=Extra(0, 0, 0), fitted_on="mine")
    cost_model.write(cost_model.user_file(), {KEY: own})
    assert cost_model.user_file() == folders / "user" / "cost_model.json"
    assert fitted(*KEY) == own and fitted("linear", torch.bfloat16) == MODEL
    assert fitted("linear", torch.float16) is fitted("convolution", torch.bfloat16) is BYTES_MOVED
    wide = fitted("convolution", torch.float64)
    assert wide.fold == Extra(1_000_000, 20, 4) and wide.epilogue == Extra(2_000_000, 2, 60), "twice the bytes"


def test_a_fit_of_another_torch_counts_only_in_the_package(folders):
    for path in (measurements.SHIPPED / cost_model.FILE, cost_model.user_file()):
        cost_model.write(path, {KEY: MODEL})
        content = json.loads(path.read_text())
        content["torch"] = "1.13.1"
        path.write_text(json.dumps(content))
    assert cost_model.read(cost_model.user_file()) == {}
    assert cost_model.read(measurements.SHIPPED / cost_model.FILE, any_version=True) == {KEY: MODEL}
    cost_model.load()
    assert fitted(*KEY) == MODEL


@pytest.mark.parametrize("content", [
    "{", "[]", "{}", '{"picoseconds": 3}', '{"picoseconds": {}, "fitted_on": "x"}',
    *(
        json.dumps({"fitted_on": "x", "torch": str(torch.__version__), "picoseconds": {"linear float32": entry}})
        for entry in (
            {"fold": [1, 2, 3]}, {"fold": [1, 2, 3], "epilogue": [1, 2]}, {"fold": [1, 2, 3], "epilogue": [1, 2, -3]},
            {"fold": [1, 2, 3], "epilogue": [1, 2, 3.5]}, {"fold": [1, 2, 3], "epilogue": [1, 2, True]},
            {"fold": [1, 2, 3], "epilogue": [1, 2, 10**18]}, {"fold": [1, 2, 3], "epilogue": None}, [],
        )
    ),
])
def test_a_file_that_holds_no_model_is_ignored_with_a_warning(content):
    path = cost_model.user_file()
    path.parent.mkdir()
    path.write_text(content)
    with pytest.warns(UserWarning, match="cost_model.json holds no cost model and is ignored; delete it, or fit anew"):
        cost_model.load()
    assert fitted(*KEY) is BYTES_MOVED


def test_the_package_brings_a_fit(monkeypatch):
    monkeypatch.undo()
    found = cost_model.read(measurements.SHIPPED / cost_model.FILE, any_version=True)
    assert set(found) == {(kind, dtype) for kind in cost_model.KINDS for dtype in cost_model.NUMBERS.values()}
    for model in found.values():
        assert model.cheaper(10**7, 1000) == "epilogue" and model.cheaper(1000, 10**7) == "fold"


# ---- the fit ---------------------------------------------------------------------------------------------------------


def point(layers, weights, outputs, fold, epilogue, plain=1e-3, jitter=0.0, kind="linear"):
    """A network whose rounds drift alike, with these extra seconds; jitter: of each round, by turns up and down."""
    drift = [1e-5 * i for i in range(5)]
    seconds = {"plain": [plain + d for d in drift]}
    for name, extra in (("fold", fold), ("epilogue", epilogue)):
        seconds[name] = [plain + d + extra + jitter * (i - 2) for i, d in enumerate(drift)]
    return Point("made up", kind, "float32", 16, layers, weights, outputs, seconds)


TRUE_FOLD, TRUE_EPILOGUE = (4e-5, 3e-6, 6e-10, 0.0), (4e-5, 1e-6, 0.0, 9e-10)


def exact(layers, weights, outputs, **options):
    fold, epilogue = (
        step + layers * (layer + weight * weights + output * outputs)
        for step, layer, weight, output in (TRUE_FOLD, TRUE_EPILOGUE)
    )
    return point(layers, weights, outputs, fold, epilogue, **options)


SIZES = [(layers, w, y) for layers in (1, 4) for w in (100, 10**5, 10**6) for y in (500, 10**5, 10**6)]


def test_the_fit_finds_the_coefficients_that_made_the_times():
    points = [exact(*size) for size in SIZES]
    assert tuple(fit(points, "fold")) == pytest.approx(TRUE_FOLD, rel=1e-6, abs=1e-14)
    assert tuple(fit(points, "epilogue")) == pytest.approx(TRUE_EPILOGUE, rel=1e-6, abs=1e-14)
    assert fit(points, "fold").extra() == Extra(3_000_000, 600, 0)
    assert fit(points, "fold").at(points[3]) == pytest.approx(points[3].extra("fold"))


def test_no_coefficient_is_negative():
    a, b = np.array([[1.0, 0.0], [1.0, 1.0], [1.0, 2.0]]), np.array([2.0, 1.0, 0.0])
    assert non_negative(a, b) == pytest.approx([1.0, 0.0]), "the slope of -1 is none"
    assert non_negative(a, -b) == pytest.approx([0.0, 0.0])
    random = np.random.default_rng(0)
    for _ in range(20):
        a, b = random.normal(size=(9, 4)), random.normal(size=9)
        x = non_negative(a, b)
        slope = a.T @ (a @ x - b)  # the optimum: no way down where x may still move
        assert (x >= 0).all() and slope[x > 0] == pytest.approx(0, abs=1e-9) and (slope[x == 0] >= -1e-9).all()


def test_right_picks_and_regret():
    points = [point(1, 10, 1000, 1e-4, 3e-4), point(1, 1000, 10, 4e-4, 1e-4)]
    assert judged(points, BYTES_MOVED) == pytest.approx(
        {"right": 1.0, "regret model": 0.0, "regret fold": 0.3 / 2 / 1.02, "regret epilogue": 0.2 / 2 / 1.02}
    )
    always_folds = judged(points, CostModel(Extra(0, 0, 0), Extra(1, 0, 0), ""))
    assert always_folds["right"] == 0.5 and always_folds["regret model"] == always_folds["regret fold"] > 0


def test_noisy_networks_are_left_out_and_too_few_are_an_error():
    points = [exact(*size) for size in SIZES] + [point(1, 10, 10, 1.0, 1.0, jitter=1e-2)]
    assert points[-1].noise > cost_fit.NOISE > points[0].noise
    models, (entry,) = fit_all(points, "here")
    assert models == {KEY: CostModel(Extra(3_000_000, 600, 0), Extra(1_000_000, 0, 900), "here")}
    assert (entry["networks"], entry["left_out"]) == (len(SIZES), 1) and entry["picks"]["right"] == 1.0
    assert max(entry["error"].values()) < 1e-6 and entry["picks by bytes moved"]["regret model"] > 0
    table = cost_fit.table([entry])
    assert "| linear | float32 | fold | 40.0 | 3.0 | 600 | 0 | 0.000 |" in table
    assert f"| linear | float32 | {len(SIZES)} | 1 | 1.00 | 0.0000 |" in table
    noisy = [exact(*size, jitter=1e-2) for size in SIZES]
    with pytest.raises(ValueError, match="linear float32: 0 of 18 networks .* expected 8: measure on an idle machine"):
        fit_all(noisy, "here")


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch):
    """Made-up times instead of measured ones; a core."""
    monkeypatch.setattr(ops, "EXTENSION", True)
    sizes = iter([*SIZES, *SIZES])
    jobs = [(None, 16, 1)] * len(SIZES)
    monkeypatch.setattr(fit_cost_model, "networks", lambda: jobs)
    monkeypatch.setattr(fit_cost_model, "keep_memory", lambda: None)
    monkeypatch.setattr(fit_cost_model, "measure", lambda *_: exact(*next(sizes)))


def test_the_command_writes_the_timings_and_installs_the_fit(quick, tmp_path, capsys):
    out = tmp_path / "cost.json"
    assert fit_cost_model.main(["--out", str(out), "--numbers", "float32", "--install", "user"]) == 0
    results = records.read(out, "cost-model").results
    assert len(results) == len(SIZES) + 1 and results[0]["faster"] == "epilogue"
    assert results[-1]["fit"]["fold"]["weight"] == pytest.approx(6e-10)
    assert fitted(*KEY).fold == Extra(3_000_000, 600, 0) and cost_model.user_file().exists()
    assert not (measurements.SHIPPED / cost_model.FILE).exists()
    assert "installed: " in capsys.readouterr().out
    assert fit_cost_model.main(["--out", str(out), "--numbers", "float32", "--install", "package"]) == 0
    assert (measurements.SHIPPED / cost_model.FILE).exists()


def test_what_the_command_refuses(quick, tmp_path, monkeypatch, capsys):
    out = ["--out", str(tmp_path / "cost.json"), "--numbers", "float32"]
    for arguments, said in (
        (["--seconds", "0"], "--seconds is 0.0; expected a positive number"),
        (["--seconds", "nan"], "--seconds is nan; expected a positive number"),
        (["--rounds", "1"], "--rounds is 1; expected 2 or more"),
    ):
        with pytest.raises(SystemExit):
            fit_cost_model.main([*out, *arguments])
        assert said in capsys.readouterr().err
    (tmp_path / "user").write_text("a file where the folder would be")
    assert fit_cost_model.main([*out, "--install", "user"]) == 2
    assert "cannot be written" in capsys.readouterr().err
    monkeypatch.setattr(fit_cost_model, "measure", lambda *_: exact(*SIZES[0], jitter=1e-2))
    assert fit_cost_model.main(out) == 1
    assert "measure on an idle machine" in capsys.readouterr().err
    monkeypatch.setattr(ops, "EXTENSION", False)
    assert fit_cost_model.main(out) == 2
    assert "there is nothing to fit" in capsys.readouterr().err


def test_when_the_time_is_up_the_rest_is_left_out(quick, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fit_cost_model, "LATE", -1)
    assert fit_cost_model.main(["--out", str(tmp_path / "cost.json"), "--numbers", "float32"]) == 1
    said = capsys.readouterr()
    assert f"the time is up: {len(SIZES)} networks are left out" in said.out and "nothing was measured" in said.err


def test_the_grid_has_small_and_large_of_both():
    found = fit_cost_model.networks()
    for kinds in ((torch.nn.Linear,), (torch.nn.Conv2d, torch.nn.ConvTranspose2d)):
        own = [(case, batch, layers) for case, batch, layers in found if case.kind in kinds]
        sizes = [(case.layer().get_parameter("weight").numel(), case.outputs(batch)) for case, batch, _ in own]
        assert len(own) >= 2 * cost_fit.FEWEST and {1, 4} == {layers for *_, layers in own}
        assert any(w > 40 * y for w, y in sizes) and any(y > 5 * w for w, y in sizes)
        assert min(w + y for w, y in sizes) * 20 < max(w + y for w, y in sizes)


@pytest.mark.skipif(not ops.EXTENSION, reason=str(ops.EXTENSION_ERROR))
@pytest.mark.parametrize("numbers", cost_model.NUMBERS)
def test_a_network_is_measured_as_it_is_trained(numbers):
    case = fit_cost_model.Case("grid", torch.nn.Linear, (6, 5), {}, (6,), "none")
    found = fit_cost_model.steps(case, 3, 2, numbers)
    gradients = {name: step() for name, step in found.items()}
    inputs_and_weights = [len(gradients[name]) for name in ("plain", "fold", "epilogue")]
    assert inputs_and_weights == [2 + 4, 2 + 4 + 2, 2 + 4 + 2], "the gates' flat weight and bias on top"
    tolerance = 1e-5 if numbers == "float32" else 5e-2
    torch.testing.assert_close(gradients["fold"], gradients["epilogue"], rtol=tolerance, atol=tolerance)
    measured = fit_cost_model.measure(case, 3, 2, numbers, 0.01, 2)
    assert (measured.kind, measured.weights, measured.outputs) == ("linear", 30, 15)
    assert set(measured.seconds) == {"plain", "fold", "epilogue"} and len(measured.seconds["fold"]) == 2

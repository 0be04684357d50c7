"""Choosing beta: on a model whose curve is known in closed form, and on a trained run through the command."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch
from mrvae_models import selection
from mrvae_models.cli import main
from mrvae_models.curve import evaluate
from mrvae_models.likelihoods import Gaussian
from mrvae_models.networks import build
from mrvae_models.run import load_model
from mrvae_models.selection import metric_called, select_beta
from mrvae_models.vae import VAE
from torch import nn

import mrvae_kernels as mk

RANGE = (0.01, 10.0)


class Known(nn.Module):
    """An encoder with mean x and log variance 0, of which the mean is gated by g = sigmoid(slope * eta)."""

    def __init__(self, size):
        super().__init__()
        self.mean = nn.Linear(size, size, bias=False)
        self.mean.weight.data.copy_(torch.eye(size))

    def forward(self, x):
        mean = self.mean(x)
        return mean, torch.zeros_like(mean)


def known(slope=-1.0, size=4):
    """q(z|x) = N(g x, I) and p(x|z) = N(z, I): R = g^2 |x|^2 / 2."""
    decoder = nn.Linear(size, size)
    decoder.weight.data.copy_(torch.eye(size))
    decoder.bias.data.zero_()
    vae = VAE(Known(size), decoder, Gaussian(), size, (size,))
    model = mk.multirate(vae, gates={"encoder": "sigmoid"}, beta_range=RANGE)
    assert model.gated.keys() == {"encoder.mean"}
    model.gate_weight.data.fill_(slope)
    model.gate_bias.data.zero_()
    return model


SCALES = torch.tensor([0.3, 1.0, 2.0, 3.0])
BOUNDS = mk.BetaRange(*RANGE)


@pytest.fixture(scope="module")
def data():
    x = torch.randn(300, 4, generator=torch.Generator().manual_seed(0))
    return SimpleNamespace(examples=(x - x.mean(0)) / x.std(0, correction=0) * SCALES)


def gate(beta):
    return 1 / (1 + math.exp((math.log(beta) - BOUNDS.mean) / BOUNDS.std))


def beta_with_gate(g):
    return math.exp(BOUNDS.mean - BOUNDS.std * math.log(g / (1 - g)))


@pytest.mark.parametrize("target", [0.2, 2.0, 4.0])
def test_a_rate_is_met_where_the_formula_says_and_the_interval_is_the_rates_error_over_the_slope(data, target):
    half = data.examples.double().square().sum(1) / 2
    g = math.sqrt(target / half.mean().item())
    found = select_beta(known(), data, "rate", target)
    assert found.beta == pytest.approx(beta_with_gate(g), rel=1e-3)
    assert found.value == pytest.approx(target, rel=1e-3) == found.point.rate
    error = (g**2 * half).std().item() / math.sqrt(300)
    assert found.standard_error == pytest.approx(error, rel=0.15)
    slope = 2 * target * (1 - g) / BOUNDS.std  # -dR / d log beta
    low, high = found.interval
    assert math.log(high / low) == pytest.approx(2 * 1.96 * error / slope, rel=0.2)
    assert low < found.beta < high and found.notes == ()
    assert found.reach == pytest.approx((gate(10) ** 2 * half.mean().item(), gate(0.01) ** 2 * half.mean().item()))


def test_a_distortion_is_met_and_rises(data):
    model = known()
    found = select_beta(model, data, "distortion", 8.0, samples=3, seed=5)
    (point,) = evaluate(model, data, [found.beta], samples=3, seed=5).points
    assert point == found.point and point.distortion == pytest.approx(8.0, rel=1e-3)
    assert found.interval[0] < found.beta < found.interval[1]


def test_the_best_elbo_is_that_of_a_fine_grid(data):
    model = known()
    found = select_beta(model, data, "elbo")
    fine = evaluate(model, data, [0.01 * 1000 ** (i / 300) for i in range(301)])
    best = max(fine.points, key=lambda point: point.elbo)
    assert found.best == "max" and found.value >= best.elbo - 1e-6
    assert found.beta == pytest.approx(best.beta, rel=0.03)
    assert found.interval[0] < found.beta < found.interval[1]


@pytest.mark.parametrize(("count", "low", "high"), [(3, 0.1 / 1.0, 0.1 / 0.3), (2, 0.1 / 2.0, 0.1 / 1.0)])
def test_active_units_are_an_interval_of_betas(data, count, low, high):
    # latent k is active while g > 0.1 / scale_k; g is 0.15 at the end of the range, so the gate is made steeper
    steep = 3.0
    model = known(-steep)
    found = select_beta(model, data, "active_units", count)
    edges = [math.exp(BOUNDS.mean - BOUNDS.std * math.log(g / (1 - g)) / steep) for g in (high, low)]
    assert found.interval == pytest.approx(edges, rel=2e-3)
    assert found.beta == pytest.approx(math.sqrt(edges[0] * edges[1]), rel=2e-3)
    assert found.point.active_units == found.value == count and found.standard_error is None
    coarse = select_beta(model, data, "active_units", count, grid=3)  # steps over the interval
    assert coarse.interval == pytest.approx(found.interval, rel=2e-3)


def test_what_is_out_of_reach_is_said_with_what_is_not(data):
    with pytest.raises(ValueError, match=r"rate = 99 is out of reach: .* lies between 0\.1592 and 5\.086 on these"):
        select_beta(known(), data, "rate", 99.0)
    with pytest.raises(ValueError, match="active_units = 5 is out of reach"):
        select_beta(known(), data, "active_units", 5)
    with pytest.raises(ValueError, match=r"no beta .* has active_units = 2\.5: it goes from 3 to 2"):
        select_beta(known(-3.0), data, "active_units", 2.5)


def test_a_target_near_the_end_has_an_interval_that_ends_there(data):
    rate = 0.5 * gate(10) ** 2 * data.examples.square().sum(1).mean().item()
    found = select_beta(known(), data, "rate", rate * 1.0001)
    assert found.interval[1] == pytest.approx(10) and any("the interval ends there" in note for note in found.notes)


def test_a_rate_that_rises_is_told_of(data):
    found = select_beta(known(+1.0), data, "rate", 2.0)
    assert any("rate should only fall with beta" in note and "beyond noise" in note for note in found.notes)

    wobble = response_of_noise()
    assert "within noise" in selection.monotonicity(wobble, [0.1, 1.0, 10.0], 0)[0]


def response_of_noise():
    """Three betas whose rates differ by far less than the examples do."""
    generator = torch.Generator().manual_seed(0)
    columns = {beta: torch.randn(50, generator=generator) + mean for beta, mean in ((0.1, 0), (1.0, 0.01), (10.0, -9))}
    columns[1.0] += columns[0.1].mean() - columns[1.0].mean() + 0.01

    def evaluate(beta, rows):
        return (columns[beta] if rows is None else columns[beta][rows]).mean().item()

    return selection.Response("rate", evaluate, 50)


def test_of_two_crossings_the_one_with_the_higher_elbo_is_taken(data):
    model = known()

    def hill(model, dataset, beta):
        return -math.log(beta / 0.3) ** 2

    found = select_beta(model, data, hill, -4.0)
    betas = [0.3 * math.exp(-2), 0.3 * math.exp(2)]
    points = evaluate(model, data, betas).points
    assert found.beta == pytest.approx(max(points, key=lambda point: point.elbo).beta, rel=1e-3)
    assert any("is met at beta = " in note for note in found.notes)
    assert found.interval is None and any("--resamples" in note for note in found.notes)
    best = select_beta(model, data, hill, best="max")
    assert best.beta == pytest.approx(0.3, rel=1e-3) and best.quantity == "hill"
    assert select_beta(model, data, hill, best="min").beta == 10 or "end of the range" in best.notes[0]


def test_a_metric_is_resampled_with_its_labels(data):
    labelled = SimpleNamespace(examples=data.examples, labels=torch.arange(300))
    seen = []

    def metric(model, dataset, beta, seed, samples):
        assert (seed, samples) == (3, 2)
        seen.append(dataset.labels)
        assert torch.equal(dataset.examples, data.examples[dataset.labels])
        return torch.tensor(evaluate(model, dataset, [beta]).points[0].rate)

    found = select_beta(known(), labelled, metric, 2.0, grid=5, resamples=20, seed=3, samples=2)
    reference = select_beta(known(), data, "rate", 2.0)
    assert found.beta == pytest.approx(reference.beta, rel=1e-3)
    assert found.interval[0] < found.beta < found.interval[1] and len(labelled.labels.unique()) == 300
    halves = [rows for rows in seen if len(rows) == 150]
    assert halves and all(len(rows.unique()) == len(rows) in (150, 300) for rows in seen), "none is there twice"
    width, expected = (math.log(high / low) for low, high in (found.interval, reference.interval))
    assert width == pytest.approx(expected, rel=0.5), "of a mean, what resampling with replacement has"


def test_the_interval_of_a_quantity_that_is_no_mean_is_around_its_beta(data):
    """Mutual information of codes that tell the examples apart is the log of their number, but for what beta takes."""

    def saturated(model, dataset, beta):
        different = len(dataset.examples.unique(dim=0))
        return math.log(different) - 0.1 * math.log(beta) + 0.1 * dataset.examples.mean().item()

    found = select_beta(known(), data, saturated, math.log(300), grid=5, resamples=40)
    assert found.interval[0] < found.beta < found.interval[1] and found.standard_error < 0.1


def test_a_count_that_comes_and_goes_is_the_widest_interval(data):
    def steps(model, dataset, beta):
        return 7 if 0.02 < beta < 0.05 or 0.2 < beta < 2.0 else 5

    found = select_beta(known(), data, steps, 7)
    assert found.interval == pytest.approx((0.2, 2.0), rel=2e-3) and "apart from each other" in found.notes[0]
    assert select_beta(known(), data, steps, best="max").interval == found.interval


def test_bad_wishes_are_named(data, tmp_path):
    model = known()
    for wish, message in (
        (dict(quantity="rate"), "for rate target is None and best None"),
        (dict(quantity="rate", target=1.0, best="min"), "expected one of the two"),
        (dict(quantity="rate", best="most"), "expected 'min' or 'max'"),
        (dict(quantity="rate", target=math.nan), "target of rate is nan"),
        (dict(quantity="abacus", best="min"), "metric 'abacus' is not known"),
        (dict(quantity="rate", target=1.0, grid=2), "grid 2"),
        (dict(quantity="rate", target=1.0, samples=0), "samples 0"),
        (dict(quantity=lambda *_: math.nan, best="min"), "at beta = 0.01 is nan"),
    ):
        with pytest.raises(ValueError, match=message):
            select_beta(model, data, **wish)
    with pytest.raises(ValueError, match="no gates"):
        select_beta(build("mlp", (4,), 2), data, "rate", 1.0)
    (tmp_path / "mine.py").write_text("def other(): pass\n")
    with pytest.raises(ValueError, match="has no function 'metric'"):
        metric_called(f"{tmp_path / 'mine.py'}:metric")
    with pytest.raises(ValueError, match="is no file of Python"):
        metric_called(f"{tmp_path / 'none.py'}:metric")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short run of the default recipe on the digits."""
    directory = tmp_path_factory.mktemp("select") / "run"
    options = ["--epochs", "2", "--set", "hidden=24", "--latent", "4", "--log-to", "none", "--threads", "1", "--quiet"]
    assert main(["train", "--out", str(directory), *options]) == 0
    return directory


def test_the_command_chooses_writes_and_bakes(run, tmp_path, capsys):
    curve = evaluate(load_model(run)[0], SimpleNamespace(examples=torch.rand(20, 1, 28, 28)), [0.01, 10])
    assert curve.points[0].rate > curve.points[1].rate  # the run has learnt something
    assert main(["select", "--run", str(run), "--elbo", "--out", str(tmp_path)]) == 0
    capsys.readouterr()
    first = json.loads((tmp_path / "select.json").read_text())
    target = first["points"]["validation"]["rate"]
    assert main(["select", "--run", str(run), "--rate", str(target), "--out", str(tmp_path), "--bake"]) == 0
    said = capsys.readouterr().out
    document = json.loads((tmp_path / "select.json").read_text())
    assert document["beta"] == pytest.approx(first["beta"], rel=1e-2)
    assert document["points"]["validation"]["rate"] == pytest.approx(target, rel=1e-3)
    assert set(document["points"]) == {"validation", "test"} and document["quantity"] == "rate"
    assert document["interval"][0] < document["beta"] < document["interval"][1]
    assert f"beta = {document['beta']:.4g} (95 % interval from" in said and "\ntest" in said
    assert document["baked"] == str(tmp_path / f"baked-{document['beta']:g}") and f"baked: {document['baked']}" in said
    baked = load_model(document["baked"])[1]
    assert baked["model"]["beta"] == document["beta"]


def test_the_command_takes_a_function_of_a_file(run, tmp_path, capsys):
    file = tmp_path / "mine.py"
    file.write_text(
        "from mrvae_models.curve import evaluate\n\n"
        "def rate(model, dataset, beta):\n    return evaluate(model, dataset, [beta]).points[0].rate\n"
    )
    arguments = ["select", "--run", str(run), "--metric", f"{file}:rate", "--out", str(tmp_path), "--grid", "4"]
    assert main([*arguments, "--best", "min"]) == 0
    document = json.loads((tmp_path / "select.json").read_text())
    assert document["beta"] == 10 and "end of the range" in document["notes"][0]
    assert document["value"] == pytest.approx(document["points"]["validation"]["rate"])
    capsys.readouterr()
    assert main(arguments) == 2 and "needs one of --target VALUE and --best" in capsys.readouterr().err
    assert main([*arguments[:3], "--elbo", "--best", "min"]) == 2 and "belong to --metric" in capsys.readouterr().err
    assert main([*arguments[:3], "--rate", "1e6"]) == 1 and "out of reach" in capsys.readouterr().err


def test_rows_of_a_set_keep_their_factors_and_labels():
    whole = SimpleNamespace(examples=torch.rand(6, 2), labels=torch.arange(6), factors=torch.arange(12).view(6, 2))
    rows = torch.tensor([4, 4, 1])
    part = selection._rows_of(whole, rows)
    assert part.labels.tolist() == [4, 4, 1] and part.factors.tolist() == [[8, 9], [8, 9], [2, 3]]
    assert torch.equal(part.examples, whole.examples[rows]) and len(whole.factors) == 6

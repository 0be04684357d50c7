"""Runs on text: training, resuming, the curve with its sentences, baking; and the plateau schedule."""

from __future__ import annotations

import csv
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from markdown_it import MarkdownIt
from mrvae_models import TrainConfig, train
from mrvae_models.baking import DECODER, PROGRAM, bake_run
from mrvae_models.checkpoint import read_checkpoint
from mrvae_models.cli import main
from mrvae_models.curve import Curve, Point, at, evaluate
from mrvae_models.data import TextDataset, Vocabulary, load
from mrvae_models.data.vocabulary import END, START
from mrvae_models.lightning_module import PLATEAU
from mrvae_models.metrics import METRICS
from mrvae_models.metrics.information import information
from mrvae_models.metrics.posteriors import Posteriors, posteriors
from mrvae_models.report import points_table
from mrvae_models.run import LAST, load_model, load_split
from mrvae_models.sentences import Sentences, sentences, write_sentences
from mrvae_models.training import TrainingInterrupted

BETAS = (0.01, 0.3, 10.0)


def corpus(path: Path) -> Path:
    """Sentences of which the first word tells the rest."""
    path.mkdir()
    for split, count in (("train", 60), ("valid", 14), ("test", 14)):
        lines = [" ".join([f"w{i % 7}", *(f"v{i % 7}",) * (i % 4)]) for i in range(count)]
        (path / f"{split}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def options(data: Path, out: Path, **changes) -> TrainConfig:
    network = {"embedding": 8, "hidden": 8, "dropout": 0.2}
    given = {"data": str(data), "network": "lstm", "latent": 3, "network_options": network, "out": str(out)}
    return TrainConfig(**{**given, "epochs": 2, "batch_size": 16, "log_to": ("csv",), "threads": 1, **changes})


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    return train(options(corpus(folder / "data"), folder / "run"), progress=False).directory


def test_the_recipe_of_text_is_the_default_of_the_lstm():
    config = TrainConfig(network="lstm")
    assert (config.recipe, config.batch_size, config.clip, config.schedule) == ("text", 32, 5.0, "plateau")
    assert TrainConfig().batch_size == 128 and TrainConfig().clip is None and TrainConfig().validate_every == 5
    config.check()
    for wrong in ({"warmup": 0.1}, {"vocabulary_size": 4}, {"max_length": 1}, {"min_count": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} is"):
            TrainConfig(network="lstm", **wrong).check()


def test_markdown_shows_sentences_as_they_are(tmp_path):
    said = ["a &lt; &amp; b", "~~x~~ y", "- a", "+", "1. c", "12) d", "! [a](b)", "<unk> * _ `q` \\ # |", "1 - 2 ."]
    shown = Sentences([1.0], said, [said], [said], [said])
    write_sentences(tmp_path / "sentences.md", Curve(()), shown)
    tokens = MarkdownIt("commonmark").enable("strikethrough").parse((tmp_path / "sentences.md").read_text())
    lines = ["".join(part.content for part in token.children) for token in tokens if token.type == "inline"]
    for text in said:
        assert [line.removeprefix("1: ") for line in lines].count(text) == 4, text


def test_every_layer_that_the_recipe_names_is_gated(run):
    model, _ = load_model(run)
    assert set(model.gated) == {
        "encoder.lstm",
        "encoder.mean",
        "encoder.log_variance",
        "decoder.initial",
        "decoder.lstm",
    }


def test_a_run_keeps_its_vocabulary_and_evaluates_with_it(run, tmp_path):
    _, document = load_model(run)
    config = TrainConfig.from_dict(document["config"])
    own = Vocabulary.read(run / "vocabulary.txt")
    assert own == load(config.data).vocabulary and document["model"]["input_shape"] == [5, len(own)]
    reversed_order = Vocabulary(own.tokens[:3:-1])
    reversed_order.write(tmp_path / "vocabulary.txt")
    assert load_split(config, "test", tmp_path).vocabulary == reversed_order
    assert load_split(config, "test", run).vocabulary == own


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"network": "mlp", "network_options": {}}, "network is 'mlp' and .* holds text; .*--network lstm,"),
        ({"data": "digits"}, "network is 'lstm' and digits holds images; expected .*--network linear or mlp or cnn"),
    ],
)
def test_networks_of_images_are_kept_from_text_and_the_reverse(run, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        train(replace(options(run.parent / "data", tmp_path / "out"), **changes), progress=False)


def test_the_curve_has_the_perplexity_of_all_tokens(run):
    model, _ = load_model(run)
    data = load(run.parent / "data", "test")
    curve = evaluate(model, data, BETAS, batch_size=4)
    tokens = int(data.lengths.sum())
    for point in curve.points:
        nats = len(data) * (point.distortion + point.rate)
        assert point.perplexity == pytest.approx(math.exp(nats / tokens))
        assert point.nats_per_token == pytest.approx(nats / tokens)
    # padding counts nothing: the same sentences with more of it
    padded = TextDataset(torch.nn.functional.pad(data.examples, (0, 5)), data.vocabulary)
    assert evaluate(model, padded, BETAS, batch_size=4).points == curve.points


def test_the_curve_of_images_has_no_such_columns(tmp_path):
    train(TrainConfig(out=str(tmp_path / "digits"), epochs=1, latent=2, log_to=()), progress=False)
    model, _ = load_model(tmp_path / "digits")
    evaluate(model, load(split="validation"), [1.0]).write_csv(tmp_path / "curve.csv")
    with open(tmp_path / "curve.csv", newline="", encoding="utf-8") as file:
        assert "perplexity" not in next(csv.reader(file))


def test_mrvae_curve_writes_numbers_and_sentences(run, capsys):
    assert main(["curve", "--run", str(run), "--betas", *map(str, BETAS)]) == 0
    assert "perplexity" in capsys.readouterr().out
    curve = Curve.read_json(run / "curve.json")
    assert curve.column("beta") == list(BETAS) and all(curve.column("perplexity"))
    page = (run / "sentences.md").read_text(encoding="utf-8")
    model, _ = load_model(run)
    shown = sentences(model, load(run.parent / "data", "test"), BETAS, count=10)
    assert len(shown.originals) == len(shown.samples[0]) == 10 and len(shown.between) == len(BETAS)
    for line in [*shown.originals, *shown.reconstructions[0], *shown.samples[2], *shown.between[1]]:
        assert line.replace("<unk>", "\\<unk\\>") in page
    assert "| 0.3 |" in page
    assert main(["curve", "--run", str(run), "--no-images", "--out", str(run / "elsewhere")]) == 0
    assert not (run / "elsewhere" / "sentences.md").exists()


def test_information_is_of_sentences_too_and_what_is_of_images_says_so(run):
    model, _ = load_model(run)
    data = load(run.parent / "data", "test")
    with torch.no_grad(), at(model, 0.3):
        mean, log_variance = model.network.encode(data.examples)
    found = information(posteriors(model, data, 0.3, batch_size=5))
    expected = information(Posteriors(mean.double(), log_variance.double()))
    assert found.mutual_information == pytest.approx(expected.mutual_information, abs=1e-5)
    assert METRICS["tc"](model, data, 0.3) == pytest.approx(expected.total_correlation, abs=1e-5)
    with pytest.raises(ValueError, match="is of images, and the network SentenceVAE is one of text"):
        METRICS["iwae"](model, data, 0.3)


def test_a_perplexity_is_read_whatever_its_size(tmp_path):
    many = Point(1.0, 1, 0, 900, 0, -901, 0, 901, 0, 2, 0.0, 170.0, math.exp(170.0))
    few = replace(many, perplexity=50842.93)
    assert "6.762e+73" in points_table([many]) and points_table([few]).endswith(" 50842.9")
    write_sentences(tmp_path / "sentences.md", Curve((many, few)), Sentences([1.0], [], [[]], [[]], [[]]))
    page = (tmp_path / "sentences.md").read_text()
    assert "| 170.000 | 6.762e+73 |" in page and "| 50842.9 |" in page


def test_runs_of_other_vocabularies_are_not_compared(run, tmp_path, capsys):
    data = run.parent / "data"
    tokens = Vocabulary.read(run / "vocabulary.txt").tokens
    Vocabulary(tokens[:3:-1]).write(tmp_path / "v.txt")
    other = options(data, tmp_path / "other", vocabulary=str(tmp_path / "v.txt"), beta=1.0, epochs=1)
    train(other, progress=False)
    assert main(["curve", "--run", str(run), "--compare", str(tmp_path / "other")]) == 1
    assert "vocabulary is of 18 entries there" in capsys.readouterr().err


def test_no_vocabulary_but_the_run_s_own_is_taken(run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "copy")
    (tmp_path / "copy" / "vocabulary.txt").unlink()
    assert main(["curve", "--run", str(tmp_path / "copy"), "--betas", "1"]) == 1
    assert "vocabulary.txt does not exist" in capsys.readouterr().err
    with open(tmp_path / "copy" / "vocabulary.txt", "w", encoding="utf-8") as file:
        file.writelines(f"{token}\n" for token in (*Vocabulary.read(run / "vocabulary.txt").tokens, "more"))
    assert main(["curve", "--run", str(tmp_path / "copy"), "--betas", "1"]) == 1
    assert "has 19 entries and the network 18" in capsys.readouterr().err


def test_data_that_count_otherwise_since_are_measured_in_the_run_s_vocabulary(tmp_path, capsys):
    data = corpus(tmp_path / "data")
    run = train(options(data, tmp_path / "run"), progress=False).directory
    commands = (
        ["metrics", "--run", str(run), "--metrics", "distortion", "--betas", "1"],
        ["select", "--run", str(run), "--active-units", "0", "--grid", "3"],
    )
    capsys.readouterr()
    assert [main(command) for command in commands] == [0, 0]
    before = capsys.readouterr().out
    with open(data / "train.txt", "a", encoding="utf-8") as file:
        file.write("v6 v6 v6 v6 v6 v6 v6 v6\n" * 90)  # now the most frequent, and the first by number
    assert load(str(data)).vocabulary != Vocabulary.read(run / "vocabulary.txt")
    assert [main(command) for command in commands] == [0, 0]
    assert capsys.readouterr().out == before


def test_experiments_take_text(tmp_path, capsys):
    data = corpus(tmp_path / "data")
    words = ["--network", "lstm", "--data", str(data), "--baselines", "constant", "--out", str(tmp_path / "out")]
    assert main(["experiment", "retraining", "--small", *words]) == 0
    header = (tmp_path / "out" / "results.csv").read_text().splitlines()[0]
    assert header.endswith("nats_per_token,perplexity")


def test_a_baked_run_speaks_for_itself(run):
    baked = bake_run(run, 0.05).directory
    network, document = load_model(baked)
    assert document["model"]["beta"] == 0.05 and not hasattr(network, "gate_weight")
    assert (baked / "vocabulary.txt").read_bytes() == (run / "vocabulary.txt").read_bytes()
    x = load_split(TrainConfig.from_dict(document["config"]), "test", baked).examples
    log_p, mean, _ = torch.export.load(baked / PROGRAM).module()(x)
    torch.testing.assert_close(log_p, network.logits(x, mean).log_softmax(-1))
    step = torch.export.load(baked / DECODER).module()
    token, state, said = torch.full((1,), START), (torch.zeros(1, 8), torch.zeros(1, 8)), []
    forced = network.logits(network.reconstruct(x[:1]), mean[:1]).log_softmax(-1)
    for place in range(5):  # greedy, as generate() has it
        log_p, *state = step(token, mean[:1], *state)
        torch.testing.assert_close(log_p, forced[:, place])
        log_p[:, :2] = -math.inf
        token = log_p.argmax(1)
        said.append(token.item())
        if token == END:
            break
    assert [said] == network.reconstruct(x[:1]).tolist()
    assert main(["curve", "--run", str(baked), "--no-images"]) == 0


# Plateau, and resuming


def test_a_plateau_halves_the_learning_rates_and_keeps_their_ratio(tmp_path):
    data = corpus(tmp_path / "data")
    # so large a rate gets nowhere: most validations are without improvement
    config = options(data, tmp_path / "run", epochs=12, lr=3.0, final_lr=1.0, gate_lr_factor=0.1, clip=0.1)
    train(config, progress=False)
    with open(tmp_path / "run" / "metrics.csv", newline="", encoding="utf-8") as file:
        rows = [(float(row["lr"]), float(row["validation/objective"])) for row in csv.DictReader(file)]
    expected, best, bad = 3.0, math.inf, 0
    for lr, objective in rows:
        best, bad = (objective, 0) if objective < best else (best, bad + 1)
        if bad == 2:
            expected, bad = max(1.0, expected / 2), 0
        assert lr == pytest.approx(expected)
    assert expected < 3.0
    groups = read_checkpoint(tmp_path / "run" / LAST)["optimizer_states"][0]["param_groups"]
    assert groups[1]["lr"] == pytest.approx(0.1 * groups[0]["lr"])


def test_a_resumed_run_ends_with_the_same_bits(tmp_path):
    data = corpus(tmp_path / "data")
    config = options(data, tmp_path / "stopped", epochs=10, lr=3.0, gate_lr_factor=0.1, clip=0.1)
    whole = train(replace(config, out=str(tmp_path / "whole")), progress=False)
    for call in range(14):  # a step each, of 4 an epoch
        with pytest.raises(TrainingInterrupted):
            train(replace(config, max_time=1e-6), resume=call > 0, progress=False)
    resumed = train(config, resume=True, progress=False)
    first, second = whole.model.state_dict(), resumed.model.state_dict()
    assert all(first[name].equal(second[name]) for name in first)
    one, other = (read_checkpoint(tmp_path / name / LAST) for name in ("whole", "stopped"))
    assert one[PLATEAU] == other[PLATEAU]
    rates = [saved["optimizer_states"][0]["param_groups"][0]["lr"] for saved in (one, other)]
    assert rates[0] == rates[1] < 3.0  # it was halved on the way, so that the schedule's memory mattered

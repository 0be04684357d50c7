"""The command line: help that answers at once, exit codes, one clear sentence for each error, and a whole session."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import fields, replace

import numpy as np
import pytest
from mrvae_models import cli
from mrvae_models.arguments import parser
from mrvae_models.cli import config_of, main
from mrvae_models.commands import MODULES
from mrvae_models.config import TrainConfig

ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "OMP_NUM_THREADS": "1"}


def command(*arguments, **options):
    line = [sys.executable, "-m", "mrvae_models", *map(str, arguments)]
    return subprocess.run(line, env=ENVIRONMENT, capture_output=True, text=True, timeout=120, check=False, **options)


def config(*arguments):
    return config_of(parser().parse_args(["train", *map(str, arguments)]))


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    """A finished run on small images, made by the command."""
    folder = tmp_path_factory.mktemp("session")
    generator = np.random.default_rng(0)
    np.savez(
        folder / "images.npz",
        train_images=generator.integers(0, 256, (30, 6, 6), dtype=np.uint8),
        test_images=generator.integers(0, 256, (12, 6, 6), dtype=np.uint8),
    )
    small = ["--set", "hidden=12", "--latent", "3", "--epochs", "2", "--batch-size", "9", "--log-to", "none"]
    arguments = ["train", "--data", str(folder / "images.npz"), "--out", str(folder / "run"), *small]
    assert main(arguments) == 0
    return folder


@pytest.mark.parametrize(
    "arguments",
    [["--help"], *([name, "--help"] for name in ("train", "curve", "bake", "doctor", *MODULES))],
)
def test_help_answers_within_a_second_and_without_torch(arguments):
    begun = time.process_time_ns(), os.times()
    done = command(*arguments)
    spent = os.times().children_user + os.times().children_system - begun[1].children_user - begun[1].children_system
    assert done.returncode == 0
    assert spent < 1
    loads_torch = (
        f"import sys; from mrvae_models.cli import main\ntry: main({arguments!r})\n"
        "except SystemExit: pass\nsys.exit(int('torch' in sys.modules or 'matplotlib' in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", loads_torch], env=ENVIRONMENT, capture_output=True).returncode == 0
    assert "mrvae" in done.stdout


def test_help_of_train_tells_every_option_and_its_default(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", "--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for entry in fields(TrainConfig):
        flag = entry.metadata.get("flag", "--" + entry.name.replace("_", "-"))
        assert f"{flag} " in text or f"{flag}," in text
        assert " ".join(entry.metadata["help"].split()[:3]) in text
    for default in ("(default: 0.001)", "(default: 128)", "(default: 0.01 10)", "(default: mlp)", "encoder="):
        assert default in text
    assert "draws one (default: yes)" in text and "needs it (default: no)" in text
    assert "mrvae train --resume" in text


def test_options_change_what_they_name_and_nothing_else():
    assert config() == TrainConfig()
    assert config("--lr", "0.01", "--beta-range", "0.1", "5") == TrainConfig(lr=0.01, beta_range=(0.1, 5.0))
    given = config("--set", "hidden=600,300", "--set", "activation=silu", "--gates", "encoder.mean=softplus+shift")
    assert given.network_options == {"hidden": [600, 300], "activation": "silu"}
    assert given.gates == {**TrainConfig().gates, "encoder.mean": "softplus+shift"}
    assert config("--stratified", "--max-time", "1h30m", "--log-to", "csv").max_time == 5400
    assert config("--log-to", "none").log_to == ()
    assert config("--sample", "step").sample == "step" and config("--gate-degree", "1").gate_degree == 1
    with pytest.warns(UserWarning, match="one beta a step cannot be spread over the range: --stratified not used"):
        config("--sample", "step", "--stratified").check()
    assert config("--margin", "1", "2").sampled_range == (0.01, 20.0)


def test_config_file_with_options_on_top(tmp_path):
    path = tmp_path / "options.json"
    path.write_text(json.dumps({"epochs": 7, "lr": 0.5, "gates": {"decoder": "softplus"}}))
    assert config("--config", path, "--lr", "0.1") == TrainConfig(epochs=7, lr=0.1, gates={"decoder": "softplus"})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["trian"], "invalid choice: 'trian'"),
        (
            ["train", "--epoch", "3"],
            "mrvae train: error: unrecognized arguments: --epoch 3: did you mean --epochs?; see mrvae train --help",
        ),
        (["train", "3", "--epoch", "5"], "unrecognized arguments: 3 --epoch 5: did you mean --epochs?"),
        (["train", "--", "lr"], "unrecognized arguments: -- lr; see mrvae train --help"),
        (["--debug", "train"], "unrecognized arguments: --debug: --debug goes behind train; see"),
        (["bake", "--run", "RUN", "--beta", "1", "--zzz=1"], "unrecognized arguments: --zzz=1; see mrvae bake --help"),
        (["train", "--beta", "nan"], "beta is nan; expected a finite number, or none"),
        (["train", "--epochs", "many"], "invalid int value: 'many'"),
        (["train", "--max-time", "soon"], "'soon' is no duration; expected seconds alone"),
        (["train", "--set", "hidden"], "'hidden' is no setting; expected NAME=VALUE"),
        (["train", "--gates", "softplus"], "'softplus' is no gate; expected MODULE=KIND"),
        (["train", "--sample", "batch"], "invalid choice: 'batch'"),
        (["train", "--beta", "-1"], "beta is -1.0; expected a positive KL weight"),
        (["train", "--beta-range", "2", "1"], "beta_range is (2.0, 1.0); expected 0 < LOW < HIGH"),
        (["train", "--batch-size", "9", "--devices", "2"], "batch_size is 9; expected a multiple of 2"),
        (["train", "--resume", "RUN", "--force"], "leave out --config and --force"),
        (["curve"], "the following arguments are required: --run"),
        (["curve", "--run", "RUN", "--samples", "0"], "0 is no positive integer"),
        (["bake", "--run", "RUN", "--beta", "0"], "--beta is 0; expected a positive, finite KL weight"),
        (["bake", "--run", "RUN", "--beta", "nan"], "--beta is nan"),
        (["doctor", "--layer", "Linear(3, 4)"], "--layer and --input go together"),
    ],
)
def test_wrong_usage_is_code_2_and_says_why(capsys, arguments, message):
    try:
        code = main(arguments)
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    lines = capsys.readouterr().err.splitlines()
    assert message in lines[-1]
    assert len(lines) == 1 or arguments[0] == "doctor", "without the list of all options, but for mrvae_kernels' own"


def test_unknown_key_of_a_config_file_is_wrong_usage(capsys, tmp_path):
    path = tmp_path / "options.json"
    path.write_text('{"epohcs": 3}')
    assert main(["train", "--config", str(path)]) == 2
    assert "unknown option 'epohcs'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--data", "{folder}/none.npz", "--out", "{folder}/new"], "none.npz"),
        (["train", "--data", "{folder}/images.npz", "--out", "{folder}/run"], "holds a run already"),
        (["train", "--config", "{folder}/none.json"], "none.json does not exist"),
        (["train", "--resume", "{folder}/none"], "holds no config.json; expected the directory of a run"),
        (["train", "--resume", "{folder}/images.npz"], "images.npz holds no config.json; expected the directory"),
        *(
            ([*words, "--run", "{folder}/images.npz"], "images.npz holds no config.json; expected the directory")
            for words in (["curve"], ["select", "--elbo"], ["metrics", "--metrics", "rate"])
        ),
        (["curve", "--run", "{folder}/none"], "holds no config.json; expected the directory of a run"),
        (["curve", "--run", "{folder}/run", "--betas", "0"], "beta is 0.0; expected a positive"),
        *(
            ([*words, "--run", "{folder}/run", "--out", "{folder}/images.npz"], "images.npz is a file; give --out a")
            for words in (["curve"], ["select", "--elbo"], ["metrics", "--metrics", "rate"])
        ),
        (["curve", "--run", "{folder}/run", "--device", "abacus"], "device 'abacus' cannot be used"),
        (["bake", "--run", "{folder}", "--beta", "1"], "holds no config.json"),
    ],
)
def test_errors_are_code_1_and_one_sentence(capsys, session, arguments, message):
    assert main([argument.format(folder=session) for argument in arguments]) == 1
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith(f"mrvae {arguments[0]}: ")
    assert message in line
    assert captured.out == ""


def test_debug_shows_the_traceback(session):
    with pytest.raises(FileNotFoundError):
        main(["curve", "--run", str(session / "none"), "--debug"])


def test_unexpected_errors_name_their_type(capsys, monkeypatch, session):
    monkeypatch.setattr(cli, "_doctor", lambda options: {}["key"])
    assert main(["doctor"]) == 1
    assert capsys.readouterr().err == "mrvae doctor: KeyError: 'key' (run again with --debug for the traceback)\n"


def test_resume_refuses_what_would_change_a_step(capsys, session):
    assert main(["train", "--resume", str(session / "run"), "--lr", "0.5"]) == 2
    assert "lr is 0.001 in" in capsys.readouterr().err
    resumed = config("--resume", session / "run", "--epochs", "5")
    assert resumed == replace(TrainConfig.load(session / "run" / "config.json"), epochs=5)


def test_resume_refuses_fewer_epochs_than_are_done_and_leaves_the_run_as_it_is(capsys, session):
    directory = session / "run"
    before = {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}
    done = TrainConfig.load(directory / "config.json").epochs
    assert main(["train", "--resume", str(directory), "--epochs", str(done - 1)]) == 1
    expected = f"epochs is {done - 1}, and the run in {directory} has done {done}; leave it as it was"
    assert expected in capsys.readouterr().err
    assert before == {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


def test_a_run_that_was_moved_resumes_where_it_is(session, tmp_path):
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in ("config.json", "last.ckpt"):
        (moved / name).write_bytes((session / "run" / name).read_bytes())
    assert main(["train", "--resume", str(moved), "--quiet"]) == 0
    assert (moved / "model.safetensors").read_bytes() == (session / "run" / "model.safetensors").read_bytes()


def test_curve_and_bake_of_a_run(capsys, session):
    run = str(session / "run")
    capsys.readouterr()
    assert main(["curve", "--run", run, "--betas", "0.01", "0.5", "10", "--samples", "2"]) == 0
    table, notes = capsys.readouterr()
    rows = [line.split() for line in table.splitlines()[1:4]]
    assert [row[0] for row in rows] == ["0.01", "0.5", "10"]
    assert "one standard error over 12 examples" in table
    assert all(name in notes for name in ("curve.csv", "curve.json", "curve.png"))
    points = json.loads((session / "run" / "curve.json").read_text())["points"]
    assert [float(row[1]) for row in rows] == [round(point["rate"], 2) for point in points]
    assert main(["bake", "--run", run, "--beta", "0.5"]) == 0
    assert "differs from the gated model at beta = 0.5 by" in capsys.readouterr().err
    baked = session / "run" / "baked-0.5"
    assert {path.name for path in baked.iterdir()} == {"config.json", "model.safetensors", "model.pt2", "decoder.pt2"}
    assert main(["curve", "--run", str(baked), "--no-images"]) == 0
    alone = json.loads((baked / "curve.json").read_text())["points"]
    assert alone[0]["rate"] == pytest.approx(points[1]["rate"], rel=1e-5)


def test_a_beta_outside_the_range_is_a_warning(capsys, session):
    assert main(["bake", "--run", str(session / "run"), "--beta", "20"]) == 0
    assert capsys.readouterr().err.count("mrvae: warning: beta = 20 lies outside the range [0.01, 10]") == 1


def test_options_that_say_nothing_to_a_run_at_one_beta_are_named():
    with pytest.warns(UserWarning, match=r"--beta trains one network .*: --beta-range, --gates not used"):
        config("--beta", "0.5", "--gates", "encoder=sqrt", "--beta-range", "0.1", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config("--beta", "0.5", "--annealing", "0.3")
        config("--gates", "encoder=sqrt")


def test_a_baked_model_has_no_curve_at_another_beta(session, capsys):
    out = session / "one"
    assert main(["bake", "--run", str(session / "run"), "--beta", "2", "--out", str(out)]) == 0
    capsys.readouterr()
    assert main(["curve", "--run", str(out), "--betas", "3"]) == 1
    assert f"{out} is of one beta, 2; leave out --betas" in capsys.readouterr().err
    assert main(["curve", "--run", str(out), "--betas", "2", "--no-images"]) == 0


def test_a_run_that_is_done_says_so(session, capsys):
    assert main(["train", "--resume", str(session / "run")]) == 0
    assert "6 steps, nothing left to do: more --epochs than 2 go on" in capsys.readouterr().err


def test_names_with_hyphens_stay_whole_in_help(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    assert "tcvae-mlp, tcvae-conv" in " ".join(capsys.readouterr().out.split())


def test_doctor_says_what_runs(capsys):
    assert main(["doctor", "--layer", "Linear(30, 40)", "--input", "8x30", "--per-sample"]) == 0
    out = capsys.readouterr().out
    assert "torch" in out
    assert "Linear(30, 40), input 8x30, one beta a sample" in out


def test_interrupting_says_how_to_resume_and_resuming_finishes(session, tmp_path):
    run = tmp_path / "run"
    line = [sys.executable, "-m", "mrvae_models", "train", "--data", session / "images.npz", "--out", run]
    line += ["--set", "hidden=12", "--epochs", "100000", "--log-to", "none"]
    process = subprocess.Popen(list(map(str, line)), env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    while not (run / "last.ckpt").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, text = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"continue with: mrvae train --resume {run}" in text.splitlines()[-1]
    assert "Traceback" not in text
    assert main(["train", "--resume", str(run), "--max-time", "0.01", "--quiet"]) == 130

"""TrainConfig: what its recipes set, what its check refuses, and how options are read and kept."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from mrvae_models.config import TrainConfig
from mrvae_models.experiments.catalogue import EXPERIMENTS, options_of
from mrvae_models.experiments.execution import check_runs, configured
from mrvae_models.experiments.plan import Settings
from mrvae_models.option_changes import changes_of_resume
from mrvae_models.options import parse_duration, parse_setting
from mrvae_models.run import build_model, describe
from training_cases import run


def test_recipes_set_what_is_not_given():
    assert TrainConfig().recipe == "ranked" and TrainConfig(network="linear").recipe == "linear"
    paper = TrainConfig(recipe="paper", lr=0.5)
    assert (paper.gates, paper.gate_init, paper.lr) == ({"encoder": "sigmoid", "decoder": "sqrt"}, "paper", 0.5)
    model = build_model(describe(TrainConfig(), (1, 4, 4)))
    assert list(model.inputs) == ["decoder.0"] and "encoder.mean" in model.shifts
    assert model.gate_weight.shape[0] == TrainConfig().gate_degree == 3
    assert (model.gate_weight[0, model.inputs["decoder.0"]] == -4).all() and not model.gate_weight[1:].any()
    affine = build_model(describe(TrainConfig(gate_degree=1), (1, 4, 4)))
    assert affine.gate_weight.shape == affine.gate_bias.shape and paper.gate_degree == 1
    with pytest.raises(ValueError, match="gate_degree is 4; expected one of 1, 2, 3"):
        TrainConfig(gate_degree=4).check()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beta": -1.0}, r"beta is -1.0; expected a positive KL weight"),
        ({"beta": math.nan}, "beta is nan"),
        ({"beta_range": (1.0, 0.1)}, r"beta_range is \(1.0, 0.1\); expected 0 < LOW < HIGH"),
        ({"beta_range": (0.0, 1.0)}, "beta_range"),
        ({"beta_range": (0.1, math.inf)}, "beta_range"),
        ({"epochs": 0}, "epochs is 0; expected a positive integer"),
        ({"epochs": 1.5}, "epochs is 1.5; expected a whole number"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": 15, "devices": 2}, "batch_size is 15; expected a multiple of 2"),
        ({"lr": 0.0}, "lr is 0.0; expected a positive number"),
        ({"lr": math.nan}, "lr is nan"),
        ({"final_lr": 1.0}, "final_lr is 1.0; expected at most lr"),
        ({"warmup": 1.0}, "warmup is 1.0; expected a part of the run"),
        ({"range_warmup": -0.1}, "range_warmup is -0.1; expected a part of the run"),
        ({"gates": {"encoder": "relu"}}, "gate of encoder is 'relu'; expected one of sigmoid, sqrt, softplus"),
        ({"gates": {"encoder": "sqrt+"}}, r"gate is 'sqrt\+'; after its kind it may have \+shift"),
        ({"gates": {"encoder": "sqrt+ranked"}}, "only sigmoid gates can be ranked"),
        ({"gates": {"encodr": "sqrt"}}, "encodr"),
        ({"sample": "batch"}, "sample is 'batch'"),
        ({"precision": "8"}, "precision is '8'"),
        ({"seed": -1}, "seed is -1"),
        ({"margin": (0.5, 1.0)}, r"margin is \(0.5, 1.0\); expected two factors of at least 1"),
        ({"latent": 0}, "latent is 0; expected a positive integer"),
        ({"log_to": ("wandb",)}, "log_to is 'wandb'"),
        ({"max_time": -1.0}, "max_time is -1.0"),
        ({"network": "mpl"}, "network 'mpl' is not known"),
        ({"network_options": {"hiden": 3}}, "has no option 'hiden'"),
        ({"exclude": ("encoder.nothing",)}, "encoder.nothing"),
        ({"include": ("encoder.nothing",)}, "include names 'encoder.nothing'"),
        ({"optimizer": "sgd"}, "optimizer is 'sgd'; expected one of adam, adamax, adamw"),
        ({"accelerator": "abacus"}, "abacus"),
        (
            {"keep": "best", "epochs": 4, "validate_every": 5},
            "validate_every is 5; expected at most epochs, 4, with keep = 'best', which goes by validations",
        ),
        ({"patience": 2, "epochs": 4, "validate_every": 5}, "validate_every is 5; .* with patience = 2"),
        ({"schedule": "plateau", "epochs": 1, "validate_every": 2}, "validate_every is 2; .* schedule = 'plateau'"),
    ],
)
def test_options_that_make_no_sense_are_named_before_training(config, change, message):
    with pytest.raises(ValueError, match=message):
        run(replace(config, **change))
    assert not (config.directory / "last.ckpt").exists()


@pytest.mark.parametrize("options", [{"validate_every": 9}, {"keep": "best"}, {"patience": 1}, {"network": "lstm"}])
def test_validations_are_asked_for_only_where_something_goes_by_them(options):
    TrainConfig(**{"epochs": 5, **options}).check_new()


def test_a_run_that_is_there_may_have_options_that_never_act():
    """--resume cannot change them."""
    for options in (
        {"keep": "best", "epochs": 1},
        {"likelihood": "discretized-logistic", "likelihood_options": {"scale": "value"}, "sigma": 0.5},
        {"likelihood": "discretized-logistic", "likelihood_options": {"scale": "value", "knots": 3}},
    ):
        config = TrainConfig(**options)
        config.check()
        with pytest.raises(ValueError, match="expected (at most epochs|none with scale=value)"):
            config.check_new()


def test_experiments_validate_where_something_goes_by_it(tmp_path):
    """The text recipe's plateau, for one: with next to no validation its learning rate would never fall."""
    assert configured(tmp_path, {"epochs": 1}).validate_every == 1000
    assert configured(tmp_path, {"epochs": 1, "network": "lstm"}).validate_every == 1
    assert configured(tmp_path, {"epochs": 9, "keep": "best"}).validate_every == 5
    assert configured(tmp_path, {"epochs": 9, "keep": "best", "validate_every": 3}).validate_every == 3
    for experiment in EXPERIMENTS.values():
        for full, small in ((False, False), (True, False), (False, True)):
            settings = Settings((0,), 2, options_of(experiment, {}, full, small), experiment.baselines)
            check_runs(experiment.runs(settings), tmp_path)


def test_unknown_key_of_a_config_file_is_named(config, tmp_path):
    path = tmp_path / "options.json"
    path.write_text(json.dumps({"epochs": 3, "bach_size": 4}))
    with pytest.raises(ValueError, match="unknown option 'bach_size' in .*options.json; did you mean 'batch_size'"):
        TrainConfig.load(path)
    path.write_text('{"epochs": 3, "beta_range": [0.1, 1]}')
    assert TrainConfig.load(path) == TrainConfig(epochs=3, beta_range=(0.1, 1))
    path.write_text('{"epochs": 3,')
    with pytest.raises(ValueError, match="is no JSON"):
        TrainConfig.load(path)
    path.write_text('{"format": "other/1", "config": {}}')
    with pytest.raises(ValueError, match="format 'other/1'; expected 'mrvae-run/1'"):
        TrainConfig.load(path)


def test_config_survives_json(config):
    config = replace(config, exclude=("encoder.mean",), beta_range=(0.1, 3.0), max_time=5.0)
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_resume_may_change_what_no_step_depends_on(config):
    assert changes_of_resume(config, replace(config, epochs=9, patience=3)) == []
    assert changes_of_resume(config, replace(config, lr=1.0, seed=4)) == ["seed", "lr"]


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("1.5m", 90), ("2h30m", 9000), ("1d", 86400), ("1h0.5s", 3600.5)]
)
def test_durations(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "5x", "-3", "1h 2m", "1h30", "1.5.5s", "30 ", "9" * 5000 + "x"])
def test_no_durations(text):
    """1h30 is not 1 h and 30 s; and a long number is read once, not in all ways to cut it."""
    with pytest.raises(ValueError, match="is no duration; expected seconds alone.*or 1h30m"):
        parse_duration(text)


def test_settings_of_networks():
    assert parse_setting("hidden=600,300") == ("hidden", [600, 300])
    assert parse_setting("activation=silu") == ("activation", "silu")
    for text, value in (("False", False), ("false", False), ("True", True), ("None", None), ("no", "no")):
        assert parse_setting(f"skips={text}") == ("skips", value)
    for name in ("latent", "likelihood", "sigma", "network"):
        with pytest.raises(ValueError, match=f"network_options: {name} is 4; expected none of that name.*use --{name}"):
            TrainConfig(network_options={name: 4}).check()
    with pytest.raises(ValueError, match="expected NAME=VALUE"):
        parse_setting("hidden")
    one = build_model(describe(TrainConfig(network_options=dict([parse_setting("hidden=7")])), (1, 4, 4)))
    assert one.network.decoder[0].out_features == 7

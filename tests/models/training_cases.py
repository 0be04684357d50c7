"""Small training runs for the tests of training; their data and options are fixtures of conftest.py."""

from __future__ import annotations

import csv

import torch
from mrvae_models.config import TrainConfig
from mrvae_models.data import batches
from mrvae_models.lightning_module import TrainingModule
from mrvae_models.run import build_model, describe, load_split
from mrvae_models.training import train


def small(data, directory, **options):
    """Options of an MLP that trains in a moment; the run goes into a folder of the directory."""
    usual = {"network_options": {"hidden": [12]}, "latent": 3, "log_to": ()}
    return TrainConfig(data=str(data), out=str(directory / "run"), **usual, **options)


def module_of(config):
    train_set = load_split(config, "train")
    torch.manual_seed(0)
    model = build_model(describe(config, train_set.input_shape))
    return TrainingModule(model, config, batches(train_set, config.batch_size)), train_set.examples[:16]


def run(config, **options):
    return train(config, progress=False, **options)


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))

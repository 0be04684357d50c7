"""NVAE: the parameter counts of the paper, shapes of any image, gates, and a whole session of the command."""

from __future__ import annotations

import copy
import json
import math

import numpy as np
import pytest
import torch
from mrvae_models.cli import main
from mrvae_models.config import TrainConfig
from mrvae_models.curve import evaluate
from mrvae_models.data import load
from mrvae_models.likelihoods import Gaussian
from mrvae_models.networks import build
from mrvae_models.networks.nvae import PAPER_GATING
from mrvae_models.objectives import beta_vae, sample_beta
from mrvae_models.pictures import pictures
from mrvae_models.run import load_model
from torch import nn

import mrvae_kernels as mk
from tests.helpers import randomize, relative_error

TINY = {"latent": 2, "channels": 4, "groups": 2, "cells": 1, "process_cells": 1}
GATES = {"encoder": "sigmoid", "decoder": "sqrt"}


def tiny(shape=(1, 6, 6), **options) -> nn.Module:
    torch.manual_seed(0)
    return build("nvae", shape, **{**TINY, **options})


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def by_layers() -> tuple[int, int]:
    """Parameters of the paper's network for MNIST, and its features with a gate, worked out layer by layer."""

    def layer(weights: int, features: int, more: int) -> np.ndarray:  # more: biases and gains
        return np.array([weights + more, features])

    def normed(a: int, b: int, kernel: int) -> np.ndarray:  # weight norm: a direction, a gain and a bias
        return layer(a * b * kernel**2, b, 2 * b)

    def excite(c: int) -> np.ndarray:
        hidden = max(c // 16, 4)
        return layer(c * hidden, hidden, hidden) + layer(hidden * c, c, c)

    def norms(*channels: int) -> np.ndarray:
        return np.array([2 * sum(channels), 0])

    def encoder_cell(c: int, out: int) -> np.ndarray:
        skip = 4 * normed(c, out // 4, 1) if out > c else 0
        return norms(c, out) + normed(c, out, 3) + normed(out, out, 3) + excite(out) + skip

    def decoder_cell(c: int, out: int, expansion: int) -> np.ndarray:
        wide = expansion * c
        products = layer(c * wide, wide, 0) + layer(25 * wide, wide, 0) + layer(wide * out, out, 0)
        skip = layer(c * out, out, out) if out < c else 0
        return norms(c, wide, wide, out) + products + excite(out) + skip

    total = normed(1, 16, 3)
    for c in (16, 32):
        total += 2 * encoder_cell(c, c) + encoder_cell(c, 2 * c)
    total += 10 * 2 * encoder_cell(64, 64) + encoder_cell(64, 128) + 5 * 2 * encoder_cell(128, 128)
    total += normed(128, 128, 1)
    for group, c in enumerate([128] * 5 + [64] * 10):
        total += normed(c, 40, 3) + normed(c + 20, c, 1)
        if group:
            total += normed(c, c, 1) + normed(c, 40, 1) + 2 * decoder_cell(c, c, 6)
    total += decoder_cell(128, 64, 6)
    for c in (64, 32):
        total += decoder_cell(c, c // 2, 3) + 2 * decoder_cell(c // 2, c // 2, 3)
    start, output = 128 * 4 * 4, 16 * 9 + 2  # without a gate
    return int(total[0]) + start + output, int(total[1])


def test_the_parameter_counts_are_the_papers():
    with torch.device("meta"):
        network = build("nvae", (1, 28, 28))
        out = network(torch.empty(2, 1, 28, 28))
        assert parameters(network) == 8_853_246
        model = mk.multirate(network, GATES, **PAPER_GATING)
    features = sum(rows.stop - rows.start for rows in model.gated.values())
    assert (parameters(network), features) == by_layers() == (8_853_246, 48_436)
    assert parameters(model) == 8_950_118
    kinds = {type(network.get_submodule(name)).__name__ for name in model.gated}
    assert kinds == {"HostedWeightNormConv2d", "HostedConv2d", "HostedLinear"}
    assert network.group_shapes == ((20, 4, 4),) * 5 + ((20, 8, 8),) * 10 and network.latent == 14_400
    assert out.parameters.shape == (2, 1, 28, 28) and out.rates.shape == (2, 15) and out.mean.shape == (2, 14_400)


@pytest.mark.parametrize(
    ("shape", "options", "groups"),
    [
        ((1, 28, 28), {"groups": 4}, [(2, 4, 4)] * 2 + [(2, 8, 8)] * 4),
        ((3, 17, 31), {"groups": 1, "scales": 3}, [(2, 2, 2), (2, 4, 4), (2, 8, 8)]),
        ((2, 1, 9), {"groups": 3, "scales": 1, "process_blocks": 1}, [(2, 1, 5)] * 3),
        ((1, 8, 8), {"groups": 2, "adaptive": False}, [(2, 1, 1)] * 2 + [(2, 2, 2)] * 2),
    ],
)
def test_any_image_gets_an_output_of_its_shape(shape, options, groups):
    network = tiny(shape, **options)
    x = torch.rand(2, *shape)
    out = network(x)
    assert list(network.group_shapes) == groups
    assert out.parameters.shape == network.reconstruct(x).shape == x.shape
    assert network.sample(3).shape == (3, *shape)
    assert out.rates.shape == (2, len(groups)) and out.mean.shape == (2, network.latent)


def test_it_sees_every_pixel_and_every_parameter_gets_a_gradient():
    network = randomize(tiny((1, 7, 6)))
    x = torch.rand(5, 1, 7, 6, requires_grad=True)
    out = network(x)
    (out.parameters.square().sum() + out.rates.sum()).backward()
    assert (x.grad.abs().sum(0) > 0).all()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().sum() > 0 or name.endswith("bias"), name


def test_the_groups_are_drawn_from_the_top_and_each_knows_those_above():
    network = randomize(tiny()).eval()
    x, noise = torch.rand(2, 1, 6, 6), torch.randn(2, network.latent)
    sizes = [math.prod(shape) for shape in network.group_shapes]
    starts = [sum(sizes[:group]) for group in range(len(sizes))]
    rates = network(x, noise).rates
    for group, start in enumerate(starts):
        changed = noise.clone()
        changed[:, start : start + sizes[group]] += 1
        other = network(x, changed).rates
        assert torch.equal(other[:, : group + 1], rates[:, : group + 1])
        assert (other[:, group + 1 :] != rates[:, group + 1 :]).all()
        assert (network.decode(changed) != network.decode(noise)).any()


def test_another_likelihood():
    network = tiny((3, 6, 6), likelihood=Gaussian(0.5))
    x = torch.rand(2, 3, 6, 6)
    assert torch.isfinite(network.likelihood.distortion(network(x).parameters, x)).all()


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((784,), {}, r"\(784,\).*channels, height, width"),
        ((1, 6, 6), {"channels": 5}, "channels is 5; expected an even number"),
        ((1, 6, 6), {"groups": 0}, "groups holds 0"),
        ((1, 6, 6), {"latent": 1.5}, "latent holds 1.5"),
        ((1, 6, 6), {"process_cells": 0}, "process_cells holds 0"),
        ((1, 6, 6), {"regularisation": -1.0}, "regularisation is -1.0"),
        ((1, 6, 6), {"depth": 3}, "no option 'depth'"),
    ],
)
def test_what_cannot_work_is_refused(shape, options, message):
    with pytest.raises(ValueError, match=message):
        tiny(shape, **options)


# Gates


@pytest.mark.parametrize("gating", [{}, PAPER_GATING])
def test_gated_and_baked_agree_in_float64(gating):
    model = mk.multirate(tiny().double(), {"encoder": "softplus", "decoder": "sigmoid"}, **gating)
    randomize(model).eval()
    x = torch.rand(5, 1, 6, 6, dtype=torch.float64)
    noise = torch.randn(5, model.network.latent, dtype=torch.float64)
    betas = [0.02, 0.3, 1.0, 4.0, 9.0]
    each = model(x, noise, beta=torch.tensor(betas, dtype=torch.float64))
    for row, beta in enumerate(betas):
        shared = model(x, noise, beta=beta)
        plain = mk.bake(model, beta, [(x, noise)]) if row == 0 else None
        one = slice(row, row + 1)
        for name in ("parameters", "mean", "rates"):
            assert relative_error(getattr(each, name)[one], getattr(shared, name)[one]) < 1e-10
        if plain is not None:
            model_then = copy.deepcopy(model)
            model_then.recalibrate([(x, noise)], beta)
            model_then.eval()
            expected = model_then(x, noise, beta=beta)
            found = plain.eval()(x, noise)
            for name in ("parameters", "mean", "rates"):
                assert relative_error(getattr(found, name), getattr(expected, name)) < 1e-10
            kinds = [type(module) for module in tiny().modules()]
            assert [type(module) for module in plain.modules()] == kinds


def test_by_default_norms_have_the_gates_of_the_convolutions_before_them():
    model = mk.multirate(tiny())
    gated, left = set(model.gated), model.left
    assert "encoder.stem" in gated and "encoder.preprocess.0.norm2" in gated and "decoder.heads.0" in gated
    assert "norm2" in left["encoder.preprocess.0.conv1"] and "decoder.output" in gated
    assert {name for name in left if "batch norm" not in left[name]} == {"decoder"}, "the learned start has no gate"


def test_the_curve_and_its_pictures_of_a_hierarchy():
    model = mk.multirate(randomize(tiny()))
    data = load("digits", split="test")
    data.examples = torch.rand(24, 1, 6, 6, generator=torch.Generator().manual_seed(1))
    calibration = data.examples[:10]
    betas = [0.1, 1.0]
    curve = evaluate(model, data, betas, batch_size=12, calibration=calibration)
    assert curve.points == evaluate(model, data, betas, batch_size=12, calibration=calibration).points
    assert all(point.rate > 0 and math.isfinite(point.distortion) for point in curve.points)
    made = pictures(model, data, betas, count=3, calibration=calibration)
    assert made.samples.shape == made.reconstructions.shape == (2, 3, 1, 6, 6)
    again = pictures(model, data, betas[1:], count=3, calibration=calibration)
    assert torch.equal(again.samples[0], made.samples[1]), "the same noise at every beta"
    assert torch.equal(again.reconstructions[0], made.reconstructions[1])
    with pytest.raises(ValueError, match="pass calibration="):
        evaluate(model, data, betas)


# Training


@pytest.mark.slow
def test_a_session_of_the_command(tmp_path):
    generator = np.random.default_rng(0)
    images = {f"{part}_images": generator.integers(0, 256, (n, 6, 6), dtype=np.uint8) for part, n in
              (("train", 30), ("test", 8))}
    np.savez(tmp_path / "images.npz", **images)
    options = {**TINY, "scales": 1, "process_blocks": 1}
    settings = [word for name, value in options.items() if name != "latent" for word in ("--set", f"{name}={value}")]
    run = str(tmp_path / "run")
    assert main([
        "train", "--network", "nvae", "--latent", "2", *settings, "--data", str(tmp_path / "images.npz"), "--epochs",
        "2", "--batch-size", "9", "--validate-every", "2", "--log-to", "none", "--out", run,
        "--include", *PAPER_GATING["include"], "--exclude", *PAPER_GATING["exclude"],
    ]) == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["config"]["optimizer"] == "adamax" and config["model"]["include"] == list(PAPER_GATING["include"])
    model, _ = load_model(run)
    expected = mk.multirate(tiny(**options), **PAPER_GATING)
    assert model.gated.keys() == expected.gated.keys()
    assert main(["curve", "--run", run, "--betas", "0.1", "1"]) == 0
    assert (tmp_path / "run" / "curve.png").exists()
    assert main(["bake", "--run", run, "--beta", "0.5"]) == 0
    plain, description = load_model(tmp_path / "run" / "baked-0.5")
    assert "include" not in description["model"] and not isinstance(plain, mk.MultiRate)
    x, noise = torch.rand(3, 1, 6, 6), torch.randn(2, plain.latent)
    reconstruction, mean, rates = torch.export.load(tmp_path / "run" / "baked-0.5" / "model.pt2").module()(x)
    out = plain.at_means(x)
    assert relative_error(reconstruction, plain.reconstruct(x)) < 1e-5
    assert relative_error(mean, out.mean) < 1e-4 and relative_error(rates, out.rates) < 1e-4
    drawn = torch.export.load(tmp_path / "run" / "baked-0.5" / "decoder.pt2").module()(noise)
    assert relative_error(drawn, plain.likelihood.mean(plain.decode(noise))) < 1e-5


def test_the_recipe_of_nvae():
    config = TrainConfig(network="nvae")
    config.check()
    assert (config.recipe, config.optimizer) == ("hierarchy", "adamax")


@pytest.mark.slow
@pytest.mark.parametrize("multi_rate", [True, False])
def test_it_trains_stably_on_the_digits(multi_rate):
    """200 steps of Adamax at batch 32: at every step finite, and far below where it began."""
    torch.manual_seed(0)
    data = load("digits").examples
    data = torch.nn.functional.avg_pool2d(data, 2)  # 14x14: a quarter of the time
    network = build("nvae", (1, 14, 14), 4, channels=8, groups=2, cells=1, process_blocks=1, process_cells=2)
    model = mk.multirate(network, {"encoder": "softplus", "decoder": "softplus"}) if multi_rate else network
    optimizer = torch.optim.Adamax(model.parameters(), lr=5e-3)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(200):
        x = data[torch.randint(len(data), (32,), generator=generator)]
        if multi_rate:
            beta = sample_beta(len(x), generator=generator)
            objective = beta_vae(model(x, beta=beta), x, beta, network.likelihood)
        else:
            objective = beta_vae(model(x), x, 1.0, network.likelihood)
        optimizer.zero_grad()
        (objective.loss + network.penalty()).backward()
        assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())
        optimizer.step()
        losses.append(objective.loss.item())
    assert max(losses) < 2 * losses[0], "no step blew up"
    assert np.mean(losses[-20:]) < 0.6 * losses[0]
    assert np.mean(losses[-20:]) < np.mean(losses[80:100])

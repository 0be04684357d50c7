"""Every network under multirate: Table 1's parameters, the recipes' gates, residual blocks by the formula, learning."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from mrvae_models import data
from mrvae_models.config import TrainConfig
from mrvae_models.networks import NETWORKS, build
from mrvae_models.networks.stack import ResidualBlock
from mrvae_models.objectives import beta_vae, sample_beta
from mrvae_models.run import build_model, describe
from torch import Tensor, nn

import mrvae_kernels as mk

SMALL = {
    "cnn": {"channels": (8, 12)},
    "resnet": {"channels": (8, 12), "blocks": 1},
    "mlp": {"hidden": (20,)},
    "tcvae-mlp": {"width": 20},
    "sigma-cnn": {"channels": 4},
    "bs-vae": {"channels": (8, 12)},
}
"""Options that make a network of digits small, by its name."""
LARGE = "tcvae-conv"
"""Takes images of 64x64 only."""
HIERARCHY, TEXT = "nvae", "lstm"
OF_MANY_LATENTS = (HIERARCHY, "hvae", "svg-lp", TEXT)
"""Networks that are no VAE of one latent vector, with recipes of their own; hvae's and svg-lp's tests are theirs."""
TINY = {"channels": 4, "groups": 2, "cells": 1, "process_cells": 1}
"""Options that make the hierarchy small."""


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def described(network: str, shape: tuple[int, ...], **options) -> mk.MultiRate:
    """The model of a training run."""
    config = TrainConfig(network=network, **options)
    config.check()
    model = build_model(describe(config, shape))
    assert isinstance(model, mk.MultiRate)
    return model


@pytest.mark.parametrize(
    ("network", "shape", "published", "more"),
    [
        ("resnet", (1, 28, 28), 1_884_289, 0),
        ("resnet", (3, 64, 64), 2_774_403, 0),
        # the base of Table 1 ends in ConvT k4, the multi-rate network in k3: 64 channels to 3, 4^2 - 3^2 taps fewer
        ("resnet", (3, 32, 32), 7_898_435, -64 * 3 * (4**2 - 3**2)),
        # MNIST's and CelebA's have one more pair (w, c) for as many channels as one of their layers has: MNIST's is a
        # gate made twice
        ("cnn", (1, 28, 28), 17_885_377, 2 * 1024),
        ("cnn", (3, 32, 32), 40_819_075, 0),
        ("cnn", (3, 64, 64), 34_969_091, 2 * 512),
    ],
)
def test_the_papers_gates_have_the_parameters_of_table_1(network, shape, published, more):
    with torch.device("meta"):
        norms = "conditional" if network == "cnn" else "gated"
        model = described(network, shape, recipe="paper", gated="paper", norms=norms)
    assert parameters(model) + more == published
    last = list(model.network.decoder)[-1]
    assert set(model.left.values()) == {"excluded"} and len(model.left) == 4
    assert last is model.network.get_submodule(model.network.ungated[-1])


def test_every_layer_is_gated_unless_asked_otherwise():
    for name in SMALL:
        every = described(name, (1, 28, 28), network_options=dict(SMALL[name]))
        paper = described(name, (1, 28, 28), network_options=dict(SMALL[name]), gated="paper")
        assert set(paper.network.ungated) <= set(every.gated)
        assert set(every.gated) - set(paper.gated) == set(paper.network.ungated)
    with pytest.raises(ValueError, match="'paper', and no choice.*'linear'"):
        described("linear", (1, 28, 28), gated="paper")


def test_a_description_without_the_choices_is_one_of_every_layer_and_gated_norms():
    config = TrainConfig(network="cnn", network_options={"channels": [4]})
    description = describe(config, (1, 8, 8))
    assert not {"gated", "norms"} & set(description)
    chosen = describe(TrainConfig(network="cnn", gated="paper", norms="conditional"), (1, 8, 8))
    assert (chosen["gated"], chosen["norms"]) == ("paper", "conditional")
    for name in ("gated", "norms"):
        with pytest.raises(ValueError, match=f"{name} is 'all'; expected"):
            build_model({**description, name: "all"})


@pytest.mark.parametrize("norms", ["gated", "conditional"])
@pytest.mark.parametrize("name", [name for name in NETWORKS if name not in OF_MANY_LATENTS])
def test_the_default_recipe_gates_all_it_should(name, norms):
    shape = (1, 64, 64) if name == LARGE else (1, 28, 28)
    convolutional = name in ("cnn", "bs-vae", LARGE)
    if norms == "conditional" and not convolutional:
        with pytest.raises(ValueError, match="no batch norm"):
            described(name, shape, network_options=dict(SMALL.get(name, {})), norms=norms)
        return
    model = described(name, shape, network_options=dict(SMALL.get(name, {})), norms=norms)
    layers = {key for key, module in model.network.named_modules() if module._parameters}
    if name == "linear":
        assert set(model.left) == {"encoder.centre", "decoder.3"}
        return
    kinds = {row.name: row.kind for row in model._rows if row.role == "gated"}
    assert list(model.inputs) == ["decoder.0"] and isinstance(model.network.decoder[0], nn.Linear)
    assert model.inputs["decoder.0"].stop - model.inputs["decoder.0"].start == model.network.latent
    assert kinds["encoder.mean"] == kinds["encoder.log_variance"] == "sigmoid"
    assert {kind for key, kind in kinds.items() if key not in ("encoder.mean", "encoder.log_variance")} == {"softplus"}
    if norms == "conditional":
        gated, norm = set(model.gated), set(model.conditional.names)
        assert gated | norm == layers and not gated & norm and not model.left
    elif convolutional:
        assert set(model.gated) | set(model.left) == layers
        assert all("batch normalisation" in reason for reason in model.left.values())
    else:
        assert set(model.gated) == layers and not model.left


@pytest.mark.parametrize("norms", ["gated", "conditional"])
def test_the_default_recipe_gates_a_hierarchy_but_for_what_a_batch_norm_follows(norms):
    model = described(HIERARCHY, (1, 28, 28), network_options=dict(TINY), norms=norms)
    kinds = {name: type(module) for name, module in model.network.named_modules() if module._parameters}
    norm = {name for name, kind in kinds.items() if issubclass(kind, nn.BatchNorm2d)}
    followed = {name for name, reason in model.left.items() if "batch normalisation" in reason}
    assert set(model.left) == followed | {"decoder"}  # the learned start of the decoder
    assert len(norm) > 20
    if norms == "gated":
        assert norm < set(model.gated) and followed
    else:
        assert set(model.conditional.names) == norm and not followed
    assert set(kinds) == set(model.gated) | set(model.left) | norm


@pytest.mark.parametrize("deep", [False, True])
def test_the_default_recipe_gates_text_but_for_embeddings_and_the_words_themselves(deep):
    options = {"embedding": 5, "hidden": 6, "deep_heads": deep}
    model = described(TEXT, (7, 30), network_options=options)
    assert set(model.left) == {"encoder.embedding", "decoder.embedding", "decoder.output"}
    if deep:
        left = set(described(TEXT, (7, 30), network_options=options, gated="paper").left)
        assert left == {"encoder.embedding", "decoder.embedding", *model.network.ungated}
    else:
        with pytest.raises(ValueError, match="'paper', and no choice of layers .* 'lstm' with these options"):
            described(TEXT, (7, 30), network_options=options, gated="paper")


@pytest.mark.parametrize(
    ("name", "norms"), [*((name, "gated") for name in (*SMALL, LARGE)), ("cnn", "conditional"), (LARGE, "conditional")]
)
def test_twenty_steps_on_digits_lower_the_loss(name, norms):
    torch.manual_seed(0)
    x = data.load("digits", split="train").examples[:64]
    if name == LARGE:
        x = F.interpolate(x[:8], size=64)
    model = described(name, tuple(x.shape[1:]), network_options=dict(SMALL.get(name, {})), norms=norms)
    optimizer = torch.optim.Adam(
        [{"params": model.network_parameters(), "lr": 2e-3}, {"params": model.gate_parameters(), "lr": 2e-2}]
    )
    losses = []
    for _ in range(20):
        beta = sample_beta(len(x), stratified=True)
        objective = beta_vae(model(x, beta=beta), x, beta, model.network.likelihood)
        optimizer.zero_grad()
        objective.loss.backward()
        for key, parameter in model.named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), key
        optimizer.step()
        losses.append(objective.loss.item())
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3]), losses


def by_the_formula(name: str, module: nn.Module, x: Tensor, values: dict[str, Tensor]) -> Tensor:
    """y = g (W (g_in x) + b) + t of every gated layer, with torch's functions and nothing in place."""
    if isinstance(module, nn.Sequential):
        for child, layer in module.named_children():
            x = by_the_formula(f"{name}.{child}", layer, x, values)
        return x
    if isinstance(module, ResidualBlock):
        return x + by_the_formula(f"{name}.body", module.body, x, values)
    if name not in values:
        return module(x)

    def along(value: Tensor) -> Tensor:
        return value.reshape(-1, value.shape[-1], *[1] * (x.dim() - 2))

    if f"{name}.inputs" in values:
        x = x * along(values[f"{name}.inputs"])
    if isinstance(module, nn.Linear):
        y = F.linear(x, module.weight, module.bias)
    elif isinstance(module, nn.Conv2d):
        y = F.conv2d(x, module.weight, module.bias, module.stride, module.padding)
    else:
        assert isinstance(module, nn.ConvTranspose2d)
        y = F.conv_transpose2d(x, module.weight, module.bias, module.stride, module.padding, module.output_padding)
    return along(values[name]) * y + along(values[f"{name}.shift"])


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("per_sample", [False, True])
def test_gated_residual_blocks_are_their_formula_in_value_and_gradient(per_sample, compiled):
    torch.manual_seed(0)
    model = described("resnet", (1, 9, 8), latent=3, network_options={"channels": [4, 6], "blocks": 2}).double()
    assert {f"encoder.body.{i}.body.{j}" for i in (4, 6) for j in (0, 2)} <= set(model.gated)
    run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    x = torch.rand(5, 1, 9, 8, dtype=torch.float64)
    beta = torch.tensor([0.02, 0.3, 1.0, 4.0, 9.0] if per_sample else 0.3).double()
    wanted = list(model.parameters())

    def loss(parameters: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
        return parameters.sin().sum() + mean.square().sum() + log_variance.cos().sum()

    network, values = model.network, model.gate_values(beta)
    features = by_the_formula("encoder.body", network.encoder.body, x, values)
    mean = by_the_formula("encoder.mean", network.encoder.mean, features, values)
    log_variance = by_the_formula("encoder.log_variance", network.encoder.log_variance, features, values)
    torch.manual_seed(1)
    z = mean + (log_variance / 2).exp() * torch.randn_like(mean)
    expected = by_the_formula("decoder", network.decoder, z, values)
    theirs = torch.autograd.grad(loss(expected, mean, log_variance), wanted)
    for _ in range(3):  # the first call makes a plan, which the others follow
        torch.manual_seed(1)
        out = run(x, beta=beta)
        torch.testing.assert_close(out.parameters, expected)
        ours = torch.autograd.grad(loss(out.parameters, out.mean, out.log_variance), wanted)
        for (key, _), one, other in zip(model.named_parameters(), ours, theirs, strict=True):
            torch.testing.assert_close(one, other, msg=lambda text, key=key: f"{key}: {text}")


def test_a_baked_resnet_is_a_plain_one_again():
    torch.manual_seed(0)
    plain = build("resnet", (1, 8, 8), 3, channels=(4,), blocks=1)
    keys = set(plain.state_dict())
    model = mk.multirate(copy.deepcopy(plain), {"encoder": "softplus", "decoder": "softplus"})
    baked = mk.bake(model, 0.3)
    x = torch.rand(4, 1, 8, 8)
    torch.testing.assert_close(baked.reconstruct(x), _reconstruct(model, x), rtol=1e-5, atol=1e-6)
    assert set(baked.state_dict()) == keys and type(baked.decoder) is nn.Sequential


def _reconstruct(model: mk.MultiRate, x: Tensor) -> Tensor:
    with model.at(0.3):
        return model.network.reconstruct(x)

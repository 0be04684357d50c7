"""The hierarchical VAE of 15 layers: published size, blocks and rates by formula, which draw depends on which."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mrvae_models.cli import main
from mrvae_models.config import TrainConfig
from mrvae_models.likelihoods import Gaussian, LogisticMixture
from mrvae_models.networks import build
from mrvae_models.networks.gated_resnet import GatedBlock, centred_convolution
from mrvae_models.networks.hierarchy import Normal
from mrvae_models.objectives import beta_vae, sample_beta
from mrvae_models.run import build_model, describe, load_model
from torch import nn
from torch.distributions import kl_divergence

import mrvae_kernels as mk

SMALL = {"latents": (3, 2, 2), "channels": 6, "halve": (1, 3), "blocks": 2}


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def small(shape=(2, 9, 8), **options):
    torch.manual_seed(0)
    return build("hvae", shape, likelihood=Gaussian(), **{**SMALL, **options}).double()


def test_the_published_sizes_have_54_4_million_parameters():
    """The authors' code counts two things more: the head of a prior at the top, which nothing uses, and for a mixture
    of 10 logistics the 30 coefficients of the channels, which the sigma-VAE paper takes out."""
    with torch.device("meta"):
        network = build("hvae", (3, 32, 32), likelihood=LogisticMixture())
    assert round(parameters(network) / 1e6, 1) == 54.4
    unused_head, coefficients = 2 * 10 * (96 * 4 * 4 + 2), 30 * (96 + 2)
    assert parameters(network) + unused_head + coefficients == 54_433_640
    assert len(network.group_shapes) == 15
    assert network.group_shapes[0] == (10, 4, 4) and network.group_shapes[-1] == (38, 16, 16)
    assert [shape[0] for shape in network.group_shapes] == list(range(10, 39, 2))
    with torch.device("meta"):
        assert parameters(build("hvae", (3, 32, 32), likelihood=LogisticMixture(), skips=False)) < parameters(network)


@pytest.mark.parametrize(
    ("resize", "skip", "raw", "channels"),
    [
        ("keep", "none", False, 4), ("keep", "beside", False, 4), ("keep", "beside", True, 3),
        ("halve", "beside", False, 4), ("double", "beside", True, 3), ("keep", "above", False, 4),
    ],
)
def test_a_block_is_its_formula(resize, skip, raw, channels):
    torch.manual_seed(0)
    block = GatedBlock(channels, 4, 3, resize, skip, raw).double()
    x = torch.randn(2, channels, 6, 4, dtype=torch.float64)
    sides = (3, 2) if skip == "above" else (6, 4)
    s = None if skip == "none" else torch.randn(2, 4, *sides, dtype=torch.float64)

    def run(conv: mk.WeightNormConv2d, x: torch.Tensor, stride: int = 1) -> torch.Tensor:
        norms = conv.weight.flatten(1).norm(dim=1)
        weight = conv.weight * (conv.gain / norms)[:, None, None, None]
        return F.conv2d(x, weight, conv.bias, stride, conv.kernel_size[0] // 2)

    y = run(block.conv1, x if raw else F.elu(x))
    if skip == "beside":
        y = y + run(block.skip, F.elu(s))
    if skip == "above":
        y = y + run(block.skip[1], F.elu(s).repeat_interleave(2, 2).repeat_interleave(2, 3))
    y = F.elu(y)
    if resize == "double":
        y = y.repeat_interleave(2, 2).repeat_interleave(2, 3)
    y = run(block.conv2, y, 2 if resize == "halve" else 1)
    y = y[:, :4] * torch.sigmoid(y[:, 4:])
    if not raw:
        y = y + (F.avg_pool2d(x, 3, 2, 1) if resize == "halve" else x)
    torch.testing.assert_close(block(x, s), y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kernel", [(3, 3), (4, 4), (16, 8), (1, 2)])
def test_a_centred_convolution_keeps_the_sides(kernel):
    x = torch.rand(2, 3, 6, 5)
    assert centred_convolution(3, 4, kernel)(x).shape == (2, 4, 6, 5)


def test_the_log_ratio_is_that_of_torch_and_its_mean_the_kl():
    torch.manual_seed(0)
    q, p = (Normal(torch.randn(4, dtype=torch.float64), 0.3 + torch.rand(4, dtype=torch.float64)) for _ in range(2))
    noise = torch.randn(200_000, 4, dtype=torch.float64)
    z = q.draw(noise)
    of_torch = [torch.distributions.Normal(normal.mean, normal.sigma) for normal in (q, p)]
    ratio = q.log_ratio(p, noise)
    torch.testing.assert_close(ratio, of_torch[0].log_prob(z) - of_torch[1].log_prob(z), rtol=1e-10, atol=1e-10)
    errors = ratio.std(0) / math.sqrt(len(noise))
    assert ((ratio.mean(0) - kl_divergence(*of_torch)).abs() < 4 * errors).all()


def test_the_rate_is_log_q_minus_log_p_of_all_draws_together():
    """q(z | x) = q(z_1 | x) q(z_2 | z_1, x) ..., p(z) = p(z_L) p(z_{L-1} | z_L) ..., written out for one draw."""
    network = small()
    x = torch.rand(5, 2, 9, 8, dtype=torch.float64)
    out = network(x)
    parts = network._by_group(out.noise)
    h, z, draws, log_q = None, network.ascend(x), [], 0.0
    for stage, part in zip(network.encoder, parts[::-1], strict=True):
        h = stage(z, h)
        q = torch.distributions.Normal(*stage.posterior(h))
        z = q.mean + q.stddev * part
        draws.append(z)
        log_q = log_q + q.log_prob(z).flatten(1).sum(1)
    log_p, above = 0.0, None
    for stage, z in zip(network.decoder.stages, draws[::-1], strict=True):
        log_p = log_p + torch.distributions.Normal(*stage.prior(above, z)).log_prob(z).flatten(1).sum(1)
        above = stage(z, above)
    torch.testing.assert_close(out.rates.sum(1), log_q - log_p, rtol=1e-10, atol=1e-8)
    assert out.rates.shape == (5, 3) and out.mean.shape == out.noise.shape == (5, network.latent)


def test_posteriors_depend_on_draws_below_and_priors_on_draws_above():
    network = small()
    x = torch.rand(2, 2, 9, 8, dtype=torch.float64)
    noise = torch.randn(2, network.latent, dtype=torch.float64)
    sizes = [math.prod(shape) for shape in network.group_shapes]
    features = network.ascend(x)

    def changed(group: int) -> tuple[list[bool], list[bool]]:
        other = noise.clone()
        start = sum(sizes[:group])
        other[:, start : start + sizes[group]] += 1
        pairs = [network.descend(features, network._by_group(one))[1] for one in (noise, other)]
        return tuple(
            [not torch.equal(a[side].mean, b[side].mean) for a, b in zip(*pairs, strict=True)] for side in (0, 1)
        )

    assert changed(0) == ([False, False, False], [False, True, True])  # the top
    # a draw in the middle moves the posterior above, and with it the priors below that one
    assert changed(1) == ([True, False, False], [False, True, True])
    assert changed(2) == ([True, True, False], [False, True, True])


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 13, 21), (2, 8, 8), (1, 3, 5)])
def test_any_image_is_taken_and_sampled(shape):
    network = build("hvae", shape, **SMALL)
    x = torch.rand(3, *shape)
    assert network(x).parameters.shape == network.reconstruct(x).shape == (3, *shape)
    assert network.sample(4).shape == network.likelihood.mean(network.decode(torch.randn(4, network.latent))).shape
    first, second = (network.sample(2, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, second) and first.shape == (2, *shape)


def test_options_of_size():
    network = build("hvae", (1, 8, 8), 4, channels=5, latents=(9, 9), halve=2, head_kernel=3)
    assert network.group_shapes == ((4, 4, 4), (4, 8, 8))
    assert network.encoder[0].head[1].kernel_size == (3, 3)
    assert small(head_kernel=None).encoder[0].head[1].kernel_size == (6, 4)  # 9x8 is padded to 12x8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"latents": ()}, "latents is empty"),
        ({"latents": (3, 0)}, "latents holds 0"),
        ({"halve": (4,)}, "halve names stage 4; expected stages from 1 to 3"),
        ({"channels": 0}, "channels holds 0"),
        ({"head_kernel": -1}, "head_kernel holds -1"),
    ],
)
def test_sizes_that_cannot_work_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build("hvae", (1, 8, 8), **{**SMALL, **options})


def test_the_recipe_is_the_authors():
    config = TrainConfig(network="hvae")
    config.check()
    found = (config.recipe, config.optimizer, config.lr, config.batch_size, config.free_bits, config.ema)
    assert found == ("layers", "adamax", 2e-3, 48, 2.0, 0.9995)
    assert TrainConfig().ema == TrainConfig().free_bits == 0


def test_multi_rate_is_the_baked_network_at_each_beta():
    config = TrainConfig(network="hvae", network_options=dict(SMALL))
    torch.manual_seed(0)
    model = build_model(describe(config, (2, 9, 8))).double().eval()
    assert not model.left
    x = torch.rand(3, 2, 9, 8, dtype=torch.float64)
    noise = torch.randn(3, model.network.latent, dtype=torch.float64)
    betas = torch.tensor([0.02, 0.5, 8.0], dtype=torch.float64)
    with torch.no_grad():
        each = model(x, noise, beta=betas)
        for i, beta in enumerate(betas.tolist()):
            whole = model(x, noise, beta=beta)
            for one, other in zip(each[:3], whole[:3], strict=True):
                torch.testing.assert_close(one[i], other[i], rtol=1e-8, atol=1e-8)
        baked = mk.bake(model, 0.5)(x, noise)
        for one, other in zip(baked[:3], model(x, noise, beta=0.5)[:3], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("multi_rate", [True, False])
def test_a_short_training_lowers_the_loss(multi_rate):
    torch.manual_seed(0)
    network = build("hvae", (1, 8, 8), **{**SMALL, "latents": (3, 2), "halve": (1, 2)})
    rows = torch.arange(8).view(1, 1, 8, 1)
    data = torch.exp(-((rows - torch.randint(8, (64, 1, 1, 1))) ** 2) / 4.0).expand(64, 1, 8, 8)
    model = mk.multirate(network, {"encoder": "softplus", "decoder": "softplus"}) if multi_rate else network
    optimizer = torch.optim.Adamax(model.parameters(), lr=5e-3)
    losses = []
    for step in range(40):
        x = data[32 * (step % 2) :][:32]
        beta = sample_beta(32) if multi_rate else 1.0
        out = model(x, beta=beta) if multi_rate else model(x)
        objective = beta_vae(out, x, beta, network.likelihood, free_bits=0.5)
        optimizer.zero_grad()
        objective.loss.backward()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
        optimizer.step()
        losses.append(objective.loss.item())
    assert np.isfinite(losses).all() and np.mean(losses[-5:]) < losses[0] - 20, losses


def test_rates_at_the_means_are_divergences_there():
    """log q - log p at the mean itself lacks (r^2 - 1) / 2 a latent variable: 833 nats where the rate was 615."""
    torch.manual_seed(0)
    network = build("hvae", (1, 16, 16), latents=(4, 3), channels=8, halve=(1,), blocks=1, head_kernel=3)
    network = network.double().eval()
    with torch.no_grad():
        for stage in network.encoder:
            bias = stage.head[1].bias
            bias[len(bias) // 2 :] -= 2  # posteriors that know something
    x = torch.rand(2, 1, 16, 16).double()
    zeros = torch.zeros(2, network.latent).double()
    _, pairs = network.descend(network.ascend(x), network._by_group(zeros))
    normal = torch.distributions.Normal
    expected = [torch.distributions.kl_divergence(normal(*q), normal(*p)) for q, p in pairs]
    found = network.at_means(x)
    torch.testing.assert_close(found.rates, torch.stack([kl.flatten(1).sum(1) for kl in expected], 1))
    drawn = torch.stack([network(x).rates.sum(1) for _ in range(200)]).mean(0)
    torch.testing.assert_close(found.rates.sum(1), drawn, rtol=0.05, atol=0)
    torch.testing.assert_close(found.parameters, network(x, zeros).parameters)


def test_noise_of_another_batch_is_refused():
    network = build("hvae", (1, 8, 8), latents=(3, 2), channels=4, halve=(1,), blocks=1, head_kernel=3)
    with pytest.raises(ValueError, match="noise has 1 rows and x has 5 examples"):
        network(torch.rand(5, 1, 8, 8), torch.randn(1, network.latent))


@pytest.mark.slow
def test_a_run_from_the_command_line_to_the_programs(tmp_path):
    """train, curve and bake; what is baked has one sigma, that of its beta."""
    images = np.random.default_rng(0).integers(0, 256, (30, 6, 6), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", train_images=images[:24], test_images=images[24:])
    run = str(tmp_path / "run")
    options = ["--set", "latents=2,2", "--set", "channels=4", "--set", "halve=1", "--set", "blocks=1"]
    options += ["--batch-size", "8", "--epochs", "2", "--validate-every", "1", "--log-to", "none", "--quiet"]
    data = ["--data", str(tmp_path / "images.npz")]
    assert main(["train", "--network", "hvae", *data, "--out", run, *options]) == 0
    assert main(["curve", "--run", run, "--betas", "0.1", "1"]) == 0
    assert main(["bake", "--run", run, "--beta", "0.5"]) == 0
    plain, description = load_model(tmp_path / "run" / "baked-0.5")
    assert description["model"]["likelihood"] == "gaussian-optimal" and not plain.likelihood.depends_on_beta
    x = torch.rand(3, 1, 6, 6)
    program = torch.export.load(tmp_path / "run" / "baked-0.5" / "model.pt2").module()
    reconstruction, _, rates = program(x)
    torch.testing.assert_close(reconstruction, plain.reconstruct(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rates, plain.at_means(x).rates, rtol=1e-4, atol=1e-4)

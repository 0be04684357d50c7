"""SVG-LP: published sizes, the rate by hand, which frame sees which, predictions, training, and runs on video."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from mrvae_models.cli import main
from mrvae_models.config import TrainConfig
from mrvae_models.curve import evaluate
from mrvae_models.likelihoods import Bernoulli, Gaussian, GaussianPixel
from mrvae_models.networks import build
from mrvae_models.networks.frames import widths_of
from mrvae_models.objectives import beta_vae, sample_beta
from mrvae_models.pictures import pictures
from mrvae_models.run import build_model, describe, load_model
from mrvae_models.vae import target_of
from torch import Tensor, nn

import mrvae_kernels as mk

SMALL = {"width": 4, "features": 6, "hidden": 8}


def small(frames=5, side=16, colours=1, latent=3, **options):
    torch.manual_seed(0)
    return build("svg-lp", (frames, colours, side, side), latent, **{"likelihood": Gaussian(), **SMALL, **options})


def moving_bars(n: int, frames: int, side: int = 16) -> Tensor:
    """Bright bars that move down by a row a frame, from one drawn by torch's generator: (n, frames, 1, side, side)."""
    rows = (torch.randint(side, (n, 1)) + torch.arange(frames)) % side
    places = torch.arange(side)
    bars = torch.exp(-((places[None, None, :] - rows[..., None]) ** 2) / 2.0)
    return bars[:, :, None, :, None].expand(n, frames, 1, side, side).contiguous()


@pytest.mark.parametrize(
    ("shape", "latent", "backbone", "count", "millions"),
    [
        ((15, 1, 64, 64), 10, "dcgan", 12_614_057, 12.61),
        ((12, 3, 64, 64), 64, "vgg", 22_831_747, 22.83),
    ],
)
def test_the_published_networks_have_their_parameters(shape, latent, backbone, count, millions):
    with torch.device("meta"):
        network = build("svg-lp", shape, latent, backbone=backbone)
        out = network(torch.empty(2, *shape))
    found = sum(parameter.numel() for parameter in network.parameters())
    assert found == count and round(found / 1e6, 2) == millions
    frames = shape[0] - 1
    assert out.parameters.shape == (2, shape[1], frames, 64, 64)
    assert out.mean.shape == out.rates.shape == (2, frames * latent) and network.latent == frames * latent


@pytest.mark.parametrize("side", [16, 32, 128])
@pytest.mark.parametrize("backbone", ["dcgan", "vgg"])
def test_any_power_of_two_is_a_side(side, backbone):
    with torch.device("meta"):
        network = build("svg-lp", (4, 2, side, side), 3, backbone=backbone, **SMALL)
        assert network(torch.empty(2, 4, 2, side, side)).parameters.shape == (2, 2, 3, side, side)
    assert widths_of(128, 64) == [64, 128, 256, 512, 512]


def test_the_rate_is_the_kl_between_posterior_and_learned_prior_by_hand():
    """The heads set to numbers: q = N(0.5, s_q), p = N(-0.25, s_p) at each of 4 times and 3 dimensions."""
    network = small().eval()
    with torch.no_grad():
        for recurrence, mean, log_sigma in (
            (network.encoder.posterior, 0.5, math.log(0.2)), (network.decoder.prior, -0.25, math.log(1.5)),
        ):
            for head, value in ((recurrence.mean, mean), (recurrence.log_sigma, log_sigma)):
                head.weight.zero_()
                head.bias.fill_(value)
    mean_q, mean_p = (5 * math.tanh(value / 5) for value in (0.5, -0.25))
    sigma_q, sigma_p = (math.exp(5 * math.tanh(math.log(value) / 5)) + 0.01 for value in (0.2, 1.5))
    by_hand = math.log(sigma_p / sigma_q) + (sigma_q**2 + (mean_q - mean_p) ** 2) / (2 * sigma_p**2) - 0.5
    x = torch.rand(2, 5, 1, 16, 16)
    out = network(x)
    torch.testing.assert_close(out.rates, torch.full((2, 12), by_hand), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.mean, torch.full((2, 12), mean_q - mean_p), rtol=1e-5, atol=1e-6)
    objective = beta_vae(out, target_of(network, x), 0.5, network.likelihood)
    torch.testing.assert_close(objective.rate, torch.full((2,), 12 * by_hand), rtol=1e-5, atol=1e-5)


def test_the_distortion_is_of_all_frames_but_the_first():
    network = small(colours=3).eval()
    x = torch.rand(2, 5, 3, 16, 16)
    out = network(x)
    means = out.parameters.transpose(1, 2)
    expected = 0.5 * (x[:, 1:] - means).square().flatten(1).sum(1) + 0.5 * x[0, 1:].numel() * math.log(2 * math.pi)
    torch.testing.assert_close(network.likelihood.distortion(out.parameters, target_of(network, x)), expected)
    torch.testing.assert_close(network.video(x, out.parameters), torch.cat([x[:, :1], means], 1))
    image = torch.rand(2, 3)
    assert target_of(build("mlp", (3,), 2, hidden=()), image) is image


def test_what_a_frame_depends_on():
    """Frame t of the output: x_1 ... x_{t-1} and, by the posterior alone, x_t. Posteriors and priors look back only."""
    network = small(frames=6, n_past=2).double().eval()
    x = torch.rand(2, 6, 1, 16, 16, dtype=torch.float64)
    noise = torch.randn(2, network.latent, dtype=torch.float64)
    out = network(x, noise)
    other = x.clone()
    other[:, 3] = 1 - other[:, 3]
    changed = network(other, noise)
    same = [torch.equal(out.parameters[:, :, t], changed.parameters[:, :, t]) for t in range(5)]
    assert same == [True, True, False, False, False]
    posterior, _ = network.encoder.posterior(torch.stack([network.encoder.frames(f)[0] for f in x.unbind(1)], 1)[:, 1:])
    prior, _ = network.decoder.prior(torch.stack([network.encoder.frames(f)[0] for f in x.unbind(1)], 1)[:, :-1])
    torch.testing.assert_close(out.mean, (posterior.mean - prior.mean).flatten(1))


def test_skips_come_from_the_last_known_frame():
    network = small(frames=6, n_past=3).double().eval()
    maps: list[Tensor] = []
    network.decoder.frames.register_forward_pre_hook(lambda module, inputs: maps.append(inputs[1][0]))
    x = torch.rand(1, 6, 1, 16, 16, dtype=torch.float64)
    network(x)
    first = [network.encoder.frames(frame)[1][0] for frame in x.unbind(1)]
    for found, frame in zip(maps, (0, 1, 2, 2, 2), strict=True):
        torch.testing.assert_close(found, first[frame])


@pytest.mark.parametrize(("likelihood", "channels", "squashed"), [
    (Gaussian(), 2, True), (Bernoulli(), 2, False), (GaussianPixel(), 4, False),
])
def test_the_output_fits_the_likelihood(likelihood, channels, squashed):
    network = small(colours=2, likelihood=likelihood)
    x = torch.rand(3, 5, 2, 16, 16)
    out = network(x)
    assert out.parameters.shape == (3, channels, 4, 16, 16)
    assert likelihood.distortion(out.parameters, target_of(network, x)).shape == (3,)
    assert isinstance(network.decoder.frames.stages[-1][-1], nn.Sigmoid) is squashed
    assert network.predict(x).shape == x.shape


def test_predictions_begin_with_the_given_frames_and_follow_the_learned_prior():
    network = small(frames=5, n_past=2).eval()
    x = torch.rand(3, 5, 1, 16, 16)
    with torch.no_grad():
        first = network.predict(x, generator=torch.Generator().manual_seed(1))
        assert first.shape == x.shape and torch.equal(first[:, :2], x[:, :2])
        other = x.clone()
        other[:, 2:] = 0
        again = network.predict(other[:, :2], generator=torch.Generator().manual_seed(1))
        assert torch.equal(first, again), "frames after n_past are not looked at"
        different = network.predict(x, generator=torch.Generator().manual_seed(2))
        assert not torch.equal(first[:, 2:], different[:, 2:])
        assert network.predict(x, frames=9).shape == (3, 9, 1, 16, 16)


def test_a_prediction_with_the_prior_as_posterior_is_the_forward_pass_on_it():
    """Where q = p, predicting from a video's own continuation by the same noise reproduces it: state by state."""
    network = small(frames=6, n_past=2).double().eval()
    network.encoder.posterior.load_state_dict(network.decoder.prior.state_dict())
    with torch.no_grad():
        for recurrence in (network.encoder.posterior, network.decoder.prior):
            for head in (recurrence.mean, recurrence.log_sigma):
                head.weight.zero_()  # of no frame, so that q and p agree though they see other frames
        noise = torch.randn(2, network.latent, dtype=torch.float64)
        made = network.predict(torch.rand(2, 2, 1, 16, 16, dtype=torch.float64), noise)
        out = network(made, noise)
    assert out.rates.abs().max() < 1e-12
    torch.testing.assert_close(network.video(made, out.parameters)[:, 2:], made[:, 2:], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((1, 28, 28), {}, "takes videos of square frames"),
        ((5, 1, 16, 32), {}, "takes videos of square frames"),
        ((5, 1, 24, 24), {}, "frames are 24x24; expected a power of two of at least 16"),
        ((5, 1, 8, 8), {}, "frames are 8x8"),
        ((5, 1, 16, 16), {"backbone": "resnet"}, "backbone is 'resnet'; expected one of dcgan, vgg"),
        ((5, 1, 16, 16), {"n_past": 5}, "n_past is 5 and videos have 5 frames"),
        ((5, 1, 16, 16), {"hidden": 0}, "hidden holds 0"),
    ],
)
def test_what_cannot_work_is_refused(shape, options, message):
    with pytest.raises(ValueError, match=message):
        build("svg-lp", shape, 3, **options)


def test_data_of_another_shape_are_refused():
    network = small()
    with pytest.raises(ValueError, match=r"x has shape \(2, 4, 1, 16, 16\); expected videos, \(N, 5, 1, 16, 16\)"):
        network(torch.rand(2, 4, 1, 16, 16))
    with pytest.raises(ValueError, match=r"expected videos, \(N, at least 2, 1, 16, 16\)"):
        network.predict(torch.rand(2, 1, 1, 16, 16))
    with pytest.raises(ValueError, match=r"first 2 frames, predict\(x\), in place of sample\(4\)"):
        network.sample(4)
    with pytest.raises(ValueError, match="frames is 2; expected more than the 2"):
        network.predict(torch.rand(2, 5, 1, 16, 16), frames=2)
    with pytest.raises(ValueError, match=r"noise has shape \(2, 5\); expected \(2, 12\)"):
        network(torch.rand(2, 5, 1, 16, 16), torch.randn(2, 5))


def multi_rate(frames: int = 5, **options) -> mk.MultiRate:
    torch.manual_seed(0)
    config = TrainConfig(network="svg-lp", latent=3, network_options={**SMALL, **options}, likelihood="gaussian")
    config.check()
    assert config.recipe == "video"
    return build_model(describe(config, (frames, 1, 16, 16)))


@pytest.mark.parametrize("backbone", ["dcgan", "vgg"])
def test_multi_rate_is_the_baked_network_at_each_beta(backbone):
    model = multi_rate(4, backbone=backbone).double().eval()
    assert all("batch normalisation" in reason for reason in model.left.values())
    layers = {type(module).__name__ for name, module in model.network.named_modules() if name in model.gated}
    assert {"HostedLinear", "HostedLSTM", "HostedBatchNorm2d", "HostedConvTranspose2d"} <= layers
    x = torch.rand(3, 4, 1, 16, 16, dtype=torch.float64)
    noise = torch.randn(3, model.network.latent, dtype=torch.float64)
    betas = torch.tensor([0.02, 0.5, 8.0], dtype=torch.float64)
    with torch.no_grad():
        each = model(x, noise, beta=betas)
        for i, beta in enumerate(betas.tolist()):
            whole = model(x, noise, beta=beta)
            for one, other in zip(each[:3], whole[:3], strict=True):
                torch.testing.assert_close(one[i], other[i], rtol=1e-9, atol=1e-9)
        with model.at(0.5):
            predicted = model.network.predict(x, noise)
        expected = model(x, noise, beta=0.5)
        model.recalibrate([x], 0.5)
        calibrated = model(x, noise, beta=0.5)
        with pytest.warns(UserWarning, match="running statistics"):
            baked = mk.bake(multi_rate(4, backbone=backbone).double().eval(), 0.5)
        for one, other in zip(baked(x, noise)[:3], expected[:3], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(baked.predict(x, noise), predicted, rtol=1e-6, atol=1e-6)
        assert not torch.equal(calibrated.parameters, expected.parameters)


@pytest.mark.parametrize("several", [True, False])
def test_a_short_training_lowers_the_loss(several):
    torch.manual_seed(0)
    data = moving_bars(48, 4)
    model = multi_rate(4) if several else small(4)
    network = model.network if several else model
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    losses = []
    for step in range(40):
        x = data[24 * (step % 2) :][:24]
        beta = sample_beta(24) if several else 1.0
        out = model(x, beta=beta) if several else model(x)
        objective = beta_vae(out, target_of(network, x), beta, network.likelihood)
        optimizer.zero_grad()
        objective.loss.backward()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
        optimizer.step()
        losses.append(objective.loss.item())
    assert np.isfinite(losses).all() and np.mean(losses[-5:]) < losses[0] - 40, losses


class Videos:
    def __init__(self, examples: Tensor) -> None:
        self.examples = examples


def test_the_curve_and_the_pictures_are_of_videos():
    model = multi_rate(4)
    torch.manual_seed(3)
    x = moving_bars(6, 4)
    curve = evaluate(model, Videos(x), [0.1, 1.0], calibration=x)
    assert len(curve.points) == 2 and all(math.isfinite(point.objective) for point in curve.points)
    constant = 0.5 * x[0, 1:].numel() * math.log(2 * math.pi)
    assert all(point.distortion > constant for point in curve.points)
    grid = pictures(model, Videos(x), [0.1, 1.0], calibration=x)
    assert grid.originals.shape == (4, 1, 16, 16)
    assert grid.reconstructions.shape == grid.samples.shape == (2, 4, 1, 16, 16)
    assert torch.equal(grid.samples[0, :2], grid.originals[:2]), "predictions go on from the same frames"
    assert torch.equal(grid.reconstructions[1, 0], grid.originals[0])


@pytest.mark.slow
def test_a_run_on_clips_from_the_command_line_to_the_programs(tmp_path):
    """train, curve and bake on a file of clips; the baked programs are the network at that beta."""
    torch.manual_seed(0)
    clips = (255 * moving_bars(30, 3)[:, :, 0]).round().to(torch.uint8).numpy()
    np.savez(tmp_path / "clips.npz", train_images=clips[:24], test_images=clips[24:])
    run = str(tmp_path / "run")
    options = ["--set", "width=4", "--set", "features=6", "--set", "hidden=8", "--set", "layers=1", "--latent", "3"]
    options += ["--ema", "0.9", "--batch-size", "8", "--epochs", "2", "--validate-every", "1"]
    options += ["--log-to", "csv", "--quiet"]
    data = ["--data", str(tmp_path / "clips.npz"), "--layout", "NTHW"]
    assert main(["train", "--network", "svg-lp", *data, "--out", run, *options]) == 0
    assert main(["curve", "--run", run, "--betas", "0.1", "1"]) == 0
    assert (tmp_path / "run" / "curve.png").exists()
    assert main(["bake", "--run", run, "--beta", "0.5"]) == 0
    plain, description = load_model(tmp_path / "run" / "baked-0.5")
    assert description["model"]["likelihood"] == "gaussian-optimal" and not plain.likelihood.depends_on_beta
    x, noise = torch.rand(3, 3, 1, 16, 16), torch.randn(3, plain.latent)
    program = torch.export.load(tmp_path / "run" / "baked-0.5" / "model.pt2").module()
    video, mean, rates = program(x)
    out = plain.at_means(x)
    torch.testing.assert_close(video, plain.reconstruct(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mean, out.mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(rates, out.rates, rtol=1e-4, atol=1e-5)
    following = torch.export.load(tmp_path / "run" / "baked-0.5" / "decoder.pt2").module()
    torch.testing.assert_close(following(x, noise), plain.predict(x, noise), rtol=1e-5, atol=1e-5)

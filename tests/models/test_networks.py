"""Networks: parameter counts of the paper, shapes of any data, errors for sizes that cannot work."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from mrvae_models.likelihoods import Bernoulli, Gaussian
from mrvae_models.network_names import NETWORK_NAMES
from mrvae_models.networks import NETWORKS, build, start_from
from mrvae_models.networks.stack import ResidualBlock
from mrvae_models.objectives import rate
from torch import nn


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("shape", "latent", "latent_used", "count"),
    [
        ((1, 28, 28), None, 32, 17_526_977),
        ((3, 32, 32), None, 256, 40_462_723),
        ((3, 64, 64), None, 64, 34_594_563),
        ((3, 32, 32), 32, 32, 23_947_203),  # SVHN
    ],
)
def test_cnn_of_the_paper_has_its_parameters_and_shapes(shape, latent, latent_used, count):
    with torch.device("meta"):
        vae = build("cnn", shape, latent)
        out = vae(torch.empty(2, *shape))
    assert parameters(vae) == count
    assert vae.latent == latent_used and out.mean.shape == out.log_variance.shape == (2, latent_used)
    assert out.parameters.shape == (2, *shape)


@pytest.mark.parametrize(
    ("shape", "latent", "latent_used", "count"),
    [
        ((1, 28, 28), None, 32, 1_881_217),
        ((3, 32, 32), None, 256, 7_896_963),
        ((3, 64, 64), None, 64, 2_770_819),
        ((3, 32, 32), 32, 32, 2_391_491),  # SVHN
    ],
)
def test_resnet_of_the_paper_has_its_parameters_and_shapes(shape, latent, latent_used, count):
    with torch.device("meta"):
        vae = build("resnet", shape, latent)
        out = vae(torch.empty(2, *shape))
    assert parameters(vae) == count
    assert vae.latent == latent_used and out.mean.shape == out.log_variance.shape == (2, latent_used)
    assert out.parameters.shape == (2, *shape)
    assert isinstance(vae.decoder[-1], nn.ConvTranspose2d)
    after = [type(b).__name__ for a, b in pairwise(vae.encoder.body) if not isinstance(a, nn.ReLU)]
    assert after == ["ReLU"] * len(after)


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((1, 28, 28), {"channels": (8, 6)}),
        ((3, 64, 64), {"blocks": 1}),
        ((2, 17, 31), {"channels": (4, 6, 8), "blocks": 3, "activation": "elu"}),
        ((3, 37, 96), {}),
    ],
)
def test_resnet_output_has_the_shape_of_any_input(shape, options):
    with torch.device("meta"):
        vae = build("resnet", shape, 5, **options)
        assert vae(torch.empty(2, *shape)).parameters.shape == (2, *shape)
    assert sum(isinstance(m, ResidualBlock) for m in vae.modules()) == 2 * options.get("blocks", 2)


def test_cnn_decoder_ends_in_logits():
    with torch.device("meta"):
        vae = build("cnn", (1, 28, 28))
    assert isinstance(vae.decoder[-1], nn.ConvTranspose2d)
    assert [type(layer).__name__ for layer in vae.encoder.body[:3]] == ["Conv2d", "BatchNorm2d", "ReLU"]


@pytest.mark.parametrize(
    ("shape", "channels"),
    [
        ((1, 28, 28), (32, 64)),
        ((1, 28, 28), (8, 16, 32)),
        ((3, 32, 32), (16,)),
        ((2, 17, 31), (4, 6, 8)),
        ((3, 37, 96), (4, 4, 4, 4, 4)),
        ((1, 2, 3), (4,)),
        ((4, 105, 105), (128, 256, 512, 1024)),
    ],
)
@pytest.mark.parametrize("norm", ["batch", "group", "none"])
def test_cnn_output_has_the_shape_of_any_input(shape, channels, norm):
    with torch.device("meta"):
        vae = build("cnn", shape, 5, channels=channels, norm=norm)
        assert vae(torch.empty(2, *shape)).parameters.shape == (2, *shape)
    norms = [m for m in vae.modules() if isinstance(m, (nn.BatchNorm2d, nn.GroupNorm))]
    assert len(norms) == (0 if norm == "none" else 2 * len(channels) - 1)


@pytest.mark.parametrize(
    ("name", "options"), [("mlp", {}), ("cnn", {"channels": (4, 8)}), ("resnet", {"channels": (4, 8)})]
)
def test_every_parameter_gets_a_gradient(name, options):
    torch.manual_seed(0)
    vae = build(name, (1, 12, 10), 3, **options)
    out = vae(torch.rand(6, 1, 12, 10))
    (out.parameters.square().sum() + out.mean.square().sum() + out.log_variance.square().sum()).backward()
    for key, parameter in vae.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), key
        assert parameter.grad.abs().sum() > 0 or key.endswith("bias"), key


def test_mlp_default_is_784_300_16():
    vae = build("mlp", (1, 28, 28))
    assert parameters(vae) == (784 * 300 + 300) + 2 * (300 * 16 + 16) + (16 * 300 + 300) + (300 * 784 + 784)
    assert isinstance(vae.likelihood, Bernoulli) and vae.latent == 16


@pytest.mark.parametrize("shape", [(784,), (1, 28, 28), (2, 3, 4, 5)])
@pytest.mark.parametrize("hidden", [(), (7,), (9, 5)])
def test_mlp_takes_any_shape_and_depth(shape, hidden):
    vae = build("mlp", shape, 3, hidden=hidden, activation="tanh")
    out = vae(torch.rand(2, *shape))
    assert out.parameters.shape == (2, *shape) and out.z.shape == (2, 3)
    linears = [m for m in vae.decoder if isinstance(m, nn.Linear)]
    assert [m.out_features for m in linears[:-1]] == list(reversed(hidden))


def test_the_beta_tcvae_mlp_has_its_parameters_and_layers():
    with torch.device("meta"):
        vae = build("tcvae-mlp", (1, 64, 64))
        assert vae(torch.empty(2, 1, 64, 64)).parameters.shape == (2, 1, 64, 64)
    assert parameters(vae) == 14_196_516 and vae.latent == 10
    kinds = [type(layer).__name__ for layer in (*vae.encoder.body, *vae.decoder)]
    assert kinds == ["Flatten", *["Linear", "ReLU"] * 2, *["Linear", "Tanh"] * 3, "Linear", "Unflatten"]
    assert [m.in_features for m in vae.decoder if isinstance(m, nn.Linear)] == [10, 1200, 1200, 1200]
    assert build("tcvae-mlp", (7,), 2, width=5)(torch.rand(3, 7)).parameters.shape == (3, 7)


def test_the_beta_tcvae_convolutions_are_the_authors():
    with torch.device("meta"):
        vae = build("tcvae-conv", (1, 64, 64))
        assert vae(torch.empty(2, 1, 64, 64)).parameters.shape == (2, 1, 64, 64)
        down = (nn.Conv2d(1, 32, 4), nn.Conv2d(32, 32, 4), nn.Conv2d(32, 64, 4), nn.Conv2d(64, 64, 4))
        up = (nn.Conv2d(10, 512, 1), nn.Conv2d(512, 64, 4), nn.Conv2d(64, 64, 4), nn.Conv2d(64, 32, 4))
        ends = (nn.Conv2d(64, 512, 4), nn.Conv2d(512, 20, 1), nn.Conv2d(32, 32, 4), nn.Conv2d(32, 1, 4))
    norms = 2 * (32 + 32 + 64 + 64 + 512) + 2 * (512 + 64 + 64 + 32 + 32)
    assert parameters(vae) == sum(parameters(layer) for layer in (*down, *up, *ends)) + norms == 1_298_581
    stack = [m for m in vae.encoder.body if isinstance(m, nn.Conv2d)]
    assert [(m.out_channels, m.stride[0], m.padding[0]) for m in stack] == [
        (32, 2, 1), (32, 2, 1), (64, 2, 1), (64, 2, 1), (512, 1, 0)
    ]
    assert sum(isinstance(m, nn.BatchNorm2d) for m in vae.modules()) == 10
    assert isinstance(vae.decoder[-1], nn.ConvTranspose2d)


def test_every_network_has_its_name_in_the_list_for_the_help():
    assert tuple(NETWORKS) == NETWORK_NAMES


def test_gates_can_be_chosen_by_the_prefixes_encoder_and_decoder():
    for name in NETWORKS:
        with torch.device("meta"):
            vae = build(name, {"lstm": (20, 100), "svg-lp": (3, 1, 64, 64)}.get(name, (1, 64, 64)))
        layers = [key for key, m in vae.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d))]
        assert {key.split(".")[0] for key in layers} == {"encoder", "decoder"}, name


def test_likelihood_by_name_or_instance():
    assert build("mlp", (4,), likelihood="gaussian", sigma=0.2).likelihood.sigma == 0.2
    own = Gaussian(3.0)
    assert build("mlp", (4,), likelihood=own).likelihood is own


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: build("vgg", (1, 28, 28)), "'vgg'.*linear, mlp, cnn"),
        (lambda: build("mlp", (1, 28, 28), depth=3), "no option 'depth'.*activation, hidden"),
        (lambda: build("mlp", (1, 28, 28), 0), "latent holds 0"),
        (lambda: build("mlp", (1, 28, 28), 2.5), "latent holds 2.5"),
        (lambda: build("mlp", (1, 28, 28), hidden=(300, -1)), "hidden holds -1"),
        (lambda: build("mlp", ()), "input_shape is empty"),
        (lambda: build("mlp", (1, 0, 28)), "input_shape holds 0"),
        (lambda: build("mlp", (4,), activation="sin"), "'sin'.*relu"),
        (lambda: build("mlp", (4,), sigma=0.5), "sigma=0.5 needs"),
        (lambda: build("cnn", (784,)), r"\(784,\).*channels, height, width"),
        (lambda: build("cnn", (1, 8, 8)), "8x8 cannot be halved 4 times.*at most 3"),
        (lambda: build("cnn", (1, 1, 8), channels=(4,)), "1x8 cannot be halved 1 times.*'mlp'"),
        (lambda: build("cnn", (1, 28, 28), channels=()), "channels is empty"),
        (lambda: build("cnn", (1, 28, 28), norm="layer"), "'layer'.*'batch'"),
        (lambda: build("resnet", (1, 28, 28), channels=()), "channels is empty"),
        (lambda: build("resnet", (1, 28, 28), blocks=0), "blocks holds 0"),
        (lambda: build("tcvae-conv", (1, 28, 28)), r"\(1, 28, 28\).*64x64.*--resize 64"),
        (lambda: build("tcvae-mlp", (4,), width=0), "width holds 0"),
        (lambda: build("resnet", (1, 4, 4)), "4x4 cannot be halved 3 times.*at most 2"),
        (lambda: build("sigma-cnn", (1, 3, 4)), "3x4 cannot be halved 2 times; expected sides of at least 4: .*'mlp'"),
        (lambda: build("mlp", (4,), hidden="300"), "hidden is '300'; expected whole numbers"),
        (lambda: build("hvae", (1, 16, 16), skips="no"), "skips is 'no'; expected true or false"),
        (lambda: build("nvae", (1, 16, 16), adaptive="no"), "adaptive is 'no'; expected true or false"),
        (lambda: build("nvae", (1, 16, 16), regularisation="abc"), "regularisation is 'abc'; expected a finite number"),
        (lambda: build("lstm", (9, 30), deep_heads="no"), "deep_heads is 'no'; expected true or false"),
        (lambda: build("lstm", (9, 30), dropout="a"), "dropout is 'a'; expected a part"),
    ],
)
def test_what_cannot_work_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_one_size_may_stand_alone():
    assert parameters(build("mlp", (4,), hidden=7)) == parameters(build("mlp", (4,), hidden=(7,)))
    assert parameters(build("cnn", (1, 8, 8), channels=4)) == parameters(build("cnn", (1, 8, 8), channels=(4,)))


# The linear VAE


def reverse_water_filling(eigenvalues: torch.Tensor, latent: int, beta: float) -> tuple[float, float]:
    """The best distortion (without its constant) and rate of a linear VAE at beta."""
    kept, rest = eigenvalues[:latent], eigenvalues[latent:]
    rate = 0.5 * torch.log(kept / beta).clamp_min(0).sum()
    return (0.5 * (kept.clamp_max(beta).sum() + rest.sum())).item(), rate.item()


@pytest.mark.parametrize("beta", [0.01, 0.3, 2.0, 100.0])
def test_linear_holds_the_closed_form_optimum(beta):
    torch.manual_seed(0)
    x = torch.randn(200, 12, dtype=torch.float64) @ torch.randn(12, 12, dtype=torch.float64) + 3
    centred = x - x.mean(0)
    eigenvalues, vectors = torch.linalg.eigh(centred.T @ centred / len(x))
    eigenvalues, vectors = eigenvalues.flip(0), vectors.flip(1)[:, :4]
    vae = build("linear", (12,), 4).double()
    start_from(vae, x)
    columns = (eigenvalues[:4] - beta).clamp_min(0).sqrt()  # of the decoder, along the principal directions
    with torch.no_grad():  # MR-VAE, Eqn. 20 to 22, with the rotation a permutation
        rotation = torch.eye(4, dtype=torch.float64)[[2, 0, 3, 1]]
        vae.encoder.first.weight.copy_(vectors.T)
        vae.encoder.second.weight.copy_(rotation @ torch.diag(columns / (columns**2 + beta)))
        vae.encoder.variance.weight.copy_(rotation @ (beta / (columns**2 + beta))[:, None])
        vae.decoder[0].weight.copy_(rotation.T)
        vae.decoder[1].weight.copy_(vectors * columns)
        mean, log_variance = vae.encode(x)
        residual = (x - vae.decode(mean)).square().sum(1)
        spread = (log_variance.exp() * (vae.decoder[1].weight @ vae.decoder[0].weight).square().sum(0)).sum(1)
        distortion = 0.5 * (residual + spread).mean().item()  # the mean over z, exactly
    expected = reverse_water_filling(eigenvalues, 4, beta)
    assert (distortion, rate(mean, log_variance).mean().item()) == pytest.approx(expected, rel=1e-10, abs=1e-10)


def test_linear_starts_as_a_projection_around_the_mean():
    torch.manual_seed(0)
    vae = build("linear", (1, 5, 4), 3)
    x = torch.rand(7, 1, 5, 4)
    start_from(vae, x)
    centred = (x - x.mean(0)).flatten(1)
    weight = vae.encoder.first.weight
    torch.testing.assert_close(weight @ weight.T, torch.eye(3), rtol=0, atol=1e-6)
    expected = x.mean(0) + (centred @ weight.T @ weight).reshape(x.shape)
    torch.testing.assert_close(vae.reconstruct(x), expected, rtol=0, atol=1e-5)
    assert isinstance(vae.likelihood, Gaussian) and vae.likelihood.sigma == 1


def test_linear_variance_that_is_gated_to_zero_stays_finite():
    vae = build("linear", (6,), 2)
    torch.nn.init.zeros_(vae.encoder.variance.weight)
    mean, log_variance = vae.encode(torch.rand(3, 6))
    assert torch.isfinite(rate(mean, log_variance)).all()


def test_linear_with_more_latents_than_data():
    with pytest.raises(ValueError, match="latent is 7.*6 values"):
        build("linear", (2, 3), 7)

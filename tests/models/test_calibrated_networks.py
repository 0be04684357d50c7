"""The networks of the sigma-VAE and Beta-Sigma VAE papers: published sizes, any image, formulas of their blocks."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from mrvae_models.likelihoods import Bernoulli, Gaussian, GaussianImage, GaussianOptimal, GaussianPixel
from mrvae_models.networks import build
from mrvae_models.networks.stack import EachNorm, NormedBlock
from torch import nn

import mrvae_kernels as mk


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def conv(channels: int, out: int, kernel: int, normed: bool = True) -> int:
    """Parameters of a convolution and of the batch norm after it."""
    return channels * out * kernel**2 + out + 2 * out * normed


def residual(channels: int, out: int) -> int:
    return conv(channels, out, 3) + conv(out, out, 3) + (conv(channels, out, 1) if channels != out else 0)


def test_the_sigma_vae_network_of_svhn_has_its_parameters():
    with torch.device("meta"):
        vae = build("sigma-cnn", (3, 28, 28), likelihood=Gaussian())
        out = vae(torch.empty(2, 3, 28, 28))
    assert parameters(vae) == 992_427
    assert vae.latent == 20 and out.parameters.shape == (2, 3, 28, 28)
    assert vae.encoder.mean.in_features == vae.decoder[0].out_features == 6272
    kernels = [layer.kernel_size[0] for layer in vae.modules() if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d))]
    assert kernels == [3, 4, 5, 6, 6, 5]


def test_the_default_likelihoods_are_the_papers():
    with torch.device("meta"):
        assert isinstance(build("sigma-cnn", (3, 28, 28)).likelihood, GaussianOptimal)
        assert isinstance(build("bs-vae", (3, 32, 32)).likelihood, GaussianImage)


def test_the_sigma_vae_network_ends_in_a_sigmoid_where_its_output_is_the_mean():
    for likelihood, last, channels in ((Gaussian(), nn.Sigmoid, 3), (Bernoulli(), nn.ConvTranspose2d, 3),
                                       (GaussianPixel(), nn.ConvTranspose2d, 6)):
        vae = build("sigma-cnn", (3, 8, 8), 4, channels=2, likelihood=likelihood)
        assert type(vae.decoder[-1]) is last
        assert vae(torch.rand(2, 3, 8, 8)).parameters.shape == (2, channels, 8, 8)


@pytest.mark.parametrize(
    ("shape", "widths", "latent", "side"),
    [
        ((3, 64, 64), (32, 64, 128, 256), 64, 4),  # CelebA
        ((1, 28, 28), (32, 64, 128), 32, 4),  # MNIST
        ((3, 32, 32), (32, 64, 128), 32, 4),
    ],
)
def test_the_bs_vae_networks_have_the_parameters_of_their_layers(shape, widths, latent, side):
    with torch.device("meta"):
        vae = build("bs-vae", shape)
        assert vae(torch.empty(2, *shape)).parameters.shape == (2, *shape)
    top = widths[-1] * side**2
    expected = sum(residual(a, b) + residual(b, b) for a, b in zip((shape[0], *widths), widths, strict=False))
    expected += (top + 1) * 2 * latent + 2 * 2 * latent + (2 * latent + 1) * 2 * latent  # Linear, norm, the heads
    expected += (latent + 1) * top + 2 * top + residual(widths[-1], widths[-1])
    back = [*widths[::-1], widths[0]]
    expected += sum(conv(a, b, 3) for a, b in zip(back, back[1:], strict=False)) + conv(back[-1], shape[0], 3, False)
    assert parameters(vae) == expected and vae.latent == latent


@pytest.mark.parametrize(
    ("name", "options"), [("sigma-cnn", {"channels": 2}), ("bs-vae", {"channels": (4, 6, 5)}), ("bs-vae", {})]
)
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (2, 17, 31), (3, 37, 70), (1, 5, 8)])
def test_the_output_has_the_shape_of_any_input(name, options, shape):
    with torch.device("meta"):
        assert build(name, shape, 5, **options)(torch.empty(2, *shape)).parameters.shape == (2, *shape)


@pytest.mark.parametrize("odd", [(5, 9), (6, 7), (11, 4)])
def test_odd_sides_are_halved_rounding_down_and_come_back(odd):
    vae = build("sigma-cnn", (1, *odd), 3, channels=2)
    maps = [2 * (odd[0] // 4), 4 * (odd[0] // 4 * (odd[1] // 4))]
    assert vae.encoder.mean.in_features == 8 * (odd[0] // 4) * (odd[1] // 4), maps
    assert vae(torch.rand(2, 1, *odd)).parameters.shape == (2, 1, *odd)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("sigma-cnn", {"channels": 0}, "holds 0"),
        ("bs-vae", {"channels": ()}, "channels is empty"),
        ("bs-vae", {"channels": (4, -1)}, "channels holds -1"),
    ],
)
def test_sizes_that_cannot_work_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        build(name, (1, 8, 8), 3, **options)


def test_images_too_small_to_be_halved_and_other_shapes_are_refused():
    with pytest.raises(ValueError, match="cannot be halved 2 times"):
        build("sigma-cnn", (1, 3, 9))
    for name in ("sigma-cnn", "bs-vae"):
        with pytest.raises(ValueError, match="takes images"):
            build(name, (7, 1, 8, 8))


def batch_norm(x: torch.Tensor, norm: nn.Module) -> torch.Tensor:
    axes = (0, 2, 3) if x.dim() == 4 else (0,)
    mean, variance = x.mean(axes, keepdim=True), x.var(axes, unbiased=False, keepdim=True)
    size = (1, -1, *[1] * (x.dim() - 2))
    return (x - mean) / (variance + norm.eps).sqrt() * norm.weight.view(size) + norm.bias.view(size)


@pytest.mark.parametrize(("out", "stride"), [(4, 1), (4, 2), (6, 1), (6, 2)])
def test_a_block_with_norms_is_its_formula(out, stride):
    torch.manual_seed(0)
    block = NormedBlock(4, out, (stride, stride), "batch", nn.LeakyReLU).double()
    x = torch.randn(3, 4, 6, 5, dtype=torch.float64)
    first, norm1, _, second, norm2 = block.body
    for norm in (norm1, norm2):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    y = F.leaky_relu(batch_norm(F.conv2d(x, first.weight, first.bias, stride, 1), norm1), 0.01)
    y = batch_norm(F.conv2d(y, second.weight, second.bias, 1, 1), norm2)
    shortcut = x
    if (out, stride) != (4, 1):
        change, norm = block.shortcut
        shortcut = batch_norm(F.conv2d(x, change.weight, change.bias, stride), norm)
    else:
        assert len(block.shortcut) == 0
    torch.testing.assert_close(block(x), F.leaky_relu(y + shortcut, 0.01), rtol=1e-12, atol=1e-12)


def test_a_norm_of_each_element_has_statistics_of_its_own():
    torch.manual_seed(0)
    norm = EachNorm((2, 3, 4)).double()
    x = 5 + torch.randn(6, 2, 3, 4, dtype=torch.float64) * torch.arange(1, 25).view(2, 3, 4)
    expected = (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt()
    torch.testing.assert_close(norm(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("name", "options"), [("sigma-cnn", {"channels": 3}), ("bs-vae", {"channels": (4, 6)})])
def test_every_parameter_gets_a_gradient_and_a_baked_network_is_a_plain_one_again(name, options):
    torch.manual_seed(0)
    vae = build(name, (1, 9, 8), 3, **options)
    x = torch.rand(6, 1, 9, 8)
    keys = set(vae.state_dict())
    model = mk.multirate(vae, {"encoder": "softplus", "decoder": "softplus"})
    for beta in (torch.tensor([0.02, 0.3, 1.0, 4.0, 9.0, 2.0]), 0.3):
        out = model(x, beta=beta)
        (out.parameters.square().sum() + out.mean.square().sum() + out.log_variance.square().sum()).backward()
        for key, parameter in model.named_parameters():
            assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), key
    model.eval()
    with torch.no_grad(), model.at(0.3):
        expected = vae.reconstruct(x)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the running statistics")  # they are the same here as in the model
        baked = mk.bake(model, 0.3)
    torch.testing.assert_close(baked.reconstruct(x), expected, rtol=1e-4, atol=1e-5)
    assert set(baked.state_dict()) == keys

"""Networks described in words: what each stage becomes, sizes followed, words that cannot be read."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from mrvae_models.networks.stack import ResidualBlock, described_vae, doublings, halvings, parse, stack
from torch import nn


def test_stages_become_layers_with_norm_and_activation():
    layers, shape = stack(
        ["conv 6 k4x3 s2 p1x0", "block 6 x2", "linear 5", "linear 8x2x3 bare", "convt 4 k3 s2 p1 op1x0 bare"],
        (2, 9, 7), norm="batch", activation="tanh",
    )
    assert [type(layer).__name__ for layer in layers] == [
        "Conv2d", "BatchNorm2d", "Tanh", "ResidualBlock", "Tanh", "ResidualBlock", "Tanh", "Flatten", "Linear", "Tanh",
        "Linear", "Unflatten", "ConvTranspose2d",
    ]
    first, last = layers[0], layers[-1]
    assert (first.kernel_size, first.stride, first.padding) == ((4, 3), (2, 2), (1, 0))
    assert (last.stride, last.padding, last.output_padding) == ((2, 2), (1, 1), (1, 0))
    assert layers[3] is not layers[5]
    x = torch.rand(3, 2, 9, 7)
    assert layers(x).shape == (3, *shape) and shape == (4, 4, 5)


@pytest.mark.parametrize("words", ["conv 3 k4 s2 p1", "conv 5 k3", "convt 2 k3x5 s2x3 p1 op1x2", "convt 2 k5 s1 p2"])
@pytest.mark.parametrize("sides", [(9, 7), (4, 12)])
def test_the_shape_said_is_the_shape_made(words, sides):
    layers, shape = stack([words], (2, *sides))
    assert layers(torch.rand(1, 2, *sides)).shape == (1, *shape)


def test_stages_with_norms_of_their_own_pooling_and_doubling():
    layers, shape = stack(
        ["res 4 s2", "pool", "conv 3 k3 p1", "up", "linear 6x2x1 each", "linear 5 each bare"], (2, 9, 8), norm="batch"
    )
    assert [type(layer).__name__ for layer in layers] == [
        "NormedBlock", "MaxPool2d", "Conv2d", "BatchNorm2d", "ReLU", "Upsample", "Flatten", "Linear", "Unflatten",
        "EachNorm", "ReLU", "Flatten", "Linear", "EachNorm",
    ]
    x = torch.rand(3, 2, 9, 8)
    assert layers[:1](x).shape == (3, 4, 5, 4) and layers[:6](x).shape == (3, 3, 4, 4)
    assert layers(x).shape == (3, *shape) and shape == (5,)
    plain, _ = stack(["linear 6x2x1 each"], (2, 9, 8), norm="none")
    assert not [layer for layer in plain.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]


@pytest.mark.parametrize("sides", [(28, 28), (17, 31), (37, 96)])
def test_doublings_undo_halvings(sides):
    down, features = stack(halvings((3, 4, 5)), (2, *sides))
    _, shape = stack(doublings((2, *sides), (3, 4, 5)), features)
    assert features == (5, sides[0] // 8, sides[1] // 8) and shape == (2, *sides)


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
def test_residual_block_is_its_formula_in_value_and_gradient(activation):
    torch.manual_seed(0)
    block = nn.Sequential(ResidualBlock(4, activation), activation()).double()
    first, _, second = block[0].body
    x = torch.randn(2, 4, 5, 6, dtype=torch.float64, requires_grad=True)
    function = activation()
    expected = function(
        x + F.conv2d(function(F.conv2d(x, first.weight, first.bias, padding=1)), second.weight, second.bias, padding=1)
    )
    inputs = [x, *block.parameters()]
    torch.testing.assert_close(block(x), expected, rtol=0, atol=1e-14)
    found = torch.autograd.grad(block(x).square().sum(), inputs)
    for ours, theirs in zip(found, torch.autograd.grad(expected.square().sum(), inputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("stages", "shape", "message"),
    [
        (["dense 2"], (2, 8, 8), "'dense 2' begins with 'dense'.*conv, convt, block, res, linear, pool, up"),
        (["pool 2"], (2, 8, 8), "'pool 2': '2' comes after 'pool'; expected nothing"),
        (["conv 4 k2", "pool"], (2, 2, 9), "'pool' leaves nothing of maps of 1x8"),
        (["linear 4", "up"], (2, 2, 9), "'up' gets data of shape"),
        (["res 4 bare"], (2, 8, 8), "cannot read 'bare'.*sN, xN"),
        (["res 4 s0"], (2, 8, 8), "at least 1"),
        (["conv 4 k3 each"], (2, 8, 8), "cannot read 'each'"),
        ([""], (2, 8, 8), "begins with ''"),
        (["conv"], (2, 8, 8), "'conv': 'nothing' comes after 'conv'.*channels, as in 'conv 128'"),
        (["conv 4x4 k3"], (2, 8, 8), "'4x4' comes after 'conv'"),
        (["linear 0"], (2, 8, 8), "'0' comes after 'linear'.*'linear 400'"),
        (["conv 4 k3 q2"], (2, 8, 8), "cannot read 'q2'.*kN, sN, pN, bare, xN"),
        (["conv 4 k3 op1"], (2, 8, 8), "cannot read 'op1'"),
        (["conv 4 k3 k4"], (2, 8, 8), "cannot read 'k4'.*at most once"),
        (["conv 4 k3 bare bare"], (2, 8, 8), "cannot read 'bare'"),
        (["block 2 k3"], (2, 8, 8), "cannot read 'k3'"),
        (["block 2 x0"], (2, 8, 8), "cannot read 'x0'"),
        (["conv 4 s2"], (2, 8, 8), "'conv 4 s2' has no kernel"),
        (["conv 4 k3 s0"], (2, 8, 8), "at least 1"),
        (["conv 4 k3"], (2, 8, 2), "'conv 4 k3' leaves nothing of maps of 8x2"),
        (["convt 4 k2 p4"], (2, 8, 2), "leaves nothing"),
        (["convt 4 k3 s2 op2"], (2, 8, 8), "output padding is below the stride"),
        (["block 3"], (2, 8, 8), "'block 3' gets 2 channels.*'block 2'"),
        (["linear 5", "conv 4 k1"], (2, 8, 8), r"'conv 4 k1' gets data of shape \(5,\).*'linear 128x4x4'"),
        ("conv 4 k3", (2, 8, 8), r"one string a stage"),
    ],
)
def test_what_cannot_be_read_or_built_is_refused_by_name(stages, shape, message):
    with pytest.raises(ValueError, match=message):
        stack(stages, shape)


def test_a_stage_many_times_is_as_many_stages():
    assert [stage.kind for stage in parse(["conv 3 k3 x2", "linear 4 bare"])] == ["conv", "conv", "linear"]


def test_a_decoder_that_makes_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"makes \(1, 4, 5\); expected \(1, 4, 4\)"):
        described_vae((1, 4, 4), 2, ["linear 3"], ["linear 1x4x5 bare"])

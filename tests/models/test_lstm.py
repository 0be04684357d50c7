"""The LSTM of sentences: its parameters, what it reads and writes, and its gates."""

from __future__ import annotations

import math

import pytest
import torch
from mrvae_models.data import Vocabulary
from mrvae_models.data.vocabulary import END, PAD, START, UNKNOWN
from mrvae_models.likelihoods import Categorical, Gaussian, perplexity
from mrvae_models.networks import build
from mrvae_models.objectives import beta_vae, sample_beta
from torch import nn

import mrvae_kernels as mk

WORDS = [f"w{i}" for i in range(20)]
SENTENCES = ["w1 w2 w3 w4 w5", "w6", "w7 w8", ""]
LATENT = {"kind": "softplus", "shift": True, "inputs": mk.GateSpec("sigmoid", init="ranked")}


def small(**options) -> nn.Module:
    torch.manual_seed(0)
    return build("lstm", (7, 24), latent=3, embedding=6, hidden=5, **options)


def sentences() -> torch.Tensor:
    return Vocabulary(WORDS).encode(SENTENCES)


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# The paper's network


def test_parameters_of_table_1():
    assert count(build("lstm", (50, 10_000))) == 8_821_072
    network = build("lstm", (50, 10_000), deep_heads=True)
    model = mk.multirate(network, gates={"encoder": "sigmoid", "decoder": "sqrt"}, exclude=network.ungated)
    assert count(model) == 9_351_632
    assert set(model.gated) == {
        "encoder.lstm",
        "encoder.mean.2",
        "encoder.log_variance.2",
        "decoder.initial",
        "decoder.lstm",
    }


def test_without_exclusion_every_layer_but_the_embeddings_is_gated():
    network = small(deep_heads=True)
    model = mk.multirate(network, gates={"encoder": "sigmoid", "decoder": "sqrt"})
    assert set(network.ungated) <= set(model.gated)
    assert set(model.left) == {"encoder.embedding", "decoder.embedding"}


def test_lstms_have_no_bias_and_heads_and_outputs_have_one():
    names = {name for name, _ in small().named_parameters()}
    assert "decoder.output.bias" in names and "encoder.mean.bias" in names
    assert not any("lstm.bias" in name for name in names)


# What it computes


def test_the_posterior_is_that_of_the_sentence_without_padding():
    network, x = small(), sentences()
    for padding in (0, 1, 6):
        mean, log_variance = network.encode(nn.functional.pad(x, (0, padding)))
        for i, row in enumerate(x):
            state = network.encoder.lstm(network.encoder.embedding(row[row != PAD][None]))[1]
            features = torch.cat([state[0][0], state[1][0]], 1)
            torch.testing.assert_close(mean[i], network.encoder.mean(features)[0])
            torch.testing.assert_close(log_variance[i], network.encoder.log_variance(features)[0])


def test_gated_too_padding_changes_nothing():
    network, x = small(), sentences()
    model = mk.multirate(network, gates={"encoder": "softplus", "decoder": "softplus"}).eval()
    nn.init.normal_(model.gate_weight)
    for beta in (0.3, torch.tensor([0.01, 0.2, 1.0, 9.0])):
        with model.at(beta):
            torch.testing.assert_close(network.encode(nn.functional.pad(x, (0, 3)))[0], network.encode(x)[0])


def test_one_beta_a_sample_agrees_with_one_a_batch():
    network, x = small().eval(), sentences()
    gates = {"encoder": "softplus", "decoder": "softplus", "decoder.initial": mk.GateSpec(**LATENT)}
    model = mk.multirate(network, gates=gates)
    nn.init.normal_(model.gate_weight)
    betas = torch.tensor([0.01, 0.2, 1.0, 9.0])
    z = torch.randn(4, 3)
    with model.at(betas):
        together = network.logits(x, z)
    for i, beta in enumerate(betas.tolist()):
        with model.at(beta):
            torch.testing.assert_close(together[i], network.logits(x[i : i + 1], z[i : i + 1])[0])


def test_each_token_is_predicted_from_those_before_it_and_z():
    network, x = small().eval(), sentences()
    z = torch.randn(4, 3)
    logits = network.logits(x, z)
    assert logits.shape == (4, 6, 24)
    changed = x.clone()
    changed[0, 3] = 23
    other = network.logits(changed, z)
    assert other[0, :4].equal(logits[0, :4]) and not other[0, 4].equal(logits[0, 4])
    assert not network.logits(x, z + 1)[0, 0].equal(logits[0, 0])


def test_dropout_and_word_dropout_act_in_training_only():
    network, x = small(dropout=0.0, word_dropout=0.9), sentences()
    z = torch.randn(4, 3)
    evaluated = network.eval().logits(x, z)
    assert network.logits(x, z).equal(evaluated)
    seen = []
    network.decoder.embedding.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    dropped = network.train().logits(x, z)
    assert not dropped.equal(evaluated)
    assert (seen[0][:, 0] == START).all()
    words = (x[:, :-1] != PAD) & (x[:, :-1] != UNKNOWN)
    assert 0.5 < (seen[0][:, 1:][words] == UNKNOWN).float().mean() < 1
    assert (seen[0][:, 1:][x[:, :-1] == PAD] == PAD).all()
    plain = small(dropout=0.5)
    assert not plain.train().logits(x, z).equal(plain.logits(x, z))


# Generation


def test_greedy_sentences_take_the_likeliest_token_each_time():
    network = small().eval()
    z = torch.randn(5, 3)
    made = network.generate(z, longest=4)
    logits = network.logits(made, z)
    logits[..., [PAD, START]] = -math.inf
    for row, scores in zip(made, logits, strict=True):
        length = int((row != PAD).sum())
        assert row[:length].equal(scores[:length].argmax(-1))
        assert (row[length:] == PAD).all() and (length == len(row) or row[length - 1] == END)


def test_sentences_end_where_the_network_ends_them_and_no_later():
    network = small().eval()
    with torch.no_grad():
        network.decoder.output.weight.zero_()
        network.decoder.output.bias[END] = 9.0
    assert network.sample(3).tolist() == [[END]] * 3
    with torch.no_grad():
        network.decoder.output.bias[END] = -9.0
        network.decoder.output.bias[PAD] = 99.0
    assert network.sample(3).shape == (3, 7) and (network.sample(3) > UNKNOWN - 1).all()


def test_what_has_ended_is_padded_while_others_go_on():
    network = small().eval()
    with torch.no_grad():
        network.decoder.output.weight.zero_()
        network.decoder.output.bias.fill_(0.0)
        network.decoder.output.bias[END] = math.log(5.0)
    made = network.sample(50, torch.Generator().manual_seed(0), greedy=False)
    ended = (made == END).cumsum(1) - (made == END).long() > 0
    assert ended.any() and (made[ended] == PAD).all() and (made[~ended] >= END).all()


def test_drawn_sentences_follow_the_softmax_and_the_generator():
    network = small().eval()
    with torch.no_grad():
        network.decoder.output.weight.zero_()
        network.decoder.output.bias.fill_(-30.0)
        network.decoder.output.bias[5:7] = torch.tensor([0.0, math.log(3.0)])
    z = torch.zeros(4000, 3)
    first = network.generate(z, greedy=False, longest=1).flatten()
    assert set(first.tolist()) == {5, 6} and abs((first == 6).float().mean() - 0.75) < 0.04
    cold = network.generate(z, greedy=False, temperature=0.5, longest=1)
    assert abs((cold == 6).float().mean() - 0.9) < 0.03
    draws = [network.sample(4, torch.Generator().manual_seed(1), greedy=False) for _ in range(2)]
    assert draws[0].equal(draws[1])
    with pytest.raises(ValueError, match="temperature is 0"):
        network.generate(z, temperature=0)


def test_reconstruction_and_the_ends_of_an_interpolation_agree():
    network, x = small().eval(), sentences()
    between = network.interpolate(x[:2], x[2:], steps=3)
    assert between.shape[:2] == (3, 2)
    ends = network.generate(network.encode(torch.cat([x[:2], x[2:]]))[0])
    vocabulary = Vocabulary(WORDS)
    assert vocabulary.texts(between[0]) + vocabulary.texts(between[-1]) == vocabulary.texts(ends)
    assert vocabulary.texts(network.reconstruct(x)) == vocabulary.texts(ends)
    with pytest.raises(ValueError, match="at least 2"):
        network.interpolate(x[:1], x[1:2], steps=1)


# Training


def test_a_gated_network_learns_to_repeat_what_z_tells_it():
    torch.manual_seed(0)
    x = Vocabulary(WORDS).encode([f"w{i % 8}" for i in range(32)])
    network = build("lstm", (2, 24), latent=4, embedding=16, hidden=16, dropout=0.0)
    log_variance = mk.GateSpec("softplus", shift=True)
    gates = {"encoder": "softplus", "encoder.log_variance": log_variance, "decoder.lstm": "softplus"}
    model = mk.multirate(network, gates=gates)
    optimizer = torch.optim.Adam(model.parameters(), 2e-2)
    for _ in range(200):
        beta = sample_beta(len(x))
        loss = beta_vae(model(x, beta=beta), x, beta, network.likelihood).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    low, high = (beta_vae(model(x, beta=beta), x, beta, network.likelihood) for beta in (0.01, 10.0))
    # a uniform choice of 8 words costs log 8 = 2.08 nats
    assert low.distortion.mean() < 0.5 and low.rate.mean() > 2.0
    assert 2.0 < high.distortion.mean() < 3.0 and high.rate.mean() < 0.1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_shape": (1, 28, 28)}, "takes text"),
        ({"input_shape": (50,)}, "takes text"),
        ({"input_shape": (50, 4)}, "takes text"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"word_dropout": -0.1}, "word_dropout is -0.1"),
        ({"hidden": 0}, "hidden holds 0"),
        ({"likelihood": Gaussian()}, "tokens have a categorical one"),
    ],
)
def test_wrong_options_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        build("lstm", arguments.pop("input_shape", (7, 24)), **arguments)


def test_sentences_of_what_cannot_be_are_refused():
    network = build("lstm", (9, 30), latent=3, embedding=5, hidden=6).eval()
    z = torch.randn(2, 3)
    for options, message in (
        ({"greedy": False, "temperature": math.inf}, "temperature is inf; expected a positive, finite"),
        ({"longest": 0}, "longest is 0; expected"),
        ({"z": torch.randn(2, 4)}, r"z has shape \(2, 4\); expected \(N, 3\)"),
    ):
        with pytest.raises(ValueError, match=message):
            network.generate(**{"z": z, **options})
    nearly_greedy = network.generate(z, greedy=False, temperature=1e-45)
    assert torch.equal(nearly_greedy, network.generate(z))


def test_wrong_inputs_are_named():
    network = small()
    for wrong in (torch.zeros(2, 3), torch.zeros(2, 0, dtype=torch.int64), torch.zeros(2, 3, 4, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"expected tokens, \(N, T\), int64"):
            network.encode(wrong)


# The likelihood


def test_categorical_distortion_is_of_the_tokens_without_padding():
    x = torch.tensor([[5, 2, 0], [4, 6, 2]])
    logits = torch.randn(2, 3, 8, dtype=torch.float64)
    p = logits.softmax(-1)
    by_hand = [-(p[0, 0, 5] * p[0, 1, 2]).log(), -(p[1, 0, 4] * p[1, 1, 6] * p[1, 2, 2]).log()]
    likelihood = Categorical()
    torch.testing.assert_close(likelihood.distortion(logits, x), torch.stack(by_hand))
    assert likelihood.distortion(logits.bfloat16(), x).dtype == torch.float32
    torch.testing.assert_close(likelihood.mean(logits), p)
    drawn = likelihood.sample(logits[:1].expand(4000, 3, 8))
    assert drawn.shape == (4000, 3) and abs((drawn[:, 1] == 3).double().mean() - p[0, 1, 3]) < 0.04
    for wrong in (x[:, :2], x.float(), x[:1]):
        with pytest.raises(ValueError, match=r"expected \(N, T, V\) and \(N, T\), integers"):
            likelihood.distortion(logits, wrong)


def test_perplexity_of_a_uniform_choice_is_its_number():
    assert perplexity(6 * math.log(50), 6) == pytest.approx(50)
    with pytest.raises(ValueError, match="tokens is 0"):
        perplexity(1.0, 0)

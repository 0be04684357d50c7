"""LSTM and GRU with gates on every row, against torch's kernels run one sample at a time, and against the formulas."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from helpers import randomize
from torch import Tensor, nn

import mrvae_kernels as mk

BETA = [0.02, 0.5, 9.0]
OPTIONS = [
    {"num_layers": layers, "bidirectional": both, "batch_first": first, "bias": bias}
    for layers, both, first, bias in itertools.product((1, 2), (False, True), (False, True), (False, True))
]


def build(kind: str, **options: Any) -> nn.Module:
    layer = {"LSTM": mk.GatedLSTM, "GRU": mk.GatedGRU}[kind]
    shift = options.get("bias", True)
    return randomize(layer(3, 4, gate=mk.GateSpec("softplus", shift=shift), dtype=torch.float64, **options))


def state(layer: nn.Module, batch: int = 3) -> Any:
    count = layer.num_layers * (2 if layer.bidirectional else 1)
    hidden = torch.randn(count, batch, layer.proj_size or 4, dtype=torch.float64)
    return (hidden, torch.randn(count, batch, 4, dtype=torch.float64)) if isinstance(layer, nn.LSTM) else hidden


def at(hx: Any, i: int) -> Any:
    return tuple(h[:, i : i + 1].contiguous() for h in hx) if isinstance(hx, tuple) else hx[:, i : i + 1].contiguous()


def flat(result: Any) -> list[Tensor]:
    output, last = result
    return [output, *(last if isinstance(last, tuple) else (last,))]


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
@pytest.mark.parametrize("options", [*OPTIONS, {"proj_size": 2, "num_layers": 2, "bidirectional": True}], ids=str)
@pytest.mark.parametrize("with_state", [False, True])
def test_one_beta_a_sample_equals_torchs_kernel_on_each_sample(backend, kind, options, with_state):
    if kind == "GRU" and "proj_size" in options:
        pytest.skip("torch's GRU has no projection")
    layer = build(kind, **options)
    axis = 0 if layer.batch_first else 1
    x = torch.randn((3, 6, 3) if layer.batch_first else (6, 3, 3), dtype=torch.float64)
    hx = state(layer) if with_state else None
    together = flat(layer(x, BETA, hx))
    alone = [
        flat(layer.to_plain(beta)(x.narrow(axis, i, 1), None if hx is None else at(hx, i)))
        for i, beta in enumerate(BETA)
    ]
    for k, value in enumerate(together):
        expected = torch.cat([result[k] for result in alone], axis if k == 0 else 1)
        torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12)
    shared = flat(layer(x, 0.5, hx))
    torch.testing.assert_close(shared, flat(layer(x, [0.5] * 3, hx)), rtol=1e-10, atol=1e-12)


def test_lstm_rows_are_scaled_before_the_non_linearity(backend):
    layer = build("LSTM", batch_first=True)
    x = torch.randn(3, 2, 3, dtype=torch.float64)
    for beta in (0.5, BETA):
        g, t = (v.expand(3, 16) for v in layer.gate(beta))
        h = c = torch.zeros(3, 4, dtype=torch.float64)
        for step in (0, 1):
            p = (
                g * (x[:, step] @ layer.weight_ih_l0.T + layer.bias_ih_l0 + h @ layer.weight_hh_l0.T + layer.bias_hh_l0)
                + t
            )
            i, f, n, o = p.split(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * n.tanh()
            h = o.sigmoid() * c.tanh()
        torch.testing.assert_close(layer(x, beta)[0][:, -1], h)


def test_gru_rows_are_scaled_before_the_non_linearity(backend):
    layer = build("GRU", batch_first=True)
    x = torch.randn(3, 2, 3, dtype=torch.float64)
    for beta in (0.5, BETA):
        g, t = (v.expand(3, 12) for v in layer.gate(beta))
        h = torch.zeros(3, 4, dtype=torch.float64)
        for step in (0, 1):
            a = g * (x[:, step] @ layer.weight_ih_l0.T + layer.bias_ih_l0) + t
            b = g * (h @ layer.weight_hh_l0.T + layer.bias_hh_l0)
            r, z = (a + b)[:, :4].sigmoid(), (a + b)[:, 4:8].sigmoid()
            n = (a[:, 8:] + r * b[:, 8:]).tanh()
            h = (1 - z) * n + z * h
        torch.testing.assert_close(layer(x, beta)[0][:, -1], h)


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
@pytest.mark.parametrize("beta", [0.5, BETA])
def test_gradients_reach_the_state_and_every_parameter(backend, kind, beta):
    layer = build(kind, num_layers=2, bidirectional=True)
    x = torch.randn(2, 3, 3, dtype=torch.float64, requires_grad=True)
    hx = tuple(h.requires_grad_() for h in state(layer)) if kind == "LSTM" else (state(layer).requires_grad_(),)

    def run(x: Tensor, *hx: Tensor) -> tuple[Tensor, ...]:
        return tuple(flat(layer(x, beta, hx if kind == "LSTM" else hx[0])))

    assert torch.autograd.gradcheck(run, (x, *hx), fast_mode=True)
    sum(v.square().sum() for v in run(x, *hx)).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())


def test_a_packed_sequence_works_with_one_beta_and_is_refused_with_more(backend):
    layer = build("LSTM", batch_first=True)
    x = torch.randn(3, 6, 3, dtype=torch.float64)
    packed = nn.utils.rnn.pack_padded_sequence(x, [6, 4, 2], batch_first=True)
    output, _ = nn.utils.rnn.pad_packed_sequence(layer(packed, 0.5)[0], batch_first=True)
    torch.testing.assert_close(output[2, :2], layer(x[2:, :2], 0.5)[0][0])
    with pytest.raises(ValueError, match="takes a padded batch"):
        layer(packed, BETA)
    with pytest.raises(ValueError, match="takes a batch with three axes"):
        layer(x[0], BETA)
    torch.testing.assert_close(layer(x[0], 0.5)[0], layer(x[:1], 0.5)[0][0])


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_a_state_or_input_that_would_broadcast_is_refused(backend, kind):
    layer = build(kind)
    x = torch.randn(6, 3, 3, dtype=torch.float64)
    for beta in (0.5, BETA):
        with pytest.raises(RuntimeError, match="[Ee]xpected hidden"):
            layer(x, beta, state(layer, 1))
        with pytest.raises(RuntimeError):
            layer(x[..., :2], beta)
    for count in (1, 2, 6):
        with pytest.raises(ValueError, match="for this batch"):
            layer(x, [0.5] * count)


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_dropout_between_layers_acts_in_training_only(backend, kind):
    layer = build(kind, num_layers=2, dropout=0.5)
    x = torch.randn(6, 3, 3, dtype=torch.float64)
    for beta in (0.5, BETA):
        assert not torch.equal(layer.train()(x, beta)[0], layer(x, beta)[0])
        assert torch.equal(layer.eval()(x, beta)[0], layer(x, beta)[0])
    without = build(kind, num_layers=2, dropout=0.0)
    without.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer(x, BETA)[0], without(x, BETA)[0])


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_no_time_steps_and_empty_batches(backend, kind):
    layer = build(kind)
    output, last = layer(torch.empty(0, 3, 3, dtype=torch.float64), BETA)
    assert output.shape == (0, 3, 4) and (flat((output, last))[1] == 0).all()
    assert layer(torch.empty(2, 0, 3, dtype=torch.float64), torch.empty(0))[0].shape == (2, 0, 4)


def test_from_plain_follows_the_plain_layer_to_another_dtype():
    plain = nn.LSTM(3, 4)
    layer = mk.GatedLSTM.from_plain(plain)
    layer.double()
    x = torch.randn(2, 3, 3, dtype=torch.float64)
    assert layer(x, 0.5)[0].dtype == layer(x, BETA)[0].dtype == torch.float64


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_exchanged_parameters_are_gated_at_once(backend, kind):
    layer, x = build(kind), torch.randn(5, 3, 3, dtype=torch.float64)
    layer(x, 0.5)
    state = {name: torch.randn_like(value) for name, value in layer.state_dict().items() if value.is_floating_point()}
    layer.load_state_dict({**layer.state_dict(), **state}, assign=True)
    first = layer(x, 0.5)[0]
    torch.testing.assert_close(first, layer(x, 0.5)[0])
    torch.testing.assert_close(first, layer.to_plain(0.5)(x)[0])

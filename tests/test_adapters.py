"""Layers one of whose parameters becomes a computed one after multirate(): named, or gated as they stand."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import mrvae_kernels as mk

LAYERS = {
    "batch norm": (lambda: nn.BatchNorm2d(4), (5, 4, 3, 3)),
    "group norm": (lambda: nn.GroupNorm(2, 4), (5, 4, 3)),
    "instance norm": (lambda: nn.InstanceNorm1d(4, affine=True), (5, 4, 3)),
    "layer norm": (lambda: nn.LayerNorm(4), (5, 4)),
    "LSTM": (lambda: nn.LSTM(4, 4), (3, 5, 4)),
    "GRU": (lambda: nn.GRU(4, 4, bidirectional=True), (3, 5, 4)),
    "linear": (lambda: nn.Linear(4, 4), (5, 4)),
    "convolution": (lambda: nn.Conv1d(4, 2, 3), (5, 4, 3)),
}
PRODUCTS = ("linear", "convolution")
BETA = torch.full((5,), 0.3)


def output(y):
    return y[0] if isinstance(y, tuple) else y


@pytest.mark.parametrize("calls", [0, 3])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_bias_pruned_after_multirate_is_never_left_out(backend, kind, calls):
    build, shape = LAYERS[kind]
    layer, x = build().double(), torch.randn(shape, dtype=torch.float64)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    model = mk.multirate(layer, "softplus")
    for beta in (0.3, BETA):
        for _ in range(calls):
            model(x, beta=beta)
    name = "bias_ih_l0" if kind in ("LSTM", "GRU") else "bias"
    prune.random_unstructured(layer, name, 0.5)
    message = f"a gated {layer.plain.__name__} has no parameter '{name}' any more: it was pruned or parametrized after"
    with pytest.raises(RuntimeError, match=message):
        mk.bake(model, 0.3, [x])
    found = [output(model(x, beta=BETA))]  # one beta a sample folds nothing
    if kind in PRODUCTS:
        found.append(model(x, beta=0.3))
    else:
        with pytest.raises(RuntimeError, match=message):
            model(x, beta=0.3)
    prune.remove(layer, name)
    for y in found:
        torch.testing.assert_close(y, output(model(x, beta=0.3)))


def test_projections_of_an_lstm_are_not_gated_and_may_be_pruned(backend):
    layer, x = nn.LSTM(4, 4, proj_size=2).double(), torch.randn(3, 5, 4, dtype=torch.float64)
    prune.random_unstructured(layer, "weight_hr_l0", 0.5)
    model = mk.multirate(layer, "softplus")
    y = model(x, beta=0.3)[0]
    torch.testing.assert_close(model(x, beta=BETA)[0], y)
    torch.testing.assert_close(mk.bake(model, 0.3)(x)[0], y)


def test_a_recurrent_layer_without_biases_is_not_taken_for_one_that_lost_them(backend):
    layer, x = nn.GRU(4, 4, bias=False).double(), torch.randn(3, 5, 4, dtype=torch.float64)
    model = mk.multirate(layer, "softplus")
    torch.testing.assert_close(mk.bake(model, 0.3)(x)[0], model(x, beta=0.3)[0])
    torch.testing.assert_close(model(x, beta=BETA)[0], model(x, beta=0.3)[0])

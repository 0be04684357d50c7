"""Tensors that are not what most calls are given: sparse, with the negative bit, or of another size."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import mrvae_kernels as mk
from mrvae_kernels import functional, ops


@pytest.mark.skipif(not ops.EXTENSION, reason=f"the compiled core is missing: {ops.EXTENSION_ERROR}")
@pytest.mark.parametrize("beta", [0.5, torch.linspace(0.1, 2, 6)], ids=["one", "each"])
@pytest.mark.parametrize("kind", ["sparse", "negative bit"])
def test_inputs_of_other_kinds_train_the_first_layer_too(kind, beta):
    model = mk.multirate(nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)), "sigmoid")
    dense = torch.randn(6, 3) * (torch.rand(6, 3) < 0.5)
    x = dense.to_sparse() if kind == "sparse" else torch._neg_view(-dense)
    for _ in range(2):
        targets = torch.autograd.grad(model(dense, beta=beta).square().sum(), list(model.parameters()))
        found = torch.autograd.grad(model(x, beta=beta).square().sum(), list(model.parameters()))
        torch.testing.assert_close(found, targets)


def test_the_negative_bit_of_biases_shifts_and_gradients_of_a_fold():
    w, b, g, t, grad = torch.randn(5, 3), torch.randn(5), torch.rand(5), torch.rand(5), torch.randn(5, 3)

    def negated(value):
        return torch._neg_view(-value)

    plain, other = functional.fold([w], [b], [g], [t], [0]), functional.fold([w], [negated(b)], [g], [negated(t)], [0])
    torch.testing.assert_close(other, plain)
    leaves = [value.requires_grad_() for value in (w, g)]
    folded = functional.fold([w], [b], [g], [t], [0])[0][0]
    wanted = torch.autograd.grad(folded, leaves, grad, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(folded, leaves, negated(grad)), wanted)


@pytest.mark.parametrize("beta", [0.5, torch.linspace(0.1, 2, 6)], ids=["one", "each"])
def test_a_gate_on_inputs_does_not_broadcast_them(beta):
    spec = mk.GateSpec("softplus", inputs=mk.GateSpec("sigmoid"))
    for network, right, wrong in (
        (nn.Linear(4, 3), torch.randn(6, 4), (torch.randn(6, 1), torch.tensor(1.0))),
        (nn.Conv2d(3, 2, 3), torch.randn(6, 3, 8, 8), (torch.randn(6, 1, 8, 8),)),
    ):
        model = mk.multirate(nn.Sequential(network), spec)
        for _ in range(2):
            for x in wrong:
                with pytest.raises(ValueError, match="features, as many as the gate on the layer's inputs has"):
                    model(x, beta=beta)
            model(right, beta=beta)

"""Gated networks under torch.func's vmap, make_fx, FakeTensorMode and torch.jit.trace, and differentiated twice."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers import BETA, RANGE, ConvolutionalVAE, build_network, images, randomize
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import mrvae_kernels as mk

BETAS = torch.tensor(BETA)
NETWORKS: dict[str, Callable[[], mk.MultiRate]] = {
    "gated norms": lambda: build_network(with_norm=True).eval(),
    "conditional norms": lambda: build_network(with_norm=True, norms="conditional").eval(),
    "hidden": lambda: build_network(mk.GateSpec("sqrt", hidden=(4,), shift=True)),
}
every_network = pytest.mark.parametrize("name", NETWORKS)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


@every_network
@pytest.mark.parametrize("calls", [0, 3], ids=["first", "planned"])
def test_vmap_over_examples_and_their_betas_is_a_loop_over_them(name, calls):
    model, x = NETWORKS[name](), images()
    for _ in range(calls):
        model(x[:1], beta=0.3)
    together = torch.func.vmap(lambda row, beta: model(row[None], beta=beta)[0])(x, BETAS)
    close(together, torch.stack([model(row[None], beta=beta)[0] for row, beta in zip(x, BETAS, strict=True)]))


@pytest.mark.parametrize(
    "layer", [mk.GatedLinear(4, 3, gate="sqrt"), mk.GatedLayerNorm(4), mk.ConditionalBatchNorm1d(4).eval()],
    ids=lambda layer: type(layer).__name__,
)
def test_vmap_over_the_betas_of_a_layer(layer):
    layer, x = randomize(layer.double()), torch.randn(5, 2, 4, dtype=torch.float64)
    together = torch.func.vmap(lambda rows, beta: layer(rows, beta))(x, BETAS)
    close(together, torch.stack([layer(rows, beta) for rows, beta in zip(x, BETAS, strict=True)]))
    slopes = torch.func.vmap(torch.func.grad(lambda beta, rows: layer(rows, beta).sum()))(BETAS, x)
    for slope, beta, rows in zip(slopes, BETAS, x, strict=True):
        leaf = beta.clone().requires_grad_()
        torch.testing.assert_close(slope, torch.autograd.grad(layer(rows, leaf).sum(), leaf)[0])


@every_network
@pytest.mark.parametrize("beta", [torch.tensor(0.3), BETAS], ids=["shared", "per-sample"])
def test_make_fx_records_beta_as_an_input(name, beta):
    model, x = NETWORKS[name](), images()
    graph = make_fx(lambda x, beta: model(x, beta=beta))(x, beta)
    assert not any("aminmax" in str(node.target) for node in graph.graph.nodes)
    for other in (beta, beta * 0.9):
        close(graph(x + 1, other), model(x + 1, beta=other))


@pytest.mark.parametrize("beta", [0.3, [0.3] * 5, torch.tensor(0.3), BETAS], ids=["number", "list", "0-d", "1-d"])
def test_fake_tensors_have_the_shapes_of_real_ones(beta):
    with FakeTensorMode() as mode:
        model = mk.multirate(ConvolutionalVAE(True))
        given = mode.from_tensor(beta) if isinstance(beta, Tensor) else beta
        assert model(torch.empty(5, 1, 8, 8), beta=given).shape == (5, 1, 8, 8)
        assert mk.GatedLinear(4, 3)(torch.empty(5, 4), given).shape == (5, 3)
    if isinstance(beta, Tensor):
        assert mk.standardize(given).shape == beta.shape  # the mode has ended, the tensor is still a fake


def test_values_that_can_be_looked_at_are_checked_inside_a_transform():
    with pytest.raises(ValueError, match="beta is -1.0; expected a positive"):
        torch.func.vmap(lambda w: mk.gate_values(w, w, torch.tensor(-1.0)))(torch.ones(2, 3))


class Called(nn.Module):
    """What torch.jit.trace takes: beta as an argument among others, or a number that never changes."""

    def __init__(self, model: mk.MultiRate, beta: float | None) -> None:
        super().__init__()
        self.model, self.beta = model, beta

    def forward(self, x: Tensor, beta: Tensor) -> Tensor:
        return self.model(x, beta=beta if self.beta is None else self.beta)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("calls", [0, 3], ids=["first", "planned"])
@pytest.mark.parametrize("beta", [0.3, torch.tensor(0.3), BETAS], ids=["number", "shared", "per-sample"])
def test_a_traced_program_takes_other_inputs_and_betas(beta, calls):
    layers = nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)
    model, x = randomize(mk.multirate(nn.Sequential(*layers).double(), "sqrt")), torch.randn(5, 4, dtype=torch.float64)
    for _ in range(calls):
        model(x, beta=beta)
    number = beta if isinstance(beta, float) else None
    given = torch.tensor(beta) if number else beta
    program = torch.jit.trace(Called(model, number), (x, given), check_trace=False)
    for factor in (1.0, 0.9):
        x, other = x + 1, given * factor
        torch.testing.assert_close(program(x, other), model(x, beta=number or other), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("beta", [0.3, BETAS], ids=["shared", "per-sample"])
def test_second_derivatives_within_the_reference(beta):
    layers = nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)
    model = randomize(mk.multirate(nn.Sequential(*layers).double(), "sqrt", RANGE))
    x = torch.randn(5, 4, dtype=torch.float64)
    names, values = zip(*model.named_parameters(), strict=True)

    def run(*parameters: Tensor) -> Tensor:
        return torch.func.functional_call(model, dict(zip(names, parameters, strict=True)), (x,), {"beta": beta})

    with mk.override(backend="reference"):
        assert torch.autograd.gradgradcheck(run, values)

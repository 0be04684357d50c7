"""torch.compile(fullgraph=True) and torch.export of MultiRate networks; the program's sizes and betas stay free."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
from helpers import ConvolutionalVAE, randomize
from torch import Tensor, nn
from torch.export import Dim

import mrvae_kernels as mk

BETA = torch.tensor([0.02, 0.3, 1.0, 4.0, 9.0])


@pytest.fixture(autouse=True)
def _fresh():
    torch.compiler.reset()


def build(degree: int = 1) -> mk.MultiRate:
    encoder, decoder = mk.GateSpec("sigmoid", shift=True, degree=degree), mk.GateSpec("sqrt", degree=degree)
    gates = {"encoder": encoder, "decoder": decoder}
    return randomize(mk.multirate(ConvolutionalVAE(True).double(), gates)).eval()


def images(count: int = 5) -> Tensor:
    return torch.randn(count, 1, 8, 8, dtype=torch.float64)


def close(found, expected) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


def small(degree: int = 1) -> mk.MultiRate:
    layers = (
        nn.Conv1d(2, 3, 3, padding="same", padding_mode="circular"),
        nn.GroupNorm(3, 3),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(12, 3),
    )
    return randomize(mk.multirate(nn.Sequential(*layers).double(), mk.GateSpec("softplus", shift=True, degree=degree)))


class Program(nn.Module):
    """Takes beta as an argument among others."""

    def __init__(self, model: mk.MultiRate) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, beta: Tensor) -> Tensor:
        return self.model(x, beta=beta)


@pytest.mark.parametrize("degree", [1, 3])
def test_a_multirate_network_compiles_whole_with_its_gradients(degree):
    model, x = small(degree), torch.randn(5, 2, 4, dtype=torch.float64)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for beta in (torch.tensor(0.3), BETA, 0.3):
        expected, found = model(x, beta=beta), compiled(x, beta=beta)
        close(found, expected)
        wanted = torch.autograd.grad(expected.square().sum(), list(model.parameters()))
        close(torch.autograd.grad(found.square().sum(), list(model.parameters())), wanted)
    with pytest.raises(RuntimeError, match="without a beta"):
        model.network(x)


def test_another_beta_or_batch_does_not_compile_again():
    model, counter = small(), torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    for count, beta in ((50, 0.3), (50, 4.0), (90, 0.5), (170, 2.0)):
        x, value = torch.randn(count, 2, 4, dtype=torch.float64), torch.tensor(beta)
        close(compiled(x, beta=value), model(x, beta=value))
    assert counter.frame_count == 1


@pytest.mark.slow
@pytest.mark.parametrize("degree", [1, 3])
@pytest.mark.parametrize("beta", [torch.tensor(0.3), torch.linspace(0.02, 9, 50)], ids=["shared", "per-sample"])
def test_inductor_agrees(beta, degree):
    model, x = small(degree), torch.randn(50, 2, 4, dtype=torch.float64)
    compiled = torch.compile(model, fullgraph=True)
    found, expected = (m(x, beta=beta) for m in (compiled, model))
    close(found, expected)
    close(*(torch.autograd.grad(y.square().sum(), list(model.parameters())) for y in (found, expected)))


@pytest.mark.parametrize(
    "layer", [mk.GatedLinear(4, 6), mk.GatedConv1d(4, 6, 2, padding="same"), mk.ConditionalBatchNorm1d(4)], ids=str
)
def test_layers_compile_whole(layer):
    layer = layer.double().eval()
    x = torch.randn(5, 4, 4, dtype=torch.float64)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    for beta in (torch.tensor(0.3), BETA):
        close(compiled(x, beta), layer(x, beta))


def test_recurrent_layers_compile_where_torch_allows_them():
    layer = mk.GatedGRU(4, 3).double()
    x = torch.randn(4, 5, 4, dtype=torch.float64)
    with torch._dynamo.config.patch(allow_rnn=True):
        compiled = torch.compile(layer, fullgraph=True, backend="eager")
        for beta in (torch.tensor(0.3), BETA):
            close(compiled(x, beta)[0], layer(x, beta)[0])


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize(("strict", "degree"), [(False, 1), (True, 1), (False, 3)])
def test_export_with_any_batch_and_any_beta(per_sample, strict, degree):
    model = build(degree)
    batch = Dim("batch", min=2, max=4096)
    beta = BETA if per_sample else torch.tensor(0.3)

    shapes = ({0: batch}, {0: batch} if per_sample else None)
    program = torch.export.export(Program(model), (images(), beta), dynamic_shapes=shapes, strict=strict)
    exported = program.module()
    for count, value in ((5, 0.3), (7, 4.0), (300, 0.05)):
        x = images(count)
        other = torch.full((count,), value) if per_sample else torch.tensor(value)
        close(exported(x, other), model(x, beta=other))
    with pytest.raises((RuntimeError, AssertionError)):
        exported(images(5), torch.full((3,), 0.5))


def test_export_of_one_beta_as_a_number():
    model, x = build(), images()
    program = torch.export.export(model, (x,), {"beta": 0.3})
    close(program.module()(x, beta=0.3), model(x, beta=0.3))


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("norms", ["gated", "conditional"])
def test_an_exported_network_exports_and_compiles_again(norms, wrapped):
    model = randomize(mk.multirate(ConvolutionalVAE(True).double(), norms=norms)).eval()
    call, x, beta = Program(model) if wrapped else model, images(), torch.tensor(0.3)
    expected = model(x, beta=beta)
    for _ in range(2):
        torch.compiler.reset()
        close(torch.compile(call, fullgraph=True, backend="eager")(x, beta=beta), expected)
        close(torch.export.export(call, (x,), {"beta": beta}).module()(x, beta=beta), expected)
    close(model(x, beta=beta), expected)


def test_a_baked_network_exports_as_any_other():
    model, x = build(), images()
    program = torch.export.export(mk.bake(model, 0.3, [x]).eval(), (x,))
    model.recalibrate([x], 0.3)
    close(program.module()(x), model(x, beta=0.3))

"""What a layer keeps where it has a shift and one beta a sample: its result, where that tells u + b = (y - t) / g."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import mrvae_kernels as mk
from mrvae_kernels import ops

pytestmark = pytest.mark.skipif(not ops.EXTENSION, reason=f"the compiled core is missing: {ops.EXTENSION_ERROR}")

SAMPLES, CHANNELS = 9, 24
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(7, CHANNELS), (7,)),
    "convolution": (lambda: nn.Conv2d(7, CHANNELS, 3), (7, 6, 6)),
    "convolution of one position": (lambda: nn.Conv2d(7, CHANNELS, 3), (7, 3, 3)),
    "without a bias": (lambda: nn.Conv2d(7, CHANNELS, 3, bias=False), (7, 4, 4)),
    "transposed": (lambda: nn.ConvTranspose2d(7, CHANNELS, 3, 2), (7, 4, 4)),
}
GATES: dict[str, tuple[float, float, bool]] = {  # gates near act(p), shifts near t, and whether y tells
    "open": (1.0, 0.5, True), "small": (-3.0, 2.0, True), "of 1 / 200": (-5.0, 0.5, True),
    "closed": (-20.0, 0.5, False), "vanished": (-200.0, 0.5, False), "beside large shifts": (1.0, 2000.0, False),
}


def network(layer: str, activation: nn.Module | None, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    make, shape = LAYERS[layer]
    parts = [make(), *([] if activation is None else [activation])]
    return nn.Sequential(*parts).to(dtype), torch.randn(SAMPLES, *shape, dtype=dtype)


def gated(plain: nn.Module, kind: str, degree: int, p: float, t: float) -> mk.MultiRate:
    """Gates near act(p) and shifts of either sign near t, all a little different and moving with beta."""
    model = mk.multirate(plain, mk.GateSpec(kind, degree=degree, shift=True), mk.BetaRange(0.01, 10.0))
    with torch.no_grad():
        model.gate_weight.uniform_(-0.1, 0.1)
        model.gate_bias[:CHANNELS] = p + 0.2 * torch.randn(CHANNELS)
        model.gate_bias[CHANNELS:] = t * (1 + 0.2 * torch.rand(CHANNELS)) * (torch.arange(CHANNELS) % 2 * 2 - 1)
    return model


def betas(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(SAMPLES, dtype=dtype).uniform_(-4.5, 2.2).exp()


def holders(tensor: Tensor) -> int:
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)


def is_kept(y: Tensor) -> bool:
    before = holders(y)
    y.sum().backward()
    return before > holders(y)


def gradients(model: mk.MultiRate, x: Tensor, beta: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    y = model(x, beta=beta)
    pattern = torch.linspace(-1, 2, y.numel(), dtype=torch.float64).view(y.shape).cos().to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, [x, *model.parameters()], pattern)]


def exact(model: mk.MultiRate, x: Tensor, beta: Tensor) -> list[Tensor]:
    with mk.override(backend="reference"):
        return gradients(copy.deepcopy(model).double(), x.double(), beta.double())


def near(found: list[Tensor], targets: list[Tensor], relative: float = 2e-5) -> bool:
    """Each as a whole; of what float32 has no numbers for, nearly 0."""
    pairs = zip(found, targets, strict=True)
    return all((value.double() - target).norm() <= relative * target.norm() + 1e-33 for value, target in pairs)


@pytest.mark.parametrize("activation", [None, nn.ReLU()], ids=["none", "relu"])
@pytest.mark.parametrize("degree", [1, 2, 3])
@pytest.mark.parametrize("kind", ["softplus", "sigmoid"])
@pytest.mark.parametrize("values", GATES)
@pytest.mark.parametrize("layer", LAYERS)
def test_the_result_is_kept_where_it_tells(layer, values, kind, degree, activation):
    p, t, tells = GATES[values]
    for dtype, relative in ((torch.float32, 2e-5), (torch.float64, 1e-11)):
        plain, x = network(layer, activation, dtype)
        model, beta = gated(plain, kind, degree, p, t).to(dtype), betas(dtype)
        assert is_kept(model(x, beta=beta)) == tells
        model.zero_grad()
        assert near(gradients(model, x, beta), exact(model, x, beta), relative)


@pytest.mark.parametrize("activation", [None, nn.ReLU()], ids=["none", "relu"])
@pytest.mark.parametrize("layer", LAYERS)
def test_batches_of_one_and_two(layer, activation):
    """Of one sample a gate serves all rows, as of one beta."""
    for samples in (1, 2):
        plain, x = network(layer, activation)
        model, beta = gated(plain, "softplus", 3, 1.0, 0.5), betas()[:samples]
        assert is_kept(model(x[:samples], beta=beta))
        model.zero_grad()
        assert near(gradients(model, x[:samples], beta), exact(model, x[:samples], beta))


@pytest.mark.parametrize("layer", LAYERS)
def test_what_is_kept_otherwise(layer):
    """u, whose memory is not y's: of roots, whose slope has no bound in the gate, and in half precision."""
    plain, x = network(layer, None)
    assert not is_kept(gated(plain, "sqrt", 1, -1.0, 0.5)(x, beta=betas()))
    model = gated(network(layer, None)[0], "softplus", 1, 1.0, 0.5)
    with torch.autocast("cpu", torch.bfloat16):
        assert not is_kept(model(x, beta=betas()))
    model.network.bfloat16()
    assert not is_kept(model(x.bfloat16(), beta=betas()))


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_curve_is_looked_at_between_its_ends(layer, sign):
    """A gate that is open at both ends of the betas and closed between them, and a shift that is large there alone."""
    for part, p, t in (("gate", 12.0, 0.5), ("shift", 1.0, 0.0)):
        plain, x = network(layer, None)
        model = gated(plain, "softplus", 3, p, t)
        bend = 30.0 if part == "gate" else 2000.0 * sign
        with torch.no_grad():
            model.gate_weight.zero_()
            where = 3 if part == "gate" else CHANNELS + 3
            # bend * (eta^2 - 1) + p, at eta = 0 and at the ends +-1
            model.gate_weight[1, where] = bend
            model.gate_bias[where] = 0.0
        eta = torch.linspace(-1, 1, SAMPLES)
        beta = (eta * model.beta_range.std + model.beta_range.mean).exp()
        assert not is_kept(model(x, beta=beta))
        model.zero_grad()
        assert near(gradients(model, x, beta), exact(model, x, beta))


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("change", [lambda y: y.mul_(2), lambda y: y.relu_(), lambda y: y.view(-1)[3:].neg_()])
def test_a_result_changed_in_place_is_computed_again(layer, change):
    def changed(of: mk.MultiRate, to: Tensor, beta: Tensor) -> list[Tensor]:
        y = of(to, beta=beta).contiguous()
        y = y.clone() if y.dtype == torch.float64 else y
        change(y)
        pattern = torch.linspace(-1, 2, y.numel(), dtype=torch.float64).view(y.shape).cos().to(y.dtype)
        return [y.detach(), *torch.autograd.grad(y, [*of.parameters()], pattern)]

    plain, x = network(layer, nn.ReLU())
    model, beta = gated(plain, "softplus", 3, 1.0, 0.5), betas()
    with mk.override(backend="reference"):
        targets = changed(copy.deepcopy(model).double(), x.double(), beta.double())
    for _ in range(2):
        assert near(changed(model, x, beta), targets)


def test_betas_that_are_no_numbers_are_not_divided_by():
    plain, x = network("linear", None)
    model = gated(plain, "softplus", 3, 1.0, 0.5)
    model.beta_range = (1e-3, 1e3)
    with torch.no_grad():
        model.gate_bias[5] = float("nan")
        model.gate_bias[CHANNELS + 6] = float("inf")
    assert not is_kept(model(x, beta=betas()))

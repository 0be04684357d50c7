"""Gated layers that the compiled core calls, alone and in an nn.Sequential: what torch.nn would do with them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import parameter_gradients, randomize
from torch import Tensor, nn

import mrvae_kernels as mk
from mrvae_kernels import ops

pytestmark = pytest.mark.skipif(not ops.EXTENSION, reason=f"the compiled core is missing: {ops.EXTENSION_ERROR}")

BETAS = {"one beta": 0.3, "a beta a sample": torch.tensor([0.02, 0.3, 1.0, 4.0])}


GATES: dict[str, Any] = {
    "sqrt": "sqrt", "shifts": mk.GateSpec("softplus", shift=True), "inputs": mk.GateSpec("sigmoid", inputs="softplus"),
}


class Body(nn.Sequential):
    """A subclass, which stays its own class."""


class Doubled(nn.ReLU):
    """A ReLU that is none."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def body(*between: nn.Module, inplace: bool = True) -> nn.Sequential:
    inner = nn.Sequential(nn.Conv2d(6, 4, 3, groups=2), nn.ReLU(inplace=inplace))
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1), *between, nn.ReLU(), inner,
        nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.ReLU(), nn.Dropout(0.0), nn.Linear(8, 5),
    )


def gated(network: nn.Module | None = None, gates: Any = "sigmoid") -> mk.MultiRate:
    torch.manual_seed(1)
    model = mk.multirate(body() if network is None else network, gates).double()
    randomize(model)
    return model


def pictures(count: int = 4) -> Tensor:
    return torch.randn(count, 2, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def seen(model: mk.MultiRate, x: Tensor, beta: Any) -> mk.MultiRate:
    """The model after two calls: its plan is made and handed out."""
    for _ in range(2):
        model(x, beta=beta)
    assert model._plans.installed is not None
    return model


def run_plainly(model: mk.MultiRate, x: Tensor, beta: Any) -> Tensor:
    """By nn.Sequential's own loop, with gates handed out by Python, computed by the formula."""
    twin = copy.deepcopy(model)
    for module in list(twin.modules()):
        if isinstance(module, nn.Sequential) and type(module) is not Body:
            module.__class__ = nn.Sequential
    with mk.override(backend="reference"):
        y = twin(x, beta=beta)
    run_plainly.gradients = parameter_gradients(twin, y.square().sum())  # type: ignore[attr-defined]
    return y


def agrees(model: mk.MultiRate, x: Tensor, beta: Any) -> None:
    """Result and gradients are those of the plain loop with the formula."""
    expected = run_plainly(model, x, beta)
    seen(model, x, beta)
    y = model(x, beta=beta)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-12)
    pairs = zip(parameter_gradients(model, y.square().sum()), run_plainly.gradients, strict=True)  # type: ignore[attr-defined]
    for value, other in pairs:
        torch.testing.assert_close(value, other, rtol=1e-9, atol=1e-11)


@pytest.fixture(params=["fold", "epilogue"])
def strategy(request: pytest.FixtureRequest) -> Iterator[str]:
    with mk.override(strategy=request.param):
        yield request.param


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "as it is": body, "a subclass of ReLU": lambda: body(Doubled()), "a subclass of Sequential": lambda: Body(*body()),
    "in place": lambda: body(nn.ReLU(inplace=True)), "norms": lambda: body(nn.BatchNorm2d(6)),
    "an identity": lambda: body(nn.Identity()), "other activations": lambda: body(nn.ELU(inplace=True), nn.Tanh()),
    "dropout in place": lambda: body(nn.ReLU(), nn.Dropout(0.0, inplace=True)),
    "an empty one": lambda: body(nn.Sequential()),
}


@pytest.mark.parametrize("gates", GATES.values(), ids=GATES)
@pytest.mark.parametrize("network", NETWORKS)
def test_networks_and_their_gradients(network, gates, strategy):
    agrees(gated(NETWORKS[network](), gates), pictures(), 0.3)


@pytest.mark.parametrize("network", NETWORKS)
def test_networks_and_their_gradients_at_a_beta_a_sample(network):
    agrees(gated(NETWORKS[network]()), pictures(), BETAS["a beta a sample"])


@pytest.mark.parametrize("beta", BETAS.values(), ids=BETAS)
@pytest.mark.parametrize("dead", [(0,), (0, 1, 2, 3, 4, 5)])
def test_dead_gates(dead, beta):
    model = gated(gates="sqrt")
    with torch.no_grad():
        model.gate_weight.data[list(dead)] = 0.0
        model.gate_bias.data[list(dead)] = 0.5
    agrees(model, pictures(), beta)
    assert not model.gate_values(0.3)["0"][list(dead)].any()


@pytest.mark.parametrize("frozen", ["gate_", "network.0", "network.0.weight", "network.2", "network.9.bias", "network"])
@pytest.mark.parametrize("beta", BETAS.values(), ids=BETAS)
def test_frozen_parameters(beta, frozen):
    model = gated()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen))
    x = pictures()
    expected = run_frozen(copy.deepcopy(model), x, beta, "reference")
    seen(model, x, beta)
    for value, other in zip(run_frozen(model, x, beta, "cpp"), expected, strict=True):
        torch.testing.assert_close(value, other, rtol=1e-9, atol=1e-11)


def run_frozen(model: mk.MultiRate, x: Tensor, beta: Any, backend: str) -> list[Tensor]:
    with mk.override(backend=backend):
        model(x, beta=beta)
        model(x, beta=beta).square().sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    return [p.grad for p in model.parameters() if p.grad is not None]


def bits(model: mk.MultiRate, x: Tensor, beta: Any, joined: bool) -> list[Tensor]:
    """Result and gradients; not joined: every module called by nn.Sequential itself."""
    with one_by_one() if not joined else mk.override():
        y = seen(model, x, beta)(x, beta=beta)
    return [y, *parameter_gradients(model, y.square().sum())]


@contextmanager
def one_by_one() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mk.hosting.HostedSequential, "forward", nn.Sequential.forward)
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_same_bits_as_module_by_module(dtype, strategy):
    model, x = gated(body(inplace=False)).to(dtype), pictures().to(dtype)
    for joined, single in zip(bits(model, x, 0.3, True), bits(model, x, 0.3, False), strict=True):
        assert torch.equal(joined, single)


HOOKS: dict[str, Callable[[nn.Module, list[str]], Any]] = {
    "forward": lambda m, calls: m.register_forward_hook(lambda *_: calls.append("f")),
    "changes the result": lambda m, calls: m.register_forward_hook(lambda m, a, y: calls.append("f") or 2 * y),
    "forward pre": lambda m, calls: m.register_forward_pre_hook(lambda *_: calls.append("f")),
    "with keywords": lambda m, calls: m.register_forward_hook(lambda *_: calls.append("f"), with_kwargs=True),
    "full backward": lambda m, calls: m.register_full_backward_hook(lambda *_: calls.append("b")),
    "full backward pre": lambda m, calls: m.register_full_backward_pre_hook(lambda *_: calls.append("b")),
}


@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize("index", [0, 1, 2, 5, 6])
def test_hooks_of_a_layer_and_of_a_relu(index, kind):
    """Set after the plan was handed out, and gone again."""
    model, x, calls = gated(), pictures(), []
    before = seen(model, x, 0.3)(x, beta=0.3)
    handle = HOOKS[kind](model.network[index], calls)
    y = model(x, beta=0.3)
    y.square().sum().backward()
    assert len(calls) == 1
    assert torch.equal(y, before) == (kind != "changes the result")
    handle.remove()
    assert torch.equal(model(x, beta=0.3), before) and len(calls) == 1


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_hooks_of_all_modules(kind):
    model, x, names = seen(gated(body(inplace=False)), pictures(), 0.3), pictures(), []
    register = getattr(nn.modules.module, f"register_module_{kind}_hook")
    handle = register(lambda module, *_: names.append(module))
    try:
        model(x, beta=0.3).sum().backward()
    finally:
        handle.remove()
    assert set(names) == set(model.modules())


def test_a_forward_of_its_own():
    model, x = seen(gated(), pictures(), 0.3), pictures()
    before = model(x, beta=0.3)
    model.network[1].forward = lambda x: F.relu(x) * 0
    changed = model(x, beta=0.3)
    assert not torch.equal(changed, before)
    del model.network[1].forward
    original = model.network[0].forward
    model.network[0].forward = lambda x: 0 * original(x)
    torch.testing.assert_close(model(x, beta=0.3), changed)
    del model.network[0].forward
    assert torch.equal(model(x, beta=0.3), before)


@pytest.mark.parametrize("index", [0, 1])
def test_a_module_with_a_compiled_call(index):
    model, x = seen(gated(), pictures(), 0.3), pictures()
    before, calls = model(x, beta=0.3), []
    module = model.network[index]

    def compiled(x: Tensor) -> Tensor:
        calls.append(x)
        return module._call_impl(x)

    module._compiled_call_impl = compiled  # as module.compile() sets it
    assert torch.equal(model(x, beta=0.3), before) and len(calls) == 1


def test_children_replaced_removed_and_added():
    model, x = seen(gated(), pictures(), 0.3), pictures()
    network = model.network
    network[1] = nn.Tanh()
    agrees(model, x, 0.3)
    network[1] = Doubled()
    agrees(model, x, 0.3)
    del network[7]
    agrees(model, x, 0.3)
    network.append(nn.Softplus())
    agrees(model, x, 0.3)
    network.insert(1, nn.ReLU6())
    agrees(model, x, 0.3)


def test_slices_are_sequentials_of_the_same_layers():
    model, x = seen(gated(), pictures(), 0.3), pictures()
    with model.at(0.3):
        parts = model.network[6:](model.network[:6](x))
        torch.testing.assert_close(parts, model(x, beta=0.3), rtol=1e-12, atol=1e-14)
        assert isinstance(model.network[:2], nn.Sequential) and len(model.network[:2]) == 2
    with pytest.raises(RuntimeError, match="called without a beta"):
        model.network[:2](x)


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, str]:
        return x, "more"


class First(nn.Module):
    def forward(self, pair: tuple[Tensor, str]) -> Tensor:
        assert pair[1] == "more"
        return pair[0]


class Listed(nn.Module):
    def forward(self, values: list[Tensor]) -> Tensor:
        return torch.stack(values).sum(0)


def test_what_is_no_tensor_passes_through():
    network = nn.Sequential(Listed(), nn.Linear(4, 3), Pair(), First(), nn.ReLU(), nn.Linear(3, 2), Pair())
    model = mk.multirate(network, "sigmoid")
    x = [torch.randn(5, 4) for _ in range(3)]
    results = [model(x, beta=0.3) for _ in range(3)]
    assert results[0][1] == "more" and all(torch.equal(y, results[0][0]) for y, _ in results)
    assert not isinstance(results[2][0], nn.Parameter)


class Raises(nn.Module):
    raising = False

    def forward(self, x: Tensor) -> Tensor:
        if self.raising:
            raise KeyError("from inside")
        return x


def test_a_child_that_raises():
    model, x = seen(gated(body(Raises())), pictures(), 0.3), pictures()
    before = model(x, beta=0.3)
    model.network[1].raising = True
    for _ in range(2):
        with pytest.raises(KeyError, match="from inside"):
            model(x, beta=0.3)
    with pytest.raises(RuntimeError, match="called without a beta"):
        model.network[0](x)
    model.network[1].raising = False
    assert torch.equal(model(x, beta=0.3), before)
    for wrong in (x[:, :1], x.float(), x[0, 0]):
        with pytest.raises((ValueError, TypeError, RuntimeError)):
            model(wrong, beta=0.3)
        assert torch.equal(model(x, beta=0.3), before)

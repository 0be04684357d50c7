"""Calls of a multi-rate network, one after another: whatever changes in between, each gives what a first call gives."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from helpers import parameter_gradients
from test_hosted import gated, pictures, seen
from torch import Tensor, nn

import mrvae_kernels as mk
from mrvae_kernels import ops

pytestmark = pytest.mark.skipif(not ops.EXTENSION, reason=f"the compiled core is missing: {ops.EXTENSION_ERROR}")


def fresh(model: mk.MultiRate, *args: Any, **keywords: Any) -> Tensor:
    """What a copy gives that was never called, by the formula."""
    with mk.override(backend="reference"):
        return copy.deepcopy(model)(*args, **keywords)


def close(value: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12)


def linear(*more: nn.Module) -> mk.MultiRate:
    return gated(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3), *more))


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


BETAS: dict[str, Any] = {
    "number": 0.5, "whole number": 2, "0-d": torch.tensor(0.5), "0-d double": torch.tensor(0.5, dtype=torch.float64),
    "0-d whole": torch.tensor(2), "half": torch.tensor(0.5, dtype=torch.bfloat16), "low end": 0.01, "high end": 10.0,
    "a beta a sample": torch.tensor([0.02, 0.3, 1.0, 4.0]), "list": [0.02, 0.3, 1.0, 4.0],
    "strided": torch.tensor([[0.02, 0], [0.3, 0], [1.0, 0], [4.0, 0]])[:, 0],
    "expanded": torch.tensor(0.7).expand(4), "float32 ends": torch.tensor([0.01, 10.0, 0.01, 10.0]),
}


@pytest.mark.parametrize("before", ["number", "a beta a sample"])
@pytest.mark.parametrize("kind", BETAS)
def test_betas_of_every_kind_after_others(kind, before):
    model, x = linear(), numbers(4, 4)
    seen(model, x, BETAS[before])
    for _ in range(3):
        y = model(x, beta=BETAS[kind])
        close(y, fresh(model, x, beta=BETAS[kind]))
    found = parameter_gradients(model, y.square().sum())
    twin = copy.deepcopy(model)
    with mk.override(backend="reference"):
        expected = parameter_gradients(twin, twin(x, beta=BETAS[kind]).square().sum())
    for value, other in zip(found, expected, strict=True):
        torch.testing.assert_close(value, other, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("beta", [20.0, torch.tensor(0.001), torch.tensor([20.0, 0.3, 0.3, 0.3])])
def test_a_beta_out_of_range_warns_every_time(beta):
    model, x = linear(), numbers(4, 4)
    for known in (0.3, torch.tensor([0.3] * 4)):
        seen(model, x, known)
    for _ in range(3):
        with pytest.warns(UserWarning, match="lies outside the range"):
            y = model(x, beta=beta)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        close(y, fresh(model, x, beta=beta))


@pytest.mark.parametrize("beta", [
    float("nan"), -1.0, 0.0, float("inf"), None, "0.3", True, torch.tensor(float("nan")), torch.tensor(-1.0),
    torch.tensor([0.3, 0.3, 0.3, float("nan")]), torch.full((2, 2), 0.3),
])
def test_a_bad_beta_is_an_error_every_time(beta):
    model, x = linear(), numbers(4, 4)
    before = seen(model, x, 0.3)(x, beta=0.3)
    for _ in range(2):
        with pytest.raises(ValueError, match="beta"):
            model(x, beta=beta)
        assert torch.equal(model(x, beta=0.3), before)


@pytest.mark.parametrize("count", [1, 3, 5])
def test_a_wrong_number_of_betas_is_named_every_time(count):
    model, x = linear(), numbers(4, 4)
    seen(model, x, torch.full((4,), 0.3))
    for _ in range(2):
        with pytest.raises(ValueError, match=f"{count} values for 4 samples"):
            model(x, beta=torch.full((count,), 0.3))


@pytest.mark.parametrize("beta", [0.3, [0.02, 0.3, 1.0, 4.0]])
def test_a_beta_with_a_gradient(beta):
    model, x, found = linear(), numbers(4, 4), []
    seen(model, x, torch.tensor(beta))
    for backend in ("cpp", "reference"):
        with mk.override(backend=backend):
            leaf = torch.tensor(beta, dtype=torch.float64, requires_grad=True)
            found.append(torch.autograd.grad(model(x, beta=leaf).square().sum(), leaf)[0])
    close(*found)
    assert found[0].all()


@pytest.mark.parametrize("calls", [0, 2])
def test_a_tangent_of_beta_is_refused_not_lost(calls):
    model, x = linear(), numbers(4, 4)
    for _ in range(calls):
        model(x, beta=0.3)
    with torch.autograd.forward_ad.dual_level():
        beta = torch.autograd.forward_ad.make_dual(torch.tensor(0.3), torch.tensor(1.0))
        with pytest.raises(RuntimeError, match="forward AD|jvp"):
            model(x, beta=beta)


GEOMETRY: list[tuple[str, Any]] = [("stride", (2, 2)), ("padding", (0, 0)), ("padding", "same"), ("dilation", (2, 2)),
                                   ("padding_mode", "reflect")]


@pytest.mark.parametrize("calls", [0, 1, 2])
@pytest.mark.parametrize(("name", "value"), GEOMETRY)
@pytest.mark.parametrize("strategy", ["fold", "epilogue"])
def test_another_stride_or_padding_counts_from_the_next_call(strategy, name, value, calls):
    model, x = gated(nn.Sequential(nn.Conv2d(2, 3, 3, padding=1))), pictures()
    with mk.override(strategy=strategy):
        for _ in range(calls):
            model(x, beta=0.3)
        setattr(model.network[0], name, value)
        for _ in range(3):
            close(model(x, beta=0.3), fresh(model, x, beta=0.3))
        with model.at(0.3):
            model.network[0].dilation = (1, 2)
        for _ in range(3):
            close(model(x, beta=0.3), fresh(model, x, beta=0.3))


class Padding(nn.Module):
    """Pads by what its input needs, as networks that came from elsewhere do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(2, 3, 3)
        self.reach = 0

    def forward(self, x: Tensor) -> Tensor:
        self.layer.padding = (self.reach, self.reach)
        return self.layer(x)


def test_a_padding_that_forward_sets_counts_in_this_very_call():
    model, x = seen(gated(Padding()), pictures(), 0.3), pictures()
    installed = model._plans.installed
    close(model(x, beta=0.3), fresh(model, x, beta=0.3))
    assert model._plans.installed is installed  # the same padding again is no change
    for reach in (1, 2, 0):
        model.network.reach = reach
        for _ in range(3):
            close(model(x, beta=0.3), fresh(model, x, beta=0.3))


class Calling(nn.Module):
    """Calls a model, its own perhaps, between its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.inner = nn.Linear(4, 64), nn.Linear(64, 4), []

    def forward(self, x: Tensor, other: Tensor | None = None, others: Any = None, block: bool = False) -> Tensor:
        h = self.a(x)
        if other is not None and block:
            with self.inner[0].at(others):
                h = h + self.inner[0].network(other).sum()
        elif other is not None:
            h = h + self.inner[0](other, beta=others).sum()
        return self.b(h)


@pytest.mark.parametrize("block", [False, True])
@pytest.mark.parametrize(
    "inner", [(4, 0.5), (300, 0.5), (300, torch.full((300,), 0.5))], ids=["small", "big", "samples"]
)
@pytest.mark.parametrize("outer", [0.3, torch.tensor([0.02, 0.3, 1.0, 4.0])], ids=["one", "a sample"])
def test_a_call_or_a_block_within_a_call(outer, inner, block):
    model, x, (count, beta) = gated(Calling()), numbers(4, 4), inner
    other = numbers(count, 4)
    expected = fresh(model, x, beta=outer), fresh(model, other, beta=beta).sum()
    model.network.inner.append(model)
    seen(model, other, beta)
    seen(model, x, outer)
    for _ in range(4):
        with_inner = model(x, other, beta, block, beta=outer)
        h_only = model(x, beta=outer)
        close(h_only, expected[0])
        weight = model.network.b.weight
        gate = model.gate_values(outer)["b"]
        close(with_inner, expected[0] + expected[1] * gate * weight.sum(1))


def test_calls_within_a_block():
    model, x = seen(linear(), numbers(4, 4), 0.3), numbers(4, 4)
    for _ in range(3):
        with model.at(torch.tensor([0.02, 0.3, 1.0, 4.0])):
            inside = model.network(x)
            for beta in (0.5, [0.5] * 4):
                close(model(x, beta=beta), fresh(model, x, beta=0.5))
            with model.at(5.0):
                close(model.network(x), fresh(model, x, beta=5.0))
            assert torch.equal(model.network(x), inside)
        close(model(x, beta=0.5), fresh(model, x, beta=0.5))


class Arguments(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor, *more: Any, scale: float = 1.0) -> Tensor:
        return self.layer(input=x) * scale + self.layer(x) * len(more)


def test_other_arguments_shapes_and_keywords():
    model = gated(Arguments())
    for _ in range(2):
        for args in ((numbers(5, 4),), (numbers(2, 5, 4),), (numbers(4),), (numbers(5, 4), 1, None), (numbers(0, 4),)):
            for keywords in ({}, {"scale": 2.0}):
                for _ in range(3):
                    close(model(*args, **keywords, beta=0.3), fresh(model, *args, **keywords, beta=0.3))
        for rows in (5, 300):
            for _ in range(2):
                x = numbers(rows, 4)
                close(model(x=x, beta=0.3), fresh(model, x, beta=0.3))

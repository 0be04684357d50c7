"""Training a MultiRate network: nesting, re-entrancy, activation checkpointing, plans."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import BETA, ConvolutionalVAE, build_network, images, parameter_gradients, randomize, relative_error
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import mrvae_kernels as mk


class Outer(nn.Module):
    """A network that holds a multi-rate network of its own, run at another beta."""

    def __init__(self, inner: mk.MultiRate) -> None:
        super().__init__()
        self.before, self.inner = nn.Conv2d(1, 1, 1).double(), inner

    def forward(self, x: Tensor, inner_beta: object = 0.5) -> Tensor:
        return self.inner(self.before(x), beta=inner_beta)


def test_nested_models_each_at_their_own_beta(backend):
    inner, x = build_network(), images()
    outer = mk.multirate(Outer(inner), "softplus")
    assert list(outer.gated) == ["before"] and "MultiRate" in outer.left["inner"]
    gate = outer.gate_values(4.0)["before"]
    expected = inner(
        gate[:, None, None] * outer.network.before.__class__.plain.forward(outer.network.before, x), beta=0.5
    )
    torch.testing.assert_close(outer(x, beta=4.0), expected)
    torch.testing.assert_close(outer(x, beta=[4.0] * 5, inner_beta=[0.5] * 5), expected)
    assert relative_error(outer(x, beta=4.0, inner_beta=9.0), expected) > 1e-3
    outer(x, beta=4.0).sum().backward()
    assert inner.gate_weight.grad is not None and outer.gate_weight.grad is not None


def test_two_models_at_once_and_one_inside_the_others_block(backend):
    first, second, x = build_network(), build_network("softplus"), images()
    with torch.no_grad():
        second.gate_bias.add_(0.5)
    alone = first(x, beta=0.3), second(x, beta=4.0)
    with first.at(0.3), second.at(4.0):
        torch.testing.assert_close(first.network(x), alone[0])
        torch.testing.assert_close(second.network(x), alone[1])
        torch.testing.assert_close(first(x, beta=4.0), first(x, beta=[4.0] * 5))
        torch.testing.assert_close(first.network(x), alone[0])


class Twice(nn.Module):
    """Calls the same layers twice in one forward, itself once more inside."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor, model: mk.MultiRate | None = None) -> Tensor:
        h = self.layer(x)
        inside = 0 if model is None else model(x, beta=9.0)
        return self.layer(h) + inside


def test_a_model_may_call_itself_at_another_beta(backend):
    model = randomize(mk.multirate(Twice().double(), "softplus"))
    x = torch.randn(50, 4, dtype=torch.float64)
    for _ in range(2):
        torch.testing.assert_close(model(x, model, beta=0.3), model(x, beta=0.3) + model(x, beta=9.0))


@pytest.mark.parametrize("beta", [0.3, BETA], ids=["shared", "per sample"])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("seen_before", [False, True])
def test_a_checkpoint_around_the_model_gives_the_same_gradients(backend, beta, reentrant, seen_before):
    model, x = build_network(with_norm=True).eval(), images().requires_grad_()
    twin = copy.deepcopy(model)
    expected = parameter_gradients(twin, twin(x, beta=beta).square().sum())
    if seen_before:
        model(x, beta=beta)
    y = checkpoint(lambda v: model(v, beta=beta), x, use_reentrant=reentrant)
    y.square().sum().backward()
    for parameter, other in zip(model.parameters(), expected, strict=True):
        found = torch.zeros(()) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(found, other.expand_as(found), rtol=1e-9, atol=1e-11)


class Checkpointed(ConvolutionalVAE):
    """Recomputes its halves in backward."""

    context = None

    def forward(self, x: Tensor) -> Tensor:
        options = {} if self.context is None else {"context_fn": self.context}
        z = checkpoint(self.encoder, x, use_reentrant=False, **options)
        return checkpoint(self.decoder, z, use_reentrant=False, **options)


@pytest.mark.parametrize("beta", [0.3, BETA], ids=["shared", "per sample"])
def test_checkpoints_inside_the_network_recompute_with_the_forwards_gates(backend, beta):
    plain, x = build_network(), images()
    expected = parameter_gradients(plain, plain(x, beta=beta).square().sum())
    inside = mk.multirate(Checkpointed().double())
    inside.load_state_dict(plain.state_dict())
    with pytest.raises(RuntimeError, match="context_fn=mrvae_kernels.checkpoint_context"):
        inside(x, beta=beta).square().sum().backward()
    inside.network.context = mk.checkpoint_context(inside)
    for _ in range(2):
        loss = inside(x, beta=beta).square().sum()
        inside(x, beta=9.0)  # another beta before the backward
        for value, other in zip(parameter_gradients(inside, loss), expected, strict=True):
            torch.testing.assert_close(value, other, rtol=1e-9, atol=1e-11)
    with pytest.raises(RuntimeError, match="outside a forward"):
        mk.checkpoint_context(inside)()


def test_the_plan_gives_what_no_plan_gives_for_any_order_of_batches_and_overrides(backend):
    model = build_network(with_norm=True).eval()
    for count, strategy in [
        (1, None),
        (40, None),
        (1, "fold"),
        (40, "epilogue"),
        (1, None),
        (40, "fold"),
        (3, None),
        (40, None),
        (1, None),
    ]:
        x, fresh = images(count), copy.deepcopy(model)
        fresh._plans.forget()
        with mk.override(strategy=strategy):
            expected = fresh(x, beta=0.3)
            for _ in range(2):
                torch.testing.assert_close(model(x, beta=0.3), expected, rtol=1e-11, atol=1e-12)
            torch.testing.assert_close(
                parameter_gradients(model, model(x, beta=0.3).sum()),
                parameter_gradients(fresh, expected.sum()),
                rtol=1e-9,
                atol=1e-10,
            )


def test_the_plan_is_what_the_cost_model_says():
    model = build_network()
    for strategy in ("fold", "epilogue"):
        with mk.override(strategy=strategy):
            model(images(), beta=0.3)
            plan = list(model._plans.made.values())[-1]
            for entry, how in zip(model._entries, plan, strict=True):
                assert how == (strategy if entry.adapter.product else "fold"), entry.name
    for count in range(1, 60):
        model(images(count), beta=0.3)
    assert len(model._plans.made) <= 33, "the cache of plans grows without bound"


def test_fold_for_one_beta_a_sample_is_refused_not_ignored(backend):
    with mk.override(strategy="fold"), pytest.raises(ValueError, match="one value a sample"):
        build_network()(images(), beta=BETA)

"""Training and keeping a MultiRate network: nesting, checkpointing, plans, running statistics, state, autocast."""

from __future__ import annotations

import copy
import io
import re

import pytest
import torch
from helpers import ConvolutionalVAE, randomize, relative_error
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import mrvae_kernels as mk

BETA = [0.02, 0.3, 1.0, 4.0, 9.0]


def images(count: int = 5) -> Tensor:
    return torch.randn(count, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def build(gates=None, with_norm: bool = False, **options) -> mk.MultiRate:
    torch.manual_seed(0)
    return randomize(mk.multirate(ConvolutionalVAE(with_norm).double(), gates, **options))


class Outer(nn.Module):
    """A network that holds a multi-rate network of its own, run at another beta."""

    def __init__(self, inner: mk.MultiRate) -> None:
        super().__init__()
        self.before, self.inner = nn.Conv2d(1, 1, 1).double(), inner

    def forward(self, x: Tensor, inner_beta: object = 0.5) -> Tensor:
        return self.inner(self.before(x), beta=inner_beta)


def test_nested_models_each_at_their_own_beta(backend):
    inner, x = build(), images()
    outer = mk.multirate(Outer(inner), "softplus")
    assert list(outer.gated) == ["before"] and "MultiRate" in outer.left["inner"]
    gate = outer.gate_values(4.0)["before"]
    expected = inner(gate[:, None, None] * outer.network.before.__class__.plain.forward(outer.network.before, x), beta=0.5)
    torch.testing.assert_close(outer(x, beta=4.0), expected)
    torch.testing.assert_close(outer(x, beta=[4.0] * 5, inner_beta=[0.5] * 5), expected)
    assert relative_error(outer(x, beta=4.0, inner_beta=9.0), expected) > 1e-3
    outer(x, beta=4.0).sum().backward()
    assert inner.gate_weight.grad is not None and outer.gate_weight.grad is not None


def test_two_models_at_once_and_one_inside_the_others_block(backend):
    first, second, x = build(), build("softplus"), images()
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


def grads(model: mk.MultiRate, loss: Tensor) -> list[Tensor]:
    return [g if g is not None else torch.zeros(()) for g in torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)]


@pytest.mark.parametrize("beta", [0.3, BETA], ids=["shared", "per sample"])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("seen_before", [False, True])
def test_a_checkpoint_around_the_model_gives_the_same_gradients(backend, beta, reentrant, seen_before):
    model, x = build(with_norm=True).eval(), images().requires_grad_()
    twin = copy.deepcopy(model)
    expected = grads(twin, twin(x, beta=beta).square().sum())
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
    plain, x = build(), images()
    expected = grads(plain, plain(x, beta=beta).square().sum())
    inside = mk.multirate(Checkpointed().double())
    inside.load_state_dict(plain.state_dict())
    with pytest.raises(RuntimeError, match="context_fn=mrvae_kernels.checkpoint_context"):
        inside(x, beta=beta).square().sum().backward()
    inside.network.context = mk.checkpoint_context(inside)
    for _ in range(2):
        loss = inside(x, beta=beta).square().sum()
        inside(x, beta=9.0)  # another beta before the backward
        for value, other in zip(grads(inside, loss), expected, strict=True):
            torch.testing.assert_close(value, other, rtol=1e-9, atol=1e-11)
    with pytest.raises(RuntimeError, match="outside a forward"):
        mk.checkpoint_context(inside)()


def test_the_plan_gives_what_no_plan_gives_for_any_order_of_batches_and_overrides(backend):
    model = build(with_norm=True).eval()
    for count, strategy in [(1, None), (40, None), (1, "fold"), (40, "epilogue"), (1, None), (40, "fold"), (3, None), (40, None), (1, None)]:
        x, fresh = images(count), copy.deepcopy(model)
        fresh._plans = {}
        with mk.override(strategy=strategy):
            expected = fresh(x, beta=0.3)
            for _ in range(2):
                torch.testing.assert_close(model(x, beta=0.3), expected, rtol=1e-11, atol=1e-12)
            torch.testing.assert_close(grads(model, model(x, beta=0.3).sum()), grads(fresh, expected.sum()), rtol=1e-9, atol=1e-10)


def test_the_plan_is_what_the_cost_model_says():
    model = build()
    products = [i for i, entry in enumerate(model._entries) if entry.adapter.product]
    for strategy, planned in (("fold", tuple(products)), ("epilogue", ())):
        with mk.override(strategy=strategy):
            model(images(), beta=0.3)
            assert list(model._plans.values())[-1] == planned
    for count in range(1, 60):
        model(images(count), beta=0.3)
    assert len(model._plans) <= 33, "the cache of plans grows without bound"


def test_fold_for_one_beta_a_sample_is_refused_not_ignored(backend):
    with mk.override(strategy="fold"), pytest.raises(ValueError, match="one value a sample"):
        build()(images(), beta=BETA)


def test_recalibrated_statistics_are_those_of_the_data_at_this_beta(backend):
    model = build(with_norm=True)
    model.network.encoder[3].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    batches = [images(), images(4) + 1, images(6) * 2]
    assert model.recalibrate(batches, 0.3) == 3
    assert {name: module.training for name, module in model.named_modules()} == modes
    norm = model.network.encoder[1]
    h = [nn.functional.conv2d(x, model.network.encoder[0].weight, model.network.encoder[0].bias, 2, 1) for x in batches]
    torch.testing.assert_close(norm.running_mean, torch.stack([v.mean((0, 2, 3)) for v in h]).mean(0))
    torch.testing.assert_close(norm.running_var, torch.stack([v.var((0, 2, 3)) for v in h]).mean(0))
    assert norm.momentum == 0.1 and model.recalibrate([(x,) for x in batches], 0.3) == 3
    torch.testing.assert_close(norm.running_mean, torch.stack([v.mean((0, 2, 3)) for v in h]).mean(0))


class TwoNorms(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3), nn.BatchNorm1d(3))


def test_the_second_norms_statistics_follow_beta():
    model = randomize(mk.multirate(TwoNorms(), "sigmoid"))
    x = torch.randn(4096, 4)

    def off_center(beta: float) -> float:
        y = model.eval()(x, beta=beta) - model.network[4].bias * model.gate_values(beta)["4"]
        return y.mean(0).abs().max().item()

    for beta, other in ((0.02, 9.0), (9.0, 0.02)):
        model.recalibrate([x], beta)
        assert off_center(beta) < 1e-3 < 0.05 < off_center(other)


def test_recalibrate_with_no_batch_or_a_failing_one_loses_nothing():
    model = build(with_norm=True)
    model(images(), beta=0.3)
    before = copy.deepcopy(model.state_dict())
    modes = [m.training for m in model.modules()]
    for batches, error in (([], ValueError), ([images(), images()[:, :, :2]], (ValueError, RuntimeError)), (images(), TypeError), (3, TypeError)):
        with pytest.raises(error):
            model.recalibrate(batches, 0.3)
        assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
        assert model.network.encoder[1].momentum == 0.1 and [m.training for m in model.modules()] == modes
    assert build().recalibrate([], 0.3) == 0


def test_a_state_dict_goes_through_a_file_safely():
    model, x = build(with_norm=True), images()
    model(x, beta=0.3)
    model.eval()
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = mk.multirate(ConvolutionalVAE(True).double()).eval()
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(x, beta=0.3), model(x, beta=0.3))
    plain = ConvolutionalVAE(True).double()
    plain.load_state_dict(model.network.state_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta_range": (0.1, 10.0)}, r"beta_range = [0.01, 10.0], this MultiRate has [0.1, 10.0]"), ({"gates": "softplus"}, "gates = ["),
        ({"gates": {"encoder": mk.GateSpec("sigmoid", shift=True), "decoder": "sqrt"}}, "gates = ["), ({"exclude": ["decoder.5"]}, "gates = ["),
    ],
    ids=["range", "kind", "shift", "layers"],
)
def test_a_state_dict_of_other_gates_is_refused_before_anything_is_copied(options, message):
    other = build(**options)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=re.escape(f"the checkpoint was made with {message}")):
        other.load_state_dict(build().state_dict())
    assert all(torch.equal(before[k], v) for k, v in other.state_dict().items())


def test_missing_keys_and_other_shapes_are_errors():
    state = build().state_dict()
    for key in ("gate_weight", "_extra_state", "network.encoder.0.weight"):
        with pytest.raises(RuntimeError, match=key):
            build().load_state_dict({k: v for k, v in state.items() if k != key})
    with pytest.raises(RuntimeError, match="size mismatch for gate_bias"):
        build().load_state_dict({**state, "gate_bias": state["gate_bias"][:-1]})


@pytest.mark.parametrize("beta", [0.3, BETA], ids=["shared", "per sample"])
@pytest.mark.parametrize("strategy", ["fold", "epilogue", None])
def test_bfloat16_and_autocast_stay_near_float64(backend, beta, strategy):
    if strategy == "fold" and beta is BETA:
        strategy = None
    exact, x = build(with_norm=True).eval(), images()
    expected = exact(x, beta=beta)
    with mk.override(strategy=strategy):
        low = copy.deepcopy(exact).bfloat16()
        y = low(x.bfloat16(), beta=beta)
        assert y.dtype == torch.bfloat16 and relative_error(y.double(), expected) < 0.05
        mixed = copy.deepcopy(exact).float()
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16):
                y = mixed(x.float(), beta=beta)
            assert y.dtype == torch.bfloat16 and relative_error(y.double(), expected) < 0.05
        y.float().square().sum().backward()
        reference = dict(zip((n for n, _ in exact.named_parameters()), grads(exact, expected.square().sum()), strict=True))
        for name, parameter in mixed.named_parameters():
            if parameter.grad is not None:
                assert parameter.grad.dtype == torch.float32
                error = (parameter.grad.double() - reference[name]).norm() / reference[name].norm()
                assert error < 0.15, name  # a rounded unit near 0 may fall on the other side of ReLU


def test_a_layer_replaced_after_multirate_is_named():
    model = mk.multirate(ConvolutionalVAE(True))
    model.network = nn.SyncBatchNorm.convert_sync_batchnorm(model.network)
    with pytest.raises(RuntimeError, match=r"'encoder.1' is a plain SyncBatchNorm: it was replaced after multirate\(\)"):
        model(images().float(), beta=0.5)


def test_channels_last_networks(backend):
    model, x = build(with_norm=True).eval(), images()
    for beta in (0.3, BETA):
        expected = model(x, beta=beta)
        wanted = grads(model, expected.sum())
        last = copy.deepcopy(model).to(memory_format=torch.channels_last)
        y = last(x.to(memory_format=torch.channels_last), beta=beta)
        torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-12)
        for value, other in zip(grads(last, y.sum()), wanted, strict=True):
            torch.testing.assert_close(value, other, rtol=1e-9, atol=1e-11)
    x = torch.randn(2, 64, 8, 8, dtype=torch.float64).to(memory_format=torch.channels_last)
    layer = mk.multirate(nn.Conv2d(64, 64, 3).double().to(memory_format=torch.channels_last), "sqrt")
    for strategy in ("fold", "epilogue"):
        with mk.override(strategy=strategy):
            assert layer(x, beta=0.5).is_contiguous(memory_format=torch.channels_last)

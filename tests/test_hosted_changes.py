"""Multi-rate networks that change, or are called in another mode, once their plan is made; copies and threads."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from helpers import parameter_gradients
from test_hosted import body, gated, pictures, seen
from test_hosted_calls import close, fresh, linear, numbers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import mrvae_kernels as mk
from mrvae_kernels import ops

pytestmark = pytest.mark.skipif(not ops.EXTENSION, reason=f"the compiled core is missing: {ops.EXTENSION_ERROR}")


def swap(model: mk.MultiRate) -> None:
    model.network[0].weight = nn.Parameter(torch.randn_like(model.network[0].weight))


def in_place(model: mk.MultiRate) -> None:
    with torch.no_grad():
        model.gate_bias.mul_(0.5)
        model.network[2].weight.data = torch.randn_like(model.network[2].weight)


def without_bias(model: mk.MultiRate) -> None:
    model.network[2].bias = None


def transposed(model: mk.MultiRate) -> None:
    model.network[0].weight = nn.Parameter(torch.randn(4, 6, dtype=torch.float64).t())


CHANGES: dict[str, Callable[[mk.MultiRate], Any]] = {
    "a parameter": swap, "values": in_place, "no bias": without_bias, "float64 and back": lambda m: m.float().double(),
    "another layout": transposed,
}


@pytest.mark.parametrize("strategy", ["fold", "epilogue", None])
@pytest.mark.parametrize("change", CHANGES)
def test_parameters_changed_between_calls(change, strategy):
    model, x = seen(linear(), numbers(8, 4), 0.3), numbers(8, 4)
    with mk.override(strategy=strategy):
        seen(model, x, 0.3)
        CHANGES[change](model)
        for _ in range(3):
            close(model(x, beta=0.3), fresh(model, x, beta=0.3))
    close(model(x, beta=0.3), fresh(model, x, beta=0.3))


def test_a_replaced_network_is_named():
    model, x = seen(linear(), numbers(4, 4), 0.3), numbers(4, 4)
    model.network = nn.Linear(4, 3).double()
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"model\.network was replaced after multirate"):
            model(x, beta=0.3)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_recording(mode):
    model, x = seen(linear(), numbers(4, 4), 0.3), numbers(4, 4)
    expected = model(x, beta=0.3)
    for _ in range(2):
        with mode():
            y = model(x, beta=0.3)
            assert torch.equal(y, expected) and not y.requires_grad
            with torch.enable_grad():
                assert torch.equal(model(x, beta=0.3), expected)
        assert model(x, beta=0.3).requires_grad


def test_under_autocast_as_without_a_plan():
    model, x = linear().float(), numbers(4, 4).float()
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x, beta=0.3)
            assert y.dtype == torch.bfloat16 and torch.equal(y, copy.deepcopy(model)(x, beta=0.3))
        assert torch.equal(model(x, beta=0.3), copy.deepcopy(model)(x, beta=0.3))


def test_under_transforms_and_other_parameters():
    model, x = seen(linear(), numbers(4, 4), 0.3), numbers(4, 4)
    expected = model(x, beta=0.3)
    close(torch.func.vmap(lambda row: model(row, beta=0.3))(x), expected)
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(given: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, given, (x,), {"beta": 0.3}).square().sum()

    found = torch.func.grad(loss)(parameters)
    recorded = parameter_gradients(model, expected.square().sum())
    for value, other in zip(found.values(), recorded, strict=True):
        close(value, other)
    other_values = {name: p * 0.5 for name, p in parameters.items()}
    twin = copy.deepcopy(model)
    twin.load_state_dict({**model.state_dict(), **other_values})
    close(loss(other_values), fresh(twin, x, beta=0.3).square().sum())
    assert torch.equal(model(x, beta=0.3), expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_and_hooks_around(reentrant):
    model, x = seen(gated(), pictures(), 0.3), pictures().requires_grad_()
    expected = parameter_gradients(model, model(x, beta=0.3).square().sum())
    checkpoint(lambda v: model(v, beta=0.3), x, use_reentrant=reentrant).square().sum().backward()
    for parameter, other in zip(model.parameters(), expected, strict=True):
        close(parameter.grad, other)
    with torch.autograd.graph.save_on_cpu():
        y = model(x, beta=0.3)
    for value, other in zip(parameter_gradients(model, y.square().sum()), expected, strict=True):
        close(value, other)


def test_threads_of_one_model_with_gradients():
    model, failures = seen(gated(), pictures(), 0.3), []
    x, betas = pictures(), (0.02, 0.3, 5.0)
    parameters = list(model.parameters())  # once: while a call runs, a folded norm holds others

    def gradients(beta: float) -> tuple[Tensor | None, ...]:
        return torch.autograd.grad(model(x, beta=beta).square().sum(), parameters, allow_unused=True)

    wanted = {beta: gradients(beta) for beta in betas}

    def run(beta: float) -> None:
        try:
            for _ in range(15):
                for value, other in zip(gradients(beta), wanted[beta], strict=True):
                    assert (value is None) == (other is None) and (value is None or close(value, other) is None)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(beta,)) for beta in betas]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


@pytest.mark.parametrize("way", ["forward", "backward", "block", "copy", "checkpoint", "raised"])
def test_nothing_outlives_the_model(way):
    model, x = seen(gated(), pictures(), 0.3), pictures()
    y = model(x, beta=0.3)
    if way == "backward":
        y.sum().backward(retain_graph=True)
    elif way == "block":
        with model.at(0.3):
            y = model.network(x)
    elif way == "copy":
        y = copy.deepcopy(model)(x, beta=0.3)
    elif way == "checkpoint":
        y = checkpoint(partial(model, beta=0.3), x, use_reentrant=False)
        y.sum().backward()
    elif way == "raised":
        with pytest.raises((RuntimeError, ValueError)):
            model(x[:, :1], beta=0.3)
    layer = model.network[0]
    kept = [weakref.ref(value) for value in (y, model, layer, layer.weight, model.gate_weight)]
    del y, model, layer
    gc.collect()
    assert [reference() for reference in kept] == [None] * len(kept)


def test_copies_and_files():
    model, x = seen(gated(), pictures(), 0.3), pictures()
    expected = model(x, beta=0.3)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    with model.at(0.3):
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)]
    for twin in copies:
        with pytest.raises(RuntimeError, match="called without a beta"):
            twin.network(x)
        for _ in range(3):
            torch.testing.assert_close(twin(x, beta=0.3), expected, rtol=1e-12, atol=1e-14)
        twin.network[0].padding = (2, 2)  # the copy's stage hears of it, the model's does not
        assert twin.network[0].padding == (2, 2) and model.network[0].padding == (1, 1)
        twin.network[3] = nn.Identity()
        with pytest.raises(RuntimeError, match="it was replaced"):
            twin(x, beta=0.3)
        assert torch.equal(model(x, beta=0.3), expected)


def test_a_baked_network_and_the_names_are_torchs():
    torch.manual_seed(1)
    plain = body().double()
    names = list(plain.state_dict())
    model = seen(mk.multirate(plain, "sigmoid"), pictures(), 0.3)
    assert [name.removeprefix("network.") for name in model.state_dict() if name.startswith("network.")] == names
    baked = mk.bake(model, 0.3)
    assert type(baked) is nn.Sequential and type(baked[2]) is nn.Sequential and type(baked[0]) is nn.Conv2d
    assert list(baked.state_dict()) == names
    assert not any({"_stage", "_share", "_direct"} & set(module.__dict__) for module in baked.modules())
    torch.testing.assert_close(baked(pictures()), model(pictures(), beta=0.3), rtol=1e-10, atol=1e-12)
    assert type(copy.deepcopy(baked)[:2]) is nn.Sequential


@pytest.mark.parametrize("calls", [0, 1, 3])
def test_an_exchanged_container_is_named(calls):
    network = nn.Sequential(OrderedDict(enc=nn.Sequential(nn.Linear(4, 3)), dec=nn.Linear(3, 4)))
    model, x = mk.multirate(network, gates="sigmoid"), torch.randn(4, 4)
    for _ in range(calls):
        model(x, beta=0.3)
    model.network.enc = nn.Sequential(nn.Linear(4, 3))
    with pytest.raises(RuntimeError, match="'enc.0' is a Linear: it was replaced"):
        model(x, beta=0.3)


@pytest.mark.parametrize("calls", [0, 1, 3])
def test_a_child_deleted_and_put_back_is_named(calls):
    inner = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model, x = mk.multirate(nn.Sequential(OrderedDict(enc=inner)), gates="sigmoid"), torch.randn(4, 4)
    for _ in range(calls):
        model(x, beta=0.3)
    del inner[2]
    inner.append(nn.Linear(4, 4))
    with pytest.raises(RuntimeError, match="'enc.2' is a Linear: it was replaced"):
        model(x, beta=0.3)


def test_a_shallow_copy_and_its_original_take_turns():
    model, x = mk.multirate(nn.Sequential(nn.Linear(4, 3)), gates="sigmoid"), torch.randn(4, 4)
    expected = model(x, beta=0.3)
    other = copy.copy(model)
    for _ in range(3):
        assert torch.equal(model(x, beta=0.3), expected) and torch.equal(other(x, beta=0.3), expected)


@pytest.mark.parametrize("calls", [0, 1, 3])
def test_layers_that_moved_keep_their_gates(calls):
    model, x = mk.multirate(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), gates="sigmoid"), torch.randn(4, 4)
    for _ in range(calls):
        model(x, beta=0.3)
    first, second = (mk.bake(model, 0.3)[i] for i in (0, 1))
    model.network.insert(0, model.network.pop(1))
    for _ in range(3):
        torch.testing.assert_close(model(x, beta=0.3), first(second(x)))

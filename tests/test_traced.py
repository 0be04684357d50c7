"""What torch.compile traces of a gated network: how much of it Dynamo looks at, and what it refuses."""

from __future__ import annotations

import copy
import pickle
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from helpers import randomize
from torch import Tensor, nn
from torch._dynamo.eval_frame import _debug_get_cache_entry_list
from torch._dynamo.testing import CompileCounter
from traced_cases import BETA, EACH, X, compiled, gated, network

import mrvae_kernels as mk
from mrvae_kernels import traced_epilogue


@pytest.fixture(autouse=True)
def _fresh():
    torch.compiler.reset()


def guards(call: Callable[..., Tensor], *arguments: Tensor) -> int:
    """Conditions that are looked at before every call of the compiled function."""
    compiled(call)(*arguments)
    (entry,) = _debug_get_cache_entry_list(call.__code__)

    def count(manager: Any) -> int:
        below = list(manager.get_child_managers())
        if hasattr(manager, "get_key_value_managers"):
            below += [part for pair in manager.get_key_value_managers().values() for part in pair if part is not None]
        return len(manager.get_leaf_guards()) + sum(map(count, below))

    return count(entry.guard_manager.root)


def test_a_gated_layer_is_guarded_no_more_than_a_plain_one():
    plain, ours = ([], [])
    for layers in (2, 6):
        torch.compiler.reset()
        net, model = network(layers), gated(layers)
        plain.append(guards(lambda x, net=net: net(x), X))
        ours.append(guards(lambda x, beta, model=model: model(x, beta=beta), X, BETA))
    each, gated_each = (plain[1] - plain[0]) / 4, (ours[1] - ours[0]) / 4
    assert gated_each <= each, (plain, ours)
    assert ours[0] - plain[0] <= 48, (plain, ours)  # beta, the range, the override, the gates


def test_copies_share_what_was_compiled():
    model, count = gated(), CompileCounter()
    models = [model, *(randomize(copy.deepcopy(model)) for _ in range(2))]
    for each in models:
        call = torch.compile(each, backend=count, fullgraph=True)
        torch.testing.assert_close(call(X, beta=BETA), each(X, beta=BETA))
    assert count.frame_count == 1


def test_layers_that_change_places_take_their_gates_along():
    model = gated()
    call = compiled(model)
    before = call(X, beta=BETA)
    model.network[0], model.network[2] = model.network[2], model.network[0]
    torch.testing.assert_close(call(X, beta=BETA), model(X, beta=BETA))
    assert not torch.allclose(call(X, beta=BETA), before)


def test_a_layer_that_was_replaced_is_refused_when_the_call_is_traced_again():
    model = gated()
    call = compiled(model)
    torch.testing.assert_close(call(X, beta=BETA), model(X, beta=BETA))
    model.network[0] = nn.Linear(4, 4).double()
    with pytest.raises(Exception, match="replaced or parametrized after multirate"):
        call(X, beta=BETA)


def test_a_layer_of_another_network_does_not_take_this_ones_gates():
    other = gated()

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.own = nn.Linear(4, 4)
            self.stranger = [other.network[0]]  # in a list: no child

        def forward(self, x: Tensor) -> Tensor:
            return self.stranger[0](self.own(x))

    model = mk.multirate(Both().double(), "sigmoid")
    with pytest.raises(RuntimeError, match="without a beta"):
        model(X, beta=BETA)
    with pytest.raises(Exception, match="without a beta"):
        compiled(model)(X, beta=BETA)


class Broken(nn.Module):
    """Two layers with a break of Dynamo's graph between them; the second runs as `second` says."""

    def __init__(self, second: Callable[..., Tensor] = nn.Module.__call__) -> None:
        super().__init__()
        self.a, self.b, self.second = nn.Linear(4, 4), nn.Linear(4, 4), second

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        torch._dynamo.graph_break()
        return self.second(self.b, x)


@torch.compiler.disable
def disabled(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x)


@pytest.mark.parametrize("second", [nn.Module.__call__, disabled])
@pytest.mark.parametrize("planned", [False, True])
def test_layers_behind_a_break_of_the_graph_have_their_gates(second, planned):
    model = randomize(mk.multirate(Broken(second).double(), "softplus"))
    for _ in range(3 * planned):
        model(X, beta=0.5)
    call = torch.compile(model, backend="eager")
    for beta in (BETA, 2.0, EACH):
        torch.testing.assert_close(call(X, beta=beta), model(X, beta=beta))


def test_networks_in_two_threads_keep_their_gates():
    def slow(layer: nn.Module, x: Tensor) -> Tensor:
        time.sleep(0.002)
        return layer(x)

    models = [randomize(mk.multirate(Broken(torch.compiler.disable(slow)).double(), "softplus")) for _ in range(2)]
    for model in models:
        model.gate_bias.data.normal_()
    calls = [torch.compile(model, backend="eager") for model in models]
    expected = [call(X, beta=BETA) for call in calls]
    assert not torch.equal(*expected)

    def run(i: int) -> bool:
        return all(torch.equal(calls[i](X, beta=BETA), expected[i]) for _ in range(20))

    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(run, range(2)))


def test_a_layer_called_by_keyword():
    model = randomize(mk.multirate(Broken(lambda layer, x: layer(input=x)).double(), "softplus"))
    expected = model(X, beta=BETA)
    torch.testing.assert_close(torch.compile(model, backend="eager")(X, beta=BETA), expected)


def test_copies_compile():
    model = gated()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.copy(model), model):
        torch.compiler.reset()
        torch.testing.assert_close(compiled(other)(X, beta=BETA), model(X, beta=BETA))


def test_networks_within_one_another_have_gates_of_their_own():
    inner = gated()

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)
            self.inner = [inner]

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.inner[0](self.first(x), beta=0.1))

    model = randomize(mk.multirate(Outer().double(), mk.GateSpec("softplus", shift=True)))
    torch.testing.assert_close(compiled(model)(X, beta=BETA), model(X, beta=BETA))


def test_an_override_is_seen_by_a_network_that_is_compiled_already(monkeypatch):
    model, used = gated(), []
    for strategy, kind in (("fold", traced_epilogue.Fold), ("epilogue", traced_epilogue.Epilogue)):
        apply = kind.apply
        monkeypatch.setattr(kind, "apply", lambda *args, how=strategy, apply=apply: used.append(how) or apply(*args))
    call = compiled(model)
    expected = call(X, beta=BETA)
    for strategy in ("fold", "epilogue"):
        used.clear()
        with mk.override(strategy=strategy):
            torch.testing.assert_close(call(X, beta=BETA), expected)
        assert set(used) == {strategy}
    each = EACH
    torch.testing.assert_close(call(X, beta=each), model(X, beta=each))
    with mk.override(strategy="fold"), pytest.raises(Exception, match="cannot be folded|needs one weight"):
        call(X, beta=each)


def test_no_truth_value_is_a_beta():
    for call in (gated(), compiled(gated())):
        with pytest.raises(Exception, match="beta is True"):
            call(X, beta=True)


def test_betas_of_another_length_are_refused():
    with pytest.raises(Exception, match="beta has 2 values for 3 samples"):
        compiled(gated())(X, beta=torch.tensor([0.1, 0.2]))


WITH_SHIFT = mk.GateSpec("sqrt", shift=True)


def test_two_networks_of_one_shape_and_different_gates_are_told_apart():
    kinds = [randomize(mk.multirate(network(2), kind)) for kind in ("sigmoid", "sqrt", WITH_SHIFT)]
    for model in kinds:
        torch.testing.assert_close(compiled(model)(X, beta=BETA), model(X, beta=BETA))
    ranges = [mk.multirate(network(2), "sigmoid", beta_range) for beta_range in ((0.01, 10.0), (0.1, 1.0))]
    ranges[1].load_state_dict({**ranges[0].state_dict(), "_extra_state": ranges[1].get_extra_state()})
    for model in ranges:
        torch.testing.assert_close(compiled(model)(X, beta=BETA), model(X, beta=BETA))


def test_gates_on_inputs_and_layers_without_a_formula_of_their_own():
    layers = (
        nn.Conv1d(2, 3, 3, padding="same"), nn.ConvTranspose1d(3, 4, 3, stride=2), nn.BatchNorm1d(4), nn.Tanh(),
        nn.Flatten(), nn.Linear(36, 3),
    )
    spec = mk.GateSpec("softplus", shift=True, inputs="sigmoid")
    gates = {"0": spec, "1": mk.GateSpec("sigmoid", shift=True), "2": "sigmoid", "5": spec}
    model = randomize(mk.multirate(nn.Sequential(*layers).double(), gates)).eval()
    x = torch.randn(3, 2, 4, dtype=torch.float64)
    for beta in (BETA, EACH):
        torch.testing.assert_close(compiled(model)(x, beta=beta), model(x, beta=beta))


@pytest.mark.parametrize("beta", [BETA, EACH], ids=["shared", "per-sample"])
def test_a_relu_that_somebody_listens_to_is_called(beta):
    model, heard = gated(), []
    model.network[1].register_forward_hook(lambda module, args, y: heard.append(y.shape) or 2 * y)
    torch.testing.assert_close(compiled(model)(X, beta=beta), model(X, beta=beta))
    assert len(heard) == 2

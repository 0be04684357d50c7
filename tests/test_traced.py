"""What torch.compile traces of a gated network: how much of it Dynamo looks at, and what it refuses."""

from __future__ import annotations

import copy
import functools
import pickle
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from helpers import randomize
from torch import Tensor, nn
from torch._dynamo.eval_frame import _debug_get_cache_entry_list
from torch._dynamo.testing import CompileCounter

import mrvae_kernels as mk
from mrvae_kernels import traced_epilogue

X, BETA = torch.randn(3, 4, dtype=torch.float64), torch.tensor(0.5)


@pytest.fixture(autouse=True)
def _fresh():
    torch.compiler.reset()


def network(layers: int) -> nn.Sequential:
    return nn.Sequential(*(layer for _ in range(layers) for layer in (nn.Linear(4, 4), nn.ReLU()))).double()


def gated(layers: int = 2) -> mk.MultiRate:
    return randomize(mk.multirate(network(layers), "softplus"))


def compiled(call: Callable[..., Tensor]) -> Any:
    return torch.compile(call, backend="eager", fullgraph=True)


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


def test_a_gated_layer_is_guarded_little_more_than_a_plain_one():
    plain, ours = ([], [])
    for layers in (2, 6):
        torch.compiler.reset()
        net, model = network(layers), gated(layers)
        plain.append(guards(lambda x, net=net: net(x), X))
        ours.append(guards(lambda x, beta, model=model: model(x, beta=beta), X, BETA))
    each, gated_each = (plain[1] - plain[0]) / 4, (ours[1] - ours[0]) / 4
    assert gated_each <= each + 1, (plain, ours)
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


def test_other_gates_of_the_same_sizes_are_compiled_anew():
    for gates in ("softplus", "sqrt", "sigmoid", mk.GateSpec("softplus", shift=True)):
        model = randomize(mk.multirate(network(2), gates))
        torch.testing.assert_close(compiled(model)(X, beta=BETA), model(X, beta=BETA))


def test_another_range_of_beta_is_compiled_anew():
    for beta_range in ((0.01, 10.0), (0.1, 1.0)):
        model = mk.multirate(network(2), "softplus", beta_range)
        torch.testing.assert_close(compiled(model)(X, beta=BETA), model(X, beta=BETA))


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
    for beta in (BETA, 2.0, torch.tensor([0.02, 0.5, 9.0])):
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
    each = torch.tensor([0.02, 0.5, 9.0])
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


def test_two_networks_of_one_shape_and_different_gates_are_told_apart():
    kinds = [randomize(mk.multirate(network(2), kind)) for kind in ("sigmoid", "sqrt")]
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
    for beta in (BETA, torch.tensor([0.02, 0.5, 9.0])):
        torch.testing.assert_close(compiled(model)(x, beta=beta), model(x, beta=beta))


@pytest.mark.parametrize("beta", [BETA, torch.tensor([0.02, 0.5, 9.0])], ids=["shared", "per-sample"])
def test_a_relu_that_somebody_listens_to_is_called(beta):
    model, heard = gated(), []
    model.network[1].register_forward_hook(lambda module, args, y: heard.append(y.shape) or 2 * y)
    torch.testing.assert_close(compiled(model)(X, beta=beta), model(X, beta=beta))
    assert len(heard) == 2


EACH = torch.tensor([0.02, 0.5, 9.0])


def gradients(call: Callable[..., Tensor], x: Tensor, beta: Tensor, parameters: list[nn.Parameter]) -> list[Tensor]:
    """Of x, beta and the parameters, for a loss that is no plain sum."""
    x, beta = x.clone().requires_grad_(), beta.clone().requires_grad_()
    return list(torch.autograd.grad(call(x, beta=beta).square().sum(), [x, beta, *parameters]))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("beta", [BETA, EACH], ids=["shared", "per-sample"])
def test_a_caller_may_write_into_a_layers_result(backend, beta):
    class Writing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.relu_(self.a(x))).mul_(2)

    model = randomize(mk.multirate(Writing().double(), "softplus"))
    expected = gradients(model, X, beta, list(model.parameters()))
    found = gradients(torch.compile(model, backend=backend, fullgraph=True), X, beta, list(model.parameters()))
    torch.testing.assert_close(found, expected)


def test_one_example_without_a_batch_axis():
    model = gated()
    expected = gradients(model, X[0], BETA, list(model.parameters()))
    found = gradients(torch.compile(model, backend="aot_eager"), X[0], BETA, list(model.parameters()))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("beta", [BETA, EACH], ids=["shared", "per-sample"])
def test_transforms_inside_a_compiled_function(backend, beta):
    model = gated()

    def loss(x: Tensor) -> Tensor:
        return model(x, beta=beta).square().sum()

    def one(x: Tensor) -> Tensor:
        return model(x.unsqueeze(0), beta=BETA).square().sum()

    for function in (torch.func.grad(loss), torch.func.vmap(torch.func.grad(one))):
        torch.testing.assert_close(torch.compile(function, backend=backend, fullgraph=True)(X), function(X))


@pytest.mark.parametrize("beta", [BETA, EACH], ids=["shared", "per-sample"])
def test_second_derivatives_are_right_or_refused(beta):
    model = gated()

    def second(call: Callable[..., Tensor]) -> list[Tensor]:
        x = X.clone().requires_grad_()
        dx, = torch.autograd.grad(call(x, beta=beta).square().sum(), x, create_graph=True)
        return list(torch.autograd.grad(dx.square().sum(), [x, *model.parameters()], materialize_grads=True))

    with mk.override(backend="reference"):
        expected = second(model)
    torch.testing.assert_close(second(compiled(model)), expected)
    with pytest.raises(RuntimeError, match="double backward"):
        second(torch.compile(model, backend="aot_eager"))


@pytest.mark.parametrize("x", [X, X.expand(2, 3, 4)], ids=["2-d", "3-d"])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.GELU])
def test_nothing_is_kept_for_the_backward_pass_twice(x, activation):
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers, self.activation = nn.ModuleList(nn.Linear(4, 4) for _ in range(3)), activation()

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = self.activation(layer(x))
            return x

    model = randomize(mk.multirate(Plain().double(), "sqrt"))
    for strategy in (None, "fold"):
        with mk.override(strategy=strategy):
            y = torch.compile(model, backend="aot_eager_decomp_partition")(x, beta=BETA)
        places = [kept.untyped_storage().data_ptr() for kept in y.grad_fn.saved_tensors]
        own = {value.untyped_storage().data_ptr() for value in (x, y, BETA, *model.parameters())}
        assert len({*places} - own) == sum(place not in own for place in places)  # Inductor writes into them


@pytest.mark.parametrize("strategy, beta", [("fold", BETA), ("epilogue", BETA), (None, EACH)])
def test_nothing_of_a_layers_size_is_kept_for_its_gate(strategy, beta):
    x = torch.randn(3, 3, 7, 7, dtype=torch.float64)
    convolutions = nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.ConvTranspose2d(8, 4, 3, stride=2), nn.ReLU()
    plain = nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(4 * 7 * 7, 5)).double()
    model = randomize(mk.multirate(copy.deepcopy(plain), "sqrt"))
    kept = []
    with mk.override(strategy=strategy):
        for call in (plain, functools.partial(model, beta=beta)):
            torch.compiler.reset()
            y = torch.compile(call, backend="aot_eager_decomp_partition", fullgraph=True)(x)
            known, sizes = [x, y, *plain.parameters(), *model.parameters()], Counter()
            for value in y.grad_fn.saved_tensors:
                if not any(value.equal(other) for other in known):  # a copy, of which Inductor makes none
                    known.append(value)
                    sizes[value.numel()] += 1
            kept.append(sizes)
    # all gates and eta, or one gate a sample and channel; the smallest W' or u has 216 numbers
    assert all(size < 100 for size in kept[1] - kept[0]), kept


def convolutional(dtype: torch.dtype = torch.float64) -> mk.MultiRate:
    layers = nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.ConvTranspose2d(8, 4, 3), nn.Flatten(), nn.Linear(100, 5)
    return randomize(mk.multirate(nn.Sequential(*layers).to(dtype), "sqrt"))


IMAGES = torch.randn(3, 3, 7, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("frozen", ["network.0", "network.2.bias", "network.4.weight", "gate_", "network", "x"])
@pytest.mark.parametrize("strategy, beta", [("fold", BETA), ("epilogue", BETA), (None, EACH)])
def test_frozen_parameters(strategy, beta, frozen):
    model, x = convolutional(), IMAGES.clone().requires_grad_(frozen != "x")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen))
    leaves = [value for value in (x, *model.parameters()) if value.requires_grad]
    with mk.override(strategy=strategy):
        found = torch.autograd.grad(
            torch.compile(model, backend="aot_eager", fullgraph=True)(x, beta=beta).square().sum(), leaves
        )
    torch.testing.assert_close(found, torch.autograd.grad(model(x, beta=beta).square().sum(), leaves))


@pytest.mark.parametrize("strategy, each", [("fold", False), ("epilogue", False), (None, True)])
def test_any_batch_and_none(strategy, each):
    model = convolutional()
    call = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    with mk.override(strategy=strategy):
        for n in (4, 2, 0):
            x, beta = torch.randn(n, 3, 7, 7, dtype=torch.float64), torch.full((n,), 0.4) if each else BETA
            found = gradients(call, x, beta, list(model.parameters()))
            torch.testing.assert_close(found, gradients(model, x, beta, list(model.parameters())))


@pytest.mark.parametrize("dtype, autocast", [(torch.bfloat16, False), (torch.float16, False), (torch.float32, True)])
@pytest.mark.parametrize("strategy, beta", [("fold", BETA), ("epilogue", BETA), (None, EACH)])
def test_less_precision(strategy, beta, dtype, autocast):
    torch.manual_seed(0)
    model, wide = convolutional(dtype), convolutional()
    wide.load_state_dict(model.state_dict())
    call = torch.compile(model, backend="aot_eager", fullgraph=True)
    with mk.override(strategy=strategy), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = gradients(call, IMAGES.to(dtype), beta, list(model.parameters()))
    exact = gradients(wide, IMAGES, beta, list(wide.parameters()))
    largest = max(value.norm() for value in exact)
    for value, other in zip(found, exact, strict=True):  # beta's and biases' are sums whose terms cancel
        assert (value.double() - other).norm() < 0.15 * (other.norm() + 0.1 * largest)


def test_tiny_gates_in_float16_have_their_gradient():
    model = mk.multirate(nn.Sequential(nn.Conv2d(1, 2, 1), nn.Flatten(), nn.Linear(8, 3)).half(), "sigmoid")
    with torch.no_grad():
        model.gate_weight.zero_()
        model.gate_bias.fill_(-16)  # gates of 1.1e-7: float16's smallest numbers are 6e-8 apart
    wide = copy.deepcopy(model).double()
    x = torch.randn(3, 1, 2, 2).half()
    for beta in (BETA, EACH):
        found, exact = (
            torch.autograd.grad(1e4 * call(given, beta=beta).double().sum(), parameters)
            for call, given, parameters in (
                (torch.compile(model, backend="aot_eager", fullgraph=True), x, list(model.gate_parameters())),
                (wide, x.double(), list(wide.gate_parameters())),
            )
        )
        for value, other in zip(found, exact, strict=True):
            last = slice(-3, None)  # the gradients of what comes before are too small
            torch.testing.assert_close(value[last].double(), other[last], rtol=5e-3, atol=2e-6)

"""What a compiled gated network keeps for its backward pass, and the gradients that it gives."""

from __future__ import annotations

import copy
import functools
import itertools
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from functorch.compile import make_boxed_func
from helpers import randomize
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from traced_cases import BETA, EACH, X, compiled, gated, network

import mrvae_kernels as mk
from mrvae_kernels import ops, traced


@pytest.fixture(autouse=True)
def _fresh():
    torch.compiler.reset()


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


def convolutional(dtype: torch.dtype = torch.float64, degree: int = 1) -> mk.MultiRate:
    layers = nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.ConvTranspose2d(8, 4, 3), nn.Flatten(), nn.Linear(100, 5)
    return randomize(mk.multirate(nn.Sequential(*layers).to(dtype), mk.GateSpec("sqrt", degree=degree)))


IMAGES = torch.randn(3, 3, 7, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("degree", [2, 3])
@pytest.mark.parametrize("strategy, beta", [("fold", BETA), ("epilogue", BETA), (None, EACH)])
def test_gates_of_more_degrees(strategy, beta, degree):
    model = convolutional(degree=degree)
    call = torch.compile(model, backend="aot_eager", fullgraph=True)
    with mk.override(strategy=strategy):
        torch.testing.assert_close(call(IMAGES, beta=beta), model(IMAGES, beta=beta))
        found = gradients(call, IMAGES, beta, list(model.parameters()))
        torch.testing.assert_close(found, gradients(model, IMAGES, beta, list(model.parameters())))


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


GATES = ("recipe", "sqrt", "quadratic")
RECIPE_LIKE = mk.GateSpec("softplus", degree=3, shift=True, inputs=mk.GateSpec("sigmoid", degree=3))


def mixed() -> nn.Sequential:
    """Layers of both sides of what the core takes in a compiled graph: convolutions, and large and small Linears."""
    return nn.Sequential(
        nn.Conv2d(2, 6, 3), nn.ReLU(), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(96, 640), nn.ReLU(),
        nn.Linear(640, 5), nn.Tanh(), nn.Linear(5, 700), nn.SiLU(),
    )


@pytest.mark.skipif(not ops.EXTENSION, reason=f"the compiled core is missing: {ops.EXTENSION_ERROR}")
@pytest.mark.parametrize("spec", [RECIPE_LIKE, mk.GateSpec("sqrt"), mk.GateSpec("sigmoid", degree=2)], ids=GATES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_one_beta_a_sample_by_the_core(dtype, spec, monkeypatch):
    """The core's operators in the graph, and eager's values and gradients in float64; bfloat16 by autocast."""
    monkeypatch.setattr(traced, "LEAST_SAMPLED", 1024)
    wide = dtype == torch.float64
    model = randomize(mk.multirate(mixed().to(torch.float64 if wide else torch.float32), spec)).eval()
    x, beta = torch.randn(64, 2, 6, 6).to(model.gate_bias.dtype), torch.empty(64).uniform_(-4, 2).exp()
    names: Counter[str] = Counter()

    def look(graph: torch.fx.GraphModule, _: object) -> object:
        names.update(str(node.target).removesuffix(".default") for node in graph.graph.nodes)
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=look, bw_compiler=look)
    call = torch.compile(model, backend=backend, fullgraph=True)
    with mk.override(backend="reference"):
        exact = copy.deepcopy(model).double()
        target = exact(x.double(), beta=beta.double())
        wanted = torch.autograd.grad(target.square().sum(), list(exact.parameters()))

    def errors(function: Callable[..., Tensor]) -> list[float]:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            y = function(x, beta=beta)
        found = torch.autograd.grad(y.square().sum(), list(model.parameters()))
        pairs = zip([y, *found], [target, *wanted], strict=True)
        return [float((value.double() - other).norm() / other.norm()) for value, other in pairs]

    limit = {torch.float32: 2e-5, torch.float64: 1e-12, torch.bfloat16: 0.05}[dtype]
    for compiled_error, eager_error in zip(errors(call), errors(model), strict=True):
        assert compiled_error <= max(limit, 1.5 * eager_error)
    assert names["mrvae.gates"] == names["mrvae.gates_backward"] == 1
    assert names["mrvae.sampled_epilogue"] == names["mrvae.sampled_epilogue_backward"] == 2


def test_the_formulas_alone_where_the_reference_is_asked_for():
    targets: set[str] = set()

    def look(graph: torch.fx.GraphModule, _: object) -> object:
        targets.update(str(node.target) for node in graph.graph.nodes)
        return make_boxed_func(graph.forward)

    model = randomize(mk.multirate(mixed(), RECIPE_LIKE)).eval()
    call = torch.compile(model, backend=aot_autograd(fw_compiler=look, bw_compiler=look), fullgraph=True)
    with mk.override(backend="reference"):
        call(torch.randn(64, 2, 6, 6), beta=torch.empty(64).uniform_(-4, 2).exp()).sum().backward()
    assert targets and not any("mrvae" in target for target in targets)


@pytest.mark.skipif(not ops.EXTENSION, reason=f"the compiled core is missing: {ops.EXTENSION_ERROR}")
def test_the_cores_graph_by_inductor_and_with_other_batches():
    model = randomize(mk.multirate(mixed(), RECIPE_LIKE)).eval()
    call = torch.compile(model, fullgraph=True)
    for n in (48, 33, 20):
        x, beta = torch.randn(n, 2, 6, 6), torch.empty(n).uniform_(-4, 2).exp()
        results = []
        for function in (call, model):
            y = function(x, beta=beta)
            results.append([y, *torch.autograd.grad(y.square().sum(), list(model.parameters()))])
        for value, other in zip(*results, strict=True):
            assert (value - other).norm() <= 2e-5 * other.norm()


@pytest.mark.skipif(not ops.EXTENSION, reason=f"the compiled core is missing: {ops.EXTENSION_ERROR}")
def test_one_graph_for_every_batch_size():
    """Widths on both sides of what the core takes, and batches that would be on both sides of it for each."""
    graphs = 0

    def count(graph: torch.fx.GraphModule, _: object) -> object:
        nonlocal graphs
        graphs += 1
        return make_boxed_func(graph.forward)

    widths = (7, 700, 384, 128, 48, 16, 8, 4)
    layers = [part for pair in itertools.pairwise(widths) for part in (nn.Linear(*pair), nn.ReLU())]
    for spec in (RECIPE_LIKE, mk.GateSpec("sigmoid")):
        torch.compiler.reset()
        graphs = 0
        model = mk.multirate(nn.Sequential(*copy.deepcopy(layers)), spec)
        backend = aot_autograd(fw_compiler=count, bw_compiler=count)
        call = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
        for n in (64, 128, 3, 5, 9, 12, 20, 40, 300):
            call(torch.randn(n, 7), beta=torch.full((n,), 0.5)).sum().backward()
        assert graphs == 2


def test_betas_with_a_gradient_are_computed_by_the_formulas(monkeypatch):
    monkeypatch.setattr(traced, "LEAST_SAMPLED", 1)
    monkeypatch.setattr(traced, "LEAST_SHIFTED", 1)
    for spec in (RECIPE_LIKE, mk.GateSpec("sigmoid")):
        model = randomize(mk.multirate(network(2), spec))
        expected = gradients(model, X, EACH, list(model.parameters()))
        found = gradients(torch.compile(model, backend="aot_eager", fullgraph=True), X, EACH, list(model.parameters()))
        torch.testing.assert_close(found, expected)

"""torch.ops.mrvae_triton: schema, fake and autograd of each operator, eager and compiled, autocast, strategies."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mrvae_kernels as mk
from mrvae_kernels import reference

pytest.importorskip("triton")
from mrvae_kernels.ops import triton as operators  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

GEOMETRY: dict[str, Any] = {
    "conv": ((2, 1), (1, 0), (1, 2), False, (0, 0), 1), "transposed": ((2, 1), (1, 0), (1, 1), True, (1, 0), 1),
}


def draw(*shape: int, grad: bool = True) -> Tensor:
    return torch.randn(shape, device=DEVICE).requires_grad_(grad)


def gate_arguments(eta: Tensor) -> tuple[Any, ...]:
    return draw(12), draw(12), eta, [5, 4, 3], [0, 1, 3]


def fold_arguments() -> tuple[Any, ...]:
    weights, absent = [draw(5, 3), draw(4, 3, 2, 2)], torch.empty(0, device=DEVICE)
    return weights, [draw(5), absent], [draw(5), draw(3)], [absent, draw(3)], [0, 1]


def layer(per_sample: bool, kind: str) -> tuple[Any, ...]:
    rows = (3,) if per_sample else ()
    if kind == "linear":
        return draw(3, 7), draw(5, 7), draw(5), draw(*rows, 5), draw(*rows, 5)
    weight = draw(3, 5, 3, 2) if kind == "transposed" else draw(5, 3, 3, 2)
    return draw(3, 3, 6, 5), weight, draw(5), draw(*rows, 5), draw(*rows, 5)


CALLS: dict[str, Callable[[], tuple[Any, tuple[Any, ...]]]] = {
    "gates": lambda: (torch.ops.mrvae_triton.gates, gate_arguments(torch.randn((), device=DEVICE).requires_grad_())),
    "gates a sample": lambda: (torch.ops.mrvae_triton.gates, gate_arguments(draw(3))),
    "fold": lambda: (torch.ops.mrvae_triton.fold, fold_arguments()),
    "epilogue": lambda: (
        torch.ops.mrvae_triton.epilogue, (draw(3, 5, 4), draw(5), draw(5), draw(5), 1, "gelu")
    ),
    "epilogue a sample": lambda: (
        torch.ops.mrvae_triton.epilogue, (draw(3, 4, 5), None, draw(3, 5), None, 2, "none")
    ),
    "linear": lambda: (torch.ops.mrvae_triton.linear, (*layer(False, "linear"), "relu", True)),
    "linear a sample": lambda: (torch.ops.mrvae_triton.linear, (*layer(True, "linear"), "silu", True)),
    "conv": lambda: (
        torch.ops.mrvae_triton.convolution, (*layer(False, "conv"), *GEOMETRY["conv"], "silu", True)
    ),
    "transposed": lambda: (
        torch.ops.mrvae_triton.convolution, (*layer(True, "transposed"), *GEOMETRY["transposed"], "none", True)
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_opcheck(name):
    op, arguments = CALLS[name]()
    torch.library.opcheck(op.default, arguments)


def every_operator(x: Tensor, image: Tensor, p: dict[str, Tensor], eta: Tensor) -> list[Tensor]:
    """One function that goes through all of them, as mrvae_kernels.functional does."""
    gates = operators.gates(p["gate_weight"], p["gate_bias"], eta, [5, 5], [0, 2])
    folded, biases = operators.fold([p["linear"]], [p["bias"]], gates[:1], [None], [0])
    y = operators.epilogue(nn.functional.linear(x, folded[0], biases[0]), None, gates[1], None, 1, "elu")
    z = operators.gated_linear(x, p["linear"], p["bias"], gates[0], None, "tanh", "fused")
    c = operators.gated_convolution(
        image, p["conv"], p["bias"], gates[0], None, *GEOMETRY["conv"], "relu", "fused"
    )
    t = operators.gated_convolution(
        image, p["transposed"], p["bias"], gates[1], None, *GEOMETRY["transposed"], "silu", "fused"
    )
    return [y, z, c, t]


def parameters() -> dict[str, Tensor]:
    return {
        "gate_weight": draw(10), "gate_bias": draw(10), "linear": draw(5, 7), "bias": draw(5), "conv": draw(5, 3, 3, 2),
        "transposed": draw(3, 5, 3, 2),
    }


def test_compiled_in_one_graph_equals_eager():
    x, image, p, eta = draw(3, 7), draw(3, 3, 6, 5), parameters(), torch.tensor(0.3, device=DEVICE)
    leaves = [x, image, *p.values()]
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    eager = every_operator(x, image, p, eta)
    compiled = torch.compile(every_operator, fullgraph=True, backend="aot_eager")(x, image, p, eta)
    torch.compile(every_operator, fullgraph=True, backend=backend)(x, image, p, eta)
    calls = {str(node.target) for node in graphs[0].graph.nodes if "mrvae_triton" in str(node.target)}
    assert calls == {f"mrvae_triton.{name}.default" for name in ("gates", "fold", "epilogue", "linear", "convolution")}
    torch.testing.assert_close(compiled, eager)
    weights = [torch.randn_like(y) for y in eager]
    got = torch.autograd.grad(compiled, leaves, weights)
    torch.testing.assert_close(got, torch.autograd.grad(eager, leaves, weights))


@pytest.mark.parametrize("name", ["linear", "conv", "transposed"])
@pytest.mark.parametrize("strategy", ["fold", "epilogue", "fused"])
def test_strategies_agree_with_the_reference(name, strategy):
    x, weight, bias, gate, shift = layer(False, name)
    run = operators.gated_linear if name == "linear" else operators.gated_convolution
    oracle = reference.gated_linear if name == "linear" else reference.gated_convolution
    geometry = () if name == "linear" else GEOMETRY[name]
    y = run(x, weight, bias, gate, shift, *geometry, "elu", strategy)
    want = oracle(x, weight, bias, gate, shift, *geometry, "elu")
    torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-4)
    leaves, grad = [x, weight, bias, gate, shift], torch.randn_like(y)
    got, expected = torch.autograd.grad(y, leaves, grad), torch.autograd.grad(want, leaves, grad)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["linear", "conv"])
@pytest.mark.parametrize("strategy", ["fold", "epilogue", "fused"])
def test_autocast_casts_products_and_leaves_gates(name, strategy):
    x, weight, bias, gate, shift = layer(False, name)
    run = operators.gated_linear if name == "linear" else operators.gated_convolution
    geometry = () if name == "linear" else GEOMETRY[name]
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        y = run(x, weight, bias, gate, shift, *geometry, "relu", strategy)
    assert y.dtype == torch.bfloat16
    with torch.no_grad():
        want = run(x, weight, bias, gate, shift, *geometry, "relu", strategy)
    torch.testing.assert_close(y.float(), want, rtol=3e-2, atol=3e-2)
    grads = torch.autograd.grad(y.float().sum(), [x, weight, bias, gate, shift])
    assert [g.dtype for g in grads] == [torch.float32] * 5


def test_autocast_leaves_folding_to_the_products():
    weights, biases = [draw(5, 3), draw(4)], [draw(5), draw(4)]
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        folded, folded_biases = operators.fold(weights, biases, [draw(5), draw(4)], [None, None], [0, 0])
    assert {t.dtype for t in (*folded, *folded_biases)} == {torch.float32}


def test_gradients_are_only_computed_where_asked():
    x, weight, bias, gate, _ = layer(False, "linear")
    for frozen in (weight, gate):
        frozen.requires_grad_(False)
    y = operators.gated_linear(x, weight, bias, gate, None, "relu", "fused")
    y.sum().backward()
    assert weight.grad is None and gate.grad is None and x.grad is not None and bias.grad is not None


def test_differentiating_twice_is_an_error():
    x, weight, bias, gate, _ = layer(False, "linear")
    y = operators.gated_linear(x, weight, bias, gate, None, "tanh", "fused")
    (grad,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"differentiable once: .*mrvae_kernels.override\(backend=\"reference\"\)"):
        (y.sum() + grad.square().sum()).backward()


@pytest.mark.parametrize("strategy", ["fold", "epilogue", "fused"])
def test_no_derivative_is_lost_in_silence(strategy):
    x, weight, bias, gate, _ = layer(False, "linear")
    with mk.override(backend="triton", strategy=strategy):
        with torch.no_grad(), torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(gate.detach(), torch.ones_like(gate))
            with pytest.raises((RuntimeError, NotImplementedError)):
                mk.gated_linear(x, weight, bias, dual)
        with pytest.raises(RuntimeError, match="torch.func"):
            torch.func.grad(lambda g: mk.gated_linear(x, weight, bias, g).sum())(gate.detach())
        mk.gated_linear(x, weight, bias, gate).sum().backward()  # and nothing is left behind
        with torch.utils.flop_counter.FlopCounterMode(display=False):
            y = mk.gated_linear(x, weight, bias, gate, activation="tanh")
            (grad,) = torch.autograd.grad(y.sum(), gate, create_graph=True)
            with pytest.raises(RuntimeError, match="is differentiable once"):
                (y.sum() + grad.square().sum()).backward()


def test_a_frozen_gate_keeps_no_product():
    saved: list[Tensor] = []
    u, gate = draw(4, 5), torch.rand(5, device=DEVICE)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = operators.epilogue(u, None, gate, None, 1, "none")
    assert [t.shape for t in saved] == [gate.shape]
    torch.testing.assert_close(torch.autograd.grad(y.sum(), u)[0], gate.expand(4, 5))


def test_no_gradient_is_filled_with_zeros_for_what_is_kept():
    """One of y's size, a launch and the memory, for a second output that no one differentiates."""
    x, w = torch.randn(64, 8, requires_grad=True), torch.randn(16, 8, requires_grad=True)
    images, kernel = torch.randn(4, 16, 6, 6, requires_grad=True), torch.randn(16, 16, 3, 3, requires_grad=True)
    geometry = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)
    for gate, activation in ((torch.rand(64, 16), "relu"), (torch.rand(16), "gelu")):
        y = operators.gated_linear(x, w, None, gate.requires_grad_(), None, activation, "fused")
        each = gate[:4].detach().requires_grad_() if gate.dim() == 2 else gate
        z = operators.gated_convolution(images, kernel, None, each, None, *geometry, activation, "fused")
        for result in (y, z):
            with torch.profiler.profile(record_shapes=True) as profile:
                result.backward(torch.ones_like(result))
            filled = [e.input_shapes for e in profile.events() if e.name == "aten::zero_"]
            assert [list(result.shape)] not in [shapes[:1] for shapes in filled]


def test_nothing_is_kept_for_a_backward_pass_that_needs_nothing():
    saved: list[Tensor] = []
    x, weight, bias, gate, _ = layer(False, "linear")
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = operators.gated_linear(x, weight, bias, gate, None, "none", "fused")
    assert all(t.data_ptr() != y.data_ptr() for t in saved if t.numel())
    assert sum(t.numel() for t in saved) == sum(t.numel() for t in (x, weight, bias, gate))


def test_the_epilogue_takes_the_products_memory_without_autograd():
    u, gate = draw(4, 5, grad=False), torch.rand(5, device=DEVICE)
    want = reference.epilogue(u, None, gate, None, 1, "relu")
    y = operators.epilogue(u, None, gate, None, 1, "relu", u_is_free=True)
    assert y.data_ptr() == u.data_ptr()
    torch.testing.assert_close(y, want)


def test_a_refused_convolution_says_why_and_how_to_go_on():
    x, weight, gate = draw(2, 4, 5, 5), draw(4, 1, 3, 3), torch.rand(4, device=DEVICE)
    with mk.override(backend="triton"), pytest.raises(ValueError, match="depthwise|a group|per group"):
        mk.gated_conv2d(x, weight, None, gate, groups=4, strategy="fused")
    with mk.override(backend="triton"), pytest.raises(ValueError, match="this is a 3-d convolution: use strategy"):
        mk.gated_conv3d(draw(1, 2, 4, 4, 4), draw(3, 2, 2, 2, 2), None, torch.rand(3, device=DEVICE), strategy="fused")


def test_a_multirate_network_trains_alike_on_triton():
    network = nn.Sequential()
    network.encoder = nn.Sequential(
        nn.Conv2d(1, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 6)
    )
    network.decoder = nn.Sequential(nn.Linear(6, 36), nn.Unflatten(1, (4, 3, 3)), nn.ConvTranspose2d(4, 1, 3, 2, 1))
    model = mk.multirate(network.to(DEVICE))
    twin = copy.deepcopy(model)
    x = torch.rand(3, 1, 5, 5, device=DEVICE)
    for beta in (0.5, torch.tensor([0.1, 1.0, 5.0], device=DEVICE)):
        for _ in range(2):  # the second pass follows the plan that the first one made
            results = []
            for net, backend in ((model, "triton"), (twin, "reference")):
                with mk.override(backend=backend):
                    net.zero_grad()
                    out = net(x, beta=beta)
                    out.square().sum().backward()
                    results.append([out, *(p.grad for p in net.parameters())])
            torch.testing.assert_close(*results, rtol=1e-3, atol=1e-4)

from __future__ import annotations

import pytest
import torch
from op_checks import (
    agree,
    check_compiled,
    check_once_differentiable,
    check_subsets,
    leaf,
    requires_extension,
)

from mrvae_kernels import ops, reference

pytestmark = requires_extension

ACTIVATIONS = reference.ACTIVATIONS
STRATEGIES = ["fold", "epilogue"]

INPUTS = {
    "(N, K)": lambda: torch.randn(9, 6),
    "(N, L, K)": lambda: torch.randn(4, 3, 6),
    "(N, L, M, K)": lambda: torch.randn(2, 3, 4, 6),
    "(K,)": lambda: torch.randn(6),
    "one row": lambda: torch.randn(1, 6),
    "empty batch": lambda: torch.randn(0, 6),
    "empty sequence": lambda: torch.randn(3, 0, 6),
    "transposed": lambda: torch.randn(6, 9).t(),
    "slice": lambda: torch.randn(8, 3, 12)[::2, :, ::2],
    "expanded": lambda: torch.randn(1, 6).expand(5, 6),
}


def tensors_for(name, per_sample=False, dtype=torch.float64, channels=5):
    torch.manual_seed(0)
    x = INPUTS[name]()
    gate, shift = (
        torch.randn((x.shape[0], channels) if per_sample else (channels,), dtype=reference.gate_dtype(dtype))
        for _ in range(2)
    )
    return [x.to(dtype), torch.randn(channels, 6).to(dtype), torch.randn(channels).to(dtype), gate, shift]


def functions(strategy, activation="none"):
    return (
        lambda *tensors: ops.gated_linear(*tensors, activation, strategy),
        lambda *tensors: reference.gated_linear(*tensors, activation, "epilogue"),
    )


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_strategies_agree_with_reference(name, dtype):
    for strategy in STRATEGIES:
        agree(*functions(strategy), tensors_for(name, dtype=dtype))
    if name != "(K,)":
        agree(*functions("epilogue"), tensors_for(name, per_sample=True, dtype=dtype))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_activation(activation, strategy):
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        agree(*functions(strategy, activation), tensors_for("(N, K)", dtype=dtype))
    assert torch.autograd.gradcheck(functions(strategy, activation)[0], [leaf(t) for t in tensors_for("(N, L, K)")])


@pytest.mark.parametrize("missing", [(2,), (4,), (2, 4)])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_without_bias_or_shift(missing, strategy):
    tensors = [None if i in missing else t for i, t in enumerate(tensors_for("(N, L, K)"))]
    agree(*functions(strategy, "elu"), tensors)
    agree(*functions(strategy), tensors)


@pytest.mark.parametrize("activation", ["none", "silu"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_subset_of_gradients(strategy, activation):
    check_subsets(functions(strategy, activation)[0], tensors_for("(N, L, K)"))
    if strategy == "epilogue":
        check_subsets(functions(strategy, activation)[0], tensors_for("(N, L, K)", per_sample=True))


@pytest.mark.parametrize("name", ["(N, K)", "(N, L, K)"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_expanded_and_foreign_gradients(name, strategy):
    for activation in ("none", "relu"):
        run, oracle = functions(strategy, activation)
        tensors = tensors_for(name)
        agree(run, oracle, tensors, grads=lambda t: t.new_full((), 0.5).expand(t.shape))
        agree(run, oracle, tensors, grads=lambda t: torch.randn(*t.shape, 2, dtype=t.dtype)[..., 0])


def test_weights_of_any_stride():
    for weight in (torch.randn(6, 5).t(), torch.randn(10, 12)[::2, ::2]):
        tensors = tensors_for("(N, K)")
        tensors[1] = weight.double()
        for strategy in STRATEGIES:
            agree(*functions(strategy), tensors)


def kept(strategy, activation, frozen=()):
    """Storage of tensors kept for the backward pass that are no inputs, in elements."""
    tensors = [leaf(t).requires_grad_(i not in frozen) for i, t in enumerate(tensors_for("(N, K)"))]
    inputs = {t.untyped_storage().data_ptr() for t in tensors}
    sizes = {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in inputs:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        functions(strategy, activation)[0](*tensors)
    return sorted(sizes.values())


def test_what_is_kept_for_the_backward_pass():
    outputs = 9 * 5
    assert kept("epilogue", "none") == kept("epilogue", "gelu") == [outputs]  # u
    assert kept("epilogue", "none", frozen=(3,)) == []  # no gate gradient: not even u
    assert kept("fold", "none") == []  # W' is folded again
    assert kept("fold", "tanh") == []  # z is computed again where hooks pack, as here


def test_inputs_are_never_modified():
    for strategy in STRATEGIES:
        tensors = tensors_for("(N, K)")
        before = [t.clone() for t in tensors]
        leaves = [t.requires_grad_() for t in tensors]
        grad = torch.randn(9, 5, dtype=torch.float64)
        copy = grad.clone()
        functions(strategy, "relu")[0](*leaves).backward(grad)
        with torch.no_grad():
            functions(strategy)[0](*leaves)
        assert torch.equal(grad, copy) and all(torch.equal(a, b) for a, b in zip(leaves, before, strict=True))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_autocast(strategy):
    tensors = [leaf(t) for t in tensors_for("(N, K)", dtype=torch.float32)]
    with torch.autocast("cpu", torch.bfloat16):
        y = functions(strategy, "relu")[0](*tensors)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    exact = [leaf(t, torch.float64) for t in tensors]
    functions(strategy, "relu")[1](*exact).square().sum().backward()
    for t, e in zip(tensors, exact, strict=True):
        assert t.grad.dtype == torch.float32
        torch.testing.assert_close(t.grad.double(), e.grad, rtol=0.05, atol=0.05 * e.grad.abs().max().item())


def test_backward_under_autocast_and_twice():
    for strategy in STRATEGIES:
        tensors = [leaf(t) for t in tensors_for("(N, K)", dtype=torch.float32)]
        y = functions(strategy, "gelu")[0](*tensors).sum()
        first = torch.autograd.grad(y, tensors, retain_graph=True)
        with torch.autocast("cpu", torch.bfloat16):
            second = torch.autograd.grad(y, tensors)
        for a, b in zip(first, second, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_opcheck_and_compile(strategy):
    for name in ("(N, K)", "(N, L, K)", "slice"):
        arguments = [leaf(t) for t in tensors_for(name)]
        arguments[4] = None
        torch.library.opcheck(torch.ops.mrvae.gated_linear.default, (*arguments, "silu", strategy))

    def batch(n, k, c):
        return [torch.randn(n, 3, k), torch.randn(c, k), torch.randn(c), torch.rand(c), torch.randn(c)]

    check_compiled(functions(strategy, "gelu")[0], [batch(4, 5, 6), batch(7, 8, 9), batch(3, 4, 5)])


def test_compile_with_one_beta_a_sample():
    def batch(n, k, c):
        return [torch.randn(n, k), torch.randn(c, k), None, torch.rand(n, c), torch.randn(n, c)]

    check_compiled(functions("epilogue", "relu")[0], [batch(4, 5, 6), batch(7, 8, 9), batch(3, 4, 5)])


class Layer(torch.nn.Module):
    def __init__(self, strategy):
        super().__init__()
        self.strategy = strategy
        self.weight = torch.nn.Parameter(torch.randn(5, 6))
        self.bias = torch.nn.Parameter(torch.randn(5))

    def forward(self, x, gate):
        return ops.gated_linear(x, self.weight, self.bias, gate, None, "relu", self.strategy)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_export_and_inference_mode(strategy):
    layer, x, gate = Layer(strategy), torch.randn(3, 6), torch.rand(5)
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(layer, (x, gate), dynamic_shapes=({0: batch}, None))
    bigger = torch.randn(8, 6)
    torch.testing.assert_close(program.module()(bigger, gate), layer(bigger, gate))
    with torch.inference_mode():
        torch.testing.assert_close(layer(bigger, gate), program.module()(bigger, gate))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_inductor(strategy):
    torch._dynamo.reset()
    results = []
    for wrap in (lambda f: f, lambda f: torch.compile(f, fullgraph=True)):
        tensors = [leaf(t) for t in tensors_for("(N, L, K)", dtype=torch.float32)]
        y = wrap(functions(strategy, "gelu")[0])(*tensors)
        results.append([y, *torch.autograd.grad(y.sin().sum(), tensors)])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(eager, compiled)


def test_second_derivatives_are_refused():
    for strategy in STRATEGIES:
        check_once_differentiable(functions(strategy, "tanh")[0], tensors_for("(N, K)"), "gated_linear")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.rand(3, 7)}, ValueError, r"x has shape \[3, 7\]; expected \(..., 6\)"),
        ({"x": torch.rand(())}, ValueError, "x has shape"),
        ({"x": torch.rand(3, 6, dtype=torch.float64)}, TypeError, "x has dtype Double and weight Float"),
        ({"weight": torch.rand(6)}, ValueError, r"weight has shape \[6\]; expected \(C, K\)"),
        ({"gate": torch.rand(3, 5), "strategy": "fold"}, ValueError, "cannot be folded"),
        ({"gate": torch.rand(2, 5)}, ValueError, "gate has shape"),
        ({"gate": torch.rand(4)}, ValueError, "gate has shape"),
        ({"bias": torch.rand(4)}, ValueError, "bias has shape"),
        ({"strategy": "fuse"}, ValueError, "strategy is 'fuse'; expected fold, epilogue or fused"),
        ({"activation": ""}, ValueError, "activation is ''"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    arguments = {
        "x": torch.rand(3, 6), "weight": torch.rand(5, 6), "bias": None, "gate": torch.rand(5), "shift": None,
        "activation": "none", "strategy": "epilogue",
    }
    with pytest.raises(error, match=message):
        ops.gated_linear(**{**arguments, **change})


@pytest.mark.skipif(ops.GPU_TYPE == "cpu", reason="the core of this run takes CPU tensors for a GPU's")
def test_fused_needs_cuda_tensors():
    with pytest.raises(RuntimeError, match="x is on cpu; the fused kernels need CUDA tensors"):
        ops.gated_linear(torch.rand(2, 3), torch.rand(4, 3), None, torch.rand(4), None, "none", "fused")

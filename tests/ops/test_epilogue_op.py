from __future__ import annotations

import pytest
import torch
from helpers import check_gradient_with_a_tangent
from op_checks import (
    agree,
    check_compiled,
    check_once_differentiable,
    check_subsets,
    leaf,
    requires_extension,
    reversed_strides,
    same_bits_for_any_threads,
)

from mrvae_kernels import ops, reference

pytestmark = requires_extension

ACTIVATIONS = reference.ACTIVATIONS
FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}

# u, channel axis
LAYOUTS = {
    "(N, C)": (lambda: torch.randn(9, 7), 1),
    "(N, C), wide": (lambda: torch.randn(3, 700), 1),
    "(N, 3), short rows": (lambda: torch.randn(500, 3), 1),
    "(N, L, C)": (lambda: torch.randn(4, 6, 5), -1),
    "(N, C, 3), short planes": (lambda: torch.randn(6, 5, 3), 1),
    "(N, C, 20)": (lambda: torch.randn(6, 5, 20), 1),
    "(N, C, H, W)": (lambda: torch.randn(3, 5, 9, 11), 1),
    "(N, C, H, W), planes over 512": (lambda: torch.randn(2, 3, 24, 31), 1),
    "channels_last": (lambda: torch.randn(3, 5, 6, 7).to(memory_format=torch.channels_last), 1),
    "channels_last_3d": (lambda: torch.randn(2, 4, 3, 5, 2).to(memory_format=torch.channels_last_3d), 1),
    "one channel": (lambda: torch.randn(4, 1, 5, 5), 1),
    "one sample": (lambda: torch.randn(1, 6, 5), 1),
    "slice": (lambda: torch.randn(6, 8, 10)[::2, 1:6, ::3], 1),
    "transposed": (lambda: torch.randn(5, 9).t(), 1),
    "samples innermost": (lambda: torch.randn(5, 4, 6).permute(2, 0, 1), 1),
    "expanded": (lambda: torch.randn(4, 1, 6).expand(4, 5, 6), 1),
    "empty batch": (lambda: torch.randn(0, 5, 3), 1),
    "no channels": (lambda: torch.randn(4, 0, 3), 1),
    "no pixels": (lambda: torch.randn(4, 5, 0), 1),
}


def tensors_for(name, per_sample, dtype=torch.float64):
    torch.manual_seed(0)
    make, dim = LAYOUTS[name]
    u = make().to(dtype)
    shape = (u.shape[0], u.shape[dim]) if per_sample else (u.shape[dim],)
    gate, shift = (torch.randn(shape, dtype=reference.gate_dtype(dtype)) for _ in range(2))
    return dim, [u, torch.randn(u.shape[dim]).to(dtype), gate, shift]


def functions(dim, activation="none"):
    def run(u, bias, gate, shift):
        return ops.epilogue(u, bias, gate, shift, dim, activation)

    def oracle(u, bias, gate, shift):
        return reference.epilogue(u, bias, gate, shift, dim % u.dim(), activation)

    return run, oracle


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_agrees_with_reference(name, per_sample):
    for dtype, activation in ((torch.float64, "none"), (torch.float32, "silu"), (torch.bfloat16, "none")):
        dim, tensors = tensors_for(name, per_sample, dtype)
        agree(*functions(dim, activation), tensors)
        y = ops.epilogue(*tensors, dim, activation)
        assert y.dtype == dtype and y.stride() == torch.empty_like(tensors[0]).stride()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["(N, C)", "(N, C, H, W)"])
def test_every_activation_agrees_with_reference(name, dtype, activation):
    for per_sample in (False, True):
        dim, tensors = tensors_for(name, per_sample, dtype)
        agree(*functions(dim, activation), tensors)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck_and_subsets(activation):
    for name, per_sample in (("(N, C)", False), ("(N, C, 20)", True), ("channels_last", False)):
        dim, tensors = tensors_for(name, per_sample)
        assert torch.autograd.gradcheck(functions(dim, activation)[0], [leaf(t) for t in tensors])
    check_subsets(functions(dim, activation)[0], tensors)


def test_the_first_axis_can_hold_the_channels():
    u, gate = torch.randn(5, 3, 4, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    agree(*functions(0, "tanh"), [u, gate.flip(0), gate, gate + 1])


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("missing", [(1,), (3,), (1, 3)])
def test_without_bias_or_shift(missing, per_sample):
    for name in ("(N, C)", "(N, C, H, W)", "(N, 3), short rows"):
        dim, tensors = tensors_for(name, per_sample)
        agree(*functions(dim, "gelu"), [None if i in missing else t for i, t in enumerate(tensors)])


@pytest.mark.parametrize("name", ["(N, C)", "(N, C, H, W)", "channels_last", "transposed"])
@pytest.mark.parametrize("per_sample", [False, True])
def test_expanded_and_foreign_gradients(name, per_sample):
    dim, tensors = tensors_for(name, per_sample)
    run, oracle = functions(dim, "elu")
    agree(run, oracle, tensors, grads=lambda t: t.new_full((), 0.5).expand(t.shape))
    agree(run, oracle, tensors, grads=lambda t: torch.randn(*t.shape, 2, dtype=t.dtype)[..., 1])
    agree(run, oracle, tensors, grads=reversed_strides)


def test_strided_parameters():
    dim, (u, bias, gate, shift) = tensors_for("(N, C, 20)", True)
    wide = torch.randn(10, 6, dtype=torch.float64)

    def strided(function):
        return lambda u, wide: function(u, wide[::2, 0], wide.t()[:, ::2], wide.t()[:, 1::2])

    agree(*(strided(f) for f in functions(dim)), [u, wide])


@pytest.mark.parametrize("shape", [(3000, 33), (40, 7, 30, 29), (3, 2, 300, 200), (9000, 2), (130, 40, 4, 4)])
@pytest.mark.parametrize("per_sample", [False, True])
def test_long_sums_are_accurate_and_the_same_for_any_number_of_threads(shape, per_sample):
    torch.manual_seed(0)
    u, grad = torch.randn(shape) + 3, torch.randn(shape) + 1
    gate = torch.rand((shape[0], shape[1]) if per_sample else shape[1])
    bias = torch.randn(shape[1])

    def gradients(dtype):
        leaves = [leaf(t, dtype) for t in (u, bias, gate)]
        function = ops.epilogue if dtype == torch.float32 else reference.epilogue
        y = function(leaves[0], leaves[1], leaves[2], None, 1, "leaky_relu")
        return [y, *torch.autograd.grad(y, leaves, grad.to(dtype))]

    same_bits_for_any_threads(lambda: gradients(torch.float32))
    for got, want in zip(gradients(torch.float32), gradients(torch.float64), strict=True):
        assert (got - want).abs().max() <= 1e-6 * want.abs().max()


def test_extreme_values_stay_numbers():
    u = torch.tensor([[0.0, 1e30, -1e30, 3e38, -3e38, 1e-40]])
    for activation in ACTIVATIONS:
        for scale in (0.0, 1e-30, 1.0, 1e8):
            x, gate = leaf(u), leaf(torch.full((6,), scale))
            y = ops.epilogue(x, None, gate, None, 1, activation)
            y.sum().backward()
            assert not y.isnan().any() and not x.grad.isnan().any(), (activation, scale)


def test_opcheck_and_compile():
    for name, per_sample in (("(N, C)", False), ("channels_last", True), ("transposed", False), ("slice", True)):
        dim, tensors = tensors_for(name, per_sample)
        for missing in ((), (1,), (3,)):
            arguments = [None if i in missing else leaf(t) for i, t in enumerate(tensors)]
            torch.library.opcheck(torch.ops.mrvae.epilogue.default, (*arguments, dim, "gelu"))
        for mask in ([True] * 4, [False, True, False, True], [True, False, False, False]):
            arguments = (torch.randn_like(tensors[0]), *tensors, dim, "relu", mask)
            torch.library.opcheck(torch.ops.mrvae.epilogue_backward.default, arguments)

    def batch(n, c, side):
        return [torch.randn(n, c, side, side + 1), torch.randn(c), torch.rand(n, c), torch.rand(n, c)]

    check_compiled(functions(1, "silu")[0], [batch(4, 3, 5), batch(6, 5, 7), batch(2, 7, 3)])


def test_a_gradient_with_a_tangent_is_refused():
    u, gate = leaf(torch.randn(5, 3)), leaf(torch.rand(3))
    check_gradient_with_a_tangent(ops.epilogue(u, None, gate, None, 1, "none"), u, "epilogue")


def test_second_derivatives_are_refused():
    dim, tensors = tensors_for("(N, C)", False)
    check_once_differentiable(functions(dim, "tanh")[0], tensors, "epilogue")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"gate": torch.rand(4)}, ValueError, r"gate has shape \[4\] for u of shape \[6, 5, 2\]"),
        ({"gate": torch.rand(5, 5)}, ValueError, r"or \(N, C\) with one row a sample"),
        ({"gate": torch.rand(5, 1)}, ValueError, "gate has shape"),
        ({"bias": torch.rand(6)}, ValueError, r"bias has shape \[6\]; expected \(5,\)"),
        ({"shift": torch.rand(6, 5)}, ValueError, "that of gate"),
        ({"dim": 3}, ValueError, "dim is 3"),
        ({"dim": 0, "gate": torch.rand(6, 6)}, ValueError, "not in axis 0"),
        ({"activation": "swish"}, ValueError, "'swish'; expected none, relu"),
        ({"u": torch.ones(6, 5, 2, dtype=torch.long)}, TypeError, "u has dtype Long"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    arguments = {
        "u": torch.rand(6, 5, 2), "bias": None, "gate": torch.rand(5), "shift": None, "dim": 1, "activation": "none"
    }
    with pytest.raises(error, match=message):
        ops.epilogue(**{**arguments, **change})

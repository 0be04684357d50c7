"""Strategy "fused" of the compiled core: the CUDA kernels of products, held to plain PyTorch in float64.

They run on a GPU where the core has kernels for it, and in the shim where MRVAE_CORE names that build (see shim.py).
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from helpers import check_gradient_with_a_tangent
from torch import Tensor

import mrvae_kernels as mk
from mrvae_kernels import ops, reference

sys.path.insert(0, str(Path(__file__).parents[1] / "triton_kernels"))
from kernel_checks import assert_close, poisoned  # noqa: E402

pytestmark = pytest.mark.skipif(
    ops.GPU_TYPE is None, reason="no kernels of the core for a GPU; build/shim has them: python tests/cuda_core/shim.py"
)
DEVICE = ops.GPU_TYPE or "cpu"
ACTIVATIONS = ("none", "relu", "silu", "gelu", "tanh", "leaky_relu", "elu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ALL = (True,) * 5


class Geometry(NamedTuple):
    stride: tuple[int, ...] = (1, 1)
    padding: tuple[int, ...] = (0, 0)
    dilation: tuple[int, ...] = (1, 1)
    transposed: bool = False
    output_padding: tuple[int, ...] = (0, 0)
    groups: int = 1


class Layer(NamedTuple):
    """A linear layer where there is no geometry; tensors that require gradients by `needs`."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    gate: Tensor
    shift: Tensor | None
    activation: str
    geometry: Geometry | None = None

    def tensors(self) -> list[Tensor | None]:
        return [self.x, self.weight, self.bias, self.gate, self.shift]

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight) if self.geometry is None else torch.convolution(x, weight, None, *self.geometry)


@contextmanager
def precision(name: str) -> Iterator[None]:
    """ "ieee" or "tf32" for products and convolutions."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


@pytest.fixture(autouse=True)
def exact_float32():
    with precision("ieee"):
        yield


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    if layout == "channels_last" and tensor.dim() == 4:
        return tensor.to(memory_format=torch.channels_last)
    if layout == "sliced":
        wide = torch.full([2 * size + 1 for size in tensor.shape], math.nan, dtype=tensor.dtype, device=tensor.device)
        part = wide[tuple(slice(1, 2 * size + 1, 2) for size in tensor.shape)]
        return part.copy_(tensor)
    if layout == "reversed":
        axes = tuple(reversed(range(tensor.dim())))
        return tensor.permute(axes).contiguous().permute(axes)
    return tensor


def linear(
    rows: tuple[int, ...], inner: int, channels: int, dtype: torch.dtype, activation: str, by_sample: bool = False,
    layout: str = "contiguous", bias: bool = True, shift: bool = True,
) -> Layer:
    shape = (rows[0], channels) if by_sample else (channels,)
    return Layer(
        laid_out(random(*rows, inner, dtype=dtype), layout), laid_out(random(channels, inner, dtype=dtype), layout),
        random(channels, dtype=dtype) if bias else None, random(*shape), random(*shape) if shift else None, activation,
    )


def convolution(
    x: tuple[int, ...], channels: int, kernel: tuple[int, int], geometry: Geometry, dtype: torch.dtype, activation: str,
    by_sample: bool = False, layout: str = "contiguous", bias: bool = True, shift: bool = True,
) -> Layer:
    groups = geometry.groups
    weight = (x[1], channels // groups, *kernel) if geometry.transposed else (channels, x[1] // groups, *kernel)
    shape = (x[0], channels) if by_sample else (channels,)
    return Layer(
        laid_out(random(*x, dtype=dtype), layout), laid_out(random(*weight, dtype=dtype), layout),
        random(channels, dtype=dtype) if bias else None, random(*shape), random(*shape) if shift else None, activation,
        geometry,
    )


def fused(layer: Layer, tensors: list[Tensor | None]) -> Tensor:
    if layer.geometry is None:
        return ops.gated_linear(*tensors, layer.activation, "fused")
    return ops.gated_convolution(*tensors, *layer.geometry, layer.activation, "fused")


def expected(layer: Layer, grad: Tensor, y: Tensor) -> tuple[Tensor, list[Tensor | None]]:
    """The result and all gradients in float64, with the slope of ReLU's kind on the side that y is on: near a kink,
    where u was rounded to 16 bits, it may be the other one."""
    exact = [None if value is None else value.detach().double().requires_grad_() for value in layer.tensors()]
    x, weight, bias, gate, shift = exact
    u = layer.product(x, weight)
    axis = u.dim() - 1 if layer.geometry is None else 1
    z = reference.epilogue(u, bias, gate, shift, axis, "none")
    result = reference.activate(z, layer.activation)
    differentiated = result
    if layer.activation in ("relu", "leaky_relu"):
        slope = 0.0 if layer.activation == "relu" else 0.01
        differentiated = z * torch.where(y.detach() > 0, 1.0, slope)
    present = [value for value in exact if value is not None]
    gradients = iter(torch.autograd.grad(differentiated, present, grad.double()))
    return result.detach(), [None if value is None else next(gradients) for value in exact]


def check(layer: Layer, needs: tuple[bool, ...] = ALL, tolerance: float | None = None) -> None:
    tensors = [
        None if value is None else value.detach().requires_grad_(needed)
        for value, needed in zip(layer.tensors(), needs, strict=True)
    ]
    with poisoned():
        y = fused(layer, tensors)
        grad = torch.randn_like(y)
        result, gradients = expected(layer, grad, y)
        assert y.dtype == layer.x.dtype
        assert_close(y, result, "y", tolerance)
        wanted = [value for value in tensors if value is not None and value.requires_grad]
        if not wanted:
            return
        found = iter(torch.autograd.grad(y, wanted, grad))
    for name, value, want in zip(("dx", "dW", "db", "dg", "dt"), tensors, gradients, strict=True):
        if value is None or not value.requires_grad:
            continue
        gradient = next(found)
        assert gradient.dtype == value.dtype
        # sums of s, which is rounded to 16 bits where it enters the product
        limit = tolerance or max(2e-5, {torch.bfloat16: 1e-2, torch.float16: 2e-3}.get(layer.x.dtype, 0.0))
        assert_close(gradient, want, name, limit)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("by_sample", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_linear(activation, by_sample, dtype):
    check(linear((35,), 40, 24, dtype, activation, by_sample))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "sliced", "reversed"])
@pytest.mark.parametrize("rows", [(5,), (3, 7), (2, 3, 4)])
def test_linear_layouts(rows, layout, dtype):
    check(linear(rows, 19, 13, dtype, "silu", layout=layout))
    check(linear(rows, 24, 16, dtype, "tanh", by_sample=True, layout=layout))


def test_linear_of_a_vector():
    check(linear((), 24, 16, torch.float32, "relu"))


@pytest.mark.parametrize(("rows", "inner", "channels"), [(1, 1, 1), (33, 8, 65), (67, 130, 7), (130, 96, 132)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_sizes(rows, inner, channels, dtype):
    check(linear((rows,), inner, channels, dtype, "gelu"))


@pytest.mark.parametrize("rows", [(0,), (3,), (2, 0), (2, 3)])
@pytest.mark.parametrize(("inner", "channels"), [(0, 5), (6, 0), (6, 5)])
@pytest.mark.parametrize("by_sample", [False, True])
def test_linear_empty(rows, inner, channels, by_sample):
    check(linear(rows, inner, channels, torch.float32, "relu", by_sample))


@pytest.mark.parametrize(("bias", "shift"), list(itertools.product((False, True), repeat=2)))
@pytest.mark.parametrize("by_sample", [False, True])
def test_absent_parameters(bias, shift, by_sample):
    check(linear((9,), 16, 8, torch.float32, "elu", by_sample, bias=bias, shift=shift))
    geometry = Geometry((2, 1), (1, 0), transposed=True)
    check(convolution((2, 8, 3, 4), 8, (3, 2), geometry, torch.float32, "elu", by_sample, bias=bias, shift=shift))


@pytest.mark.parametrize("needs", list(itertools.product((False, True), repeat=5)))
@pytest.mark.parametrize("by_sample", [False, True])
def test_subsets_of_gradients(needs, by_sample):
    check(linear((6, 2), 16, 8, torch.float32, "leaky_relu", by_sample), needs)
    for transposed in (False, True):
        geometry = Geometry((2, 1), (1, 1), transposed=transposed)
        check(convolution((2, 4, 3, 3), 5, (3, 2), geometry, torch.float32, "silu", by_sample), needs)


GEOMETRIES = {
    "plain": ((2, 16, 6, 5), 24, (3, 3), Geometry(padding=(1, 1))),
    "strided": ((2, 8, 9, 8), 20, (4, 4), Geometry((2, 2), (1, 1))),
    "first": ((2, 3, 8, 7), 16, (3, 3), Geometry((2, 1), (1, 0), (1, 2))),
    "pointwise": ((3, 16, 4, 4), 8, (1, 1), Geometry()),
    "groups": ((2, 32, 5, 4), 48, (2, 3), Geometry((2, 3), (0, 2), (2, 1), groups=2)),
    "transposed": ((2, 16, 4, 3), 24, (4, 4), Geometry((2, 2), (1, 1), transposed=True)),
    "transposed, output padding": ((2, 8, 3, 4), 16, (3, 3), Geometry((2, 3), (1, 0), (1, 1), True, (1, 2))),
    "transposed, dilated": ((1, 9, 4, 4), 5, (3, 2), Geometry((4, 2), (1, 1), (2, 2), True, (1, 0))),
    "transposed, groups": ((2, 32, 3, 3), 64, (3, 2), Geometry((1, 2), (1, 1), (2, 3), True, (0, 0), 2)),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("name", list(GEOMETRIES))
def test_convolution(name, layout, dtype):
    x, channels, kernel, geometry = GEOMETRIES[name]
    for activation, by_sample in (("relu", False), ("silu", False), ("tanh", True)):
        check(convolution(x, channels, kernel, geometry, dtype, activation, by_sample, layout))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("by_sample", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_convolution_activations(transposed, by_sample, activation):
    geometry = Geometry((2, 1), (1, 1), transposed=transposed)
    check(convolution((2, 8, 5, 4), 12, (3, 3), geometry, torch.float32, activation, by_sample))


@pytest.mark.parametrize("transposed", [False, True])
def test_convolution_empty(transposed):
    check(convolution((0, 8, 5, 4), 12, (3, 3), Geometry(transposed=transposed), torch.float32, "relu"))


@pytest.mark.parametrize("transposed", [False, True])
def test_tf32(transposed):
    with precision("tf32"):
        check(linear((35,), 40, 24, torch.float32, "gelu"), tolerance=1e-3)
        geometry = Geometry((2, 2), (1, 1), transposed=transposed)
        layer = convolution((2, 8, 5, 4), 16, (3, 3), geometry, torch.float32, "silu", layout="channels_last")
        check(layer, tolerance=1e-3)
        y, exact = fused(layer, layer.tensors()), layer.product(layer.x.double(), layer.weight.double())
        assert y.shape == exact.shape


def test_layout_of_results():
    geometry = Geometry(padding=(1, 1))
    for layout, last in (("contiguous", False), ("channels_last", True)):
        layer = convolution((2, 16, 5, 4), 16, (3, 3), geometry, torch.bfloat16, "gelu", layout=layout)
        tensors = [value.requires_grad_() for value in layer.tensors()]
        y = fused(layer, tensors)
        assert y.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
        gradients = torch.autograd.grad(y.sum(), tensors[:2])  # an expanded gradient
        assert [value.stride() for value in gradients] == [value.stride() for value in tensors[:2]]


def test_the_same_bits_each_time():
    layer = convolution((4, 16, 12, 12), 16, (3, 3), Geometry(padding=(1, 1)), torch.float32, "gelu")
    tensors = [value.requires_grad_() for value in layer.tensors()]
    grad = torch.randn(4, 16, 12, 12, device=DEVICE)
    runs = [torch.autograd.grad(fused(layer, tensors), tensors, grad) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_autocast():
    layer = linear((9,), 16, 8, torch.float32, "relu")
    with torch.autocast(DEVICE, torch.bfloat16):
        assert fused(layer, layer.tensors()).dtype == torch.bfloat16


def test_differentiable_once():
    layer = linear((4,), 8, 8, torch.float32, "tanh")
    tensors = [value.requires_grad_() for value in layer.tensors()]
    (gradient,) = torch.autograd.grad(fused(layer, tensors).sum(), tensors[1], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        gradient.sum().backward()


def test_a_gradient_with_a_tangent_is_refused():
    layer = linear((4,), 8, 8, torch.float32, "tanh")
    tensors = [value.requires_grad_() for value in layer.tensors()]
    check_gradient_with_a_tangent(fused(layer, tensors), tensors[1], "fused product")


@pytest.mark.parametrize(("change", "error", "message"), [
    ({"x": (3, 7)}, ValueError, r"expected \(..., 6\)"),
    ({"weight": (6,)}, ValueError, r"expected \(C, K\)"),
    ({"gate": (4,)}, ValueError, "gate has shape"),
    ({"gate": (2, 5)}, ValueError, "gate has shape"),
    ({"bias": (4,)}, ValueError, "bias has shape"),
    ({"shift": (4,)}, ValueError, "shift has shape"),
])
def test_bad_shapes(change, error, message):
    shapes = {"x": (3, 6), "weight": (5, 6), "bias": (5,), "gate": (5,), "shift": (5,), **change}
    with pytest.raises(error, match=message):
        ops.gated_linear(*(random(*shape) for shape in shapes.values()), "none", "fused")


def test_float64_is_refused():
    with pytest.raises(TypeError, match="expected float32, bfloat16 or float16"):
        ops.gated_linear(
            *(random(*shape, dtype=torch.float64) for shape in ((3, 6), (5, 6), (5,), (5,), (5,))), "none", "fused"
        )


@pytest.mark.parametrize(("x", "weight", "geometry", "message"), [
    ((2, 8, 5, 5), (8, 1, 3, 3), Geometry(groups=8), "1 channels a group"),
    ((2, 4, 5), (8, 4, 3), Geometry((1,), (0,), (1,), False, (0,)), "two numbers each"),
    ((2, 4, 2, 2), (8, 4, 3, 3), Geometry(), "expected at least 1 x 1"),
    ((2, 4, 5, 5), (4, 8, 3, 3), Geometry(transposed=True, output_padding=(1, 0)), "output_padding"),
])
def test_refused_convolutions(x, weight, geometry, message):
    channels = weight[1] * geometry.groups if geometry.transposed else weight[0]
    with pytest.raises(ValueError, match=message):
        ops.gated_convolution(random(*x), random(*weight), None, random(channels), None, *geometry, "none", "fused")


class Network(torch.nn.Module):
    def __init__(self, layers: list[Layer]) -> None:
        super().__init__()
        self.layers = layers
        self.weights = torch.nn.ParameterList([torch.nn.Parameter(layer.weight) for layer in layers])

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        for layer, weight in zip(self.layers, self.weights, strict=True):
            x = fused(layer, [x, weight, layer.bias, gate, layer.shift])
        return x


@pytest.mark.parametrize("by_sample", [False, True])
def test_compiled(by_sample):
    shape = (3, 8) if by_sample else (8,)
    layers = [
        convolution((3, 8, 5, 5), 8, (3, 3), Geometry(padding=(1, 1), transposed=transposed), torch.float32, activation,
                    by_sample)
        for transposed, activation in ((False, "silu"), (True, "relu"))
    ]
    network, gate = Network(layers), random(*shape).requires_grad_()
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    x = layers[0].x.requires_grad_()
    outcomes = []
    for run in (network, compiled):
        y = run(x, gate)
        outcomes.append([y, *torch.autograd.grad(y.square().sum(), [x, gate, *network.parameters()])])
    for a, b in zip(*outcomes, strict=True):
        assert_close(a, b.double(), tolerance=1e-6)


@pytest.mark.parametrize("backend", [None, "cpp"])
def test_the_strategy_compiles_whole(backend):
    weight, gate, bias = (random(*shape).requires_grad_() for shape in ((16, 8), (16,), (16,)))
    filters, own = random(8, 2, 3, 3).requires_grad_(), random(8).requires_grad_()

    def network(x: Tensor) -> Tensor:
        y = mk.gated_linear(x, weight, bias, gate, activation="silu")
        return mk.gated_conv2d(y.view(-1, 2, 4, 2), filters, None, own, padding=1)

    x, outcomes = random(3, 8).requires_grad_(), []
    with mk.override(strategy="fused", backend=backend):
        for run in (network, torch.compile(network, backend="aot_eager", fullgraph=True)):
            y = run(x)
            outcomes.append([y, *torch.autograd.grad(y.square().sum(), [x, weight, bias, gate, filters, own])])
    for a, b in zip(*outcomes, strict=True):
        assert_close(a, b.double(), tolerance=1e-6)


def test_operators_pass_torch_s_own_checks():
    layer = linear((5,), 16, 8, torch.float32, "silu")
    tensors = [value.requires_grad_() for value in layer.tensors()]
    torch.library.opcheck(torch.ops.mrvae.fused_linear.default, (*tensors, "silu", True))
    geometry = Geometry(padding=(1, 1))
    layer = convolution((2, 8, 5, 4), 8, (3, 3), geometry, torch.float32, "relu", layout="channels_last")
    tensors = [value.requires_grad_() for value in layer.tensors()]
    torch.library.opcheck(torch.ops.mrvae.fused_convolution.default, (*tensors, *geometry, "relu", True))


def test_exported():
    layers = [linear((3,), 8, 8, torch.float32, "gelu")]
    network, gate = Network(layers), random(8)
    program = torch.export.export(network, (layers[0].x, gate))
    assert "mrvae.gated_linear" in str(program.graph)
    assert_close(program.module()(layers[0].x, gate), network(layers[0].x, gate).double(), tolerance=1e-6)

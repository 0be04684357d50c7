"""What the tests of both convolutions share: one comparison with the reference, forward and backward."""

from __future__ import annotations

import functools
import importlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import pytest
import torch
from kernel_checks import DEVICE, PACKAGE, assert_close, poisoned
from torch import Tensor

from mrvae_kernels import reference

PARAMETERS = ("dx", "dW", "db", "dg", "dt")


@pytest.fixture(autouse=True)
def exact_float32() -> Iterator[None]:
    """float32 products without TF32, which a GPU takes by default."""
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    yield
    torch.backends.cudnn.conv.fp32_precision = before


def pair(value: int | Sequence[int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


class Case:
    """A convolution's tensors and geometry; `run` gives the kernels' y, kept and gradients, `exact` the reference's.

    x, weight: take the place of random ones. grad: makes the gradient of y from its shape.
    """

    def __init__(
        self, transposed: bool, samples: int = 2, c_in: int = 3, c_out: int = 3, image: int | Sequence[int] = 4,
        kernel: int | Sequence[int] = 3, stride: int | Sequence[int] = 1, padding: int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1, groups: int = 1, output_padding: int | Sequence[int] = 0,
        activation: str = "none", per_sample: bool = False, bias: torch.dtype | None = torch.float32,
        shift: bool = True, dtype: torch.dtype = torch.float32, channels_last: bool = False, x: Tensor | None = None,
        weight: Tensor | None = None, grad: Callable[..., Tensor] | None = None,
    ) -> None:
        generator = torch.Generator().manual_seed(1)
        random = functools.partial(torch.randn, generator=generator)
        self.transposed, self.activation, self.groups, self.grad = transposed, activation, groups, grad
        self.stride, self.padding, self.dilation = pair(stride), pair(padding), pair(dilation)
        self.output_padding = pair(output_padding)
        if x is None:
            x = random(samples, c_in, *pair(image)).to(DEVICE, dtype)
            if channels_last:
                x = x.to(memory_format=torch.channels_last)
        if weight is None:
            sizes = (c_in, c_out // groups) if transposed else (c_out, c_in // groups)
            weight = (0.5 * random(*sizes, *pair(kernel))).to(DEVICE, dtype)
        features = (samples, c_out) if per_sample else (c_out,)
        self.tensors = (
            x, weight, None if bias is None else random(c_out).to(DEVICE, bias),
            (random(*features).abs() + 0.2).to(DEVICE), random(*features).to(DEVICE) if shift else None,
        )
        extra = (self.output_padding,) if transposed else ()
        self.geometry: tuple[Any, ...] = (self.stride, self.padding, *extra, self.dilation, groups)

    def functions(self, kernels: ModuleType) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """The operator and its backward pass in the package that `kernels`, one of its modules, belongs to."""
        name = "conv_transpose2d" if self.transposed else "conv2d"
        module = importlib.import_module(f"{kernels.__package__}.{name}")
        return getattr(module, name), getattr(module, f"{name}_backward")

    def gradient_of(self, y: Tensor) -> Tensor:
        if self.grad is not None:
            return self.grad(*y.shape)
        return torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y)

    def run(self, kernels: ModuleType, mask: Sequence[bool] = (True,) * 5) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        forward, backward = self.functions(kernels)
        with poisoned():
            y, kept = forward(*self.tensors, *self.geometry, self.activation, True)
            needed = y if self.activation in ("relu", "tanh", "leaky_relu", "elu") else None
            gradients = backward(
                self.gradient_of(y), *self.tensors, needed, kept, *self.geometry, self.activation, mask
            )
        return y, kept, gradients

    def exact(self) -> tuple[Tensor, list[Tensor | None]]:
        leaves = [None if t is None else t.double().requires_grad_() for t in self.tensors]
        y = reference.gated_convolution(
            *leaves, self.stride, self.padding, self.dilation, self.transposed, self.output_padding, self.groups,
            self.activation,
        )
        given = [leaf for leaf in leaves if leaf is not None]
        found = iter(torch.autograd.grad(y, given, self.gradient_of(y).to(self.tensors[0].dtype).double()))
        return y.detach(), [None if leaf is None else next(found) for leaf in leaves]


def agree(kernels: ModuleType, transposed: bool, **options: Any) -> None:
    """y and every gradient are the reference's; gradients have the strides and dtypes of their tensors."""
    case = Case(transposed, **options)
    y, kept, gradients = case.run(kernels)
    expected, expected_gradients = case.exact()
    x = case.tensors[0]
    assert x is not None
    # bias, gate and shift are float32, and inherit the rounding of y that the slope is taken from
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[x.dtype]
    assert_close(y, expected, "y", tolerance)
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    assert y.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    keeps = case.tensors[3].dim() == 2 or case.activation in ("silu", "gelu")  # type: ignore[union-attr]
    assert kept.shape == (y.shape if keeps else (0,))
    for name, tensor, gradient, want in zip(PARAMETERS, case.tensors, gradients, expected_gradients, strict=True):
        if tensor is None or want is None:
            assert gradient.shape == (0,), name
            continue
        assert gradient.dtype == tensor.dtype, name
        assert gradient.stride() == torch.empty_like(tensor).stride(), name
        assert_close(gradient, want, name, max(tolerance, 1e-2 if tensor.dtype == torch.bfloat16 else 0.0))


def wide_offsets(kernels: ModuleType, transposed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same results with 64-bit offsets, which large tensors take, as with 32-bit ones."""
    package = importlib.import_module(kernels.__package__ or "")
    names = ("implicit_gemm", "convolution", "weight_gradient")
    gemm, *planning = (importlib.import_module(f"{package.__name__}.{name}") for name in names)
    for options in (dict(c_in=17, c_out=18, activation="relu"), dict(activation="silu"), dict(per_sample=True)):
        case = Case(transposed, image=3, kernel=2, stride=(2, 1), **options)  # type: ignore[arg-type]
        narrow = case.run(kernels)
        for module in planning:
            module.plan.cache_clear()
        with monkeypatch.context() as patch:
            patch.setattr(gemm, "INT32_LIMIT", 1)
            far = case.run(kernels)
            assert all(module.plan.cache_info().currsize > 0 for module in planning)
        for module in planning:
            module.plan.cache_clear()
        for a, b in zip((narrow[0], *narrow[2]), (far[0], *far[2]), strict=True):
            assert torch.equal(a, b)


class Recorder:
    """Takes the place of a kernel, and notes what it is launched with: by name, with the number of programs."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.launches = kernel, list[dict[str, Any]]()

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        def launch(*arguments: Any, **options: Any) -> Any:
            self.launches.append({**dict(zip(self.kernel.arg_names, arguments, strict=False)), **options, "grid": grid})
            return self.kernel[grid](*arguments, **options)

        return launch


def recorded(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> tuple[Recorder, Recorder]:
    """Of convolve and convolve_weight."""
    found = []
    for name, kernel in (("convolution", "convolve"), ("weight_gradient", "convolve_weight")):
        module = importlib.import_module(f"{kernels.__package__}.{name}")
        recorder = Recorder(getattr(module, kernel))
        monkeypatch.setattr(module, kernel, recorder)
        found.append(recorder)
    return found[0], found[1]


def half_precision_products(kernels: ModuleType, transposed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Halves are never multiplied as TF32, which AMD's compiler refuses but for one architecture."""
    launches = [recorder.launches for recorder in recorded(kernels, monkeypatch)]
    for dtype in (torch.bfloat16, torch.float16):
        Case(transposed, samples=1, c_in=1, c_out=1, image=2, kernel=1, dtype=dtype).run(kernels)
    assert [launch["PRECISION"] for launch in launches[0]] == ["ieee"] * 4
    assert [launch["PRECISION"] for launch in launches[1]] == ["ieee"] * 2


def channels_last(*shape: int) -> Tensor:
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(4)).to(DEVICE, torch.bfloat16)
    return tensor.to(memory_format=torch.channels_last)


def wide_accesses(kernels: ModuleType, transposed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The units of channels_last tensors are what their channels allow, and the strides are in them."""
    forward, weight_gradient = recorded(kernels, monkeypatch)
    for c_in, c_out, unit_in, unit_out in ((36, 24, 4, 8), (17, 18, 1, 2), (40, 20, 8, 4)):
        forward.launches.clear()
        weight_gradient.launches.clear()
        weight = channels_last(*((c_in, c_out) if transposed else (c_out, c_in)), 1, 2)
        agree(
            kernels, transposed, samples=2, c_in=c_in, c_out=c_out, image=(2, 3), weight=weight, grad=channels_last,
            kernel=(1, 2), dtype=torch.bfloat16, channels_last=True, activation="relu",
        )
        (result, gradient), (product,) = forward.launches, weight_gradient.launches
        assert (result["X_UNIT"], result["CHANNEL_UNIT"]) == (unit_in, unit_in)
        assert (result["Y_UNIT"], result["COLUMN_UNIT"]) == (unit_out, unit_out)
        assert gradient["X_UNIT"] == gradient["SAVED_UNIT"] == gradient["CHANNEL_UNIT"] == unit_out
        weight_units = [
            launch[name] for launch in (result, gradient) for name in ("WEIGHT_CHANNEL_UNIT", "WEIGHT_COLUMN_UNIT")
        ]
        unit = unit_out if transposed else unit_in
        assert weight_units == ([unit, 1, 1, unit] if transposed else [1, unit, unit, 1])
        a, b = (unit_in, unit_out) if transposed else (unit_out, unit_in)
        assert (product["A_UNIT"], product["A_CHANNEL_UNIT"]) == (a, a)
        assert (product["B_UNIT"], product["B_CHANNEL_UNIT"], product["SAVED_UNIT"]) == (b, b, unit_out)
        assert result["x_n"] * unit_in == 6 * c_in and result["x_c"] == 1
        assert result["channel_units"] * unit_in == c_in and result["column_units"] * unit_out == c_out


def scattered_accesses(kernels: ModuleType) -> None:
    """Tiles are smaller where each element is an access of its own."""
    gemm, gradient, tables = (
        importlib.import_module(f"{kernels.__package__}.{name}")
        for name in ("implicit_gemm", "weight_gradient", "configurations")
    )
    tiles = tables.Tiles(128, 128, 64, 8, 4)
    shape = (10**5, 10**3, 10**3, 10**4)
    assert gemm.blocks(tiles, *shape, False, False, 16, "relu") == (128, 128, 64)
    assert gemm.blocks(tiles, *shape, False, False, 16, "silu") == (128, 64, 64)
    assert gemm.blocks(tiles, *shape, False, False, 2, "relu") == (128, 64, 16)
    assert gemm.blocks(tables.Tiles(128, 64, 64, 4, 4), *shape, False, True, 2, "relu") == (64, 32, 16)
    assert gemm.blocks(tables.Tiles(128, 64, 64, 4, 4), *shape, True, False, 2, "relu") == (64, 64, 32)
    tiles = tables.Tiles(64, 64, 64, 4, 4)
    assert gradient.blocks(tiles, 10**3, 10**3, False, False, "relu", False) == (64, 64, 64)
    assert gradient.blocks(tiles, 10**3, 10**3, False, False, "none", True) == (64, 64, 32)
    assert gradient.blocks(tiles, 10**3, 10**3, False, False, "relu", True) == (64, 64, 16)


def many_positions(kernels: ModuleType, transposed: bool) -> None:
    """What programs count up to beyond the last position stays within 32 bits."""
    gradient, common = (
        importlib.import_module(f"{kernels.__package__}.{name}") for name in ("weight_gradient", "geometry")
    )
    limit = 2**31 - 1
    most = limit - common.BEYOND_POSITIONS
    for positions in (most, most - 12345):
        for tiles in (1, 3, 100):
            chunk, splits = gradient.parts(positions, tiles, 1, 64, torch.device(DEVICE))
            assert splits * chunk <= limit
    layer = common.geometry((1, 1), (0, 0), (1, 1), transposed, (0, 0), 1)
    weight = torch.empty(1, 1, 1, 1, device=DEVICE)
    for samples, refused in ((limit // 4 - 2**12, True), (limit // 4 - 2**15, False)):
        x = torch.empty(1, 1, 1, 1, device=DEVICE).expand(samples, 1, 1, 1)
        assert (common.refusal(x, weight, layer) is not None) == refused


ALIGNMENT = """
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime import jit

from mrvae_kernels.triton_kernels import implicit_gemm, weight_gradient

backend, tensor = make_backend(GPUTarget("cuda", 90, 32)), torch.empty(8)
for kernel in (implicit_gemm.convolve, weight_gradient.convolve_weight):
    bind = jit.create_function_from_signature(kernel.signature, kernel.params, backend)
    values = {parameter.name: 32 for parameter in kernel.params}
    pointers = {"x", "saved", "weight", "bias", "gate", "shift", "y", "kept", "a", "b", "partial", "partial_sums"}
    values |= {name: tensor for name in pointers & set(values)}
    numbers = [parameter.name for parameter in kernel.params if not parameter.is_constexpr]
    for name in numbers:
        changed = {**values, name: tensor[1:] if name in pointers else 33}
        if bind(**changed)[1] != bind(**values)[1]:
            print(name, end=" ")
"""


def specialised_on_alignment() -> set[str]:
    """Arguments of the kernels whose being a multiple of 16 makes machine code of its own."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", ALIGNMENT], capture_output=True, text=True, check=True, timeout=100,
        cwd=PACKAGE.parents[1], env=environment,
    )
    return set(done.stdout.split())

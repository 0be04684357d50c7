"""What the tests of both convolutions share: one comparison with the reference, forward and backward."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import pytest
import torch
from kernel_checks import DEVICE, assert_close, poisoned
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

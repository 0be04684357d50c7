"""The fused conv_transpose2d against the reference in float64, forward and backward."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import pytest
import torch
from convolution_checks import (
    Case,
    agree,
    exact_float32,
    half_precision_products,
    many_positions,
    wide_accesses,
    wide_offsets,
)
from kernel_checks import DEVICE, Mutant, choices, layouts, must_fail, requires_triton

pytestmark = requires_triton
kernels = pytest.importorskip("mrvae_kernels.triton_kernels.conv_transpose2d")
__all__ = ["exact_float32"]

GEOMETRIES: list[dict[str, Any]] = [
    dict(image=(3, 4), padding=1),
    dict(image=(4, 3), kernel=3, stride=2, padding=1, output_padding=1),
    dict(image=(3, 4), kernel=4, stride=2, padding=1),
    dict(image=(3, 2), kernel=(5, 1), stride=(1, 3), padding=(2, 0), output_padding=(0, 2)),  # phases without a tap
    dict(image=(4, 3), kernel=3, stride=2, padding=2, dilation=2, output_padding=(1, 0)),  # phases without a tap
    dict(image=(3, 4), kernel=(2, 3), stride=(3, 2), padding=1, dilation=(2, 3)),
    dict(image=(3, 4), kernel=2, stride=(4, 6), dilation=(6, 4), output_padding=(5, 3)),
    dict(image=3, kernel=1),
    dict(image=1, kernel=4, samples=3),
]
CHANNELS = [(1, 3), (3, 1), (1, 17), (17, 33), (33, 17), (16, 16)]


@pytest.mark.parametrize("options", GEOMETRIES)
def test_geometries(options: dict[str, Any]) -> None:
    agree(kernels, True, c_in=3, c_out=5, activation="relu", **options)


@pytest.mark.parametrize("options", [GEOMETRIES[1], GEOMETRIES[4]])
def test_geometries_with_a_block_of_channels_at_each_tap(options: dict[str, Any]) -> None:
    agree(kernels, True, c_in=18, c_out=17, samples=1, activation="relu", **options)


@pytest.mark.parametrize("c_in, c_out", CHANNELS)
def test_channels(c_in: int, c_out: int) -> None:
    agree(kernels, True, c_in=c_in, c_out=c_out, kernel=2, samples=1, image=3)


def test_groups() -> None:
    agree(kernels, True, c_in=32, c_out=36, groups=2, kernel=2, stride=2, padding=1, image=(3, 2))


@pytest.mark.parametrize("activation, per_sample", [
    ("none", True), ("relu", False), ("silu", False), ("gelu", False), ("tanh", False), ("leaky_relu", False),
    ("elu", False), ("silu", True), ("relu", True),
])
def test_activations(activation: str, per_sample: bool) -> None:
    agree(
        kernels, True, c_in=1, c_out=17, samples=3, image=2, kernel=2, stride=(1, 2), activation=activation,
        per_sample=per_sample,
    )


@pytest.mark.parametrize("options", [dict(bias=None), dict(shift=False), dict(bias=None, shift=False)])
def test_without_bias_or_shift(options: dict[str, Any]) -> None:
    agree(kernels, True, image=3, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels_last", [False, True])
def test_dtypes(dtype: torch.dtype, channels_last: bool) -> None:
    options: dict[str, Any] = dict(dtype=dtype, channels_last=channels_last, kernel=2, image=3)
    agree(kernels, True, c_in=17, c_out=18, activation="silu", **options)
    agree(kernels, True, c_in=2, bias=torch.bfloat16, padding=1, **options)


def of_layout(name: str, *shape: int) -> torch.Tensor:
    torch.manual_seed(3)
    return dict(layouts(*shape))[name]


@pytest.mark.parametrize("name", ["contiguous", "reversed", "sliced", "expanded", "channels_last"])
@pytest.mark.parametrize("c_in", [3, 17])
def test_layouts(name: str, c_in: int) -> None:
    """Of x, the weight and the gradient of y, one at a time."""
    options: dict[str, Any] = dict(samples=2, c_in=c_in, c_out=3, kernel=2, image=(2, 3), activation="relu")
    agree(kernels, True, x=of_layout(name, 2, c_in, 2, 3), **options)
    agree(kernels, True, weight=of_layout(name, c_in, 3, 2, 2), **options)
    agree(kernels, True, grad=lambda *shape: of_layout(name, *shape), channels_last=True, **options)


def test_choices_of_gradients() -> None:
    case = Case(True, samples=1, c_in=1, c_out=2, image=2, kernel=2, activation="elu")
    everything = case.run(kernels)[2]
    for mask in list(choices(5))[::3]:
        for wanted, gradient, full in zip(mask, case.run(kernels, mask)[2], everything, strict=True):
            assert torch.equal(gradient, full) if wanted else gradient.shape == (0,)


@pytest.mark.parametrize("per_sample", [False, True])
def test_no_samples(per_sample: bool) -> None:
    case = Case(True, samples=0, c_out=5, activation="silu", per_sample=per_sample)
    y, kept, gradients = case.run(kernels)
    assert y.shape == (0, 5, 6, 6) and kept.shape == y.shape and gradients[0].shape == (0, 3, 4, 4)
    assert all(not gradient.any() for gradient in gradients[1:])


def test_wide_offsets(monkeypatch: pytest.MonkeyPatch) -> None:
    wide_offsets(kernels, True, monkeypatch)


def test_half_precision_products(monkeypatch: pytest.MonkeyPatch) -> None:
    half_precision_products(kernels, True, monkeypatch)


def test_wide_accesses(monkeypatch: pytest.MonkeyPatch) -> None:
    wide_accesses(kernels, True, monkeypatch)


def test_many_positions() -> None:
    many_positions(kernels, True)


def test_large_products_copy_the_weight_to_channels_last(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("mrvae_kernels.triton_kernels.convolution")
    monkeypatch.setattr(module, "PACKING_PAYS", 0)
    agree(kernels, True, c_in=17, c_out=3, kernel=2, image=2)


REFUSED: list[tuple[dict[str, Any], str]] = [
    (dict(c_in=32, c_out=32, groups=8), "groups = 8 leaves 4 channels a group"),
    (dict(stride=2, output_padding=2), r"output_padding is \(2, 2\); expected less than"),
    (dict(image=1, kernel=1, padding=1), "gives -1 x -1 results"),
    (dict(x=torch.randn(2, 4, 5, 5, device=DEVICE)), "expected 3 channels in axis 1"),
]


@pytest.mark.parametrize("options, message", REFUSED)
def test_refusals(options: dict[str, Any], message: str) -> None:
    case = Case(True, **options)
    with pytest.raises(ValueError, match=message):
        kernels.conv_transpose2d(*case.tensors, *case.geometry, "none", False)
    assert kernels.conv_transpose2d_refusal(*case.tensors[:2], *case.geometry) is not None
    assert kernels.conv_transpose2d_refusal(*Case(True).tensors[:2], *Case(True).geometry) is None


def check_phases(module: ModuleType) -> None:
    agree(module, True, c_in=2, c_out=2, image=(2, 3), kernel=(3, 4), stride=(2, 3), padding=1, dilation=(1, 2))


def check_common_factor(module: ModuleType) -> None:
    agree(module, True, c_in=2, c_out=2, image=3, kernel=3, stride=2, dilation=2, output_padding=1)


def check_slope(module: ModuleType) -> None:
    agree(module, True, c_in=2, c_out=2, image=3, kernel=2, activation="tanh")


def check_blocks(module: ModuleType) -> None:
    agree(module, True, c_in=17, c_out=2, image=2, samples=1, kernel=3, stride=2)


MUTANTS = [
    Mutant("implicit_gemm", "first = (position // common * inverse) % distance", "first = position * 0", check_phases),
    Mutant("implicit_gemm", "tl.where(position % common == 0, ", "tl.where(position >= 0, ", check_common_factor),
    Mutant("implicit_gemm", "kernel - first + distance - 1", "kernel - first", check_phases),
    Mutant("implicit_gemm", "(first_r + tap_r * step_r) * weight_r", "(first_r + tap_r) * weight_r", check_blocks),
    Mutant("implicit_gemm", "ended = s >= taps_s", "ended = s > taps_s", check_blocks),
    Mutant("weight_gradient", "b_tile = slope_times(b_tile, saved_tile, ACTIVATION)", "b_tile = b_tile", check_slope),
    Mutant("weight_gradient", "s * dilation_width - padding_width", "s - padding_width", check_phases),
    Mutant("convolution", "weight[1][:2] if transposed else weight[1][1::-1]", "weight[1][:2]", check_blocks),
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.new[:40])
def test_faults_are_noticed(mutant: Mutant, tmp_path: Any) -> None:
    must_fail(mutant, tmp_path)

"""The fused conv2d against the reference in float64, forward and backward."""

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
    scattered_accesses,
    specialised_on_alignment,
    wide_accesses,
    wide_offsets,
)
from kernel_checks import DEVICE, Mutant, assert_close, choices, layouts, must_fail, requires_triton

pytestmark = requires_triton
kernels = pytest.importorskip("mrvae_kernels.triton_kernels.conv2d")
__all__ = ["exact_float32"]

GEOMETRIES: list[dict[str, Any]] = [
    dict(image=(5, 4), padding=1),
    dict(image=(9, 7), kernel=(3, 2), stride=(2, 1), padding=(1, 0)),
    dict(image=(7, 6), kernel=4, stride=2, padding=1),
    dict(image=(6, 9), kernel=(5, 1), stride=(1, 3), padding=(2, 0)),
    dict(image=(7, 8), kernel=3, stride=2, padding=2, dilation=2),  # odd positions of x have no tap
    dict(image=(7, 8), kernel=2, stride=(3, 2), padding=1, dilation=(1, 3)),
    dict(image=5, kernel=1),
    dict(image=(5, 8), kernel=1, stride=3),  # most of x is never read
    dict(image=4, kernel=4, samples=3),  # one result a sample
]
CHANNELS = [(1, 3), (3, 1), (1, 17), (17, 33), (33, 17), (16, 16)]


@pytest.mark.parametrize("options", GEOMETRIES)
def test_geometries(options: dict[str, Any]) -> None:
    agree(kernels, False, c_in=3, c_out=5, activation="relu", **options)


@pytest.mark.parametrize("options", [GEOMETRIES[1], GEOMETRIES[4]])
def test_geometries_with_a_block_of_channels_at_each_tap(options: dict[str, Any]) -> None:
    agree(kernels, False, c_in=18, c_out=17, samples=1, activation="relu", **options)


@pytest.mark.parametrize("c_in, c_out", CHANNELS)
def test_channels(c_in: int, c_out: int) -> None:
    agree(kernels, False, c_in=c_in, c_out=c_out, kernel=2, samples=1)


def test_groups() -> None:
    agree(kernels, False, c_in=32, c_out=36, groups=2, kernel=2, stride=2, padding=1, image=(5, 4))


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("activation", ["none", "relu", "silu", "gelu", "tanh", "leaky_relu", "elu"])
def test_activations(activation: str, per_sample: bool) -> None:
    agree(kernels, False, c_in=1, c_out=17, samples=3, kernel=2, activation=activation, per_sample=per_sample)


@pytest.mark.parametrize("options", [dict(bias=None), dict(shift=False), dict(bias=None, shift=False)])
@pytest.mark.parametrize("per_sample", [False, True])
def test_without_bias_or_shift(options: dict[str, Any], per_sample: bool) -> None:
    agree(kernels, False, per_sample=per_sample, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels_last", [False, True])
def test_dtypes(dtype: torch.dtype, channels_last: bool) -> None:
    options: dict[str, Any] = dict(dtype=dtype, channels_last=channels_last, kernel=2)
    agree(kernels, False, c_in=17, c_out=18, activation="silu", **options)
    agree(kernels, False, c_in=2, bias=torch.bfloat16, padding=1, **options)


@pytest.mark.skipif(DEVICE == "cpu", reason="TF32 is a GPU's")
def test_tf32() -> None:
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    case = Case(False, c_in=64, c_out=64, image=9, activation="relu", channels_last=True)
    assert_close(case.run(kernels)[0], case.exact()[0], "y", 2e-3)


def of_layout(name: str, *shape: int) -> torch.Tensor:
    torch.manual_seed(3)
    return dict(layouts(*shape))[name]


@pytest.mark.parametrize("name", ["contiguous", "reversed", "sliced", "expanded", "channels_last"])
@pytest.mark.parametrize("c_in", [3, 17])
def test_layouts(name: str, c_in: int) -> None:
    """Of x, the weight and the gradient of y, one at a time."""
    options: dict[str, Any] = dict(samples=2, c_in=c_in, c_out=3, kernel=2, activation="relu")
    agree(kernels, False, x=of_layout(name, 2, c_in, 3, 4), **options)
    agree(kernels, False, weight=of_layout(name, 3, c_in, 2, 2), **options)
    agree(kernels, False, grad=lambda *shape: of_layout(name, *shape), channels_last=True, **options)


def test_choices_of_gradients() -> None:
    case = Case(False, samples=1, c_in=1, c_out=2, image=3, kernel=2, activation="elu")
    everything = case.run(kernels)[2]
    for mask in list(choices(5))[::3]:
        for wanted, gradient, full in zip(mask, case.run(kernels, mask)[2], everything, strict=True):
            if wanted:  # sums come with dW, or in a launch of their own
                assert_close(gradient, full, "gradient", 1e-6)
            else:
                assert gradient.shape == (0,)


@pytest.mark.parametrize("per_sample", [False, True])
def test_no_samples(per_sample: bool) -> None:
    case = Case(False, samples=0, c_out=5, activation="silu", per_sample=per_sample)
    y, kept, gradients = case.run(kernels)
    assert y.shape == (0, 5, 2, 2) and kept.shape == y.shape and gradients[0].shape == (0, 3, 4, 4)
    assert all(not gradient.any() for gradient in gradients[1:])


def test_same_bits_each_time() -> None:
    case = Case(False, c_in=4, c_out=3, image=9, samples=2, channels_last=True, activation="tanh")
    first, second = case.run(kernels), case.run(kernels)
    assert all(torch.equal(a, b) for a, b in zip((first[0], *first[2]), (second[0], *second[2]), strict=True))


def test_nothing_is_kept_unless_asked_for() -> None:
    case = Case(False, activation="gelu")
    y, kept = kernels.conv2d(*case.tensors, *case.geometry, "gelu", False)
    assert kept.shape == (0,) and torch.equal(y, case.run(kernels)[0])


def test_wide_offsets(monkeypatch: pytest.MonkeyPatch) -> None:
    wide_offsets(kernels, False, monkeypatch)


def test_half_precision_products(monkeypatch: pytest.MonkeyPatch) -> None:
    half_precision_products(kernels, False, monkeypatch)


def test_wide_accesses(monkeypatch: pytest.MonkeyPatch) -> None:
    wide_accesses(kernels, False, monkeypatch)


def test_many_positions() -> None:
    many_positions(kernels, False)


def test_scattered_accesses() -> None:
    scattered_accesses(kernels)


def test_alignment_of_parameters_makes_no_other_code() -> None:
    tensors = {"x", "saved", "weight", "y", "kept", "a", "b", "partial", "partial_sums"}
    assert specialised_on_alignment() == tensors


@pytest.mark.parametrize("activation", ["none", "silu"])
def test_sums_come_with_the_weight_gradient(activation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("mrvae_kernels.triton_kernels.convolution")
    monkeypatch.setattr(module, "channel_sums", None)
    for options in (dict(c_in=3, c_out=34, image=3), dict(c_in=16, c_out=2, image=12)):
        agree(kernels, False, kernel=1, samples=1, activation=activation, **options)  # type: ignore[arg-type]


def test_the_gradient_of_a_channels_last_weight_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("mrvae_kernels.triton_kernels.convolution")
    finish = module.finish_weight_gradient
    seen = []

    def noted(partial: torch.Tensor, sums: Any, weight: torch.Tensor, *rest: Any) -> Any:
        seen.append(weight.is_contiguous())
        return finish(partial, sums, weight, *rest)

    monkeypatch.setattr(module, "finish_weight_gradient", noted)
    for options in (dict(c_in=3), dict(c_in=17), dict(c_in=3, per_sample=True)):
        weight = torch.randn(3, options["c_in"], 2, 3, device=DEVICE).to(memory_format=torch.channels_last)
        agree(kernels, False, weight=weight, kernel=(2, 3), **options)  # type: ignore[arg-type]
    assert seen == [True] * 3


def test_channels_of_groups_in_units() -> None:
    options: dict[str, Any] = dict(kernel=2, image=3, samples=1, groups=2, channels_last=True, activation="relu")
    agree(kernels, False, c_in=40, c_out=36, **options)
    weight = torch.randn(36, 20, 2, 2, device=DEVICE).to(memory_format=torch.channels_last)
    agree(kernels, False, c_in=40, c_out=36, weight=weight, **options)


def test_large_products_copy_the_weight_to_channels_last(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("mrvae_kernels.triton_kernels.convolution")
    monkeypatch.setattr(module, "PACKING_PAYS", 0)
    agree(kernels, False, c_in=17, c_out=3, kernel=2)


def test_few_parts_where_partial_sums_would_be_large() -> None:
    module = importlib.import_module("mrvae_kernels.triton_kernels.weight_gradient")
    device = torch.device(DEVICE)
    sizes = ((1, 1, 1), (10**6, 1, 100), (10**6, 1, 2**22), (10**6, 500, 2**22), (1, 1, 2**27))
    for positions, tiles, elements in sizes:
        chunk, splits = module.parts(positions, tiles, elements, 32, device)
        assert chunk % 32 == 0 and (splits - 1) * chunk < positions <= splits * chunk
        assert splits * elements <= max(module.LARGE_PARTIALS, elements)


REFUSED: list[tuple[dict[str, Any], str]] = [
    (dict(c_in=32, c_out=32, groups=8), "groups = 8 leaves 4 channels a group"),
    (dict(dtype=torch.float64, shift=False), "float64"),
    (dict(image=2, kernel=3), "gives 0 x 0 results"),
    (dict(x=torch.randn(2, 4, 5, 5, device=DEVICE)), "expected 3 channels in axis 1"),
    (dict(x=torch.randn(3, 5, 5, device=DEVICE)), r"\(3, 5, 5\)"),
    (dict(padding=-1), "padding"),
]


@pytest.mark.parametrize("options, message", REFUSED)
def test_refusals(options: dict[str, Any], message: str) -> None:
    case = Case(False, **options)
    with pytest.raises(ValueError, match=message):
        kernels.conv2d(*case.tensors, *case.geometry, "none", False)
    sentence = kernels.conv2d_refusal(*case.tensors[:2], *case.geometry)
    assert sentence is not None
    assert kernels.conv2d_refusal(*Case(False).tensors[:2], *Case(False).geometry) is None


def test_errors() -> None:
    case = Case(False)
    x, weight, bias, gate, shift = case.tensors
    assert bias is not None and gate is not None and shift is not None
    wrong: list[tuple[type[Exception], str, tuple[Any, ...]]] = [
        (ValueError, r"bias has shape \(2,\); expected \(3,\)", (bias[:2], gate, shift)),
        (ValueError, r"gate has shape \(4, 3\); expected \(3,\), or \(2, 3\)", (bias, gate.expand(4, 3), shift)),
        (ValueError, r"shift has shape \(2, 3\); expected \(3,\)", (bias, gate, shift.expand(2, 3))),
        (TypeError, "gate has dtype torch.float64", (bias, gate.double(), shift)),
        (TypeError, "bias has dtype torch.int64", (bias.long(), gate, shift)),
    ]
    for error, message, parameters in wrong:
        with pytest.raises(error, match=message):
            kernels.conv2d(x, weight, *parameters, *case.geometry, "none", False)
    with pytest.raises(ValueError, match="expected one of"):
        kernels.conv2d(*case.tensors, *case.geometry, "swish", False)
    with pytest.raises(ValueError, match="two numbers each"):
        kernels.conv2d(*case.tensors, (1,), (0, 0), (1, 1), 1, "none", False)
    y, kept, _ = case.run(kernels)
    with pytest.raises(ValueError, match="grad has shape"):
        kernels.conv2d_backward(y[:1], *case.tensors, y, kept, *case.geometry, "none", (True,) * 5)
    with pytest.raises(TypeError, match="grad has dtype"):
        kernels.conv2d_backward(y.half(), *case.tensors, y, kept, *case.geometry, "none", (True,) * 5)
    with pytest.raises(ValueError, match="needs y from forward"):
        kernels.conv2d_backward(y, *case.tensors, None, kept, *case.geometry, "relu", (True,) * 5)


def check_edges(module: ModuleType) -> None:
    agree(module, False, c_in=3, c_out=3, image=(3, 4), kernel=2, padding=1, activation="relu")


def check_blocks(module: ModuleType) -> None:
    agree(module, False, c_in=18, c_out=17, image=(3, 4), kernel=2, samples=1, padding=1, activation="relu")


def check_samples(module: ModuleType) -> None:
    agree(module, False, c_in=2, c_out=2, image=3, kernel=2, per_sample=True)


def check_parts(module: ModuleType) -> None:
    agree(module, False, c_in=16, c_out=2, image=17, kernel=1, samples=1)


def check_channels_last(module: ModuleType) -> None:
    weight = torch.randn(2, 20, 2, 1, device=DEVICE).to(memory_format=torch.channels_last)
    agree(module, False, c_in=20, c_out=2, image=(3, 2), samples=1, kernel=(2, 1), channels_last=True, weight=weight)


MUTANTS = [
    Mutant("implicit_gemm", "at_h, at_w = h + r * tap_h, w + s * tap_w", "at_h, at_w = h + r * tap_w, w", check_blocks),
    Mutant("implicit_gemm", "  mask = (at_h >= 0) & (at_h < in_height)", "  mask = (at_h < in_height)", check_edges),
    Mutant("implicit_gemm", "            lane_mask = k < channels\n", "            lane_mask = k >= 0\n", check_blocks),
    Mutant("implicit_gemm", "tl.load(gate + group * channels + i,", "tl.load(gate + i * 0,", check_edges),
    Mutant("implicit_gemm", "grad.to(tl.float32) * slope", "grad.to(tl.float32)", check_edges),
    Mutant("implicit_gemm", "of_row = n * total\n        ", "of_row = n * 0\n        ", check_samples),
    Mutant("weight_gradient", "position = tl.minimum(position, positions - 1)", "position += 1", check_edges),
    Mutant("weight_gradient", "valid = position < end\n", "valid = position >= 0\n", check_edges),
    Mutant("weight_gradient", "to_row = split * total", "to_row = split * 0", check_parts),
    Mutant("weight_gradient", "to_column = i * taps + tap if", "to_column = i + tap if", check_edges),
    Mutant("weight_gradient", "else tap * b_channels + i", "else tap + i", check_channels_last),
    Mutant("weight_gradient", "        if column_tile == 0:\n", "        if column_tile == 1:\n", check_edges),
    Mutant("weight_gradient", "sums += a_tile.to(tl.float32)", "sums += 1", check_edges),
    Mutant("weight_gradient", "split * (total // (b_channels * taps))", "split * 0", check_parts),
    Mutant("weight_gradient", "times(b_h, B_UNIT, WIDE)", "b_h", check_channels_last),
    Mutant("implicit_gemm", "times(x_h, X_UNIT, WIDE)", "x_h", check_channels_last),
    Mutant("implicit_gemm", "times(weight_r, WEIGHT_CHANNEL_UNIT * WEIGHT_COLUMN_UNIT, WIDE)", "weight_r",
           check_channels_last),
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.new[:40])
def test_faults_are_noticed(mutant: Mutant, tmp_path: Any) -> None:
    must_fail(mutant, tmp_path)

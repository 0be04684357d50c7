from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType

import pytest
import torch
from kernel_checks import DEVICE, Mutant, assert_close, choices, layouts, must_fail, poisoned, requires_triton
from torch import Tensor

from mrvae_kernels import reference

pytestmark = requires_triton
if pytest.importorskip("triton"):
    import triton
    import triton.language as tl

    from mrvae_kernels.triton_kernels import linear as linear_kernels
    from mrvae_kernels.triton_kernels import linear_backward, matrices, views
    from mrvae_kernels.triton_kernels.configurations import Tiles

ALL = (True,) * 5
NAMES = ("dx", "dW", "db", "dg", "dt")
# products of many terms, whose sums cancel
TOLERANCE = {torch.float32: 3e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


@pytest.fixture(autouse=True)
def exact_float32() -> Iterator[None]:
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    yield
    torch.backends.cuda.matmul.fp32_precision = before


def entry(kernels: ModuleType) -> ModuleType:
    """The linear module of the package that `kernels` is a module of."""
    return importlib.import_module(f"{kernels.__name__.rpartition('.')[0]}.linear")


def close(actual: Tensor, expected: Tensor, name: str, limit: float) -> None:
    """In norm, and each element within twice as much of the largest: one wrong slope among many does not hide."""
    assert_close(actual, expected, name, limit)
    if actual.numel() > 0:
        error, scale = (actual.double() - expected.to(actual.device)).abs().max().item(), expected.abs().max().item()
        assert error <= 2 * limit * max(scale, 1e-3), f"{name}: error {error:.3g}, largest value {scale:.3g}"


def check(
    kernels: ModuleType, x: Tensor, weight: Tensor | int, activation: str = "none", per_sample: bool = False,
    grad: Tensor | None = None, bias: bool = True, shift: bool = True, mask: Sequence[bool] = ALL,
    tolerance: float | None = None,
) -> None:
    """Forward and backward against the reference in float64."""
    kernels = entry(kernels)
    inner, dtype = x.shape[-1], x.dtype
    if isinstance(weight, int):
        weight = (torch.randn(weight, inner, device=DEVICE) / max(1, inner) ** 0.5).to(dtype)
    channels = weight.shape[0]
    shape = (x.shape[0], channels) if per_sample else (channels,)
    gate, t = (torch.randn(shape, device=DEVICE) for _ in range(2))
    tensors = [x, weight, torch.randn(channels, device=DEVICE).to(dtype) if bias else None, gate, t if shift else None]
    leaves = [None if value is None else value.detach().double().requires_grad_() for value in tensors]
    with poisoned():
        y, kept = kernels.linear(*tensors, activation, True)
    if per_sample and dtype != torch.float32:
        # as documented, u is rounded before all else; its gradient is that of the exact product
        u = leaves[0] @ leaves[1].t()
        assert_close(kept, u, "u")
        rounded = u + (kept.double() - u).detach()
        expected = reference.epilogue(rounded, *leaves[2:], u.dim() - 1, activation)
    else:
        expected = reference.gated_linear(*leaves, activation)
    grad = torch.randn(expected.shape, device=DEVICE).to(dtype) if grad is None else grad
    found = iter(torch.autograd.grad(
        expected, [leaf for leaf in leaves if leaf is not None], grad.double(), allow_unused=True
    ))
    gradients = [None if leaf is None else next(found) for leaf in leaves]
    with poisoned():
        needed = not per_sample and activation in ("relu", "tanh", "leaky_relu", "elu")
        results = kernels.linear_backward(grad, *tensors, y if needed else None, kept, activation, mask)
        alone, nothing = kernels.linear(*tensors, activation, False)
    limit = TOLERANCE[dtype] if tolerance is None else tolerance
    assert y.dtype == dtype and y.is_contiguous() and torch.equal(alone, y)
    assert kept.dtype == dtype and nothing.shape == (0,)
    assert kept.shape == (y.shape if per_sample or activation in ("silu", "gelu") else (0,))
    close(y, expected, "y", limit)
    types = (x, weight, weight, gate, gate)
    for name, wanted, result, value, tensor, like in zip(
        NAMES, mask, results, gradients, tensors, types, strict=True
    ):
        assert result.dtype == like.dtype
        if wanted and tensor is not None:
            value = torch.zeros(tensor.shape) if value is None else value
            close(result, value, f"{name} of {tuple(x.shape)} and {channels}", limit)
            assert name not in ("dx", "dW") or result.stride() == torch.empty_like(tensor).stride()
        else:
            assert result.shape == (0,)


@triton.jit
def write_places(target, row_stride, column_stride, ROW_UNIT: tl.constexpr, COLUMN_UNIT: tl.constexpr):
    at = tl.arange(0, 2).to(tl.int64)
    found = matrices.places(at[:, None], at[None, :], row_stride, column_stride, ROW_UNIT, COLUMN_UNIT)
    tl.store(target + at[:, None] * 2 + at[None, :], found)


def check_shared(kernels: ModuleType) -> None:
    check(kernels, torch.randn(37, 19, device=DEVICE), 35, "tanh")


def check_argument(kernels: ModuleType) -> None:
    check(kernels, torch.randn(5, 3, 8, device=DEVICE), 7, "gelu")


def check_by_sample(kernels: ModuleType) -> None:
    check(kernels, torch.randn(3, 2, 17, device=DEVICE), 5, "silu", per_sample=True)


def check_many_rows(kernels: ModuleType) -> None:
    """More than one part of the rows."""
    check(kernels, torch.randn(700, 5, device=DEVICE), 3, "relu")


def check_strides(kernels: ModuleType) -> None:
    x, weight = torch.randn(20, 12, device=DEVICE).t(), torch.randn(6, 40, device=DEVICE)[:, ::2]
    check(kernels, x, weight, "elu", grad=torch.randn(6, 12, device=DEVICE).t())


def check_several_tiles(kernels: ModuleType) -> None:
    """Programs of more than one group of tiles."""
    check(kernels, torch.randn(300, 4, device=DEVICE), 70, "leaky_relu")


@pytest.mark.parametrize(
    "run", [check_shared, check_argument, check_by_sample, check_many_rows, check_strides, check_several_tiles]
)
def test_agrees_with_the_reference(run) -> None:
    run(linear_kernels)


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_every_activation_and_dtype(activation: str) -> None:
    for per_sample in (False, True):
        check(linear_kernels, torch.randn(5, 20, device=DEVICE), 12, activation, per_sample)
    for dtype in (torch.bfloat16, torch.float16):
        check(linear_kernels, torch.randn(33, 24, device=DEVICE).to(dtype), 8, activation)
    for dtype in (torch.bfloat16, torch.float16):
        check(linear_kernels, torch.randn(6, 2, 16, device=DEVICE).to(dtype), 9, activation, True)


@pytest.mark.parametrize("shape, channels", [
    ((7,), 5), ((1, 1), 1), ((33, 33), 33), ((2, 3, 2, 16), 32), ((64, 32), 64), ((0, 4), 3), ((4, 0), 3), ((4, 3), 0),
    ((0,), 2), ((2, 0, 3), 4),
])
def test_odd_shapes(shape: tuple[int, ...], channels: int) -> None:
    check(linear_kernels, torch.randn(shape, device=DEVICE), channels, "relu")
    check(linear_kernels, torch.randn(shape, device=DEVICE), channels, "none")
    if len(shape) > 1:
        check(linear_kernels, torch.randn(shape, device=DEVICE), channels, "tanh", True)


def test_any_strides() -> None:
    for _, x in layouts(4, 3, 10):
        check(linear_kernels, x, 5, "silu")
    for _, weight in layouts(6, 9):
        check(linear_kernels, torch.randn(4, 9, device=DEVICE), weight, "relu", per_sample=True)
    for _, grad in layouts(3, 2, 6):
        check(linear_kernels, torch.randn(3, 2, 9, device=DEVICE), 6, "relu", grad=grad)
    check(linear_kernels, torch.randn(5, 9, device=DEVICE), 6, "elu", grad=torch.ones((), device=DEVICE).expand(5, 6))


def test_only_what_is_asked_for() -> None:
    x = torch.randn(4, 6, device=DEVICE)
    for i, mask in enumerate(choices(5)):
        check(linear_kernels, x, 5, ("relu", "none", "gelu")[i % 3], i % 2 == 1, bias=i % 5 != 0, shift=i % 7 != 0,
              mask=mask)
    y, kept = linear_kernels.linear(x, x[:2], None, torch.ones(4, 2, device=DEVICE), None, "none", False)
    results = linear_kernels.linear_backward(
        y, x, x[:2], None, torch.ones(4, 2, device=DEVICE), None, None, kept, "none", (True, True, False, False, False)
    )
    assert_close(results[0], y @ x[:2], "dx without u", 1e-5)


def test_wide_offsets(monkeypatch: pytest.MonkeyPatch) -> None:
    views._plans.clear()
    for module in (linear_kernels, linear_backward):
        monkeypatch.setattr(module, "wide", lambda *tensors, slack=0: True)
    for run in (check_shared, check_by_sample, check_many_rows):
        run(linear_kernels)
    views._plans.clear()


def test_tiles_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reductions that are and are not whole numbers of blocks, tiles larger than the result."""
    for tiles in (Tiles(64, 16, 32, 4, 1), Tiles(16, 64, 64, 4, 2)):
        for module in (linear_kernels, linear_backward):
            monkeypatch.setattr(module, "choose", lambda *arguments, tiles=tiles: tiles)
        check(linear_kernels, torch.randn(64, 64, device=DEVICE), 32, "silu")
        check(linear_kernels, torch.randn(65, 31, device=DEVICE), 33, "relu")


def test_parts_depend_on_the_shape_alone() -> None:
    device = torch.device(DEVICE)
    for rows, tiles in ((1, 1), (100, 1), (4096, 1), (4096, 3), (100000, 100000)):
        parts, steps = linear_backward.parts_of(rows, tiles, 16, device)
        assert 1 <= parts <= linear_backward.MOST_PARTS
        assert (parts - 1) * steps * 16 < rows <= parts * steps * 16
    assert linear_backward.parts_of(4096, 1, 16, device)[0] > 1


def test_the_same_bits_each_time() -> None:
    x, grad, weight = (torch.randn(*shape, device=DEVICE) for shape in ((400, 6), (400, 3), (3, 6)))
    gate = torch.rand(3, device=DEVICE)
    y, kept = linear_kernels.linear(x, weight, gate, gate, gate, "tanh", True)
    first, second = (
        linear_kernels.linear_backward(grad, x, weight, gate, gate, gate, y, kept, "tanh", ALL) for _ in range(2)
    )
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_dtypes_of_bias_and_shift_are_free() -> None:
    x, weight = torch.randn(4, 8, device=DEVICE).bfloat16(), torch.randn(3, 8, device=DEVICE).bfloat16()
    bias, gate, shift = torch.ones(3, device=DEVICE).half(), torch.rand(3, device=DEVICE), torch.ones(3, device=DEVICE)
    y, kept = linear_kernels.linear(x, weight, bias, gate, shift.double(), "none", True)
    expected = reference.gated_linear(*(v.double() for v in (x, weight, bias, gate, shift)))
    assert_close(y, expected, "y")
    for per_sample in (False, True):
        g, t = (value.expand(4, 3) if per_sample else value for value in (gate, shift.double()))
        y, kept = linear_kernels.linear(x, weight, bias, g, t, "none", True)
        results = linear_kernels.linear_backward(y, x, weight, bias, g, t, None, kept, "none", ALL)
        assert [result.dtype for result in results] == [
            torch.bfloat16, torch.bfloat16, torch.float16, torch.float32, torch.float64
        ]


def test_the_shift_s_gradient_is_rounded_once() -> None:
    x, weight = torch.randn(50, 8, device=DEVICE), torch.randn(3, 8, device=DEVICE)
    gate, shift, grad = torch.rand(3, device=DEVICE).bfloat16(), torch.ones(3, device=DEVICE), torch.randn(50, 3)
    y, kept = linear_kernels.linear(x, weight, None, gate, shift, "none", True)
    for mask in (ALL, (False, False, False, False, True)):
        dt = linear_kernels.linear_backward(
            grad.to(DEVICE), x, weight, None, gate, shift, None, kept, "none", mask
        )[4]
        assert_close(dt, grad.double().sum(0), "dt", 1e-6)


class Recorder:
    """In place of a kernel: remembers the arguments of its launches."""

    def __init__(self) -> None:
        self.launches: list[dict[str, object]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments, **constants: self.launches.append({**constants, "grid": grid})


def recorded(monkeypatch: pytest.MonkeyPatch, tiles: Tiles) -> Recorder:
    recorder = Recorder()
    for kernel in ("input_gradient", "weight_gradient"):
        monkeypatch.setattr(linear_backward, kernel, recorder)
    monkeypatch.setattr(linear_backward, "choose", lambda *arguments: tiles)
    monkeypatch.setattr(linear_backward, "processors", lambda device: 132)
    return recorder


def test_offsets_of_a_result_larger_than_its_operands(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = recorded(monkeypatch, Tiles(128, 128, 64, 8, 4))
    grad = torch.empty(2**17, 16, device="meta")
    for inner, expected in ((2**15, True), (2**12, False)):
        linear_backward.run_input_gradient(grad, None, None, torch.empty(16, inner, device="meta"), 0, "ieee")
        assert recorder.launches[-1]["WIDE"] == expected


def test_tiles_are_narrowed_where_registers_would_spill(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = recorded(monkeypatch, Tiles(128, 64, 64, 4, 4))

    def tile(columns: int, activation: str, transposed: bool = False) -> tuple[object, ...]:
        x = torch.empty(512, columns, device="meta", dtype=torch.bfloat16)
        grad = torch.empty(columns, 512, device="meta", dtype=torch.bfloat16).t() if transposed else x
        code = reference.ACTIVATIONS.index(activation)
        linear_backward.run_input_gradient(grad, grad, None, x[:columns], code, "ieee")
        linear_backward.run_weight_gradient(grad, grad, x, code, False, "ieee")
        one, other = ([launch[f"BLOCK_{axis}"] for axis in "MNK"] for launch in recorder.launches[-2:])
        assert one == other or (activation == "relu" and other == [128, 64, 32])
        return tuple(one)

    assert tile(256, "relu") == (128, 64, 64)
    assert tile(256, "gelu") == tile(256, "silu") == (128, 64, 32)
    for activation in ("relu", "gelu"):
        assert tile(257, activation) == tile(260, activation) == tile(256, activation, True) == (64, 64, 16)


def test_numbers_of_64_bits_where_strides_in_units_fit_32() -> None:
    for row, column, row_unit, column_unit in ((2**29, 1, 8, 1), (1, 2**29, 1, 8)):
        target = torch.empty(2, 2, dtype=torch.int64, device=DEVICE)
        write_places[(1,)](target, row, column, row_unit, column_unit)
        at = torch.arange(2, device=DEVICE)
        assert torch.equal(target, at[:, None] * row * row_unit + at[None, :] * column * column_unit)


def test_parameters_may_start_anywhere() -> None:
    """Slices of one tensor have any alignment, each of which would be a kernel of its own."""
    for kernel, names in (
        (linear_kernels.forward, {"bias", "gate", "shift"}), (linear_backward.input_gradient, {"gate"}),
    ):
        options = getattr(kernel, "kwargs", None) or vars(kernel)
        assert names <= set(options["do_not_specialize_on_alignment"])


def test_tf32_where_torch_allows_it() -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    check(linear_kernels, torch.randn(70, 64, device=DEVICE), 40, "tanh", tolerance=2e-3)


def test_errors_and_refusals() -> None:
    x, weight, gate = (torch.randn(*shape, device=DEVICE) for shape in ((4, 3), (2, 3), (2,)))
    assert linear_kernels.linear_refusal(x, weight) is None
    assert "float64" in linear_kernels.linear_refusal(x.double(), weight.double())
    assert "same dtype" in linear_kernels.linear_refusal(x, weight.half())
    for error, match, tensors in (
        (TypeError, "x has dtype torch.float64", (x.double(), weight.double(), None, gate, None)),
        (TypeError, "expected the same dtype", (x.half(), weight, None, gate, None)),
        (ValueError, r"expected \(C, K\)", (x, weight[0], None, gate, None)),
        (ValueError, r"expected \(\.\.\., 3\)", (x[:, :2], weight, None, gate, None)),
        (ValueError, "gate has shape", (x, weight, None, gate[:1], None)),
        (ValueError, "bias has shape", (x, weight, gate[:1], gate, None)),
        (ValueError, "shift has shape", (x, weight, None, gate, x)),
        (TypeError, "bias has dtype torch.int64", (x, weight, gate.long(), gate, None)),
        (TypeError, "gate has dtype torch.int32", (x, weight, None, gate.int(), None)),
        (TypeError, "shift has dtype torch.bool", (x, weight, None, gate, gate > 0)),
        (RuntimeError, "meta", (x.to("meta"), weight.to("meta"), None, gate.to("meta"), None)),
    ):
        with pytest.raises(error, match=match):
            linear_kernels.linear(*tensors, "none", False)
        with pytest.raises(error, match=match):
            grad = x.new_empty(4, 2).to(tensors[0].device)
            linear_kernels.linear_backward(grad, *tensors, None, x.new_empty(0), "none", ALL)
    with pytest.raises(ValueError, match="activation is 'swish'"):
        linear_kernels.linear(x, weight, None, gate, None, "swish", False)
    y = x[:, :2]
    with pytest.raises(ValueError, match="grad has shape"):
        linear_kernels.linear_backward(x, x, weight, None, gate, None, y, y, "none", ALL)
    with pytest.raises(TypeError, match="grad has dtype torch.int64"):
        linear_kernels.linear_backward(y.long(), x, weight, None, gate, None, y, y, "none", ALL)
    with pytest.raises(ValueError, match="relu needs y"):
        linear_kernels.linear_backward(y, x, weight, None, gate, None, None, y, "relu", ALL)


def test_variants_name_the_arguments_of_their_kernels() -> None:
    for architecture in ("sm_80", "sm_90", "sm_100", "gfx942"):
        for module in (linear_kernels, linear_backward):
            found = module.variants(architecture)
            assert len({variant.label for variant in found}) == len(found)
            for variant in found:
                assert {*variant.types, *variant.constants} == set(variant.kernel.arg_names), variant.label


def test_accesses_are_as_wide_as_strides_allow() -> None:
    assert matrices.strides_of(torch.empty(5, 500)).units == (4, 1)
    assert matrices.strides_of(torch.empty(5, 500, dtype=torch.bfloat16)).units == (4, 1)
    assert matrices.strides_of(torch.empty(8, 6).t()).units == (1, 2)
    assert matrices.strides_of(torch.empty(5, 8)[:, ::2]) == ((8, 2), (1, 1))
    assert matrices.strides_of(torch.empty(1, 1).expand(5, 8)) == ((0, 0), (1, 1))


# Faults that stay within the tensors: what they write elsewhere would harm the tests that follow.
MUTANTS = [
    Mutant("linear", "for start in range(0, inner, BLOCK_K)", "for start in range(0, BLOCK_K, BLOCK_K)", check_shared),
    Mutant("linear", "in_c = c < channels", "in_c = c < channels - 1", check_shared),
    Mutant("linear", "(row // rows_per_sample)", "(row // (2 * rows_per_sample))", check_by_sample),
    Mutant("linear", "tl.store(kept + target, sums.to", "tl.store(kept + target, z.to", check_by_sample),
    Mutant("linear", "z += tl.load(bias + c", "z -= tl.load(bias + c", check_shared),
    Mutant("linear_backward", "s *= tl.load(gate + c", "s *= 1 + 0 * tl.load(gate + c", check_shared),
    Mutant("linear_backward", "for start in range(0, channels, BLOCK_K)", "for start in range(0, BLOCK_K, BLOCK_K)",
           check_shared),
    Mutant("linear_backward", "s_places = places(row[:, None], c[None, :], s_row, s_channel, S_ROW, S_CHANNEL)\n"
           "        w_places", "s_places = places(row[:, None], c[None, :] * 0, s_row, s_channel, S_ROW, S_CHANNEL)\n"
           "        w_places", check_shared),
    Mutant("linear_backward", "first = part * steps * BLOCK_K", "first = part * BLOCK_K", check_many_rows),
    Mutant("linear_backward", "if tile_column == 0:", "if tile_column == 1:", check_shared),
    Mutant("linear_backward", "total += s\n", "total = s\n", check_many_rows),
    Mutant("linear_backward", "partial_sums + part * channels", "partial_sums", check_many_rows),
    Mutant("matrices", "columns * (column_stride * COLUMN_UNIT)", "columns * column_stride", check_strides),
    Mutant("matrices", "width // height", "width // (height + 1)", check_several_tiles),
    Mutant("matrices", "return dy * activation_slope(value, ACTIVATION)", "return dy", check_argument),
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=range(len(MUTANTS)))
def test_faults_are_noticed(mutant: Mutant, tmp_path) -> None:
    must_fail(mutant, tmp_path)

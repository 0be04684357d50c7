from __future__ import annotations

import importlib
from collections.abc import Sequence
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

    from mrvae_kernels.triton_kernels import epilogue as epilogue_kernels
    from mrvae_kernels.triton_kernels import epilogue_backward, epilogue_plan, views

ALL = (True, True, True, True)
# twice to three times that of results: terms of the sums cancel
GRADIENT_TOLERANCE = {torch.float32: 3e-5, torch.float64: 1e-12, torch.bfloat16: 2e-2, torch.float16: 4e-3}


def entry(kernels: ModuleType) -> ModuleType:
    """The epilogue module of the package that `kernels` is a module of."""
    return importlib.import_module(f"{kernels.__name__.rpartition('.')[0]}.epilogue")


def parameters(u: Tensor, dim: int, per_sample: bool) -> tuple[Tensor, Tensor, Tensor]:
    channels, dtype = u.shape[dim], reference.gate_dtype(u.dtype)
    shape = (u.shape[0], channels) if per_sample else (channels,)
    gate, shift = (torch.randn(shape, dtype=dtype, device=DEVICE) for _ in range(2))
    return torch.randn(channels, dtype=u.dtype, device=DEVICE), gate, shift


def check(
    kernels: ModuleType, u: Tensor, dim: int, per_sample: bool = False, activation: str = "none",
    grad: Tensor | None = None, bias: bool = True, shift: bool = True, mask: Sequence[bool] = ALL,
) -> None:
    """Forward and backward against the reference in float64."""
    kernels = entry(kernels)
    b, g, t = parameters(u, dim, per_sample)
    tensors = [u, b if bias else None, g, t if shift else None]
    grad = torch.randn(u.shape, device=DEVICE).to(u.dtype) if grad is None else grad
    leaves = [None if value is None else value.detach().double().requires_grad_() for value in tensors]
    expected = reference.epilogue(*leaves, dim % u.dim(), activation)
    present = [leaf for leaf in leaves if leaf is not None]
    found = iter(torch.autograd.grad(expected, present, grad.double(), allow_unused=True))
    gradients = [None if leaf is None else next(found) for leaf in leaves]
    with poisoned():
        y = kernels.epilogue(*tensors, dim, activation)
        results = kernels.epilogue_backward(grad, *tensors, dim, activation, mask)
    assert y.dtype == u.dtype and y.stride() == torch.empty_like(u).stride()
    assert_close(y, expected, "y")
    names, types = ("du", "db", "dg", "dt"), [u, b if bias else u, g, g]
    for name, wanted, result, value, like in zip(names, mask, results, gradients, types, strict=True):
        if wanted and value is not None:
            assert_close(result, value, f"{name} of {tuple(u.shape)}", GRADIENT_TOLERANCE[u.dtype])
            assert result.dtype == like.dtype
        else:
            assert result.shape == (0,) and result.dtype == like.dtype
    if mask[0]:
        assert results[0].stride() == torch.empty_like(u).stride()


SHAPES = {
    "planes of whole units": ((3, 5, 4, 6), 1),
    "planes of 7 x 7": ((2, 3, 7, 7), 1),
    "rows": ((9, 36), 1),
    "rows of samples": ((4, 3, 37), -1),
    "channels over a block": ((2, 130, 3), 1),
    "one of each": ((1, 1), 1),
}


@pytest.mark.parametrize("per_sample", [False, True], ids=["shared", "by sample"])
@pytest.mark.parametrize("name", SHAPES)
def test_every_layout_agrees_with_the_reference(name: str, per_sample: bool) -> None:
    shape, dim = SHAPES[name]
    for (_, u), activation in zip(layouts(*shape), ("none", "gelu", "tanh", "elu", "relu"), strict=False):
        check(epilogue_kernels, u, dim, per_sample, activation)


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_every_activation_and_dtype(activation: str) -> None:
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    for dtype, per_sample in zip(dtypes, (False, True, False, True), strict=True):
        check(epilogue_kernels, torch.randn(2, 3, 4, 4, device=DEVICE).to(dtype), 1, per_sample, activation)
    check(epilogue_kernels, torch.randn(5, 8, device=DEVICE, dtype=torch.bfloat16), 1, True, activation)


@pytest.mark.parametrize("per_sample", [False, True], ids=["shared", "by sample"])
def test_gradients_of_any_strides(per_sample: bool) -> None:
    shape = (2, 3, 4, 8)
    crop = torch.randn(2, 3, 6, 10, device=DEVICE)[:, :, 1:5, 1:9]
    pooled = torch.randn(2, 3, 1, 1, device=DEVICE).expand(shape)
    for grad in (torch.ones((), device=DEVICE).expand(shape), crop, pooled, *(value for _, value in layouts(*shape))):
        check(epilogue_kernels, torch.randn(shape, device=DEVICE), 1, per_sample, "silu", grad)
    u, grad = torch.randn(5, 4, device=DEVICE).t(), torch.randn(4, 1, device=DEVICE).expand(4, 5)
    check(epilogue_kernels, u, 1, per_sample, "silu", grad)


@pytest.mark.parametrize("activation", ["none", "silu"])
def test_only_what_is_asked_for(activation: str) -> None:
    for mask in choices(4):
        check(epilogue_kernels, torch.randn(3, 2, 4, device=DEVICE), 1, sum(mask) % 2 == 0, activation, mask=mask)
    for per_sample in (False, True):
        u = torch.randn(3, 4, device=DEVICE)
        check(epilogue_kernels, u, 1, per_sample, activation, bias=False)
        check(epilogue_kernels, u, 1, per_sample, activation, shift=False)
        check(epilogue_kernels, u, 1, per_sample, activation, bias=False, shift=False, mask=(False, True, True, True))


def check_planes(kernels: ModuleType) -> None:
    check(kernels, torch.randn(2, 3, 4, 5, device=DEVICE), 1, False, "silu")


def check_planes_by_sample(kernels: ModuleType) -> None:
    check(kernels, torch.randn(3, 5, 2, 3, device=DEVICE), 1, True, "silu")


def check_rows_by_sample(kernels: ModuleType) -> None:
    check(kernels, torch.randn(5, 7, device=DEVICE), 1, True, "silu")


def check_one_part(kernels: ModuleType) -> None:
    check(kernels, torch.randn(700, 5, device=DEVICE), 1, False, "tanh")


def check_parts(kernels: ModuleType) -> None:
    """More steps than a program does: partial sums, then the second launch."""
    check(kernels, torch.randn(2, 3, 6004, device=DEVICE), 1, False, "none")


def check_parts_of_rows(kernels: ModuleType) -> None:
    check(kernels, torch.randn(1800, 20, device=DEVICE), 1, True, "none")


def check_parts_of_samples(kernels: ModuleType) -> None:
    check(kernels, torch.randn(41, 3, 5, device=DEVICE), 1, True, "elu")
    check(kernels, torch.randn(3, 2, 4100, device=DEVICE), 1, True, "none")


def check_channel_sums(kernels: ModuleType) -> None:
    kernels = entry(kernels)
    z = torch.randn(3, 4, 5, device=DEVICE)
    for i, activation in enumerate(reference.ACTIVATIONS):
        dtype = (torch.float32, torch.float64)[i % 2]
        leaf, grad = z.to(dtype).requires_grad_(), torch.randn(5, 4, 3, device=DEVICE, dtype=dtype).permute(2, 1, 0)
        y = reference.activate(leaf, activation)
        (s,) = torch.autograd.grad(y, leaf, grad)
        saved = {"none": None, "silu": leaf, "gelu": leaf}.get(activation, y)
        with poisoned():
            sums = kernels.channel_sums(grad, None if saved is None else saved.detach(), 1, activation)
        assert sums.dtype == dtype
        assert_close(sums, s.sum((0, 2)), activation, GRADIENT_TOLERANCE[dtype])
    assert kernels.channel_sums(torch.ones(0, 3, device=DEVICE), None, 1, "none").tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="saved is None"):
        kernels.channel_sums(z, None, 1, "relu")


def check_parts_of_planes(kernels: ModuleType) -> None:
    """Few samples and channels: positions are split too."""
    entered = importlib.import_module(f"{kernels.__name__.rpartition('.')[0]}.epilogue_plan")
    size = 9 * 2048 + 500 if DEVICE == "cpu" else 2**20
    for u in (torch.randn(2, 3, size, device=DEVICE), torch.randn(2, size // 2, 3, device=DEVICE).transpose(1, 2)):
        plan = entered.make_plan(u, u, 1, True, 0, 0, entered.Wanted(*ALL))
        assert plan.finish_by_sample and plan.partial[0] > 1
        check(kernels, u, 1, True, "leaky_relu")
    check(kernels, torch.randn(40, 1, size, device=DEVICE)[:2], 1, True, "none", mask=(False, True, False, False))


def check_finish_by_sample(kernels: ModuleType) -> None:
    """More samples and parts than a block."""
    kernels = importlib.import_module(f"{kernels.__name__.rpartition('.')[0]}.epilogue_backward")
    parts, samples, channels = 3, 5, 3
    partial, gate = torch.randn(parts, 2, samples, channels, device=DEVICE), torch.randn(5, 3, device=DEVICE)
    db, dg, dt = (torch.empty(*shape, device=DEVICE) for shape in ((3,), (5, 3), (5, 3)))
    kernels.finish_by_sample[(2,)](
        partial, gate, db, dg, dt, parts, samples, channels, SUM=True, DOT=True, BLOCK_C=2, BLOCK_N=2, BLOCK_P=2,
        REAL=tl.float32,
    )
    sums, dots = partial.double().sum(0)
    for result, expected in ((db, (gate * sums).sum(0)), (dt, sums), (dg, dots)):
        assert_close(result, expected)


def check_infinities(kernels: ModuleType) -> None:
    """Values and slopes, from the argument and from the result, wherever torch's are finite."""
    kernels = entry(kernels)
    for dtype in (torch.float32, torch.float64):
        z = torch.tensor([[float("inf")], [float("-inf")]], dtype=dtype, device=DEVICE, requires_grad=True)
        u, one = z.detach(), torch.ones(2, dtype=dtype, device=DEVICE)
        for activation in reference.ACTIVATIONS:
            y = reference.activate(z, activation)
            (slope,) = torch.autograd.grad(y.sum(), z)
            du = kernels.epilogue_backward(one[:, None], u, None, one, None, 0, activation, (True, False, False, False))
            found = [(kernels.epilogue(u, None, one, None, 0, activation), y), (du[0], slope)]
            if activation not in ("none", "silu", "gelu"):
                sums = kernels.channel_sums(one[:, None], y.detach(), 0, activation)
                found.append((sums[:, None], slope))
            for actual, expected in found:
                known = expected.isfinite()
                assert torch.equal(actual[known], expected[known]), f"{activation}: {actual}, expected {expected}"
    nan = torch.full((1, 1), float("nan"), device=DEVICE)
    one = torch.ones(1, device=DEVICE)
    assert kernels.epilogue(nan, None, one, None, 0, "relu").isnan().all()
    assert kernels.epilogue_backward(nan * 0 + 1, nan, None, one, None, 0, "relu", ALL)[0].isnan().all()
    assert kernels.channel_sums(one[:, None], nan, 0, "relu").isnan().all()


@triton.jit
def write_offsets(target, offsets: tl.constexpr, sample, channel, position, FASTEST: tl.constexpr):
    c, n, m = tl.arange(0, 2).to(tl.int64), tl.arange(0, 2).to(tl.int64), tl.arange(0, 2).to(tl.int64)
    found = offsets(c, n, m, sample, channel, position, 8, 1 if FASTEST else 2, FASTEST)
    lanes: tl.constexpr = 1 if FASTEST else 2
    places = tl.arange(0, 2)[:, None, None] * 2 * lanes + tl.arange(0, 2)[None, :, None] * lanes
    tl.store(target + places + tl.arange(0, lanes)[None, None, :], found)


def check_large_strides(kernels: ModuleType) -> None:
    """Strides that fit int32 in units, and not in elements."""
    offsets = importlib.import_module(f"{kernels.__name__.rpartition('.')[0]}.views").offsets
    big = 2**29
    for sample, channel, position, fastest in ((big, 1, 1, True), (1, 1, big, True), (1, big, 1, False)):
        target = torch.empty(2, 2, 1 if fastest else 2, dtype=torch.int64, device=DEVICE)
        write_offsets[(1,)](target, offsets, sample, channel, position, fastest)
        c, at = torch.arange(2, device=DEVICE)[:, None, None], torch.arange(2, device=DEVICE)[None, :, None]
        if fastest:
            assert torch.equal(target, c * channel + at * 8 * (sample + position))
        else:
            lane = torch.arange(2, device=DEVICE) * position
            assert torch.equal(target, c * channel * 8 + at * (8 * sample + 2 * position) + lane)


CHECKS = (
    check_planes, check_planes_by_sample, check_rows_by_sample, check_one_part, check_parts, check_parts_of_rows,
    check_parts_of_samples, check_channel_sums, check_parts_of_planes, check_finish_by_sample, check_infinities,
    check_large_strides,
)


@pytest.mark.parametrize("run", CHECKS)
def test_sums_by_one_and_by_many_programs(run) -> None:
    run(epilogue_kernels)


def test_wide_offsets(monkeypatch: pytest.MonkeyPatch) -> None:
    views._plans.clear()
    monkeypatch.setattr(epilogue_kernels, "wide", lambda *tensors, slack=0: True)
    monkeypatch.setattr(epilogue_plan, "wide", lambda *tensors, slack=0: True)
    for per_sample in (False, True):
        check(epilogue_kernels, torch.randn(2, 3, 4, 5, device=DEVICE), 1, per_sample, "tanh")
        check(epilogue_kernels, torch.randn(5, 8, device=DEVICE), 1, per_sample, "tanh")
    views._plans.clear()


def test_offsets_of_a_result_larger_than_its_input(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (epilogue_kernels, epilogue_plan):
        monkeypatch.setattr(module, "processors", lambda device: 132)
    u = torch.zeros(1, 1, device="meta").expand(2**16, 2**15)
    for per_sample in (False, True):
        assert epilogue_kernels.make_plan(u, 1, per_sample, 0).constants["WIDE"]
        assert not epilogue_kernels.make_plan(u[:4], 1, per_sample, 0).constants["WIDE"]
        for tensor, expected in ((u, True), (u[:4], False)):
            plan = epilogue_plan.make_plan(tensor, tensor, 1, per_sample, 0, 0, epilogue_plan.Wanted(*ALL))
            assert plan.constants["WIDE"] == expected


def test_positions_are_split_where_samples_and_channels_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(epilogue_plan, "processors", lambda device: 132)
    for u in (torch.empty(16, 3, 256, 256, device="meta"), torch.empty(2, 16, 512, 512, device="meta")):
        for value in (u, u.contiguous(memory_format=torch.channels_last)):
            plan = epilogue_plan.make_plan(value, value, 1, True, 0, 0, epilogue_plan.Wanted(*ALL))
            assert 132 <= plan.grid[0] <= 4 * 132


def test_no_view_where_channels_are_in_the_middle() -> None:
    for shape, dim in (((2, 3, 4, 5), 2), ((2, 3, 1, 4, 2), 3), ((3, 2, 2, 3, 4), -2)):
        for _, u in layouts(*shape):
            check(epilogue_kernels, u, dim, True, "silu")
            check(epilogue_kernels, u, dim, False, "silu")
    check(epilogue_kernels, torch.randn(3, 2, 4, 5, device=DEVICE), 0, False, "tanh")
    for u in (torch.randn(2, 3, 4, 5, device=DEVICE), torch.randn(5, 3, 2, 4, device=DEVICE).permute(2, 1, 3, 0)):
        b, g, t = parameters(u, 2, True)
        expected = reference.epilogue(u, b, g, t, 2, "tanh")
        assert epilogue_kernels.epilogue(u, b, g, t, 2, "tanh", in_place=True) is u
        assert_close(u, expected, "y in place")


def test_numbers_of_a_kernel_have_the_same_types_for_all_sizes() -> None:
    for size in (1, 3, 5, 20, 49, 196, 2**20 + 1):
        _, magic, shift = views.layout(torch.empty(2, 3, size, device="meta"), (), 1, False).division()
        assert -(2**31) <= magic < 2**31 and 0 <= shift <= 32


def test_parameters_may_start_anywhere() -> None:
    """Slices of one tensor have any alignment, each of which would be a kernel of its own."""
    for kernel, names in (
        (epilogue_kernels.forward, {"bias", "gate", "shift"}), (epilogue_backward.finish, {"gate"}),
        (epilogue_backward.backward_shared, {"bias", "gate", "shift"}), (epilogue_backward.finish_by_sample, {"gate"}),
        (epilogue_backward.backward_by_sample, {"bias", "gate", "shift"}),
    ):
        options = getattr(kernel, "kwargs", None) or vars(kernel)
        assert names <= set(options["do_not_specialize_on_alignment"])


@pytest.mark.parametrize("shape, dim", [
    ((0, 5, 3), 1), ((4, 0, 3), 1), ((4, 5, 0), 1), ((2, 5, 8, 0), 1), ((9, 0, 11, 0, 32), 1), ((9, 0, 11, 0, 32), 2),
    ((2, 3, 0, 4, 5), 3), ((3, 0, 4), 0),
])
def test_empty_tensors(shape: tuple[int, ...], dim: int) -> None:
    for per_sample in (False, True) if dim > 0 else (False,):
        check(epilogue_kernels, torch.randn(shape, device=DEVICE), dim, per_sample, "gelu")


def test_in_place_where_u_is_dense() -> None:
    for _, u in layouts(3, 2, 4, 4):
        b, g, t = parameters(u, 1, False)
        before = u.clone()
        expected = reference.epilogue(before, b, g, t, 1, "relu")
        dense = u.stride() == torch.empty_like(u).stride()
        y = epilogue_kernels.epilogue(u, b, g, t, 1, "relu", in_place=True)
        assert_close(y, expected, "y")
        assert (y is u) == dense
        assert dense or torch.equal(u, before)
    u = torch.randn(4, 3, 5, 2, device=DEVICE).permute(1, 3, 2, 0)  # dense, but in no order that has a view
    b, g, t = parameters(u, 1, True)
    expected = reference.epilogue(u, b, g, t, 1)
    assert epilogue_kernels.epilogue(u, b, g, t, 1, "none", in_place=True) is u
    assert_close(u, expected, "y")


def test_u_does_not_matter_without_activation_and_gate_gradient() -> None:
    u, grad = torch.full((3, 4), float("nan"), device=DEVICE), torch.randn(3, 4, device=DEVICE)
    for per_sample in (False, True):
        b, g, t = parameters(u, 1, per_sample)
        du, db, _, dt = epilogue_kernels.epilogue_backward(grad, u, b, g, t, 1, "none", (True, True, False, True))
        assert_close(du, g * grad, "du")
        assert_close(db, (g * grad).sum(0), "db")
        assert_close(dt, grad if per_sample else grad.sum(0), "dt")


def test_parameters_of_other_dtypes_and_strides() -> None:
    u = torch.randn(3, 4, 5, device=DEVICE)
    b, g, t = (torch.randn(8, device=DEVICE)[::2] for _ in range(3))
    mixed = (b.bfloat16(), g.half(), t.double())
    expected = reference.epilogue(u.double(), *(value.double() for value in mixed), 1, "elu")
    assert_close(epilogue_kernels.epilogue(u, *mixed, 1, "elu"), expected, "y")
    _, db, dg, dt = epilogue_kernels.epilogue_backward(torch.ones_like(u), u, *mixed, 1, "elu", ALL)
    assert (db.dtype, dg.dtype, dt.dtype) == (torch.bfloat16, torch.float16, torch.float64)


def test_the_same_bits_each_time() -> None:
    u, grad = torch.randn(500, 12, device=DEVICE), torch.randn(500, 12, device=DEVICE)
    b, g, t = parameters(u, 1, False)
    first, second = (epilogue_kernels.epilogue_backward(grad, u, b, g, t, 1, "tanh", ALL) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_errors() -> None:
    u, g = torch.randn(2, 3, device=DEVICE), torch.randn(3, device=DEVICE)
    run, backward = epilogue_kernels.epilogue, epilogue_kernels.epilogue_backward
    with pytest.raises(ValueError, match="dim is 2"):
        run(u, None, g, None, 2, "none")
    with pytest.raises(ValueError, match=r"gate has shape \(2,\)"):
        run(u, None, g[:2], None, 1, "none")
    with pytest.raises(ValueError, match="channels not in axis 0"):
        run(u, None, u, None, 0, "none")
    with pytest.raises(ValueError, match="bias has shape"):
        run(u, g[:2], g, None, 1, "none")
    with pytest.raises(ValueError, match="shift has shape"):
        run(u, None, g, u, 1, "none")
    with pytest.raises(ValueError, match="activation is 'swish'"):
        run(u, None, g, None, 1, "swish")
    with pytest.raises(TypeError, match="u has dtype torch.int64"):
        run(u.long(), None, g, None, 1, "none")
    with pytest.raises(ValueError, match="grad has shape"):
        backward(u[:1], u, None, g, None, 1, "none", ALL)
    with pytest.raises(RuntimeError, match="meta"):
        run(u.to("meta"), None, g.to("meta"), None, 1, "none")


def test_views_merge_what_strides_allow() -> None:
    def of(tensor: Tensor, axis: int, per_sample: bool) -> tuple[int, ...] | None:
        view = views.common_view(tensor.shape, axis, per_sample, [tensor.stride()])
        return None if view is None else (view.samples, view.positions, *view.strides[0])

    u = torch.empty(2, 3, 4, 5)
    assert of(u, 1, False) == of(u, 1, True) == (2, 20, 60, 20, 1)
    assert of(u.to(memory_format=torch.channels_last), 1, False) == (1, 40, 0, 1, 3)
    assert of(u.to(memory_format=torch.channels_last), 1, True) == (2, 20, 60, 1, 3)
    assert of(u[..., ::2], 1, True) is None
    assert of(torch.empty(7, 3), 1, True) == (1, 7, 0, 1, 3)
    assert of(torch.empty(1, 3), 1, True) == (1, 1, 0, 1, 0)
    assert views.units(views.common_view(u.shape, 1, False, [u.stride()]), 4).unit == 4


def test_variants_name_the_arguments_of_their_kernels() -> None:
    for module in (epilogue_kernels, epilogue_backward):
        found = module.variants()
        assert len({variant.label for variant in found}) == len(found)
        for variant in found:
            assert {*variant.types, *variant.constants} == set(variant.kernel.arg_names), variant.label


# Faults that stay within the tensors: what they write elsewhere would harm the tests that follow.
MUTANTS = [
    Mutant("epilogue", "(j < position_units)[None", "(j < position_units - 1)[None", check_planes),
    Mutant("epilogue", "m if ONE_SAMPLE else n, channels", "m if ONE_SAMPLE else n * 0, channels",
           check_planes_by_sample),
    Mutant("epilogue", "offsets(c, n, m, y_sample", "offsets(c, n, m * 0, y_sample", check_planes),
    Mutant("views", "return n, j - n * sample_units", "return n * 0, j - n * sample_units", check_planes_by_sample),
    Mutant("views", "row = n * (sample * UNIT) + m * LANES * position", "row = n * sample + m * LANES * position",
           check_planes),
    Mutant("epilogue_backward", "j = (part * steps + step) * BLOCK_J", "j = (part * (steps - 1) + step) * BLOCK_J",
           check_parts),
    Mutant("epilogue_backward", "if SUM:\n                total += s\n", "if SUM:\n                total = s\n",
           check_one_part),
    Mutant("epilogue_backward", "store_if_wanted(grad_bias, c, own_gate * sums, in_c)",
           "store_if_wanted(grad_bias, c, sums, in_c)", check_one_part),
    Mutant("epilogue_backward", "total += g * s", "total += s", check_rows_by_sample),
    Mutant("epilogue_backward", "(part * 2 + 1) * channels", "(part * 2) * channels", check_parts),
    Mutant("epilogue_backward", "m = (first + step) * BLOCK_M + lane", "m = first * BLOCK_M + lane",
           check_parts_of_samples),
    Mutant("epilogue_backward", "first = slab * steps", "first = slab * (steps - 1)", check_parts_of_planes),
    Mutant("epilogue_backward", "partial + (slab * 2 + 1) * samples", "partial + (slab + 1) * samples",
           check_parts_of_planes),
    Mutant("epilogue_backward", "own + samples * channels, mask", "own, mask", check_parts_of_planes),
    Mutant("epilogue_backward", "scaled += tl.load(gate", "scaled = tl.load(gate", check_finish_by_sample),
    Mutant("activations", "slope = tl.where(z == z, 1.0, z)", "slope = z * 0.0 + 1.0", check_infinities),
    Mutant("activations", "slope = tl.where(y == y, 1.0, y)", "slope = y * 0.0 + 1.0", check_infinities),
    Mutant("views", "tl.cast(sample, tl.int64)", "sample", check_large_strides),
    Mutant("views", "tl.cast(channel, tl.int64)", "channel", check_large_strides),
    Mutant("views", "tl.cast(position, tl.int64)", "position", check_large_strides),
    Mutant("epilogue_backward", "scaled = tl.sum(own_gate * sums, 1)", "scaled = tl.sum(sums, 1)",
           check_planes_by_sample),
    Mutant("epilogue_backward", "(n < samples)[None, :, None]", "(n < samples - 1)[None, :, None]",
           check_parts_of_samples),
    Mutant("epilogue_backward", "tl.load(gate + c, mask=in_c, other=0.0).to(REAL) * sums", "sums", check_parts),
    Mutant("epilogue_backward", "(part < parts)[:, None]", "(part < parts - 1)[:, None]", check_parts_of_rows),
    Mutant("epilogue_backward", "elif VALUES == RESULT:", "elif VALUES == ARGUMENT:", check_channel_sums),
]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("mutant", MUTANTS, ids=range(len(MUTANTS)))
def test_faults_are_noticed(mutant: Mutant, tmp_path) -> None:
    must_fail(mutant, tmp_path)

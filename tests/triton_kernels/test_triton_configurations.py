"""The table of block sizes: complete, within the hardware's limits, and sensible at every shape."""

from __future__ import annotations

import itertools

import pytest
import torch
from kernel_checks import DEVICE

configurations = pytest.importorskip("mrvae_kernels.triton_kernels.configurations")
tuning = pytest.importorskip("mrvae_kernels.triton_kernels.tuning")
convolution_variants, device, fold, linear_backward, weight_gradient = (
    pytest.importorskip(f"mrvae_kernels.triton_kernels.{name}")
    for name in ("convolution_variants", "device", "fold", "linear_backward", "weight_gradient")
)
Tiles = configurations.Tiles

ARCHITECTURES = (
    "sm_75", "sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx90a", "gfx942", "gfx1100", "xpu", "interpreter",
)
SHARED_BYTES = {"sm_80": 99 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx9": 64 << 10, "other": 48 << 10}
ODD = (0, 1, 2, 15, 16, 17, 31, 32, 33, 64, 65, 127, 400, 784, 4096, 1_000_003, 2**31 - 1, 2**40)


@pytest.fixture(autouse=True)
def nothing_remembered(tmp_path, monkeypatch):
    monkeypatch.setenv("MRVAE_CACHE", str(tmp_path))
    tuning.forget()
    yield
    tuning.forget()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_names_what_each_operation_and_precision_can_get(architecture):
    listed = configurations.every(architecture)
    assert len(listed) == len(set(listed))
    precisions = configurations.PRECISIONS if architecture.startswith("sm_") else ("ieee", "half")
    assert {(operation, precision) for operation, precision, _ in listed} == set(
        itertools.product(configurations.OPERATIONS, precisions)
    )
    for _, _, tiles in listed:
        assert tuning._valid(list(tiles)), tiles  # or the tuner's file could not hold it
        assert min(tiles.m, tiles.n, tiles.k) >= 16  # tl.dot takes no less


@pytest.mark.parametrize("processors", [1, 4, 132, 304])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_any_shape_gets_one_of_them(architecture, processors):
    listed = set(configurations.every(architecture))
    for operation, precision, _ in sorted(listed):
        for m, n in itertools.product(ODD, ODD):
            found = configurations.candidates(operation, architecture, precision, m, n, processors)
            assert len(found) == len(set(found)) > 0
            assert all((operation, precision, tiles) in listed for tiles in found)


@pytest.mark.parametrize("family", SHARED_BYTES)
def test_operands_fit_in_shared_memory_and_sums_in_registers(family):
    lanes = 64 if family == "gfx9" else 32
    for _, precision, tiles in configurations.every({"gfx9": "gfx942", "other": "gfx1100"}.get(family, family)):
        # on AMD's GPUs the last stage stays in registers
        stages = tiles.stages - 1 if family in ("gfx9", "other") else tiles.stages
        size = (tiles.m + tiles.n) * tiles.k * (2 if precision == "half" else 4) * stages
        assert size <= SHARED_BYTES[family], (precision, tiles)
        assert tiles.m * tiles.n <= 128 * lanes * tiles.warps, (precision, tiles)  # sums a thread, of 255 registers


@pytest.mark.parametrize(
    ("architecture", "family"),
    [("sm_80", "sm_80"), ("sm_86", "sm_80"), ("sm_89", "sm_80"), ("sm_120", "sm_80"), ("sm_90", "sm_90"),
     ("sm_100", "sm_100"), ("sm_103", "sm_100"), ("sm_75", "other"), ("gfx90a", "gfx9"), ("gfx950", "gfx9"),
     ("gfx1201", "other"), ("xpu", "other"), ("interpreter", "interpreter")],
)
def test_family(architecture, family):
    assert configurations.family(architecture) == family


@pytest.mark.parametrize("precision", ["ieee", "tf32", "half"])
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
def test_larger_results_get_larger_tiles(architecture, precision):
    def choice(m, n, operation="convolution"):
        return configurations.candidates(operation, architecture, precision, m, n, 132)[0]

    row = configurations.used("convolution", architecture, precision)
    areas = [tiles.m * tiles.n for tiles in row]
    assert areas == sorted(areas)
    assert choice(100_000, 4096) == row[-1]
    assert choice(16, 100) == choice(128, 400) == row[0]  # of these there are enough for many processors
    assert choice(100_000, 3).n == 32
    assert choice(100_000, 64).n == 64  # no tile that is half outside
    assert choice(20, 100_000).m == 32
    weight_gradient = choice(4096, 4096, "convolution_weight_gradient")
    assert weight_gradient.m * weight_gradient.n <= configurations.WEIGHT_GRADIENT_RESULTS
    assert choice(64, 64, "convolution_weight_gradient").m == 64  # split sums occupy all processors
    sizes = [choice(m, 512).m * choice(m, 512).n for m in (64, 256, 1024, 4096, 16384, 65536)]
    assert sizes == sorted(sizes)


def test_choose_answers_repeated_questions_from_one_lookup(monkeypatch):
    device = torch.device("cpu")
    first = configurations.choose("linear", device, "half", 7, 5, 3)
    assert isinstance(first, Tiles)
    monkeypatch.setattr(tuning, "decide", lambda *_: pytest.fail("asked again"))
    assert configurations.choose("linear", device, "half", 7, 5, 3) is first
    assert configurations.choose("linear", device, "half", 7, 5, 3, lambda tiles: pytest.fail("launched")) is first


@pytest.mark.parametrize("sizes", [(0, 0, 0), (1, 1, 1), (0, 5, 3), (2**40, 1, 7)])
def test_choose_takes_any_sizes(sizes):
    for operation, precision in itertools.product(configurations.OPERATIONS, configurations.PRECISIONS):
        assert isinstance(configurations.choose(operation, torch.device("cpu"), precision, *sizes), Tiles)


@pytest.mark.parametrize(("warps", "registers"), [(1, 255), (2, 255), (4, 255), (8, 128), (16, 64)])
def test_limited_registers_leave_room_for_two_programs(warps, registers):
    for architecture in ARCHITECTURES:
        limit = device.register_limit(architecture, warps)
        assert limit == ({"maxnreg": registers} if architecture.startswith("sm_") else {})  # others refuse the option


def test_which_gradients_are_limited():
    limited = {
        (name, operation, precision, warps)
        for name in ("sm_80", "sm_90", "sm_100", "gfx942", "xpu", "interpreter")
        for operation in ("linear_input_gradient", "linear_weight_gradient")
        for precision in configurations.PRECISIONS for warps in (4, 8)
        if linear_backward.limit_of(operation, name, precision, warps)
    }
    nvidia = ("sm_80", "sm_90", "sm_100")
    assert {found[:1] + found[2:] for found in limited if found[1] == "linear_weight_gradient"} == set(
        itertools.product(nvidia, configurations.PRECISIONS, (4, 8))
    )
    assert {found[:1] + found[2:] for found in limited if found[1] == "linear_input_gradient"} == {
        *itertools.product(nvidia, ("tf32", "half"), (4,)), ("sm_100", "tf32", 8), ("sm_100", "half", 8),
    }


class Recorder:
    """Stands for a kernel; launches: the keyword arguments of each."""

    def __init__(self):
        self.launches = []

    def __getitem__(self, grid):
        return lambda *arguments, **named: self.launches.append(named)


@pytest.mark.parametrize("name", ["sm_90", "gfx942"])
def test_launches_have_the_limits_that_variants_were_compiled_with(name, monkeypatch):
    """Those of the table's first tiles in half precision; the others differ in nothing but numbers."""
    recorder = Recorder()
    tiles = configurations.used("linear", name, "half")[0]
    for module in (linear_backward, weight_gradient, fold):
        monkeypatch.setattr(module, "architecture", lambda where: name)
    for module in (linear_backward, weight_gradient):
        monkeypatch.setattr(module, "choose", lambda *_, **__: tiles)
    monkeypatch.setattr(linear_backward, "input_gradient", recorder)
    monkeypatch.setattr(linear_backward, "weight_gradient", recorder)
    monkeypatch.setattr(weight_gradient, "convolve_weight", recorder)
    monkeypatch.setattr(fold, "fold_backward_kernel", recorder)

    matrix = torch.empty(64, 64, dtype=torch.bfloat16, device=DEVICE)
    image = torch.empty(2, 32, 4, 4, dtype=torch.bfloat16, device=DEVICE)
    linear_backward.run_input_gradient(matrix, matrix, None, matrix, 1, "ieee")
    linear_backward.run_weight_gradient(matrix, matrix, matrix, 1, False, "ieee")
    weight_gradient.partial_weight_gradient(
        image, image, None, True, (32, 32, 1, 1), (1, 1), (0, 0), (1, 1), 1, "none"
    )
    fold.fold_backward([matrix], [None], [matrix], [None], [torch.empty(64, device=DEVICE)], [None], [0], [True] * 4)

    def of(module, label):
        return next(variant for variant in module.variants(name) if label in variant.label)

    compiled = (
        of(linear_backward, f"linear_input_gradient bf16 half {tuple(tiles)} "),
        of(linear_backward, f"linear_weight_gradient bf16 half {tuple(tiles)} "),
        of(convolution_variants, "convolve_weight plain bf16 ieee 32x32x"), of(fold, "fold_backward bf16"),
    )
    assert len(recorder.launches) == len(compiled)
    for launched, variant in zip(recorder.launches, compiled, strict=True):
        assert launched["num_warps"] == variant.warps
        assert launched.get("maxnreg") == variant.limit.get("maxnreg"), variant.label
        assert ("maxnreg" in launched) == (name == "sm_90"), variant.label


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="operation is 'lstm'; expected one of linear, "):
        configurations.choose("lstm", torch.device("cpu"), "half", 1, 1, 1)
    with pytest.raises(ValueError, match="precision is 'bf16'; expected one of ieee, tf32, half"):
        configurations.choose("linear", torch.device("cpu"), "bf16", 1, 1, 1)


def test_precision_class():
    assert configurations.precision_class(torch.bfloat16, "tf32") == "half"
    assert configurations.precision_class(torch.float16, "ieee") == "half"
    assert configurations.precision_class(torch.float32, "tf32") == "tf32"
    assert configurations.precision_class(torch.float32, "ieee") == "ieee"

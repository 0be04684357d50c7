"""The C++ test of the CUDA kernels of products must notice faults: each is put into a copy of the sources, which is
compiled against the shim, and csrc/tests/test_cuda_products.cpp must then fail."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
COMPILER = os.environ.get("CXX", "c++")
BFLOAT16, TF32, FLOAT = "0", "2", "3"  # Numbers of products.h
UNITS = {
    BFLOAT16: ("convolve_bfloat16", "weight_gradient_bfloat16"),
    TF32: ("convolve_tf32", "weight_gradient_tf32"),
    FLOAT: ("convolve_float", "weight_gradient_float"),
}

pytestmark = [
    pytest.mark.slow, pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"there is no compiler {COMPILER}")
]


class Fault(NamedTuple):
    """In csrc/cuda/<file> the text `old`, which occurs once, becomes `new`; seen in <unit>.cu."""

    file: str
    old: str
    new: str
    unit: str
    numbers: str = BFLOAT16


CONVOLVE, GRADIENT = UNITS[BFLOAT16]
FAULTS = [
    Fault("mainloop.cuh", "copy_async_wait<ahead - 1>();", "copy_async_wait<ahead>();", CONVOLVE),
    # the shim lets a thread run until it waits: where each product is an exchange of the warp, all keep in step
    Fault("mainloop.cuh", "    __syncthreads();\n    const bool more", "    const bool more", UNITS[FLOAT][0], FLOAT),
    Fault("mainloop.cuh", "copy_async_wait<0>();\n  __syncthreads();\n}", "copy_async_wait<0>();\n}", UNITS[FLOAT][0],
          FLOAT),
    Fault("fragments.cuh", "(b, tile + (column + lane / 16 * 8 + lane % 8) * stride + k + lane / 8 % 2 * 8)",
          "(b, tile + (column + lane / 8 % 2 * 8 + lane % 8) * stride + k + lane / 16 * 8)", CONVOLVE),
    Fault("fragments.cuh", "tile + (k + lane / 16 * 8 + lane % 8) * stride + row + lane / 8 % 2 * 8",
          "tile + (k + lane / 8 % 2 * 8 + lane % 8) * stride + row + lane / 16 * 8", GRADIENT),
    Fault("fragments.cuh", "row + lane / 4 + i % 2 * 8, k + lane % 4 + i / 2 * 4",
          "row + lane / 4 + i / 2 * 8, k + lane % 4 + i % 2 * 4", UNITS[TF32][0], TF32),
    Fault("fragments.cuh", "right[d % 2].values[v]", "right[d / 2 % 2].values[v]", UNITS[FLOAT][0], FLOAT),
    Fault("operands.cuh", "return tap.i < from.taps.rows && ", "return ", CONVOLVE),
    Fault("operands.cuh", "number >= from.positions.end", "number > from.positions.end", GRADIENT),
    Fault("loaders.cuh", "advance(tap, from.taps, 0);\n        settle();", "advance(tap, from.taps, 0);", CONVOLVE),
    Fault("loaders.cuh", "int v = 0, c = loaded.c; v < count", "int v = 0, c = 0; v < count", CONVOLVE),
    Fault("loaders.cuh", "place.saved_at + this->saved_beyond", "place.at + this->saved_beyond", CONVOLVE),
    Fault("convolve.cuh", "(position - first * axis.dilation) / axis.stride",
          "(position - axis.dilation) / axis.stride", CONVOLVE),
    Fault("convolve_epilogue.cuh", "own[(16 * i + g + d / 2 * 8) * stride", "own[(16 * i + g + d % 2 * 8) * stride",
          CONVOLVE),
    Fault("convolve_epilogue.cuh", "    __syncwarp();\n#pragma unroll 1", "#pragma unroll 1", CONVOLVE),
    Fault("weight_gradient.cuh", "row_sums[i / 2][i % 2 * 2]", "row_sums[i / 2][0]", GRADIENT),
    Fault("weight_gradient.cuh", ": start + arguments.chunk;", ": start + arguments.chunk + 1;", GRADIENT),
    Fault("slopes.cuh", "return 1.0f - saved * saved;", "return 1.0f - saved;", CONVOLVE),
    Fault("finish.cu", "half >= columns; half /= 2", "half > columns; half /= 2", "finish"),
    Fault("finish.cu", "for (int i = 0; i < what.splits; ++i)", "for (int i = 0; i < 1; ++i)", "finish"),
]


def compile_unit(sources: Path, file: Path, target: Path) -> None:
    flags = ["-std=c++17", "-O1", "-Wno-unknown-pragmas", "-DMRVAE_CUDA", "-DMRVAE_SHIM"]
    includes = [f"-I{path}" for path in (CSRC / "tests" / "shim", sources / "cuda", sources)]
    command = [COMPILER, *flags, *includes, "-x", "c++", "-c", str(file), "-o", str(target)]
    subprocess.run(command, check=True, capture_output=True, text=True)


class Build:
    """Objects of the sources as they are, each compiled when first needed, and of copies with a fault."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.known: dict[str, Path] = {}

    def sound(self, name: str) -> Path:
        if name not in self.known:
            tests = CSRC / "tests"
            places = (CSRC / "cuda" / f"{name}.cu", tests / f"{name}.cpp", tests / "shim" / f"{name}.cpp")
            target = self.folder / f"{name}.o"
            compile_unit(CSRC, next(path for path in places if path.exists()), target)
            self.known[name] = target
        return self.known[name]

    def program(self, numbers: str, changed: dict[str, Path]) -> list[str]:
        """The command that runs the test for one number type, of which alone the kernels are there."""
        names = ("test_cuda_products", "cuda_shim", "products", "finish", *UNITS[numbers])
        objects = [str(changed.get(name) or self.sound(name)) for name in names]
        target = self.folder / f"test{len(list(self.folder.iterdir()))}"
        link = [COMPILER, "-no-pie", *objects, "-o", str(target), "-Wl,--unresolved-symbols=ignore-all"]
        subprocess.run(link, check=True, capture_output=True, text=True)
        return [str(target), numbers]


@pytest.fixture(scope="module")
def build(tmp_path_factory) -> Build:
    return Build(tmp_path_factory.mktemp("products"))


def outcome(command: list[str]) -> int:
    """Its exit status: 1 for checks that fail, negative where a fault makes it crash."""
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False).returncode


@pytest.mark.parametrize("numbers", [BFLOAT16, TF32, FLOAT])
def test_sound_kernels_pass(build, numbers):
    assert outcome(build.program(numbers, {})) == 0


@functools.lru_cache
def copy_of(folder: Path) -> Path:
    for name in ("gate.h", "storage.h", "elementary.h"):
        (folder / name).symlink_to(CSRC / name)
    shutil.copytree(CSRC / "cuda", folder / "cuda")
    return folder


@pytest.mark.parametrize("fault", FAULTS, ids=[f"{i}-{fault.file}" for i, fault in enumerate(FAULTS)])
def test_fault_is_noticed(build, fault, tmp_path):
    sources = copy_of(tmp_path)
    path = sources / "cuda" / fault.file
    text = path.read_text()
    assert text.count(fault.old) == 1, f"{fault.file} has {text.count(fault.old)} times {fault.old!r}"
    path.write_text(text.replace(fault.old, fault.new))
    target = tmp_path / f"{fault.unit}.o"
    compile_unit(sources, sources / "cuda" / f"{fault.unit}.cu", target)
    code = outcome(build.program(fault.numbers, {fault.unit: target}))
    assert code == 1 or code < 0, f"{fault.old!r} -> {fault.new!r} goes unnoticed: exit status {code}"

"""Faults of the CUDA kernels, which their test in the shim has to notice: each is one line of a source, changed.

`python tests/cuda_core/faults.py` tries them all, and prints those that stay unnoticed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

CSRC = Path(__file__).parents[2] / "csrc"
PARTS = {"gates": 1, "fold": 2, "epilogue": 3}  # MRVAE_PART of test_cuda_memory.cpp


class Fault(NamedTuple):
    """`old`, which `file` has once, becomes `new`; the test of `part` then fails."""

    name: str
    part: str
    file: str
    old: str
    new: str


FAULTS = [
    Fault("slices share a row of partial sums", "gates", "gates.cu",
          "row = table.first_tile + blockIdx.x / table.parts;", "row = table.first_tile + tile;"),
    Fault("warps add before all have stored", "gates", "gates.cu",
          "  __syncthreads();\n  const std::int64_t left", "  const std::int64_t left"),
    Fault("gates beyond a slice are written", "gates", "gates.cu",
          "if (place.column + j < slice.size) target[j] = g[j];", "target[j] = g[j];"),
    Fault("samples beyond a block's part are added", "gates", "gates.cu",
          "first + table.block_samples < table.samples ? first + table.block_samples : table.samples", "table.samples"),
    Fault("the second stage leaves out the last rows", "gates", "combine.cuh",
          "r < item.rows; r += combine_warps", "r + 1 < item.rows; r += combine_warps"),
    Fault("the second stage adds before all warps have stored", "epilogue", "combine.cuh",
          "dots[threadIdx.x] = dot;\n  __syncthreads();", "dots[threadIdx.x] = dot;"),
    Fault("the second stage leaves out a warp", "epilogue", "combine.cuh",
          "k < combine_warps;", "k < combine_warps - 1;"),
    Fault("the second stage takes another sample's sums", "epilogue", "combine.cuh",
          "(sample * item.rows + r)", "(sample + r)"),
    Fault("the first block of a layer goes to the one before", "fold", "combine.cuh",
          "table.first[middle] <= block", "table.first[middle] < block"),
    Fault("layers share their partial sums", "fold", "fold.cu", "    free += scratch_of(layer);\n", ""),
    Fault("a layer's vectors start after its weight's blocks", "fold", "fold.cu",
          "std::int64_t(block - layer.cut.blocks) * block_threads + threadIdx.x;\n    if (i >= layer.outputs) return;\n"
          "    const T scaled",
          "std::int64_t(block) * block_threads + threadIdx.x;\n    if (i >= layer.outputs) return;\n"
          "    const T scaled"),
    Fault("the gate's gradient lacks the bias", "fold", "fold.cu",
          "nullptr, nullptr, item.grad_bias, item.bias}", "nullptr, nullptr, item.grad_bias, nullptr}"),
    Fault("magic number one too small", "epilogue", "cut.cuh",
          "- divisor)) / divisor + 1)", "- divisor)) / divisor)"),
    Fault("rows are left out", "epilogue", "columns.cuh", "r += batch * block_warps", "r += in_flight * lanes"),
    Fault("the pack at the end is left out", "epilogue", "columns.cuh",
          "if (mine && at < cut.size && at + V > cut.size)", "if (mine && at > cut.size)"),
    Fault("warps of columns add before all have stored", "epilogue", "columns.cuh",
          "dots[threadIdx.x * V + j] = dot[j];\n  }\n  __syncthreads();", "dots[threadIdx.x * V + j] = dot[j];\n  }"),
    Fault("samples share partial sums", "epilogue", "columns.cuh",
          "(place.sample * cut.parts + place.part) * cut.length", "(place.sample + place.part) * cut.length"),
    Fault("a segment reaches into the next plane", "epilogue", "planes.cuh",
          "end = begin + cut.length < stop ? begin + cut.length : stop;", "end = begin + cut.length;"),
    Fault("a pack that is first and last counts twice", "epilogue", "planes.cuh",
          "(side == 1 && pack == first) || ", ""),
    Fault("a plane's channel is taken from the next axis", "epilogue", "planes.cuh",
          "cut.by_rows.quotient(row) * cut.channels + channel", "row * cut.channels + channel"),
    Fault("gradient of the bias over samples is left out", "epilogue", "epilogue.cu",
          "!shared && p.mode != Mode::Rows) finish", "!shared && p.mode == Mode::Planes) finish"),
]


def compiler() -> str | None:
    return os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")


def compile_shim(folder: Path) -> Path:
    """The shim itself, which has no faults and is the slowest to compile."""
    target = folder / "cuda_shim.o"
    source = CSRC / "tests" / "shim" / "cuda_shim.cpp"
    subprocess.run([str(compiler()), *flags(CSRC), "-O1", "-c", str(source), "-o", str(target)], check=True)
    return target


def flags(csrc: Path) -> list[str]:
    return ["-std=c++17", "-w", "-DMRVAE_CUDA", "-DMRVAE_SHIM", f"-I{CSRC / 'tests' / 'shim'}", f"-I{csrc}"]


def copy_sources(folder: Path) -> Path:
    """csrc without what needs torch."""
    target = folder / "csrc"
    shutil.copytree(CSRC, target, ignore=shutil.ignore_patterns("cpu", "shim", "standalone"))
    return target


def build(folder: Path, shim: Path, part: str, fault: Fault | None = None) -> Path:
    """The test of `part`, with the fault in a copy of the sources."""
    csrc = copy_sources(folder)
    if fault is not None:
        path = csrc / "cuda" / fault.file
        text = path.read_text()
        if text.count(fault.old) != 1:
            raise ValueError(f"{fault.file} has {fault.old!r} {text.count(fault.old)} times; expected once")
        path.write_text(text.replace(fault.old, fault.new))
    program = folder / "test"
    sources = [csrc / "tests" / "test_cuda_memory.cpp", csrc / "cuda" / f"{part}.cu"]
    command = [str(compiler()), *flags(csrc), "-O0", f"-DMRVAE_PART={PARTS[part]}", "-x", "c++", *map(str, sources)]
    subprocess.run([*command, "-x", "none", str(shim), "-o", str(program)], check=True)
    return program


def notices(program: Path) -> bool:
    """True where the test fails, which a crash counts as."""
    return subprocess.run([str(program)], capture_output=True, timeout=120, check=False).returncode != 0


def main() -> int:
    unnoticed = []
    with tempfile.TemporaryDirectory() as name:
        shim = compile_shim(Path(name))
        for number, fault in enumerate(FAULTS):
            folder = Path(name) / str(number)
            folder.mkdir()
            if not notices(build(folder, shim, fault.part, fault)):
                unnoticed.append(fault.name)
    print("\n".join(unnoticed) or "all are noticed")
    return len(unnoticed)


if __name__ == "__main__":
    sys.exit(main())

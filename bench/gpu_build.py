"""Builds the core in place, with CUDA kernels for this machine's GPUs: `python -m bench.gpu_build`.

The first step of `make gpu`, run in the project's folder: the core goes into its mrvae_kernels/, and nothing is
installed. Where there is no nvcc, one line says so, the core stays as it is, and the exit code is 0. It is 1 where
there is one and the core has no CUDA kernels afterwards.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

import build_support as support

from .gpu_processes import limited

REPORT = """
from mrvae_kernels import ops
print(ops.CUDA_ERROR if ops.EXTENSION else ops.EXTENSION_ERROR)
"""


def capabilities() -> str:
    """The visible GPUs' compute capabilities, as TORCH_CUDA_ARCH_LIST has them: "9.0" for an H200."""
    found = {torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())}
    return ";".join(f"{major}.{minor}" for major, minor in sorted(found))


def build(seconds: float) -> str | None:
    """None, or why the core has no CUDA kernels now."""
    # auto: the core of a build that fails knows why it has no CUDA kernels, and serves the CPU's tests
    environment = {"TORCH_CUDA_ARCH_LIST": capabilities(), "MRVAE_CPU": "1", "MRVAE_CUDA": "auto"}
    code, said = limited([sys.executable, "setup.py", "build_ext", "--inplace"], seconds, environment)
    print(said)
    if code is None:
        return f"the build took more than {seconds:.0f} s"
    if code:
        return f"the build ended with exit code {code}"
    _, said = limited([sys.executable, "-c", REPORT], 60)
    said = said.strip().rpartition("\n")[2]  # after warnings, if there are any
    return None if said == "None" else said


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_build", description=__doc__)
    parser.add_argument("--seconds", type=float, default=180, help="give up after this long (default 180)")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("bench.gpu_build: torch finds no GPU to build for; the core stays as it is")
        return 0
    if support.toolkit() is None:
        print("bench.gpu_build: there is no nvcc; the core stays as it is")
        return 0
    if reason := build(options.seconds):
        print(f"bench.gpu_build: no CUDA core, what follows is about Triton only: {reason}")
        return 1
    print(f"bench.gpu_build: the core has CUDA kernels for {capabilities()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

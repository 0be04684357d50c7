"""The C++ tests that need no torch: gate mathematics compiled by the compiler at hand, as CTest does."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")


@pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")
def test_gate_mathematics(tmp_path):
    program = tmp_path / "test_gate"
    source = ROOT / "csrc" / "tests" / "test_gate.cpp"
    subprocess.run([COMPILER, "-std=c++20", "-O2", f"-I{ROOT / 'csrc'}", str(source), "-o", str(program)], check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None or shutil.which("cmake") is None, reason="there is no C++ compiler or no cmake")
def test_the_kernels_without_torch_and_cuda(tmp_path):
    """CMake's library of the CPU kernels alone, and the CUDA kernels' source against the shim, with their tests."""
    options = ["-DMRVAE_TORCH=OFF", "-DMRVAE_CUDA=OFF", "-DCMAKE_BUILD_TYPE=Debug", "-DCMAKE_CXX_FLAGS=-O1"]
    for command in (
        ["cmake", "-S", str(ROOT), "-B", str(tmp_path), *options],
        ["cmake", "--build", str(tmp_path), "--parallel", "2"],
        ["ctest", "--test-dir", str(tmp_path), "--output-on-failure", "--no-tests=error"],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "tests passed, 0 tests failed" in done.stdout and "test_kernels" in done.stdout

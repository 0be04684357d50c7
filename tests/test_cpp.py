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

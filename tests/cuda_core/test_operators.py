"""The operators' own tests, run on the CUDA kernels' source through the shim, in a process that loads that build.

Nothing is left out: the shim has all that the kernels use, tensor cores and asynchronous copies included. What it
cannot show, `test_what_the_shim_does_not_show` lists.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mrvae_kernels import ops

sys.path.insert(0, str(Path(__file__).parent))
import shim  # noqa: E402

pytestmark = pytest.mark.skipif(ops.GPU_TYPE is not None, reason="this core has CUDA kernels itself")
ROOT = shim.ROOT
MINUTES = 20


@pytest.fixture(scope="module")
def core() -> Path:
    return shim.build()


def run(core: Path, *arguments: str) -> str:
    """The output of Python with these arguments and that core. AssertionError unless it ends with 0."""
    environment = {
        **os.environ, "MRVAE_CORE": str(core), "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'models'}",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60 * MINUTES,
        check=False,
    )
    output = done.stdout + done.stderr
    assert done.returncode == 0, output[-6000:]
    return output


@pytest.mark.parametrize(("least", "files"), [
    (40, ["tests/ops/test_gates_op.py"]),
    (40, ["tests/ops/test_fold_op.py"]),
    (40, ["tests/ops/test_epilogue_op.py"]),
    (40, ["tests/ops/test_gated_linear_op.py", "tests/ops/test_gated_convolution_op.py"]),
    (300, ["tests/cuda_core/test_cuda_products.py"]),
    (20, ["tests/test_prepared.py", "tests/test_bake.py"]),
], ids=["gates", "fold", "epilogue", "products", "fused", "networks"])
def test_operators(core, least, files):
    output = run(core, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files)
    passed = re.search(r"^(\d+) passed", output.splitlines()[-1])
    assert passed is not None and int(passed[1]) >= least, output[-2000:]


def test_the_kernels_are_the_shim_s(core):
    code = "import mrvae_kernels as mk; print(mk.ops.GPU_TYPE, mk.ops.build_facts()['cuda'])"
    assert run(core, "-c", code).split() == ["cpu", "shim"]


NOT_SHOWN = (
    "the asm of csrc/cuda/tensor_core.h (mma, ldmatrix, cp.async, cvt.rna): emulated by fragments' layouts",
    "memory ordering between blocks that run at the same time: blocks run one after the other, from the last",
    "bank conflicts, coalescing, alignment faults of ordinary loads, occupancy and speed",
    "csrc/device.cpp's device guard and current stream: they need a GPU",
)


def test_what_the_shim_does_not_show(record_property, capsys):
    source = (ROOT / "csrc" / "cuda" / "tensor_core.h").read_text()
    emulated = {"mma.sync", "ldmatrix.sync", "cp.async", "cvt.rna"}
    assert all(name in source for name in emulated)
    others = [path for path in (ROOT / "csrc" / "cuda").iterdir() if path.name != "tensor_core.h"]
    assert not [path.name for path in others if re.search(r"\basm\b", path.read_text())], "asm belongs in tensor_core.h"
    with capsys.disabled():
        print("\nnot shown by the shim:", *NOT_SHOWN, sep="\n  ")

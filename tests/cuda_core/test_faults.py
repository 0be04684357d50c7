"""The C++ test of the memory-bound CUDA kernels passes, and fails for each fault of a list."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import faults  # noqa: E402

pytestmark = pytest.mark.skipif(faults.compiler() is None, reason="there is no C++ compiler")


@pytest.fixture(scope="module")
def shim(tmp_path_factory):
    return faults.compile_shim(tmp_path_factory.mktemp("shim"))


@pytest.mark.parametrize("part", faults.PARTS)
def test_kernels_without_a_fault_pass(part, shim, tmp_path):
    assert not faults.notices(faults.build(tmp_path, shim, part))


@pytest.mark.parametrize("fault", faults.FAULTS, ids=lambda fault: fault.name)
def test_fault_is_noticed(fault, shim, tmp_path):
    assert faults.notices(faults.build(tmp_path, shim, fault.part, fault))

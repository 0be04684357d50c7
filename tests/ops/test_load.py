"""What EXTENSION_ERROR says when the extension is missing, was built for another torch, or cannot be loaded."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from op_checks import requires_extension

from mrvae_kernels import ops
from mrvae_kernels.ops import _load


@pytest.fixture
def record(monkeypatch, tmp_path):
    """Pretends that setup.py wrote this record; keeps what is loaded as it is."""

    def write(**facts):
        (tmp_path / "_build.json").write_text(json.dumps(facts))
        (tmp_path / "ops").mkdir()
        monkeypatch.setattr(_load, "__file__", str(tmp_path / "ops" / "_load.py"))

    monkeypatch.delenv("MRVAE_CORE", raising=False)
    monkeypatch.setattr(_load, "_loaded", False)
    return write


def no_module(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


def test_not_built(monkeypatch, record):
    no_module(monkeypatch)
    record()
    message = _load.load()
    assert message.startswith("the C++ core is not built;") and message.endswith(f"run: {_load.REBUILD}")
    with pytest.raises(RuntimeError, match="the C\\+\\+ core is not built"):
        ops.gates(torch.zeros(1), torch.zeros(1), torch.tensor(0.0), [1], [0])


def test_not_built_says_why(monkeypatch, record):
    no_module(monkeypatch)
    record(torch=torch.__version__, error="there is no C++ compiler: install g++")
    assert "the C++ core is not built: there is no C++ compiler: install g++;" in _load.load()


def test_built_for_another_torch_is_named_and_not_loaded(monkeypatch, record):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(importlib, "import_module", lambda name: pytest.fail("loading it may crash"))
    record(torch="2.11.0+cpu")
    message = _load.load()
    assert f"built for torch 2.11.0+cpu, and this is torch {torch.__version__}" in message
    assert message.endswith(_load.REBUILD)


def test_unloadable_names_both_versions(monkeypatch, record):
    def undefined_symbol(name):
        raise ImportError("undefined symbol: _ZN3c10")

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(importlib, "import_module", undefined_symbol)
    other = _load.public_version(torch.__version__) + "+other"
    record(torch=other)
    message = _load.load()
    assert f"built for torch {other}, cannot be loaded with torch {torch.__version__} (undefined symbol" in message


@pytest.mark.parametrize(
    ("built", "here", "said"),
    [
        ("13.0", None, f"with CUDA 13.0, and this torch {torch.__version__} is a build without CUDA"),
        ("13.0", "12.8", f"with CUDA 13.0, and this torch {torch.__version__} has CUDA 12.8, another major version"),
        ("12.8", "13.0", f"with CUDA 12.8, and this torch {torch.__version__} has CUDA 13.0, another major version"),
    ],
)
def test_built_with_another_cuda_is_named_and_not_loaded(monkeypatch, record, built, here, said):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(importlib, "import_module", lambda name: pytest.fail("its libraries are not there"))
    monkeypatch.setattr(torch.version, "cuda", here)
    record(torch=torch.__version__, cuda=built)
    assert _load.load() == f"the C++ core was built {said}; run: {_load.REBUILD}"


def test_a_minor_version_of_cuda_does_not_matter_nor_a_core_without():
    assert _load.cuda_mismatch("13.0", "13.2") is None
    assert _load.cuda_mismatch("", None) is None and _load.cuda_mismatch("", "13.0") is None


def test_why_there_are_no_cuda_kernels(monkeypatch, record):
    record(torch=torch.__version__)
    assert _load.cuda_error() == "they are part of the C++ core, which is missing"
    monkeypatch.setattr(_load, "_loaded", True)
    monkeypatch.setattr(_load, "build_facts", lambda: {"cuda": "13.0"})
    assert _load.cuda_error() is None
    monkeypatch.setattr(_load, "build_facts", dict)
    assert _load.cuda_error() == f"it was built without them; run: MRVAE_CUDA=1 {_load.REBUILD}"
    monkeypatch.setattr(_load, "record", lambda: {"cuda_error": "there is no nvcc: install it; then run: this"})
    assert _load.cuda_error() == "there is no nvcc: install it; then run: this"
    monkeypatch.setenv("MRVAE_CORE", "/other/_C.so")
    assert _load.cuda_error() == "the core that MRVAE_CORE names was built without them; unset it"


@requires_extension
def test_another_core_in_its_place(tmp_path):
    core = importlib.util.find_spec("mrvae_kernels._C").origin
    other = shutil.copy(core, tmp_path / "_C_other.so")
    code = "import mrvae_kernels, importlib as i; print(i.import_module('mrvae_kernels._C').__file__, mrvae_kernels._C)"
    environment = {**os.environ, "MRVAE_CORE": str(other)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and done.stdout.count(str(other)) == 2, done.stderr


def test_another_core_that_cannot_be_loaded(monkeypatch, record, tmp_path):
    record()
    (tmp_path / "_C.so").write_text("no library")
    monkeypatch.setenv("MRVAE_CORE", str(tmp_path / "_C.so"))
    message = _load.load()
    assert message.startswith(f"MRVAE_CORE is {tmp_path}/_C.so, which cannot be loaded (")
    assert message.endswith("; unset it")


def test_a_damaged_record_is_no_obstacle(monkeypatch, tmp_path):
    (tmp_path / "_build.json").write_text("{")
    monkeypatch.setattr(_load, "__file__", str(tmp_path / "ops" / "_load.py"))
    assert _load.record() == {}


@requires_extension
def test_facts_of_the_loaded_extension():
    facts = ops.build_facts()
    assert _load.public_version(facts["torch"]) == _load.public_version(torch.__version__)
    assert {"compiler", "flags", "commit", "cuda", "architectures", "nvcc_flags"} <= facts.keys()
    assert all(facts[key] for key in ("compiler", "flags", "commit"))


def test_a_core_of_older_sources_is_named(monkeypatch, record):
    record(torch=torch.__version__)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(importlib, "import_module", lambda name: object())
    message = _load.load()
    assert "built from older sources than this package's" in message and message.endswith(_load.REBUILD)

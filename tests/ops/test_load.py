"""What EXTENSION_ERROR says when the extension is missing, was built for another torch, or cannot be loaded."""

from __future__ import annotations

import importlib.util
import json

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


def test_a_damaged_record_is_no_obstacle(monkeypatch, tmp_path):
    (tmp_path / "_build.json").write_text("{")
    monkeypatch.setattr(_load, "__file__", str(tmp_path / "ops" / "_load.py"))
    assert _load.record() == {}


@requires_extension
def test_facts_of_the_loaded_extension():
    facts = ops.build_facts()
    assert _load.public_version(facts["torch"]) == _load.public_version(torch.__version__)
    assert {"compiler", "flags", "commit"} <= facts.keys() and all(facts.values())

"""Finding and loading mrvae_kernels._C, and saying what is wrong where that fails."""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

REBUILD = "pip install --no-build-isolation --force-reinstall --no-deps ."
"""Run in the project's folder: builds against the torch that is installed."""

F = TypeVar("F", bound=Callable[..., Any])

_loaded = False


def record() -> dict[str, str]:
    """What setup.py wrote about the build: torch, compiler, flags, commit, or error. Empty when nothing was built."""
    path = Path(__file__).parent.parent / "_build.json"
    try:
        facts = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}


def public_version(version: str) -> str:
    """2.13.0 of 2.13.0+cpu: builds of one release share their interface, whatever devices they serve."""
    return version.partition("+")[0]


def load() -> str | None:
    """Import the extension, which defines the operators. Returns None, or the reason why there is none."""
    global _loaded
    facts = record()
    if importlib.util.find_spec("mrvae_kernels._C") is None:
        reason = f": {facts['error']}" if "error" in facts else ""
        return f"the C++ core is not built{reason}; with a C++ compiler installed, run: {REBUILD}"
    built_for = facts.get("torch", "")
    if built_for and public_version(built_for) != public_version(torch.__version__):
        return f"the C++ core was built for torch {built_for}, and this is torch {torch.__version__}; run: {REBUILD}"
    try:
        importlib.import_module("mrvae_kernels._C")
    except ImportError as error:
        origin = f"built for torch {built_for}" if built_for else "built for an unknown torch"
        return f"the C++ core, {origin}, cannot be loaded with torch {torch.__version__} ({error}); run: {REBUILD}"
    _loaded = True
    return None


def build_facts() -> dict[str, str]:
    """torch, compiler, flags and commit of the loaded extension; RuntimeError without one."""
    require()
    return dict(importlib.import_module("mrvae_kernels._C").build_facts())


def require() -> None:
    """RuntimeError with the reason unless the extension is loaded."""
    if not _loaded:
        raise RuntimeError(load())


def fake(name: str) -> Callable[[F], F]:
    """Register the decorated function as the shape inference of torch.ops.mrvae.<name>, where that operator exists."""
    if not _loaded:
        return lambda function: function
    return torch.library.register_fake(f"mrvae::{name}")


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for every other dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32

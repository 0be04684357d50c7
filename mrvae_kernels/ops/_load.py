"""Finding and loading mrvae_kernels._C, and saying what is wrong where that fails.

For the tests, another build of the core: MRVAE_CORE=/path/to/_C.so loads that file in its place, whatever it was built
for.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

REBUILD = "pip install --no-build-isolation --force-reinstall --no-deps ."
"""Run in the project's folder: builds against the torch that is installed."""

NAMES = ("Bank", "GatedFold", "HostedLayer", "Stage", "build_facts", "run_sequential")
OPERATORS = ("gates", "fold", "epilogue", "sampled_epilogue", "sampled_epilogue_backward", "gated_linear")
"""What the package uses of mrvae_kernels._C and of torch.ops.mrvae, by which a core of other sources is known: an
editable install may have newer Python code than its extension."""

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
    if other := os.environ.get("MRVAE_CORE"):
        return _load_file(other)
    facts = record()
    if importlib.util.find_spec("mrvae_kernels._C") is None:
        reason = f": {facts['error']}" if "error" in facts else ""
        return f"the C++ core is not built{reason}; with a C++ compiler installed, run: {REBUILD}"
    built_for = facts.get("torch", "")
    if built_for and public_version(built_for) != public_version(torch.__version__):
        return f"the C++ core was built for torch {built_for}, and this is torch {torch.__version__}; run: {REBUILD}"
    if wrong := cuda_mismatch(facts.get("cuda", ""), torch.version.cuda):
        return f"the C++ core was built {wrong}; run: {REBUILD}"
    try:
        core = importlib.import_module("mrvae_kernels._C")
    except ImportError as error:
        origin = f"built for torch {built_for}" if built_for else "built for an unknown torch"
        return f"the C++ core, {origin}, cannot be loaded with torch {torch.__version__} ({error}); run: {REBUILD}"
    known = all(hasattr(core, name) for name in NAMES) and all(hasattr(torch.ops.mrvae, name) for name in OPERATORS)
    if not known:
        return f"the C++ core was built from older sources than this package's; run: {REBUILD}"
    _loaded = True
    return None


def cuda_mismatch(built: str, here: str | None) -> str | None:
    """Why a core that was built with this version of CUDA, "" for none, does not load into a torch with that one."""
    if not built or (here and here.partition(".")[0] == built.partition(".")[0]):
        return None
    has = f"has CUDA {here}, another major version" if here else "is a build without CUDA"
    return f"with CUDA {built}, and this torch {torch.__version__} {has}"


def _load_file(path: str) -> str | None:
    """load() for the module in this file."""
    global _loaded
    name = "mrvae_kernels._C"
    loader = importlib.machinery.ExtensionFileLoader(name, path)
    spec = importlib.util.spec_from_loader(name, loader)
    assert spec is not None
    try:
        module = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
    except ImportError as error:
        return f"MRVAE_CORE is {path}, which cannot be loaded ({error}); unset it"
    sys.modules[name] = module
    sys.modules["mrvae_kernels"].__dict__["_C"] = module
    _loaded = True
    return None


def build_facts() -> dict[str, str]:
    """What the loaded extension is made of; RuntimeError without one.

    torch, compiler, flags, commit; and cuda, architectures, nvcc_flags, which are "" where it has no CUDA kernels.
    """
    require()
    return dict(importlib.import_module("mrvae_kernels._C").build_facts())


def cuda_error() -> str | None:
    """None where the loaded extension has CUDA kernels, otherwise why there are none, and the command to run."""
    if not _loaded:
        return "they are part of the C++ core, which is missing"
    if build_facts().get("cuda"):
        return None
    if os.environ.get("MRVAE_CORE"):
        return "the core that MRVAE_CORE names was built without them; unset it"
    return record().get("cuda_error") or f"it was built without them; run: MRVAE_CUDA=1 {REBUILD}"


def gpu_type() -> str | None:
    """torch's type of the GPU tensors that the loaded extension has kernels for; the test shim takes the CPU's."""
    cuda = build_facts().get("cuda") if _loaded else None
    return {"shim": "cpu"}.get(cuda, "cuda") if cuda else None


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

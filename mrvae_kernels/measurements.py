"""What was measured on a device: which strategy and which backend won, by shape class; a table, and the user's own.

A record is one JSON file a device,

    {"device": "NVIDIA H200", "versions": {...},
     "backends": {"gates": {"reference": 3.0, "triton": 2.0}, "fold": ..., "epilogue": ...},
     "strategies": {"linear float32 shared 7 9 10": {"fold": 3, "epilogue": 2, "fused": 1}}}

whose numbers are times relative to anything that is the same within one entry: the smallest wins. Records that come
with the package lie in mrvae_kernels/measured/, those of `mrvae_kernels.tune` in the user's cache folder, and win over
them. Without an entry nothing is known, and the caller keeps to its cost model and to plain PyTorch.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

Times = dict[str, float]
Record = dict[str, dict[str, Times]]

SECTIONS = ("backends", "strategies")
SHIPPED = Path(__file__).parent / "measured"


def cache_folder() -> Path:
    """MRVAE_CACHE, or the platform's folder for caches with /mrvae_kernels."""
    if chosen := os.environ.get("MRVAE_CACHE"):
        return Path(chosen)
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "mrvae_kernels"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "mrvae_kernels"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mrvae_kernels"


@functools.cache
def device_name(device: torch.device) -> str:
    """The device as records name it, such as "NVIDIA H200"; its type where there is no name to ask for."""
    if device.type not in ("cuda", "xpu") or not torch.get_device_module(device).is_available():
        return device.type
    return str(torch.get_device_module(device).get_device_name(device))


def file_name(name: str) -> str:
    """A record's file by its device's name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") + ".json"


def shape_class(operation: str, numbers: str, per_sample: bool, rows: int, columns: int, terms: int) -> str:
    """The class of a product with rows x columns results of `terms` terms each: its sizes as rounded logarithms.

    numbers: the dtype's name, or "tf32" for float32 tensors multiplied so.
    """
    sizes = (round(math.log2(max(1, size))) for size in (rows, columns, terms))
    return " ".join((operation, numbers, "per-sample" if per_sample else "shared", *map(str, sizes)))


def best_strategy(device: torch.device, key: str) -> str | None:
    """The strategy that won for this shape class on this device; None where it was not measured."""
    times = records(device)["strategies"].get(key)
    return min(times, key=times.__getitem__) if times else None


def best_backend(device: torch.device, operator: str) -> str | None:
    """The backend that won for "gates", "fold" or "epilogue" on this device; None where it was not measured."""
    times = records(device)["backends"].get(operator)
    return min(times, key=times.__getitem__) if times else None


@functools.cache
def records(device: torch.device) -> Record:
    """Everything known of the device: the package's record, and the user's over it; read once."""
    name = file_name(device_name(device))
    known: Record = {section: {} for section in SECTIONS}
    for folder in (SHIPPED, cache_folder()):
        for section, entries in read(folder / name).items():
            known[section].update(entries)
    return known


def read(path: Path) -> Record:
    """A record's sections; empty for a file that is not there, and with a warning for one that is no record."""
    try:
        content = json.loads(path.read_text())
        return {section: {str(key): _times(value) for key, value in content.get(section, {}).items()}
                for section in SECTIONS}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        warnings.warn(f"{path} is not a record of measurements ({error}) and is left alone; delete it", stacklevel=2)
        return {}


def _times(value: Any) -> Times:
    times = {str(name): float(time) for name, time in value.items()}
    if not all(0 < time < math.inf for time in times.values()):
        raise ValueError(f"times are {times}; expected positive numbers")
    return times


def write(path: Path, device: str, versions: Mapping[str, str], found: Record) -> None:
    """Merge `found` into the record at `path`, whole or not at all; what another process wrote meanwhile stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    merged = {section: {**read(path).get(section, {}), **found.get(section, {})} for section in SECTIONS}
    content = {"device": device, "versions": dict(versions), **merged}
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".json")
    with os.fdopen(handle, "w") as file:
        json.dump(content, file, indent=1, sort_keys=True)
        file.write("\n")
    os.replace(temporary, path)
    records.cache_clear()

"""What was measured on a device: which strategy and which backend won, by shape class; a table, and the user's own.

A record is one JSON file a device,

    {"device": "NVIDIA H200", "versions": {"torch": "2.11.0", "triton": "3.6.0"},
     "backends": {"gates": {"reference": 3.0, "triton": 2.0}, "fold": ..., "epilogue": ...},
     "strategies": {"linear float32 shared 7 9 10": {"fold": 3, "epilogue": 2, "fused": 1}}}

whose numbers are times relative to anything that is the same within one entry: the smallest wins. Records that come
with the package lie in mrvae_kernels/measured/, those of `mrvae_kernels.tune` in the user's cache folder, and win over
them. Without an entry nothing is known, and the caller keeps to its cost model and to plain PyTorch. Another version of
torch or Triton (major.minor) has other times: a record made with one counts as empty, and the next one replaces it.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import math
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .triton_kernels.cache import cache_folder, locked, write_json

Times = dict[str, float]
Record = dict[str, dict[str, Times]]

SECTIONS = {"backends": ("cpp", "triton", "reference"), "strategies": ("fold", "epilogue", "fused")}
"""A record's sections, and whose times their entries hold."""

MARGIN = 0.05
"""How much less than plain PyTorch's time a backend must take: the last tuned network decides for all of them."""

TRITON_DISTRIBUTIONS = ("triton", "pytorch-triton", "pytorch-triton-rocm", "pytorch-triton-xpu", "triton-windows")
SHIPPED = Path(__file__).parent / "measured"

generation = 0
"""Increased when this process writes a record: what was chosen before may be chosen otherwise now."""


@functools.cache
def triton_version() -> str | None:
    """The installed Triton's version, without importing it; None where no distribution tells."""
    for name in TRITON_DISTRIBUTIONS:
        try:
            return importlib.metadata.version(name)
        except Exception:  # not there, or with damaged metadata: nothing that a forward pass may fail of
            continue
    return None


def installed_versions() -> dict[str, str | None]:
    """What times depend on besides the device."""
    return {"torch": str(torch.__version__), "triton": triton_version()}


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


def strategy_times(device: torch.device, key: str) -> Times:
    """Times of the strategies for this shape class on this device; empty where it was not measured."""
    return records(device)["strategies"].get(key, {})


def best_backend(device: torch.device, operator: str) -> str | None:
    """The backend that won for "gates", "fold", "epilogue" or "fused" on this device; None where none was measured."""
    times = records(device)["backends"].get(operator, {})
    if operator == "fused":  # plain PyTorch has none, and is no measure
        return min(times, key=times.__getitem__, default=None)
    return winner(times)


def winner(times: Times) -> str | None:
    """The fastest backend if it beats "reference" by MARGIN, else "reference"; None without a time to compare with."""
    if "reference" not in times:
        return None
    best = min(times, key=times.__getitem__)
    return best if times[best] <= (1 - MARGIN) * times["reference"] else "reference"


@functools.cache
def records(device: torch.device) -> Record:
    """Everything known of the device: the package's record, and the user's over it; read once."""
    name = file_name(device_name(device))
    known: Record = {section: {} for section in SECTIONS}
    for folder in (SHIPPED, cache_folder()):
        if folder is not None:
            for section, entries in read(folder / name).items():
                known[section].update(entries)
    return known


def read(path: Path, warn: bool = True) -> Record:
    """A record's sections, without names that this version does not know.

    Empty for a file that is not there, for one of other versions, and, with a warning, for one that is no record.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        made_with = content["versions"]
        if any(_differ(made_with.get(name), version) for name, version in installed_versions().items()):
            return {}
        found: Record = {section: {} for section in SECTIONS}
        for section, names in SECTIONS.items():
            for key, value in content.get(section, {}).items():
                if times := _times(value, names):
                    found[section][key] = times
        return found
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, TypeError, AttributeError, LookupError, OverflowError, RecursionError) as error:
        if warn:
            message = f"{path} is not a record of measurements, is ignored, and replaced when there are new ones"
            warnings.warn(f"{message} ({type(error).__name__}: {error})", stacklevel=2)
        return {}


def _differ(recorded: object, present: str | None) -> bool:
    """Whether major.minor differ; a version that cannot be told now does not."""
    return present is not None and str(recorded).split(".")[:2] != present.split(".")[:2]


def _times(value: Any, names: tuple[str, ...]) -> Times:
    times = {name: float(time) for name, time in value.items() if name in names}
    if not all(0 < time < math.inf for time in times.values()):
        raise ValueError(f"times are {times}; expected positive numbers")
    return times


def write(path: Path, device: str, versions: Mapping[str, str | None], found: Record) -> None:
    """Merge `found` into the record at `path`, whole or not at all; what another process wrote meanwhile stays.

    versions: in place of `installed_versions()`. From then on this process follows the record. OSError where
    the folder is not writable.
    """
    global generation
    with locked(path):
        known = read(path, warn=False)
        merged = {section: {**known.get(section, {}), **found.get(section, {})} for section in SECTIONS}
        write_json(path, {"device": device, "versions": {**installed_versions(), **versions}, **merged}, indent=1)
    records.cache_clear()
    generation += 1

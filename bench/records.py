"""Result files: what was measured, on which machine, by which commit and command, with the raw timings.

    {"what": "overhead", "machine": {...}, "command": [...], "results": [...]}

Results of different machines are never mixed: `kind` names what a time depends on, and files are compared, and put
into one table, only where their kinds are equal.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch

import mrvae_kernels
from mrvae_kernels import ops
from mrvae_kernels.measurements import installed_versions

RESULTS = Path(__file__).parent / "results"
TIME_UP = "the time is up"
"""How a series of growth begins to say that it ended for lack of time."""


class Record(NamedTuple):
    """A result file: what ("overhead", "growth", ...), the machine, the command's arguments, and the measurements."""

    what: str
    machine: dict[str, Any]
    command: list[str]
    results: list[dict[str, Any]]

    @property
    def kind(self) -> str:
        """The machine's kind: the GPU's name, or the CPU's with the number of threads."""
        return str(self.machine["kind"])


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], capture_output=True, text=True, cwd=Path(__file__).parent, check=False
    )
    return done.stdout.strip()


def machine(device: torch.device | str = "cpu") -> dict[str, Any]:
    """What a result depends on: commit, versions, device and its kind."""
    device = torch.device(device)
    commit = _git("describe", "--always")
    # not the results themselves, which are written while a benchmark runs
    if _git("status", "--porcelain", "--untracked-files=no", "--", "..", ":(exclude,top)bench/results"):
        commit += "-dirty"
    cpu = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), cpu)
    threads = torch.get_num_threads()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu
    return {
        "commit": commit or "unknown", "date": datetime.date.today().isoformat(),
        "mrvae_kernels": mrvae_kernels.__version__, "extension": ops.EXTENSION, **installed_versions(),
        "torch": torch.__version__, "python": platform.python_version(), "device": device.type, "name": name,
        "cpu": cpu, "cores": os.cpu_count(), "threads": threads,
        "kind": name if device.type == "cuda" else f"{name}, {threads} threads",
    }


def write(path: Path, what: str, results: list[dict[str, Any]], device: torch.device | str = "cpu") -> None:
    """The result file at `path`, whole or not at all."""
    record = {"what": what, "machine": machine(device), "command": sys.argv[1:], "results": results}
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(record))
    os.replace(part, path)


def read(path: Path, what: str | None = None) -> Record:
    """The file's record. ValueError for a file that is none, or that measured something else than `what`."""
    try:
        record = Record(**json.loads(path.read_text()))
        if not isinstance(record.machine["kind"], str):
            raise TypeError("the machine's kind is no text")
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is no result file of these benchmarks: {type(error).__name__}: {error}") from None
    if what is not None and record.what != what:
        raise ValueError(f"{path} holds {record.what!r}; expected a result file of {what!r}")
    return record

"""How much memory is left, and a refusal before it runs out."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from .errors import DataError

USABLE = 0.9
"""Part of what is available that a data set may take; the rest is for the network and the batches."""

CGROUP = Path("/sys/fs/cgroup")
MEMINFO = Path("/proc/meminfo")


def available() -> int | None:
    """Bytes that can still be taken without swapping, of the machine and of a container's limit; None if unknown."""
    found = []
    with contextlib.suppress(OSError, ValueError, StopIteration, IndexError):
        line = next(line for line in MEMINFO.read_text().splitlines() if line.startswith("MemAvailable:"))
        found.append(1024 * int(line.split()[1]))
    with contextlib.suppress(OSError, ValueError):  # "max" is no number: no limit
        limit, used = (int((CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        counts = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        found.append(limit - used + int(counts.get("inactive_file", 0)))  # a cache of files gives way
    if not found and hasattr(os, "sysconf"):
        with contextlib.suppress(OSError, ValueError):
            found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return max(0, min(found)) if found else None


def check_memory(needed: int, origin: str, remedy: str) -> None:
    """DataError when `needed` bytes are more than USABLE of what is available."""
    left = available()
    if left is not None and needed > USABLE * left:
        raise DataError(
            f"{origin}: needs {needed / 1e9:.3g} GB of memory and {left / 1e9:.3g} GB are available, of which data may "
            f"take {USABLE:.0%}; free some, use a larger machine, or {remedy}"
        )

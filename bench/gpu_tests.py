"""Runs test files side by side, each in a pytest of its own: `python -m bench.gpu_tests tests/ops tests/test_gpu.py`.

So that Triton compiles on all cores, and one file that brings the device down takes no other with it. A file's output
comes in one piece when it ends. Files that are not done when the time is up are killed and named. The exit code is 1
unless each file passes.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from .gpu_processes import limited

NOTHING_LEFT = 5
"""pytest's exit code where no test remains after -m."""
SHOWN = 8000
"""Characters of a file's output, from its end."""


def files(paths: Sequence[Path]) -> list[Path]:
    """The test files among and below these, in the order given. FileNotFoundError for a path without any."""
    found: list[Path] = []
    for path in paths:
        below = sorted(path.rglob("test_*.py")) if path.is_dir() else [path]
        if not below or not below[0].exists():
            raise FileNotFoundError(f"{path}: there is no test file")
        found += below
    return list(dict.fromkeys(found))


def run(path: Path, marker: str, deadline: float) -> tuple[bool, str]:
    """Whether the file passes, and its output."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-rs", "-m", marker, str(path)]
    left = deadline - time.monotonic()
    if left <= 0:
        return False, "not begun: the time was up"
    # torch's threads would be as many as there are cores in each of the processes
    code, said = limited(command, left, {"OMP_NUM_THREADS": "1"})
    if code is None:
        return False, f"{said[-SHOWN:]}\nnot finished: the time was up"
    return code in (0, NOTHING_LEFT), said[-SHOWN:].strip()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_tests", description=__doc__)
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="test files, and folders of them")
    parser.add_argument("-m", dest="marker", default="not ahead_of_time",
                        help="which tests, as pytest's -m (default 'not ahead_of_time')")
    parser.add_argument("--seconds", type=float, default=200, help="kill what still runs after this long (default 200)")
    parser.add_argument("--jobs", type=int, default=min(12, os.cpu_count() or 1),
                        help="files at once (default: one a core, 12 at most)")
    options = parser.parse_args(arguments)
    deadline, failed, chosen = time.monotonic() + options.seconds, [], files(options.paths)
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        futures = {pool.submit(run, path, options.marker, deadline): path for path in chosen}
        for future in concurrent.futures.as_completed(futures):
            passed, output = future.result()
            print(f"---- {futures[future]}\n{output}", flush=True)
            if not passed:
                failed.append(f"{futures[future]}: {output.rpartition(chr(10))[2]}")
    print(f"\n{len(chosen) - len(failed)} of {len(chosen)} test files pass", *sorted(failed), sep="\n  ")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

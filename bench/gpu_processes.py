"""Programs with a time limit that ends their children too, which would disturb the timings that follow."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence


def limited(
    command: Sequence[str], seconds: float, environment: Mapping[str, str] | None = None
) -> tuple[int | None, str]:
    """The program's exit code, None if its time was up, and what it and its children printed.

    environment: in addition to this process's.
    """
    process = subprocess.Popen(
        command, env={**os.environ, **(environment or {})}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace", start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        return None, output
    except BaseException:  # as when interrupted: its session hears nothing of the terminal's
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, output

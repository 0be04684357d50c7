"""The user's cache folder, and files in it that several processes write.

Imports nothing but Python's own modules, so that what only reads records does not import triton.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import sys
from collections.abc import Iterator
from pathlib import Path


def cache_folder() -> Path | None:
    """$MRVAE_CACHE, else mrvae_kernels in the platform's folder for caches; None without a home.

    A relative XDG_CACHE_HOME is ignored, as the XDG base directory specification says.
    """
    if chosen := os.environ.get("MRVAE_CACHE"):
        return Path(chosen)
    variable, default = {
        "win32": ("LOCALAPPDATA", "AppData/Local"), "darwin": ("", "Library/Caches"),
    }.get(sys.platform, ("XDG_CACHE_HOME", ".cache"))
    folder = Path(os.environ.get(variable, ""))
    if not folder.is_absolute():
        try:
            folder = Path.home() / default
        except RuntimeError:
            return None
    return folder / "mrvae_kernels"


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time for the file at `path`, beside which a .lock file stays; makes the folder.

    Where the system or the file system has no locks, the block runs without. OSError where the folder is not writable.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".lock"), "w") as file:
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def write_json(path: Path, document: object, indent: int = 0) -> None:
    """The document as the file's whole content, or, after an error, nothing: readers never see half of it."""
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
    try:
        # not tempfile, whose files nobody else may read: the folder may be shared, and the umask decides
        with open(temporary, "x", encoding="utf-8") as file:
            json.dump(document, file, indent=indent)
            file.write("\n")
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        raise

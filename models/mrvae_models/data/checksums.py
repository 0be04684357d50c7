"""SHA-256 of the arrays of a public set, kept at the first load, so that a later load cannot differ unnoticed."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from .checks import DataError, Raw
from .splits import Sets

FILE = "checksums.json"
HASHED = 4096
"""Examples hashed at a time: images need not lie in order in memory, and no copy of them all is made."""


def remembered(sets: Sets, name: str, source: str, record: Path) -> Sets:
    """The same sets, each held at every reading to what it was at its first one, as `record` has it.

    source: where they come from; the same name from elsewhere may be other arrays.
    """

    def reader(split: str, read: Callable[[], Raw]) -> Callable[[], Raw]:
        def read_and_compare() -> Raw:
            raw = read()
            _compare(raw, key_of(name, source, split, raw), record)
            return raw

        return read_and_compare

    return {split: reader(split, read) for split, read in sets.items()}


def key_of(name: str, source: str, split: str, raw: Raw) -> str:
    shape = "x".join(map(str, raw.images.shape[1:]))
    return f"{name} [{split}] {shape} from {source}"


def sha256(raw: Raw) -> str:
    """Over type, shape and values of the images, and of the labels and factors where there are some."""
    digest = hashlib.sha256()
    arrays = [raw.images, raw.labels, None if raw.factors is None else raw.factors.classes]
    for array in arrays:
        if array is None:
            continue
        digest.update(f"{array.dtype.str} {array.shape};".encode())
        for start in range(0, len(array), HASHED):
            digest.update(np.ascontiguousarray(array[start : start + HASHED]).data)
    return digest.hexdigest()


def entries(record: Path) -> dict[str, Any]:
    """What is kept; DataError for a file that is no such record."""
    try:
        content = json.loads(record.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise DataError(f"{record}: cannot be read ({error}); remove it, and it is made anew") from error
    if not isinstance(content, dict) or not all(isinstance(e, dict) and "sha256" in e for e in content.values()):
        raise DataError(f"{record}: holds no checksums; remove it, and it is made anew")
    return content


def _compare(raw: Raw, key: str, record: Path) -> None:
    kept, found = entries(record), sha256(raw)
    if key not in kept:
        today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
        _write(record, {**kept, key: {"sha256": found, "examples": len(raw.images), "first_load": today}})
    elif kept[key]["sha256"] != found:
        raise DataError(
            f"{raw.origin}: its arrays have SHA-256 {found[:16]}... and had {kept[key]['sha256'][:16]}... at the first "
            f"load, {kept[key].get('first_load')} ({kept[key].get('examples')} examples, now {len(raw.images)}): the "
            f"files have changed; restore them, or, if that was meant, remove the entry {key!r} from {record}"
        )


def _write(record: Path, content: dict[str, Any]) -> None:
    temporary = record.with_name(f".{record.name}.{os.getpid()}")  # several processes load at once
    try:
        record.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        temporary.replace(record)
    except OSError as error:
        warnings.warn(f"{record}: cannot be written ({error}); later loads are not compared with it", stacklevel=5)

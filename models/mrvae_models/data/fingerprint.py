"""Whether data are those that a run was trained on: their number, and a hash of some of them (not of every one).

A split is a permutation of as many examples as there are. Of a set with one image more all splits are others, and the
test split of now holds images that the run was trained on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

EXAMPLES = 64
"""Hashed of a set, evenly spread over it: a change of order is seen in most of them."""

Fingerprints = dict[str, dict[str, Any]]
"""Part of a source ("all", where it is not divided) -> examples and sha256, as a run's files have it."""


class Fingerprint(NamedTuple):
    """Of the part of a source that a split was taken from, before anything was drawn, cut or converted."""

    part: str
    examples: int
    sha256: str


def fingerprint(part: str, examples: Any) -> Fingerprint:
    """Of the examples of a Raw: an array, what is indexed like one, or documents as lists of tokens."""
    n = len(examples)
    rows = np.unique(np.linspace(0, n - 1, min(n, EXAMPLES)).astype(np.int64))
    some = examples[rows]
    if some.dtype == object:
        data = "\n".join(" ".join(document) for document in some).encode()
    else:
        data = f"{some.shape[1:]} {some.dtype}".encode() + np.ascontiguousarray(some).tobytes()
    return Fingerprint(part, n, hashlib.sha256(data).hexdigest())


def recorded(sources: Iterable[Fingerprint | None]) -> Fingerprints:
    """What is written to a run's files."""
    return {source.part: {"examples": source.examples, "sha256": source.sha256} for source in sources if source}


def change(before: Mapping[str, Any], now: Fingerprint | None, split: str) -> str | None:
    """What has changed since of the data that a split is of, in words; None where nothing has, or where nothing was
    recorded. Of a test set of its own nothing is."""
    if now is None or not before:
        return None
    found = before.get(now.part)
    divided = found is None and (split != "test" or "all" in before or now.part == "all")
    if divided or (split == "validation" and split in before and now.part != split):
        return f"another division into sets, its {split} examples being of {now.part!r}"
    if found is None or (found["examples"], found["sha256"]) == (now.examples, now.sha256):
        return None
    if found["examples"] != now.examples:
        return f"{now.examples} examples in place of {found['examples']}"
    return f"others among its {now.examples} examples, or another order"

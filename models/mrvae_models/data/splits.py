"""Which examples are train, validation and test."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .checks import DataError, Raw

SPLITS = ("train", "validation", "test")
NAMES = {
    "train": "train", "training": "train", "validation": "validation", "valid": "validation", "val": "validation",
    "test": "test", "testing": "test", "t10k": "test",
}  # fmt: skip

Sets = dict[str, Callable[[], Raw]]
"""The sets of a source, read when called: some of "train", "validation", "test", or "all" for one undivided set."""


def choose(sets: Sets, split: str, seed: int, origin: str) -> tuple[Raw, np.ndarray]:
    """The raw set that holds `split`, and the indices of `split` in it, shuffled.

    A set of that name is taken whole. A missing validation set is a tenth of train. A source of one set gives a tenth
    each to validation and test; "all" is that set, undivided and in its own order.
    """
    if split == "all":
        if set(sets) != {"all"}:
            raise DataError(f"{origin}: holds {', '.join(sorted(sets))}; split 'all' is for a set that is not divided")
        raw = sets["all"]()
        return raw, np.arange(len(raw.images))
    if len(sets) == 1:
        raw = next(iter(sets.values()))()
        parts = _parts(raw, seed, {"test": 1, "validation": 1})
        return raw, parts[split]
    if split in ("train", "validation") and "validation" not in sets and "train" in sets:
        raw = sets["train"]()
        return raw, _parts(raw, seed, {"validation": 1})[split]
    if split not in sets:
        raise DataError(f"{origin}: no {split} set, only {', '.join(sorted(sets))}; expected one, or one undivided set")
    raw = sets[split]()
    return raw, _parts(raw, seed, {})["train"]


def check_seed(seed: int) -> None:
    if not 0 <= seed < 2**32:
        raise DataError(f"seed is {seed}; expected a whole number from 0 to {2**32 - 1}")


def _parts(raw: Raw, seed: int, tenths: dict[str, int]) -> dict[str, np.ndarray]:
    n = len(raw.images) if raw.images.ndim else 0
    if n <= len(tenths):
        raise DataError(
            f"{raw.origin}: {n} example{'s' * (n != 1)}: {'the set is empty' if n == 0 else 'too few to split'}; "
            f"expected at least {len(tenths) + 1}"
        )
    # RandomState's stream is frozen by NumPy's policy, so a seed means the same split under every version.
    order = np.random.RandomState(seed).permutation(n)
    parts, taken = {}, 0
    for name, count in tenths.items():
        size = max(1, count * n // 10)
        parts[name] = order[taken : taken + size]
        taken += size
    return parts | {"train": order[taken:]}

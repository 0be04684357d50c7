"""Which examples are train, validation and test."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from .checks import DataError, Raw

SPLITS = ("train", "validation", "test")
NAMES = {
    "train": "train", "training": "train", "validation": "validation", "valid": "validation", "val": "validation",
    "test": "test", "testing": "test", "t10k": "test",
}  # fmt: skip

Sets = dict[str, Callable[[], Raw]]
"""The sets of a source, read when called: some of "train", "validation", "test", or "all" for one undivided set."""


class Chosen(NamedTuple):
    """The raw set that holds a split, the indices of the split in it, shuffled, and what the set is called."""

    raw: Raw
    kept: np.ndarray
    part: str


def choose(sets: Sets, split: str, seed: int, origin: str) -> Chosen:
    """Where a split is taken from.

    A set of that name is taken whole. A missing validation set is a tenth of train. A source of one set gives a tenth
    each to validation and test; "all" is that set, undivided and in its own order. Where examples come in groups, no
    group is in two parts; see `_whole_groups`.
    """
    if split == "all":
        if set(sets) != {"all"}:
            raise DataError(f"{origin}: holds {', '.join(sorted(sets))}; split 'all' is for a set that is not divided")
        raw = sets["all"]()
        return Chosen(raw, np.arange(len(raw.images)), "all")
    if len(sets) == 1:
        ((part, read),) = sets.items()
        raw = read()
        return Chosen(raw, _parts(raw, seed, {"test": 1, "validation": 1})[split], part)
    if split in ("train", "validation") and "validation" not in sets and "train" in sets:
        raw = sets["train"]()
        return Chosen(raw, _parts(raw, seed, {"validation": 1})[split], "train")
    if split not in sets:
        instead = ", or where a command takes it, --split validation" if split == "test" else ""
        raise DataError(
            f"{origin}: no {split} set, only {', '.join(sorted(sets))}; expected one, or one undivided set{instead}"
        )
    raw = sets[split]()
    return Chosen(raw, _parts(raw, seed, {})["train"], split)


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
    random = np.random.RandomState(seed)
    if raw.groups is not None and tenths:
        members = _whole_groups(raw.groups, raw.origin, random, tenths)
        return {name: random.permutation(np.flatnonzero(mask)) for name, mask in members.items()}
    order = random.permutation(n)
    parts, taken = {}, 0
    for name, count in tenths.items():
        size = max(1, count * n // 10)
        parts[name] = order[taken : taken + size]
        taken += size
    return parts | {"train": order[taken:]}


def _whole_groups(
    groups: np.ndarray, origin: str, random: np.random.RandomState, tenths: dict[str, int]
) -> dict[str, np.ndarray]:
    """Masks (N,) of the parts, each group in one part: patches of a photograph that was trained on are no test.

    Groups come in an order drawn by `random`. A part takes the next one as long as it has fewer than its `tenths` of
    the examples, but none that would bring it above twice that; where none is small enough, the smallest that is left.
    The rest is train. Groups differ in size, so a part's size is near a tenth, and seldom a tenth.
    """
    names, of, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    if len(names) <= len(tenths):
        raise DataError(
            f"{origin}: its {len(groups)} examples are from {len(names)} source{'s' * (len(names) != 1)}; expected at "
            f"least {len(tenths) + 1}, one each for train, {' and '.join(tenths)}, as no source is in two of them: "
            "add some, give arrays for each split, or leave the sources out to split by row"
        )
    left = [int(group) for group in random.permutation(len(names))]
    members: dict[str, list[int]] = {}
    for name, count in tenths.items():
        wanted, chosen, taken = max(1, count * len(groups) // 10), [], 0
        for group in list(left):
            after = len(left) - 1 >= len(tenths) - len(members)  # a group each for the parts to come, and for train
            if taken < wanted and after and taken + sizes[group] <= 2 * wanted:
                left.remove(group)
                chosen.append(group)
                taken += sizes[group]
        if not chosen:
            chosen = [min(left, key=lambda group: sizes[group])]
            left.remove(chosen[0])
        members[name] = chosen
    return {name: np.isin(of, chosen) for name, chosen in {**members, "train": left}.items()}

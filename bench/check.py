"""Compares two result files of one kind of machine: `python -m bench.check BEFORE AFTER`.

Compared are ratios to the ungated network (or the library's layer), never times: a machine that is slower today slows
both down. For each entry and variant the change is

    d = median over AFTER's rounds of log(variant / baseline) - the same of BEFORE

with a standard error from resampling the rounds of both files, and from how far the variants moved that this package's
code has no part in (listing1, plain-fold): two runs of one program differ by more than their rounds show. All intervals
together hold with 99 % confidence (Bonferroni, Student's t). A slowdown is real where one of our variants has a d above
2 % and an interval above 0. The geometric means over a mode's entries are compared likewise: they show a small slowdown
of everything that no entry shows by itself.

How small a slowdown is seen depends on an entry's rounds and their noise: with 20 rounds on a CPU some 5 to 15 % of an
entry, and less of a mean; with the five rounds that the longest entries get it may take a factor of two, or of five.
The last lines say what it is for these files. An entry of which a slowdown by 20 % would not be seen is named "too
uncertain to say": that it is not listed as slower means nothing.

Exit code 0: no slowdown; 1: a slowdown, or an entry that BEFORE has and AFTER has not, without saying why; 2: something
was not compared: everything, as when the machines are of different kinds, or entries that AFTER left out, as when its
time was up; 3: most entries are too uncertain to say.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from . import records
from .check_statistics import Difference, difference, mean, reach, run_to_run
from .records import TIME_UP, Record

IDENTITY = {
    "overhead": ("case", "batch", "mode", "numbers"),
    "growth": ("case", "axis", "value", "mode", "numbers"),
    "layers": ("network", "layer", "batch", "dtype", "device", "direction"),
}
"""What tells the entries of a file apart."""

SIZES = ("case", "batch", "axis", "value", "network", "layer")
"""Parts of an identity that a geometric mean runs over."""

CONFIDENCE = 0.99
MINIMUM = math.log(1.02)
"""A smaller change of the logarithm fails nothing."""
CONTROLS = ("listing1", "listing1 compiled", "plain-fold", "separate", "separate per-sample")
"""Variants in plain PyTorch: never slower by this package's doing, and so the measure of what a run is by chance."""
FEWEST = 5
"""Rounds below which nothing is said about an entry."""
TOO_MUCH = 1.2
"""An entry of which only a slowdown above this would be seen is too uncertain to say anything about."""

Key = tuple[Any, ...]
Times = Mapping[str, Sequence[float]]


class Change(NamedTuple):
    """A variant's ratio over what it was: 1.05 is 5 % slower; low and high hold for all comparisons at once."""

    label: str
    ratio: float
    low: float
    high: float

    @property
    def slower(self) -> bool:
        return math.log(self.ratio) > MINIMUM and self.low > 1

    @property
    def seen(self) -> float:
        """The least ratio that would have been called slower."""
        return max(math.exp(MINIMUM), self.ratio / self.low)

    def __str__(self) -> str:
        return f"{self.label}: {self.ratio:.3f} ({self.low:.3f} to {self.high:.3f}) of what it was"


class Comparison(NamedTuple):
    """Changes of our entries, of their geometric means and of the controls; the standard deviation between two runs;
    the labels of what vanished, is new, or has too few rounds, and of what AFTER left out, with its reason."""

    entries: list[Change]
    means: list[Change]
    controls: list[Change]
    between: float
    vanished: list[str]
    new: list[str]
    undecided: list[str]
    left_out: list[str]

    @property
    def slower(self) -> list[Change]:
        return [change for change in (*self.means, *self.entries) if change.slower]

    @property
    def uncertain(self) -> list[Change]:
        return [change for change in self.entries if change.seen > TOO_MUCH and not change.slower]


def baseline(times: Times) -> str:
    """What the other variants of an entry are held against. ValueError where the entry has no such variant."""
    for name in ("ungated", "plain", "library"):
        if name in times:
            return name
    raise ValueError(f"an entry has times of {', '.join(times) or 'nothing'}; expected ungated, plain or library too")


def entries_of(record: Record) -> dict[Key, Times]:
    """The timed entries by identity. ValueError for files that are not compared, and for two of one identity."""
    if record.what not in IDENTITY:
        raise ValueError(f"a file of {record.what!r} has no ratios to compare; expected {', '.join(IDENTITY)}")
    found: dict[Key, Times] = {}
    for result in record.results:
        times = result.get("seconds")
        if times:
            key = tuple(result.get(name) for name in IDENTITY[record.what])
            if key in found:
                raise ValueError(f"two entries of {_label(record.what, key)}; expected one")
            found[key] = times
    return found


def left_out(record: Record, key: Key) -> str | None:
    """Why the run had no time or no place for an entry, as its file says; None where it does not, or something broke.

    A series of growth whose time was up had none for the sizes after that either.
    """
    place = dict(zip(IDENTITY[record.what], key, strict=True))
    for result in record.results:
        differs = {name for name, value in place.items() if result.get(name) != value}
        if not differs and result.get("left_out") and not result.get("failed") and not result.get("refused"):
            return str(result["left_out"])
        ended = result.get("ended")
        if ended and ended.startswith(TIME_UP) and differs <= {"value"} and place["value"] >= result["value"]:
            return str(ended)
    return None


def _label(what: str, key: Key) -> str:
    parts = zip(IDENTITY[what], key, strict=True)
    return " ".join(f"batch {value}" if name == "batch" else str(value) for name, value in parts if value is not None)


def log_ratios(times: Times, variant: str) -> np.ndarray:
    """log(variant / baseline) of every round. ValueError for rounds that do not pair up and for times that are none."""
    ours, theirs = times[variant], times[baseline(times)]
    if len(ours) != len(theirs):
        raise ValueError(f"{variant} has {len(ours)} rounds and {baseline(times)} {len(theirs)}; expected as many")
    if wrong := [t for t in (*ours, *theirs) if not 0 < t < math.inf]:
        raise ValueError(f"{variant} or {baseline(times)} took {wrong[0]} s; expected positive, finite times")
    return np.log(np.asarray(ours, float)) - np.log(np.asarray(theirs, float))


def _changes(found: Mapping[str, Difference], between: float, comparisons: int) -> list[Change]:
    changes = []
    for label, moved in found.items():
        length = reach(moved, between, 1 - (1 - CONFIDENCE) / max(1, comparisons))
        changes.append(Change(label, *map(math.exp, (moved.value, moved.value - length, moved.value + length))))
    return changes


def compare(before: Record, after: Record) -> Comparison:
    """What changed. ValueError for files of different machines or measurements."""
    if before.what != after.what:
        raise ValueError(f"the files hold {before.what!r} and {after.what!r}; expected two of one measurement")
    if before.kind != after.kind:
        raise ValueError(
            f"the files are of different machines, {before.kind!r} and {after.kind!r}: their ratios do not compare; "
            "measure both on one"
        )
    old, new = entries_of(before), entries_of(after)
    what = before.what
    known = {(key, variant) for key, times in old.items() for variant in times}
    here = {(key, variant) for key, times in new.items() for variant in times}
    ours: dict[str, Difference] = {}
    controls: dict[str, Difference] = {}
    groups: dict[str, list[Difference]] = {}
    undecided = []
    for key, variant in _in_order(old, known & here):
        if variant == baseline(old[key]):
            continue
        a, b = log_ratios(old[key], variant), log_ratios(new[key], variant)
        label = f"{_label(what, key)}: {variant}"
        if min(len(a), len(b)) < FEWEST:
            undecided.append(f"{label}: {len(a)} and {len(b)} rounds, of which {FEWEST} are needed")
            continue
        if variant in CONTROLS:
            controls[label] = difference(a, b)
            continue
        ours[label] = difference(a, b)
        kept = tuple(None if name in SIZES else v for name, v in zip(IDENTITY[what], key, strict=True))
        groups.setdefault(f"geometric mean, {_label(what, kept)}: {variant}", []).append(ours[label])
    gone = _in_order(old, known - here)
    excused = {key: why for key in dict.fromkeys(key for key, _ in gone) if (why := left_out(after, key))}
    means = {f"{label} ({len(parts)} entries)": mean(parts) for label, parts in groups.items() if len(parts) > 1}
    between, count = run_to_run(list(controls.values())), len(ours) + len(means)
    return Comparison(
        *(_changes(found, between, count) for found in (ours, means, controls)), math.sqrt(between),
        [f"{_label(what, key)}: {variant}" for key, variant in gone if key not in excused],
        [f"{_label(what, key)}: {variant}" for key, variant in _in_order(new, here - known)], undecided,
        [f"{_label(what, key)}: {why}" for key, why in excused.items()],
    )


def _in_order(entries: Mapping[Key, Times], pairs: Iterable[tuple[Key, str]]) -> list[tuple[Key, str]]:
    """The pairs in the order of the file."""
    chosen = set(pairs)
    return [(key, variant) for key, times in entries.items() for variant in times if (key, variant) in chosen]


def differing_versions(before: Record, after: Record) -> list[str]:
    """A line for each thing that differs between the two machines' software."""
    names = dict.fromkeys((*before.machine, *after.machine))
    return [
        f"{name}: {before.machine.get(name)} before, {after.machine.get(name)} now"
        for name in names
        if name not in ("commit", "date", "kind") and before.machine.get(name) != after.machine.get(name)
    ]


def describe(found: Comparison, everything: bool = False) -> str:
    """What people read of a comparison."""
    lines = [f"slower: {change}" for change in found.slower]
    lines += [f"vanished: {label}" for label in found.vanished]
    lines += [f"new, compared with nothing: {label}" for label in found.new]
    lines += [f"too few rounds: {label}" for label in found.undecided]
    lines += [f"not compared: {label}" for label in found.left_out]
    lines += [
        f"too uncertain to say: {change}; a slowdown is seen from {change.seen - 1:.0%} on"
        for change in found.uncertain
    ]
    if everything:
        lines += [str(change) for change in (*found.means, *found.entries, *found.controls)]
    for name, changes in (("entries", found.entries), ("geometric means", found.means)):
        if changes:
            seen = [change.seen - 1 for change in changes]
            lines.append(
                f"{len(changes)} {name}, {sum(change.slower for change in changes)} slower; a slowdown is seen from "
                f"{statistics.median(seen):.1%} on (median; {max(seen):.1%} at worst)"
            )
    lines.append(f"{found.between:.1%} of difference between the runs are put down to chance")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("before", type=Path, help="result file of bench.overhead, bench.growth or bench.layers")
    parser.add_argument(
        "after", type=Path, nargs="?",
        help="another of the same measurement and kind of machine; left out: is this machine of BEFORE's kind?",
    )
    parser.add_argument("--device", default="cpu", help="without AFTER: this machine's device (default cpu)")
    parser.add_argument("--all", action="store_true", help="print every comparison, not only what fails")
    options = parser.parse_args(arguments)
    try:
        before = records.read(options.before)
        if options.after is None:
            return _same_machine(before, records.machine(options.device)["kind"])
        after = records.read(options.after)
        found = compare(before, after)
    except (OSError, ValueError) as error:
        print(f"bench.check: nothing was compared: {error}", file=sys.stderr)
        return 2
    for name, record in (("before", before), ("now", after)):
        print(f"{name}: {record.what}, commit {record.machine.get('commit')}, {record.machine.get('date')}")
    print(*differing_versions(before, after), describe(found, options.all), sep="\n")
    if found.slower or found.vanished:
        return 1
    if not found.entries:
        print("bench.check: nothing was compared: the files have no timed entry in common", file=sys.stderr)
        return 2
    if found.left_out:
        print(f"bench.check: not everything was compared: AFTER left out {', '.join(found.left_out)}", file=sys.stderr)
        return 2
    if 2 * len(found.uncertain) > len(found.entries):
        print(f"bench.check: {len(found.uncertain)} of {len(found.entries)} entries are too uncertain to say; measure "
              "with more rounds", file=sys.stderr)
        return 3
    return 0


def _same_machine(before: Record, kind: str) -> int:
    if before.kind == kind:
        return 0
    print(
        f"bench.check: nothing was compared: the results are of {before.kind!r}, this machine is {kind!r}; measure "
        "both on one machine, or give two files", file=sys.stderr,
    )
    return 2


if __name__ == "__main__":
    sys.exit(main())

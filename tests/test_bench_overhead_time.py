"""bench.overhead ends by itself: in which order it measures, and what it leaves out or gives up for lack of time."""

from __future__ import annotations

import itertools
import math
import time
from types import SimpleNamespace

import pytest
import torch
from overhead_cases import CASES, step_of

from bench import overhead, overhead_measure, records
from bench.overhead_measure import Effort, train

EFFORT = Effort(rounds=3, seconds=1e-4, limit=1.0)
CPU = torch.device("cpu")
VARIANTS = ("ungated", "gated", "per-sample")


@pytest.fixture(autouse=True)
def cases(monkeypatch):
    monkeypatch.setattr(overhead, "CASES", CASES)


def ticks(seconds):
    """A clock that moves on by so much whenever it is looked at."""
    return map(float, itertools.count(0, seconds)).__next__


def test_when_the_time_is_up_the_rest_is_listed_in_the_file_and_on_stdout(tmp_path, capsys):
    path = tmp_path / "some.json"
    written = []

    def done(results):
        written.append(len(results))
        records.write(path, "overhead", results)

    results = overhead.run(
        ["tiny", "tiny-cnn"], [4], ["eager"], ["float32", "bfloat16"], CPU, EFFORT, 4500, ["ungated", "gated"], done,
        clock=ticks(1000),
    )
    assert written == [1, 2, 3, 4], "written after every entry"
    assert [bool(entry["seconds"]) for entry in results] == [True, True, False, False]
    left = [f"{case} batch 4 eager bfloat16: " for case in ("tiny", "tiny-cnn")]
    said = capsys.readouterr().out
    for label, entry in zip(left, records.read(path).results[2:], strict=True):
        assert entry["left_out"] == "the 4500 seconds were up"
        assert f"{label}left out: the 4500 seconds were up" in said
        assert f"- {label}the 4500 seconds were up" in overhead.table(results)


def instead_of_measuring(monkeypatch, seconds):
    """run() on a clock that measurements move, by seconds(case, batch, mode); returns the run and what it began."""
    now, begun = [0.0], []

    def measure(case, batch, mode, numbers, device, effort, variants):
        begun.append((mode, case, batch))
        now[0] += seconds(case, batch, mode)
        return {**overhead.empty(case, batch, mode, numbers), "ratio": {}}

    monkeypatch.setattr(overhead, "measure", measure)

    def run(limit):
        return overhead.run(
            ["tiny-cnn", "tiny"], [16, 4], ["compiled", "inference", "eager"], ["float32"], CPU, EFFORT, limit,
            clock=lambda: now[0],
        )

    return run, begun


def test_what_takes_longest_comes_last_in_whatever_order_it_is_asked_for(monkeypatch):
    run, begun = instead_of_measuring(monkeypatch, lambda case, batch, mode: 1.0)
    run(100.0)
    assert begun == [
        (mode, case, batch) for mode in ("eager", "inference", "compiled") for case in ("tiny", "tiny-cnn")
        for batch in (4, 16)
    ]
    assert list(overhead.DEFAULT_MODES["cpu"]) == sorted(overhead.DEFAULT_MODES["cpu"], key=overhead.MODES.index)


def test_a_network_that_took_longer_than_what_is_left_is_not_begun_again(monkeypatch):
    run, begun = instead_of_measuring(monkeypatch, lambda case, batch, mode: 10.0 if case == "tiny-cnn" else 1.0)
    results = run(30.0)
    assert [entry[1:] for entry in begun] == [
        ("tiny", 4), ("tiny", 16), ("tiny-cnn", 4), ("tiny-cnn", 16), *[("tiny", 4), ("tiny", 16)] * 2
    ]
    assert [entry["left_out"] for entry in results].count("the 30 seconds were up") == 4


def test_an_entry_is_given_up_after_the_variant_that_shows_it_would_end_too_late(monkeypatch):
    made = []

    def make(variant):
        made.append(variant)
        return step_of(variant)

    # looked at five times a variant: three ticks for all of it, one of them for two steps
    monkeypatch.setattr(overhead_measure, "time", SimpleNamespace(monotonic=ticks(1)))
    entry = train(make, VARIANTS, EFFORT._replace(until=21.0))
    assert made == ["ungated"] and entry["seconds"] == entry["ratio"] == entry["peak_bytes"] == {}
    assert entry["left_out"].startswith("the time is up: it would take about 16 s more, 16 s are left")
    made.clear()
    monkeypatch.setattr(overhead_measure, "time", SimpleNamespace(monotonic=ticks(1)))
    entry = train(make, VARIANTS, EFFORT._replace(until=50.0))
    assert entry["left_out"] is None and set(entry["ratio"]) == set(VARIANTS)


def test_nothing_is_made_after_the_end():
    entry = train(lambda variant: pytest.fail(f"made {variant}"), VARIANTS, EFFORT._replace(until=time.monotonic() - 1))
    assert entry["left_out"].startswith("the time is up") and entry["left_out"].endswith(", 0 s are left")


def test_rounds_take_no_longer_than_what_is_left():
    now = time.monotonic()
    assert Effort(limit=12.0).rounds_limit() == 12.0 and Effort(limit=12.0).rounds_limit(0.5) == 6.0
    assert Effort(limit=12.0, until=now - 1).rounds_limit() == 0.0
    assert Effort(limit=math.inf, until=now + 1000).rounds_limit() <= 1000


def test_a_cpu_has_eight_minutes_where_nothing_else_is_asked_for():
    assert overhead.parse([]).seconds == 480 and overhead.parse(["--seconds", "7"]).seconds == 7

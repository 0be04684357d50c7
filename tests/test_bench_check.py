"""The regression check, on timings made up from a seed: noise, drift and outliers, with a slowdown or without."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from bench import check, records
from bench.check_statistics import Difference, difference, mean, reach, run_to_run, student
from bench.records import Record

PLACES = [(case, batch, mode) for case in ("linear", "mlp") for batch in (16, 128) for mode in ("eager", "compiled")]
VARIANTS = ("gated", "listing1")


def record(seed, slower=None, rounds=40, noise=0.02, kind="cpu, 2 threads", places=PLACES, **machine):
    """An overhead file. slower: (case, batch, mode, variant) -> factor on its times; missing ones 1.

    A machine whose speed wanders, noise of so many percent on each timing, 5 % outliers, and a shift of 0.3 % that a
    variant keeps for the whole run.
    """
    generator, results = np.random.default_rng(seed), []
    for place in places:
        drift = np.exp(0.2 * generator.standard_normal(rounds).cumsum() / math.sqrt(rounds))
        seconds = {}
        for name in ("ungated", *VARIANTS):
            times = 1e-3 * drift * np.exp(noise * generator.standard_normal(rounds) + 0.003 * generator.normal())
            times *= np.where(generator.random(rounds) < 0.05, 1 + generator.exponential(0.5, rounds), 1)
            seconds[name] = (times * (slower or {}).get((*place, name), 1.0)).tolist()
        case, batch, mode = place
        results.append({"case": case, "batch": batch, "mode": mode, "numbers": "float32", "seconds": seconds})
    return Record("overhead", {"kind": kind, "commit": "abc", "date": "2026-01-01", "torch": "2.13.0", **machine}, [],
                  results)


def everywhere(variant, factor):
    return {(*place, variant): factor for place in PLACES}


def failures(before, after):
    return check.compare(before, after).slower


def test_equal_code_passes():
    failed = [seed for seed in range(200) if failures(record(2 * seed), record(2 * seed + 1))]
    assert len(failed) <= 4, failed


@pytest.mark.parametrize("noise", [0.005, 0.06])
@pytest.mark.parametrize("rounds", [5, 12])
def test_equal_code_passes_with_few_rounds_and_much_noise(rounds, noise):
    pairs = ((record(2 * s, None, rounds, noise), record(2 * s + 1, None, rounds, noise)) for s in range(50))
    assert sum(bool(failures(*pair)) for pair in pairs) <= 2


@pytest.mark.parametrize(("rounds", "least"), [(12, 90), (40, 98)])
def test_a_variant_that_is_5_percent_slower_everywhere_fails(rounds, least):
    slower = everywhere("gated", 1.05)
    seen = 0
    for seed in range(100):
        found = failures(record(2 * seed, rounds=rounds), record(2 * seed + 1, slower, rounds))
        assert all(change.label.endswith("gated") or ": gated (" in change.label for change in found)
        seen += any(change.label.startswith("geometric mean") for change in found)
    assert seen >= least


def test_one_entry_that_is_10_percent_slower_fails_and_is_named():
    slower = {("mlp", 16, "eager", "gated"): 1.10}
    found = [[c.label for c in failures(record(2 * s), record(2 * s + 1, slower))] for s in range(50)]
    assert sum("mlp batch 16 eager float32: gated" in labels for labels in found) >= 48
    assert sum(any("linear" in label for label in labels) for labels in found) <= 2


def test_faster_and_a_slower_machine_pass():
    assert not failures(record(0), record(1, everywhere("gated", 0.9)))
    machine = {(*place, name): 3.0 for place in PLACES for name in ("ungated", *VARIANTS)}
    assert not failures(record(0), record(1, machine))


def test_a_change_below_2_percent_fails_nothing_however_sure():
    slower = everywhere("gated", 1.015)
    found = check.compare(record(0, rounds=400, noise=1e-3), record(0, slower, rounds=400, noise=1e-3))
    assert not found.slower and {round(c.ratio, 3) for c in found.entries if c.label.endswith("gated")} == {1.015}


def test_an_interval_by_hand():
    """Without any noise the interval is RUN_TO_RUN's alone: sqrt(2) * 0.005, times Student's t."""
    found = difference(np.full(40, 0.1), np.full(40, 0.2))
    assert found == pytest.approx((0.1, 0.0, 39, 1)) and mean([found, found]) == pytest.approx((0.1, 0.0, 78, 2))
    assert reach(found, run_to_run([]), 0.95) == pytest.approx(2.0227 * math.sqrt(2) * 0.005, rel=1e-3)
    assert student(0.975, 10) == pytest.approx(2.228, abs=0.01) and student(0.9995, 9) == pytest.approx(4.781, abs=0.05)


def test_noise_between_runs_is_taken_from_the_controls():
    still = [Difference(0.001 * sign, 1e-6, 39) for sign in (1, -1, 1, -1)]
    moved = [Difference(0.1 * sign, 1e-4, 39) for sign in (1, -1, 1, -1)]
    assert run_to_run(still) == run_to_run(moved[:3]) == 2 * 0.005**2
    assert run_to_run(moved) == pytest.approx(0.14826**2 - 1e-4)
    assert run_to_run([*still, Difference(5.0, 1e-6, 39)]) == 2 * 0.005**2, "one that did change does not matter"


def test_a_run_that_shared_the_machine_fails_nothing():
    """Every ratio of the second run is off by some 8 %, by no doing of the code."""
    generator, failed = np.random.default_rng(0), 0
    for seed in range(50):
        shifts = {(*place, name): math.exp(0.08 * generator.normal()) for place in PLACES for name in VARIANTS}
        failed += bool(failures(record(2 * seed), record(2 * seed + 1, shifts)))
    assert failed <= 3


def test_controls_do_not_fail():
    found = check.compare(record(0), record(1, {("mlp", 16, "eager", "listing1"): 1.5}))
    assert not found.slower and max(change.ratio for change in found.controls) > 1.4


# ---- entries that are not in both, and files that do not compare -----------------------------------------------------


def test_a_vanished_entry_fails_and_a_new_one_is_a_note(tmp_path, capsys):
    less = [place for place in PLACES if place != ("mlp", 128, "compiled")]
    paths = [write(tmp_path / "all.json", record(0)), write(tmp_path / "less.json", record(1, places=less))]
    assert check.main(paths) == 1
    said = capsys.readouterr().out
    assert "vanished: mlp batch 128 compiled float32: gated" in said
    assert "vanished: mlp batch 128 compiled float32: listing1" in said
    assert check.main(paths[::-1]) == 0
    assert "new, compared with nothing: mlp batch 128 compiled float32: gated" in capsys.readouterr().out


def test_a_vanished_variant_fails(tmp_path):
    after = record(1)
    del after.results[3]["seconds"]["gated"]
    assert check.compare(record(0), after).vanished == ["linear batch 128 compiled float32: gated"]
    assert check.main([write(tmp_path / "a.json", record(0)), write(tmp_path / "b.json", after)]) == 1


def test_what_the_time_was_up_for_is_not_compared_and_what_broke_is_missing(tmp_path, capsys):
    before = write(tmp_path / "a.json", record(0))
    for more, code, said in (
        ({}, 2, "not compared: linear batch 128 compiled float32: the 900 seconds were up\n"),
        ({"failed": "RuntimeError"}, 1, "vanished: linear batch 128 compiled float32: gated\n"),
        ({"refused": {"gated": "it is wrong"}}, 1, "vanished: linear batch 128 compiled float32: gated\n"),
    ):
        after = record(1)
        after.results[3] |= {"seconds": {}, "left_out": "the 900 seconds were up", **more}
        found = write(tmp_path / "b.json", after)
        assert check.main([before, found]) == code and said in capsys.readouterr().out
    slower = record(1, everywhere("gated", 1.3))
    slower.results[3] |= {"seconds": {}, "left_out": "the 900 seconds were up"}
    assert check.main([before, write(tmp_path / "b.json", slower)]) == 1, "a slowdown that is seen is one all the same"


def test_sizes_that_growth_had_no_time_for_are_not_compared():
    times = {"ungated": [1e-3] * 9, "gated": [1e-3] * 9}
    series = [{"axis": "depth", "value": n, "case": "mlp", "mode": "eager", "numbers": "float32", "seconds": times}
              for n in (1, 2, 4)]
    for ended, vanished, left_out in (
        ("the time is up: it would take about 9 s", [], [2, 4]), ("memory: 9 GB are free", [2, 4], []),
    ):
        short = [series[0], {**series[1], "seconds": {}, "ended": ended}]
        found = check.compare(*(Record("growth", {"kind": "k"}, [], results) for results in (series, short)))
        assert found.vanished == [f"mlp depth {n} eager float32: {v}" for n in vanished for v in times]
        assert found.left_out == [f"mlp depth {n} eager float32: {ended}" for n in left_out]


def test_entries_that_would_hide_a_slowdown_by_a_fifth_are_named(tmp_path, capsys):
    """With five rounds, and then with forty in most entries: twice as slow, and nobody could tell."""
    few, many = (record(0, rounds=rounds, noise=0.06) for rounds in (5, 40))
    slower = {("mlp", 16, "eager", "gated"): 1.25}
    worse, fine = (record(1, slower, rounds=rounds, noise=0.06) for rounds in (5, 40))
    paths = [write(tmp_path / "few.json", few), write(tmp_path / "worse.json", worse)]
    assert check.main(paths) == 3
    said = capsys.readouterr()
    (line,) = [line for line in said.out.splitlines() if "mlp batch 16 eager float32: gated" in line]
    assert line.startswith("too uncertain to say: ") and "a slowdown is seen from" in line
    assert "entries are too uncertain to say; measure with more rounds" in said.err
    for some in (many, fine):
        some.results[0] = {**some.results[0], "seconds": few.results[0]["seconds"]}
    found = check.compare(many, record(1, rounds=40)._replace(results=fine.results))
    assert [change.label for change in found.uncertain] == ["linear batch 16 eager float32: gated"]
    assert check.main([write(tmp_path / "a.json", many), write(tmp_path / "b.json", many)]) == 0, "one is not most"


def write(path, record):
    path.write_text(json.dumps(record._asdict()))
    return str(path)


def test_other_machines_are_refused_by_name(tmp_path, capsys):
    paths = [write(tmp_path / "a.json", record(0)), write(tmp_path / "b.json", record(0, kind="cpu, 4 threads"))]
    assert check.main(paths) == 2
    said = capsys.readouterr().err
    assert "nothing was compared" in said and "'cpu, 2 threads'" in said and "'cpu, 4 threads'" in said


def test_this_machine_must_be_the_file_s_kind(tmp_path, capsys):
    assert check.main([write(tmp_path / "a.json", record(0, kind="an abacus"))]) == 2
    assert "'an abacus'" in capsys.readouterr().err
    assert check.main([write(tmp_path / "b.json", record(0, kind=records.machine()["kind"]))]) == 0


def test_versions_that_differ_are_printed(tmp_path, capsys):
    paths = [write(tmp_path / "a.json", record(0)), write(tmp_path / "b.json", record(0, torch="2.14.0"))]
    assert check.main(paths) == 0
    said = capsys.readouterr().out
    assert "torch: 2.13.0 before, 2.14.0 now" in said and "a slowdown is seen from" in said


def test_too_few_rounds_are_no_pass(tmp_path, capsys):
    paths = [write(tmp_path / name, record(0, rounds=4)) for name in ("a.json", "b.json")]
    assert check.main(paths) == 2
    said = capsys.readouterr()
    assert "4 and 4 rounds" in said.out and "nothing was compared" in said.err


@pytest.mark.parametrize(("change", "message"), [
    (lambda r: r.results[0]["seconds"]["gated"].pop(), "gated has 39 rounds and ungated 40"),
    (lambda r: r.results[0]["seconds"]["gated"].__setitem__(0, 0.0), "took 0.0 s"),
    (lambda r: r.results.append(r.results[0]), "two entries of linear batch 16 eager float32"),
    (lambda r: r.results[0]["seconds"].pop("ungated"), "expected ungated, plain or library too"),
])
def test_damaged_files_are_refused(tmp_path, capsys, change, message):
    damaged = record(0)
    change(damaged)
    assert check.main([write(tmp_path / "a.json", record(0)), write(tmp_path / "b.json", damaged)]) == 2
    assert message in capsys.readouterr().err


def test_other_measurements_are_refused(tmp_path, capsys):
    growth = record(0)._replace(what="growth")
    assert check.main([write(tmp_path / "a.json", record(0)), write(tmp_path / "b.json", growth)]) == 2
    assert "'overhead' and 'growth'" in capsys.readouterr().err
    cost = record(0)._replace(what="curve-cost")
    assert check.main([write(tmp_path / "c.json", cost)] * 2) == 2
    assert "has no ratios to compare" in capsys.readouterr().err


def test_growth_and_layers_and_inference_compare_too():
    def times(seed, rounds=20):
        return (1e-3 * np.exp(0.01 * np.random.default_rng(seed).standard_normal(rounds))).tolist()

    growth = [{"axis": "depth", "value": n, "case": "mlp", "mode": "eager", "seconds":
               {"ungated": times(n), "gated": times(n + 9)}, "ratio": {}} for n in (1, 2)]
    growth.append({**growth[0], "value": 4, "seconds": {}, "ended": "the time is up"})
    found = check.compare(*(Record("growth", {"kind": "k"}, [], growth) for _ in range(2)))
    assert [change.label for change in found.entries] == ["mlp depth 1 eager: gated", "mlp depth 2 eager: gated"]
    layer = {"layer": "Linear(2, 3)", "batch": 16, "dtype": "float32", "device": "cpu", "direction": "both",
             "seconds": {"library": times(0), "fold cpp": times(1)}}
    slow = {**layer, "seconds": {**layer["seconds"], "fold cpp": [2 * t for t in times(1)]}}
    found = check.compare(*(Record("layers", {"kind": "k"}, [], [entry]) for entry in (layer, slow)))
    assert [change.ratio for change in found.slower] == pytest.approx([2.0])
    baked = {"case": "mlp", "batch": 16, "mode": "inference", "numbers": "float32",
             "seconds": {"plain": times(0), "baked": times(1)}}
    found = check.compare(*(Record("overhead", {"kind": "k"}, [], [baked]) for _ in range(2)))
    assert [change.label for change in found.entries] == ["mlp batch 16 inference float32: baked"]


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize(("broken", "steps"), [("bench.check [^ ]*$", 1), ("bench.overhead", 2), ("none", 3)])
def test_make_bench_check_measures_only_where_it_can_compare(broken, steps, tmp_path):
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "ran $*"\necho "$*" | grep -q "{broken}" && exit 2 || exit 0\n')
    python.chmod(0o755)
    done = subprocess.run(
        ["make", "bench-check", "-o", ".venv/.developed", f"BIN={tmp_path}"], cwd=Path(__file__).parents[1],
        capture_output=True, text=True, check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("ran -m ")]
    assert [line.split()[2] for line in lines] == ["bench.check", "bench.overhead", "bench.check"][:steps]
    like = "ran -m bench.overhead --like bench/results/cpu-overhead.json --out build/"
    assert all(line.startswith(like) for line in lines[1:2]), "with the rounds and seconds of the committed file"
    assert (done.returncode == 0) is (steps == 3)

"""Interleaved times, ratios with intervals, peak memory and names of operators."""

from __future__ import annotations

import gc
import math

import pytest
import torch

from bench import timing
from bench.timing import LEAST_ROUNDS, interleave, launched, peak_memory, ratio


class Clock:
    """A clock that only steps move; `speed` is the machine's, which may drift."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.speed, self.calls = 0.0, 1.0, []
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)

    def step(self, name, seconds, drift=1.0):
        def run():
            self.now += seconds / self.speed
            self.speed *= drift
            self.calls.append(name)

        return run


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def test_the_ratio_is_the_median_of_the_rounds_ratios():
    assert ratio({"a": [1.0, 10.0, 100.0], "b": [1.0, 5.0, 25.0]}, "a", "b").median == 2.0
    assert ratio({"a": [3.0] * 4, "b": [2.0] * 4}, "a", "b") == (1.5, 1.5, 1.5)
    with pytest.raises(ValueError, match="zip"):
        ratio({"a": [1.0, 2.0], "b": [1.0]}, "a", "b")


def test_the_interval_is_the_bootstrap_s_own():
    """The median of 11 draws from 1 .. 11 is at most k where 6 of them are: with the binomial's probability."""

    def at_most(k):
        p = k / 11
        return sum(math.comb(11, j) * p**j * (1 - p) ** (11 - j) for j in range(6, 12))

    low = next(k for k in range(1, 12) if at_most(k) > 0.025)
    high = next(k for k in range(1, 12) if at_most(k) > 0.975)
    assert (low, high) == (3, 9) and at_most(2) < 0.015 and at_most(3) > 0.035
    found = ratio({"a": [float(i) for i in (7, 2, 9, 4, 11, 1, 8, 3, 10, 5, 6)], "b": [1.0] * 11}, "a", "b")
    assert found == (6.0, low, high)


def test_a_slower_variant_is_slower_by_its_factor_while_the_machine_drifts(clock):
    steps = {"fast": clock.step("fast", 0.001, 0.9995), "slow": clock.step("slow", 0.003, 0.9995)}
    times = interleave(steps, 40)
    assert len(times["fast"]) == 40 and max(times["fast"]) > 1.5 * min(times["fast"]), "it drifted"
    found = ratio(times, "slow", "fast")
    assert found.low == pytest.approx(3, rel=0.03) and found.high == pytest.approx(3, rel=0.03)


def test_a_round_runs_every_variant_for_the_same_time_in_an_order_of_its_own(clock):
    times = interleave({"a": clock.step("a", 0.005), "b": clock.step("b", 0.01), "c": clock.step("c", 1.0)}, 12)
    assert {name: values[0] for name, values in times.items()} == pytest.approx({"a": 0.005, "b": 0.01, "c": 1.0})
    rounds = "".join(clock.calls[3 * 4:])
    assert len(rounds) == 12 * (4 + 2 + 1)
    orders = {rounds[i:i + 7] for i in range(0, len(rounds), 7)}
    assert orders <= {"aaaabbc", "aaaacbb", "bbaaaac", "bbcaaaa", "caaaabb", "cbbaaaa"} and len(orders) > 1


def test_no_round_begins_after_the_limit_but_some_are_measured(clock):
    step = clock.step("a", 1.0)
    assert len(interleave({"a": step}, 100, limit=9.5)["a"]) == 10
    assert len(interleave({"a": step}, 100, limit=0.0)["a"]) == LEAST_ROUNDS
    assert len(interleave({"a": step}, 2, limit=0.0)["a"]) == 2


def test_garbage_is_not_collected_meanwhile_and_is_again_after_a_failure():
    seen = []

    def fail_later():
        seen.append(gc.isenabled())
        if not seen[-1]:
            raise RuntimeError("in a round")

    with pytest.raises(RuntimeError, match="in a round"):
        interleave({"a": fail_later}, 3)
    assert seen[-1] is False and gc.isenabled()


def test_peak_memory_counts_what_the_step_before_left_and_what_comes_and_goes():
    held = []

    def step():
        held[:] = [torch.empty(1 << 20, dtype=torch.uint8)] if not held else held
        a = torch.empty(3 << 20, dtype=torch.uint8)
        del a
        torch.empty(2 << 20, dtype=torch.uint8)

    assert peak_memory(step) == 4 << 20


def test_the_end_of_what_an_earlier_profile_saw_begin_does_not_count():
    kept = []
    assert peak_memory(lambda: kept.append(torch.empty(5 << 20, dtype=torch.uint8))) == 10 << 20

    def step():
        kept.clear()
        torch.empty(2 << 20, dtype=torch.uint8)

    assert peak_memory(step) == 2 << 20


def test_operators_are_named_in_their_order():
    a = torch.rand(3, 3)
    names = [name for name in launched(lambda: (a @ a).exp()) if name.startswith("aten::")]
    assert [name for name in names if name in ("aten::mm", "aten::exp", "aten::add")] == ["aten::mm", "aten::exp"]

"""Overhead along depth, width, batch and image size: where a series ends, and what is made of it."""

from __future__ import annotations

import itertools

import pytest
import torch

from bench import growth, plots, records
from bench.growth import Growing, Series, Setting

CPU = torch.device("cpu")
TINY = Series("mlp", "width", 2, lambda n: Setting("mlp", (1, 4, 4), 3, {"hidden": (n,), "latent": 2}))
SMALL_IMAGES = Series("cnn", "depth", 1, lambda n: Setting("cnn", (1, 4, 4), 2, {"channels": (2,) * n, "norm": "none"}))


def found(seconds=1e-3, size=1000):
    """What bench.overhead_measure.train gives: the gated step 10 %, the per-sample one 20 % slower."""
    times = {"ungated": [seconds] * 5, "gated": [1.1 * seconds] * 5, "per-sample": [1.2 * seconds] * 5}
    ratio = {name: dict.fromkeys(("median", "low", "high"), values[0] / seconds) for name, values in times.items()}
    return {"seconds": times, "ratio": ratio, "peak_bytes": dict.fromkeys(times, size), "launches": None, "refused": {}}


def grown(monkeypatch, train, seconds=1e9, step_seconds=1e9, series=(TINY,), clock=lambda: 0.0):
    monkeypatch.setattr(growth, "train", train)
    return growth.grow(series, ["eager"], CPU, seconds, step_seconds, 5, clock)


def each_size(values):
    """A train() that gives these one after another, raising those that are errors."""
    values = iter(values)

    def train(*args, **kwargs):
        value = next(values)
        if isinstance(value, Exception):
            raise value
        return value

    return train


def test_a_real_series_is_measured_and_ends():
    results = growth.grow([TINY, SMALL_IMAGES], ["eager"], CPU, 1e9, 1e-9, 5)
    assert [(e["case"], e["value"], bool(e["ended"])) for e in results] == [
        ("mlp", 2, False), ("mlp", 4, True), ("cnn", 1, False), ("cnn", 2, True)
    ]
    for entry in (results[0], results[2]):
        assert set(entry["seconds"]) == {"ungated", "gated", "per-sample"} and entry["refused"] == {}
        assert all(len(times) == 5 and min(times) > 0 for times in entry["seconds"].values())
        assert entry["ratio"]["ungated"]["median"] == 1.0 and entry["ratio"]["gated"]["low"] > 0
        assert entry["peak_bytes"]["gated"] > entry["peak_bytes"]["ungated"] > 0
    assert "the limit is 1e-09 s" in results[1]["ended"] and results[1]["seconds"] == {}


def test_a_series_ends_where_a_step_would_take_too_long(monkeypatch):
    results = grown(monkeypatch, each_size([found(0.1), found(0.3)]), step_seconds=0.9)
    assert [entry["value"] for entry in results] == [2, 4, 8]
    # 0.12 s, 0.36 s, and threefold once more
    assert results[-1]["ended"] == "a step would take about 1.08 s; the limit is 0.9 s"


def test_a_series_ends_where_memory_would_not_do(monkeypatch):
    monkeypatch.setattr(growth, "free_memory", lambda device: 10**9)  # TINY's inputs are next to nothing
    results = grown(monkeypatch, each_size([found(size=10**8), found(size=2 * 10**8)]))
    assert results[-1]["ended"] == "memory: it would take about 1.2 GB, 1.0 GB are free"


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"), MemoryError("9 GiB"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
])
def test_an_allocator_that_gives_up_ends_a_series(monkeypatch, error):
    results = grown(monkeypatch, each_size([found(), error]))
    assert [entry["value"] for entry in results] == [2, 4] and results[-1]["ended"].startswith("memory: ")
    refused = {**found(), "refused": {"gated": "OutOfMemoryError: CUDA out of memory"}}
    assert grown(monkeypatch, each_size([refused]))[-1]["ended"].startswith("memory: OutOfMemoryError")


def test_another_error_is_not_taken_for_an_end(monkeypatch):
    with pytest.raises(RuntimeError, match="illegal address"):
        grown(monkeypatch, each_size([found(), RuntimeError("illegal address")]))
    broken = {**found(), "ratio": {}, "refused": {"ungated": "it fails"}}
    with pytest.raises(RuntimeError, match="it fails"):
        grown(monkeypatch, each_size([broken]))


def test_a_network_that_cannot_be_built_ends_a_series(monkeypatch):
    results = grown(monkeypatch, each_size(itertools.repeat(found())), series=[SMALL_IMAGES])
    assert [entry["value"] for entry in results] == [1, 2, 4]
    assert results[-1]["ended"] == "the network: images of 4x4 cannot be halved 4 times, once for each of `channels`"


def test_the_time_budget_ends_all_series_and_they_take_turns(monkeypatch):
    ticks = itertools.count()  # a clock that moves by a second whenever it is read: 0 at first, then before each size
    results = grown(monkeypatch, each_size(itertools.repeat(found())), seconds=9.5,
                    series=[TINY, TINY._replace(case="other")], clock=lambda: float(next(ticks)))
    assert [e["case"] for e in results if e["ended"]] == ["mlp", "other"]
    assert all("the time is up" in entry["ended"] for entry in results if entry["ended"])
    counts = [sum(e["case"] == case and not e["ended"] for e in results) for case in ("mlp", "other")]
    assert counts == [5, 4]


def test_no_time_at_all_measures_nothing_and_says_so(monkeypatch):
    results = grown(monkeypatch, each_size([]), seconds=0, series=[TINY])
    assert [entry["ended"] for entry in results] == ["the time is up"]


def test_growth_is_extrapolated_between_twofold_and_fourfold():
    growing = Growing(TINY, "eager")
    growing.seconds, growing.bytes, growing.steps = [1.0], [1], [1.0]
    for steps, expected in (([1.0], 2.0), ([1.0, 1.1], 2.2), ([1.0, 3.0], 9.0), ([1.0, 50.0], 200.0)):
        growing.steps = steps
        assert growing.reason(1e9, expected + 1e-6, 10**9) is None
        assert growing.reason(1e9, expected - 1e-6, 10**9).startswith("a step would take")


def test_a_wrong_variant_is_refused_a_time(monkeypatch):
    refused = found()
    del refused["ratio"]["gated"], refused["seconds"]["gated"], refused["peak_bytes"]["gated"]
    refused["refused"] = {"gated": "gradient: w is off by 3"}
    results = grown(monkeypatch, each_size([refused]), step_seconds=1e-9)
    assert "refused a time: gradient: w is off by 3" in growth.table(results)
    monkeypatch.setattr(growth, "SERIES", (TINY,))
    monkeypatch.setattr(growth, "train", each_size([refused]))
    assert growth.main(["--step-seconds", "1e-9"]) == 1


def test_table_and_plot(tmp_path, monkeypatch):
    results = grown(monkeypatch, each_size([found(), found(2e-3)]), step_seconds=4e-3)
    assert growth.table(results).splitlines()[2:] == [
        "| mlp | width | 2 | eager | 1.000 | 1.100 (1.100 to 1.100) | 1.200 (1.200 to 1.200) | 1.000 |",
        "| mlp | width | 4 | eager | 2.000 | 1.100 (1.100 to 1.100) | 1.200 (1.200 to 1.200) | 1.000 |",
        "| mlp | width | 8 | eager | not measured: a step would take about 0.0048 s; the limit is 0.004 s |  |  |  |",
    ]
    results[0]["launches"] = {"ungated": 10, "gated": 12, "per-sample": 13}
    assert "10, 12, 13" in growth.table(results).splitlines()[2]
    plots.growth(results, tmp_path / "growth.png", "a title")
    assert plots.drawn_from(tmp_path / "growth.png") == plots.digest(results)
    assert (tmp_path / "growth.png").stat().st_size < 100_000
    assert plots.drawn_from(tmp_path / "none.png") is None
    results[0]["value"] = 3
    assert plots.drawn_from(tmp_path / "growth.png") != plots.digest(results)


def test_the_command_writes_a_result_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(growth, "SERIES", (TINY,))
    monkeypatch.setattr(growth, "train", each_size([found()]))
    out, plot = tmp_path / "growth.json", tmp_path / "growth.png"
    assert growth.main(["--out", str(out), "--plot", str(plot), "--step-seconds", "1e-6"]) == 0
    record = records.read(out, "growth")
    assert [entry["value"] for entry in record.results] == [2, 4] and plots.drawn_from(plot)
    said = capsys.readouterr().out
    assert growth.main(["--table", str(out)]) == 0
    assert capsys.readouterr().out.strip() in said


def test_ctrl_c_leaves_the_sizes_that_were_measured(tmp_path, monkeypatch, capsys):
    def interrupted(*args, **kwargs):
        if next(turns):
            raise KeyboardInterrupt
        return found()

    turns = itertools.count()
    monkeypatch.setattr(growth, "SERIES", (TINY,))
    monkeypatch.setattr(growth, "train", interrupted)
    out = tmp_path / "growth.json"
    assert growth.main(["--out", str(out)]) == 130
    (entry,) = records.read(out, "growth").results
    assert entry["value"] == 2 and entry["ratio"] and f"{out} holds what was measured" in capsys.readouterr().err
    turns = itertools.count(1)
    assert growth.main([]) == 130 and "nothing was written" in capsys.readouterr().err


def test_repeated_modes_are_measured_once(monkeypatch):
    asked = []
    monkeypatch.setattr(growth, "grow", lambda series, modes, *_, **__: asked.append(modes) or [])
    assert growth.main(["--modes", "compiled", "eager", "compiled"]) == 0 and asked == [["compiled", "eager"]]


@pytest.mark.parametrize(("arguments", "message"), [
    (["--seconds", "-1"], "--seconds is -1.0"), (["--rounds", "4"], "--rounds is 4; expected at least 5"),
    (["--seconds", "nan"], "--seconds is nan"), (["--modes", "graph"], "needs an NVIDIA GPU"),
    (["--device", "abacus"], "--device is 'abacus'"), (["--cases", "mlp", "--axes", "image"], "no series has"),
])
def test_bad_arguments_are_named(capsys, arguments, message):
    with pytest.raises(SystemExit) as ended:
        growth.main(arguments)
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_the_series_are_of_networks_that_exist():
    for series in growth.SERIES:
        network, shape, batch, options = series.setting(series.first)
        with torch.device("meta"):
            vae = growth.build(network, shape, **options)
        assert vae.input_shape == shape and batch >= 1
    assert {series.axis for series in growth.SERIES} == {"depth", "width", "batch", "image"}

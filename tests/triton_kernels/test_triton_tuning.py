"""The tuner: when it times, what it keeps, and a file that cannot do harm. Times are given, not measured."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch

import mrvae_kernels

configurations = pytest.importorskip("mrvae_kernels.triton_kernels.configurations")
tuning = pytest.importorskip("mrvae_kernels.triton_kernels.tuning")

CPU = torch.device("cpu")
SHAPE = (4096, 4096, 512)
ROW = configurations.used("linear", "sm_90", "half")
FIRST = configurations.candidates("linear", "sm_90", "half", *SHAPE[:2], 132)[0]


class Device:
    """Stands for a GPU whose kernels take the given times; counts launches."""

    def __init__(self, seconds=None, default=1.0):
        self.seconds, self.default, self.launches = seconds or {}, default, []

    def launch(self, tiles):
        self.launches.append(tiles)

    def timer(self, call):
        call()
        return self.seconds.get(self.launches[-1], self.default)


@pytest.fixture(autouse=True)
def hopper(tmp_path, monkeypatch):
    """choose() as on an H100, on CPU tensors, with an empty cache folder."""
    monkeypatch.setenv("MRVAE_CACHE", str(tmp_path))
    monkeypatch.setattr(configurations, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(configurations, "processors", lambda device: 132)
    tuning.forget()
    yield
    tuning.forget()


def choose(device=None, shape=SHAPE, operation="linear"):
    return configurations.choose(operation, CPU, "half", *shape, device and device.launch)


def test_nothing_is_timed_unless_asked_for(tmp_path):
    device = Device()
    assert choose(device) == FIRST
    assert device.launches == [] and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("best", ROW)
def test_the_fastest_is_found_and_remembered(best, tmp_path):
    device = Device({best: 0.5})
    with tuning.autotune(device.timer):
        assert choose(device) == best
        assert {*device.launches} == {*ROW}
        count = len(device.launches)
        assert choose(device) == best
    assert choose(device) == best  # outside
    tuning.forget()
    assert choose(device) == best  # in another process, from the file
    tuning.forget()
    with tuning.autotune(device.timer):
        assert choose(device) == best
    assert len(device.launches) == count  # once is enough
    assert choose(device, (4096, 4096, 513)) == FIRST  # a shape of its own
    document = json.loads((tmp_path / "triton-tiles.json").read_text())
    assert list(document["results"].values()) == [list(best)]
    assert all(word in next(iter(document["results"])) for word in ("sm_90", "linear", "half", "4096 4096 512"))


def test_equal_times_leave_the_table_s_choice():
    device = Device()
    with tuning.autotune(device.timer):
        assert choose(device) == FIRST


def test_the_median_counts_not_a_stroke_of_luck():
    device, other = Device({FIRST: 1.0}, default=2.0), ROW[0]

    def timer(call):
        call()
        tiles = device.launches[-1]
        lucky = tiles == other and device.launches.count(other) % 3 == 0
        return 0.0 if lucky else device.seconds.get(tiles, 2.0)

    with tuning.autotune(timer):
        assert choose(device) == FIRST


def test_backward_s_threads_tune_too():
    device, found = Device({ROW[0]: 0.5}), []
    with tuning.autotune(device.timer):
        thread = threading.Thread(target=lambda: found.append(choose(device)))
        thread.start()
        thread.join()
    assert found == [ROW[0]]


def test_a_choice_made_before_is_timed_inside_and_one_made_inside_lasts():
    device = Device({ROW[0]: 0.5})
    assert choose(device) == FIRST
    with tuning.autotune(device.timer):
        assert choose() == FIRST  # nothing to launch
        assert choose(device) == ROW[0]
    assert choose() == ROW[0]


@pytest.mark.parametrize("what", ["recording", "tracing"])
def test_not_while_a_graph_is_made(what, monkeypatch):
    device, busy = Device({ROW[0]: 0.5}), True
    if what == "recording":
        monkeypatch.setattr(tuning, "capturing", lambda where: busy)
    else:
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: busy)
    with tuning.autotune(device.timer):
        assert choose(device) == FIRST
        assert device.launches == []
        busy = False
        assert choose(device) == ROW[0]  # the table's choice was not kept


def test_not_on_cpu_tensors_without_a_timer():
    device = Device()
    with tuning.autotune():
        assert choose(device) == FIRST
    assert device.launches == []


def test_a_candidate_that_fails_is_left_out():
    device = Device({ROW[0]: 0.1, ROW[1]: 0.5})

    def launch(tiles):
        device.launch(tiles)
        if tiles in (ROW[0], FIRST):
            raise RuntimeError("out of resource: shared memory")

    with tuning.autotune(device.timer):
        assert configurations.choose("linear", CPU, "half", *SHAPE, launch) == ROW[1]


def test_if_all_fail_the_first_error_is_told(tmp_path):
    def launch(tiles):
        raise ValueError(f"no {tiles.m} x {tiles.n}")

    with tuning.autotune(Device().timer), pytest.raises(ValueError, match=f"^no {FIRST.m} x {FIRST.n}$"):
        configurations.choose("linear", CPU, "half", *SHAPE, launch)
    assert list(tmp_path.iterdir()) == []


def test_a_lost_device_is_not_a_matter_of_sizes():
    device = Device()

    def launch(tiles):
        device.launch(tiles)
        raise torch.AcceleratorError("illegal memory access")

    with tuning.autotune(device.timer), pytest.raises(torch.AcceleratorError):
        configurations.choose("linear", CPU, "half", *SHAPE, launch)
    assert len(device.launches) == 1


def test_an_error_ends_the_block():
    with pytest.raises(KeyError), tuning.autotune(Device().timer):
        raise KeyError
    assert tuning._timers == []


def test_memory_is_bounded(monkeypatch):
    monkeypatch.setattr(tuning, "DECIDED_AT_MOST", 5)
    for m in range(100):
        choose(shape=(m, 1, 1))
    assert len(tuning.decided) <= 5


BAD_FILES = {
    "empty": b"", "truncated": b'{"format": 1, "resu', "binary": bytes(range(256)), "deep": b"[" * 200_000,
    "a list": b"[]", "null": b"null", "another version": b'{"format": 2, "results": {}}',
    "no version": b'{"results": {}}', "no results": b'{"format": 1}',
    "results in a list": b'{"format": 1, "results": []}',
    **{
        str(value): json.dumps({"format": 1, "results": {"x": value}}).encode()
        for value in (
            None, 5, "64", [], [64, 64, 64, 4], [64, 64, 64, 4, 3, 1], [64, 64, 63, 4, 3], [0, 64, 64, 4, 3],
            [64, 64, 64, 3, 3], [64, 64, 64, 4, 0], [64, 64, 64, 4, 99], [1 << 40, 64, 64, 4, 3], [-64, 64, 64, 4, 3],
            [64.0, 64, 64, 4, 3], ["64", 64, 64, 4, 3], [64, 64, 64, True, 3], [64, 64, 64, 4, float("nan")],
            [[64], 64, 64, 4, 3], [64, 64, 64, 4, {}],
        )
    },
}


@pytest.mark.parametrize("content", BAD_FILES.values(), ids=BAD_FILES)
def test_a_bad_file_is_named_ignored_and_replaced(content, tmp_path):
    file = tmp_path / "triton-tiles.json"
    file.write_bytes(content)
    with pytest.warns(RuntimeWarning, match="triton-tiles.json are ignored") as caught:
        assert choose() == FIRST
        assert choose(shape=(1, 1, 1)) == ROW[0]
    assert len(caught) == 1 and str(tmp_path) in str(caught[0].message)
    device = Device({ROW[0]: 0.5})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with tuning.autotune(device.timer):
            assert choose(device) == ROW[0]
        tuning.forget()
        assert choose() == ROW[0]


def test_a_folder_in_the_file_s_place(tmp_path):
    (tmp_path / "triton-tiles.json").mkdir()
    device = Device({ROW[0]: 0.5})
    with pytest.warns(RuntimeWarning, match="ignored"), pytest.warns(RuntimeWarning, match="not written"):
        with tuning.autotune(device.timer):
            assert choose(device) == ROW[0]
    assert choose() == ROW[0]
    assert {path.name for path in tmp_path.iterdir()} == {"triton-tiles.json", "triton-tiles.lock"}  # no leftovers


def test_a_folder_that_cannot_be_made(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("MRVAE_CACHE", str(tmp_path / "file" / "cache"))
    device = Device({ROW[0]: 0.5})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with tuning.autotune(device.timer):
            assert choose(device) == ROW[0]
    assert "are not written to" in str(caught[-1].message)
    assert choose() == ROW[0]


def test_tiles_that_are_not_candidates_are_not_launched(tmp_path):
    device = Device({ROW[0]: 0.5})
    with tuning.autotune(device.timer):
        choose(device)
    file = tmp_path / "triton-tiles.json"
    document = json.loads(file.read_text())
    document["results"] = {name: [512, 512, 512, 16, 8] for name in document["results"]}
    file.write_text(json.dumps(document))
    tuning.forget()
    assert choose() == FIRST
    with tuning.autotune(device.timer):
        assert choose(device) == ROW[0]
    assert json.loads(file.read_text())["results"] == {name: list(ROW[0]) for name in document["results"]}


def test_results_of_another_triton_do_not_count(monkeypatch):
    device = Device({ROW[0]: 0.5})
    with tuning.autotune(device.timer):
        assert choose(device) == ROW[0]
    tuning.forget()
    monkeypatch.setattr(tuning.triton, "__version__", "99.0")
    assert choose() == FIRST


def test_what_others_wrote_meanwhile_stays(tmp_path):
    device = Device({ROW[0]: 0.5})
    assert choose() == FIRST  # the file is read, and is empty
    file = tmp_path / "triton-tiles.json"
    file.write_text(json.dumps({"format": 1, "results": {"theirs": [64, 64, 64, 4, 3]}}))
    with tuning.autotune(device.timer):
        choose(device)
    results = json.loads(file.read_text())["results"]
    assert len(results) == 2 and results["theirs"] == [64, 64, 64, 4, 3]


WRITER = """
import sys
from mrvae_kernels.triton_kernels import tuning
print("ready", flush=True)
sys.stdin.readline()
for i in range(40):
    tuning.forget()
    tuning._remember(f"{sys.argv[1]} {i}", (64, 64, 64, 4, 3))
"""


def test_two_processes_that_write_at_once(tmp_path):
    root = Path(mrvae_kernels.__file__).parents[1]
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, name], cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for name in ("one", "two")
    ]
    assert [writer.stdout.readline() for writer in writers] == ["ready\n"] * 2
    for writer in writers:
        writer.stdin.write("go\n")
        writer.stdin.flush()
    assert [writer.wait(timeout=120) for writer in writers] == [0, 0]
    results = json.loads((tmp_path / "triton-tiles.json").read_text())["results"]
    assert set(results) == {f"{name} {i}" for name in ("one", "two") for i in range(40)}
    assert {path.name for path in tmp_path.iterdir()} == {"triton-tiles.json", "triton-tiles.lock"}


def test_the_file_s_place(tmp_path, monkeypatch):
    assert tuning.cache_file() == tmp_path / "triton-tiles.json"
    monkeypatch.delenv("MRVAE_CACHE")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert tuning.cache_file() == tmp_path / "xdg" / "mrvae_kernels" / "triton-tiles.json"
    monkeypatch.setenv("HOME", str(tmp_path))
    for ignored in ("", "relative"):  # as the XDG specification says
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        assert tuning.cache_file() == tmp_path / ".cache" / "mrvae_kernels" / "triton-tiles.json"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert tuning.cache_file() == tmp_path / "Library" / "Caches" / "mrvae_kernels" / "triton-tiles.json"


def test_without_a_home_results_last_as_long_as_the_process(monkeypatch):
    monkeypatch.setattr(tuning, "cache_file", lambda: None)
    device = Device({ROW[0]: 0.5})
    with tuning.autotune(device.timer):
        assert choose(device) == ROW[0]
    assert choose() == ROW[0]
    tuning.forget()
    assert choose() == FIRST


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_events_tell_a_long_launch_from_a_short_one():
    device = torch.device("cuda", torch.cuda.current_device())
    x = torch.randn(4096, 4096, device=device)
    timer = tuning.event_timer(device)
    for call in (lambda: x @ x, lambda: x[:64] @ x):
        timer(call)
    assert 0 < timer(lambda: x[:64] @ x) < timer(lambda: x @ x) < 1

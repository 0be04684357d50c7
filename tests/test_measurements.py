"""The records of measurements: where they lie, who wins, and what a bad file does."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest
import torch

from mrvae_kernels import measurements
from mrvae_kernels.measurements import best_backend, best_strategy, read, shape_class, write

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _folders(monkeypatch, tmp_path):
    monkeypatch.setattr(measurements, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setenv("MRVAE_CACHE", str(tmp_path / "user"))
    measurements.records.cache_clear()
    yield
    measurements.records.cache_clear()


def test_nothing_measured_nothing_known():
    assert best_backend(CPU, "gates") is None and best_strategy(CPU, "linear float32 shared 7 8 10") is None


def test_the_fastest_wins_and_the_users_record_over_the_packages(tmp_path):
    key = shape_class("linear", "float32", False, 128, 300, 784)
    assert key == "linear float32 shared 7 8 10"
    write(tmp_path / "shipped" / "cpu.json", "cpu", {}, {"backends": {"gates": {"reference": 1, "triton": 2}},
                                                        "strategies": {key: {"fold": 1.0, "fused": 2.0}}})
    assert (best_backend(CPU, "gates"), best_strategy(CPU, key)) == ("reference", "fold")
    write(tmp_path / "user" / "cpu.json", "cpu", {}, {"backends": {}, "strategies": {key: {"fold": 3.0, "fused": 2.0}}})
    assert (best_backend(CPU, "gates"), best_strategy(CPU, key)) == ("reference", "fused")


def test_writing_merges_and_leaves_no_other_file(tmp_path):
    path = tmp_path / "user" / "cpu.json"
    found = [{"strategies": {f"linear float32 shared {i} 0 0": {"fold": 1.0 + i}}} for i in range(8)]
    for part in found:
        write(path, "cpu", {"torch": "x"}, part)
    assert len(read(path)["strategies"]) == 8 and os.listdir(path.parent) == ["cpu.json"]
    assert json.loads(path.read_text())["versions"] == {"torch": "x"}


def test_readers_never_see_half_a_file(tmp_path):
    path, stop, seen = tmp_path / "cpu.json", threading.Event(), []
    write(path, "cpu", {}, {"strategies": {"k": {"fold": 1.0}}})

    def look() -> None:
        while not stop.is_set():
            seen.append(read(path))

    reader = threading.Thread(target=look)
    reader.start()
    for i in range(50):
        write(path, "cpu", {}, {"strategies": {f"k{i}": {"fold": 1.0}}})
    stop.set()
    reader.join()
    assert all(record["strategies"] for record in seen)


@pytest.mark.parametrize("text", [
    "", "{", "[]", '{"strategies": 3}', '{"strategies": {"k": {"fold": -1}}}',
    '{"backends": {"gates": {"triton": "x"}}}', '{"strategies": {"k": {"fold": NaN}}}',
])
def test_a_bad_file_is_named_and_ignored(tmp_path, text):
    path = tmp_path / "user" / "cpu.json"
    path.parent.mkdir()
    path.write_text(text)
    with pytest.warns(UserWarning, match="cpu.json is not a record of measurements"):
        assert best_strategy(CPU, "k") is None
    with pytest.warns(UserWarning, match="not a record"):
        write(path, "cpu", {}, {"strategies": {"k": {"fold": 1.0}}})
    assert read(path)["strategies"] == {"k": {"fold": 1.0}}


def test_folders_and_file_names(monkeypatch):
    assert measurements.file_name("NVIDIA H200") == "nvidia-h200.json"
    monkeypatch.delenv("MRVAE_CACHE")
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert measurements.cache_folder() == Path("/somewhere/mrvae_kernels")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/user")
    assert measurements.cache_folder() == Path("/home/user/.cache/mrvae_kernels")

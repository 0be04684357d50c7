"""The records of measurements: where they lie, who wins, and what a bad file does."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch

import mrvae_kernels as mk
from mrvae_kernels import measurements, strategy
from mrvae_kernels.measurements import best_backend, read, shape_class, strategy_times, write
from mrvae_kernels.triton_kernels import cache

CPU = torch.device("cpu")


def best_strategy(device: torch.device, key: str) -> str | None:
    times = strategy_times(device, key)
    return min(times, key=times.__getitem__, default=None)
VERSIONS = measurements.installed_versions()


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
        write(path, "cpu", {"more": "x"}, part)
    assert len(read(path)["strategies"]) == 8 and set(os.listdir(path.parent)) == {"cpu.json", "cpu.lock"}
    assert json.loads(path.read_text())["versions"] == {**VERSIONS, "more": "x"}


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


def content(**sections: object) -> str:
    return json.dumps({"versions": VERSIONS, **sections})


BAD = {
    "empty": "", "truncated": "{", "a list": "[]", "no versions": '{"strategies": {}}', "deep": "[" * 200_000,
    "versions in a list": '{"versions": []}', "a number": content(strategies=3),
    "negative": content(strategies={"k": {"fold": -1}}), "a word": content(backends={"gates": {"triton": "x"}}),
    "not a number": content(strategies={"k": {"fold": float("nan")}}),
    "no float": content(strategies={"k": {"fold": 10**400}}), "a list of times": content(strategies={"k": [1]}),
}


@pytest.mark.parametrize("text", BAD.values(), ids=BAD)
def test_a_bad_file_is_named_ignored_and_replaced(tmp_path, text):
    path = tmp_path / "user" / "cpu.json"
    path.parent.mkdir()
    path.write_text(text)
    with pytest.warns(UserWarning, match="cpu.json is not a record of measurements, is ignored, and replaced when"):
        assert best_strategy(CPU, "k") is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write(path, "cpu", {}, {"strategies": {"k": {"fold": 1.0}}})
        assert read(path)["strategies"] == {"k": {"fold": 1.0}}


def test_names_that_are_not_known_do_not_count(tmp_path):
    assert measurements.SECTIONS == {"backends": strategy.BACKENDS, "strategies": strategy.STRATEGIES}
    path = tmp_path / "user" / "cpu.json"
    path.parent.mkdir()
    path.write_text(content(strategies={"k": {"turbo": 1, "fold": 2}, "l": {"turbo": 1}},
                            backends={"fold": {"abacus": 1, "reference": 3, "triton": 2}}))
    assert read(path) == {"strategies": {"k": {"fold": 2.0}}, "backends": {"fold": {"reference": 3.0, "triton": 2.0}}}
    assert (best_strategy(CPU, "k"), best_strategy(CPU, "l"), best_backend(CPU, "fold")) == ("fold", None, "triton")


@pytest.mark.parametrize(("name", "version"), [("torch", "1.0.0"), ("triton", "1.0.0"), ("torch", None)])
def test_records_of_other_versions_are_ignored_and_replaced(tmp_path, monkeypatch, name, version):
    monkeypatch.setattr(measurements, "triton_version", lambda: "3.7.1")
    path = tmp_path / "cpu.json"
    write(path, "cpu", {name: version}, {"strategies": {"old": {"fold": 1.0}}})
    assert read(path) == {}
    write(path, "cpu", {}, {"strategies": {"new": {"fold": 1.0}}})
    assert read(path)["strategies"] == {"new": {"fold": 1.0}}


def test_patch_and_local_versions_and_one_that_cannot_be_told_do_not_matter(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.13.0+cu130")
    monkeypatch.setattr(measurements, "triton_version", lambda: "3.7.1")
    write(tmp_path / "cpu.json", "cpu", {"torch": "2.13.2", "triton": "3.7.0"}, {"strategies": {"k": {"fold": 1.0}}})
    assert read(tmp_path / "cpu.json")["strategies"]
    monkeypatch.setattr(measurements, "triton_version", lambda: None)
    assert read(tmp_path / "cpu.json")["strategies"]


@pytest.mark.parametrize("installed", [*measurements.TRITON_DISTRIBUTIONS, None])
def test_tritons_version_by_any_distribution_and_without_an_error(monkeypatch, installed):
    def version(name: str) -> str:
        if name == installed:
            return "3.5.0"
        raise importlib.metadata.PackageNotFoundError(name) if name == "triton" else KeyError("damaged")

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert measurements.triton_version.__wrapped__() == (installed and "3.5.0")


def test_a_backend_wins_by_a_margin_over_plain_pytorch():
    winner = measurements.winner
    assert winner({"reference": 1.0, "triton": 0.96}) == winner({"reference": 1.0, "triton": 2.0}) == "reference"
    assert winner({"reference": 1.0, "triton": 0.95}) == "triton"
    assert winner({"triton": 1.0}) is None and winner({}) is None, "nothing to compare with"


WRITER = """
import sys
from pathlib import Path
from mrvae_kernels import measurements
print("ready", flush=True)
sys.stdin.readline()
for i in range(40):
    measurements.write(Path(sys.argv[2]), "cpu", {}, {"strategies": {f"{sys.argv[1]} {i}": {"fold": 1.0}}})
"""


def test_two_processes_that_write_at_once(tmp_path):
    path = tmp_path / "cpu.json"
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, name, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for name in ("one", "two")
    ]
    assert [writer.stdout.readline() for writer in writers] == ["ready\n"] * 2
    for writer in writers:
        writer.stdin.write("go\n")
        writer.stdin.flush()
    assert [writer.wait(timeout=120) for writer in writers] == [0, 0]
    assert set(read(path)["strategies"]) == {f"{name} {i}" for name in ("one", "two") for i in range(40)}


def test_without_a_home_nothing_is_known(monkeypatch):
    monkeypatch.delenv("MRVAE_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("sys.platform", "linux")

    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", home)
    assert measurements.cache_folder() is None
    assert best_backend(CPU, "gates") is None


@pytest.mark.skipif(os.name == "nt", reason="modes are POSIX's")
def test_files_have_the_mode_that_the_umask_gives(tmp_path):
    before = os.umask(0o027)
    try:
        write(tmp_path / "cpu.json", "cpu", {}, {})
    finally:
        os.umask(before)
    assert (tmp_path / "cpu.json").stat().st_mode & 0o777 == 0o640


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    cache.write_json(tmp_path / "f.json", {"a": 1})
    with pytest.raises(TypeError):
        cache.write_json(tmp_path / "f.json", {"a": {1}})
    assert json.loads((tmp_path / "f.json").read_text()) == {"a": 1} and os.listdir(tmp_path) == ["f.json"]


def test_importing_the_package_does_not_import_triton():
    code = "import sys, mrvae_kernels; print('triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


def test_folders_and_file_names(monkeypatch):
    assert measurements.file_name("NVIDIA H200") == "nvidia-h200.json"
    monkeypatch.delenv("MRVAE_CACHE")
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert measurements.cache_folder() == Path("/somewhere/mrvae_kernels")
    monkeypatch.setenv("HOME", "/home/user")
    for ignored in ("", "relative"):  # as the XDG specification says
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        assert measurements.cache_folder() == Path("/home/user/.cache/mrvae_kernels")


def test_a_network_follows_a_record_that_comes_later(monkeypatch, tmp_path):
    key = shape_class("linear", "float32", False, 2, 4, 3)
    model, x = mk.multirate(torch.nn.Sequential(torch.nn.Linear(3, 4)), gates="sigmoid"), torch.rand(2, 3)
    monkeypatch.setattr(  # as for a GPU's tensors
        mk.functional, "linear_strategy",
        lambda x, weight, per_sample, asked=None: asked or best_strategy(CPU, key) or "epilogue",
    )
    ran = []
    monkeypatch.setattr(model._entries[0].adapter, "direct", lambda layer: False)  # so that it goes by Python each time

    def noted(*args: object, strategy: str) -> torch.Tensor:
        ran.append(strategy)
        return gated_linear(*args, strategy="epilogue")

    gated_linear = mk.functional.gated_linear
    monkeypatch.setattr(mk.functional, "gated_linear", noted)
    for _ in range(3):
        model(x, beta=0.5)
    write(tmp_path / "user" / "cpu.json", "cpu", {}, {"strategies": {key: {"epilogue": 2.0, "fused": 1.0}}})
    for _ in range(3):
        model(x, beta=0.5)
    assert ran == ["epilogue"] * 3 + ["fused"] * 3

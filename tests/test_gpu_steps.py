"""The steps of `make gpu` besides bench.gpu: build, tests side by side, compute-sanitizer; without a GPU."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import build_support as support
import mrvae_kernels as mk
from bench import gpu_build, gpu_sanitize, gpu_tests
from bench.gpu_processes import limited

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


GPU_STEPS = ["bench.gpu_build", "bench.gpu_tests", "bench.gpu_sanitize", "bench.gpu", "bench.overhead", "bench.growth"]


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("broken", [*GPU_STEPS, ""])
def test_make_gpu_runs_every_step_and_fails_if_one_does(broken, tmp_path):
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "ran $*"\ncase "$* " in *"-m {broken or "none"} "*) exit 3;; esac\n')
    python.chmod(0o755)
    done = subprocess.run(
        ["make", "gpu", f"PYTHON={python}", f"GPU_OUT={tmp_path}/out"], cwd=Path(__file__).parents[1],
        capture_output=True, text=True, check=False,
    )
    assert (done.returncode != 0) is bool(broken)
    ran = [line.split()[2] for line in done.stdout.splitlines() if line.startswith("ran -m ")]
    assert ran == GPU_STEPS
    for name in ("build", "tests", "sanitizer"):
        assert "ran -m" in (tmp_path / "out" / f"{name}.log").read_text()
    seconds = [int(part.split()[0]) for part in done.stdout.split("--seconds ")[1:]]
    assert 480 < sum(seconds[-3:]) <= 510 and seconds[-1] < seconds[-2] == seconds[-3]


def a_program(folder, name, script):
    """An executable of this name, in a folder of its own."""
    folder.mkdir(exist_ok=True)
    program = folder / name
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    return program


def test_a_program_whose_time_is_up_ends_with_its_children(tmp_path):
    program = a_program(tmp_path, "program", "sleep 60 & echo $!; wait")
    code, said = limited([str(program)], 1)
    assert code is None
    child = Path(f"/proc/{said.strip()}/stat")

    def gone():  # killed, if not yet collected
        try:
            return child.read_text().split()[2] in "ZX"
        except OSError:
            return True

    deadline = time.monotonic() + 10
    while not gone() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert gone()


# ---- the build -------------------------------------------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch):
    """A machine that seems to have two kinds of GPU and an nvcc."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: [(9, 0), (8, 0), (9, 0)][index])
    monkeypatch.setattr(support, "toolkit", lambda: support.Toolkit(Path("nvcc"), Path("/usr"), "13.0"))


@pytest.mark.parametrize(("script", "code", "said"), [
    ('case "$1" in -c) echo None;; *) echo "$* for $TORCH_CUDA_ARCH_LIST";; esac', 0, "has CUDA kernels for 8.0;9.0"),
    ('case "$1" in -c) echo "it broke";; esac', 1, "no CUDA core, what follows is about Triton only: it broke"),
    ("exit 4", 1, "the build ended with exit code 4"),
    ("sleep 5", 1, "the build took more than 1 s"),
])
def test_the_build_is_for_the_gpus_that_are_there_and_says_what_came_of_it(gpu, monkeypatch, tmp_path, capfd, script,
                                                                           code, said):
    monkeypatch.setattr(sys, "executable", str(a_program(tmp_path, "python", script)))
    assert gpu_build.main(["--seconds", "1"]) == code
    printed = capfd.readouterr().out
    assert said in printed
    if code == 0:
        assert "setup.py build_ext --inplace for 8.0;9.0" in printed


def test_without_nvcc_or_gpu_nothing_is_built(gpu, monkeypatch, capsys):
    monkeypatch.setattr(gpu_build, "build", lambda seconds: pytest.fail("there is nothing to build with"))
    monkeypatch.setattr(support, "toolkit", lambda: None)
    assert gpu_build.main([]) == 0 and "there is no nvcc" in capsys.readouterr().out
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_build.main([]) == 0 and "no GPU to build for" in capsys.readouterr().out


# ---- the tests -------------------------------------------------------------------------------------------------------


def test_test_files_run_by_themselves_and_each_must_pass(tmp_path, capsys):
    (tmp_path / "test_good.py").write_text("def test_one(): pass\n")
    (tmp_path / "test_empty.py").write_text("import pytest\n@pytest.mark.slow\ndef test_one(): assert False\n")
    assert gpu_tests.main([str(tmp_path), "-m", "not slow", "--jobs", "2"]) == 0
    assert "2 of 2 test files pass" in capsys.readouterr().out
    (tmp_path / "test_bad.py").write_text("def test_one(): assert False\n")
    assert gpu_tests.main([str(tmp_path / "test_bad.py"), str(tmp_path / "test_good.py")]) == 1
    said = capsys.readouterr().out
    assert "1 of 2 test files pass" in said and "test_bad.py: 1 failed" in said


def test_test_files_that_take_too_long_are_named(tmp_path, capsys):
    (tmp_path / "test_slow.py").write_text("import time\ndef test_one(): time.sleep(60)\n")
    (tmp_path / "test_waits.py").write_text("def test_one(): pass\n")
    assert gpu_tests.main([str(tmp_path), "--jobs", "1", "--seconds", "2"]) == 1
    said = capsys.readouterr().out
    assert "test_slow.py: not finished: the time was up" in said
    assert "test_waits.py: not begun: the time was up" in said
    with pytest.raises(FileNotFoundError, match="there is no test file"):
        gpu_tests.main([str(tmp_path / "none")])


# ---- compute-sanitizer -----------------------------------------------------------------------------------------------


def test_the_operators_that_are_sanitized_run(capsys):
    """On the core's kernels where it has them for this device, otherwise all but the fused in plain PyTorch."""
    if mk.ops.GPU_TYPE == DEVICE.type:
        gpu_sanitize.run_operators(DEVICE, "cpp", (torch.float32,))
        names = capsys.readouterr().out.splitlines()
    else:
        names = []
        with mk.override(backend="reference"):
            for name, run in gpu_sanitize.operators(DEVICE, (torch.float32,)):
                names.append(name)
                assert name.startswith("fused") or all(value.isfinite().all() for value in run())
    assert len(names) == len(set(names)) == 3 * 2 + 1 + 2 * 5 * 3 + 1
    for name in ("gates per sample", "fold float32", "epilogue channels last", "fused conv_transpose2d per sample"):
        assert any(line.startswith(name) for line in names)


CLEAN = {"memcheck": "========= ERROR SUMMARY: 0 errors",
         "racecheck": "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"}


@pytest.mark.parametrize(("script", "wrong"), [
    ("", None),
    ("echo '========= ERROR SUMMARY: 3 errors'; exit 99", "3 found"),
    ("echo '========= RACECHECK SUMMARY: 1 hazard displayed (0 errors, 1 warning)'", "1 found"),
    ("exit 1", "ended with exit code 1"),
    ("echo nothing", "ended without its summary"),
    ("sleep 5", "not finished after 1 s"),
])
def test_what_a_tool_found_is_read_from_its_summary_and_exit_code(tmp_path, capsys, script, wrong):
    tool = "racecheck" if "RACECHECK" in script else "memcheck"
    program = a_program(tmp_path, "compute-sanitizer", script or f"echo '{CLEAN[tool]}'")
    assert gpu_sanitize.check(tool, str(program), 1) == wrong


def test_both_tools_look_at_our_kernels_without_torch_s_cache(gpu, tmp_path, monkeypatch, capsys):
    lines = ['"$* cache $PYTORCH_NO_CUDA_MEMORY_CACHING"', *(f"'{line}'" for line in CLEAN.values())]
    program = a_program(tmp_path, "compute-sanitizer", "; ".join(f"echo {line}" for line in lines))
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    monkeypatch.setattr(gpu_sanitize, "absent", lambda device: {})
    assert gpu_sanitize.main([]) == 0
    said = capsys.readouterr().out
    for tool in CLEAN:
        assert f"--tool {tool} --error-exitcode 99 --kernel-name kns=mrvae {sys.executable}" in said
    assert said.count("cache 1") == 2 and "memcheck: clean, racecheck: clean" in said


def test_where_nothing_can_be_sanitized_one_line_says_why(gpu, monkeypatch, capsys):
    monkeypatch.setattr(gpu_sanitize, "check", lambda *_: pytest.fail("there is nothing to check"))
    monkeypatch.setattr(gpu_sanitize, "absent", lambda device: {"cpp": "it was built without them"})
    assert gpu_sanitize.main([]) == 0 and "there is no CUDA core: it was built without" in capsys.readouterr().out
    monkeypatch.setattr(gpu_sanitize, "absent", lambda device: {})
    monkeypatch.setattr(gpu_sanitize, "find", lambda: None)
    assert gpu_sanitize.main([]) == 0 and "compute-sanitizer is neither in PATH" in capsys.readouterr().out
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_sanitize.main([]) == 0 and "finds no GPU" in capsys.readouterr().out


def test_the_marker_that_make_gpu_leaves_out_is_known(pytestconfig):
    assert any(line.startswith("ahead_of_time:") for line in pytestconfig.getini("markers"))

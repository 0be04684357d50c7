"""Every kernel compiles for every architecture, without a GPU, and nothing spills.

All variants take a quarter of an hour on two cores, so `make kernels` compiles them, and its committed file says of
which sources it is. Here that file is held to the sources, and each EVERY-th variant is compiled again. The compiler
runs in processes of its own, since the kernels of this one may be interpreted.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys

import pytest
from kernel_checks import PACKAGE

ahead_of_time = pytest.importorskip("bench.ahead_of_time")

pytestmark = pytest.mark.ahead_of_time
ROOT = PACKAGE.parents[1]
RECORD = ROOT / "bench" / "results" / "triton-resources.json"
EVERY, MINUTES = 13, 15


def run(*arguments: str, interpreted: bool = False) -> tuple[int, str]:
    """Exit code and output of Python with these arguments, in the repository, without the interpreter's variable."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if interpreted:
        environment["TRITON_INTERPRET"] = "1"
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env={**environment, "PYTHONPATH": str(ROOT)}, capture_output=True,
        text=True, timeout=60 * MINUTES, check=False,
    )
    return done.returncode, done.stdout + done.stderr


def key(result: dict) -> tuple:
    return tuple(result[name] for name in ("target", "module", "variant", "warps", "stages"))


def test_the_record_is_of_these_kernels_and_nothing_spills():
    record, now = json.loads(RECORD.read_text()), ahead_of_time.digests()
    sources = record.get("sources", {})
    changed = sorted(name for name in {*sources, *now} if sources.get(name) != now.get(name))
    assert not changed, f"{RECORD.name} is of other sources ({', '.join(changed)}): run make kernels, commit it"
    pinned = re.search(r"^TRITON := triton==(\S+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert pinned and record["machine"]["triton"] == pinned[1], "run make kernels with the Makefile's Triton, commit it"
    jobs = ahead_of_time.jobs_of(ahead_of_time.MODULES, list(ahead_of_time.SHARED_BYTES))
    assert [key(job.about()) for job in jobs] == [key(result) for result in record["results"]]
    found = [(*key(result), ahead_of_time.problem(result)) for result in record["results"]]
    assert not [result for result in found if result[-1] is not None]


def test_a_part_compiles_again_to_what_the_record_says(tmp_path):
    code, output = run("-m", "bench.ahead_of_time", "--every", str(EVERY), "--out", str(tmp_path / "part.json"))
    assert code == 0, "\n".join(output.splitlines()[-40:])
    record, part = json.loads(RECORD.read_text()), json.loads((tmp_path / "part.json").read_text())
    assert {result["target"] for result in part["results"]} == set(ahead_of_time.SHARED_BYTES)
    assert len({result["module"] for result in part["results"]}) > 5
    if part["machine"]["triton"] == record["machine"]["triton"]:
        assert part["results"] == record["results"][::EVERY]


def test_a_file_that_changes_meanwhile_is_no_result(tmp_path, monkeypatch, capsys):
    digests = iter([{"gates.py": "a"}, {"gates.py": "b"}])
    monkeypatch.setattr(ahead_of_time, "digests", lambda: next(digests))
    monkeypatch.setattr(ahead_of_time, "INTERPRETED", False)
    monkeypatch.setattr(ahead_of_time, "compile_all", lambda jobs, processes: iter([]))
    assert ahead_of_time.main(["--only", "launch", "--out", str(tmp_path / "out.json")]) == 2
    assert "were changed meanwhile" in capsys.readouterr().out and not (tmp_path / "out.json").exists()


def test_every_launched_kernel_is_compiled():
    names, launched = ahead_of_time.MODULES, set()
    compiled = {variant.kernel for name in names for variant in ahead_of_time.variants_of(name, "sm_90")}
    for name in names:
        module = importlib.import_module(f"mrvae_kernels.triton_kernels.{name}")
        called = set(re.findall(r"\b(\w+)\[.*\]\(", (PACKAGE / f"{name}.py").read_text()))  # kernel[grid](
        found = {getattr(module, kernel, None) for kernel in called}
        launched |= {kernel for kernel in found if type(kernel).__name__ in ("JITFunction", "InterpretedFunction")}
    assert len(launched) > 5
    assert launched <= compiled, [kernel.__name__ for kernel in launched - compiled]


TOY = '''
import sys
import triton
import triton.language as tl
from bench import ahead_of_time
from mrvae_kernels.triton_kernels.launch import Variant

@triton.jit
def toy(a, b, c, size, SIDE: tl.constexpr):
    rows, lanes = tl.arange(0, SIDE), tl.arange(0, 16)
    total = tl.zeros((SIDE, SIDE), tl.float32)
    for start in range(0, size, 16):
        x = tl.load(a + rows[:, None] * size + (start + lanes)[None, :])
        y = tl.load(b + rows[None, :] * size + (start + lanes)[:, None])
        total = tl.dot(x, y, total, input_precision="ieee")
    tl.store(c + rows[:, None] * SIDE + rows[None, :], total)

for target in ("sm_80", "sm_90", "sm_100", "gfx942"):
    for side in (32, int(sys.argv[1 if target.startswith("sm") else 2])):
        types = {"a": "*fp32", "b": "*fp32", "c": "*fp32", "size": "i32"}
        source = ahead_of_time.source(Variant("toy", toy, types, {"SIDE": side}, divisible=("size",)))
        compiled = ahead_of_time.triton.compile(source, target=ahead_of_time.gpu_target(target))
        print(target, side, ahead_of_time.resources(ahead_of_time.gpu_target(target), compiled))
'''


def test_a_spill_is_seen(tmp_path):
    (tmp_path / "toy.py").write_text(TOY)
    code, output = run(str(tmp_path / "toy.py"), "128", "256")
    assert code == 0, output
    found = dict(re.findall(r"^(\w+ \d+) .*'forced': (\d+)", output, re.MULTILINE))
    assert len(found) == 8, output
    assert all((int(spill) > 0) == (not key.endswith(" 32")) for key, spill in found.items()), output


def test_a_limit_of_registers_is_the_compiler_s_too(tmp_path):
    (tmp_path / "limited.py").write_text(
        """
import dataclasses
from bench import ahead_of_time
kernel = next(variant for variant in ahead_of_time.variants_of("fold", "sm_90") if variant.label.endswith("split=True"))
for limit in (kernel.limit, {"maxnreg": 64}):
    ahead_of_time.variants_of = lambda *_: [dataclasses.replace(kernel, limit=limit)]
    result = ahead_of_time.compile_variant(ahead_of_time.Job("sm_90", "fold", 0))
    print(limit["maxnreg"], result["registers"] <= limit["maxnreg"], result["spill"] > 0, result["forced"])
"""
    )
    code, output = run(str(tmp_path / "limited.py"))
    assert code == 0, output
    assert output.splitlines()[-2:] == ["128 True False 0", "64 True True 0"]


def test_it_refuses_to_check_interpreted_kernels():
    code, output = run("-m", "bench.ahead_of_time", "--only", "launch", interpreted=True)
    assert code == 2 and "TRITON_INTERPRET is set" in output


@pytest.mark.parametrize(
    ("result", "told"),
    [
        ({"error": "CompilationError: at 3:5"}, "does not compile: CompilationError: at 3:5"),
        (
            {"spill": 12, "forced": 8, "shared": 0},
            "spills 12 bytes a thread, 8 of them where registers are exhausted",
        ),
        (
            {"spill": 8, "forced": 0, "shared": 0},
            "spills 8 bytes a thread, 0 of them where registers are exhausted",
        ),
        ({"spill": 0, "forced": 0, "shared": 300_000}, "needs 300000 bytes of shared memory; 232448 are there"),
        ({"spill": 0, "forced": 0, "shared": 232_448}, None),
    ],
)
def test_what_counts_as_a_problem(result, told, monkeypatch, capsys):
    result = {"target": "sm_90", "module": "launch", "variant": "the label", **result}
    assert ahead_of_time.problem(result) == told
    monkeypatch.setattr(ahead_of_time, "INTERPRETED", False)
    monkeypatch.setattr(ahead_of_time, "compile_all", lambda jobs, processes: iter([result]))
    assert ahead_of_time.main(["--only", "launch", "--targets", "sm_90"]) == (told is not None)
    assert (f"sm_90 launch: the label: {told}" in capsys.readouterr().out) == (told is not None)


def test_a_variant_that_does_not_fit_its_kernel_is_named():
    variant = ahead_of_time.variants_of("launch", "sm_90")[0]
    lacking = {name: kind for name, kind in variant.types.items() if name != "p3"}
    with pytest.raises(ValueError, match="write_pointers: arguments that the kernel or the variant lacks: p3"):
        ahead_of_time.source(variant.__class__(variant.label, variant.kernel, lacking, {}))


def test_a_crash_of_the_compiler_is_one_variant_s_problem(tmp_path):
    (tmp_path / "crash.py").write_text(
        """
import os, sys
sys.path.insert(0, os.path.dirname(__file__))
from bench import ahead_of_time
import crash

def compile_or_die(job):
    if job.target == "sm_90":
        os.abort()
    return {"target": job.target}

if __name__ == "__main__":
    ahead_of_time.compile_variant = crash.compile_or_die
    jobs = ahead_of_time.jobs_of(["launch"], ["sm_80", "sm_90", "sm_100"])
    for result in ahead_of_time.compile_all(jobs, 2):
        print(result["target"], result.get("error"))
"""
    )
    code, output = run(str(tmp_path / "crash.py"))
    assert code == 0, output
    assert output.splitlines()[-3:] == ["sm_80 None", "sm_90 the compiler crashed", "sm_100 None"]

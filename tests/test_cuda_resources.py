"""The listing of what CUDA kernels need: what it reads in the tools' output, and what makes it fail."""

from __future__ import annotations

import json
import os
import shutil
import sys

import pytest
from environments import ROOT

sys.path.insert(0, str(ROOT))
import build_support as support  # noqa: E402
from bench import cuda_resources as listing  # noqa: E402

USAGE = """
Fatbin elf code:
================
arch = sm_80
host = linux

Resource usage:
 Common:
  GLOBAL:0
 Function _ZN5mrvae4cuda12_GLOBAL__N_15gatesIfEEvPKf:
  REG:14 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:372 TEXTURE:0 SURFACE:0 SAMPLER:0

Fatbin ptx code:
================
arch = sm_90
compressed

Fatbin elf code:
================
arch = sm_90

Resource usage:
 Common:
  GLOBAL:0
 Function _ZN5mrvae4cuda12_GLOBAL__N_15gatesIfEEvPKf:
  REG:32 STACK:720 SHARED:1024 LOCAL:0 CONSTANT[0]:544 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
VERBOSE = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z1av' for 'sm_90'
ptxas info    : Function properties for _Z1av
    720 bytes stack frame, 1300 bytes spill stores, 1384 bytes spill loads
ptxas info    : Used 32 registers, used 0 barriers, 720 bytes cumulative stack size
ptxas info    : Compiling entry function '_Z1bv' for 'sm_90'
ptxas info    : Function properties for _Z1bv
    8 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
"""


def kernel(target: str, name: str = "gates<float>", **changes) -> dict:
    return {
        "target": target, "source": "gates.cu", "kernel": name, "registers": 14, "stack": 0, "shared": 0, "spill": 0,
    } | changes  # fmt: skip


def test_the_committed_listing_is_of_these_sources_for_every_target_and_without_a_spill():
    record, now = json.loads((ROOT / "bench" / "results" / "cuda-resources.json").read_text()), listing.compiled_from()
    then, files = record["sources"], now["sources"]
    changed = sorted(name for name in {*then, *files} if then.get(name) != files.get(name))
    assert not changed, f"the listing is of other sources ({', '.join(changed)}): run make cuda, commit it"
    assert record["nvcc_flags"] == now["nvcc_flags"], "the listing is of other flags: run make cuda, commit it"
    assert not listing.problems(record["results"], ["sm_" + wanted.replace(".", "") for wanted in support.WANTED])


def test_the_sources_are_those_that_the_kernels_are_compiled_from():
    names = set(listing.compiled_from()["sources"])
    assert {"gate.h", "elementary.h", "cuda/kernels.h", "kernels.h"} < names
    kernels = {path.name for path in (ROOT / "csrc" / "cuda").iterdir() if path.suffix in (".cu", ".cuh", ".h")}
    assert {f"cuda/{name}" for name in kernels} == {name for name in names if "cuda/" in name}


@pytest.fixture
def csrc(tmp_path, monkeypatch):
    """A source that includes headers in every way that a compiler takes."""
    (tmp_path / "cuda").mkdir()
    lines = ("#include <vector>", '#include "../b.h"', '  # include"c.h"', '#include "cuda_shim.h"')
    (tmp_path / "cuda" / "a.cu").write_text("\n".join(lines))
    (tmp_path / "b.h").write_text('#include "b.h"\n')
    (tmp_path / "c.h").write_text("")
    monkeypatch.setattr(listing, "SOURCES", tmp_path / "cuda")
    return tmp_path


def test_a_change_of_any_header_or_flag_is_another_listing(csrc, monkeypatch):
    before = listing.compiled_from()
    assert list(before["sources"]) == ["b.h", "c.h", "cuda/a.cu"]
    (csrc / "c.h").write_text("int changed;\n")
    after = listing.compiled_from()["sources"]
    assert [name for name, digest in after.items() if digest != before["sources"][name]] == ["c.h"]
    monkeypatch.setattr(support, "NVCC_FLAGS", ("-O0",))
    assert listing.compiled_from()["nvcc_flags"] != before["nvcc_flags"]
    (csrc / "b.h").write_text('#include "missing.h"\n')
    with pytest.raises(ValueError, match='b.h includes "missing.h", which is in neither'):
        listing.compiled_from()


def test_an_object_that_is_older_than_a_header_is_not_listed(csrc, monkeypatch):
    monkeypatch.setattr(listing, "find_cuobjdump", lambda toolkit: "true")
    built = csrc / "objects" / "csrc" / "cuda" / "a.o"
    built.parent.mkdir(parents=True)
    built.write_text("")
    os.utime(built, (0, 0))
    with pytest.raises(support.CannotBuild, match="a.o is older than b.h, c.h, a.cu; run: make cuda"):
        listing.collect(csrc / "objects", None, 1)
    os.utime(built)
    assert listing.collect(csrc / "objects", None, 1) == []


def test_registers_stack_and_shared_memory():
    name = "_ZN5mrvae4cuda12_GLOBAL__N_15gatesIfEEvPKf"
    assert listing.parse_usage(USAGE) == [
        {"target": "sm_80", "name": name, "registers": 14, "stack": 0, "shared": 0},
        {"target": "sm_90", "name": name, "registers": 32, "stack": 720, "shared": 1024},
    ]


def test_two_compilations_give_an_unnamed_namespace_two_names():
    first = "_ZN5mrvae4cuda45_GLOBAL__N__af4c2aef_8_gates_cu_978cf43f_363621gates_backward_kernelIdEEvv"
    second = "_ZN5mrvae4cuda44_GLOBAL__N__af4c2aef_8_gates_cu_67a776cb_36321gates_backward_kernelIdEEvv"
    assert listing.unnumbered(first) == "_ZN5mrvae4cuda12_GLOBAL__N_121gates_backward_kernelIdEEvv"
    assert listing.unnumbered(second) == listing.unnumbered(first) and listing.unnumbered("_Z1av") == "_Z1av"


def test_spills_are_what_is_stored_and_loaded_not_the_frame():
    assert listing.parse_spills(VERBOSE) == {"_Z1av": 1300 + 1384, "_Z1bv": 0}


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("void mrvae::cuda::(anonymous namespace)::gates<float>(float const*, int)", "gates<float>"),
        ("mrvae::cuda::finish(float*)", "finish"),
        ("void mrvae::cuda::fold<mrvae::BFloat16, (mrvae::Gate)2, (4 > 2)>(int)", "fold<BFloat16, (Gate)2, (4 > 2)>"),
        ("_Z1av", "_Z1av"),
    ],
)
def test_names_as_in_the_source(name, short):
    assert listing.readable(name) == short


@pytest.mark.skipif(shutil.which("c++filt") is None, reason="there is no c++filt")
def test_names_are_demangled():
    assert listing.demangled(["_ZN5mrvae4cuda12_GLOBAL__N_15gatesIfEEvPKf"]) == ["gates<float>"]


def test_what_makes_it_fail():
    fine = [kernel("sm_80"), kernel("sm_90", stack=8)]
    assert listing.problems(fine, ["sm_80", "sm_90"]) == []
    assert listing.problems([*fine[:1], kernel("sm_90", spill=24)], ["sm_80", "sm_90"]) == [
        "sm_90 gates.cu: gates<float>: spills 24 bytes a thread"
    ]
    assert listing.problems([*fine[:1], kernel("sm_90", spill=None)], ["sm_80"]) == [
        "sm_90 gates.cu: gates<float>: ptxas does not say what it spills"
    ]
    assert listing.problems(fine, ["sm_80", "sm_90", "sm_100"]) == ["sm_100 gates.cu: gates<float>: was not compiled"]
    assert listing.problems([], ["sm_80"]) == ["there is no kernel in the objects"]
    assert " ".join(listing.line(kernel("sm_90", spill=None)).split()) == "sm_90 14 ? 0 0 gates.cu: gates<float>"


def test_a_source_that_was_not_compiled_is_named(tmp_path, monkeypatch):
    (tmp_path / "gates.cu").touch()
    monkeypatch.setattr(listing, "SOURCES", tmp_path)
    monkeypatch.setattr(listing, "find_cuobjdump", lambda toolkit: "cuobjdump")
    toolkit = support.Toolkit(tmp_path / "nvcc", tmp_path, "13.0")
    with pytest.raises(support.CannotBuild, match="gates.cu has not been compiled into .*; run: make cuda"):
        listing.collect(tmp_path, toolkit, 1)


def test_without_cuobjdump(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(listing.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(support.CannotBuild, match="there is no cuobjdump; run: .* -m pip install triton"):
        listing.find_cuobjdump(support.Toolkit(tmp_path / "nvcc", tmp_path, "13.0"))


@pytest.mark.skipif(support.toolkit() is None, reason="there is no nvcc")
def test_a_spilling_kernel_is_found(tmp_path, monkeypatch):
    source = tmp_path / "spilling.cu"
    source.write_text(
        "extern \"C\" __global__ void __launch_bounds__(1024, 2) spilling(const float* x, float* y) {\n"
        "  float a[96];\n#pragma unroll\n  for (int i = 0; i < 96; ++i) a[i] = x[i * 1024 + threadIdx.x];\n"
        "  __syncthreads();\n#pragma unroll\n  for (int i = 0; i < 96; ++i) y[i * 1024 + threadIdx.x] = a[95 - i];\n}\n"
    )
    monkeypatch.setattr(listing, "SOURCES", tmp_path)
    assert listing.compile_verbosely(support.toolkit(), source, "sm_80")["spilling"] > 0

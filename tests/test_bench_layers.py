"""The layer benchmarks: which variants run where, that wrong ones get no time, and what the command writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import mrvae_kernels as mk
from bench import layer_checks, layers, records, shapes
from bench.layer_checks import CheckedCase
from bench.layer_variants import EVERY, INSIDE, OTHERS, GatedCase
from bench.layers import DIRECTIONS, Job, chosen
from mrvae_kernels import ops

CPU = torch.device("cpu")
TINY = {
    "linear": shapes.Case("mlp", nn.Linear, (6, 5), {}, (6,), "relu"),
    "conv": shapes.Case("cnn", nn.Conv2d, (3, 4, 3, 2, 1), {}, (3, 5, 5), "silu"),
    "transposed": shapes.Case("cnn", nn.ConvTranspose2d, (4, 3, 3, 2, 1, 1), {}, (4, 3, 3), "relu"),
    "norm": shapes.Case("cnn", nn.BatchNorm2d, (4,), {}, (4, 3, 3), "relu"),
    "lstm": shapes.Case("lstm", nn.LSTM, (3, 4), {"batch_first": True}, (5, 3), "none"),
}
CORE = ("cpp",) if ops.EXTENSION else ()


@pytest.fixture(autouse=True)
def before():
    """Variants leave their backend's override in force; exact products."""
    with mk.override(), layer_checks.float32_precision("ieee"):
        yield


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", TINY)
def test_every_variant_that_runs_on_a_cpu_is_right(kind, dtype):
    checked = CheckedCase(TINY[kind], 4, dtype, CPU, compiled=False)
    assert {name: fault for name in EVERY if (fault := checked.fault(name))} == {}
    backends = (*CORE, "reference")
    folds, epilogues = [f"fold {b}" for b in backends], [f"epilogue {b}" for b in backends]
    mine = [*folds, *epilogues, *(f"{name} per-sample" for name in epilogues)]
    if kind == "lstm":
        mine = folds
    plain = ["library", "listing1", "plain-fold", *([] if kind == "lstm" else ["separate", "separate per-sample"])]
    assert {name for name in EVERY if checked.timed(name)} == {*plain, *mine}


def test_what_cannot_run_says_why():
    checked = {kind: CheckedCase(case, 4, "float32", CPU, compiled=False) for kind, case in TINY.items()}
    for case in checked.values():
        assert set(case.refused) | set(case.gated.names) == set(EVERY)
        assert "plain PyTorch has no fused kernel" in case.refused["fused reference"]
        assert "triton" in case.refused["fused triton"].lower() and case.refused["fold triton"]
    assert "--all-shapes" in checked["linear"].refused["listing1 compiled"]
    assert checked["lstm"].refused["separate"] == checked["lstm"].refused["epilogue reference"] == INSIDE
    assert checked["lstm"].refused["separate per-sample"] == INSIDE
    assert "unrolls" in checked["lstm"].refused["listing1 compiled"]
    assert "recurrence written out" in checked["lstm"].refused["epilogue reference per-sample"]
    if ops.EXTENSION:
        assert "take CUDA tensors, this one is on cpu" in checked["conv"].refused["fused cpp"]


def test_without_the_core_its_variants_are_refused(monkeypatch):
    monkeypatch.setattr(ops, "EXTENSION", False)
    monkeypatch.setattr(ops, "EXTENSION_ERROR", "no compiler was found")
    checked = CheckedCase(TINY["linear"], 4, "float32", CPU, compiled=False)
    assert checked.refused["fold cpp"] == checked.refused["epilogue cpp per-sample"] == "no compiler was found"
    assert checked.timed("fold reference")


def test_a_refusal_by_the_layers_geometry_is_found_when_it_runs(monkeypatch):
    def refuse(self, x, strategy, gate):
        raise ValueError("the kernels do not take groups")

    monkeypatch.setattr(GatedCase, "_ours", refuse)
    checked = CheckedCase(TINY["conv"], 4, "float32", CPU, compiled=False)
    assert checked.fault("fold reference") is None and not checked.timed("fold reference")
    assert checked.refused["fold reference"] == "the kernels do not take groups"


def slightly_wrong(what):
    """A GatedCase method in place of `_ours` whose y, or whose gradients alone, are 3 % wrong."""
    right = GatedCase._ours

    def wrong(self, x, strategy, gate):
        y = right(self, x, strategy, gate)
        if what == "y":
            return y * 1.03
        if what == "gradients":
            return y + (y - y.detach()) * 0.03
        return y if torch.is_grad_enabled() else y * 1.03

    return wrong


@pytest.mark.parametrize(("what", "named"), [
    ("y", ["y 0.03", "dx 0.03", "dweight 0.03", "dgate0"]),
    ("gradients", ["dx 0.03", "dbias 0.03", "dgate0"]),
    ("inference", ["y without gradients 0.03"]),
])
def test_wrong_numbers_get_no_time(what, named, monkeypatch):
    monkeypatch.setattr(GatedCase, "_ours", slightly_wrong(what))
    checked = CheckedCase(TINY["linear"], 4, "float32", CPU, compiled=False)
    fault = checked.fault("epilogue reference")
    assert all(part in fault for part in named) and not checked.timed("epilogue reference"), fault
    assert ("y 0.03" in fault) is (what == "y")
    assert checked.timed("library") and checked.timed("plain-fold")
    forward, both = layers.measure(checked, 2, 0.01)
    assert "epilogue reference" not in {**forward["seconds"], **both["seconds"]}
    assert forward["wrong"]["epilogue reference"] == fault and "plain-fold" in forward["ratio"]


def test_listing_1_with_a_ready_gate_takes_part_beside_listing_1():
    gated = GatedCase(TINY["conv"], 4, torch.float32, CPU, variants=("separate per-sample", "listing1"))
    x = gated.inputs[0]
    wanted = nn.functional.silu(gated.gates[:, :, None, None] * gated.layer(x))
    torch.testing.assert_close(gated.forward("separate per-sample", x), wanted)
    assert gated.leaves("separate per-sample", x)[-1] is gated.gates, "the gate is given, and gets its gradient"
    assert set(gated.leaves("listing1", x)) >= set(gated.response.parameters()), "Listing 1 computes its own"


@pytest.mark.parametrize(("error", "batch", "bad"), [
    (3e-5, 1024, ["dx"]), (3e-5, 16, ["dx", "dweight", "dbias"]), (3e-4, 1024, ["dx", "dweight", "dbias"]),
])
def test_float32_s_limit_of_sums_grows_with_the_examples(monkeypatch, error, batch, bad):
    """Rounding errors of a sum over 64 times as many examples are 8 times as large, and no fault."""
    def off(self, x, strategy, gate):
        y = right(self, x, strategy, gate)
        return y + (y - y.detach()) * error

    right = GatedCase._ours
    monkeypatch.setattr(GatedCase, "_ours", off)
    gated = GatedCase(TINY["linear"], batch, torch.float32, CPU, variants=["fold reference"])
    fault = layer_checks.Comparison(gated, "ieee").fault("fold reference")
    named = fault.partition(": ")[2]
    assert [label for label in ("y", "dx", "dweight", "dbias") if f"{label} " in named] == bad


def test_a_variant_that_breaks_gets_no_time(monkeypatch):
    def broken(self, x):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(GatedCase, "_plain_fold", broken)
    checked = CheckedCase(TINY["linear"], 4, "float32", CPU, compiled=False)
    assert checked.fault("plain-fold") == "RuntimeError: out of memory" and not checked.timed("plain-fold")


def test_a_slower_variant_is_reported_slower(monkeypatch):
    import time

    right = GatedCase._separate

    def slow(self, x):
        time.sleep(0.02)
        return right(self, x)

    monkeypatch.setattr(GatedCase, "_separate", slow)
    checked = CheckedCase(TINY["linear"], 4, "float32", CPU, compiled=False, variants=("library", "separate"))
    for entry in layers.measure(checked, 3, 0.02):
        assert entry["ratio"]["separate"]["low"] > 3 and min(entry["seconds"]["separate"]) >= 0.02
        assert entry["ratio"]["library"] == {"median": 1.0, "low": 1.0, "high": 1.0}


def test_inputs_take_turns():
    gated = GatedCase(TINY["linear"], 4, torch.float32, CPU, layer_checks.COPIES, ["library"])
    seen = []
    gated._functions["library"] = lambda x: seen.append(x.data_ptr()) or x
    step = gated.steps("library", False)
    for _ in range(2 * layer_checks.COPIES):
        step()
    assert len(set(seen)) == layer_checks.COPIES and seen[: len(seen) // 2] == seen[len(seen) // 2 :]
    assert not torch.equal(gated.inputs[0], gated.inputs[1])


def test_the_chosen_layers():
    numbers = ("float32", "bfloat16")
    some = chosen(numbers, False)
    kinds = {nn.Linear, nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d, nn.LSTM}
    assert len(some) == 3 * len(kinds) * 2 and {job.case.kind for job in some} == kinds
    compiled = [job for job in some if job.compiled]
    assert {job.dtype for job in compiled} == {"float32"} and [job.case.name for job in compiled] == [
        *shapes.SIZES["middle"]
    ]
    every = chosen(numbers, True)
    assert len(every) == 2 * len([*shapes.CASES, *shapes.FOLDING]) and all(job.compiled for job in every)
    with pytest.raises(ValueError, match=r"there is no layer 'Linear\(1, 2\)'; expected one of .*LSTM\(256, 256"):
        shapes.named("Linear(1, 2)")


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny(monkeypatch):
    """The command measures tiny layers instead."""
    jobs = [Job(TINY["linear"], "float32", False), Job(TINY["lstm"], "float32", False)]
    monkeypatch.setattr(layers, "chosen", lambda numbers, all_shapes: jobs)
    monkeypatch.setattr(layers, "keep_memory", lambda: None)


def test_the_command_writes_every_layer_and_a_table(tiny, tmp_path, monkeypatch, capsys):
    out = tmp_path / "layers.json"
    monkeypatch.setattr(layers, "LONGEST_TURN", 0.001)
    assert layers.main(["--out", str(out), "--seconds", "1000", "--rounds", "2"]) == 0
    results = records.read(out, "layers").results
    assert [(e["layer"], e["direction"]) for e in results] == [
        (TINY[kind].name, direction) for kind in ("linear", "lstm") for direction in DIRECTIONS
    ]
    first = results[0]
    assert (first["batch"], first["dtype"], first["device"]) == (16, "float32", "cpu")
    assert {"library", "listing1", "plain-fold", "fold reference"} <= set(first["seconds"])
    assert set(first["ratio"]) == set(first["seconds"]) and first["ratio"]["library"]["median"] == 1.0
    assert all(time > 0 for times in first["seconds"].values() for time in times)
    said = capsys.readouterr().out
    assert f"| {TINY['linear'].name} | 16 | float32 | both |" in said
    assert "| geometric mean | | float32 | both |" in said
    assert f"separate: {INSIDE}" in said and f"written: {out}" in said


def test_without_out_nothing_is_written_not_even_among_the_committed_results(tiny, monkeypatch, capsys):
    monkeypatch.setattr(layers, "LONGEST_TURN", 0.001)
    monkeypatch.setattr(layers, "write", lambda *_: pytest.fail("it wrote"))
    assert layers.main(["--seconds", "1000", "--rounds", "2"]) == 0
    assert "written: " not in capsys.readouterr().out


def test_repeated_arguments_measure_a_layer_once(monkeypatch):
    asked = []
    monkeypatch.setattr(layers, "run", lambda jobs, *_: asked.extend(jobs) or 0)
    assert layers.main(["--batch", "16", "4", "16", "--numbers", "float32", "float32"]) == 0
    found = [(job.case.name, job.dtype, batch) for job, batch in asked]
    assert len(set(found)) == len(found) and [batch for *_, batch in found] == [16] * 15 + [4] * 15


def test_ctrl_c_leaves_the_layers_that_were_measured(tiny, tmp_path, monkeypatch, capsys):
    def measure(checked, rounds, seconds):
        if checked.case is TINY["lstm"]:
            raise KeyboardInterrupt
        return [{"layer": "first"}]

    monkeypatch.setattr(layers, "measure", measure)
    out = tmp_path / "layers.json"
    assert layers.main(["--out", str(out)]) == 130
    assert records.read(out, "layers").results == [{"layer": "first"}]
    assert f"interrupted; {out} holds what was measured" in capsys.readouterr().err


def test_a_wrong_variant_ends_the_command_with_code_1(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(GatedCase, "_ours", slightly_wrong("y"))
    monkeypatch.setattr(layers, "LONGEST_TURN", 0.001)
    assert layers.main(["--out", str(tmp_path / "layers.json"), "--seconds", "1000", "--rounds", "2"]) == 1
    assert "Linear(6, 5) float32 fold reference: relative errors against float64" in capsys.readouterr().out


def test_what_the_time_does_not_allow_is_listed(tiny, tmp_path, capsys):
    out = tmp_path / "layers.json"
    jobs = [(job, 4) for job in layers.chosen((), False)]
    assert layers.run(jobs, CPU, 2, -1.0, out) == 1
    said = capsys.readouterr().out
    assert "left out for lack of time:\n  Linear(6, 5) batch 4 float32\n" in said and "nothing was measured" in said
    assert not out.exists()


@pytest.mark.parametrize(("arguments", "said"), [
    (["--device", "nowhere"], "--device: there is no device 'nowhere' here"),
    (["--device", "meta"], "'meta' computes nothing; expected cpu or cuda"),
    (["--batch", "0"], "--batch is 0; expected positive numbers"),
    (["--seconds", "-3"], "--seconds is -3.0; expected a positive number"),
    (["--rounds", "0"], "--rounds is 0; expected a positive number"),
    (["--numbers", "tf32"], "--numbers has tf32; on a device of type cpu expected float32, bfloat16"),
])
def test_values_that_make_no_sense(arguments, said, capsys):
    with pytest.raises(SystemExit):
        layers.main(arguments)
    assert said in capsys.readouterr().err


def test_the_table_leaves_out_layers_without_a_baseline():
    entry = {"layer": "a", "batch": 1, "dtype": "float32", "direction": "both"}
    times = {"library": [1e-3] * 3, "separate": [2e-3] * 3}
    full = {**entry, "seconds": times, "ratio": {name: {"median": t[0] * 1e3} for name, t in times.items()}}
    lines = layers.table([full, {**entry, "layer": "b", "seconds": {}, "ratio": {}}]).splitlines()
    assert lines[2:] == ["| a | 1 | float32 | both | 1.000 | 2.000 |",
                         "| geometric mean | | float32 | both | | 2.000 (1) |"]


# ---- pytest bench/ ---------------------------------------------------------------------------------------------------


def test_pytest_times_the_right_ones_fails_the_wrong_and_skips_the_rest(tmp_path):
    """`pytest bench/` itself, with tiny layers and one variant that is wrong, in a process of its own."""
    import json
    import os
    import subprocess
    import sys

    root = Path(__file__).parents[1]
    script = f"""
import sys; sys.path[:0] = [{str(root)!r}, {str(root / "models")!r}, {str(root / "tests")!r}]
import pytest
import bench.layers as layers
from bench.layer_variants import GatedCase
from test_bench_layers import TINY, slightly_wrong
layers.chosen = lambda numbers, all_shapes: [layers.Job(TINY["conv"], "float32", False)]
GatedCase._ours = slightly_wrong("gradients")
sys.exit(pytest.main([{str(root / "bench")!r}, "-q", "-p", "no:cacheprovider", "-rfs", "--benchmark-json=out.json"]))
"""
    pytest.importorskip("pytest_benchmark")
    # of a worker of pytest-xdist pytest-benchmark takes its child for one too, and times nothing
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 1, done.stdout + done.stderr
    timed = json.loads((tmp_path / "out.json").read_text())["benchmarks"]
    assert {entry["name"] for entry in timed} == set(OTHERS) - {"listing1 compiled"}
    groups = {f"{TINY['conv'].name}, batch 16, float32, {direction}" for direction in DIRECTIONS}
    assert {entry["group"] for entry in timed} == groups
    assert "fold reference: relative errors against float64" in done.stdout
    assert "FAILED" in done.stdout and "plain PyTorch has no fused kernel" in done.stdout

"""bench.overhead: what is wrong gets no time, what is slow is reported slow, what was left out is listed."""

from __future__ import annotations

import json
import time

import pytest
import torch
from mrvae_models.networks import build
from overhead_cases import CASES, drop_a_gradient, step_of
from torch import nn

from bench import overhead, overhead_measure, records
from bench.overhead_measure import Effort, baked, extra_launches, infer, launches_by_depth, train
from bench.overhead_networks import VARIANTS
from bench.variants import TrainingStep, parameter_count, precision

EFFORT = Effort(rounds=3, seconds=1e-4, limit=1.0)
CPU = torch.device("cpu")
KEYS = {
    "case", "batch", "mode", "numbers", "seconds", "ratio", "peak_bytes", "gate_bytes", "host_seconds", "launches",
    "parameters", "refused", "left_out",
}


@pytest.fixture(autouse=True)
def cases(monkeypatch):
    monkeypatch.setattr(overhead, "CASES", CASES)


# ---- what is measured ------------------------------------------------------------------------------------------------


def test_a_wrong_variant_has_no_time():
    def make(variant):
        step = step_of(variant)
        if variant == "per-sample":
            drop_a_gradient(step)
        return step

    entry = train(make, ("ungated", "gated", "per-sample"), EFFORT)
    assert entry.keys() == KEYS
    assert list(entry["refused"]) == ["per-sample"] and "decoder.0.weight" in entry["refused"]["per-sample"]
    for what in ("seconds", "ratio", "peak_bytes"):
        assert list(entry[what]) == ["ungated", "gated"]
    assert entry["ratio"]["ungated"] == {"median": 1.0, "low": 1.0, "high": 1.0}


def test_without_a_right_ungated_step_nothing_is_timed():
    def make(variant):
        step = step_of(variant)
        if variant == "ungated":
            drop_a_gradient(step)
        return step

    entry = train(make, ("ungated", "gated"), EFFORT)
    assert entry["seconds"] == {} and "decoder.0.weight" in entry["left_out"]


class Slow(TrainingStep):
    """A step that takes 21 times as long."""

    def __call__(self):
        begin = time.perf_counter()
        loss = super().__call__()
        time.sleep(20 * (time.perf_counter() - begin))
        return loss


def test_a_variant_made_slower_is_reported_slower_by_its_factor():
    def make(variant):
        step = step_of("ungated" if variant == "ungated" else "gated")
        step.__class__ = Slow if variant == "slow" else TrainingStep
        return step

    entry = train(make, ("ungated", "gated", "slow"), Effort(rounds=9, seconds=2e-3))
    slower = entry["ratio"]["slow"]["median"] / entry["ratio"]["gated"]["median"]
    assert 7 < slower < 63, "21, give or take what else the machine does"
    assert entry["ratio"]["slow"]["low"] > 2


def test_memory_and_parameters_are_those_of_the_networks():
    steps = {}

    def make(variant):
        steps[variant] = step_of(variant)
        return steps[variant]

    entry = train(make, ("ungated", "gated"), EFFORT)
    plain = parameter_count(steps["ungated"].model)
    gates = sum(rows.stop - rows.start for rows in steps["gated"].model.gated.values()) * 2
    assert entry["parameters"] == {"ungated": plain, "gated": plain + gates}
    assert entry["gate_bytes"] == 4 * 4 * gates
    for name, count in entry["parameters"].items():
        assert entry["peak_bytes"][name] > 4 * 4 * count, "weights, two moments, gradients, and more"
    assert entry["host_seconds"] is None and entry["launches"] is None


def test_the_paper_s_networks_have_table_1_s_parameters():
    assert set(overhead.TABLE_1) == set(overhead.OTHER_GATES)
    for name, (base, _) in overhead.TABLE_1.items():
        with torch.device("meta"):
            assert parameter_count(build(name, (1, 28, 28))) == base
    counts = {"ungated": 17_526_977, "gated": 17_526_977 + 1000}
    (line,) = overhead.beside_table_1([{"case": "cnn", "parameters": counts}, {"case": "mlp", "parameters": counts}])
    assert line.startswith("cnn: 17,526,977 (Table 1: 17,526,977), gates add 1,000, 0.01%") and "2.04%" in line
    (line,) = overhead.beside_table_1([{"case": "resnet", "parameters": {"ungated": 1_881_217, "gated": 1_888_515}}])
    assert "gates add 7,298" in line and "neither the heads" in line and "3,072, 0.16%" in line


def test_a_baked_network_launches_what_the_plain_one_does_and_one_that_is_not_baked_does_not():
    class NotBaked(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x):
            return self.model(x, beta=0.5)

    step = step_of("gated", "tiny-cnn")
    inputs = [draw.x for draw in step.inputs]
    entry = infer(step.plain, baked(step), inputs, EFFORT)
    assert entry["same_kernels"] is True and entry["kernels"]["plain"] == entry["kernels"]["baked"]
    assert any("conv" in name for name in entry["kernels"]["baked"]) and len(entry["seconds"]["baked"]) == 3
    entry = infer(step.plain, NotBaked(step.model), inputs, EFFORT)
    assert entry["same_kernels"] is False and entry["ratio"]["baked"]["median"] > 0


def test_launches_are_counted_by_depth():
    counts = launches_by_depth(CPU, ("ungated", "gated"), (1, 2, 4), width=8, batch=4)
    plain = counts["ungated"]
    assert plain[4] - plain[2] == 2 * (plain[2] - plain[1]) > 0, "as many for each layer"
    assert extra_launches({"ungated": {2: 5, 4: 9, 8: 17}, "gated": {2: 8, 8: 20, 4: 12}}, "gated") == [3, 3, 3]
    assert len(extra_launches(counts, "gated")) == 3


def test_launches_by_depth_have_a_table(monkeypatch):
    counts = {"ungated": {2: 50, 4: 90}, "gated": {2: 53, 4: 93}}
    monkeypatch.setattr(overhead, "launches_by_depth", lambda device: counts)
    entry = overhead.depth_entry(CPU)
    assert entry["mode"] == "launches" and entry["extra"] == {"ungated": [0, 0], "gated": [3, 3]}
    text = overhead.table(json.loads(json.dumps([entry])))
    assert "| variant | 2 | 4 | more than ungated |" in text and "| gated | 53 | 93 | 3, 3 |" in text


def test_a_gpu_s_kernels_and_host_time_are_measured(monkeypatch):
    """The parts that a CPU has not, on steps that claim another device."""
    calls = []
    monkeypatch.setattr(overhead_measure, "launched", lambda step, device: ["kernel"] * 200)
    monkeypatch.setattr(overhead_measure, "step_bytes", lambda step: 1)
    monkeypatch.setattr(
        overhead_measure, "host_times",
        lambda steps, device, rounds, count: calls.append(count) or {name: [2.0] * rounds for name in steps},
    )
    monkeypatch.setattr(overhead_measure, "interleave", lambda steps, *_: {name: [1.0, 1.0] for name in steps})

    def make(variant):
        step = step_of(variant)
        step.device = torch.device("cuda")
        return step

    entry = train(make, ("ungated", "gated"), EFFORT, check=lambda step, references: None)
    assert entry["launches"] == {"ungated": 200, "gated": 200}
    assert entry["host_seconds"]["gated"] == [2e-3] * 3
    assert calls == [2], "the queue of a GPU is not filled"


# ---- the command -----------------------------------------------------------------------------------------------------


def test_the_result_file_has_its_schema_and_the_tables_are_made_from_it(tmp_path, capsys):
    path = tmp_path / "cpu-overhead.json"
    arguments = ["--modes", "eager", "inference", "graph", "--batch", "4", "--rounds", "2", "--out", str(path)]
    assert overhead.main(arguments) == 0
    record = records.read(path, "overhead")
    assert [(e["case"], e["mode"]) for e in record.results] == [
        (case, mode) for mode in ("eager", "inference", "graph") for case in CASES
    ]
    for entry in record.results:
        assert KEYS <= entry.keys() and entry["batch"] == 4 and entry["numbers"] == "float32"
        if entry["mode"] == "eager":
            assert set(entry["seconds"]) == set(VARIANTS) == set(entry["ratio"]) == set(entry["peak_bytes"])
            assert all(len(values) == 2 and min(values) > 0 for values in entry["seconds"].values())
            assert entry["ratio"]["gated"].keys() == {"median", "low", "high"} and entry["refused"] == {}
        elif entry["mode"] == "inference":
            assert set(entry["seconds"]) == {"plain", "baked"} and entry["same_kernels"] is True
        else:
            assert entry["seconds"] == {} and "CUDA graphs need an NVIDIA GPU" in entry["left_out"]
    capsys.readouterr()
    assert overhead.main(["--table", str(path)]) == 0
    said = capsys.readouterr().out
    assert "| tiny-cnn | 4 |" in said and "listing1" in said and "Inference" in said and "| yes |" in said
    assert "- tiny batch 4 graph float32: CUDA graphs need an NVIDIA GPU; the device is cpu" in said


def test_a_refused_variant_is_named_and_ends_with_code_1(monkeypatch, capsys, tmp_path):
    right = overhead.training_step

    def wrong(variant, *args, **kwargs):
        step = right(variant, *args, **kwargs)
        if variant == "gated":
            drop_a_gradient(step)
        return step

    monkeypatch.setattr(overhead, "training_step", wrong)
    arguments = ["--cases", "tiny", "--modes", "eager", "--variants", "gated", "per-sample", "--batch", "4"]
    assert overhead.main([*arguments, "--rounds", "1", "--out", str(tmp_path / "x.json")]) == 1
    said = capsys.readouterr().out
    assert "tiny batch 4 eager float32, gated: gradient: decoder.0.weight is off by" in said
    (entry,) = json.loads((tmp_path / "x.json").read_text())["results"]
    assert set(entry["ratio"]) == {"ungated", "per-sample"}, "ungated takes part in any case"


def test_a_network_that_cannot_be_built_is_left_out_and_the_rest_goes_on(monkeypatch):
    monkeypatch.setattr(overhead, "CASES", {"broken": ("cnn", (1, 2, 2), {"channels": (4, 4, 4)}), **CASES})
    results = overhead.run(["broken", "tiny"], [4], ["eager"], ["float32"], CPU, EFFORT, 60, ["ungated", "gated"])
    assert "cannot be halved 3 times" in results[0]["left_out"] and results[1]["ratio"]["gated"]["median"] > 0


def test_what_breaks_is_named_and_ends_with_code_1(monkeypatch, capsys, tmp_path):
    def broken(step):
        raise RuntimeError("the weights are gone")

    monkeypatch.setattr(overhead, "baked", broken)
    out = tmp_path / "x.json"
    arguments = ["--cases", "tiny", "--batch", "4", "--rounds", "1", "--variants", "gated", "--out", str(out)]
    assert overhead.main([*arguments, "--modes", "eager", "inference"]) == 1
    eager, inference = records.read(out, "overhead").results
    assert eager["ratio"] and inference["failed"] == "RuntimeError: the weights are gone"
    assert "tiny batch 4 inference float32: it failed: RuntimeError: the weights are gone" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--modes", "graph"], ["--modes", "eager", "--seconds", "1e-9"]])
def test_where_nothing_was_measured_the_code_is_1(arguments, capsys):
    assert overhead.main(["--cases", "tiny", "--batch", "4", *arguments]) == 1
    said = capsys.readouterr().out
    assert "nothing was measured" in said and "failed" not in said


def asked_for(monkeypatch, arguments):
    """What the command measures: cases, batches, modes, numbers, device, effort, seconds and variants."""
    asked = []
    monkeypatch.setattr(overhead, "run", lambda *args: asked.append(args) or [])
    assert overhead.main(arguments) == 1
    return asked[0][:-1]


def test_repeated_arguments_are_measured_once(monkeypatch):
    found = asked_for(monkeypatch, ["--cases", "tiny-cnn", "tiny", "tiny-cnn", "--batch", "16", "4", "16", "--modes",
                                    "eager", "eager", "--numbers", "float32", "float32"])
    assert found[:4] == (["tiny-cnn", "tiny"], [16, 4], ["eager"], ["float32"])


def test_a_run_like_another_s_measures_the_same_for_as_long(monkeypatch, tmp_path):
    before, again = tmp_path / "before.json", tmp_path / "again.json"
    command = ["--cases", "tiny", "--batch", "4", "--modes", "eager", "--rounds", "7", "--seconds", "33"]
    for path, recorded in ((before, [*command, "--out", str(tmp_path / "never" / "made.json")]),
                           (again, ["--like", str(before), "--out", str(again), "--rounds", "9"])):
        path.write_text(json.dumps({"what": "overhead", "machine": {"kind": "k"}, "command": recorded, "results": []}))
    first = asked_for(monkeypatch, command)
    assert first[5].rounds == 7 and first[6] == 33.0
    assert asked_for(monkeypatch, ["--like", str(before)]) == first
    other = asked_for(monkeypatch, ["--like", str(again), "--batch", "8"])
    assert other[1] == [8] and other[5].rounds == 9 and other[:1] + other[2:5] + other[6:] == (
        first[:1] + first[2:5] + first[6:]
    )
    assert overhead.parse(["--like", str(before)]).out is None and not (tmp_path / "never").exists()


def test_ctrl_c_leaves_the_entries_that_were_measured(monkeypatch, tmp_path, capsys):
    def measure(case, *_):
        if case == "tiny-cnn":
            raise KeyboardInterrupt
        return {**overhead.empty(case, 4, "eager", "float32"), "ratio": {"ungated": dict.fromkeys(
            ("median", "low", "high"), 1.0)}}

    monkeypatch.setattr(overhead, "measure", measure)
    out = tmp_path / "x.json"
    assert overhead.main(["--modes", "eager", "--batch", "4", "--out", str(out)]) == 130
    assert [entry["case"] for entry in records.read(out, "overhead").results] == ["tiny"]
    assert f"{out} holds what was measured" in capsys.readouterr().err


@pytest.mark.slow
def test_the_compiled_mode_holds_compiled_steps_against_the_compiled_ungated_one():
    entry = overhead.measure("tiny", 4, "compiled", "float32", CPU, EFFORT, ("ungated", "gated"))
    assert entry["refused"] == {} and set(entry["ratio"]) == {"ungated", "gated"} and entry["peak_bytes"]["gated"] > 0


@pytest.mark.parametrize(("arguments", "said"), [
    (["--batch", "0"], "--batch holds 0"),
    (["--rounds", "0"], "--rounds is 0"),
    (["--seconds", "0"], "--seconds is 0.0"),
    (["--seconds", "nan"], "--seconds is nan"),
    (["--cases", "vgg"], "vgg"),
    (["--modes", "fast"], "fast"),
    (["--numbers", "int8"], "int8"),
    (["--variants", "half"], "half"),
    (["--device", "tpu9"], "--device is 'tpu9'"),
    (["--device", "meta"], "--device is 'meta'"),
    (["--table", "nowhere.json"], "nowhere.json"),
])
def test_bad_arguments_are_named(arguments, said, capsys):
    with pytest.raises(SystemExit) as ended:
        overhead.main(arguments)
    assert ended.value.code == 2 and said in capsys.readouterr().err


def test_without_a_gpu_its_figures_are_refused(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        overhead.main(["--device", "cuda"])
    assert "torch finds no GPU" in capsys.readouterr().err
    with pytest.raises(ValueError, match="CUDA graphs need an NVIDIA GPU; the device is cpu"):
        step_of("gated", graph=True)
    with pytest.raises(ValueError, match="TF32 products need an NVIDIA GPU"), precision("tf32", CPU):
        pass
    entry = overhead.measure("tiny", 4, "eager", "tf32", CPU, EFFORT)
    assert entry["left_out"].startswith("TF32 products need an NVIDIA GPU")
    with pytest.raises(ValueError, match="variant is 'half'; expected one of ungated, gated"):
        step_of("half")

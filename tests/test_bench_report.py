"""The report and the README's table: made of result files, by machine, with what lost and what is missing."""

from __future__ import annotations

import copy
import json
import shutil

import pytest
from mrvae_models.config import TrainConfig

from bench import plots, report, report_missing, report_tables
from bench.layer_variants import EVERY
from bench.overhead import CASES
from bench.records import Record

MACHINE = {"kind": "cpu A, 2 threads", "device": "cpu", "commit": "abc1234", "date": "2026-01-02", "torch": "2.13.0",
           "python": "3.11", "extension": True}
GPU = {**MACHINE, "kind": "GPU B", "device": "cuda"}


def interval(median):
    return {"median": median, "low": median - 0.01, "high": median + 0.01}


def step(case, batch, mode="eager", numbers="float32", **ratios):
    """An entry of training steps, 1 ms an ungated one, five rounds."""
    ratios = {"ungated": 1.0, **{name.replace("_", "-"): value for name, value in ratios.items()}}
    return {
        "case": case, "batch": batch, "mode": mode, "numbers": numbers,
        "seconds": {name: [1e-3 * value] * 5 for name, value in ratios.items()},
        "ratio": {name: interval(value) for name, value in ratios.items()},
        "peak_bytes": {name: 1000 if name == "ungated" else 1030 for name in ratios}, "gate_bytes": 20,
        "host_seconds": None, "launches": None, "refused": {}, "left_out": None,
        "parameters": {name: 100 if name == "ungated" else 110 for name in ratios},
    }


def inference(case, batch, same=True):
    return {**step(case, batch, "inference"), "seconds": {"plain": [1.0], "baked": [1.0]}, "parameters": {},
            "peak_bytes": {}, "ratio": {"baked": interval(1.003)}, "same_kernels": same,
            "kernels": {"plain": ["mm"], "baked": ["mm"]}}


def growth(case, axis, value, ended=None):
    blank = {"seconds": {}, "ratio": {}, "peak_bytes": {}, "launches": None, "refused": {}, "ended": ended}
    timed = step(case, 16, gated=1.04, per_sample=1.07)
    place = {"axis": axis, "value": value, "case": case, "mode": "eager", "numbers": "float32"}
    measured = {} if ended else {name: timed[name] for name in ("seconds", "ratio", "peak_bytes")}
    return {**blank, **measured, **place}


OVERHEAD = [
    step("mlp", 16, gated=1.02, per_sample=1.0, listing1=1.5, plain_fold=1.25),
    step("mlp", 128, gated=1.10, per_sample=1.21, listing1=2.0, plain_fold=1.0),
    step("mlp", 16, "compiled", gated=0.97, listing1=1.2), inference("mlp", 16),
]
CURVE = {
    "network": "mlp", "seeds": [0], "epochs": 8, "threads": 2, "betas": [0.1, 1.0], "one_run_seconds": [[1.0, 1.0]],
    "retrained_seconds": [[1.0, 1.0]], "ratio": {"one over one": interval(1.0), "ten over one": interval(2.0)},
    "objective": {
        who: {"0": {name: [9.0 + i for i in range(count)] for name in ("objective", "rate", "distortion")}}
        for who, count in (("multi-rate", 2), ("0.1", 1), ("1", 1))
    },
}
LAYER = {"layer": "Linear(2, 3)", "batch": 16, "dtype": "float32", "device": "cpu", "direction": "both",
         "seconds": {"library": [1.0], "fold cpp": [1.1]}, "refused": {},
         "ratio": {"library": interval(1.0), "fold cpp": interval(1.1), "epilogue cpp": interval(1.3)}}
FILES = {
    "cpu-overhead.json": ("overhead", MACHINE, ["--out", "bench/results/cpu-overhead.json"], OVERHEAD),
    "cpu-growth.json": ("growth", MACHINE, [], [growth("mlp", "depth", 1), growth("mlp", "depth", 2),
                                                growth("mlp", "depth", 4, "the time is up")]),
    "cpu-curve-cost.json": ("curve-cost", MACHINE, ["--epochs", "8"], [CURVE]),
    "cpu-layers.json": ("layers", MACHINE, [], [LAYER]),
}
README = f"# A\n\n{report.BEGIN}\nold\n{report.END}\n\nafter\n"


@pytest.fixture
def root(tmp_path):
    """A repository with result files, a README and no report yet."""
    (tmp_path / "results").mkdir()
    (tmp_path / "README.md").write_text(README)
    for name, content in FILES.items():
        write(tmp_path, name, *content)
    return tmp_path


def write(root, name, what, machine, command, results):
    text = json.dumps({"what": what, "machine": machine, "command": command, "results": results})
    (root / "results" / name).write_text(text)


def run(root, *arguments):
    return report.main(["--results", str(root / "results"), "--root", str(root), *arguments])


def made(root):
    """The repository with report and README as they should be."""
    assert run(root) == 0 and run(root, "--readme") == 0
    return root


# ---- the committed files ---------------------------------------------------------------------------------------------


def test_readme_report_and_plots_are_what_the_committed_result_files_give(capsys):
    assert report.main(["--check"]) == 0, capsys.readouterr().out


# ---- the README ------------------------------------------------------------------------------------------------------


def test_the_readme_s_table_by_hand(root):
    text = made(root).joinpath("README.md").read_text()
    assert text.startswith(f"# A\n\n{report.BEGIN}\n") and text.endswith(f"{report.END}\n\nafter\n")
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert rows[0] == ("| network | batch | gated | per-sample | recipe | gated, compiled | recipe, compiled | "
                       "listing1 | listing1, compiled | plain-fold | peak memory, gated | peak memory, per-sample |")
    assert rows[2] == ("| mlp | 16 | 1.020 (1.010 to 1.030) | 1.000 (0.990 to 1.010) |  | 0.970 (0.960 to 0.980) |  | "
                       "1.500 (1.490 to 1.510) | 1.200 (1.190 to 1.210) | 1.250 (1.240 to 1.260) | 1.030 | "
                       "1.030 |")
    # sqrt(1.02 1.10), sqrt(1.21), sqrt(3), sqrt(1.25)
    assert rows[-1] == ("| geometric mean |  | 1.059 (2) | 1.100 (2) |  | 0.970 (1) |  | 1.732 (2) | 1.200 (1) | "
                        "1.118 (2) | 1.030 (2) | 1.030 (2) |")
    assert ("\nWith one beta a step `gated`, `plain-fold`, with one beta an example `per-sample`, `recipe`, "
            "`listing1`. ") in text
    assert "cpu A, 2 threads" in text and "commit abc1234" in text and "torch 2.13.0" in text
    assert "`python -m bench.overhead --out bench/results/cpu-overhead.json`" in text
    assert "2 of our ratios are above 1.05" in text


def test_the_readme_s_table_without_its_file_or_markers_is_refused(root, capsys):
    (root / "README.md").write_text("no markers")
    assert run(root, "--readme") == 1 and "expected one line" in capsys.readouterr().err
    assert (root / "README.md").read_text() == "no markers"
    (root / "results" / "cpu-overhead.json").unlink()
    assert run(root, "--readme") == 1 and "cpu-overhead.json is not among" in capsys.readouterr().err
    with pytest.raises(ValueError):
        report.with_block(f"{report.END} {report.BEGIN}", "")
    with pytest.raises(ValueError):
        report.with_block(README + README, "")


def test_writing_twice_changes_nothing(root):
    before = {path: path.read_bytes() for path in made(root).rglob("*") if path.is_file()}
    assert {path: path.read_bytes() for path in made(root).rglob("*") if path.is_file()} == before


# ---- the report ------------------------------------------------------------------------------------------------------


def text_of(root):
    return made(root).joinpath(report.REPORT).read_text()


def test_every_section_names_its_command_commit_and_versions(root):
    text = text_of(root)
    for title, command in (
        ("Training steps", "bench.overhead --out bench/results/cpu-overhead.json"), ("Growth", "bench.growth"),
        ("The cost of a curve", "bench.curve_cost --epochs 8"), ("Layers", "bench.layers"),
    ):
        section = text.partition(f"### {title}\n")[2].partition("\n### ")[0]
        assert f"reproduce with `python -m {command}`" in section and "commit abc1234" in section, title
        assert "torch 2.13.0" in section and "2026-01-02" in section
    for name in ("cpu-overhead", "cpu-growth", "cpu-curve-cost"):
        assert f"(benchmarks/{name}.png)" in text
        assert plots.drawn_from(root / report.PLOTS / f"{name}.png")
        assert (root / report.PLOTS / f"{name}.png").stat().st_size < 150_000


def test_what_lost_is_listed_by_name_the_worst_first(root):
    lines = text_of(root).partition("#### Above 1.05\n\n")[2].partition("\n\n")[0].splitlines()
    assert lines == [
        "- mlp batch 128, per-sample eager float32: 1.210 (1.200 to 1.220)",
        "- mlp batch 128, gated eager float32: 1.100 (1.090 to 1.110)",
    ]
    assert "- Linear(2, 3) batch 16 float32 both: fold cpp 1.100 (1.090 to 1.110)" in text_of(root)


def test_means_memory_inference_and_what_ended_a_series(root):
    text = text_of(root)
    worst = "1.100 (1.090 to 1.110), mlp batch 128"
    assert f"| eager | float32 | gated | 2 | 1.059 | 1.02: **missed** | {worst} | 1.05: **missed** |" in text
    best = "0.970 (0.960 to 0.980), mlp batch 16"
    assert f"| compiled | float32 | gated | 1 | 0.970 | 1.02: met | {best} | 1.05: met |" in text
    # 1030 over 1000 bytes, the bound 1.02 + 20 / 1000
    assert "| mlp | 16 | eager | float32 | gated | 0.00 | 1.030 | 1.040 | yes |" in text
    assert "| mlp | 16 | float32 | 1.003 (0.993 to 1.013) | yes |" in text
    assert "not measured: the time is up" in text and "neither is converged" in text


def test_without_a_measured_peak_of_per_sample_there_is_no_column_of_it():
    results = [step("mlp", 16, gated=1.0)]
    assert report_tables.overhead(results, [("gated", "eager", "gated")]).splitlines()[0] == (
        "| network | batch | gated | peak memory, gated |"
    )


def test_a_file_of_uncommitted_changes_or_an_earlier_recipe_says_so(root):
    assert "not committed" not in text_of(root) and "earlier recipe" in text_of(root), "CURVE records no options"
    write(root, "cpu-growth.json", "growth", {**MACHINE, "commit": "abc1234-dirty"}, [], [growth("mlp", "depth", 1)])
    config = TrainConfig(network="mlp", epochs=8, threads=2).to_dict()
    write(root, "cpu-curve-cost.json", "curve-cost", MACHINE, [], [{**CURVE, "config": config}])
    text = text_of(root)
    assert text.count("commit abc1234-dirty (**and changes that were not committed**), torch") == 1
    assert "earlier recipe" not in text


def test_the_layers_section_says_what_a_time_includes_and_which_variants_a_file_lacks(root):
    text = text_of(root)
    assert "except for `listing1`, which computes its gate from beta" in text
    assert "The file is from before there was " in text and "`separate per-sample`" in text
    refused = dict.fromkeys(EVERY, "it cannot run") | LAYER["refused"]
    write(root, "cpu-layers.json", "layers", MACHINE, [], [{**LAYER, "refused": refused}])
    assert "from before there was" not in text_of(root)


def test_memory_over_its_bound_and_other_kernels_are_shown(root):
    results = copy.deepcopy(OVERHEAD)
    results[0]["peak_bytes"]["gated"] = 1041
    results[-1]["same_kernels"] = False
    assert "| 1.041 | 1.040 | **no** |" in report_tables.memory(results)
    assert "| **no** |" in report_tables.inference(results)


def test_refused_and_left_out_entries_are_listed(root):
    wrong = step("linear", 16, gated=1.0)
    del wrong["ratio"]["gated"]
    late = {**step("linear", 128), "ratio": {}, "seconds": {}, "left_out": "the 1 seconds were up"}
    write(root, "cpu-overhead.json", "overhead", MACHINE, [],
          [*OVERHEAD, {**wrong, "refused": {"gated": "gradient: w is off by 3"}}, late])
    text = text_of(root)
    assert "- linear batch 16 eager float32, gated: gradient: w is off by 3" in text
    assert "- linear batch 128 eager float32: the 1 seconds were up" in text


def test_machines_never_share_a_table(root):
    write(root, "gpu-b-overhead.json", "overhead", GPU, [], [step("cnn", 16, "graph", gated=1.005)])
    text = text_of(root)
    ours, theirs = text.partition("## cpu A, 2 threads\n")[2].split("## GPU B\n")
    theirs = theirs.partition("## What is missing")[0]
    assert "| cnn |" not in ours and "| cnn | 16 | 1.005 (0.995 to 1.015) |" in theirs and "mlp" not in theirs


def test_files_of_other_formats_are_named_only(root):
    (root / "results" / "other.json").write_text('{"results": []}')
    assert "being of other formats: `other.json`" in text_of(root)


# ---- what is missing -------------------------------------------------------------------------------------------------


def test_missing_figures_of_a_cpu_and_of_a_gpu(root):
    missing = text_of(root).partition("## What is missing\n")[2]
    cpu, _, gpu = missing.partition("GPU: none measured. Missing:")
    assert "CPU, cpu A, 2 threads. Missing:" in cpu
    others = ", ".join(f"{case} batch {batch}" for case in CASES for batch in (16, 128) if case != "mlp")
    assert f"- train step, eager float32, gated, per-sample, listing1, plain-fold: {others}\n" in cpu
    others = ", ".join(f"{c} batch {b}" for c in CASES for b in (16, 128) if (c, b) != ("mlp", 16))
    assert f"- train step, compiled float32, gated, listing1: {others}\n" in cpu
    assert "- train step, compiled float32, per-sample: every network and batch\n" in cpu
    assert "- train step, bfloat16, gated: every network and batch" in cpu and "cost of a curve" not in cpu
    assert "- growth of mlp along width, batch\n" in cpu
    for figure in (
        "train step, graph float32, gated, per-sample: every network and batch",
        "train step, tf32, gated: every network and batch",
        "kernels launched a step, eager: every network and batch", "host time a step, eager",
        "growth of cnn along depth, width, batch, image", "kernels launched a step along depth", "the cost of a curve",
        "the layers by themselves", "inference of a baked network",
    ):
        assert f"- {figure}" in gpu, figure


def test_nothing_is_missing_of_a_complete_benchmark():
    places = [(case, batch) for case in CASES for batch in (16, 128)]
    ours = {"gated": 1.0, "per_sample": 1.0, "listing1": 1.0, "plain_fold": 1.0}
    full = [step(*place, mode, **ours) for place in places for mode in ("eager", "compiled")]
    full += [step(*place, "eager", "bfloat16", **ours) for place in places] + [inference(*place) for place in places]
    grown = [growth(series.case, series.axis, series.first) for series in report_missing.SERIES]
    found = [Record(what, MACHINE, [], results) for what, results in (
        ("overhead", full), ("growth", grown), ("curve-cost", [CURVE]), ("layers", [LAYER])
    )]
    assert report_missing.missing(found, "cpu") == []
    eager = report_missing.VARIANTS["eager"]
    assert report_missing.missing([found[0]._replace(results=full[1:]), *found[1:]], "cpu") == [
        f"train step, eager float32, {', '.join(eager)}: linear batch 16"
    ]


# ---- --check ---------------------------------------------------------------------------------------------------------


def test_a_fresh_report_is_up_to_date(root, capsys):
    assert run(root, "--check") == 1  # nothing written yet
    made(root)
    assert run(root, "--check") == 0 and "all up to date" in capsys.readouterr().out


def edit_readme(root):
    path = root / "README.md"
    path.write_text(path.read_text().replace("1.020", "1.000"))


def edit_report(root):
    path = root / report.REPORT
    path.write_text(path.read_text() + "more\n")


def measure_again(root):
    write(root, "cpu-growth.json", "growth", MACHINE, [], [growth("mlp", "depth", 1)])


def lose_a_plot(root):
    (root / report.PLOTS / "cpu-growth.png").unlink()


def draw_another(root):
    shutil.copy(root / report.PLOTS / "cpu-growth.png", root / report.PLOTS / "cpu-overhead.png")


def spare_plot(root):
    shutil.copy(root / report.PLOTS / "cpu-growth.png", root / report.PLOTS / "gpu-growth.png")


@pytest.mark.parametrize(("change", "message"), [
    (edit_readme, "README.md is not what"), (edit_report, "docs/benchmarks.md is not what"),
    (measure_again, "cpu-growth.png was not drawn from cpu-growth.json"),
    (lose_a_plot, "cpu-growth.png was not drawn"), (draw_another, "cpu-overhead.png was not drawn"),
    (spare_plot, "gpu-growth.png belongs to no result file"),
])
def test_what_is_out_of_date_is_seen(root, capsys, change, message):
    change(made(root))
    assert run(root, "--check") == 1
    assert message in capsys.readouterr().out

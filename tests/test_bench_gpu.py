"""The GPU benchmark, tried out on tiny layers: in Triton's interpreter where there is no GPU.

With MRVAE_CORE naming the build of tests/cuda_core/shim.py the compiled core's kernels take part as well.
"""

from __future__ import annotations

import argparse
import json

import pytest
import torch
from torch import nn

pytest.importorskip("triton")
import mrvae_kernels as mk  # noqa: E402
from bench import gpu, gpu_layers, gpu_memory, gpu_report, gpu_timing, layer_variants, shapes  # noqa: E402
from bench.layer_variants import OTHERS, GatedCase, absent, ours  # noqa: E402
from mrvae_kernels import measurements, strategy  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PRESENT = ours(DEVICE)
TINY = [
    shapes.Case("mlp", nn.Linear, (6, 5), {}, (6,), "relu"),
    shapes.Case("cnn", nn.Conv2d, (3, 4, 3, 2, 1), {}, (3, 5, 5), "silu"),
    shapes.Case("cnn", nn.ConvTranspose2d, (4, 3, 3, 2, 1, 1), {}, (4, 3, 3), "relu"),
    shapes.Case("nvae", nn.Conv2d, (4, 4, 3, 1, 1), {"groups": 4}, (4, 5, 5), "silu"),
]


@pytest.fixture(autouse=True)
def before():
    """Variants leave their backend's override in force; exact products, which convolutions are not by default."""
    with mk.override(), gpu_timing.float32_precision("ieee"):
        yield


@pytest.fixture
def little(monkeypatch):
    """Two memory-bound operators instead of all, of next to nothing."""
    monkeypatch.setattr(gpu_memory, "SAMPLES", 4)
    monkeypatch.setattr(gpu_memory, "largest_tensor", lambda device: 64)
    jobs = {name: gpu_memory.JOBS[name] for name in ("gates", "epilogue (N, 1024)")}
    monkeypatch.setattr(gpu_memory, "JOBS", jobs)


@pytest.mark.parametrize("case", TINY, ids=lambda case: case.name)
def test_every_variant_computes_the_same(case):
    gated = GatedCase(case, 2, torch.float32, DEVICE)
    x = gated.inputs[0]
    want = gated.both("separate", x)
    for name in ("plain-fold", *PRESENT):
        if name.startswith("fused") and "groups" in case.options:
            with pytest.raises(ValueError):
                gated.both(name, x)
            continue
        torch.testing.assert_close(gated.both(name, x), want, rtol=1e-4, atol=1e-4)


def options(out, **changes):
    """The command's options, for a run of seconds."""
    values = {"out": out, "batch": [2], "precision": ["tf32"], "rounds": 1, "prepare": 0, "compiled": 1,
              "no_compile": True, "no_correctness": False, "no_timing": False, "seconds": 1e6}
    return argparse.Namespace(**{**values, **changes})


def report_of(folder):
    (path,) = folder.glob("*-20*.json")
    return json.loads(path.read_text())


def test_a_run_writes_results_a_record_and_a_profile(tmp_path, monkeypatch, little, capsys):
    cases = [TINY[0], TINY[3]]
    monkeypatch.setattr(gpu, "CASES", cases * 2)  # the profile takes the second
    monkeypatch.setattr(gpu, "backends_of_a_network", lambda *_: {"gates": {"reference": 2.0, "triton": 1.0}})
    assert gpu.run(cases, DEVICE, options(tmp_path, precision=["tf32", "bfloat16"]), size=16) == 0
    name = measurements.file_name(measurements.device_name(DEVICE)).removesuffix(".json")
    report = report_of(tmp_path)
    assert len(report["correctness"]) == 2 * 3 and len(report["results"]) == 2 * 2 and report["left_out"] == []
    parts = {"ceilings", "correctness", "memory-bound operators", "timings", "backends", "profile"}
    assert parts == set(report["seconds"])
    depthwise = [result for result in report["results"] if "groups" in result["case"]]
    fused = {name for name in PRESENT if name.startswith("fused")}
    assert all(fused.isdisjoint(r["both"]["ratio"]) and fused == set(r["refused"]) for r in depthwise)
    assert all(result["cached"] and result["copies"] == gpu_layers.MOST_COPIES for result in report["results"])
    full = report["results"][0]["both"]["ratio"]
    assert set(full) == {*OTHERS, *PRESENT} - {"listing1 compiled"} and full["library"] == 1.0
    record = measurements.read(tmp_path / f"{name}.json")
    assert set(record["strategies"]["linear tf32 shared 1 2 3"]) == set(strategy.STRATEGIES)
    assert record["backends"] == {"gates": {"reference": 2.0, "triton": 1.0}}
    assert "aten::" in (tmp_path / "profile.txt").read_text()
    table = gpu.table(report["results"])
    assert table.count("\n") == 1 + 4 + 1 and "geometric mean of the 2 that ran all" in table
    assert all(f"| {name} |" in table for name in PRESENT) and "compiled" not in table
    backends = {name.partition(" ")[2] for name in PRESENT}
    assert len(report["memory"]) == 2 * 2 * len(backends) and {row["backend"] for row in report["memory"]} == backends
    assert all(row["forward"] > 0 and row["backward"] > 0 for row in report["memory"])
    said = capsys.readouterr().out
    assert report["absent"] == absent(DEVICE) and ("side by side" in said) is (len(backends) == 2)
    for backend, why in report["absent"].items():
        assert said.count(f"left out, the {gpu.BACKEND_NAMES[backend]}: {why}\n") == 2, "at the start and at the end"


def test_a_wrong_kernel_ends_with_code_1(tmp_path, monkeypatch):
    from mrvae_kernels.ops.triton import products

    right = products.linear
    monkeypatch.setattr(products, "linear", lambda *args: right(*args) * 1.01)
    assert gpu.run(TINY[:1], DEVICE, options(tmp_path, no_timing=True), size=16) == 1


def test_a_wrong_variant_has_no_time_and_leaves_no_record(tmp_path, monkeypatch, little, capsys):
    """Known from the smallest batch, or from the batch that is timed alone; it must not become a default."""
    def wrong(self, x, strategy, gate):
        y = right(self, x, strategy, gate)
        return y * 1.03 if strategy == "fused" and len(x) in batches else y

    right = GatedCase._ours
    monkeypatch.setattr(GatedCase, "_ours", wrong)
    monkeypatch.setattr(gpu, "CASES", [TINY[0]] * 2)
    monkeypatch.setattr(gpu, "backends_of_a_network", lambda *_: {})
    monkeypatch.setattr(gpu, "profile", lambda device: "")
    fused = {name for name in PRESENT if name.startswith("fused")}
    for folder, batches, checked in (("smallest", {2}, False), ("timed", {3}, False), ("timed alone", {3}, True)):
        out = tmp_path / folder
        assert gpu.run(TINY[:1], DEVICE, options(out, batch=[3, 2], no_correctness=checked), size=16) == 1
        report = report_of(out)
        at = {result["batch"]: result for result in report["results"]}
        for batch in batches:
            assert set(at[batch]["wrong"]) == fused and fused.isdisjoint(at[batch]["both"]["ratio"])
            assert fused.isdisjoint(at[batch]["forward"]["gpu_ms"]) and "fold triton" in at[batch]["both"]["ratio"]
        assert (set(at[3]["wrong"]) == fused) and (batches == {2} or at[2]["wrong"] == {})
        assert [path.name for path in out.glob("*.json")] == [path.name for path in out.glob("*-20*.json")]
        assert "no record was written" in capsys.readouterr().out and report["wrong"]
        assert all(" fused " in line and "relative errors" in line for line in report["wrong"])
    batches = set()
    assert gpu.run(TINY[:1], DEVICE, options(tmp_path / "right"), size=16) == 0
    assert len(list((tmp_path / "right").glob("*.json"))) == 2, "the report and the record"


def test_a_sign_that_rounding_turned_is_no_error():
    case = shapes.Case("mlp", nn.Linear, (64, 64), {}, (64,), "relu")
    gated = GatedCase(case, 64, torch.float32, DEVICE)
    x = gated.inputs[0]
    gated.both("separate", x)
    exact = gated.exact(x)
    near = exact.z.abs() < 1e-2
    assert near.any()
    computed = torch.where(near, (exact.z < 0).double(), exact.y)  # as if rounding had turned every one of them
    dx, *_ = exact.gradients(computed)
    turned = (near ^ (exact.z > 0)).double() * gated.grad.double()
    torch.testing.assert_close(dx, (turned * gated.gate.double()) @ gated.layer.weight.double())


def test_one_failure_is_recorded_and_the_rest_goes_on(tmp_path, monkeypatch, little):
    right = GatedCase._ours

    def fail(self, *arguments):
        if "fused" in arguments or isinstance(self, torch.device):
            raise RuntimeError("out of registers")
        return right(self, *arguments)

    monkeypatch.setattr(GatedCase, "_ours", fail)
    monkeypatch.setattr(gpu, "backends_of_a_network", fail)
    monkeypatch.setattr(gpu, "CASES", [TINY[0]] * 2)
    assert gpu.run(TINY[:1], DEVICE, options(tmp_path), size=16) == 1
    report = report_of(tmp_path)
    assert report["correctness"][0]["errors"]["fused triton"] == {"failed": "RuntimeError: out of registers"}
    (result,) = report["results"]
    fused = {name: "RuntimeError: out of registers" for name in PRESENT if name.startswith("fused")}
    assert result["failed"] == fused and "fold triton" in result["both"]["ratio"]
    assert any("backends" in line for line in report["failed"])


def test_a_lost_device_ends_the_run_with_what_was_found(tmp_path, monkeypatch):
    def lost(*_):
        raise RuntimeError("an illegal memory access was encountered")

    def second(self, x, strategy, gate):
        if self.case is TINY[1] and strategy == "fused":
            monkeypatch.setattr(gpu_timing, "synchronize", lost)
            lost()
        return right(self, x, strategy, gate)

    right = GatedCase._ours
    monkeypatch.setattr(GatedCase, "_ours", second)
    with pytest.raises(RuntimeError, match="illegal memory"):
        gpu.run(TINY[:2], DEVICE, options(tmp_path, no_timing=True), size=16)
    report = report_of(tmp_path)
    assert [found["case"] for found in report["correctness"]] == [TINY[0].name]
    assert "illegal memory" in report["failed"][0]


def test_when_time_is_up_the_rest_is_listed_and_nothing_is_no_success(tmp_path):
    assert gpu.run(TINY[:1], DEVICE, options(tmp_path, seconds=-1), size=16) == 1
    assert report_of(tmp_path)["left_out"] == [
        *(f"correctness: Linear(6, 5) {precision}" for precision in gpu.LIMITS), "memory-bound operators",
        "Linear(6, 5) batch 2 tf32",
    ]


def test_kernels_are_compiled_by_processes_of_their_own():
    assert gpu.prepare([(TINY[0], 2, "ieee")], DEVICE, 60, 1) == 1
    assert gpu.prepare([(TINY[0], 2, "ieee")], DEVICE, 0, 1) == 0


def test_older_and_newer_precision_flags_agree():
    before = torch.backends.cudnn.allow_tf32
    for precision in ("tf32", "ieee"):
        with gpu_timing.float32_precision(precision):
            tf32 = precision == "tf32"
            assert torch.backends.cuda.matmul.allow_tf32 is tf32 and torch.backends.cudnn.allow_tf32 is tf32
            for setting in (torch.backends.cuda.matmul, torch.backends.cudnn.conv):
                assert (setting.fp32_precision == "tf32") is tf32
    assert torch.backends.cudnn.allow_tf32 is before


def result_of(gpu_ms, host_ms, **more):
    """One layer's result with these milliseconds of each variant."""
    ratio = {name: time / gpu_ms["library"] for name, time in gpu_ms.items()}
    part = {"gpu_ms": {k: [v] for k, v in gpu_ms.items()}, "host_ms": {k: [v] for k, v in host_ms.items()},
            "ratio": ratio, "host_ratio": {k: 1.0 for k in ratio}, "roofline": {k: 0.5 for k in ratio}}
    return {"case": TINY[0].name, "network": "mlp", "batch": 2, "precision": "tf32", "cached": False, "forward": part,
            "both": part, **more}


def test_the_record_takes_the_larger_of_host_and_gpu_time_and_the_faster_backend():
    times = {"library": 1.0, "fold triton": 1.0, "fold cpp": 3.0, "epilogue triton": 4.0, "epilogue cpp": 1.0}
    result = result_of(times, {name: 3.0 if name == "epilogue cpp" else 2.0 for name in times})
    (found,) = gpu.record([result], {}, TINY)["strategies"].values()
    assert found == pytest.approx({"fold": 1.0, "epilogue": 1.5})


def test_the_backends_side_by_side():
    times = {"library": 1.0, "fold triton": 2.0, "fold cpp": 1.0, "fused triton": 2.0, "fused cpp": 1.05}
    host = {"library": 1.0, "fold triton": 4.0, "fold cpp": 1.0, "fused triton": 1.0, "fused cpp": 1.0}
    results = [result_of(times, host), result_of({**times, "fused cpp": 0.9}, host)]
    lines = gpu_report.side_by_side(results).splitlines()
    assert "| both | fold | 2 | 0.500 | 0.250 |" in lines and "| forward | all | 4 | 0.493 | 0.500 |" in lines
    without = {name: time for name, time in times.items() if "cpp" not in name}
    assert gpu_report.side_by_side([result_of(without, host)]) == ""
    assert "fused cpp" not in gpu_report.table([result_of(without, host)])
    chosen, other = gpu_report.fused_where_chosen(results)
    assert chosen.startswith("fused cpp: the fastest of ours in 1 of 2, 1 of these within 10% ") and "0.900" in chosen
    assert other == "fused triton: the fastest of ours in 0 of 2"


def test_shares_of_the_bandwidth_are_compared_with_the_goal():
    rows = [{"operator": "gates", "precision": "float32", "backend": backend, "forward": 0.9, "backward": share}
            for backend, share in (("cpp", 0.86), ("triton", 0.5))]
    table = gpu_memory.table(rows)
    assert "| gates | float32 | 0.90 | 0.86 | 0.90 | 0.50 |" in table
    assert "triton: 1 of 2 reach 0.85; the least is 0.50, gates float32 backward" in table
    assert "triton" not in gpu_memory.table(rows[:1])


@pytest.mark.parametrize("name", gpu_memory.JOBS)
def test_memory_bound_operators_move_the_bytes_that_are_counted(name):
    job = gpu_memory.JOBS[name](16 * 9 * 256 * 4, torch.bfloat16, DEVICE)
    outputs = job.run()
    wide = [out for out in outputs if out.numel() > 1024]
    moved = sum(out.numel() * out.element_size() for out in wide)
    assert moved and job.forward == moved * (1 if name == "gates" else 2)
    assert job.backward == moved * (1 if name == "gates" else 3)


def test_either_backend_alone_is_measured(monkeypatch):
    why = {"cpp": "no CUDA core", "triton": "no Triton"}
    for backend, other in (("cpp", "triton"), ("triton", "cpp")):
        monkeypatch.setattr(layer_variants, "absent", lambda device, other=other: {other: why[other]})
        assert {name.partition(" ")[2] for name in ours(DEVICE)} == {backend}
        assert ours(DEVICE, (other,)) == ()


def test_a_cpu_core_is_not_measured(monkeypatch):
    monkeypatch.setattr(mk.ops, "GPU_TYPE", None)
    monkeypatch.setattr(mk.ops, "CUDA_ERROR", "it was built without them")
    assert absent(DEVICE)["cpp"] == "it was built without them"


def test_a_variant_puts_its_backend_in_force_and_the_block_puts_it_back():
    outside = strategy.current()
    with mk.override():
        gated = GatedCase(TINY[0], 2, torch.float32, DEVICE)
        for name in PRESENT:
            gated.steps(name, False)()
            assert strategy.current() == strategy.Override(backend=name.partition(" ")[2])
    assert strategy.current() == outside


@pytest.mark.parametrize("case", [
    *TINY,
    shapes.Case("x", nn.Conv2d, (2, 3, 5, 2, 3), {"dilation": 2}, (2, 9, 6), "relu"),
    shapes.Case("x", nn.ConvTranspose2d, (2, 3, 4, 3, 2), {"dilation": 2}, (2, 3, 5), "relu"),
], ids=lambda case: case.name)
def test_operations_leave_out_taps_on_padding(case):
    layer = case.layer("cpu")
    nn.init.ones_(layer.weight)
    nn.init.zeros_(layer.bias)
    y = layer(torch.ones(2, *case.shape))
    assert case.operations(2) == 2 * y.sum().item(), "each multiplication adds 1"
    assert case.outputs(2) == y.numel()


def test_bytes_are_counted():
    assert TINY[0].least_bytes(2, 4, False) == 4 * (12 + 30 + 10)
    assert TINY[0].least_bytes(2, 4, True) == 4 * (12 + 30 + 10 + 20 + 2 * (12 + 30))


def test_networks_take_turns_and_the_largest_layers_are_compiled():
    order = shapes.in_turn(shapes.CASES)
    assert len({case.network for case in order[:4]}) == 4 and len(order) == len(shapes.CASES)
    chosen = shapes.largest(shapes.CASES, 1)
    assert [case.network for case in chosen] == ["cnn", "resnet", "nvae", "mlp"]
    cnn = [case for case in shapes.CASES if case.network == "cnn"]
    assert chosen[0].operations(1) == max(case.operations(1) for case in cnn)


def test_without_a_gpu_it_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--out", str(tmp_path)]) == 2
    assert "finds no GPU" in capsys.readouterr().err


def test_without_either_backend_it_says_why(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(gpu, "absent", lambda device: {"cpp": "no nvcc", "triton": "not installed"})
    assert gpu.main(["--out", str(tmp_path)]) == 2
    assert "cpp: no nvcc; triton: not installed" in capsys.readouterr().err

"""The GPU benchmark, tried out on tiny layers: in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("triton")
from bench import gpu, gpu_layers, gpu_timing, shapes  # noqa: E402
from bench.layer_variants import OURS, VARIANTS, GatedCase  # noqa: E402
from mrvae_kernels import measurements  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TINY = [
    shapes.Case("mlp", nn.Linear, (6, 5), {}, (6,), "relu"),
    shapes.Case("cnn", nn.Conv2d, (3, 4, 3, 2, 1), {}, (3, 5, 5), "silu"),
    shapes.Case("cnn", nn.ConvTranspose2d, (4, 3, 3, 2, 1, 1), {}, (4, 3, 3), "relu"),
    shapes.Case("nvae", nn.Conv2d, (4, 4, 3, 1, 1), {"groups": 4}, (4, 5, 5), "silu"),
]


@pytest.mark.parametrize("case", TINY, ids=lambda case: case.name)
def test_every_variant_computes_the_same(case):
    gated = GatedCase(case, 2, torch.float32, DEVICE)
    x = gated.inputs[0]
    want = gated.both("separate", x)
    for name in ("plain-fold", *OURS):
        if name == "fused" and "groups" in case.options:
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


def test_a_run_writes_results_a_record_and_a_profile(tmp_path, monkeypatch):
    cases = [TINY[0], TINY[3]]
    monkeypatch.setattr(gpu, "CASES", cases * 2)  # the profile takes the second
    monkeypatch.setattr(gpu, "backends_of_a_network", lambda *_: {"gates": {"reference": 2.0, "triton": 1.0}})
    assert gpu.run(cases, DEVICE, options(tmp_path, precision=["tf32", "bfloat16"]), size=16) == 0
    name = measurements.file_name(measurements.device_name(DEVICE)).removesuffix(".json")
    report = report_of(tmp_path)
    assert len(report["correctness"]) == 2 * 3 and len(report["results"]) == 2 * 2 and report["left_out"] == []
    assert {"ceilings", "correctness", "timings", "backends", "profile"} == set(report["seconds"])
    depthwise = [result for result in report["results"] if "groups" in result["case"]]
    assert all("fused" not in result["both"]["ratio"] and "fused" in result["refused"] for result in depthwise)
    assert all(result["cached"] and result["copies"] == gpu_layers.MOST_COPIES for result in report["results"])
    full = report["results"][0]["both"]["ratio"]
    assert set(full) == set(VARIANTS) - {"listing1 compiled"} and full["library"] == 1.0
    record = measurements.read(tmp_path / f"{name}.json")
    assert set(record["strategies"]["linear tf32 shared 1 2 3"]) == set(OURS)
    assert record["backends"] == {"gates": {"reference": 2.0, "triton": 1.0}}
    assert "aten::" in (tmp_path / "profile.txt").read_text()
    table = gpu.table(report["results"])
    assert table.count("\n") == 1 + 4 + 2 and "geometric mean of the 2 that ran all but compiled" in table


def test_a_wrong_kernel_ends_with_code_1(tmp_path, monkeypatch):
    from mrvae_kernels.ops.triton import products

    right = products.linear
    monkeypatch.setattr(products, "linear", lambda *args: right(*args) * 1.01)
    assert gpu.run(TINY[:1], DEVICE, options(tmp_path, no_timing=True), size=16) == 1


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


def test_one_failure_is_recorded_and_the_rest_goes_on(tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("out of registers")

    monkeypatch.setattr(GatedCase, "_fused", fail)
    monkeypatch.setattr(gpu, "backends_of_a_network", fail)
    monkeypatch.setattr(gpu, "CASES", [TINY[0]] * 2)
    assert gpu.run(TINY[:1], DEVICE, options(tmp_path), size=16) == 1
    report = report_of(tmp_path)
    assert report["correctness"][0]["errors"]["fused"] == {"failed": "RuntimeError: out of registers"}
    (result,) = report["results"]
    assert result["failed"] == {"fused": "RuntimeError: out of registers"} and "fold" in result["both"]["ratio"]
    assert any("backends" in line for line in report["failed"])


def test_a_lost_device_ends_the_run_with_what_was_found(tmp_path, monkeypatch):
    def lost(*_):
        raise RuntimeError("an illegal memory access was encountered")

    def second(self, x):
        monkeypatch.setattr(gpu_timing, "synchronize", lost)
        lost()

    right = GatedCase._fused
    monkeypatch.setattr(GatedCase, "_fused", lambda self, x: (second if self.case is TINY[1] else right)(self, x))
    with pytest.raises(RuntimeError, match="illegal memory"):
        gpu.run(TINY[:2], DEVICE, options(tmp_path, no_timing=True), size=16)
    report = report_of(tmp_path)
    assert [found["case"] for found in report["correctness"]] == [TINY[0].name]
    assert "illegal memory" in report["failed"][0]


def test_when_time_is_up_the_rest_is_listed_and_nothing_is_no_success(tmp_path):
    assert gpu.run(TINY[:1], DEVICE, options(tmp_path, seconds=-1), size=16) == 1
    assert report_of(tmp_path)["left_out"] == [
        *(f"correctness: Linear(6, 5) {precision}" for precision in gpu.LIMITS), "Linear(6, 5) batch 2 tf32"
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


def test_the_record_takes_the_larger_of_host_and_gpu_time():
    times = {"library": 1.0, "fold": 1.0, "epilogue": 4.0}
    part = {"gpu_ms": {k: [v] for k, v in times.items()}, "host_ms": {k: [2.0] for k in times}, "ratio": times}
    result = {"case": TINY[0].name, "network": "mlp", "batch": 2, "precision": "tf32", "both": part}
    (found,) = gpu.record([result], {}, TINY)["strategies"].values()
    assert found == pytest.approx({"fold": 1.0, "epilogue": 2.0})


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


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("broken", ["pytest", "bench.gpu", ""])
def test_make_gpu_runs_both_and_fails_if_one_does(broken, tmp_path):
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "ran $*"\ncase "$*" in *"-m {broken or "neither"} "*) exit 3;; esac\n')
    python.chmod(0o755)
    done = subprocess.run(
        ["make", "gpu", f"PYTHON={python}", f"GPU_OUT={tmp_path}/out"], cwd=Path(__file__).parents[1],
        capture_output=True, text=True, check=False,
    )
    assert (done.returncode != 0) is bool(broken)
    assert "ran -m bench.gpu" in done.stdout
    assert "ran -m pytest" in (tmp_path / "out" / "tests.log").read_text()


def test_the_marker_that_make_gpu_leaves_out_is_known(pytestconfig):
    assert any(line.startswith("ahead_of_time:") for line in pytestconfig.getini("markers"))


def test_without_a_gpu_it_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--out", str(tmp_path)]) == 2
    assert "finds no GPU" in capsys.readouterr().err

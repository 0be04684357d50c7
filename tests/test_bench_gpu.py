"""The GPU benchmark, tried out on tiny layers: in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import argparse
import json

import pytest
import torch
from torch import nn

pytest.importorskip("triton")
from bench import gpu, shapes  # noqa: E402
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


def test_a_run_writes_results_a_record_and_a_profile(tmp_path, monkeypatch):
    cases = [TINY[0], TINY[3]]
    monkeypatch.setattr(gpu, "CASES", cases * 2)  # the profile takes the second
    monkeypatch.setattr(gpu, "backends_of_a_network", lambda *_: {"gates": {"reference": 2.0, "triton": 1.0}})
    options = argparse.Namespace(
        out=tmp_path, batch=[2], precision=["tf32", "bfloat16"], rounds=1, no_compile=True, no_correctness=False,
        no_timing=False, seconds=1e6,
    )
    assert gpu.run(cases, DEVICE, options, size=16) == 0
    name = measurements.file_name(measurements.device_name(DEVICE)).removesuffix(".json")
    (path,) = tmp_path.glob(f"{name}-20*.json")
    report = json.loads(path.read_text())
    assert len(report["correctness"]) == 2 * 3 and len(report["results"]) == 2 * 2 and report["left_out"] == []
    depthwise = [result for result in report["results"] if "groups" in result["case"]]
    assert all("fused" not in result["both"]["ratio"] for result in depthwise), "refused, and listed without a time"
    full = report["results"][0]["both"]["ratio"]
    assert set(full) == set(VARIANTS) - {"listing1 compiled"} and full["library"] == 1.0
    record = measurements.read(tmp_path / f"{name}.json")
    assert set(record["strategies"]["linear tf32 shared 1 2 3"]) == set(OURS)
    assert record["backends"] == {"gates": {"reference": 2.0, "triton": 1.0}}
    assert "aten::" in (tmp_path / "profile.txt").read_text()
    table = gpu.table(report["results"])
    assert table.count("\n") == 1 + 4 + 1 and "geometric mean" in table


def test_a_wrong_kernel_ends_with_code_1(tmp_path, monkeypatch):
    from mrvae_kernels.ops.triton import products

    right = products.linear
    monkeypatch.setattr(products, "linear", lambda *args: right(*args) * 1.01)
    options = argparse.Namespace(
        out=tmp_path, batch=[2], precision=["tf32"], rounds=1, no_compile=True, no_correctness=False, no_timing=True,
        seconds=1e6,
    )
    assert gpu.run(TINY[:1], DEVICE, options, size=16) == 1


def test_when_time_is_up_the_rest_is_listed(tmp_path):
    options = argparse.Namespace(
        out=tmp_path, batch=[2], precision=["tf32"], rounds=1, no_compile=True, no_correctness=True, no_timing=False,
        seconds=-1,
    )
    gpu.run(TINY[:1], DEVICE, options, size=16)
    (path,) = tmp_path.glob("*-20*.json")
    assert json.loads(path.read_text())["left_out"] == ["Linear(6, 5) batch 2 tf32"]


def test_operations_and_bytes_are_counted():
    linear, conv, transposed, _ = TINY
    assert linear.operations(2) == 2 * 2 * 5 * 6
    assert conv.operations(2) == 2 * (2 * 4 * 3 * 3) * (3 * 3 * 3)
    assert transposed.operations(2) == 2 * (2 * 4 * 3 * 3) * (3 * 3 * 3), "each input meets each tap once"
    assert gpu.least_bytes(linear, 2, 4, False) == 4 * (12 + 30 + 10)
    assert gpu.least_bytes(linear, 2, 4, True) == 4 * (12 + 30 + 10 + 20 + 2 * (12 + 30))


def test_without_a_gpu_it_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--out", str(tmp_path)]) == 2
    assert "finds no GPU" in capsys.readouterr().err

"""The doctor: what is installed, what would run and why; nothing in its arguments is executed."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

import mrvae_kernels as mk
from mrvae_kernels import backends, doctor, measurements, ops, strategy


@pytest.fixture(autouse=True)
def _no_override(monkeypatch):
    monkeypatch.setattr(strategy, "_override", strategy.Override())


def lines(capsys, *arguments: str) -> list[str]:
    assert doctor.main(arguments) == 0
    return capsys.readouterr().out.splitlines()


def test_versions_what_was_built_and_the_bundled_layers(capsys):
    out = lines(capsys)
    text = "\n".join(out)
    assert out[0].split() == ["mrvae_kernels", mk.__version__] and torch.__version__ in text
    assert ("C++ core       built" in text) if ops.EXTENSION else (f"missing: {ops.EXTENSION_ERROR}" in text)
    for layer, shape in doctor.EXAMPLES:
        assert f"{layer}, input {'x'.join(map(str, shape))}, one beta, cpu" in text


def test_the_missing_core_is_said(capsys, monkeypatch):
    monkeypatch.setattr(ops, "EXTENSION", False)
    monkeypatch.setattr(ops, "EXTENSION_ERROR", "no compiler was found")
    text = "\n".join(lines(capsys))
    assert "C++ core       missing: no compiler was found; plain PyTorch runs instead, slower" in text
    assert "not cpp: no compiler was found" in text


def test_the_cuda_core_and_the_one_that_is_missing(capsys, monkeypatch):
    monkeypatch.setattr(ops, "cuda_error", lambda: "there is no nvcc: install the CUDA 13.0 toolkit; then run: pip")
    assert "CUDA core      missing: there is no nvcc: install the CUDA 13.0 toolkit; then run: pip" in lines(capsys)
    facts = dict.fromkeys(("torch", "compiler", "flags", "commit"), "?")
    cuda = {"cuda": "13.0", "architectures": "sm_80 sm_90 sm_100+PTX", "nvcc_flags": "-O3"}
    monkeypatch.setattr(ops, "EXTENSION", True)
    monkeypatch.setattr(ops, "cuda_error", lambda: None)
    monkeypatch.setattr(ops, "build_facts", lambda: {**facts, **cuda})
    out = "\n".join(doctor.environment())
    assert "CUDA core      built (CUDA 13.0, sm_80 sm_90 sm_100+PTX, nvcc flags -O3)" in out
    assert "C++ core       built (torch ?, compiler ?, flags ?, commit ?)" in out


@pytest.mark.parametrize(
    ("capability", "architectures", "runs"),
    [
        ((8, 0), "sm_80 sm_90", True),
        ((8, 9), "sm_80 sm_90", True),
        ((7, 5), "sm_80 sm_90+PTX", False),
        ((8, 0), "sm_86", False),
        ((9, 0), "sm_80", False),
        ((9, 0), "sm_80+PTX", True),
        ((12, 0), "sm_80 sm_90 sm_100+PTX", True),
        ((10, 3), "sm_100a", False),
        ((9, 0), "sm_90a", True),
    ],
)
def test_which_gpus_the_cuda_core_has_code_for(capability, architectures, runs):
    assert backends.has_code_for(capability, architectures) is runs


@pytest.mark.parametrize(
    ("layer", "shape", "weights", "outputs"),
    [
        ("Linear(784, 300)", "16x784", 784 * 300, 16 * 300),
        ("Linear(3, 4, bias=False)", "100,3", 12, 400),
        ("Conv2d(64, 128, 3, padding=1)", "16x64x14x14", 64 * 128 * 9, 16 * 128 * 196),
        ("ConvTranspose1d(4, 6, 3, stride=2, groups=2)", "2x4x5", 4 * 3 * 3, 2 * 6 * 11),
    ],
)
def test_what_would_run_for_a_layer(capsys, layer, shape, weights, outputs):
    out = lines(capsys, "--layer", layer, "--input", shape)
    kind = "linear" if layer.startswith("Linear") else "convolution"
    model = strategy.costs(kind, torch.device("cpu"), torch.float32)
    backend = "cpp" if ops.EXTENSION else "reference"
    assert f"  {model.cheaper(weights, outputs)} on {backend}: {model.told(weights, outputs)}" in out
    per_sample = lines(capsys, "--layer", layer, "--input", shape, "--per-sample")
    assert (
        f"  epilogue on {backend}: one beta a sample" in per_sample
        and "  not fold: needs one beta for the batch" in per_sample
    )


def test_norms_recurrent_layers_and_another_device(capsys):
    assert any("always fold" in line for line in lines(capsys, "--layer", "GroupNorm(2, 4)", "--input", "3x4x5"))
    assert any("always fold" in line for line in lines(capsys, "--layer", "LSTM(3, 4)", "--input", "7x2x3"))
    per_sample = lines(capsys, "--layer", "GRU(3, 4)", "--input", "7x2x3", "--per-sample")
    assert any("recurrence written out" in line for line in per_sample)
    out = lines(capsys, "--layer", "Linear(3, 4)", "--input", "2x3", "--device", "cuda")
    assert any(" on reference" in line for line in out) and any(
        "not cpp: " in line and "the compiled core has no CUDA kernels" in line for line in out
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layer", "Linear(3, 4)", "--input", "2xthree"], "input is '2xthree'; expected sizes such as 128x784"),
        (["--layer", "Softmax(3)", "--input", "2x3"], "layer is a Softmax; expected one of Linear"),
        (["--layer", "Linear(3", "--input", "2x3"], "expected a call such as Linear(784, 300)"),
        (["--layer", "Linear(open('x'), 2)", "--input", "2x3"], "expected a call such as"),
        (["--layer", "__import__('os').getcwd()", "--input", "2x3"], "expected a call such as"),
        (["--layer", "Linear(**{'in_features': 3})", "--input", "2x3"], "layer "),
        (["--layer", "Linear(3)", "--input", "2x3"], "out_features"),
        (["--layer", "Linear(3, 4)", "--input", "2x5"], "Linear(3, 4) does not take an input of shape (2, 5)"),
        (["--layer", "BatchNorm1d(3, affine=False)", "--input", "2x3"], "cannot be gated: it has no affine"),
        (["--layer", "Linear(3, 4)", "--input", "2x3", "--device", "toaster"], "toaster"),
    ],
)
def test_arguments_that_make_no_sense(capsys, arguments, message):
    assert doctor.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("doctor: ") and message in captured.err
    assert captured.out.startswith("mrvae_kernels ") and "one beta" not in captured.out, "the environment comes first"


def test_layer_and_input_go_together(capsys):
    with pytest.raises(SystemExit) as stopped:
        doctor.main(["--layer", "Linear(3, 4)"])
    assert stopped.value.code == 2 and "go together" in capsys.readouterr().err


def test_layers_take_no_memory():
    layer = doctor.parse_layer("Linear(1000000, 1000000)")
    assert isinstance(layer, nn.Linear) and layer.weight.is_meta


def test_it_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "mrvae_kernels.doctor", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "example: python -m mrvae_kernels.doctor --layer" in done.stdout


def test_a_device_that_is_not_there(capsys, monkeypatch):
    def name(device):
        raise AssertionError("Invalid device id")

    monkeypatch.setattr(measurements, "device_name", name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert doctor.main(["--device", "cuda:9"]) == 2
    assert "doctor: Invalid device id" in capsys.readouterr().err


@pytest.mark.parametrize(("variable", "value", "error"), [
    ("MRVAE_STRATEGY", "magic", "strategy is 'magic'; expected one of fold, epilogue, fused"),
    ("MRVAE_BACKEND", "gpu", "backend is 'gpu'; expected one of cpp, triton, reference"),
])
def test_a_bad_environment_variable_is_said_after_the_environment(capsys, monkeypatch, variable, value, error):
    monkeypatch.setenv(variable, value)
    monkeypatch.setattr(strategy, "current", strategy._from_environment)
    assert doctor.main([]) == 2
    captured = capsys.readouterr()
    assert f"{variable} {value}" in captured.out and captured.err.endswith(f": {error}; unset {variable}\n")


def test_a_variable_that_this_device_cannot_honour(capsys, monkeypatch):
    monkeypatch.setattr(strategy, "TRITON_INSTALLED", True)
    monkeypatch.setattr(doctor, "TRITON_INSTALLED", True)
    monkeypatch.setattr(backends, "TRITON_DEVICE_TYPES", ("cuda", "xpu"))
    monkeypatch.setattr(backends, "TRITON_INSTALLED", True)
    monkeypatch.setenv("MRVAE_BACKEND", "triton")
    monkeypatch.setattr(strategy, "_override", strategy.Override(None, "triton"))
    assert doctor.main([]) == 2
    captured = capsys.readouterr()
    assert "MRVAE_BACKEND triton" in captured.out and "this one is on cpu" in captured.err
    assert "; unset MRVAE_BACKEND" in captured.err and "TRITON_INTERPRET=1" in captured.err


def test_a_triton_without_a_known_version(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "TRITON_INSTALLED", True)
    monkeypatch.setattr(measurements, "triton_version", lambda: None)
    assert any("Triton         installed, in an unknown version" in line for line in lines(capsys))


def test_a_layer_without_a_fused_kernel_is_told_so(capsys, monkeypatch):
    pytest.importorskip("triton")
    arguments = ["--layer", "Conv2d(8, 8, 3, groups=8)", "--input", "2x8x5x5"]
    assert doctor.main(arguments) == 0
    assert "not fused: " in (out := capsys.readouterr().out) and "groups = 8 leaves 1 channel a group" in out
    with mk.override(strategy="fused"):
        assert doctor.main(arguments) == 2
    assert "'fused' was asked for, but groups = 8 leaves 1 channel a group" in capsys.readouterr().err
    with mk.override(strategy="fused"):
        assert doctor.main(["--layer", "Conv1d(8, 8, 3)", "--input", "2x8x5"]) == 2
    assert "this is a 1-d convolution: use strategy 'epilogue'" in capsys.readouterr().err


@pytest.mark.parametrize("asked", [None, "fold", "epilogue", "fused"])
def test_norms_do_not_follow_a_strategy(capsys, asked):
    with mk.override(strategy=asked):
        shared = lines(capsys, "--layer", "BatchNorm2d(4)", "--input", "3x4x5x5", "--device", "cuda")
        own = lines(capsys, "--layer", "BatchNorm2d(4)", "--input", "3x4x5x5", "--device", "cuda", "--per-sample")
    assert any(line.startswith("  fold on reference: norms") for line in shared)
    assert any(line.startswith("  epilogue on reference: one beta a sample") for line in own)
    assert not any("fused" in line for line in [*shared, *own] if line.startswith("  "))

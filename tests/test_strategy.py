"""The choice between fold and epilogue and between backends: the cost model, who wins, and what it says."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import mrvae_kernels as mk
from mrvae_kernels import ops, strategy
from mrvae_kernels.strategy import EPILOGUE_PASSES, FOLD_PASSES, choose_backend, choose_strategy, explain

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _no_override(monkeypatch):
    monkeypatch.setattr(strategy, "_override", strategy.Override())


def test_the_cost_model_moves_fewer_bytes():
    for weights, outputs in [(10, 1000), (1000, 10), (784 * 300, 128 * 300), (128 * 256 * 16, 128 * 256 * 49)]:
        cheaper = "fold" if FOLD_PASSES * weights <= EPILOGUE_PASSES * outputs else "epilogue"
        assert choose_strategy(weights, outputs, False) == cheaper
        assert choose_strategy(weights, outputs, True) == "epilogue"
    assert choose_strategy(5 * EPILOGUE_PASSES, 5 * FOLD_PASSES, False) == "fold", "a tie folds"


def test_layers_follow_the_cost_model(monkeypatch):
    asked = []
    monkeypatch.setattr(mk.functional.reference, "gated_linear", lambda *a: asked.append(a[-1]))
    weight, gate = torch.randn(4, 3), torch.rand(4)
    with mk.override(backend="reference"):
        for batch in (1, 2, 3, 4, 100):
            mk.gated_linear(torch.randn(batch, 3), weight, None, gate)
        mk.gated_linear(torch.randn(100, 3), weight, None, torch.rand(100, 4))
    assert asked == [
        "epilogue",
        "epilogue",
        "epilogue",
        "fold",
        "fold",
        "epilogue",
    ]  # 12 weights x 5 against 4 outputs a row x 4


def test_argument_before_override_before_cost_model():
    with mk.override(strategy="epilogue"):
        assert choose_strategy(1, 1000, False) == "epilogue"
        assert choose_strategy(1, 1000, False, "fold") == "fold"
        with mk.override(strategy="fold"):
            assert choose_strategy(1000, 1, False) == "fold"
            with mk.override(backend="reference"):
                assert strategy.current() == strategy.Override("fold", "reference")
        assert choose_strategy(1, 1000, False) == "epilogue"
    assert strategy.current() == strategy.Override()


def test_an_error_in_the_block_restores():
    with pytest.raises(KeyError), mk.override(strategy="fold", backend="reference"):
        raise KeyError
    assert strategy.current() == strategy.Override()


def test_unknown_names_are_value_errors():
    with (
        pytest.raises(ValueError, match="strategy is 'fused'; expected one of fold, epilogue"),
        mk.override(strategy="fused"),
    ):
        pass
    with (
        pytest.raises(ValueError, match="backend is 'gpu'; expected one of cpp, reference"),
        mk.override(backend="gpu"),
    ):
        pass
    with pytest.raises(ValueError, match="strategy is 'x'"):
        choose_strategy(1, 1, False, "x")
    with mk.override(strategy="fold"), pytest.raises(ValueError, match="use strategy 'epilogue', or one beta"):
        choose_strategy(1, 1, True)


def test_without_the_extension_cpp_is_refused_and_automatic_falls_back(monkeypatch):
    monkeypatch.setattr(ops, "EXTENSION", False)
    monkeypatch.setattr(ops, "EXTENSION_ERROR", "no compiler was found")
    assert choose_backend(CPU, torch.float32) == "reference"
    with (
        pytest.raises(RuntimeError, match="backend 'cpp' was asked for, but no compiler was found"),
        mk.override(backend="cpp"),
    ):
        pass
    assert any("cpp: no compiler was found" in line for line in explain(1, 1).rejected)


def test_with_the_extension_cpp_takes_its_devices_and_dtypes(monkeypatch):
    monkeypatch.setattr(ops, "EXTENSION", True)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        assert choose_backend(CPU, dtype) == "cpp"
    assert choose_backend(CPU, torch.float16) == choose_backend(torch.device("cuda"), torch.float32) == "reference"
    with mk.override(backend="cpp"):
        assert choose_backend(CPU, torch.float32) == "cpp"
        with pytest.raises(RuntimeError, match=r"this one is torch.float16"):
            choose_backend(CPU, torch.float16)
        with pytest.raises(RuntimeError, match=r"it takes CPU tensors, this one is on cuda"):
            choose_backend(torch.device("cuda"), torch.float32)
    with mk.override(backend="reference"):
        assert choose_backend(CPU, torch.float32) == "reference"


def test_explain_gives_the_reason_and_what_was_rejected_why():
    fold = explain(10, 1000)
    assert (fold.strategy, fold.reason) == ("fold", "fold moves 50 elements, epilogue 4,000")
    assert fold.rejected[0].startswith("epilogue: ")
    assert explain(1000, 10).strategy == "epilogue" and explain(1000, 10).rejected[0].startswith("fold: ")
    sample = explain(10, 1000, per_sample=True)
    assert (sample.strategy, sample.reason) == ("epilogue", "one beta a sample")
    assert sample.rejected[0] == "fold: needs one beta for the batch"
    with mk.override(strategy="epilogue", backend="reference"):
        asked = explain(10, 1000)
    assert asked.strategy == "epilogue" and asked.reason == "asked for by override or MRVAE_STRATEGY"
    assert asked.rejected[-1] == "cpp: asked for by override or MRVAE_BACKEND"
    assert any("it takes CPU tensors" in line for line in explain(10, 1000, device="cuda").rejected)


def test_environment_variables(monkeypatch):
    monkeypatch.setenv("MRVAE_STRATEGY", "epilogue")
    monkeypatch.setenv("MRVAE_BACKEND", "reference")
    assert strategy._from_environment() == strategy.Override("epilogue", "reference")
    code = "import mrvae_kernels as mk; print(mk.strategy.current())"
    done = subprocess.run([sys.executable, "-c", code], env=dict(os.environ), capture_output=True, text=True)
    assert done.stdout.strip() == "Override(strategy='epilogue', backend='reference')", done.stderr
    monkeypatch.setenv("MRVAE_STRATEGY", "")
    assert strategy._from_environment() == strategy.Override(None, "reference")
    monkeypatch.setenv("MRVAE_STRATEGY", "magic")
    with pytest.raises(ValueError, match="strategy is 'magic'; expected one of fold, epilogue"):
        strategy._from_environment()

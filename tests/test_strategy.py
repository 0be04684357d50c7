"""The choice between fold and epilogue and between backends: the cost model, who wins, and what it says."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import mrvae_kernels as mk
from mrvae_kernels import backends, cost_model, measurements, ops, strategy
from mrvae_kernels.strategy import Product, choose_backend, choose_strategy, explain

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def _no_override(monkeypatch):
    monkeypatch.setattr(strategy, "_override", strategy.Override())


def test_without_a_fit_fewer_bytes_are_moved():
    for device in (None, CUDA):
        for weights, outputs in [(10, 1000), (1000, 10), (784 * 300, 128 * 300), (128 * 256 * 16, 128 * 256 * 49)]:
            cheaper = "fold" if 5 * weights <= 4 * outputs else "epilogue"
            assert choose_strategy(weights, outputs, False, device=device) == cheaper
            assert choose_strategy(weights, outputs, True, device=device) == "epilogue"
        assert choose_strategy(20, 25, False, device=device) == "fold", "a tie folds"


@pytest.fixture
def fits(monkeypatch):
    """A fit by which folding a Linear costs nothing at all and folding a convolution costs too much, and a core."""
    model = cost_model.CostModel(cost_model.Extra(0, 0, 0), cost_model.Extra(0, 0, 2_000_000), "a quick machine")
    turned = model._replace(fold=model.epilogue, epilogue=model.fold)
    monkeypatch.setattr(cost_model, "_fitted", {
        ("linear", torch.float32): model, ("convolution", torch.float32): turned, ("linear", torch.bfloat16): turned,
    })
    monkeypatch.setattr(ops, "EXTENSION", True)


def test_the_compiled_core_on_a_cpu_follows_the_fit(fits):
    large = (1000, 1)  # by bytes moved the epilogue
    assert choose_strategy(*large, False, device=CPU) == "fold"
    assert choose_strategy(*large, False, device=CPU, kind="convolution") == "epilogue"
    assert choose_strategy(*large, False, device=CPU, dtype=torch.bfloat16) == "epilogue"
    assert choose_strategy(1, 1000, False, device=CPU, dtype=torch.float16) == "fold", "not fitted: bytes moved"
    assert choose_strategy(*large, False, device=CUDA) == choose_strategy(*large, True, device=CPU) == "epilogue"
    with mk.override(backend="cpp"):
        assert choose_strategy(*large, False, device=CPU) == "fold"
    with mk.override(backend="reference"):
        assert choose_strategy(*large, False, device=CPU) == "epilogue", "plain PyTorch was not fitted"
    told = explain(1000, 1)
    assert (told.strategy, told.backend) == ("fold", "cpp")
    assert told.reason == "fold adds 0.0 us a step, epilogue 2.0 us, by the cost model fitted on a quick machine"
    assert f"epilogue: {told.reason}" in told.rejected
    assert explain(1000, 1, kind="convolution").strategy == "epilogue"


def test_layers_say_which_kind_and_which_numbers_they_are(fits, monkeypatch):
    x, image, gate = torch.randn(2, 3), torch.randn(2, 3, 5, 5), torch.rand(4)
    linear, convolution = torch.randn(4, 3), torch.randn(4, 3, 3, 3)
    assert mk.functional.linear_strategy(x, linear, False) == "fold"
    with torch.autocast("cpu", torch.bfloat16):
        assert mk.functional.linear_strategy(x, linear, False) == "epilogue"
    geometry = ((1, 1), (0, 0), (1, 1), False, (0, 0), 1)
    assert mk.functional.convolution_strategy(image, convolution, geometry, False) == "epilogue"
    asked = []
    monkeypatch.setattr(ops, "gated_convolution", lambda *a: asked.append(a[-1]))
    mk.gated_conv2d(image, convolution, None, gate)
    assert asked == ["epilogue"]


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_compiled_graph_follows_the_bytes_moved(fits, dynamic):
    weight, gate = torch.randn(40, 3), torch.rand(40)

    @torch.compile(fullgraph=True, backend="eager", dynamic=dynamic)
    def choices(x):
        how = mk.functional.linear_strategy(x, weight, False)
        return mk.gated_linear(x, weight, None, gate), how

    assert [choices(torch.randn(rows, 3))[1] for rows in (1, 2, 100)] == ["epilogue", "epilogue", "fold"]


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
        pytest.raises(ValueError, match="strategy is 'magic'; expected one of fold, epilogue, fused"),
        mk.override(strategy="magic"),
    ):
        pass
    with (
        pytest.raises(ValueError, match="backend is 'gpu'; expected one of cpp, triton, reference"),
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
    monkeypatch.setattr(ops, "GPU_TYPE", None)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        assert choose_backend(CPU, dtype) == "cpp"
    assert choose_backend(CPU, torch.float16) == choose_backend(torch.device("cuda"), torch.float32) == "reference"
    with mk.override(backend="cpp"):
        assert choose_backend(CPU, torch.float32) == "cpp"
        with pytest.raises(RuntimeError, match=r"this one is torch.float16"):
            choose_backend(CPU, torch.float16)
        with pytest.raises(RuntimeError, match=r"the compiled core has no CUDA kernels: .*; "):
            choose_backend(torch.device("cuda"), torch.float32)
    with mk.override(backend="reference"):
        assert choose_backend(CPU, torch.float32) == "reference"


def test_explain_gives_the_reason_and_what_was_rejected_why(monkeypatch):
    monkeypatch.setattr(cost_model, "_fitted", {})
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
    assert "cpp: asked for by override or MRVAE_BACKEND" in asked.rejected
    monkeypatch.setattr(ops, "GPU_TYPE", None)
    assert any("the compiled core has no CUDA" in line for line in explain(10, 1000, device="cuda").rejected)


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
    with pytest.raises(ValueError, match="strategy is 'magic'; expected one of fold, epilogue, fused"):
        strategy._from_environment()


PRODUCT = Product("linear", CUDA, torch.float32, 128, 300, 784)


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """Triton as on a GPU, the core without CUDA, and a function that makes a record of it the user's."""
    monkeypatch.setattr(backends, "TRITON_DEVICE_TYPES", ("cuda", "xpu"))
    monkeypatch.setattr(backends, "TRITON_INSTALLED", True)
    monkeypatch.setattr(strategy, "TRITON_INSTALLED", True)
    monkeypatch.setattr(ops, "GPU_TYPE", None)
    monkeypatch.setenv("MRVAE_CACHE", str(tmp_path))

    def record(**found):
        path = tmp_path / measurements.file_name(measurements.device_name(CUDA))
        measurements.write(path, "cuda", {}, found)

    measurements.records.cache_clear()
    yield record
    measurements.records.cache_clear()


def test_triton_is_chosen_only_where_it_was_measured_to_win(measured):
    assert choose_backend(CUDA, torch.float32, "gates") == "reference"
    measured(backends={"gates": {"reference": 2.0, "triton": 1.0}, "fold": {"reference": 1.0, "triton": 2.0}})
    assert choose_backend(CUDA, torch.float32, "gates") == "triton"
    assert choose_backend(CUDA, torch.float32, "fold") == choose_backend(CUDA, torch.float32) == "reference"
    assert choose_backend(CUDA, torch.int32, "gates") == "reference", "a dtype that Triton's kernels do not take"
    assert choose_backend(CPU, torch.float16, "gates") == "reference", "another device"
    with mk.override(backend="reference"):
        assert choose_backend(CUDA, torch.float32, "gates") == "reference"


def test_the_measured_strategy_wins_over_the_cost_model_in_its_shape_class(measured):
    assert choose_strategy(300 * 784, 128 * 300, False, None, PRODUCT) == "epilogue"
    measured(strategies={PRODUCT.key(False): {"fold": 3.0, "epilogue": 2.0, "fused": 1.0},
                         PRODUCT.key(True): {"epilogue": 1.0, "fused": 2.0}})
    assert choose_strategy(300 * 784, 128 * 300, False, None, PRODUCT) == "fused"
    assert choose_backend(CUDA, torch.float32, "fused") == "triton"
    assert choose_strategy(300 * 784, 128 * 300, True, None, PRODUCT) == "epilogue"
    far = PRODUCT._replace(rows=16)
    assert choose_strategy(300 * 784, 16 * 300, False, None, far) == "epilogue", "another shape class: cost model"
    near = PRODUCT._replace(rows=130, columns=310)
    assert choose_strategy(310 * 784, 130 * 310, False, None, near) == "fused", "the same class"
    assert choose_strategy(300 * 784, 128 * 300, False, None, PRODUCT._replace(device=CPU)) == "epilogue"
    with mk.override(strategy="fold"):
        assert choose_strategy(300 * 784, 128 * 300, False, None, PRODUCT) == "fold"
    with mk.override(backend="reference"):
        assert choose_strategy(300 * 784, 128 * 300, False, None, PRODUCT) == "epilogue", "fused needs kernels"
    choice = explain(300 * 784, 128 * 300, False, "cuda", product=PRODUCT)
    assert (choice.strategy, choice.backend) == ("fused", "triton")
    assert choice.reason == "fastest of those measured on cuda for this shape class"
    assert {"fold: measured 3.00 times slower", "epilogue: measured 2.00 times slower"} <= set(choice.rejected)


def test_fused_needs_kernels(measured, monkeypatch):
    with pytest.raises(ValueError, match="has kernels in the compiled core and in Triton only; backend is 'reference'"):
        strategy.Override("fused", "reference")
    with mk.override(strategy="fused"), pytest.raises(RuntimeError, match="'fused' was asked for: .* is on cpu"):
        choose_backend(CPU, torch.float32, "fused")
    with pytest.raises(RuntimeError, match="float32, bfloat16 and float16, this one is torch.float64"):
        choose_backend(CUDA, torch.float64, "fused")
    monkeypatch.setattr(strategy, "TRITON_INSTALLED", False)
    monkeypatch.setattr(backends, "TRITON_INSTALLED", False)
    with pytest.raises(RuntimeError, match="'triton' was asked for, but triton is not installed; run: pip install"):
        strategy.Override(None, "triton")
    with pytest.raises(RuntimeError, match="'fused' was asked for: cpp: .*; triton: triton is not installed"):
        choose_backend(CUDA, torch.float32, "fused")


def test_explain_says_what_was_not_measured(measured):
    lines = explain(10, 1000, device="cuda", product=PRODUCT).rejected
    assert "triton: not measured on cuda; mrvae_kernels.tune(model, ...) measures, and keeps the result" in lines
    measured(backends={"fold": {"reference": 1.0, "triton": 2.0}})
    assert "triton: measured slower on cuda" in explain(10, 1000, device="cuda").rejected


@pytest.fixture
def cuda_core(measured, monkeypatch):
    """A compiled core with CUDA kernels besides Triton's."""
    monkeypatch.setattr(ops, "EXTENSION", True)
    monkeypatch.setattr(ops, "GPU_TYPE", "cuda")
    return measured


def test_the_compiled_core_on_a_gpu(cuda_core):
    assert choose_backend(CUDA, torch.float16, "gates") == "reference", "nothing was measured"
    with mk.override(backend="cpp"):
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            assert choose_backend(CUDA, dtype, "gates") == "cpp"
        assert choose_backend(CUDA, torch.float16, "fused") == choose_backend(CPU, torch.float64) == "cpp"
        with pytest.raises(RuntimeError, match="'fused' on backend 'cpp' was asked for: .* take CUDA tensors, this"):
            choose_backend(CPU, torch.float32, "fused")
        with pytest.raises(RuntimeError, match="float32, bfloat16 and float16, this one is torch.float64"):
            choose_backend(CUDA, torch.float64, "fused")
        with pytest.raises(RuntimeError, match="takes CPU and CUDA tensors, this one is on xpu"):
            choose_backend(torch.device("xpu"), torch.float32)
    measured = {"gates": {"reference": 2.0, "triton": 1.5, "cpp": 1.0}, "fold": {"reference": 1.0, "cpp": 0.97}}
    cuda_core(backends=measured)
    assert choose_backend(CUDA, torch.float32, "gates") == "cpp"
    assert choose_backend(CUDA, torch.float32, "fold") == "reference", "it wins by less than the margin"


def test_which_fused_kernels(cuda_core):
    assert choose_backend(CUDA, torch.float32, "fused") == "cpp", "not measured: the one that takes less of the host"
    with mk.override(backend="triton"):
        assert choose_backend(CUDA, torch.float32, "fused") == "triton"
    cuda_core(backends={"fused": {"triton": 1.0, "cpp": 2.0}})
    assert choose_backend(CUDA, torch.float32, "fused") == "triton"
    with mk.override(strategy="fused"):
        assert "cpp: measured slower on cuda" in explain(10, 1000, device="cuda").rejected


def test_inside_torch_func_plain_pytorch_computes():
    x, weight, gate = torch.randn(5, 3), torch.randn(4, 3), torch.rand(4)

    def total(gate: torch.Tensor) -> torch.Tensor:
        return mk.gated_linear(x, weight, None, gate, activation="tanh").square().sum()

    leaf = gate.clone().requires_grad_()
    total(leaf).backward()
    torch.testing.assert_close(torch.func.grad(total)(gate), leaf.grad)
    torch.testing.assert_close(torch.func.vmap(total)(torch.stack([gate, gate]))[1], total(gate))
    model = mk.multirate(torch.nn.Sequential(torch.nn.Linear(3, 4)), gates="sigmoid")
    wanted = model(x, beta=0.3)
    torch.testing.assert_close(torch.func.vmap(lambda x: model(x, beta=0.3))(x), wanted)


def test_a_gpu_that_the_core_has_no_code_for(cuda_core, monkeypatch):
    monkeypatch.setattr(backends, "code_refusal", lambda device: "the CUDA core has no code for sm_75; run: make")
    assert choose_backend(CUDA, torch.float32, "fused") == "triton"
    with mk.override(backend="cpp"), pytest.raises(RuntimeError, match="no code for sm_75; run: make"):
        choose_backend(CUDA, torch.float32)


def test_each_operator_follows_its_own_measurement(cuda_core):
    cuda_core(backends={"epilogue": {"reference": 2.0, "cpp": 1.0}, "gates": {"reference": 1.0, "cpp": 2.0}})
    assert [choose_backend(CUDA, torch.float32, name) for name in ("epilogue", "gates", "fold")] == [
        "cpp", "reference", "reference"
    ]

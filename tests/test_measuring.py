"""warm_up and tune: what they leave alone, what they keep, and that strategy follows it."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import nn

import mrvae_kernels as mk
from mrvae_kernels import backends, functional, measurements, measuring, ops, strategy, timing

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _cache(monkeypatch, tmp_path):
    monkeypatch.setenv("MRVAE_CACHE", str(tmp_path))
    monkeypatch.setattr(measuring, "INTERPRETER_TOO", True)
    measurements.records.cache_clear()
    yield
    measurements.records.cache_clear()


def network() -> mk.MultiRate:
    plain = nn.Sequential()
    plain.encoder = nn.Sequential(nn.Conv2d(1, 3, 3, 2, 1), nn.BatchNorm2d(3), nn.Dropout(), nn.Flatten())
    plain.decoder = nn.Sequential(nn.Linear(12, 9))
    return mk.multirate(plain).to(DEVICE)


def test_warm_up_leaves_gradients_buffers_and_random_states_alone():
    model, x = network(), torch.rand(2, 1, 4, 4, device=DEVICE)
    (p, *_) = model.parameters()
    p.grad = torch.ones_like(p)
    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(3)
    expected = torch.rand(3, device=DEVICE)
    torch.manual_seed(3)
    mk.warm_up(model, x, beta=0.5)
    assert torch.equal(torch.rand(3, device=DEVICE), expected)
    assert torch.equal(p.grad, torch.ones_like(p)) and sum(q.grad is not None for q in model.parameters()) == 1
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_warm_up_of_a_frozen_network_runs_forward_only(monkeypatch):
    model, calls = network().requires_grad_(False), []
    model.network.register_forward_hook(lambda *_: calls.append("forward"))
    monkeypatch.setattr(torch.autograd, "grad", lambda *_, **__: calls.append("backward"))
    mk.warm_up(model, torch.rand(2, 1, 4, 4, device=DEVICE), beta=torch.tensor([0.1, 1.0], device=DEVICE))
    assert calls == ["forward"] * 2


def test_warm_up_follows_the_plan_that_its_first_run_makes(monkeypatch):
    model, plans = network(), []
    model.network.register_forward_hook(lambda *_: plans.append(len(model._plans.made)))
    grad, backwards = torch.autograd.grad, []
    monkeypatch.setattr(torch.autograd, "grad", lambda *args, **kwargs: backwards.append(1) or grad(*args, **kwargs))
    mk.warm_up(model, torch.rand(2, 1, 4, 4, device=DEVICE), beta=0.5)
    assert plans == [0, 1] and len(backwards) == 2


@dataclasses.dataclass
class Output:
    q: torch.distributions.Distribution
    more: dict[str, object]


class Returns(nn.Module):
    def __init__(self, wrap) -> None:
        super().__init__()
        self.layer, self.wrap = nn.Linear(3, 3), wrap

    def forward(self, x):
        return self.wrap(self.layer(x))


@pytest.mark.parametrize("wrap", [
    lambda y: Output(torch.distributions.Normal(y, 1.0), {}),
    lambda y: Output(torch.distributions.Normal(y.detach(), 1.0), {"list": [1, "a", y]}),
    lambda y: [torch.distributions.Independent(torch.distributions.Normal(y, 1.0), 1)],
    lambda y: (None, Output(torch.distributions.Categorical(logits=y), {})),
])
def test_warm_up_finds_tensors_in_dataclasses_and_distributions(wrap, monkeypatch):
    grad, given = torch.autograd.grad, []
    monkeypatch.setattr(torch.autograd, "grad", lambda *args, **kwargs: given.append(args[0]) or grad(*args, **kwargs))
    mk.warm_up(mk.multirate(Returns(wrap), gates="sigmoid"), torch.rand(2, 3), beta=0.5)
    assert len(given) == 2 and all(results for results in given)


def test_warm_up_without_a_gradient_in_the_output_is_an_error():
    model = mk.multirate(Returns(lambda y: {"label": y.argmax(-1), "y": y.detach()}), gates="sigmoid")
    with pytest.raises(ValueError, match="output, a dict, holds no tensor that requires a gradient, and 4 parameters"):
        mk.warm_up(model, torch.rand(2, 3), beta=0.5)
    with torch.no_grad():
        mk.warm_up(model, torch.rand(2, 3), beta=0.5)


def test_tune_takes_a_multirate():
    with pytest.raises(TypeError, match=r"tune takes the MultiRate that multirate\(\) returned, not a Linear"):
        mk.tune(nn.Linear(3, 4), torch.rand(2, 3), beta=0.5)


def test_tune_refuses_where_no_kernels_run(monkeypatch):
    monkeypatch.setattr(backends, "TRITON_DEVICE_TYPES", ("xpu",))
    monkeypatch.setattr(ops, "EXTENSION", False)
    monkeypatch.setattr(ops, "EXTENSION_ERROR", "the C++ core is not built")
    message = "tune measures GPU kernels against plain PyTorch: the C\\+\\+ core is not built; Triton takes xpu"
    with pytest.raises(RuntimeError, match=message):
        mk.tune(network(), torch.rand(2, 1, 4, 4, device=DEVICE), beta=0.5)


@pytest.mark.parametrize("per_sample", [False, True])
def test_tune_keeps_a_record_that_strategy_reads(tmp_path, per_sample):
    pytest.importorskip("triton")
    model, x = network(), torch.rand(2, 1, 4, 4, device=DEVICE)
    beta = torch.tensor([0.1, 1.0], device=DEVICE) if per_sample else 0.5
    before = copy.deepcopy(model.state_dict())
    found = mk.tune(model, x, beta=beta, rounds=1)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    able = {"reference", "triton"} | ({"cpp"} if DEVICE == (ops.GPU_TYPE or "cpu") and ops.EXTENSION else set())
    assert {name: set(times) for name, times in found["backends"].items()} == {
        **{name: able for name in ("gates", *([] if per_sample else ["fold"]), "epilogue")},
        "fused": {"triton"} | ({"cpp"} if DEVICE == ops.GPU_TYPE else set()),
    }
    # the convolution before the norm has no gate of its own: the linear layer is the only gated product
    linear = measurements.shape_class("linear", "float32", per_sample, 2, 9, 12)
    strategies = {"epilogue", "fused"} if per_sample else {"fold", "epilogue", "fused"}
    assert {key: set(times) for key, times in found["strategies"].items()} == {linear: strategies}
    name = measurements.device_name(torch.device(DEVICE))
    assert measurements.read(tmp_path / measurements.file_name(name)) == found
    assert set(measurements.strategy_times(torch.device(DEVICE), linear)) == strategies


def test_interleaved_runs_every_step_in_every_round():
    order: list[str] = []
    steps = {name: lambda name=name: order.append(name) for name in ("a", "b")}
    times = timing.interleaved(steps, torch.device("cpu"), 3)
    assert order == ["a", "b"] * 4, "one round to warm up, then three"
    assert all(len(taken) == 3 and min(taken) >= 0 for taken in times.values())


def quick(plain: nn.Module, monkeypatch, **options) -> mk.MultiRate:
    """A network to tune, with Triton's place taken by nothing: steps are timed, none is compiled or interpreted."""
    pytest.importorskip("triton")
    for module in (measuring, strategy):
        monkeypatch.setattr(module, "refusals", lambda *_: [])
    run = functional.gated_linear
    monkeypatch.setattr(
        functional, "gated_linear",
        lambda *args, strategy=None: run(*args, strategy="epilogue" if strategy == "fused" else strategy),
    )
    monkeypatch.setattr(functional, "_operators", lambda backend: mk.reference)
    monkeypatch.setattr(functional, "choose_backend", lambda *_: "reference")
    monkeypatch.setattr(functional, "fused_refusal", lambda *_: "there is no kernel here")
    return mk.multirate(plain, **{"gates": "sigmoid", **options})


def two_layers() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 64))


def test_what_fails_is_reported_and_the_rest_is_kept_layer_by_layer(monkeypatch, tmp_path):
    model, written = quick(two_layers(), monkeypatch), []
    adapter, write = model._entries[0].adapter, measurements.write
    run = adapter.run

    def failing(layer, gate, shift, activation, how, x):
        if layer.in_features == 8 and how == "fold":
            raise RuntimeError("out of shared memory")
        return run(layer, gate, shift, activation, how, x)

    monkeypatch.setattr(adapter, "run", failing)
    monkeypatch.setattr(measurements, "write", lambda *args: written.append(len(args[3]["strategies"])) or write(*args))
    monkeypatch.setattr(measuring, "time_backends", lambda *_: {})
    message = "could not run everything:\n  layer '1' by fold: RuntimeError: out of shared memory$"
    with pytest.warns(UserWarning, match=message):
        found = mk.tune(model, torch.rand(2, 3), beta=0.5, rounds=1)
    assert [set(times) for times in found["strategies"].values()] == [
        {"fold", "epilogue", "fused"}, {"epilogue", "fused"}
    ]
    assert written == [0, 1, 2] and measurements.read(next(tmp_path.glob("*.json"))) == found


def test_a_lost_device_ends_it_and_a_refusal_is_no_failure():
    def raises(error: Exception):
        def step() -> None:
            raise error

        return step

    failures: list[str] = []
    steps = {"fold": lambda: None, "fused": raises(ValueError("groups"))}
    assert list(timing.running(steps, "layer", failures)) == ["fold"] and failures == []
    assert timing.running({"epilogue": raises(ValueError("odd"))}, "layer", failures) == {}
    assert failures == ["layer by epilogue: ValueError: odd"]
    with pytest.raises(torch.AcceleratorError):
        timing.running({"fold": raises(torch.AcceleratorError("illegal memory access"))}, "layer", failures)
    with pytest.raises(KeyError):
        timing.running({"fold": raises(KeyError("x"))}, "layer", None)


@pytest.mark.parametrize("place", ["no home", "a file"])
def test_what_cannot_be_written_is_returned(monkeypatch, tmp_path, place):
    (tmp_path / "file").touch()
    monkeypatch.setenv("MRVAE_CACHE", str(tmp_path / "file" / "cache"))
    if place == "no home":
        monkeypatch.setattr(measurements, "cache_folder", lambda: None)
    model = quick(two_layers(), monkeypatch)
    with pytest.warns(UserWarning, match="is not kept, and not followed: ") as caught:
        found = mk.tune(model, torch.rand(2, 3), beta=0.5, rounds=1)
    assert len(found["strategies"]) == 2 and sum("not kept" in str(w.message) for w in caught) == 1
    assert not any(measurements.records(torch.device("cpu")).values())


def test_overrides_do_not_count_and_come_back(monkeypatch):
    model, seen = quick(two_layers(), monkeypatch), []
    monkeypatch.setattr(measuring, "time_backends", lambda *_: seen.append(strategy.current()) or {})
    with mk.override(strategy="epilogue", backend="reference"), torch.no_grad():
        found = mk.tune(model, torch.rand(2, 3), beta=0.5, rounds=1)
        assert strategy.current() == strategy.Override("epilogue", "reference")
    assert seen == [strategy.Override()]
    assert all(set(times) == {"fold", "epilogue", "fused"} for times in found["strategies"].values())


def test_layers_called_by_keyword(monkeypatch):
    class ByKeyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 4)

        def forward(self, x):
            return self.layer(input=x)

    x = torch.rand(2, 3)
    inputs = measuring.inputs_of_layers(mk.multirate(ByKeyword(), gates="sigmoid"), (x,), {"beta": 0.5})
    assert torch.equal(inputs[0], x)


@pytest.mark.parametrize(("layer", "shape"), [
    (nn.Conv1d(2, 3, 2), (2, 5)), (nn.Conv2d(2, 3, 2), (2, 5, 5)), (nn.Conv2d(2, 3, 2), (4, 2, 5, 5)),
    (nn.Linear(2, 3), (2,)), (nn.ConvTranspose2d(2, 3, 2), (2, 5, 5)),
])
def test_the_channels_of_inputs_with_and_without_a_batch(monkeypatch, layer, shape):
    model, sizes = quick(nn.Sequential(layer), monkeypatch), set()
    epilogue = functional.epilogue
    monkeypatch.setattr(functional, "epilogue", lambda *args: sizes.add(args[0].shape[args[4]]) or epilogue(*args))
    inputs = measuring.inputs_of_layers(model, (torch.rand(shape),), {"beta": 0.5})
    assert "epilogue" in measuring.time_backends(model, inputs, 0.5, 1) and sizes == {3}


@pytest.mark.parametrize(("plain", "gates", "beta", "operators"), [
    (two_layers(), "sigmoid", 0.5, {"gates", "fold", "epilogue", "fused"}),
    (two_layers(), mk.GateSpec("sigmoid", hidden=(4,)), 0.5, {"fold", "epilogue", "fused"}),
    (two_layers(), "sigmoid", torch.tensor([0.1, 1.0]), {"gates", "epilogue", "fused"}),
    (nn.Sequential(nn.LayerNorm(3)), "sigmoid", 0.5, {"gates", "fold"}),
])
def test_only_operators_that_the_network_runs_are_timed(monkeypatch, plain, gates, beta, operators):
    model = quick(plain, monkeypatch, gates=gates)
    inputs = measuring.inputs_of_layers(model, (torch.rand(2, 3),), {"beta": beta})
    assert set(measuring.time_backends(model, inputs, beta, 1)) == operators


@pytest.mark.skipif(DEVICE != "cpu", reason="a GPU can be measured")
def test_tune_does_not_measure_the_interpreter(monkeypatch, tmp_path):
    monkeypatch.setattr(measuring, "INTERPRETER_TOO", False)
    with pytest.raises(RuntimeError, match="the model is on the CPU; move it and its inputs to the GPU"):
        mk.tune(network(), torch.rand(2, 1, 4, 4), beta=0.5)
    assert list(tmp_path.iterdir()) == []

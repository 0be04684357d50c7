"""warm_up and tune: what they leave alone, what they keep, and that strategy follows it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import mrvae_kernels as mk
from mrvae_kernels import measurements, measuring, strategy

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _cache(monkeypatch, tmp_path):
    monkeypatch.setenv("MRVAE_CACHE", str(tmp_path))
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


def test_warm_up_of_a_frozen_network_runs_forward_only():
    model = network().requires_grad_(False)
    mk.warm_up(model, torch.rand(2, 1, 4, 4, device=DEVICE), beta=torch.tensor([0.1, 1.0], device=DEVICE))


def test_tune_refuses_where_triton_does_not_run(monkeypatch):
    monkeypatch.setattr(strategy, "TRITON_DEVICE_TYPES", ("xpu",))
    with pytest.raises(RuntimeError, match="tune measures Triton's kernels against plain PyTorch: Triton takes xpu"):
        mk.tune(network(), torch.rand(2, 1, 4, 4, device=DEVICE), beta=0.5)


@pytest.mark.parametrize("per_sample", [False, True])
def test_tune_keeps_a_record_that_strategy_reads(tmp_path, per_sample):
    pytest.importorskip("triton")
    model, x = network(), torch.rand(2, 1, 4, 4, device=DEVICE)
    beta = torch.tensor([0.1, 1.0], device=DEVICE) if per_sample else 0.5
    before = copy.deepcopy(model.state_dict())
    found = mk.tune(model, x, beta=beta, rounds=1)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {name: set(times) for name, times in found["backends"].items()} == {
        name: {"reference", "triton"} for name in ("gates", "fold", "epilogue")
    }
    # the convolution before the norm has no gate of its own: the linear layer is the only gated product
    linear = measurements.shape_class("linear", "float32", per_sample, 2, 9, 12)
    strategies = {"epilogue", "fused"} if per_sample else {"fold", "epilogue", "fused"}
    assert {key: set(times) for key, times in found["strategies"].items()} == {linear: strategies}
    name = measurements.device_name(torch.device(DEVICE))
    assert measurements.read(tmp_path / measurements.file_name(name)) == found
    assert measurements.best_strategy(torch.device(DEVICE), linear) in strategies


def test_interleaved_runs_every_step_in_every_round():
    order: list[str] = []
    steps = {name: lambda name=name: order.append(name) for name in ("a", "b")}
    times = measuring.interleaved(steps, torch.device("cpu"), 3)
    assert order == ["a", "b"] * 4, "one round to warm up, then three"
    assert all(len(taken) == 3 and min(taken) >= 0 for taken in times.values())

"""What all tests share: the backends, hypothesis settings, seeds."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before mrvae_kernels reads it: Triton's kernels on CPU tensors

import mrvae_kernels as mk
from mrvae_kernels import cost_model, ops

sys.path.insert(0, str(Path(__file__).parent))  # helpers.py and its like, under every import mode of pytest
import interpreter_bounds

if not torch.cuda.is_available() and importlib.util.find_spec("triton") is not None:
    interpreter_bounds.install()

hypothesis.settings.register_profile(
    "mrvae",
    deadline=None,
    derandomize=True,
    max_examples=40,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture, hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("mrvae")

# not "triton": in the interpreter these tests take half an hour; tests/triton_kernels and tests/ops/test_triton_ops.py
# hold its kernels and operators to the reference, at sizes chosen for it
BACKENDS = ["reference", "cpp"] if ops.EXTENSION else ["reference"]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes more than 20 seconds")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The test runs once on each backend that is installed."""
    with mk.override(backend=request.param):
        yield request.param


@pytest.fixture(autouse=True)
def _no_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Strategies by bytes moved, on every machine and after every fit of the cost model."""
    monkeypatch.setattr(cost_model, "_fitted", {})


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
    interpreter_bounds.memory.clear()

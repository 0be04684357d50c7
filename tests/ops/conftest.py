"""On a machine whose core has CUDA kernels the operators' tests draw their tensors on the GPU, and so run those."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from op_checks import DEVICE

ON_GPU = ("test_gates_op", "test_fold_op", "test_epilogue_op", "test_gated_convolution_op")


def drawn_on_gpu(path: object) -> bool:
    return DEVICE != "cpu" and getattr(path, "stem", None) in ON_GPU


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Iterator[None]:
    """Parameters of tests are drawn when their file is imported."""
    if not drawn_on_gpu(collector.path):
        return (yield)
    with torch.device(DEVICE):
        return (yield)


@pytest.fixture(autouse=True)
def on_gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """And the tests' own tensors; the library's products exact, and the same each time, as gradcheck wants them."""
    if not drawn_on_gpu(request.path):
        yield
        return
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    with torch.device(DEVICE):
        yield

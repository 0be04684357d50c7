"""What only a GPU can show, of both backends: streams, CUDA graphs, a second device, more than 2^31 elements."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import mrvae_kernels as mk
from mrvae_kernels import functional, reference
from mrvae_kernels.backends import refusals

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(params=["cpp", "triton"], autouse=True)
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each test runs on each backend that has kernels for the GPU."""
    if reasons := refusals(request.param, torch.device("cuda"), torch.float32, "fused"):
        pytest.skip("; ".join(reasons))
    with mk.override(backend=request.param):
        yield request.param


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """By the norm of the difference, relative to the expected norm; NaN fails."""
    assert actual.shape == expected.shape
    want = expected.to(actual.device).double()
    error = (actual.double() - want).norm().item()
    assert error <= tolerance * max(want.norm().item(), 1e-3), f"error {error}"


def network(device: torch.device | str = "cuda") -> mk.MultiRate:
    plain = nn.Sequential()
    plain.encoder = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.SiLU(), nn.Flatten(), nn.Linear(16 * 16, 24))
    plain.decoder = nn.Sequential(
        nn.Linear(24, 16 * 16), nn.Unflatten(1, (16, 4, 4)), nn.ConvTranspose2d(16, 3, 3, 2, 1, 1)
    )
    return mk.multirate(plain.to(device))


def gradients(model: mk.MultiRate, x: Tensor, beta: float | Tensor) -> list[Tensor]:
    y = model(x, beta=beta)
    return [y, *torch.autograd.grad(y.square().sum(), [p for p in model.parameters()])]


@pytest.mark.parametrize("strategy", ["fold", "epilogue", "fused"])
def test_a_cuda_graph_replays_with_new_inputs_and_weights(strategy):
    torch.manual_seed(0)
    model = network()
    x = torch.rand(5, 3, 8, 8, device="cuda")
    with mk.override(strategy=strategy):
        mk.warm_up(model, x, beta=0.5)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                gradients(model, x, 0.5)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = gradients(model, x, 0.5)
        junk = [torch.rand(1 << 20, device="cuda") for _ in range(8)]  # other tenants of the allocator's blocks
        with torch.no_grad():
            x.copy_(torch.rand_like(x))
            for p in model.parameters():
                p.mul_(1.1)
        graph.replay()
        replayed = [result.clone() for result in results]
        eager = gradients(model, x, 0.5)
    for got, want in zip(replayed, eager, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)
    del junk


@pytest.mark.parametrize("strategy", ["fold", "epilogue", "fused"])
def test_kernels_run_on_the_current_stream(strategy):
    torch.manual_seed(0)
    model = network()
    x = torch.rand(5, 3, 8, 8, device="cuda")
    with mk.override(strategy=strategy):
        want = gradients(model, x, 0.5)
        stream = torch.cuda.Stream()
        late = torch.zeros_like(x)
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)
            late.copy_(x)  # kernels on any other stream would read the zeros
            got = gradients(model, late, 0.5)
        torch.cuda.synchronize()
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("strategy", ["fold", "epilogue", "fused"])
def test_the_second_device_while_the_first_is_current(strategy):
    torch.manual_seed(0)
    model = network("cuda:0")
    twin = copy.deepcopy(model).to("cuda:1")
    x = torch.rand(5, 3, 8, 8, device="cuda:0")
    with mk.override(strategy=strategy), torch.cuda.device(0):
        want, got = gradients(model, x, 0.5), gradients(twin, x.to("cuda:1"), 0.5)
    for a, b in zip(got, want, strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_steps_agree_with_eager_ones(mode):
    torch.manual_seed(0)
    model = network()
    with mk.override(strategy="fused"):
        compiled = torch.compile(model, mode=mode, fullgraph=True)
        for scale in (1.0, 2.0, 3.0):
            x = scale * torch.rand(5, 3, 8, 8, device="cuda")
            want = gradients(model, x, 0.5)
            y = compiled(x, beta=0.5)
            got = [y, *torch.autograd.grad(y.square().sum(), list(model.parameters()))]
            for a, b in zip(got, want, strict=True):
                assert_close(a, b, tolerance=1e-3)


def room(gigabytes: float) -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_properties(0).total_memory > gigabytes * 2**30


@pytest.mark.skipif(not room(60), reason="needs 60 GB of GPU memory")
def test_more_than_2_to_the_31_elements():
    rows, columns = 2**17 + 3, 2**14 + 8
    gate, bias = torch.rand(columns, device="cuda"), torch.randn(columns, device="cuda")
    u = torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16)
    y = functional.epilogue(u, bias, gate, None, 1, "relu")
    for part in (slice(0, 5), slice(rows // 2, rows // 2 + 5), slice(rows - 5, rows)):
        torch.testing.assert_close(y[part], reference.epilogue(u[part], bias, gate, None, 1, "relu"))
    del u, y
    x, weight = (torch.randn(n, 16, device="cuda", dtype=torch.bfloat16) for n in (rows, columns))
    y = mk.gated_linear(x, weight, bias, gate, strategy="fused")
    for part in (slice(0, 5), slice(rows - 5, rows)):
        want = reference.gated_linear(x[part].float(), weight.float(), bias, gate)
        assert_close(y[part].float(), want, tolerance=1e-2)
    del y
    grad = torch.randn(rows, 16, device="cuda", dtype=torch.bfloat16)
    wide = torch.randn(16, columns, device="cuda", dtype=torch.bfloat16)
    inputs = torch.zeros(rows, columns, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    y = mk.gated_linear(inputs, wide, None, gate[:16].contiguous(), strategy="fused")
    (dx,) = torch.autograd.grad(y, inputs, grad)
    want = (grad[-5:].float() * gate[:16]) @ wide.float()
    assert_close(dx[-5:].float(), want, tolerance=1e-2)

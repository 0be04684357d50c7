"""GPU time and host time of short steps, and the ceilings that they are held against."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

Step = Callable[[], Any]
BUSY_CYCLES = 1_000_000
"""About half a millisecond: what the host may take to launch a graph."""


def synchronize(device: torch.device) -> None:
    """Wait for everything launched so far."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)


def recorded(step: Step, calls: int, device: torch.device) -> Step:
    """A function that replays `calls` calls of the step from one CUDA graph: GPU time without the host's.

    On a CPU, where the benchmark is only tried out, the calls themselves.
    """
    def plain() -> None:
        for _ in range(calls):
            step()

    if device.type != "cuda":
        return plain
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):  # compiles kernels and makes the allocator's blocks, which a recording cannot
        for _ in range(3):
            step()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plain()
    return graph.replay


def milliseconds(run: Step, device: torch.device) -> float:
    """Of one run, by events on the GPU."""
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1e3
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(BUSY_CYCLES)  # the GPU reaches `begin` after the host has launched the run, not before
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def failure(error: Exception, device: torch.device) -> str:
    """The error in words; raises it again if the device is lost, as after an illegal address."""
    try:
        synchronize(device)
    except Exception:
        raise error from None
    return f"{type(error).__name__}: {error}"[:2000]


def cache_bytes(device: torch.device) -> int:
    """Of the last-level cache; 60 MB where torch does not know."""
    properties = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    return getattr(properties, "L2_cache_size", 0) or 60 << 20


def device_times(runs: Mapping[str, Step], device: torch.device, calls: int, rounds: int) -> dict[str, list[float]]:
    """Milliseconds a call in every round of runs that `recorded` made: GPU time only, rounds interleaved."""
    for run in runs.values():
        run()
    synchronize(device)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(milliseconds(run, device) / calls)
    return times


def host_times(steps: Mapping[str, Step], device: torch.device, rounds: int, calls: int) -> dict[str, list[float]]:
    """Milliseconds that the host takes to launch a call of every step, rounds interleaved; the GPU starts idle."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()
    for _ in range(rounds):
        for name, step in steps.items():
            synchronize(device)
            start = time.perf_counter()
            for _ in range(calls):
                step()
            times[name].append((time.perf_counter() - start) * 1e3 / calls)
    synchronize(device)
    return times


def ceilings(device: torch.device, megabytes: int = 2048, size: int = 8192) -> dict[str, float]:
    """Measured here and now: bytes a second of a copy (read and write), operations a second of a large product."""
    source = torch.rand(megabytes << 18, device=device)
    target = torch.empty_like(source)
    found = {"bytes": _rate(lambda: target.copy_(source), 2 * 4 * source.numel(), device)}
    for name, dtype, tf32 in (
        ("ieee", torch.float32, "ieee"), ("tf32", torch.float32, "tf32"), ("bfloat16", torch.bfloat16, "ieee")
    ):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        with float32_precision(tf32):
            found[name] = _rate(lambda a=a, b=b: a @ b, 2 * size**3, device)
    return found


def _rate(run: Step, amount: int, device: torch.device) -> float:
    run()
    synchronize(device)
    return amount / (statistics.median(milliseconds(run, device) for _ in range(9)) * 1e-3)


class float32_precision:
    """Within the block float32 products and convolutions are exact ("ieee") or TF32's ("tf32").

    By torch's older flags, which the newer ones follow: torch.compile reads the older ones in places, and those raise
    where only the newer were set.
    """

    def __init__(self, precision: str) -> None:
        self.precision = precision

    def __enter__(self) -> None:
        settings: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
        self.before = [setting.fp32_precision == "tf32" for setting in settings]
        self._allow(self.precision == "tf32", self.precision == "tf32")

    def __exit__(self, *error: object) -> None:
        self._allow(*self.before)

    @staticmethod
    def _allow(products: bool, convolutions: bool) -> None:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = products, convolutions

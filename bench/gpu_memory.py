"""The memory-bound operators' share of the copy bandwidth: gates, fold and epilogue, forward and backward.

Each works on tensors far larger than any cache. The bytes are those that the operator has to move at least:

                forward                         backward
    gates       writes g                        reads dg
    fold        reads W, writes W'              reads dW' and W, writes dW
    epilogue    reads u, writes y               reads dy and u, writes du

vectors of one number a channel left out. gates only write in one direction and read in the other, where a copy does
both. GPU time by events behind a kernel that keeps the GPU busy until the host has launched everything.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import mrvae_kernels as mk
from mrvae_kernels import functional

from .gpu_timing import failure, milliseconds, synchronize
from .layer_variants import BACKENDS, absent

GOAL = 0.85
"""The share of the copy bandwidth that each of these is to reach."""
SAMPLES = 1024
"""Values of beta for the gates."""
DTYPES = (torch.float32, torch.bfloat16)


class Job(NamedTuple):
    """Leaves, the operator's results by them, and the bytes that forward and backward move at least."""

    leaves: list[Tensor]
    run: Callable[[], list[Tensor]]
    forward: int
    backward: int


def gates(numel: int, dtype: torch.dtype, device: torch.device) -> Job:
    """Four slices of sigmoid gates for SAMPLES values of beta; float32, whatever the parameters are."""
    size = max(1, numel // SAMPLES // 4)
    weight, bias = (torch.randn(4 * size, device=device).to(dtype).requires_grad_() for _ in range(2))
    eta = torch.randn(SAMPLES, device=device)
    moved = 4 * SAMPLES * 4 * size
    kinds = ["sigmoid"] * 4
    return Job([weight, bias], lambda: functional.gate_bank(weight, bias, eta, [size] * 4, kinds), moved, moved)


def fold(shape: Sequence[int], groups: int, numel: int, dtype: torch.dtype, device: torch.device) -> Job:
    """Sixteen weights of this shape, whose first or (groups: 1) second axis is made as long as it takes."""
    axis = 1 if groups else 0
    sizes = [*shape]
    sizes[axis] = 1
    sizes[axis] = max(1, numel // 16 // torch.Size(sizes).numel())
    weights = [torch.randn(sizes, device=device).to(dtype).requires_grad_() for _ in range(16)]
    factors = [torch.rand(sizes[axis], device=device).requires_grad_() for _ in weights]
    nothing = [None] * 16
    moved = sum(weight.numel() * weight.element_size() for weight in weights)

    def run() -> list[Tensor]:
        return functional.fold(weights, nothing, factors, nothing, [groups] * 16)[0]

    return Job([*weights, *factors], run, 2 * moved, 3 * moved)


def epilogue(shape: Sequence[int], dim: int, numel: int, dtype: torch.dtype, device: torch.device) -> Job:
    """relu(g (u + b)) of a u of this shape whose first axis is made as long as it takes."""
    rows = max(1, numel // torch.Size(shape[1:]).numel())
    u = torch.randn(rows, *shape[1:], device=device, dtype=dtype).requires_grad_()
    bias = torch.randn(shape[dim], device=device).to(dtype).requires_grad_()
    gate = torch.rand(shape[dim], device=device).requires_grad_()
    moved = u.numel() * u.element_size()
    return Job(
        [u, bias, gate], lambda: [functional.epilogue(u, bias, gate, None, dim, "relu")], 2 * moved, 3 * moved
    )


JOBS: dict[str, Callable[[int, torch.dtype, torch.device], Job]] = {
    "gates": gates,
    "fold (C, 1024)": lambda *rest: fold((0, 1024), 0, *rest),
    "fold (C, 256, 3, 3)": lambda *rest: fold((0, 256, 3, 3), 0, *rest),
    "fold transposed (256, C, 3, 3)": lambda *rest: fold((256, 0, 3, 3), 1, *rest),
    "epilogue (N, 1024)": lambda *rest: epilogue((0, 1024), 1, *rest),
    "epilogue (N, 256, 28, 28)": lambda *rest: epilogue((0, 256, 28, 28), 1, *rest),
}


def share_of_bandwidth(
    device: torch.device, bandwidth: float, numel: int, rounds: int = 9
) -> tuple[list[dict[str, Any]], list[str]]:
    """For every operator, dtype and backend that is there the share of `bandwidth`, forward and backward; what failed.

    numel: elements of each operator's largest tensor.
    """
    results, failed = [], []
    there = [backend for backend in BACKENDS if backend not in absent(device)]
    for name, make in JOBS.items():
        for dtype in DTYPES:
            job = make(numel, dtype, device)
            for backend in there:
                row = {"operator": name, "precision": str(dtype).removeprefix("torch."), "backend": backend}
                try:
                    with mk.override(backend=backend):
                        times = _times(job, device, rounds)
                except Exception as error:
                    failed.append(f"{name} {row['precision']} {backend}: {failure(error, device)}")
                    continue
                moved = {"forward": job.forward, "backward": job.backward}
                results.append({**row, **{kind: moved[kind] / (times[kind] * 1e-3) / bandwidth for kind in moved}})
            del job
            if device.type != "cpu":
                torch.get_device_module(device).empty_cache()  # the next one's tensors have other sizes
    return results, failed


def _times(job: Job, device: torch.device, rounds: int) -> dict[str, float]:
    """Median milliseconds of forward and of backward alone."""
    outputs = job.run()
    grads = [torch.randn_like(output) for output in outputs]

    def forward() -> None:
        with torch.no_grad():
            job.run()

    def backward() -> None:
        torch.autograd.grad(outputs, job.leaves, grads, retain_graph=True)

    found = {}
    for name, step in (("forward", forward), ("backward", backward)):
        step()
        synchronize(device)
        found[name] = statistics.median(milliseconds(step, device) for _ in range(rounds))
    return found


def largest_tensor(device: torch.device) -> int:
    """Elements for `share_of_bandwidth`: 2^28, fewer where float32 ones would fill a sixteenth of the GPU's memory.

    Next to nothing on a CPU, where the benchmark is only tried out.
    """
    if device.type != "cuda":
        return 1 << 12
    return int(min(1 << 28, torch.cuda.get_device_properties(device).total_memory >> 6))


def table(results: Sequence[dict[str, Any]]) -> str:
    """Markdown: one row an operator and dtype, each backend's share of the copy bandwidth forward and backward."""
    ran = {result["backend"] for result in results}
    columns = [(b, kind) for b in BACKENDS if b in ran for kind in ("forward", "backward")]
    lines = ["| operator | precision | " + " | ".join(f"{b}, {kind}" for b, kind in columns) + " |"]
    lines.append("|---" * (len(columns) + 2) + "|")
    rows: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for result in results:
        rows.setdefault((result["operator"], result["precision"]), {})[result["backend"]] = result
    for row, shares in rows.items():
        cells = [f"{shares[backend][kind]:.2f}" if backend in shares else "" for backend, kind in columns]
        lines.append(f"| {' | '.join([*row, *cells])} |")
    for backend in sorted(ran):
        mine = [(r[k], f"{r['operator']} {r['precision']} {k}") for r in results if r["backend"] == backend
                for k in ("forward", "backward")]
        reached = sum(share >= GOAL for share, _ in mine)
        least, where = min(mine)
        lines.append(f"\n{backend}: {reached} of {len(mine)} reach {GOAL}; the least is {least:.2f}, {where}")
    return "\n".join(lines)

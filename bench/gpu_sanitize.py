"""compute-sanitizer over every operator of the compiled core on small tensors: `python -m bench.gpu_sanitize`.

memcheck finds accesses outside of allocations, racecheck hazards in shared memory; only kernels whose name has mrvae in
it are looked at. torch's caching allocator is off, since within its blocks an access beyond a tensor's end goes unseen.
Where there is no compute-sanitizer, no GPU or no CUDA core, one line says so and the exit code is 0. It is 1 where a
tool finds something or does not come to an end, and where an operator fails.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import mrvae_kernels as mk
from mrvae_kernels import functional

from .gpu_processes import limited
from .gpu_timing import float32_precision, synchronize
from .layer_variants import absent

TOOLS = {
    "memcheck": r"ERROR SUMMARY: (?P<errors>\d+) error",
    "racecheck": r"RACECHECK SUMMARY: (?P<errors>\d+) hazard",
}
"""The tools, and how each tells at the end what it found."""
FOUND = 99
"""The exit code of a tool that found something."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BETAS: dict[str, tuple[int, ...]] = {"shared": (), "per sample": (5,)}
"""One beta a batch, or one for each of its samples."""
ENVIRONMENT = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}

Call = Callable[[], Sequence[Tensor]]


def operators(device: torch.device, dtypes: Sequence[torch.dtype] = DTYPES) -> Iterator[tuple[str, Call]]:
    """Every operator with one beta and with one a sample, at sizes that no block divides; names and calls."""
    def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, device=device).to(dtype).requires_grad_()

    for dtype in dtypes:
        short = str(dtype).removeprefix("torch.")
        for name, samples in BETAS.items():
            vectors, eta = [draw(41, dtype=dtype) for _ in range(2)], draw(*samples)
            kinds = ["sigmoid", "sqrt", "softplus", "identity"]
            yield f"gates {name} {short}", _bound(functional.gate_bank, *vectors, eta, [17, 1, 20, 3], kinds)
            for layout, shape, dim in (("channels first", (5, 19, 6, 7), 1), ("channels last", (5, 13, 19), -1)):
                tensors = draw(*shape, dtype=dtype), draw(19, dtype=dtype), draw(*samples, 19), draw(*samples, 19)
                yield f"epilogue {layout} {name} {short}", _bound(functional.epilogue, *tensors, dim, "gelu")
        weights = [draw(*shape, dtype=dtype) for shape in ((7, 33), (6, 5, 3, 3), (6, 5, 3, 3), (37,))]
        sizes = [7, 6, 10, 37]
        columns = [[draw(size, dtype=kind) for size in sizes] for kind in (dtype, torch.float32, torch.float32)]
        yield f"fold {short}", _bound(functional.fold, weights, *columns, [0, 0, 2, 0])
        for precision in ("ieee", "tf32") if dtype == torch.float32 else ("ieee",):
            for strategy, name in itertools.product(mk.strategy.STRATEGIES, BETAS):
                if strategy == "fold" and BETAS[name]:
                    continue
                for kind, run in _layers(draw, dtype, BETAS[name], strategy):
                    yield f"{strategy} {kind} {name} {short} {precision}", _precise(run, precision)
    yield "a network's step", _network(device)


def _layers(
    draw: Callable[..., Tensor], dtype: torch.dtype, samples: tuple[int, ...], strategy: str
) -> Iterator[tuple[str, Call]]:
    bias, gate, shift = draw(21, dtype=dtype), draw(*samples, 21), draw(*samples, 21)
    vectors = (bias, gate, shift)
    x, weight = draw(5, 3, 35, dtype=dtype), draw(21, 35, dtype=dtype)
    yield "linear", _bound(mk.gated_linear, x, weight, *vectors, "silu", strategy=strategy)
    image, weight = draw(5, 18, 9, 7, dtype=dtype), draw(21, 18, 3, 3, dtype=dtype)
    yield "conv2d", _bound(mk.gated_conv2d, image, weight, *vectors, 2, 1, 1, 1, "relu", strategy=strategy)
    weight = draw(18, 21, 3, 3, dtype=dtype)
    yield "conv_transpose2d", _bound(
        mk.gated_conv_transpose2d, image, weight, *vectors, 2, 1, 1, 1, 1, "none", strategy=strategy
    )


def _network(device: torch.device) -> Call:
    """The gates and folds of a whole network, which the core does in one node."""
    plain = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.SiLU(), nn.ConvTranspose2d(16, 3, 3, 2, 1, 1))
    model, x = mk.multirate(plain.to(device), gates="sigmoid"), torch.rand(5, 3, 8, 8, device=device)

    def run() -> list[Tensor]:
        model(x, beta=0.5)  # makes the plan that the next one follows
        return [model(x, beta=0.5)]

    return run


def _bound(function: Callable[..., Any], *arguments: Any, **named: Any) -> Call:
    def run() -> list[Tensor]:
        results = function(*arguments, **named)
        return [value for value in _flat(results) if value.requires_grad]

    return run


def _flat(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _flat(part)


def _precise(run: Call, precision: str) -> Call:
    def within() -> Sequence[Tensor]:
        with float32_precision(precision):
            return run()

    return within


def run_operators(device: torch.device, backend: str = "cpp", dtypes: Sequence[torch.dtype] = DTYPES) -> int:
    """Each of them forward and backward on this backend; how many. ValueError for one whose result is not finite."""
    torch.manual_seed(0)
    count = 0
    with mk.override(backend=backend):
        for name, run in operators(device, dtypes):
            print(name, flush=True)  # the last one named is the one that a tool speaks of, or that hangs
            outputs = run()
            torch.autograd.backward(outputs, [torch.ones_like(value) for value in outputs])
            synchronize(device)
            if not all(bool(value.isfinite().all()) for value in outputs):
                raise ValueError(f"{name}: the result is not finite")
            count += 1
    return count


def find() -> str | None:
    """compute-sanitizer of PATH, or of the toolkit's usual place."""
    folders = [os.environ.get("PATH", ""), *(
        os.path.join(home, "bin") for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home
    )]
    return shutil.which("compute-sanitizer", path=os.pathsep.join(folders))


def check(tool: str, program: str, seconds: float) -> str | None:
    """Run the operators under one tool and print what it says; None, or what is wrong."""
    command = [
        program, "--tool", tool, "--error-exitcode", str(FOUND), "--kernel-name", "kns=mrvae", sys.executable, "-m",
        "bench.gpu_sanitize", "--operators",
    ]
    code, said = limited(command, seconds, ENVIRONMENT)
    print(said[-8000:])
    if code is None:
        return f"not finished after {seconds:.0f} s"
    summary = re.search(TOOLS[tool], said)
    if summary and int(summary["errors"]):
        return f"{summary['errors']} found"
    if code:
        return f"ended with exit code {code}"
    return None if summary else "ended without its summary"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_sanitize", description=__doc__)
    parser.add_argument("--operators", action="store_true", help="only run the operators, as a tool's program")
    parser.add_argument("--seconds", type=float, default=60, help="for each tool (default 60)")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("bench.gpu_sanitize: left out, torch finds no GPU")
        return 0
    device = torch.device("cuda", torch.cuda.current_device())
    if reason := absent(device).get("cpp"):
        print(f"bench.gpu_sanitize: left out, there is no CUDA core: {reason}")
        return 0
    if options.operators:
        print(f"{run_operators(device)} operators ran")
        return 0
    program = find()
    if program is None:
        print("bench.gpu_sanitize: left out, compute-sanitizer is neither in PATH nor in /usr/local/cuda/bin")
        return 0
    wrong = {tool: check(tool, program, options.seconds) for tool in TOOLS}
    print("bench.gpu_sanitize:", ", ".join(f"{tool}: {why or 'clean'}" for tool, why in wrong.items()))
    return 1 if any(wrong.values()) else 0


if __name__ == "__main__":
    sys.exit(main())

"""Block sizes of the matrix-product kernels: one small table, by architecture, kind of product, precision and shape.

The sizes follow from what the hardware wants (tensor-core instruction shapes, shared memory, registers) and from the
compiler's resource reports (`python -m bench.ahead_of_time`: nothing spills), not from timings: no GPU has been timed
yet. What timings say belongs into bench/results first, then here. `autotune` (tuning.py) times the candidates of a
shape on the user's own GPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch

from . import tuning
from .device import architecture, processors


class Tiles(NamedTuple):
    """A kernel's configuration: the tile computed by a program is m x n, its reduction advances by k."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


OPERATIONS = (
    "linear", "linear_input_gradient", "linear_weight_gradient", "convolution", "convolution_weight_gradient",
)
PRECISIONS = ("ieee", "tf32", "half")
"""float32 by exact products, float32 by TF32's, float16 and bfloat16."""

TABLE: dict[tuple[str, str], tuple[Tiles, ...]] = {
    # Exact float32 has no tensor cores: each thread owns m n / (32 warps) chains of multiply-adds, so registers bound
    # the tile, and a short k keeps the unrolled operands few.
    ("any", "ieee"): (
        Tiles(32, 32, 32, 4, 3), Tiles(64, 32, 16, 4, 3), Tiles(64, 64, 16, 4, 3), Tiles(128, 64, 16, 8, 3),
    ),
    ("any", "tf32"): (
        Tiles(32, 32, 32, 4, 4), Tiles(128, 32, 32, 4, 3), Tiles(64, 64, 32, 4, 3), Tiles(128, 64, 32, 8, 3),
        Tiles(128, 128, 32, 8, 3),
    ),
    # At most 99 KB of shared memory, so that sm_86 and sm_89 take the same tiles as sm_80.
    ("any", "half"): (
        Tiles(32, 32, 64, 4, 4), Tiles(128, 32, 32, 4, 4), Tiles(64, 64, 64, 4, 4), Tiles(128, 64, 32, 4, 4),
        Tiles(128, 128, 32, 8, 4),
    ),
    # wgmma multiplies 64 rows a group of four warps, its operands in shared memory, of which there are 227 KB. Tiles of
    # 128 x 256 would feed it better, but 128 sums a thread leave no registers to the epilogue.
    ("sm_90", "half"): (
        Tiles(32, 32, 64, 4, 4), Tiles(128, 32, 64, 4, 4), Tiles(64, 64, 64, 4, 4), Tiles(128, 64, 64, 4, 4),
        Tiles(128, 128, 64, 8, 4),
    ),
    # The fifth-generation tensor cores keep sums in memory of their own, but the epilogue takes them all at once, with
    # each column's bias, gate and shift: more than 32 results a thread spill.
    ("sm_100", "half"): (
        Tiles(32, 32, 64, 4, 4), Tiles(128, 32, 64, 4, 4), Tiles(64, 64, 64, 4, 4), Tiles(128, 64, 64, 8, 4),
    ),
    ("sm_100", "tf32"): (
        Tiles(32, 32, 32, 4, 4), Tiles(128, 32, 32, 4, 3), Tiles(64, 64, 32, 4, 3), Tiles(128, 64, 32, 8, 3),
    ),
    # A warp has 64 lanes; 64 KB of shared memory hold one block of operands while registers take the next.
    ("gfx9", "half"): (
        Tiles(32, 32, 64, 4, 2), Tiles(128, 32, 32, 4, 2), Tiles(64, 64, 64, 4, 2), Tiles(128, 64, 32, 4, 2),
        Tiles(128, 128, 32, 8, 2),
    ),
    ("gfx9", "any"): (
        Tiles(32, 32, 32, 4, 2), Tiles(64, 32, 16, 4, 2), Tiles(64, 64, 16, 4, 2), Tiles(128, 64, 16, 4, 2),
    ),
    # Intel's GPUs, and others' older and smaller ones, on some of which Triton has no tensor cores for any precision.
    ("other", "any"): (
        Tiles(32, 32, 16, 4, 2), Tiles(64, 32, 16, 4, 2), Tiles(64, 64, 16, 4, 2), Tiles(128, 64, 16, 8, 2),
    ),
    # Small, so that small tensors make several tiles and a remainder.
    ("interpreter", "any"): (Tiles(32, 32, 16, 4, 1),),
}
"""Tiles from small to large by (family, precision); "any" where a family has none of its own."""

WEIGHT_GRADIENT_RESULTS = 64 * 64
"""Largest m n of a weight gradient's tile: a few results, long sums, split among processors."""


def family(architecture: str) -> str:
    """The family in TABLE of "sm_90", "gfx942", "xpu", "interpreter", ..."""
    if architecture == "interpreter":
        return architecture
    if architecture.startswith("gfx9"):
        return "gfx9"
    # consumer Blackwell, sm_12x, has sm_89's shared memory, and neither wgmma nor tensor memory
    return {"8": "sm_80", "12": "sm_80", "9": "sm_90", "10": "sm_100"}.get(architecture[len("sm_") : -1], "other")


@functools.cache
def used(operation: str, architecture: str, precision: str) -> tuple[Tiles, ...]:
    """All that `choose` can return, from small to large. ValueError for an unknown operation or precision."""
    if operation not in OPERATIONS:
        raise ValueError(f"operation is {operation!r}; expected one of {', '.join(OPERATIONS)}")
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}; expected one of {', '.join(PRECISIONS)}")
    name = family(architecture)
    keys = ((name, precision), (name, "any"), ("any", precision))
    row = next(TABLE[key] for key in keys if key in TABLE)
    if operation.endswith("weight_gradient"):
        return tuple(tiles for tiles in row if tiles.m * tiles.n <= WEIGHT_GRADIENT_RESULTS)
    return row


def precision_class(dtype: torch.dtype, input_precision: str) -> str:
    """One of PRECISIONS."""
    return "half" if dtype in (torch.float16, torch.bfloat16) else input_precision


def candidates(operation: str, architecture: str, precision: str, m: int, n: int, processors: int) -> list[Tiles]:
    """The table's choice for an m x n result, then, for the autotuner, the others not mostly outside of the result.

    The choice is the largest of these that gives each processor a program, else the smallest: large tiles read their
    operands less often. A weight gradient splits its sums, so that any tile occupies all processors.
    """
    smallest, *rest = used(operation, architecture, precision)
    m, n = max(m, smallest.m), max(n, smallest.n)
    fitting = [smallest, *(tiles for tiles in rest if tiles.m < 2 * m and tiles.n < 2 * n)]
    least = 1 if operation.endswith("weight_gradient") else processors
    busy = [tiles for tiles in fitting if -(-m // tiles.m) * -(-n // tiles.n) >= least]
    choice = busy[-1] if busy else smallest
    return [choice, *(tiles for tiles in fitting if tiles != choice)]


def every(architecture: str) -> list[tuple[str, str, Tiles]]:
    """(operation, precision, tiles) for all that `choose` can return on this architecture: what must compile."""
    precisions = PRECISIONS if architecture.startswith("sm_") else ("ieee", "half")
    return [
        (operation, precision, tiles)
        for operation in OPERATIONS for precision in precisions for tiles in used(operation, architecture, precision)
    ]


def choose(
    operation: str, device: torch.device, precision: str, m: int, n: int, k: int,
    launch: Callable[[Tiles], object] | None = None,
) -> Tiles:
    """The tiles for a product of m x n results, each a sum of k terms.

    launch(tiles) runs the kernel once with the given tiles, for the autotuner, where the user asked for it: it must
    give the same results however often it is called and whichever tiles it gets, but for the order of sums; it must
    not read what it wrote.
    """
    key = (operation, device, precision, m, n, k)
    known: Tiles | None = tuning.decided.get(key)
    if known is not None:
        return known
    name = architecture(device)
    return tuning.decide(key, name, candidates(operation, name, precision, m, n, processors(device)), launch)

"""Timing of block sizes, only where it is asked for: `with autotune(): ...`, and the file that remembers the results.

A result is kept by device, architecture, Triton's version, operation, precision and shape, in memory and in
`cache_file()`, and is used from then on, inside and outside of `autotune`, by this and by later processes; delete the
file to forget. The file holds numbers only, and a number counts only if it is one of the candidates of today's table:
nothing read from it can run code, or launch what the table would not.

Other block sizes add in another order: a tuned kernel's results may differ in their last bits from those of the table's
choice. Under torch.distributed each process tunes on its own, and equal GPUs may come to different choices; tune in one
process first and let the others read its file, where that matters.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import threading
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import triton

from .cache import cache_folder, locked, write_json
from .device import capturing

FORMAT = 1
ROUNDS = 9
BUSY_BYTES = 256 << 20
DECIDED_AT_MOST = 4096

SIZES = frozenset(2**i for i in range(4, 10))
WARPS = frozenset((1, 2, 4, 8, 16))
STAGES = frozenset(range(1, 9))

Chosen = TypeVar("Chosen", bound=tuple[int, ...])
Timer = Callable[[Callable[[], object]], float]
"""Runs the call once and returns the seconds that it took."""

decided: dict[Hashable, Any] = {}
"""What was decided in this process, by `choose`'s arguments; read before anything else, at each launch."""

_timers: list[Timer | None] = []
_results: dict[str, tuple[int, ...]] | None = None
_lock = threading.RLock()


@contextlib.contextmanager
def autotune(timer: Timer | None = None) -> Iterator[None]:
    """Within the block each matrix kernel that meets a new shape times its candidates first, and keeps the fastest.

    Some seconds for each new shape, since candidates are compiled; run a training step or two in it, then leave it.
    Not while a CUDA graph is being recorded, where the table decides. The whole process tunes, not only the calling
    thread: autograd runs backward in threads of its own.

    timer: measures instead of the device's events.
    """
    _timers.append(timer)
    decided.clear()
    try:
        yield
    finally:
        _timers.remove(timer)


def forget() -> None:
    """Forget what this process knows; the file is read again at the next choice."""
    global _results
    with _lock:
        decided.clear()
        _results = None


def decide(
    key: tuple[str, torch.device, str, int, int, int], architecture: str, candidates: Sequence[Chosen],
    launch: Callable[[Chosen], object] | None,
) -> Chosen:
    """The remembered one of the candidates; else, inside `autotune`, the fastest; else the first."""
    operation, device, *rest = key
    name = " ".join(map(str, (_device_name(device), architecture, triton.__version__, operation, *rest)))
    with _lock:
        remembered = _remembered().get(name)
        chosen = next((candidate for candidate in candidates if candidate == remembered), None)
        if chosen is None and _timers:
            if launch is None or not _can_time(device):
                return candidates[0]  # and decide anew next time
            chosen = _fastest(candidates, launch, device)
            _remember(name, tuple(chosen))
        if len(decided) >= DECIDED_AT_MOST:
            decided.clear()
        decided[key] = chosen = candidates[0] if chosen is None else chosen
        return chosen


# ---- timing ---------------------------------------------------------------------------------------------------------


def _device_name(device: torch.device) -> str:
    return "cpu" if device.type == "cpu" else str(torch.get_device_module(device).get_device_name(device))


def _can_time(device: torch.device) -> bool:
    """Not while a graph is recorded or traced, nor on CPU tensors, whose interpreter's time says nothing."""
    if torch.compiler.is_compiling() or capturing(device):
        return False
    return _timers[-1] is not None or device.type != "cpu"


def _fastest(candidates: Sequence[Chosen], launch: Callable[[Chosen], object], device: torch.device) -> Chosen:
    """The candidate with the smallest median; one that does not compile or fit is left out.

    If none is left, the error of the first.
    """
    if len(candidates) == 1:
        return candidates[0]
    timer = _timers[-1] or event_timer(device)
    seconds: dict[Chosen, list[float]] = {}
    errors: list[Exception] = []
    for candidate in candidates:
        try:
            timer(lambda candidate=candidate: launch(candidate))  # type: ignore[misc]  # compiles, and warms up
        except Exception as error:
            if isinstance(error, torch.AcceleratorError):
                raise  # the device is lost to this process: not a matter of sizes
            errors.append(error)
        else:
            seconds[candidate] = []
    if not seconds:
        raise errors[0]
    for _ in range(ROUNDS):  # in turns, so that the clock's drift hits all alike
        for candidate, times in seconds.items():
            times.append(timer(lambda candidate=candidate: launch(candidate)))  # type: ignore[misc]
    return min(seconds, key=lambda candidate: statistics.median(seconds[candidate]))


def event_timer(device: torch.device) -> Timer:
    """A timer by events on the device's current stream."""
    module = torch.get_device_module(device)
    try:
        busy = torch.empty(BUSY_BYTES, dtype=torch.int8, device=device)
    except torch.OutOfMemoryError:
        busy = torch.empty(0, dtype=torch.int8, device=device)

    def seconds(call: Callable[[], object]) -> float:
        with module.device(device):
            start, end = module.Event(enable_timing=True), module.Event(enable_timing=True)
            busy.zero_()  # empties the cache, and keeps the device busy until the launches below are queued
            start.record()
            call()
            end.record()
            end.synchronize()
            return float(start.elapsed_time(end)) / 1e3

    return seconds


# ---- the file -------------------------------------------------------------------------------------------------------


def cache_file() -> Path | None:
    """triton-tiles.json in the user's cache folder; None without a home."""
    folder = cache_folder()
    return None if folder is None else folder / "triton-tiles.json"


def _valid(value: object) -> bool:
    return (
        isinstance(value, list) and len(value) == 5 and all(type(number) is int for number in value)
        and SIZES.issuperset(value[:3]) and value[3] in WARPS and value[4] in STAGES
    )


def _read(path: Path, warn: bool = True) -> dict[str, tuple[int, ...]]:
    """The file's results; a file that is not as this version writes it is named in a warning, and counts as empty."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT}")
        results = document.get("results")
        if not isinstance(results, dict) or not all(map(_valid, results.values())):
            raise ValueError("its results are not block sizes")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        if warn:
            message = f"tuned block sizes in {path} are ignored, and replaced when there are new ones: {error}"
            warnings.warn(message, RuntimeWarning, stacklevel=2)
        return {}
    return {name: tuple(value) for name, value in results.items()}


def _remembered() -> dict[str, tuple[int, ...]]:
    global _results
    if _results is None:
        path = cache_file()
        _results = {} if path is None else _read(path)
    return _results


def _remember(name: str, chosen: tuple[int, ...]) -> None:
    """Into memory and the file, beside what other processes wrote there meanwhile."""
    results = _remembered()
    results[name] = chosen
    path = cache_file()
    if path is None:
        return
    try:
        with locked(path):
            results.update({**_read(path, warn=False), name: chosen})
            write_json(path, {"format": FORMAT, "results": {key: list(results[key]) for key in sorted(results)}})
    except OSError as error:
        warnings.warn(f"tuned block sizes are not written to {path}: {error}", RuntimeWarning, stacklevel=2)

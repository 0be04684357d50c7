"""Options of `pytest bench/`: which layers, in which numbers, where."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import mrvae_kernels as mk

from .layer_checks import CheckedCase, dtypes
from .layer_variants import EVERY
from .layers import DIRECTIONS, chosen, device_named
from .timing import keep_memory


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("layers", "the layer benchmark")
    group.addoption("--all-shapes", action="store_true",
                    help="every layer of bench/shapes.py, and torch.compile for each (default: a small, a middle and a "
                    "large one a kind, torch.compile for the middle ones in float32)")
    group.addoption("--device", default="cpu", help="where the layers run, such as cuda (default cpu)")
    group.addoption("--batch", type=int, default=16, help="examples a step (default 16)")


def pytest_configure(config: pytest.Config) -> None:
    if not 0 < config.getoption("--batch"):
        raise pytest.UsageError(f"--batch is {config.getoption('--batch')}; expected a positive number")
    try:
        config._layer_device = device_named(config.getoption("--device"))  # type: ignore[attr-defined]
    except ValueError as error:
        raise pytest.UsageError(f"--device: {error}") from None
    keep_memory()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test a layer, numbers, direction and variant, those of one group one after another."""
    if "variant" not in metafunc.fixturenames:
        return
    config = metafunc.config
    numbers = dtypes(config._layer_device)  # type: ignore[attr-defined]
    rows = [
        (job, direction, name)
        for job in chosen(numbers, config.getoption("--all-shapes")) for direction in DIRECTIONS for name in EVERY
    ]
    ids = [f"{job.case.name}, {job.dtype}, {direction}, {name}" for job, direction, name in rows]
    metafunc.parametrize(("job", "direction", "variant"), rows, ids=ids)


@pytest.fixture
def checked(request: pytest.FixtureRequest) -> Iterator[CheckedCase]:
    """The test's layer, made once for all of its tests, with the numbers' precision in force."""
    config, job = request.config, request.getfixturevalue("job")
    kept = getattr(config, "_layer", (None, None))
    if kept[0] != job:
        config._layer = kept = (job, job.layer(config.getoption("--batch"), config._layer_device))
    with kept[1].precision(), mk.override():
        yield kept[1]
    if torch.cuda.is_available():
        torch.cuda.synchronize()

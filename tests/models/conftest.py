"""What the tests of the models share."""

from __future__ import annotations

import numpy as np
import pytest
from test_data_files import hub
from training_cases import small


@pytest.fixture
def root(tmp_path, monkeypatch):
    """The folder of public sets, empty, and nothing to be fetched."""
    monkeypatch.setenv("MRVAE_DATA", str(tmp_path))
    hub(monkeypatch, ConnectionError("no route to host"))
    return tmp_path


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Blurred bars: 81 training, 9 validation and 12 test images of 6x6, with something to learn."""
    path = tmp_path_factory.mktemp("data") / "bars.npz"
    generator = np.random.default_rng(0)
    rows = generator.integers(0, 6, (102, 1, 1))
    bars = np.exp(-((np.arange(6)[None, :, None] - rows) ** 2) / 2) * np.ones((1, 1, 6))
    bars = (255 * bars * generator.uniform(0.8, 1, bars.shape)).astype(np.uint8)
    np.savez(path, train_images=bars[:90], test_images=bars[90:])
    return path


@pytest.fixture
def config(images, tmp_path):
    return small(
        images, tmp_path, epochs=2, batch_size=16, validate_every=1, validation_betas=3, margin=(1.0, 1.0),
        weight_power=0.0,
    )

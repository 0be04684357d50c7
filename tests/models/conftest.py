"""What the tests of the models share."""

from __future__ import annotations

import pytest
from test_data_files import hub


@pytest.fixture
def root(tmp_path, monkeypatch):
    """The folder of public sets, empty, and nothing to be fetched."""
    monkeypatch.setenv("MRVAE_DATA", str(tmp_path))
    hub(monkeypatch, ConnectionError("no route to host"))
    return tmp_path

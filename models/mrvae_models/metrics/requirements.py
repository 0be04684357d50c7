"""Packages that some metrics need and others do not."""

from __future__ import annotations

import importlib.util

NEEDED = {"sklearn": ("scikit-learn", "metrics"), "torch_fidelity": ("torch-fidelity", "fid")}
"""Module -> the package that has it, and the extra of mrvae-kernels that brings it."""


def need(module: str, wanted_by: str, instead: str = "") -> None:
    """ModuleNotFoundError that says what to install where the module is absent; to call before any work is done."""
    if importlib.util.find_spec(module) is None:
        package, extra = NEEDED[module]
        raise ModuleNotFoundError(
            f"{wanted_by} needs the package {package}: pip install 'mrvae-kernels[{extra}]'{instead}"
        )

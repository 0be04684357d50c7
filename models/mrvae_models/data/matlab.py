"""MATLAB's .mat files, version 5, through SciPy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .checks import DataError


def read_mat(path: Path, needed: Sequence[str], optional: Sequence[str] = ()) -> dict[str, np.ndarray]:
    """The arrays of these names, `optional` ones where they are there. DataError for a file without one of `needed`."""
    try:
        from scipy.io import loadmat, whosmat
    except ImportError:
        raise DataError(f"{path}: .mat files need the package scipy: run `pip install scipy`") from None
    try:
        names = [name for name, _, _ in whosmat(path)]
        content = loadmat(path, variable_names=[*needed, *optional])
    except Exception as error:  # SciPy's reader raises whatever the damage leads to
        raise DataError(
            f"{path}: cannot be read, damaged or cut short ({type(error).__name__}: {error}); expected a MATLAB file "
            "of version 5: download it again"
        ) from error
    missing = [name for name in needed if name not in content]
    if missing:
        raise DataError(f"{path}: holds {', '.join(names) or 'nothing'}; expected {', '.join(needed)}")
    return {name: content[name] for name in (*needed, *optional) if name in content}

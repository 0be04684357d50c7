"""Static binarised MNIST as Larochelle and Murray (2011) distribute it: text, 784 times 0 or 1 a line."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np

from .checks import DataError, Raw
from .splits import Sets

FILES = {
    "train": "binarized_mnist_train.amat",
    "validation": "binarized_mnist_valid.amat",
    "test": "binarized_mnist_test.amat",
}
PIXELS = 28 * 28


def found(path: Path) -> bool:
    return path.suffix == ".amat" if path.is_file() else any((path / name).is_file() for name in FILES.values())


def sets(path: Path) -> Sets:
    """The three files of a folder, or one file as one undivided set."""
    if path.is_file():
        return {"all": partial(_raw, path)}
    missing = [name for name in FILES.values() if not (path / name).is_file()]
    if missing:
        raise DataError(f"{path}: {', '.join(missing)} not there; expected {', '.join(FILES.values())}")
    return {split: partial(_raw, path / name) for split, name in FILES.items()}


def _raw(path: Path) -> Raw:
    return Raw(read_amat(path), None, str(path))


def read_amat(path: Path) -> np.ndarray:
    """(N, 28, 28) uint8 of 0 and 1. DataError, naming the line, for anything else in the file."""
    try:
        text = np.frombuffer(path.read_bytes(), np.uint8)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error})") from error
    digit = (text == ord("0")) | (text == ord("1"))
    newline = text == ord("\n")
    other = ~(digit | newline | np.isin(text, np.frombuffer(b" \t\r", np.uint8)))
    other[1:] |= digit[1:] & digit[:-1]  # "10" is neither
    if other.any():
        where = int(other.argmax())
        line = int(newline[:where].sum()) + 1
        raise DataError(
            f"{path}: line {line} holds {bytes(text[max(0, where - 5) : where + 5])!r}; expected 0 and 1 with spaces "
            "between: is this the binarised file?"
        )
    ends = np.append(np.flatnonzero(newline), len(text) - 1 if len(text) else 0)
    counts = np.diff(np.cumsum(digit)[ends], prepend=0) if len(text) else np.zeros(1, int)
    wrong = np.flatnonzero((counts != PIXELS) & (counts != 0))
    if len(wrong) or not counts.any():
        line = int(wrong[0]) if len(wrong) else 0
        raise DataError(
            f"{path}: line {line + 1} holds {counts[line]} values; expected {PIXELS}: damaged or cut short; download "
            "it again"
        )
    return (text[digit] - ord("0")).reshape(-1, 28, 28)

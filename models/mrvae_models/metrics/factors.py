"""What is known of how a set's images were generated: the factors that metrics of disentanglement hold codes to."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Factors(NamedTuple):
    """F factors of N examples, each of at least two values."""

    classes: Tensor  # (N, F) int64, values from 0 to size - 1
    names: tuple[str, ...]
    sizes: tuple[int, ...]


def factors_of(dataset: Any, leave_out: tuple[str, ...] = (), wanted_by: str = "this metric") -> Factors:
    """The factors of a set, less those named and those of one value, which say nothing.

    dataset.factors: (N, F) whole numbers; dataset.factor_names: F names, or none ("0", "1", ...).
    ValueError for a set without factors, for values below 0, and where no factor is left.
    """
    classes = getattr(dataset, "factors", None)
    if classes is None:
        raise ValueError(
            f"{wanted_by} needs a set whose factors are known, dataset.factors of shape (N, F), such as dSprites; this "
            f"{type(dataset).__name__} has none"
        )
    classes = torch.as_tensor(classes)
    n = len(dataset.examples)
    if classes.dim() != 2 or len(classes) != n or classes.is_floating_point() or (n and int(classes.min()) < 0):
        raise ValueError(
            f"factors have shape {tuple(classes.shape)} and dtype {classes.dtype}; expected whole numbers from 0, of "
            f"shape ({n}, F)"
        )
    names = tuple(getattr(dataset, "factor_names", ()) or map(str, range(classes.shape[1])))
    kept, sizes, columns = [], [], []
    for column, name in enumerate(names):
        values, numbered = classes[:, column].unique(return_inverse=True)  # a subset may lack some
        if name not in leave_out and len(values) > 1:
            kept.append(name)
            sizes.append(len(values))
            columns.append(numbered)
    if not kept:
        raise ValueError(
            f"{wanted_by} has no factor of two values or more, of {', '.join(names)}"
            + (f" without {', '.join(leave_out)}" if leave_out else "")
        )
    return Factors(torch.stack(columns, 1), tuple(kept), tuple(sizes))

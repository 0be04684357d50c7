"""What folding and the epilogue add to a plain layer's training step, predicted from the layer's size.

    fold      extra = layer + weight W         W elements of the weight; forward and backward
    epilogue  extra = layer + output Y         Y elements of the output

Each kind of product ("linear", "convolution") has coefficients of its own for fold and for epilogue, in whole
picoseconds, so that torch.compile's symbolic sizes stay integers. They were fitted to measurements of the compiled core
on a CPU (`python -m bench.fit_cost_model`, which anyone can run again) and lie in mrvae_kernels/measured/; a fit of
the user's own, in `cache_folder()`, wins over them while torch's major.minor is the one it was made with.

Numbers are "float32" and "bfloat16", each measured: halving the bytes does not halve the time, since both strategies
compute in float32 and pay for the conversions, and since bfloat16 was measured as networks are trained in it, under
autocast with float32 weights, where folding still moves four bytes an element. float64 was not measured: its elements
count twice float32's.

Where there is no measurement (GPUs that nothing was measured on, plain PyTorch) `BYTES_MOVED` decides, a rule of thumb,
and `TRACED` under torch.compile, which fuses either into its neighbours.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import measurements
from .triton_kernels.cache import cache_folder, locked, write_json

KINDS = ("linear", "convolution")
NUMBERS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FILE = "cost_model.json"
HOW_TO_FIT = "python -m bench.fit_cost_model --install user"
LARGEST = 10**15
"""Picoseconds: a coefficient of a quarter of an hour is none."""


class Extra(NamedTuple):
    """One strategy's coefficients: of the layer, of an element of its weight, of an element of its output."""

    layer: int
    weight: int
    output: int

    def at(self, weights: int, outputs: int) -> int:
        """What the strategy adds, in the coefficients' unit."""
        return self.layer + self.weight * weights + self.output * outputs


class CostModel(NamedTuple):
    """Both strategies' coefficients, and where they were fitted; "" for coefficients that count elements moved."""

    fold: Extra
    epilogue: Extra
    fitted_on: str

    def cheaper(self, weights: int, outputs: int) -> str:
        """"fold" or "epilogue"; a tie folds."""
        return "epilogue" if self.epilogue.at(weights, outputs) < self.fold.at(weights, outputs) else "fold"

    def told(self, weights: int, outputs: int) -> str:
        """Both predictions in words."""
        fold, epilogue = self.fold.at(weights, outputs), self.epilogue.at(weights, outputs)
        if not self.fitted_on:
            return f"fold moves {fold:,} elements, epilogue {epilogue:,}"
        times = f"fold adds {fold / 1e6:,.1f} us a step, epilogue {epilogue / 1e6:,.1f} us"
        return f"{times}, by the cost model fitted on {self.fitted_on}"


BYTES_MOVED = CostModel(Extra(0, 5, 0), Extra(0, 0, 4), "")
"""The prior: fold reads and writes the weight in forward, reads two of its size and writes one in backward; the
epilogue moves the output about four times more than the plain layer, whose bias gradient reads it once anyway."""

TRACED = CostModel(Extra(30_000, 5, 0), Extra(0, 0, 3), "")
"""What torch.compile's layers follow. There an epilogue takes the place of a kernel that the plain layer has too, a
ReLU's or the bias gradient's, while a fold is a kernel more in each pass; so an epilogue at most sizes."""

Models = dict[tuple[str, torch.dtype], CostModel]


def fitted(kind: str, dtype: torch.dtype) -> CostModel:
    """The model of a product of this kind by the compiled core on the CPU; BYTES_MOVED where none was fitted."""
    return _fitted.get((kind, dtype), BYTES_MOVED)


def read(path: Path, any_version: bool = False) -> Models:
    """The file's models. Empty for a file that is not there, for one made with another torch unless any_version, and,
    with a warning, for one that holds no cost model."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        found: Models = {}
        for kind in KINDS:
            for numbers, dtype in NUMBERS.items():
                if (entry := content["picoseconds"].get(f"{kind} {numbers}")) is not None:
                    where = str(content["fitted_on"]) or "a CPU"
                    found[kind, dtype] = CostModel(_extra(entry["fold"]), _extra(entry["epilogue"]), where)
        made_with = str(content["torch"])
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
        message = f"{path} holds no cost model and is ignored; delete it, or fit anew: {HOW_TO_FIT}"
        warnings.warn(f"{message} ({type(error).__name__}: {error})", stacklevel=2)
        return {}
    return found if any_version or _minor(made_with) == _minor(torch.__version__) else {}


def _extra(values: Any) -> Extra:
    if not all(type(value) is int and 0 <= value <= LARGEST for value in values):
        raise ValueError(f"coefficients are {values}; expected three whole picoseconds from 0 to {LARGEST}")
    return Extra(*values)


def _minor(version: str) -> list[str]:
    return str(version).split(".")[:2]


def write(path: Path, models: Mapping[tuple[str, torch.dtype], CostModel]) -> None:
    """Put the models in the file, whole or not at all, in place of what it held; this process follows them from now on.

    OSError where the folder is not writable.
    """
    numbers = {dtype: name for name, dtype in NUMBERS.items()}
    entries = {
        f"{kind} {numbers[dtype]}": {"fold": list(model.fold), "epilogue": list(model.epilogue)}
        for (kind, dtype), model in models.items()
    }
    (where,) = {model.fitted_on for model in models.values()}
    with locked(path):
        write_json(path, {"fitted_on": where, "torch": str(torch.__version__), "picoseconds": entries}, indent=1)
    load()
    measurements.generation += 1


def user_file() -> Path | None:
    """Where the user's own fit lies; None without a home."""
    folder = cache_folder()
    return None if folder is None else folder / FILE


def load() -> None:
    """Read the package's fit, which serves any torch for want of a better one, and the user's over it."""
    found = read(measurements.SHIPPED / FILE, any_version=True)
    if (path := user_file()) is not None:
        found.update(read(path))
    for kind in KINDS:
        if model := found.get((kind, torch.float32)):
            found[kind, torch.float64] = model._replace(fold=_twice(model.fold), epilogue=_twice(model.epilogue))
    _fitted.clear()
    _fitted.update(found)


def _twice(extra: Extra) -> Extra:
    return Extra(extra.layer, 2 * extra.weight, 2 * extra.output)


_fitted: Models = {}
load()

"""What raw arrays must be, and their way to float32 in [0, 1], shape (N, C, H, W)."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .errors import DataError
from .memory import check_memory
from .storage import Compact, pack

__all__ = ["DataError", "Factors", "Raw", "checked"]

CHANNELS = (1, 2, 3, 4)

COMPACT_ABOVE = 2**30
"""Bytes as float32 above which a split of 8-bit or binary images stays packed (storage.Compact)."""


class Factors(NamedTuple):
    """What generated each image: N images, F factors."""

    classes: np.ndarray  # (N, F) int64, from 0 to size - 1
    names: tuple[str, ...]
    sizes: tuple[int, ...]


class Raw(NamedTuple):
    """Images as they were read, their labels or None, the file that errors name, and their factors or None."""

    images: Any  # an array, or what has shape, dtype, min and max and is indexed like one (sprites.Sprites)
    labels: np.ndarray | None
    origin: str
    factors: Factors | None = None


def checked(raw: Raw, kept: np.ndarray, layout: str | None = None) -> tuple[Tensor | Compact, Tensor | None]:
    """The images `kept` (indices) of a raw set, (N, C, H, W) float32 in [0, 1], and labels (N,) int64 or None.

    The whole set is checked, not only what is kept. 8-bit and binary images that would take more than COMPACT_ABOVE
    bytes stay packed. Raises DataError, also where memory would run out.
    """
    check_type(raw.images, raw.origin)
    arranged = channels_first(raw.images, raw.origin, layout)
    divisor = check_values(raw.images, raw.origin)
    labels = None if raw.labels is None else _labels(raw, kept)
    values = len(kept) * math.prod(arranged.shape[1:])
    remedy = "give fewer or smaller images"
    if arranged.dtype.kind in "bu" and 4 * values > COMPACT_ABOVE:
        check_memory(values // 8 if divisor == 1 else values, raw.origin, remedy)
        return pack(arranged, kept, divisor), labels
    check_memory(4 * values, raw.origin, f"{remedy}; uint8 or bool arrays are kept in a quarter or less of it")
    images = torch.from_numpy(np.ascontiguousarray(arranged[kept], dtype=np.float32))
    if divisor != 1:
        images.div_(divisor)
    return images, labels


def channels_first(array: Any, origin: str, layout: str | None = None) -> Any:
    """(N, H, W), (N, C, H, W) or (N, H, W, C) as a view of shape (N, C, H, W)."""
    shape = array.shape
    if layout not in (None, "NHW", "NCHW", "NHWC"):
        raise DataError(f"layout {layout!r} is not known; expected 'NHW', 'NCHW' or 'NHWC'")
    if array.ndim not in (3, 4) or (layout is not None and len(layout) != array.ndim):
        hint = ""
        if array.ndim == 2:
            hint = f": reshape rows of {shape[1]} values to images, e.g. array.reshape(-1, 28, 28)"
        raise DataError(
            f"{origin}: the array has shape {shape}; expected images, (N, H, W), (N, C, H, W) or (N, H, W, C)"
            f"{f', here {layout}' if layout else ''}{hint}"
        )
    if 0 in shape:
        raise DataError(f"{origin}: the array has shape {shape}: the set is empty; expected at least one image")
    if array.ndim == 3:
        return array[:, None]
    if layout is None:
        first, last = shape[1] in CHANNELS, shape[3] in CHANNELS
        if first == last:
            raise DataError(
                f"{origin}: shape {shape} does not tell which axis holds the channels; "
                "pass layout='NCHW' or layout='NHWC'"
            )
        layout = "NCHW" if first else "NHWC"
    return array if layout == "NCHW" else array.transpose(0, 3, 1, 2)


def check_type(array: Any, origin: str) -> None:
    """Raises DataError for anything but uint8, bool and floats."""
    kind = array.dtype
    if kind in (np.bool_, np.uint8) or kind.kind == "f":
        return
    remedy = "make one array of numbers"
    if kind.kind == "O":
        remedy = "make all images one size and stack them, e.g. np.stack(images).astype('uint8')"
    elif kind.kind in "iu":
        remedy = "for values 0 to 255 use array.astype('uint8')"
    found = f"{kind}, values {array.min()} to {array.max()}" if kind.kind in "iu" and array.size else f"{kind}"
    raise DataError(f"{origin}: the array is {found}; expected uint8 (0 to 255), bool, or float in [0, 1]: {remedy}")


def check_values(array: Any, origin: str) -> int:
    """The number to divide by for [0, 1]: 255 for 8-bit images, else 1. Raises DataError for any other values."""
    kind = array.dtype
    low, high = array.min(), array.max()  # NaN goes through both
    if kind.kind == "f" and not (np.isfinite(low) and np.isfinite(high)):
        bad = np.argwhere(~np.isfinite(array))
        where = tuple(int(i) for i in bad[0])
        raise DataError(
            f"{origin}: {array[where]} at index {where}, {len(bad)} such values in all; expected finite numbers in "
            "[0, 1]: repair those images (the first index) or remove them"
        )
    if low == high:
        raise DataError(f"{origin}: every value is {low}; expected images that differ: was the set written correctly?")
    if kind == np.uint8:
        return 255 if high > 1 else 1
    if kind.kind == "f" and (low < 0 or high > 1):
        remedy = "scale them, e.g. (x - x.min()) / (x.max() - x.min())"
        if low >= 0 and high <= 255:
            remedy = "divide by 255, or save them as uint8"
        elif low >= -1 and high <= 1:
            remedy = "map them with (x + 1) / 2"
        raise DataError(f"{origin}: values go from {low:g} to {high:g}; expected floats in [0, 1]: {remedy}")
    return 1


def _labels(raw: Raw, kept: np.ndarray) -> Tensor:
    labels = raw.labels
    assert labels is not None
    if labels.shape != (len(raw.images),) or labels.dtype.kind not in "iub":
        raise DataError(
            f"{raw.origin}: labels of shape {labels.shape} and type {labels.dtype} for {len(raw.images)} images; "
            f"expected whole numbers, shape ({len(raw.images)},): correct them, or leave them out"
        )
    return torch.from_numpy(labels[kept].astype(np.int64))

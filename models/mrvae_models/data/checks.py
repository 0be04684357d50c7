"""What raw arrays must be, and their way to float32 in [0, 1], shape (N, C, H, W)."""

from __future__ import annotations

import math
import warnings
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .errors import DataError
from .mapped import Mapped, MappedRows
from .memory import check_memory
from .storage import Compact, pack

__all__ = ["DataError", "Factors", "Header", "Raw", "checked"]

CHANNELS = (1, 2, 3, 4)

LAYOUTS = ("NHW", "NCHW", "NHWC", "NTHW", "NTCHW", "NTHWC")
"""Axes of arrays: images, and clips of T frames. `load` takes clips with T before N, too."""

COMPACT_ABOVE = 2**30
"""Bytes as float32 above which a split of 8-bit or binary images stays packed (storage.Compact)."""


class Factors(NamedTuple):
    """What generated each image: N images, F factors."""

    classes: np.ndarray  # (N, F) int64, from 0 to size - 1
    names: tuple[str, ...]
    sizes: tuple[int, ...]


class Header(NamedTuple):
    """What is known of an array that is not read: its shape, (N, ...), the file that errors name, and its layout."""

    shape: tuple[int, ...]
    origin: str
    layout: str | None = None  # as in Raw

    def shape_of_one(self) -> tuple[int, ...]:
        """(C, H, W), or (T, C, H, W) of clips; DataError where `load` would raise it for the array's shape."""
        nothing_read = np.broadcast_to(np.uint8(0), self.shape)  # takes no memory
        return channels_first(nothing_read, self.origin, self.layout).shape[1:]


class Raw(NamedTuple):
    """Images as they were read, their labels or None, the file that errors name, and their factors or None.

    groups: (N,) whole numbers, of what each image is a part of, such as a photograph of which it is a patch: a split
    takes a group whole (splits.py). None where every image is on its own. layout: of LAYOUTS, or None where the shape
    tells it. test: of the source's test set; None where it is cut out of this array, is made to the same shape as this
    one in any case, or is not known before it is read.
    """

    images: Any  # an array, or what has shape, dtype, min and max and is indexed like one (sprites.Sprites)
    labels: np.ndarray | None
    origin: str
    factors: Factors | None = None
    groups: np.ndarray | None = None
    layout: str | None = None
    test: Header | None = None


def checked(raw: Raw, kept: np.ndarray, layout: str | None = None) -> tuple[Tensor | Compact | Mapped, Tensor | None]:
    """The images `kept` (indices) of a raw set, float32 in [0, 1], and labels (N,) int64 or None.

    Images are (N, C, H, W), clips (N, T, C, H, W). The whole set is checked, not only what is kept. 8-bit and binary
    images that would take more than COMPACT_ABOVE bytes stay packed, and such clips do in any case; those that are
    mapped stay in their file. Raises DataError, also where memory would run out.

    Labels may be (N, 1), too. Several an image, (N, K), are left out with a warning.
    """
    if layout is not None and raw.layout not in (None, layout):
        raise DataError(f"{raw.origin}: layout is {layout!r}; expected {raw.layout!r}, or none: leave it out")
    check_type(raw.images, raw.origin)
    arranged = channels_first(raw.images, raw.origin, layout or raw.layout)
    divisor = check_values(raw.images, raw.origin)
    labels = None if raw.labels is None else _labels(raw, kept)
    if isinstance(arranged, MappedRows):
        return Mapped(arranged, kept, divisor), labels
    values = len(kept) * math.prod(arranged.shape[1:])
    remedy = "give fewer or smaller images"
    if arranged.dtype.kind in "bu" and (4 * values > COMPACT_ABOVE or arranged.ndim == 5):
        check_memory(values // 8 if divisor == 1 else values, raw.origin, remedy)
        return pack(arranged, kept, divisor), labels
    check_memory(4 * values, raw.origin, f"{remedy}; uint8 or bool arrays are kept in a quarter or less of it")
    images = torch.from_numpy(np.ascontiguousarray(arranged[kept], dtype=np.float32))
    if divisor != 1:
        images.div_(divisor)
    return images, labels


def channels_first(array: Any, origin: str, layout: str | None = None) -> Any:
    """A view of shape (N, C, H, W) of images, (N, T, C, H, W) of clips, by LAYOUTS.

    Without a layout three axes are (N, H, W), four are of images and five of clips, with the channels where there are
    at most four of them.
    """
    shape = array.shape
    if layout not in (None, *LAYOUTS):
        raise DataError(f"layout {layout!r} is not known; expected one of {', '.join(LAYOUTS)}")
    if array.ndim not in (3, 4, 5) or (layout is not None and len(layout) != array.ndim):
        hint = ""
        if array.ndim == 2:
            hint = f": reshape rows of {shape[1]} values to images, e.g. array.reshape(-1, 28, 28)"
        kinds = "clips" if "T" in (layout or "") else "images"
        expected = f"{kinds}, here {layout}"
        if layout is None:
            expected = "images, (N, H, W), (N, C, H, W) or (N, H, W, C), or clips, (N, T, C, H, W) or (N, T, H, W, C)"
        raise DataError(f"{origin}: the array has shape {shape}; expected {expected}{hint}")
    if 0 in shape:
        raise DataError(f"{origin}: the array has shape {shape}: the set is empty; expected at least one image")
    if layout is None and array.ndim == 3:
        layout = "NHW"
    elif layout is None:
        first, last = shape[-3] in CHANNELS, shape[-1] in CHANNELS
        frames = "T" * (array.ndim - 4)
        if first == last:
            clips = ", or 'NTHW' or 'TNHW' for clips of grey frames" if array.ndim == 4 else ""
            raise DataError(
                f"{origin}: shape {shape} does not tell which axis holds the channels; "
                f"pass layout='N{frames}CHW' or layout='N{frames}HWC'{clips}"
            )
        layout = f"N{frames}CHW" if first else f"N{frames}HWC"
    if "C" not in layout:
        return array[:, None] if layout == "NHW" else array[:, :, None]
    return array if layout.endswith("CHW") else np.moveaxis(array, -1, -3)


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


def _labels(raw: Raw, kept: np.ndarray) -> Tensor | None:
    labels, n = raw.labels, len(raw.images)
    assert labels is not None
    if labels.shape == (n, 1):
        labels = labels[:, 0]
    if labels.ndim > 1 and len(labels) == n:
        warnings.warn(
            f"{raw.origin}: labels of shape {labels.shape} are left out; expected one an image, shape ({n},): the "
            "images are used without",
            stacklevel=4,
        )
        return None
    if labels.shape != (n,) or labels.dtype.kind not in "iub":
        raise DataError(
            f"{raw.origin}: labels of shape {labels.shape} and type {labels.dtype} for {n} images; expected whole "
            f"numbers, shape ({n},): correct them, or leave them out"
        )
    return torch.from_numpy(labels[kept].astype(np.int64))

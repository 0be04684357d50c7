"""Betas equally spaced in log beta. No torch here."""

from __future__ import annotations

import math


def log_spaced(low: float, high: float, count: int) -> list[float]:
    """`count` betas from low to high, equally spaced in log beta; the middle of the range for one."""
    if count == 1:
        return [math.sqrt(low * high)]
    # six digits: 0.1 rather than 0.09999999999999998
    inner = [float(f"{low * (high / low) ** (i / (count - 1)):.6g}") for i in range(1, count - 1)]
    return [low, *inner, high]

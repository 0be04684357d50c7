"""What likelihoods need near the ends of what a float holds: differences of logarithms, tails, soft clipping."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

LEVELS = 256
"""Values of a pixel of 8 bits, 0 to 255; in data they are level / 255."""
HIGHEST = LEVELS - 1

MIN_LOG_SIGMA = -6.0
"""Least log standard deviation of x in [0, 1], e^-6 = 0.0025: above half the distance of two of 256 levels, 1 / 510
(sigma-VAE, Section 3.1)."""
MIN_LOG_SCALE = -7.0
"""Of a logistic distribution, whose standard deviation is pi / sqrt(3) = 1.8 times its scale."""
LEAST_LOG_SIGMA = -40.0
"""Of what may be given as the least: e^-80, the variance, is a float32, and e^-104 would be 0."""
MAX_LOG_SIGMA = 6.0
"""e^6 = 403 times the range of x: nothing learned gets there; it keeps what an untrained decoder gives finite."""


def is_number(value: object) -> bool:
    """Whether it is a finite number: options come from the command line as whatever they look like."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def full_precision(x: Tensor) -> Tensor:
    """float16 and bfloat16 to float32; anything else as it is."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def softplus(x: Tensor) -> Tensor:
    """log(1 + e^x), to the last digits of float64 as well, where torch's own is linear above 20."""
    return -F.logsigmoid(-x)


def soft_clip(x: Tensor, low: float | None = None, high: float | None = None) -> Tensor:
    """x within (low, high), with a gradient everywhere (Chua et al., 2018; sigma-VAE, Section 3.1).

        x := high - softplus(high - x),    x := low + softplus(x - low)
    """
    if high is not None:
        x = high - softplus(high - x)
    return x if low is None else low + softplus(x - low)


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^-x) for x > 0, without cancellation at either end (Maechler, 2012)."""
    near = x < math.log(2)
    # each branch sees only what it is for: a gradient of the other one, infinite or NaN, would come through torch.where
    small = torch.log(-torch.expm1(-torch.where(near, x, 1.0)))
    return torch.where(near, small, torch.log1p(-torch.exp(-torch.where(near, 1.0, x))))


def log_gamma_ratio(a: Tensor) -> Tensor:
    """log Gamma(a + 1/2) - log Gamma(a) for a > 0, without the cancellation of the two, to 1e-12.

    1/2 log b - 1/(8 b) + 1/(192 b^3) - 1/(640 b^5) + 17/(14336 b^7) - 31/(18432 b^9) at b = a + 8, and back to a by
    Gamma(a + 1) = a Gamma(a).
    """
    shifts = 8
    b = a + shifts
    r = 1 / b
    series = 0.5 * b.log() - r / 8 + r**3 / 192 - r**5 / 640 + 17 * r**7 / 14336 - 31 * r**9 / 18432
    return series - sum(torch.log1p(0.5 / (a + i)) for i in range(shifts))


FAR = -20.0


def log_ndtr(z: Tensor) -> Tensor:
    """log Phi(z), Phi the normal distribution function, with a gradient that is right in the far tail too.

    torch's own in float32 is off by 0.05 % at z = -200, and 0 at -5e5. Below FAR it is here, to 1e-13,

        -z^2 / 2 - log(-z sqrt(2 pi)) + log(1 - 1/z^2 + 3/z^4 - 15/z^6 + 105/z^8 - 945/z^10 + 10395/z^12)
    """
    far = z < FAR
    near = torch.special.log_ndtr(torch.where(far, 0.0, z))
    y = torch.where(far, z, FAR)
    r = y.square().reciprocal()
    series = r * (-1 + r * (3 + r * (-15 + r * (105 + r * (-945 + r * 10395)))))
    return torch.where(far, -0.5 * (y.square() + math.log(2 * math.pi)) - (-y).log() + torch.log1p(series), near)


def levels_of(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The levels 0 to 255 of x, as floats."""
    return (x.to(dtype) * HIGHEST).round()


def log_logistic_mass(levels: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """log of the mass that a logistic distribution of x gives to the bins of levels; the three broadcast.

        level i: S(b) - S(a),  a = (i - 1/2 - 255 m) / (255 s),  b = a + 1 / (255 s),  S the logistic function;
        level 0: S(b),  level 255: 1 - S(a): the ends take the tails (Salimans et al., 2017)

    As log S(b) + log S(-a) + log(1 - e^(a - b)), which is the same and loses nothing.
    """
    inverse = torch.exp(-log_scale)
    x, half = levels / HIGHEST, 0.5 / HIGHEST
    below = F.logsigmoid((x + half - mean) * inverse).masked_fill(levels >= HIGHEST, 0.0)
    above = F.logsigmoid((mean - x + half) * inverse).masked_fill(levels <= 0, 0.0)
    inner = (levels > 0) & (levels < HIGHEST)
    return below + above + torch.where(inner, log1mexp(inverse / HIGHEST), 0.0)


SERIES_BELOW = 0.1


def log_normal_mass(levels: Tensor, mean: Tensor, log_sigma: Tensor) -> Tensor:
    """log of the mass that a normal distribution of x gives to the bins of levels; the three broadcast.

        level i: Phi(z + h) - Phi(z - h),  z = (i / 255 - m) / sigma,  h = 1 / (510 sigma);
        level 0: Phi(z + h),  level 255: Phi(h - z): the ends take the tails

    An inner bin is mirrored to z <= 0, where log Phi has all digits: log Phi(z + h) + log(1 - e^-d), d the difference
    of the two logarithms, which is at least 2 h |z|. Where w = 2 h max(1, |z|) is below SERIES_BELOW, d would cancel,
    and the mass is phi(z) w [1 + (z^2 - 1) w^2 / 24 + (z^4 - 6 z^2 + 3) w^4 / 1920 + ...], w = 2 h.
    """
    inverse = torch.exp(-log_sigma)
    signed = (levels / HIGHEST - mean) * inverse
    half = 0.5 * inverse / HIGHEST
    signed, half = torch.broadcast_tensors(signed, half)
    z = -signed.abs()
    narrow = 2 * half * z.abs().clamp_min(1.0) < SERIES_BELOW

    square = torch.where(narrow, z, 0.0).square()
    width = torch.where(narrow, 2 * half, SERIES_BELOW)
    w2 = width.square()
    correction = (square - 1) * w2 / 24 + (square.square() - 6 * square + 3) * w2.square() / 1920
    series = width.log() - 0.5 * (square + math.log(2 * math.pi)) + torch.log1p(correction)

    z, h = torch.where(narrow, -1.0, z), torch.where(narrow, 1.0, half)
    upper = log_ndtr(z + h)
    difference = torch.maximum(upper - log_ndtr(z - h), 2 * h * z.abs())
    inner = torch.where(narrow, series, upper + log1mexp(difference))

    tail = torch.where(levels <= 0, signed + half, half - signed)
    end = (levels <= 0) | (levels >= HIGHEST)
    return torch.where(end, log_ndtr(torch.where(end, tail, 0.0)), inner)

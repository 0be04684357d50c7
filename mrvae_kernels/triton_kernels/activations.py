"""Gate functions, activations and their slopes as device functions, in float32 and float64.

The formulas are those of `mrvae_kernels.reference`. exp and erf are the hardware's; expm1, log1p and tanh are made of
series, since Triton has none that runs on every vendor's GPU and in the interpreter.
"""

from __future__ import annotations

import triton
import triton.language as tl

KINDS = ("sigmoid", "sqrt", "softplus", "identity")
"""Gate kinds by code; the code of a feature is data, so that one launch serves a whole model."""

ACTIVATIONS = ("none", "relu", "silu", "gelu", "tanh", "leaky_relu", "elu")
"""Activations by code; the code is a compile-time constant."""

NEEDS_ARGUMENT = ("silu", "gelu")
"""Activations whose slope cannot be had from their result."""

NONE = tl.constexpr(0)
RELU = tl.constexpr(1)
SILU = tl.constexpr(2)
GELU = tl.constexpr(3)
TANH = tl.constexpr(4)
LEAKY_RELU = tl.constexpr(5)
ELU = tl.constexpr(6)

LEAKY_RELU_SLOPE = tl.constexpr(0.01)
SQRT_GATE_FLOOR = tl.constexpr(1.0 / 16.0)  # bounds the slope -exp(p) / (2 g) by 8
INVERSE_SQRT_2 = tl.constexpr(0.7071067811865476)
NORMAL_DENSITY = tl.constexpr(0.3989422804014327)  # 1 / sqrt(2 pi)


def activation_code(name: str) -> int:
    """ValueError for a name that is not one of ACTIVATIONS."""
    if name not in ACTIVATIONS:
        raise ValueError(f"activation is {name!r}; expected one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS.index(name)


@triton.jit
def finite(x):
    """Infinities as the largest numbers, where a factor of 0 would make them NaN; a NaN stays one."""
    limit: tl.constexpr = 1.7976931348623157e308 if x.dtype == tl.float64 else 3.4028234663852886e38
    x = tl.where(x > limit, limit, x)
    return tl.where(x < -limit, -limit, x)


@triton.jit
def expm1_of_negative(x):
    """exp(x) - 1 for x <= 0: Taylor's series where the difference would cancel."""
    terms: tl.constexpr = 15 if x.dtype == tl.float64 else 9
    near = tl.where(x < -0.5, -0.5, x)
    series = near * 0.0 + 1.0
    for i in tl.static_range(terms - 1):
        series = 1.0 + near * (1.0 / (terms - i)) * series
    return tl.where(x < -0.5, tl.exp(x) - 1.0, near * series)


@triton.jit
def log1p_of_fraction(x):
    """log(1 + x) for 0 <= x <= 1, as 2 artanh(x / (2 + x))."""
    terms: tl.constexpr = 16 if x.dtype == tl.float64 else 8
    w = x / (2.0 + x)
    square = w * w
    series = square * 0.0 + 1.0 / (2 * terms + 1)
    for i in tl.static_range(terms):
        series = 1.0 / (2 * (terms - i) - 1) + square * series
    return 2.0 * w * series


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)), from exp(-|x|) so that nothing overflows."""
    small = tl.exp(-tl.abs(x))
    ratio = 1.0 / (1.0 + small)
    return tl.where(x < 0, small * ratio, ratio)


@triton.jit
def tanh(x):
    t = expm1_of_negative(-2.0 * tl.abs(x))
    magnitude = -t / (2.0 + t)
    return tl.where(x < 0, -magnitude, magnitude)


@triton.jit
def gate_value(p, kind):
    """g = act(p) by the code in `kind` (a tensor like p); p is made finite first. A NaN p gives NaN."""
    p = finite(p)
    small = tl.exp(-tl.abs(p))
    ratio = 1.0 / (1.0 + small)
    g = tl.where(p < 0, small * ratio, ratio)
    below = tl.where(p >= 0, -1.0, p)
    root = tl.where(p >= 0, 0.0, tl.sqrt(-expm1_of_negative(below)))
    g = tl.where(kind == 1, root, g)
    soft = tl.where(p < 0, 0.0, p) + log1p_of_fraction(small)
    g = tl.where(kind == 2, soft, g)
    return tl.where(kind == 3, p, g)


@triton.jit
def gate_slope(p, kind):
    """dg/dp by the code in `kind`; the sqrt gate's is 0 for p >= 0 and bounded by 8 near 0."""
    p = finite(p)
    small = tl.exp(-tl.abs(p))
    ratio = 1.0 / (1.0 + small)
    slope = small * ratio * ratio
    below = tl.where(p >= 0, -1.0, p)
    root = tl.sqrt(-expm1_of_negative(below))
    root = tl.where(root < SQRT_GATE_FLOOR, SQRT_GATE_FLOOR, root)
    slope = tl.where(kind == 1, tl.where(p >= 0, 0.0, -0.5 * tl.exp(below) / root), slope)
    slope = tl.where(kind == 2, tl.where(p < 0, small * ratio, ratio), slope)
    return tl.where(kind == 3, p * 0.0 + 1.0, slope)


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    """act(z). Exact GELU, leaky slope 0.01, ELU with alpha 1; a NaN stays one."""
    if ACTIVATION == RELU:
        z = tl.where(z <= 0, 0.0, z)
    elif ACTIVATION == SILU:
        z = finite(z) * sigmoid(z)
    elif ACTIVATION == GELU:
        z = finite(z) * (0.5 + 0.5 * tl.erf(z * INVERSE_SQRT_2))
    elif ACTIVATION == TANH:
        z = tanh(z)
    elif ACTIVATION == LEAKY_RELU:
        z = tl.where(z > 0, z, LEAKY_RELU_SLOPE * z)
    elif ACTIVATION == ELU:
        z = tl.where(z > 0, z, expm1_of_negative(tl.where(z > 0, 0.0, z)))
    return z


@triton.jit
def activation_slope(z, ACTIVATION: tl.constexpr):
    """d act / dz from the argument z; at a kink the slope of the left side, as in torch."""
    slope = tl.where(z == z, 1.0, z)
    if ACTIVATION == RELU:
        slope = tl.where(z <= 0, 0.0, slope)
    elif ACTIVATION == SILU:
        s = sigmoid(z)
        slope = s * (1.0 + finite(z) * (1.0 - s))
    elif ACTIVATION == GELU:
        z = finite(z)
        slope = 0.5 + 0.5 * tl.erf(z * INVERSE_SQRT_2) + z * NORMAL_DENSITY * tl.exp(-0.5 * z * z)
    elif ACTIVATION == TANH:
        y = tanh(z)
        slope = 1.0 - y * y
    elif ACTIVATION == LEAKY_RELU:
        slope = tl.where(z > 0, slope, LEAKY_RELU_SLOPE)
    elif ACTIVATION == ELU:
        slope = tl.where(z > 0, slope, tl.exp(tl.where(z > 0, 0.0, z)))
    return slope


@triton.jit
def activation_slope_of_result(y, ACTIVATION: tl.constexpr):
    """d act / dz from the result y = act(z), for the activations outside NEEDS_ARGUMENT."""
    tl.static_assert(ACTIVATION != SILU and ACTIVATION != GELU, "needs the argument, not the result")
    slope = tl.where(y == y, 1.0, y)
    if ACTIVATION == RELU:
        slope = tl.where(y <= 0, 0.0, slope)
    elif ACTIVATION == TANH:
        slope = 1.0 - y * y
    elif ACTIVATION == LEAKY_RELU:
        slope = tl.where(y > 0, slope, LEAKY_RELU_SLOPE)
    elif ACTIVATION == ELU:
        slope = tl.where(y > 0, slope, y + 1.0)
    return slope

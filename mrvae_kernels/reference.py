"""Every operator in plain PyTorch, in any dtype and on any device: the oracle, the documentation and the fallback.

Arithmetic on gates happens in float32 (float64 for float64 inputs), whatever the inputs' dtype; results are rounded
once, to the dtype of the product that they scale.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

SQRT_GATE_MAX_SLOPE = 8.0
"""The sqrt gate's slope -exp(p) / (2 g) grows without bound as p -> 0-; backward bounds it with max(g, 1/16) for g."""

Geometry = tuple[Sequence[int], Sequence[int], Sequence[int], bool, Sequence[int], int]
"""stride, padding, dilation, transposed, output_padding and groups of a convolution."""

ACTIVATIONS = ("none", "relu", "silu", "gelu", "tanh", "leaky_relu", "elu")


CONVOLUTIONS: dict[bool, tuple[Callable[..., Tensor], ...]] = {
    False: (F.conv1d, F.conv2d, F.conv3d),
    True: (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d),
}
"""torch's convolutions by transposed, then by spatial dimensions - 1."""


def gate_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays float64; everything else computes its gates in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def gate_activation(preactivation: Tensor, kind: str) -> Tensor:
    """g = act(p), elementwise (MR-VAE, Eqn. 7, and softplus).

    sigmoid   1 / (1 + exp(-p))
    sqrt      sqrt(-expm1(p)) for p < 0; exactly 0, with gradient 0, for p >= 0. The gradient near 0 is clipped to 8,
              and the second derivative there is that of the clipped one.
    softplus  log(1 + exp(p))
    identity  p (FiLM's shift)
    """
    p = preactivation
    if kind != "sqrt":
        return gate_value(p, kind)
    square, least = _sqrt_gate_squared(p), 0.5 / SQRT_GATE_MAX_SLOPE
    steep = square < least * least
    exact = torch.where(steep, 1.0, square).sqrt()  # 1: autograd would have 0 times the slope of sqrt(0)
    bounded = square.detach().sqrt() + (square - square.detach()) / (2 * least)
    return torch.where(steep, bounded, exact)


def gate_value(preactivation: Tensor, kind: str) -> Tensor:
    """g = act(p) for passes that write their derivative out: the sqrt gate's is not bounded here."""
    p = preactivation
    if kind == "sigmoid":
        return torch.sigmoid(p)
    if kind == "sqrt":
        return _sqrt_gate_squared(p).sqrt()
    limit = torch.finfo(p.dtype).max
    p = p.clamp(-limit, limit)
    if kind == "identity":
        return p
    if kind == "softplus":
        return torch.logaddexp(p, torch.zeros_like(p))
    raise ValueError(f"gate kind is {kind!r}; expected sigmoid, sqrt, softplus or identity")


def _sqrt_gate_squared(p: Tensor) -> Tensor:
    """1 - exp(p) for p < 0, else 0; the inner choice keeps autograd from 0 times the slope of an overflow."""
    negative = p < 0
    return torch.where(negative, -torch.expm1(torch.where(negative, p, -torch.ones_like(p))), 0.0)


def gate_and_slope(preactivation: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """g = act(p) and dg/dp, as autograd has it of gate_activation: for backward passes that make gates anew."""
    gate = gate_value(preactivation, kind)
    if kind == "identity":
        return gate, torch.ones_like(gate)
    if kind == "sigmoid":
        return gate, gate * (1 - gate)
    if kind == "softplus":
        return gate, torch.sigmoid(preactivation)
    slope = (gate.square() - 1) / (2 * gate.clamp(min=0.5 / SQRT_GATE_MAX_SLOPE))
    return gate, torch.where(preactivation < 0, slope, 0)


def gate_and_relative_slope(preactivation: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """g = act(p) and (dg/dp) / g, finite also where g is 0, with one division at most. Not for "identity"."""
    p, gate = preactivation, gate_value(preactivation, kind)
    if kind == "sigmoid":
        return gate, 1 - gate
    if kind == "softplus":
        return gate, torch.where(gate > 0, torch.sigmoid(p) / gate, 0)
    divisor = 2 * gate * gate.clamp(min=0.5 / SQRT_GATE_MAX_SLOPE)
    return gate, torch.where(gate > 0, (gate.square() - 1) / divisor, 0)


def degree_of(weight: Tensor) -> int:
    """The degree of gates whose weight is (C,) or (degree, C)."""
    return 1 if weight.dim() == 1 else len(weight)


def polynomials(eta: Tensor, degree: int) -> list[Tensor]:
    """eta, eta^2 - 1 and eta^3 - 9/5 eta, the first `degree` of them: what a gate's argument is a sum of.

    Legendre's polynomials, to a factor: of mean 0 and orthogonal while log beta is uniform on its range, where the mean
    of eta^2 is 1.
    """
    return [eta, eta * eta - 1, (eta * eta - 1.8) * eta][:degree]


def polynomial_slopes(eta: Tensor, degree: int) -> list[Tensor]:
    """Their derivatives by eta."""
    return [torch.ones_like(eta), 2 * eta, 3 * eta * eta - 1.8][:degree]


def gate_argument(weight: Tensor, bias: Tensor, eta: Tensor) -> Tensor:
    """p = w eta + c, or sum_k w_k P_k(eta) + c of a weight with several rows w_k; P as in `polynomials`.

    weight: (C,) or (degree, C), bias (C,); p is (C,) for a 0-d eta, (N, C) for eta of shape (N,), in gates' dtype.
    """
    dtype = gate_dtype(weight.dtype)
    eta, weight, bias = eta.to(dtype).unsqueeze(-1), weight.to(dtype), bias.to(dtype)
    if weight.dim() == 1:
        return eta * weight + bias
    return sum_of(polynomials(eta, len(weight)), weight) + bias


def sum_of(factors: Sequence[Tensor], rows: Tensor) -> Tensor:
    """sum_k factor_k row_k, without a matrix product, so that torch.compile fuses it with what comes after."""
    first, *others = zip(factors, rows.unbind(), strict=True)
    total = first[0] * first[1]
    for factor, row in others:
        total = total + factor * row
    return total


def gates(weight: Tensor, bias: Tensor, eta: Tensor, kind: str) -> Tensor:
    """g = act(p), p as in `gate_argument`: (C,) for a 0-d eta, (N, C) for eta of shape (N,)."""
    return gate_activation(gate_argument(weight, bias, eta), kind)


def gate_bank(weight: Tensor, bias: Tensor, eta: Tensor, sizes: Sequence[int], kinds: Sequence[str]) -> list[Tensor]:
    """All gates of a model from one flat weight and bias: a list with (C_i,) or (N, C_i) each."""
    p = gate_argument(weight, bias, eta)  # in one: torch.compile keeps it for backward
    return [gate_activation(piece, kind) for piece, kind in zip(p.split(list(sizes), -1), kinds, strict=True)]


def fold(
    weight: Tensor, bias: Tensor | None, gate: Tensor, shift: Tensor | None = None, groups: int = 0
) -> tuple[Tensor, Tensor | None]:
    """W' = g W, b' = g b + t for one beta a batch (gate (C,)).

    groups = 0: the output channel is axis 0 of W. groups >= 1: W is a transposed convolution's, (C_in, C_out / groups,
    k...), and input row i belongs to group i // (C_in / groups). W' has the dtype of W; b' likewise; None for no b and
    t.
    """
    if groups == 0:
        scaled = weight.to(gate.dtype) * gate.reshape(-1, *[1] * (weight.dim() - 1))
    else:
        grouped = weight.to(gate.dtype).unflatten(0, (groups, weight.shape[0] // groups))
        scaled = (grouped * gate.reshape(groups, 1, -1, *[1] * (weight.dim() - 2))).flatten(0, 1)
    if bias is None:
        folded_bias = shift
    else:
        folded_bias = bias.to(gate.dtype) * gate if shift is None else bias.to(gate.dtype) * gate + shift
    return scaled.to(weight.dtype), None if folded_bias is None else folded_bias.to(weight.dtype)


def activate(y: Tensor, activation: str) -> Tensor:
    """The pointwise non-linearity by its name; GELU is the exact one, leaky ReLU has slope 0.01, ELU alpha 1."""
    if activation == "none":
        return y
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; expected one of {', '.join(ACTIVATIONS)}")
    return getattr(torch, activation)(y) if activation in ("relu", "tanh") else getattr(F, activation)(y)


def along(values: Tensor, dim: int, ndim: int) -> Tensor:
    """View values (C,) or (N, C) so that they broadcast along axis `dim` (and axis 0) of a tensor with ndim axes."""
    shape = [1] * ndim
    shape[dim] = values.shape[-1]
    if values.dim() == 2:
        shape[0] = values.shape[0]
    return values.reshape(shape)


def epilogue(
    u: Tensor, bias: Tensor | None, gate: Tensor, shift: Tensor | None = None, dim: int = 1, activation: str = "none"
) -> Tensor:
    """y = act(g (u + b) + t) along channel axis `dim` of u; g and t are (C,) or one a sample, (N, C)."""
    y = u.to(gate.dtype)
    if bias is not None:
        y = y + along(bias.to(gate.dtype), dim, u.dim())
    y = y * along(gate, dim, u.dim())
    if shift is not None:
        y = y + along(shift, dim, u.dim())
    return activate(y, activation).to(u.dtype)


def gated_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor, shift: Tensor | None = None, activation: str = "none",
    strategy: str = "epilogue",
) -> Tensor:
    """y = act(g (x W^T + b) + t): x (..., K), W (C, K), g and t (C,), or (N, C) with x (N, ..., K)."""
    if strategy == "fold":
        return activate(F.linear(x, *fold(weight, bias, gate, shift)), activation)
    return epilogue(F.linear(x, weight), bias, gate, shift, x.dim() - 1, activation)


def gated_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor, shift: Tensor | None, stride: Sequence[int],
    padding: Sequence[int], dilation: Sequence[int], transposed: bool, output_padding: Sequence[int], groups: int,
    activation: str = "none", strategy: str = "epilogue",
) -> Tensor:
    """y = act(g (conv(x, W) + b) + t), 1-d to 3-d, transposed or not: x (N, C_in, ...), g, t (C_out,) or (N, C_out)."""
    geometry = (stride, padding, dilation, transposed, output_padding, groups)
    if strategy == "fold":
        folded = fold(weight, bias, gate, shift, groups if transposed else 0)
        return activate(convolve(x, folded, geometry), activation)
    return epilogue(convolve(x, (weight, None), geometry), bias, gate, shift, 1, activation)


def convolve(x: Tensor, parameters: tuple[Tensor, Tensor | None], geometry: Geometry) -> Tensor:
    """torch's convolution with this weight and bias, in 1 to 3 dimensions."""
    stride, padding, dilation, transposed, output_padding, groups = geometry
    extra = {"output_padding": output_padding} if transposed else {}
    function = CONVOLUTIONS[transposed][x.dim() - 3]
    return function(x, *parameters, stride=stride, padding=padding, dilation=dilation, groups=groups, **extra)

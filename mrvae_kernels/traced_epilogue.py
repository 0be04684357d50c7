"""Gates, folds and epilogues for torch.compile, with backward passes written out for what they keep.

    bank      g = act(w eta + c), or of a polynomial  keeps w, c and eta, which are there anyway
    fold      W' = g W,  b' = g b                   dW = g dW', db = g db', dg = <dW', W> + db' b
    product   y = W' x + b'                         dx = W'^T dy, dW' = dy x^T; keeps W and g, not W'
    epilogue  y = act(g (u + b)), act none or ReLU  du = g dz, db = sum du, dg = sum dz (u + b) = (sum dz y) / g,
                                                    dz = dy where y > 0 (ReLU), else dy; keeps y, not u
    the same with a shift, by the core              keeps u

Left to autograd, u is kept beside y, which the next layer keeps anyway, W' beside W, and the gates slice by slice: a
tensor more between the passes costs more than the arithmetic on a gate. So what is kept of gates is the whole network's
in one piece, `flat`, of which a layer's begin at `start`; the slice itself is where the gradient goes. A gate of
exactly 0 has no gradient, as the gates of a network have the slope 0 there.

y is kept as a clone, which costs nothing in a graph without in-place operations (Inductor drops it): a layer's caller
may write into its result, as nn.ReLU(inplace=True) does.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from .gates import KINDS
from .reference import Geometry


class Bank(torch.autograd.Function):
    """All gates and shifts of a network at one beta, flat without a gradient, then each: weight (C,) or (degree, C),
    bias (C,), eta 0-d.

    Each is a slice, which AOTAutograd's partitioner takes for a view and makes again in the backward pass. It keeps
    what split gives beside flat, and Inductor (torch 2.13), which does not see that they share memory, writes results
    of the backward pass into the one before it reads the other.
    """

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, bias: Tensor, eta: Tensor, sizes: Sequence[int], kinds: Sequence[str]
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(weight, bias, eta)
        ctx.sizes, ctx.kinds = sizes, kinds
        flat = torch.cat(reference.gate_bank(weight, bias, eta, sizes, kinds))
        ctx.mark_non_differentiable(flat)
        return flat, *(flat[end - size : end] for size, end in zip(sizes, accumulate(sizes), strict=True))

    @staticmethod
    def backward(ctx: Any, _: Tensor, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weight, bias, eta = ctx.saved_tensors
        p = reference.gate_argument(_anew(weight), bias, eta)
        pieces = zip(p.split(ctx.sizes), grads, ctx.kinds, strict=True)
        dp = torch.cat([dg * reference.gate_and_slope(piece, kind)[1] for piece, dg, kind in pieces])
        deta = (dp * _argument_slope(weight, eta)).sum() if ctx.needs_input_grad[2] else None
        return _weight_gradient(dp.unsqueeze(0), weight, eta.unsqueeze(0)), dp.to(bias.dtype), deta, None, None


class Fold(torch.autograd.Function):
    """W' and b' of a layer without a shift; groups as in reference.fold."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, bias: Tensor | None, gate: Tensor, flat: Tensor, start: int, groups: int
    ) -> tuple[Tensor, Tensor | None]:
        ctx.save_for_backward(weight, bias, flat)
        ctx.rows, ctx.groups = slice(start, start + gate.shape[0]), groups
        return reference.fold(weight, bias, gate, None, groups)

    @staticmethod
    def backward(ctx: Any, grad_weight: Tensor, grad_bias: Tensor | None) -> tuple[Tensor | None, ...]:
        weight, bias, flat = ctx.saved_tensors
        gate = flat[ctx.rows]
        dweight, dbias = reference.fold(grad_weight, grad_bias, gate, None, ctx.groups)
        products = grad_weight.to(gate.dtype) * weight.to(gate.dtype)
        if ctx.groups:
            products = products.unflatten(0, (ctx.groups, -1)).transpose(1, 2).flatten(0, 1)
        dgate = products.flatten(1).sum(1)
        if bias is not None and grad_bias is not None:
            dgate = dgate + grad_bias.to(gate.dtype) * bias.to(gate.dtype)
        return dweight, None if bias is None else dbias, dgate, None, None, None


class FoldedProduct(torch.autograd.Function):
    """A product with what Fold has made of weight and bias, of which W' is made anew for dx, so that it is not kept.

    geometry: a convolution's, see reference.convolve; None for a Linear. weight and flat get no gradient here: it goes
    through Fold.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, folded: Tensor, folded_bias: Tensor | None, weight: Tensor, flat: Tensor, start: int,
        groups: int, geometry: Geometry | None,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, flat)
        channels = weight.shape[0] if groups == 0 else groups * weight.shape[1]
        ctx.rows, ctx.groups, ctx.geometry = slice(start, start + channels), groups, geometry
        ctx.bias_sizes = None if folded_bias is None else list(folded_bias.shape)
        if geometry is None:
            return F.linear(x, folded, folded_bias)
        return reference.convolve(x, (folded, folded_bias), geometry)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, flat = ctx.saved_tensors
        wanted = list(ctx.needs_input_grad[:3])
        folded, _ = reference.fold(_anew(weight), None, flat[ctx.rows], None, ctx.groups)
        if ctx.geometry is not None:
            found = torch.ops.aten.convolution_backward(grad, x, folded, ctx.bias_sizes, *ctx.geometry, wanted)
            return *found, None, None, None, None, None
        rows = grad.flatten(0, -2)
        dx = grad @ folded if wanted[0] else None
        dweight = rows.t() @ x.flatten(0, -2) if wanted[1] else None
        dbias = rows.sum(0) if wanted[2] else None
        return dx, dweight, dbias, None, None, None, None, None


class Epilogue(torch.autograd.Function):
    """One gate a channel of u along axis `dim`, (C,), or one a sample and channel, (N, C), for which flat is None."""

    @staticmethod
    def forward(
        ctx: Any, u: Tensor, bias: Tensor | None, gate: Tensor, flat: Tensor | None, start: int, dim: int, relu: bool
    ) -> Tensor:
        y = reference.epilogue(u, bias, gate, None, dim, "relu" if relu else "none")
        ctx.save_for_backward(y.clone(), gate if flat is None else flat)
        ctx.rows = slice(None) if flat is None else slice(start, start + gate.shape[0])
        ctx.kept_axes = [dim] if gate.dim() == 1 else [0, dim]
        ctx.dim, ctx.relu = dim, relu
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        y, gates = ctx.saved_tensors
        gate = gates[ctx.rows]
        dz = _through(grad, y, ctx.relu).to(gate.dtype)
        du = (dz * reference.along(gate, ctx.dim, y.dim())).to(grad.dtype)
        dgate = _divided(_sums(dz * y.to(gate.dtype), ctx.kept_axes), gate)
        dbias = None
        if ctx.bias_dtype is not None:
            sums = gate * _sums(dz, ctx.kept_axes)
            dbias = (sums if gate.dim() == 1 else sums.sum(0)).to(ctx.bias_dtype)
        return du, dbias, dgate, None, None, None, None


class SampledEpilogue(torch.autograd.Function):
    """u (N, C) with as many gates, g = act(w eta + c), w (C,) or (degree, C), c (C,), eta (N,): made in both passes,
    kept in neither.

    The gradients of w and c are summed on the way. flat_weight, flat_bias: the whole network's.
    """

    @staticmethod
    def forward(
        ctx: Any, u: Tensor, bias: Tensor | None, weight: Tensor, gate_bias: Tensor, eta: Tensor, flat_weight: Tensor,
        flat_bias: Tensor, start: int, kind: str, relu: bool,
    ) -> Tensor:
        gate = reference.gate_value(reference.gate_argument(weight, gate_bias, eta), kind)
        y = reference.epilogue(u, bias, gate, None, 1, "relu" if relu else "none")
        ctx.save_for_backward(y.clone(), flat_weight, flat_bias, eta)
        ctx.rows, ctx.kind, ctx.relu = slice(start, start + gate_bias.shape[0]), kind, relu
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        y, flat_weight, flat_bias, eta = ctx.saved_tensors
        weight, gate_bias = flat_weight[..., ctx.rows], flat_bias[ctx.rows]
        p = reference.gate_argument(_anew(weight), gate_bias, eta)
        gate, relative_slope = reference.gate_and_relative_slope(p, ctx.kind)
        dz = _through(grad, y, ctx.relu).to(gate.dtype)
        du = dz * gate
        dp = dz * y.to(gate.dtype) * relative_slope  # dz (u + b) g', y = g (u + b)
        dbias = None if ctx.bias_dtype is None else du.sum(0).to(ctx.bias_dtype)
        dweight = _weight_gradient(dp, weight, eta)
        deta = (dp * _argument_slope(weight, eta)).sum(1) if ctx.needs_input_grad[4] else None
        dgate_bias = dp.sum(0).to(flat_bias.dtype)
        return du.to(grad.dtype), dbias, dweight, dgate_bias, deta, None, None, None, None, None


class CoreEpilogue(torch.autograd.Function):
    """The same by the compiled core, for tensors of the CPU, with a shift too: with cubic softplus gates and shifts an
    MLP's step of 128 examples takes 1.2 of the ungated one's, by Inductor's loops 1.8.

    shift_weight, shift_bias, shift_start: None, None and -1 for no shift; eta gets no gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, u: Tensor, bias: Tensor | None, weight: Tensor, gate_bias: Tensor, shift_weight: Tensor | None,
        shift_bias: Tensor | None, eta: Tensor, flat_weight: Tensor, flat_bias: Tensor, start: int, shift_start: int,
        kind: str, activation: str,
    ) -> Tensor:
        made_of = flat_weight, flat_bias, eta
        how = start, shift_start, KINDS.index(kind), activation
        y = torch.ops.mrvae.sampled_epilogue(u, bias, *made_of, *how)
        ctx.of_result = shift_start < 0
        ctx.save_for_backward(y.clone() if ctx.of_result else u, bias, *made_of)
        ctx.how, ctx.flat, ctx.dtypes = how, weight.dim() == 1, (flat_weight.dtype, flat_bias.dtype)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kept, bias, *made_of = ctx.saved_tensors
        wanted_u, wanted_bias, wanted_weight, wanted_gate_bias, *wanted_shift = ctx.needs_input_grad[:6]
        mask = [wanted_u, wanted_bias and bias is not None, wanted_weight or wanted_gate_bias, any(wanted_shift)]
        du, dbias, *sums = torch.ops.mrvae.sampled_epilogue_backward(
            grad, kept, bias, *made_of, *ctx.how, ctx.of_result, mask
        )
        found: list[Tensor | None] = [du if wanted_u else None, dbias if mask[1] else None]
        for rows, wanted in zip(sums, mask[2:], strict=True):
            if not wanted:
                found += [None, None]
                continue
            found += [(rows[0] if ctx.flat else rows[:-1]).to(ctx.dtypes[0]), rows[-1].to(ctx.dtypes[1])]
        return *found, *[None] * 7


def _anew(weight: Tensor) -> Tensor:
    """The weight, from which gates are made anew: of the same nodes as in the forward pass AOTAutograd would make one,
    and keep their result."""
    return weight.neg().neg()


def _weight_gradient(dp: Tensor, weight: Tensor, eta: Tensor) -> Tensor:
    """Of weight (C,) or (degree, C), by the gradient of the arguments, dp (N, C), at eta (N,)."""
    rows = [(dp * basis.unsqueeze(-1)).sum(0) for basis in reference.polynomials(eta, reference.degree_of(weight))]
    return (rows[0] if weight.dim() == 1 else torch.stack(rows)).to(weight.dtype)


def _argument_slope(weight: Tensor, eta: Tensor) -> Tensor:
    """dp / deta: (C,) or (N, C)."""
    weight = weight.to(eta.dtype)
    if weight.dim() == 1:
        return weight
    return reference.sum_of([slope.unsqueeze(-1) for slope in reference.polynomial_slopes(eta, len(weight))], weight)


def _through(grad: Tensor, y: Tensor, relu: bool) -> Tensor:
    return torch.where(y > 0, grad, 0) if relu else grad


def _sums(values: Tensor, kept: Sequence[int]) -> Tensor:
    """Sums over the other axes, if there are any: torch takes an empty list of them for all."""
    others = [axis for axis in range(values.dim()) if axis not in kept]
    return values.sum(others) if others else values


def _divided(sums: Tensor, gate: Tensor) -> Tensor:
    """sums / gate; 0 where the gate is 0, or too small for y to have a value."""
    least = torch.finfo(gate.dtype).tiny
    return torch.where(gate > least, sums / gate.clamp(min=least), 0)

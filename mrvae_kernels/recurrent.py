"""LSTM and GRU with one beta a sample: the recurrence written out, each gate row scaled before its non-linearity.

torch's recurrent kernels take one weight for the whole batch, so that they serve a shared beta (folded) only. Here
    LSTM   i, f, c, o = split(g (W_ih x + b_ih + W_hh h + b_hh) + t)
    GRU    r, z       = sigmoid(g (W_ih x + b_ih + W_hh h + b_hh) + t)
           n          = tanh(g (W_in x + b_in) + t + r g (W_hn h + b_hn))
with g and t of shape (N, rows). A Python step for each time step: slower than the folded kernel.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def recurrent_rows(layer: nn.RNNBase) -> int:
    """Gate rows of one layer and direction: 4 H for an LSTM, 3 H for a GRU."""
    return (4 if layer.mode == "LSTM" else 3) * layer.hidden_size


def gated_recurrent(layer: Any, gate: Tensor, shift: Tensor | None, x: Tensor, hx: Any = None) -> tuple[Tensor, Any]:
    """The output and last state of a gated LSTM or GRU, as torch's: x (T, N, K), or (N, T, K) with batch_first.

    gate, shift: (rows,) or (N, rows) with rows = recurrent_rows x layers x directions, in the order of torch's weights.
    ValueError for a packed sequence or unbatched input.
    """
    if not isinstance(x, Tensor):
        raise ValueError("one beta a sample takes a padded batch, not a PackedSequence: pad it, or use one beta")
    if x.dim() != 3:
        raise ValueError(f"x has shape {tuple(x.shape)}; one beta a sample takes a batch with three axes")
    sequence = x.transpose(0, 1) if layer.batch_first else x
    gate, shift = gate.to(x.dtype), None if shift is None else shift.to(x.dtype)
    batch, directions = sequence.shape[1], 2 if layer.bidirectional else 1
    if gate.dim() == 2 and gate.shape[0] != batch:
        raise ValueError(f"gate has shape {tuple(gate.shape)}; expected ({batch}, {gate.shape[1]}) for this batch")
    is_lstm = layer.mode == "LSTM"
    output_size = layer.proj_size or layer.hidden_size
    states = layer.num_layers * directions
    if hx is None:
        hidden = sequence.new_zeros(states, batch, output_size)
        cell = sequence.new_zeros(states, batch, layer.hidden_size) if is_lstm else None
    else:
        layer.check_forward_args(x, hx, None)
        hidden, cell = hx if is_lstm else (hx, None)
    rows = recurrent_rows(layer)
    last_hidden: list[Tensor] = []
    last_cell: list[Tensor] = []
    for k in range(layer.num_layers):
        if k and layer.dropout and layer.training:
            sequence = F.dropout(sequence, layer.dropout)
        outputs = []
        for direction in range(directions):
            index = k * directions + direction
            span = slice(index * rows, (index + 1) * rows)
            weights = _weights(layer, k, "_reverse" if direction else "")
            result, h, c = _run_direction(
                sequence.flip(0) if direction else sequence, hidden[index], None if cell is None else cell[index],
                weights, gate[..., span], None if shift is None else shift[..., span],
            )
            outputs.append(result.flip(0) if direction else result)
            last_hidden.append(h)
            if c is not None:
                last_cell.append(c)
        sequence = torch.cat(outputs, -1)
    output = sequence.transpose(0, 1) if layer.batch_first else sequence
    state = torch.stack(last_hidden)
    return output, (state, torch.stack(last_cell)) if is_lstm else state


def _weights(layer: Any, k: int, suffix: str) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    name = f"l{k}{suffix}"
    return (
        getattr(layer, f"weight_ih_{name}"), getattr(layer, f"weight_hh_{name}"),
        getattr(layer, f"bias_ih_{name}", None), getattr(layer, f"bias_hh_{name}", None),
        getattr(layer, f"weight_hr_{name}", None),
    )


def _run_direction(
    sequence: Tensor, h: Tensor, c: Tensor | None,
    weights: tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None], gate: Tensor, shift: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    w_ih, w_hh, b_ih, b_hh, w_hr = weights
    from_input = gate * F.linear(sequence, w_ih, b_ih)
    if shift is not None:
        from_input = from_input + shift
    outputs = []
    for step in from_input.unbind(0):
        from_state = gate * F.linear(h, w_hh, b_hh)
        if c is not None:
            i, f, g, o = (step + from_state).chunk(4, -1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
            h = h if w_hr is None else F.linear(h, w_hr)
        else:
            (r_x, z_x, n_x), (r_h, z_h, n_h) = step.chunk(3, -1), from_state.chunk(3, -1)
            r, z = torch.sigmoid(r_x + r_h), torch.sigmoid(z_x + z_h)
            n = torch.tanh(n_x + r * n_h)
            h = (1 - z) * n + z * h
        outputs.append(h)
    result = torch.stack(outputs) if outputs else sequence.new_zeros(0, sequence.shape[1], h.shape[-1])
    return result, h, c

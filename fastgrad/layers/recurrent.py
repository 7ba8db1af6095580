"""Recurrent functions (RNN, LSTM, GRU; bidirectional, stacked, with projections) and their cells, step by step."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgrad.layers.call import Call, Refused
from fastgrad.layers.linear import STRAIGHT

MODES = ("lstm", "gru", "rnn_tanh", "rnn_relu")


def step(mode: str, given: Tensor, recurrent: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    """Return the next state from linear functions of the input (``given``) and of the hidden state (``recurrent``)."""
    if mode == "gru":
        (r, z, n), (r_h, z_h, n_h) = given.chunk(3, -1), recurrent.chunk(3, -1)
        z = (z + z_h).sigmoid()
        return (1 - z) * (n + (r + r_h).sigmoid() * n_h).tanh() + z * hidden, cell
    gates = given + recurrent
    if mode == "lstm":
        i, f, g, o = gates.chunk(4, -1)
        cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
        return o.sigmoid() * cell.tanh(), cell
    return (gates.tanh() if mode == "rnn_tanh" else gates.relu()), cell


def run_cell(mode: str, input: Tensor, hx: Any, w_ih: Tensor, w_hh: Tensor, b_ih: Any = None, b_hh: Any = None) -> Any:
    """Compute ``torch.lstm_cell``, ``gru_cell``, ``rnn_tanh_cell`` or ``rnn_relu_cell``."""
    hidden, cell = hx if mode == "lstm" else (hx, hx)
    state = step(mode, F.linear(input, w_ih, b_ih), F.linear(hidden, w_hh, b_hh), hidden, cell)
    return state if mode == "lstm" else state[0]


def run_direction(
    call: Call, mode: str, weights: dict[str, Any], back: bool, x: Tensor, hidden: Tensor, cell: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return all hidden states ``(B, T, H)`` of one direction of one layer for ``x`` ``(B, T, C)``, and the last."""

    def linear(a: Tensor, kind: str) -> Tensor:
        w, b = weights[kind], weights.get(f"b_{kind}")
        return call.tapped([F.linear(a, w, b)], [a], [w, b], STRAIGHT)[0]

    given = linear(x, "ih").unbind(1)
    states = [hidden] * len(given)
    for t in reversed(range(len(given))) if back else range(len(given)):
        hidden, cell = step(mode, given[t], linear(hidden, "hh"), hidden, cell)
        if "hr" in weights:
            hidden = linear(hidden, "hr")
        states[t] = hidden
    return torch.stack(states, 1), hidden, cell


def recurrent(mode: str, call: Call, input: Tensor, *rest: Any) -> Any:
    """Rule for ``torch.lstm``, ``torch.gru``, ``torch.rnn_tanh`` and ``torch.rnn_relu``, one sequence per sample."""
    if not isinstance(rest[2], bool):
        raise Refused("it packs sequences of several lengths")
    hx, weights, biases, layers, dropout, training, both, batch_first = rest
    if not any(map(call.owns, weights)) or input.dim() != 3:
        return NotImplemented
    if not call.serves(*weights) or (dropout and training and layers > 1):
        raise Refused("it draws random numbers inside a recurrent layer, or computes its weights")
    if input.shape[0 if batch_first else 1] != 1:
        raise Refused("it folds other dimensions into the batch of a recurrent layer")
    directions = (False, True) if both else (False,)
    per = len(weights) // layers // len(directions)
    names = ["ih", "hh", *(["b_ih", "b_hh"] if biases else []), "hr"][:per]
    initial = [call.copy_of(h) if call.owns(h) else h for h in (hx if isinstance(hx, (tuple, list)) else [hx])]

    def on_batch() -> Any:
        x = call.spread(input).squeeze(1 if batch_first else 2)  # (B, T, C)
        states = [call.spread(h).squeeze(2) for h in initial]  # (B, layers, H)
        if torch.is_autocast_enabled(x.device.type):
            x, *states = (t.to(torch.get_autocast_dtype(x.device.type)) for t in (x, *states))
        last: list[tuple[Tensor, Tensor]] = []
        for _ in range(layers):
            found = []
            for back in directions:
                at = len(last)
                own = dict(zip(names, weights[at * per : (at + 1) * per], strict=True))
                h, c = states[0][:, at], states[-1][:, at]
                found.append(run_direction(call, mode, own, back, x, h, c))
                last.append(found[-1][1:])
            x = torch.cat([each[0] for each in found], -1)
        ends = [torch.stack(each, 1).unsqueeze(2) for each in zip(*last, strict=True)]
        return x.unsqueeze(1 if batch_first else 2), *ends[: len(states)]

    return call.on_batch(on_batch)


#: By the function, its rule.
RECURRENT: dict[Callable[..., Any], Callable[..., Any]] = {
    getattr(torch, mode): partial(recurrent, mode) for mode in MODES
}
#: By the function, what computes the same in Python.
CELLS: dict[Callable[..., Any], Callable[..., Any]] = {
    getattr(torch, f"{mode}_cell"): partial(run_cell, mode) for mode in MODES
}

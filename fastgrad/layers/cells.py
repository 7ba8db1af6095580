"""Recurrent cells by linear functions, which have rules."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Bias = Tensor | None


def lstm_cell(
    input: Tensor, hx: Any, w_ih: Tensor, w_hh: Tensor, b_ih: Bias = None, b_hh: Bias = None
) -> tuple[Tensor, Tensor]:
    """Compute ``torch.lstm_cell``."""
    hidden, cell = hx
    i, f, g, o = (F.linear(input, w_ih, b_ih) + F.linear(hidden, w_hh, b_hh)).chunk(4, -1)
    cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
    return o.sigmoid() * cell.tanh(), cell


def gru_cell(input: Tensor, hx: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Bias = None, b_hh: Bias = None) -> Tensor:
    """Compute ``torch.gru_cell``."""
    r, z, n = F.linear(input, w_ih, b_ih).chunk(3, -1)
    r_h, z_h, n_h = F.linear(hx, w_hh, b_hh).chunk(3, -1)
    z = (z + z_h).sigmoid()
    return (1 - z) * (n + (r + r_h).sigmoid() * n_h).tanh() + z * hx


def rnn_cell(
    activation: Callable[[Tensor], Tensor],
    input: Tensor, hx: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Bias = None, b_hh: Bias = None,
) -> Tensor:  # fmt: skip
    """Compute ``torch.rnn_tanh_cell`` or ``torch.rnn_relu_cell``."""
    return activation(F.linear(input, w_ih, b_ih) + F.linear(hx, w_hh, b_hh))


#: By the function, what computes the same in Python.
CELLS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.lstm_cell: lstm_cell,
    torch.gru_cell: gru_cell,
    torch.rnn_tanh_cell: partial(rnn_cell, torch.tanh),
    torch.rnn_relu_cell: partial(rnn_cell, torch.relu),
}

"""Recurrent layers: RNN, LSTM and GRU, bidirectional, stacked, with projections."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgrad.layers.linear import bias_sqnorm, weight_sqnorm
from fastgrad.layers.reduce import leaf
from fastgrad.layers.registry import ReplayRule
from fastgrad.losses import compute_dtype


class _Direction:
    """One direction of one layer, unrolled in time.

    The gradients of zeros added to every step's linear maps are the gradients at the outputs of these maps.
    """

    def __init__(self, module: nn.RNNBase, suffix: str, dtype: torch.dtype) -> None:
        self.module, self.suffix, self.dtype = module, suffix, dtype
        self.inputs: dict[str, Tensor] = {}
        self.added: dict[str, Tensor] = {}

    def _parameter(self, name: str) -> Any:
        value = getattr(self.module, f"{name}_{self.suffix}", None)
        return None if value is None else value.to(self.dtype)

    def run(self, x: Tensor, hidden: Tensor, cell: Any, reverse: bool) -> Tensor:
        """All hidden states for ``x`` ``(B, T, C)`` and the initial state; keep the last state in ``hidden, cell``."""
        samples, steps = x.shape[:2]
        w_ih, w_hh, w_hr = (self._parameter(f"weight_{name}") for name in ("ih", "hh", "hr"))
        self.added["ih"] = leaf(x.new_zeros(samples, steps, w_ih.shape[0]))
        projected = F.linear(x, w_ih, self._parameter("bias_ih")) + self.added["ih"]
        mode, b_hh = self.module.mode, self._parameter("bias_hh")
        if mode == "GRU":
            self.added["hh"] = leaf(torch.zeros_like(self.added["ih"]))
        if w_hr is not None:
            self.added["hr"] = leaf(x.new_zeros(samples, steps, w_hr.shape[0]))
        before, unprojected, states = [hidden] * steps, [hidden] * steps, [hidden] * steps
        for t in reversed(range(steps)) if reverse else range(steps):
            before[t] = hidden
            recurrent = F.linear(hidden, w_hh, b_hh)
            if mode == "LSTM":
                i, f, g, o = (projected[:, t] + recurrent).chunk(4, 1)
                cell = torch.sigmoid(f) * cell + torch.sigmoid(i) * torch.tanh(g)
                hidden = torch.sigmoid(o) * torch.tanh(cell)
                if w_hr is not None:
                    unprojected[t] = hidden
                    hidden = F.linear(hidden, w_hr) + self.added["hr"][:, t]
            elif mode == "GRU":
                recurrent = recurrent + self.added["hh"][:, t]
                r, z, n = projected[:, t].chunk(3, 1)
                r_h, z_h, n_h = recurrent.chunk(3, 1)
                z = torch.sigmoid(z + z_h)
                n = torch.tanh(n + torch.sigmoid(r + r_h) * n_h)
                hidden = (1 - z) * n + z * hidden
            else:
                activation = torch.tanh if mode == "RNN_TANH" else torch.relu
                hidden = activation(projected[:, t] + recurrent)
            states[t] = hidden
        self.inputs = {"ih": x.detach(), "hh": torch.stack(before, 1).detach()}
        if w_hr is not None:
            self.inputs["hr"] = torch.stack(unprojected, 1).detach()
        self.hidden, self.cell = hidden, cell
        return torch.stack(states, 1)

    def norms(self, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        """Squared norms from the gradients of what was added."""
        gradients = {"hh": gradients["ih"], **gradients}
        norms = {}
        for name, a in self.inputs.items():
            norms[f"weight_{name}_{self.suffix}"] = weight_sqnorm(a, gradients[name])
            norms[f"bias_{name}_{self.suffix}"] = bias_sqnorm(gradients[name])
        return norms


def recurrent(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], gradients: Sequence[Tensor]
) -> dict[str, Tensor]:
    """Rule for ``torch.nn.RNN``, ``LSTM`` and ``GRU``, computed again step by step."""
    assert isinstance(module, nn.RNNBase)
    given = dict(zip(("input", "hx"), args, strict=False)) | kwargs
    x, state = given["input"], given.get("hx")
    dtype = compute_dtype(gradients[0].dtype)
    x = x.to(dtype) if module.batch_first else x.to(dtype).transpose(0, 1)
    both = 2 if module.bidirectional else 1
    if state is None:
        widths = (module.proj_size or module.hidden_size, module.hidden_size)
        state = [x.new_zeros(both * module.num_layers, x.shape[0], width) for width in widths]
    elif module.mode != "LSTM":
        state = [state]
    hiddens = state[0].to(dtype).unbind(0)
    cells = state[1].to(dtype).unbind(0) if module.mode == "LSTM" else None
    directions: list[_Direction] = []
    with torch.enable_grad():
        for layer in range(module.num_layers):
            parts = []
            for reverse in range(both):
                index = len(directions)
                directions.append(_Direction(module, f"l{layer}" + ("_reverse" if reverse else ""), dtype))
                cell = None if cells is None else cells[index]
                parts.append(directions[index].run(x, hiddens[index], cell, bool(reverse)))
            x = torch.cat(parts, -1) if both == 2 else parts[0]
        outputs = [x if module.batch_first else x.transpose(0, 1), torch.stack([each.hidden for each in directions])]
        if cells is not None:
            outputs.append(torch.stack([each.cell for each in directions]))
        leaves = [zeros for direction in directions for zeros in direction.added.values()]
        found = iter(torch.autograd.grad(outputs, leaves, [g.to(dtype) for g in gradients]))
    norms: dict[str, Tensor] = {}
    for direction in directions:
        norms |= direction.norms({name: next(found) for name in direction.added})
    return norms


RECURRENT = ReplayRule("recurrent", recurrent)

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
    """One direction of one layer, unrolled in time: all hidden states for ``x`` ``(B, T, C)`` and the initial state.

    Zeros are ``added`` to the outputs of every step's linear maps, so that their gradients are those at the outputs.
    The attributes ``hidden`` and ``cell`` are the last state.
    """

    def __init__(self, module: nn.RNNBase, suffix: str, x: Tensor, hidden: Tensor, cell: Tensor) -> None:
        def parameter(name: str) -> Any:
            value = getattr(module, f"{name}_{suffix}", None)
            return None if value is None else value.to(x.dtype)

        samples, steps = x.shape[:2]
        w_ih, w_hh, w_hr = (parameter(f"weight_{name}") for name in ("ih", "hh", "hr"))
        self.added = {"ih": leaf(x.new_zeros(samples, steps, w_ih.shape[0]))}
        projected = F.linear(x, w_ih, parameter("bias_ih")) + self.added["ih"]
        mode, b_hh = module.mode, parameter("bias_hh")
        if mode == "GRU":
            self.added["hh"] = leaf(torch.zeros_like(self.added["ih"]))
        if w_hr is not None:
            self.added["hr"] = leaf(x.new_zeros(samples, steps, w_hr.shape[0]))
        before, unprojected, states = [hidden] * steps, [hidden] * steps, [hidden] * steps
        for t in reversed(range(steps)) if suffix.endswith("reverse") else range(steps):
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
        self.suffix, self.states, self.hidden, self.cell = suffix, torch.stack(states, 1), hidden, cell


def recurrent(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], gradients: Sequence[Tensor]
) -> dict[str, Tensor]:
    """Rule for ``torch.nn.RNN``, ``LSTM`` and ``GRU``, which computes them again step by step."""
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
        state = [state, state]
    hiddens, cells = (part.to(dtype).unbind(0) for part in state)
    directions: list[_Direction] = []
    with torch.enable_grad():
        for layer in range(module.num_layers):
            for suffix in (f"l{layer}", f"l{layer}_reverse")[:both]:
                index = len(directions)
                directions.append(_Direction(module, suffix, x, hiddens[index], cells[index]))
            x = torch.cat([each.states for each in directions[-both:]], -1)
        outputs = [x if module.batch_first else x.transpose(0, 1), torch.stack([each.hidden for each in directions])]
        if module.mode == "LSTM":
            outputs.append(torch.stack([each.cell for each in directions]))
        leaves = [zeros for direction in directions for zeros in direction.added.values()]
        found = iter(torch.autograd.grad(outputs, leaves, [g.to(dtype) for g in gradients]))
    norms: dict[str, Tensor] = {}
    for direction in directions:
        at = {name: next(found) for name in direction.added}
        at.setdefault("hh", at["ih"])
        for name, a in direction.inputs.items():
            norms[f"weight_{name}_{direction.suffix}"] = weight_sqnorm(a, at[name])
            norms[f"bias_{name}_{direction.suffix}"] = bias_sqnorm(at[name])
    return norms


RECURRENT = ReplayRule("recurrent", recurrent)

"""Recurrent functions: RNN, LSTM and GRU, bidirectional, stacked, with projections."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgrad._torch import next_number
from fastgrad.layers.call import Call, Refused
from fastgrad.layers.formula import Formula, Tensors
from fastgrad.layers.linear import bias_sqnorm, weight_sqnorm
from fastgrad.layers.reduce import leaf
from fastgrad.losses import compute_dtype


class _Direction:
    """One direction of one layer, unrolled in time: all hidden states for ``x`` ``(B, T, C)`` and the initial state.

    Zeros are ``added`` to the outputs of every step's linear maps, so that their gradients are those at the outputs.
    The attributes ``hidden`` and ``cell`` are the last state.
    """

    def __init__(
        self, mode: str, weights: dict[str, Tensor], back: bool, x: Tensor, hidden: Tensor, cell: Tensor
    ) -> None:
        weights = {name: value.to(x.dtype) for name, value in weights.items()}
        samples, steps = x.shape[:2]
        self.added = {"ih": leaf(x.new_zeros(samples, steps, weights["ih"].shape[0]))}
        projected = F.linear(x, weights["ih"], weights.get("b_ih")) + self.added["ih"]
        if mode == "gru":
            self.added["hh"] = leaf(torch.zeros_like(self.added["ih"]))
        if "hr" in weights:
            self.added["hr"] = leaf(x.new_zeros(samples, steps, weights["hr"].shape[0]))
        before, unprojected, states = [hidden] * steps, [hidden] * steps, [hidden] * steps
        for t in reversed(range(steps)) if back else range(steps):
            before[t] = hidden
            recurrent = F.linear(hidden, weights["hh"], weights.get("b_hh"))
            if mode == "lstm":
                i, f, g, o = (projected[:, t] + recurrent).chunk(4, 1)
                cell = torch.sigmoid(f) * cell + torch.sigmoid(i) * torch.tanh(g)
                hidden = torch.sigmoid(o) * torch.tanh(cell)
                if "hr" in weights:
                    unprojected[t] = hidden
                    hidden = F.linear(hidden, weights["hr"]) + self.added["hr"][:, t]
            elif mode == "gru":
                recurrent = recurrent + self.added["hh"][:, t]
                r, z, n = projected[:, t].chunk(3, 1)
                r_h, z_h, n_h = recurrent.chunk(3, 1)
                z = torch.sigmoid(z + z_h)
                n = torch.tanh(n + torch.sigmoid(r + r_h) * n_h)
                hidden = (1 - z) * n + z * hidden
            else:
                hidden = (torch.tanh if mode == "rnn_tanh" else torch.relu)(projected[:, t] + recurrent)
            states[t] = hidden
        self.inputs = {"ih": x.detach(), "hh": torch.stack(before, 1).detach()}
        if "hr" in weights:
            self.inputs["hr"] = torch.stack(unprojected, 1).detach()
        self.states, self.hidden, self.cell = torch.stack(states, 1), hidden, cell

    def factors(self, name: str, gradients: dict[str, Tensor]) -> tuple[Tensor | None, Tensor]:
        """Return inputs ``(B, T, C)``, None for a bias, and output gradients ``(B, T, O)`` of a weight."""
        place = name.removeprefix("b_")
        g = gradients.get(place, gradients["ih"])
        return (None if name.startswith("b_") else self.inputs[place]), g


class Recurrent(Formula):
    """Layers that are computed again step by step from their inputs.

    ``names`` are the kinds of the weights in the order of the flat list; ``per`` of them belong to one direction.
    """

    name, replays = "recurrent", True

    def __init__(self, mode: str, weights: Sequence[Tensor], names: Sequence[str], layers: int, both: bool) -> None:
        self._mode, self._weights, self._names, self._layers = mode, [w.detach() for w in weights], names, layers
        self._both, self._versions = 2 if both else 1, [w._version for w in weights]

    def replayed(self, saved: Tensors, gradients: Tensors) -> list[tuple[Tensor | None, Tensor]]:
        """Return inputs ``(B, T, C)``, None for a bias, and output gradients ``(B, T, O)`` of every weight."""
        if [w._version for w in self._weights] != self._versions:
            raise RuntimeError("the weights of a recurrent layer were modified in place since its forward pass")
        dtype = compute_dtype(gradients[0].dtype)
        x, *states = (t.to(dtype) for t in saved)
        hiddens, cells = states[0], states[-1]
        per = len(self._names)
        directions: list[_Direction] = []
        with torch.enable_grad():
            for _ in range(self._layers):
                for back in range(self._both):
                    at = len(directions)
                    own = dict(zip(self._names, self._weights[at * per : (at + 1) * per], strict=True))
                    directions.append(_Direction(self._mode, own, bool(back), x, hiddens[:, at], cells[:, at]))
                x = torch.cat([each.states for each in directions[-self._both :]], -1)
            outputs = [x, torch.stack([each.hidden for each in directions], 1)]
            if self._mode == "lstm":
                outputs.append(torch.stack([each.cell for each in directions], 1))
            leaves = [zeros for direction in directions for zeros in direction.added.values()]
            found = iter(torch.autograd.grad(outputs, leaves, [g.to(dtype) for g in gradients]))
        factors = []
        for direction in directions:
            at_outputs = {name: next(found) for name in direction.added}
            factors += [direction.factors(name, at_outputs) for name in self._names]
        return factors

    def sqnorms(self, saved: Tensors, gradients: Tensors, slots: Sequence[int]) -> list[Tensor]:
        factors = self.replayed(saved, gradients)
        return [bias_sqnorm(g) if a is None else weight_sqnorm(a, g) for a, g in (factors[slot] for slot in slots)]

    def gradient(self, saved: Tensors, gradients: Tensors, slot: int) -> Tensor:
        a, g = self.replayed(saved, gradients)[slot]
        return g.sum(1) if a is None else g.mT @ a


def recurrent(mode: str, function: Callable[..., Any], call: Call, input: Tensor, *rest: Any) -> Any:
    """Rule for ``torch.lstm``, ``torch.gru``, ``torch.rnn_tanh`` and ``torch.rnn_relu``, one sequence a sample."""
    if not isinstance(rest[2], bool):
        raise Refused("it packs sequences of several lengths")
    hx, weights, biases, layers, dropout, training, both, batch_first = rest
    if not any(map(call.owns, weights)) or input.dim() != 3:
        return NotImplemented
    if not call.serves(*weights) or (dropout and training and layers > 1):
        raise Refused("it draws random numbers inside a recurrent layer, or computes its weights")
    states = list(hx) if isinstance(hx, (tuple, list)) else [hx]
    if input.shape[0 if batch_first else 1] != 1:
        raise Refused("it folds other dimensions into the batch of a recurrent layer")
    projected = mode == "lstm" and len(weights) // layers // (2 if both else 1) == (5 if biases else 3)
    names = ["ih", "hh", *(["b_ih", "b_hh"] if biases else []), *(["hr"] if projected else [])]

    def on_batch() -> Any:
        begin = next_number()
        x = call.spread(input, call.physical(input)).squeeze(1 if batch_first else 2)  # (B, T, C)
        given = [call.spread(h, call.physical(h)).squeeze(2) for h in states]  # (B, layers, H)
        flat = [h.transpose(0, 1).contiguous() for h in given]
        initial = flat if mode == "lstm" else flat[0]
        outputs = list(function(x, initial, list(weights), biases, layers, dropout, training, both, True))
        outputs = [outputs[0], *(h.transpose(0, 1) for h in outputs[1:])]
        formula = Recurrent(mode, weights, names, layers, both)
        found = call.tapped(outputs, [x, *given], weights, formula, begin, in_place=False)
        sequence = found[0].unsqueeze(1 if batch_first else 2)
        return (sequence, *(h.unsqueeze(2) for h in found[1:]))

    return call.on_batch(on_batch)


#: By the function, its rule.
RECURRENT: dict[Callable[..., Any], Callable[..., Any]] = {
    function: partial(recurrent, mode, function)
    for mode, function in (
        ("lstm", torch.lstm), ("gru", torch.gru), ("rnn_tanh", torch.rnn_tanh), ("rnn_relu", torch.rnn_relu),
    )
}  # fmt: skip

"""Distance to the nearest clean samples."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastgrad.scores.fitted import Fitted, as_buffer


class NearestNeighbours(Fitted):
    """Distance to the k-th nearest clean sample: ``s(x) = ||x - x_(k)||``.

    Sun, Ming, Zhu and Li, "Out-of-distribution detection with deep nearest neighbors", 2022, on features of
    unit length; as there, a part of the clean samples serves as well as all of them.

    Buffers: ``bank`` ``(n, d)``, the clean samples.
    """

    bank: Tensor

    @classmethod
    def fit(
        cls, rows: NDArray[np.float64], neighbours: int, *, most: int = 4 * 2**20, seed: int = 0
    ) -> NearestNeighbours:
        """From clean rows.

        Args:
            rows: ``(n, d)``.
            neighbours: k; at most n.
            most: Bytes that the bank may take. A larger one is held, and distances measured, in float32; if it is
                too large still, a random part of it is kept, at least k rows.
            seed: Of that choice.
        """
        bank = as_buffer(rows)
        if bank.nbytes > most:
            room = max(neighbours, most // (4 * bank.shape[1]))
            if len(bank) > room:
                bank = bank[np.sort(np.random.default_rng(seed).choice(len(bank), room, replace=False))]
            bank = bank.float()
        return cls(bank=bank, neighbours=min(neighbours, len(bank)))

    def forward(self, rows: Tensor) -> Tensor:
        """Scores ``(B,)`` of ``rows`` ``(B, d)``, in the dtype of the rows."""
        own = rows.to(self.bank.dtype)
        squares = own.square().sum(-1, keepdim=True) + self.bank.square().sum(-1)
        distance = (squares - 2 * own @ self.bank.T).clamp(min=0)
        nearest = torch.topk(distance, self.options["neighbours"], dim=-1, largest=False).values
        return nearest[:, -1].sqrt().to(rows.dtype)

"""Distance to the nearest clean samples."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .fitted import Fitted, as_buffer


class NearestNeighbours(Fitted):
    """Distance to the k-th nearest clean sample: ``s(x) = ||x - x_(k)||``.

    Sun, Ming, Zhu and Li, "Out-of-distribution detection with deep nearest neighbors", 2022, on features of
    unit length; as there, a part of the clean samples serves as well as all of them.

    Buffers: ``bank`` ``(n, d)``, the clean samples.
    """

    bank: Tensor

    @classmethod
    def fit(
        cls, rows: NDArray[np.float64], neighbours: int, *, most: int | None = None, seed: int = 0
    ) -> NearestNeighbours:
        """From clean rows.

        Args:
            rows: ``(n, d)``.
            neighbours: k; at most n.
            most: Bytes that the bank may take, in float32: of more rows a random part is kept, at least k, and
                distances are measured in float32. None keeps all rows in float64.
            seed: Of that choice.
        """
        if most is not None:
            room = max(neighbours, most // (4 * rows.shape[1]))
            if len(rows) > room:
                rows = rows[np.sort(np.random.default_rng(seed).choice(len(rows), room, replace=False))]
        bank = as_buffer(rows)
        return cls(bank=bank if most is None else bank.float(), neighbours=min(neighbours, len(rows)))

    def forward(self, rows: Tensor) -> Tensor:
        """Scores ``(B,)`` of ``rows`` ``(B, d)``, in the dtype of the rows."""
        own = rows.to(self.bank.dtype)
        squares = own.square().sum(-1, keepdim=True) + self.bank.square().sum(-1)
        distance = (squares - 2 * own @ self.bank.T).clamp(min=0)
        nearest = torch.topk(distance, self.options["neighbours"], dim=-1, largest=False).values
        return nearest[:, -1].sqrt().to(rows.dtype)

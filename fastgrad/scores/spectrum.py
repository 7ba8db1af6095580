"""Principal directions and shrinkage of rows that may have far more columns than there are rows."""

from __future__ import annotations

import torch
from torch import Tensor


def principal(centred: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Eigenvalues and leading eigenvectors of ``centred^T centred / n``, largest first.

    They come from the products of rows where those are fewer than the columns. Each vector's largest entry is positive,
    so that the same rows give the same directions.

    Args:
        centred: Rows ``(n, d)`` of mean zero, float64.
        rank: How many directions, at most; those without variance beyond rounding are left out.

    Returns:
        All variances ``(min(n, d),)``, and directions ``(d, r)`` of unit length, r from 1 to ``rank``.
    """
    n, d = centred.shape
    wide = d > n
    values, vectors = torch.linalg.eigh((centred @ centred.T if wide else centred.T @ centred) / n)
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    # An eigenvalue is known to some eps of the largest one.
    known = int((values > 10 * max(n, d) * torch.finfo(values.dtype).eps * values[0]).sum())
    vectors = vectors[:, : max(1, min(rank, known))]
    if wide:
        vectors = centred.T @ vectors
        vectors = vectors / vectors.norm(dim=0).clamp(min=torch.finfo(vectors.dtype).tiny)
    return values, vectors * vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()


def shrinkage(values: Tensor, centred: Tensor) -> tuple[float, float]:
    """Rho in [0, 1] and m, the mean variance, by which a covariance S is shrunk as by Ledoit and Wolf (2004).

    ``(1 - rho) S + rho m I`` is nearest to the true covariance in expected Frobenius norm. The trace of ``S^2`` is the
    sum of its squared eigenvalues, the ``values`` of `principal` of the rows ``centred`` ``(n, d)``: S is not needed.
    """
    n, d = centred.shape
    mean = float(values.sum()) / d
    squares = float(values.square().sum())
    distance = squares / d - mean**2
    error = (float(centred.square().sum(1).square().sum()) / n - squares) / (n * d)
    return (min(error / distance, 1.0) if distance > 0 and error > 0 else 0.0), mean

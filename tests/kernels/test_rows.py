"""The linear layer over the contrast rows against the float64 product with the rows written out."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")

from fastgrad.ops import heuristics  # noqa: E402
from fastgrad.ops.heuristics import RowsConfig  # noqa: E402
from fastgrad.ops.triton.rows import contrast_rows_linear  # noqa: E402

PATHS = {
    "whole": RowsConfig(16, 16, 16, 1, "ieee", 4, 2),
    "shared": RowsConfig(16, 16, 16, 3, "ieee", 4, 2),
}

pytestmark = pytest.mark.usefixtures("poison")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_against_the_rows_written_out(dtype: torch.dtype, path: str, device: torch.device) -> None:
    B, N, D, U = 20, 5, 33, 18
    generator = torch.Generator().manual_seed(1)
    h = torch.randn(D, B, generator=generator).to(dtype).T
    d = torch.randn(N, B, generator=generator).T
    V = torch.randn(U, 2 * N * D, generator=generator).to(dtype)[:, ::2]
    c = torch.randn(U, generator=generator).to(dtype)
    with heuristics.override(rows_linear=PATHS[path]):
        y = contrast_rows_linear(h.to(device), d.to(device), V.to(device), c.to(device))
    assert y.dtype == torch.float32
    r = (d.double()[:, :, None] * h.double()[:, None]).flatten(1)
    exact, size = r @ V.double().T + c.double(), r.abs() @ V.double().abs().T
    # The left operand is rounded once, to dtype; N D products are then added up in float32.
    unit = torch.finfo(dtype).eps / 2 + (N * D + 8) * torch.finfo(torch.float32).eps
    assert ((y.double().cpu() - exact).abs() <= unit * (size + c.double().abs())).all()


@pytest.mark.parametrize("path", PATHS)
def test_nan_stays_in_its_row(path: str, device: torch.device) -> None:
    h = torch.ones(17, 16, device=device)
    h[3, 2] = torch.nan
    with heuristics.override(rows_linear=PATHS[path]):
        y = contrast_rows_linear(h, torch.ones(17, 3, device=device), torch.ones(2, 48, device=device), None)
    assert y[3].isnan().all()
    assert (torch.cat([y[:3], y[4:]]) == 48).all()


def test_empty_and_single(device: torch.device) -> None:
    weight = torch.full((1, 1), 3.0, device=device)
    assert contrast_rows_linear(
        torch.ones(0, 1, device=device), torch.ones(0, 1, device=device), weight, None
    ).shape == (0, 1)
    y = contrast_rows_linear(
        torch.full((1, 1), 2.0, device=device), torch.full((1, 1), 5.0, device=device), weight, None
    )
    assert y.tolist() == [[30.0]]

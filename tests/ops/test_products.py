"""Batched products by convolution equal ``torch.bmm``, and are taken only where they may be."""

from __future__ import annotations

import pytest
import torch

from fastgrad.ops.conv import products


@pytest.mark.parametrize("shape", [(3, 128, 64, 17), (1, 32, 256, 256), (2, 64, 128, 1), (5, 48, 176, 33)])
def test_equals_float64(shape: tuple[int, int, int, int]) -> None:
    batch, rows, inner, columns = shape
    assert products.suits(rows, inner)
    left, right = torch.randn(batch, rows, inner), torch.randn(batch, inner, columns)
    found = products.product(left, right, concrete=True)
    # A sum of `inner` products, each rounded relative to itself, in any order.
    bound = (inner + 2) * torch.finfo(torch.float32).eps * torch.bmm(left.abs(), right.abs())
    assert ((found - torch.bmm(left.double(), right.double())).abs() <= bound).all()


@pytest.mark.parametrize(
    ("rows", "inner", "dtype"), [(30, 512, torch.float32), (16, 16, torch.float32), (128, 128, torch.float64)]
)
def test_other_operands_take_bmm(rows: int, inner: int, dtype: torch.dtype) -> None:
    left, right = torch.randn(2, rows, inner, dtype=dtype), torch.randn(2, inner, 5, dtype=dtype)
    assert torch.equal(products.product(left, right, concrete=True), torch.bmm(left, right))


def test_transposed_operands_and_tracing_take_bmm() -> None:
    left, right = torch.randn(2, 128, 128), torch.randn(2, 128, 7)
    expected = torch.bmm(left.transpose(1, 2), right)
    assert torch.equal(products.product(left.transpose(1, 2), right, concrete=True), expected)
    assert torch.equal(products.product(left, right, concrete=False), torch.bmm(left, right))

"""Statistics over all contrasts from features and weight: against 80 digits, and against the matrix never written."""

from __future__ import annotations

import math

import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import PROMISE

triton = pytest.importorskip("triton")

from bench.gpu.compile_cases import configured  # noqa: E402
from bench.gpu.sanitize.cases import TILE  # noqa: E402
from fastgrad.ops.triton import devices  # noqa: E402
from fastgrad.ops.triton.contrasts import contrast_sqnorm, linear_contrast_stats  # noqa: E402

LOSSES = ("cross_entropy", "bce", "mse")

pytestmark = pytest.mark.usefixtures("poison")


def head(
    B: int, N: int, D: int, seed: int, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features of growing length, so that rows go from unsure to confident; weight and bias."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(B, D, generator=generator) * torch.linspace(0.1, 8, max(B, 1))[:B, None]
    w = torch.randn(N, D, generator=generator) / math.sqrt(D)
    return x.to(dtype), w.to(dtype), torch.randn(N, generator=generator).to(dtype)


def check(got: torch.Tensor, x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None, loss: str) -> None:
    """Compare statistics of float32 layers with those of the float64 product's norms."""
    x, w, b = x.double().cpu(), w.double().cpu(), None if b is None else b.double().cpu()
    z = torch.nn.functional.linear(x, w, b)
    v = oracles.contrast_matrix(z, loss) * (x.square().sum(1, keepdim=True) + (b is not None))
    p = z.softmax(-1)
    predicted = v.gather(1, z.argmax(1, keepdim=True))[:, 0]
    expected = torch.stack([v.amin(1), v.amax(1), v.mean(1), (p * v).sum(1), predicted], 1)
    # The kernel's logits are off by their own rounding, a few 1e-7 of their size, and the values follow them: exp(4 z)
    # is the steepest.
    slack = 1 + 4 * z.abs().amax(1, keepdim=True)
    assert ((got.double().cpu() / expected - 1).abs() <= PROMISE * slack / 4 + PROMISE).all()


@pytest.mark.parametrize("loss", LOSSES)
def test_statistics(loss: str, device: torch.device) -> None:
    x, w, b = (t.to(device) for t in head(18, 70, 21, seed=8))
    w[3], b[3] = w[9], b[9]  # a tie
    with configured(linear_stats=(TILE, 2)):
        got = linear_contrast_stats(x, w, b, loss, False)
    rows = [0, 7, 16, 17]
    check(got[rows], x[rows], w, b, loss)


@settings(max_examples=12, deadline=None)
@given(
    B=st.integers(1, 34),
    N=st.integers(2, 50),
    D=st.integers(1, 40),
    ties=st.booleans(),
    tiles=st.integers(1, 4),
    loss=st.sampled_from(LOSSES),
    seed=st.integers(0, 2**31),
)
def test_any_shape(B: int, N: int, D: int, ties: bool, tiles: int, loss: str, seed: int) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    x, w, b = (t.to(device) for t in head(B, N, D, seed))
    if ties:
        # Every logit stands twice, the largest too; the copies lie in different tiles where there is more than one.
        w[N - N // 2 :], b[N - N // 2 :] = w[: N // 2].clone(), b[: N // 2].clone()
    with configured(linear_stats=(TILE, tiles)):
        got = linear_contrast_stats(x, w, b, loss, False)
    rows = [0, B - 1]
    check(got[rows], x[rows], w, b, loss)


def test_strides_without_bias(device: torch.device) -> None:
    x, w, _ = (t.to(device) for t in head(20, 19, 24, seed=3))
    x, w = x.T.contiguous().T[::2, ::2], w[:, ::2]
    check(linear_contrast_stats(x, w, None, "bce", True) * 19.0**2, x, w, None, "bce")


def test_one_class_and_one_feature(device: torch.device) -> None:
    for loss in LOSSES:
        x, w, b = (t.to(device) for t in head(3, 1, 1, seed=4))
        out = contrast_sqnorm(x, torch.nn.functional.linear(x, w, b), loss, True, False, False)
        stats = linear_contrast_stats(x, w, b, loss, False)
        torch.testing.assert_close(stats, out.expand(3, 5), rtol=PROMISE, atol=0)


def test_empty_batch(device: torch.device) -> None:
    _, w, b = (t.to(device) for t in head(1, 5, 4, seed=5))
    assert linear_contrast_stats(torch.ones(0, 4, device=device), w, b, "bce", False).shape == (0, 5)


def test_nan_stays_in_its_row(device: torch.device) -> None:
    x, w, b = (t.to(device) for t in head(18, 20, 8, seed=6))
    x[4, 3], x[17, 0] = math.nan, math.inf
    with configured(linear_stats=(TILE, 2)):
        stats = linear_contrast_stats(x, w, b, "cross_entropy", False)
    assert stats[[4, 17]].isnan().all()
    assert stats[[i for i in range(18) if i not in (4, 17)]].isfinite().all()


def test_half_precision(device: torch.device) -> None:
    dtype = torch.float16  # the interpreter truncates where bfloat16 is rounded
    x, w, b = (t.to(device) for t in head(18, 40, 16, seed=9, dtype=dtype))
    for loss in ("bce", "cross_entropy"):
        with configured(linear_stats=(TILE, 2)):
            got = linear_contrast_stats(x, w, b, loss, True)
        # Products of halves are exact in float32, and so few of them add up without a change of the rounded logits.
        z = torch.nn.functional.linear(x.float(), w.float(), b.float()).to(dtype)
        v = contrast_sqnorm(x, z, loss, True, False, True)
        top = z.float().argmax(1, keepdim=True)
        expected = torch.stack(
            [v.amin(1), v.amax(1), v.mean(1), (z.float().softmax(1) * v).sum(1), v.gather(1, top)[:, 0]], 1
        )
        torch.testing.assert_close(got, expected, rtol=2 * PROMISE, atol=0)


def test_no_matrix_is_allocated(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    sizes: list[int] = []
    plain = devices.empty

    def counted(shape: tuple[int, ...], dtype: torch.dtype, like: torch.Tensor) -> torch.Tensor:
        sizes.append(math.prod(shape))
        return plain(shape, dtype, like)

    monkeypatch.setattr(devices, "empty", counted)
    x, w, b = (t.to(device) for t in head(16, 4096, 16, seed=10))
    with configured(linear_stats=({**TILE, "BLOCK_N": 256}, 8)):
        linear_contrast_stats(x, w, b, "bce", False)
    assert sum(sizes) < 16 * 64 < 16 * 4096


def test_offsets_beyond_32_bits(device: torch.device) -> None:
    # Reserved, not touched: rows of the features and of the weight lie 2^31 elements apart.
    storage = torch.empty(2**31 + 64, dtype=torch.float16, device=device)
    x, w = storage.as_strided((2, 8), (2**31, 1)), storage[16:].as_strided((2, 8), (2**31, 1))
    values_x, values_w, b = (t.to(device) for t in head(2, 2, 8, seed=11, dtype=torch.float16))
    x.copy_(values_x)
    w.copy_(values_w)
    with configured(linear_stats=(TILE, 2)):
        stats = linear_contrast_stats(x, w, b, "bce", False)
    z = torch.nn.functional.linear(x.float(), w.float(), b.float()).half()
    out = contrast_sqnorm(values_x, z, "bce", True, False, False)
    torch.testing.assert_close(stats[:, 0], out.amin(1), rtol=PROMISE, atol=0)

"""Statistics over all contrasts of logits that exist: against the matrix that is never written, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from oracles import PROMISE, SMALLEST_NORMAL, contrast_matrix

triton = pytest.importorskip("triton")

from bench.gpu.compile_cases import configured  # noqa: E402
from bench.gpu.sanitize.cases import PATHS  # noqa: E402
from fastgrad.ops.triton import devices  # noqa: E402
from fastgrad.ops.triton.contrasts import contrast_stats  # noqa: E402

LOSSES = ("cross_entropy", "bce", "mse", "brier")

pytestmark = pytest.mark.usefixtures("poison")


def check(got: torch.Tensor, h: torch.Tensor, z: torch.Tensor, loss: str, *, bias: bool = True) -> None:
    h, z = h.double().cpu(), z.double().cpu()
    v = contrast_matrix(z, loss) * (h.square().sum(1, keepdim=True) + bias)
    p = z.softmax(-1)
    predicted = v.gather(1, z.argmax(1, keepdim=True))[:, 0]
    expected = torch.stack([v.amin(1), v.amax(1), v.mean(1), (p * v).sum(1), predicted], 1)
    torch.testing.assert_close(got.double().cpu(), expected, rtol=PROMISE, atol=SMALLEST_NORMAL)


def rows(B: int, N: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Features, and logits that go from unsure to confident."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.linspace(0.01, 15, B)[:, None]
    return torch.randn(B, 19, generator=generator), torch.randn(B, N, generator=generator) * spread


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("loss", LOSSES)
def test_statistics(loss: str, path: str, device: torch.device) -> None:
    h, z = rows(6, 37, seed=8)
    z[3, 30] = z[3].amax()  # a tie, in two tiles
    with configured(last_layer=PATHS[path]):
        got = contrast_stats(h.to(device), z.to(device), loss, True, False)
    check(got, h, z, loss)


@settings(max_examples=12, deadline=None)
@given(
    B=st.integers(1, 9),
    N=st.integers(1, 70),
    ties=st.booleans(),
    path=st.sampled_from(sorted(PATHS)),
    loss=st.sampled_from(LOSSES),
    seed=st.integers(0, 2**31),
)
@example(B=4, N=2, ties=False, path="rows", loss="cross_entropy", seed=1223)  # a norm below float32's range
def test_any_shape(B: int, N: int, ties: bool, path: str, loss: str, seed: int) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    h, z = rows(B, N, seed)
    if ties:
        z[:, N - N // 2 :] = z[:, : N // 2].clone()
    with configured(last_layer=PATHS[path if N <= 64 else "tiles"]):
        got = contrast_stats(h.to(device), z.to(device), loss, False, False)
    check(got, h, z, loss, bias=False)


def test_strides_mean_and_half_precision(device: torch.device) -> None:
    h, z = (t.bfloat16() for t in rows(8, 38, seed=3))
    h, z = h.T.contiguous().T[::2, ::2], z[::2, ::2]
    check(contrast_stats(h.to(device), z.to(device), "bce", True, True) * 19.0**2, h, z, "bce")


def test_empty_batch(device: torch.device) -> None:
    out = contrast_stats(torch.ones(0, 4, device=device), torch.ones(0, 5, device=device), "bce", True, False)
    assert out.shape == (0, 5)


@pytest.mark.parametrize("path", PATHS)
def test_nan_stays_in_its_row(path: str, device: torch.device) -> None:
    h, z = rows(5, 37, seed=6)
    z[1, 3], z[4, 0], h[2, 1] = math.nan, math.inf, math.nan
    with configured(last_layer=PATHS[path]):
        stats = contrast_stats(h.to(device), z.to(device), "cross_entropy", True, False)
    assert stats[[1, 2, 4]].isnan().all()
    assert stats[[0, 3]].isfinite().all()


def test_no_matrix_is_allocated(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    sizes: list[int] = []
    plain = devices.empty

    def counted(shape: tuple[int, ...], dtype: torch.dtype, like: torch.Tensor) -> torch.Tensor:
        sizes.append(math.prod(shape))
        return plain(shape, dtype, like)

    monkeypatch.setattr(devices, "empty", counted)
    h, z = (t.to(device) for t in rows(3, 20_000, seed=10))
    contrast_stats(h, z, "bce", True, False)
    assert sum(sizes) < z.numel() / 50

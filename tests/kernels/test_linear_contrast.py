"""The fused last layer: its logits against the float64 product, its norms against 80 digits on those logits."""

from __future__ import annotations

import math

import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import PROMISE, check_contrasts

triton = pytest.importorskip("triton")

from bench.gpu.compile_cases import configured  # noqa: E402
from bench.gpu.sanitize.cases import HEADS as PATHS  # noqa: E402
from bench.gpu.sanitize.cases import TILE  # noqa: E402
from fastgrad.ops.triton import devices  # noqa: E402
from fastgrad.ops.triton.last_layer import (  # noqa: E402
    contrast_sqnorm,
    linear_contrast_sqnorm,
    linear_contrast_stats,
)

LOSSES = ("cross_entropy", "bce", "mse", "brier")

pytestmark = pytest.mark.usefixtures("poison")


def head(
    B: int, N: int, D: int, seed: int, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features of growing length, so that rows go from unsure to confident; weight and bias."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(B, D, generator=generator) * torch.linspace(0.1, 8, max(B, 1))[:B, None]
    w = torch.randn(N, D, generator=generator) / math.sqrt(D)
    return x.to(dtype), w.to(dtype), torch.randn(N, generator=generator).to(dtype)


def check_logits(z: torch.Tensor, x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None) -> None:
    """Float32 sums of D products err by at most about D eps of the sum of magnitudes; then one rounding."""
    x, w = x.double().cpu(), w.double().cpu()
    exact, size = x @ w.T, x.abs() @ w.T.abs()
    if b is not None:
        exact, size = exact + b.double().cpu(), size + b.double().cpu().abs()
    unit = torch.finfo(torch.float32).eps
    # On tensor cores float32 is multiplied as three TF32 products, which leaves an error of a few 2^-22.
    allowed = (x.shape[1] + 8) * unit * size + torch.finfo(z.dtype).eps * exact.abs()
    assert ((z.double().cpu() - exact).abs() <= allowed).all()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("loss", LOSSES)
def test_every_path(loss: str, path: str, device: torch.device) -> None:
    # Three row blocks in groups of two, the last block and the last group incomplete; D not a multiple of the block.
    x, w, b = (t.to(device) for t in head(35, 37, 21, seed=1))
    log = path == "launch"
    with configured(linear_contrast=PATHS[path]):
        z, out = linear_contrast_sqnorm(x, w, b, loss, log, False)
    assert z.dtype == torch.float32
    check_logits(z, x, w, b)
    check_contrasts(out, x, z, loss, log, True, rows=[0, 15, 16, 34])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_norms_are_those_of_the_rounded_logits(dtype: torch.dtype, device: torch.device) -> None:
    x, w, b = (t.to(device) for t in head(18, 33, 32, seed=2, dtype=dtype))
    for path in ("last", "launch"):
        with configured(linear_contrast=PATHS[path]):
            z, out = linear_contrast_sqnorm(x, w, b, "cross_entropy", False, False)
        assert z.dtype == dtype
        check_logits(z, x, w, b)
        check_contrasts(out, x, z, "cross_entropy", False, True, rows=[0, 17])
        unfused = contrast_sqnorm(x, z, "cross_entropy", True, False, False)
        torch.testing.assert_close(out, unfused, rtol=PROMISE, atol=0)


def test_strides_without_bias_and_mean(device: torch.device) -> None:
    x, w, _ = (t.to(device) for t in head(20, 19, 24, seed=3))
    x, w = x.T.contiguous().T[::2, ::2], w[:, ::2]
    with configured(linear_contrast=PATHS["last"]):
        z, out = linear_contrast_sqnorm(x, w, None, "brier", False, True)
    check_logits(z, x, w, None)
    check_contrasts(out * 19.0**2, x, z, "brier", False, False, rows=[0, 9])


def test_one_class_and_one_feature(device: torch.device) -> None:
    for loss in LOSSES:
        x, w, b = (t.to(device) for t in head(3, 1, 1, seed=4))
        z, out = linear_contrast_sqnorm(x, w, b, loss, False, False)
        check_logits(z, x, w, b)
        check_contrasts(out, x, z, loss, False, True, rows=[0, 1, 2])
        stats = linear_contrast_stats(x, w, b, loss, False)
        torch.testing.assert_close(stats, out.expand(3, 5), rtol=PROMISE, atol=0)


def test_empty_batch(device: torch.device) -> None:
    _, w, b = (t.to(device) for t in head(1, 5, 4, seed=5))
    x = torch.ones(0, 4, device=device)
    z, out = linear_contrast_sqnorm(x, w, b, "bce", False, False)
    assert z.shape == out.shape == (0, 5)
    assert linear_contrast_stats(x, w, b, "bce", False).shape == (0, 5)


@pytest.mark.parametrize("path", ["last", "launch"])
def test_nan_stays_in_its_row(path: str, device: torch.device) -> None:
    x, w, b = (t.to(device) for t in head(18, 20, 8, seed=6))
    x[4, 3], x[17, 0] = math.nan, math.inf
    with configured(linear_contrast=PATHS[path], linear_stats=(TILE, 2)):
        z, out = linear_contrast_sqnorm(x, w, b, "cross_entropy", False, False)
        stats = linear_contrast_stats(x, w, b, "cross_entropy", False)
    good = [i for i in range(18) if i not in (4, 17)]
    assert out[[4, 17]].isnan().all()
    assert stats[[4, 17]].isnan().all()
    assert out[good].isfinite().all()
    assert stats[good].isfinite().all()
    check_contrasts(out, x, z, "cross_entropy", False, True, rows=[0, 3, 5, 16])


def test_equal_calls_give_equal_bits(device: torch.device) -> None:
    x, w, b = (t.to(device) for t in head(18, 37, 21, seed=7))
    found = {}
    for path in ("last", "launch"):
        with configured(linear_contrast=PATHS[path]):
            first, second = (linear_contrast_sqnorm(x, w, b, "brier", False, False) for _ in range(2))
        assert torch.equal(first[0], second[0])
        assert torch.equal(first[1], second[1])
        found[path] = first[1]
    if device.type == "cpu":
        # A compiler may contract the same operations differently in two kernels; the interpreter contracts nothing.
        assert torch.equal(found["launch"], found["last"])


@settings(max_examples=12, deadline=None)
@given(
    B=st.integers(1, 34),
    N=st.integers(1, 50),
    D=st.integers(1, 40),
    ties=st.booleans(),
    path=st.sampled_from(sorted(PATHS)),
    loss=st.sampled_from(LOSSES),
    log=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_shape(B: int, N: int, D: int, ties: bool, path: str, loss: str, log: bool, seed: int) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    x, w, b = (t.to(device) for t in head(B, N, D, seed))
    if ties:
        # Every logit stands twice, the largest too; the copies lie in different tiles where there is more than one.
        w[N - N // 2 :], b[N - N // 2 :] = w[: N // 2].clone(), b[: N // 2].clone()
    with configured(linear_contrast=PATHS[path]):
        z, out = linear_contrast_sqnorm(x, w, b, loss, log, False)
    check_logits(z, x, w, b)
    check_contrasts(out, x, z, loss, log, True, rows=[0, B - 1])


@pytest.mark.parametrize("loss", LOSSES)
def test_statistics(loss: str, device: torch.device) -> None:
    x, w, b = (t.to(device) for t in head(18, 70, 21, seed=8))
    w[3], b[3] = w[9], b[9]  # a tie
    with configured(linear_stats=(TILE, 2)):
        got = linear_contrast_stats(x, w, b, loss, False).double().cpu()
    z = torch.nn.functional.linear(x, w, b)
    rows = [0, 7, 16, 17]
    z, x = z[rows].double().cpu(), x[rows].double().cpu()
    v = oracles.contrast_matrix(z, loss) * (x.square().sum(1, keepdim=True) + 1)
    p = z.softmax(-1)
    predicted = v.gather(1, z.argmax(1, keepdim=True))[:, 0]
    expected = torch.stack([v.amin(1), v.amax(1), v.mean(1), (p * v).sum(1), predicted], 1)
    # The logits differ from the kernel's by their own rounding, a few 1e-7 of their size, and the values follow them:
    # exp(4 z) is the steepest.
    slack = 1 + 4 * z.abs().amax(1, keepdim=True)
    assert ((got[rows] / expected - 1).abs() <= PROMISE * slack / 4 + PROMISE).all()


def test_statistics_of_half_precision_match_the_written_matrix(device: torch.device) -> None:
    x, w, b = (t.to(device) for t in head(18, 40, 16, seed=9, dtype=torch.bfloat16))
    for loss in ("bce", "brier"):
        with configured(linear_stats=(TILE, 2), linear_contrast=PATHS["last"]):
            got = linear_contrast_stats(x, w, b, loss, True)
            z, v = linear_contrast_sqnorm(x, w, b, loss, False, True)
        top = z.float().argmax(1, keepdim=True)
        expected = torch.stack(
            [v.amin(1), v.amax(1), v.mean(1), (z.float().softmax(1) * v).sum(1), v.gather(1, top)[:, 0]], 1
        )
        torch.testing.assert_close(got, expected, rtol=2 * PROMISE, atol=0)


def test_statistics_never_allocate_the_matrix(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    sizes: list[int] = []
    plain = devices.empty

    def counted(shape: tuple[int, ...], dtype: torch.dtype, like: torch.Tensor) -> torch.Tensor:
        sizes.append(math.prod(shape))
        return plain(shape, dtype, like)

    monkeypatch.setattr(devices, "empty", counted)
    x, w, b = (t.to(device) for t in head(16, 4096, 16, seed=10))
    with configured(linear_stats=({**TILE, "BLOCK_N": 256}, 8)):
        linear_contrast_stats(x, w, b, "brier", False)
    assert sum(sizes) < 16 * 64 < 16 * 4096


def test_offsets_beyond_32_bits(device: torch.device) -> None:
    # Reserved, not touched: rows of the features and of the weight lie 2^31 elements apart.
    storage = torch.empty(2**31 + 64, dtype=torch.float16, device=device)
    x, w = storage.as_strided((2, 8), (2**31, 1)), storage[16:].as_strided((2, 8), (2**31, 1))
    values_x, values_w, b = (t.to(device) for t in head(2, 2, 8, seed=11, dtype=torch.float16))
    x.copy_(values_x)
    w.copy_(values_w)
    with configured(linear_contrast=PATHS["launch"], linear_stats=(TILE, 2)):
        z, out = linear_contrast_sqnorm(x, w, b, "bce", False, False)
        stats = linear_contrast_stats(x, w, b, "bce", False)
    check_logits(z, x, w, b)
    check_contrasts(out, x, z, "bce", False, True, rows=[0, 1])
    torch.testing.assert_close(stats[:, 0], out.amin(1), rtol=PROMISE, atol=0)

"""All-contrast squared norms: every launch path against 80-digit arithmetic."""

from __future__ import annotations

import math
import pathlib

import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import PROMISE, SMALLEST_NORMAL, check_contrasts

triton = pytest.importorskip("triton")

from bench.gpu.compile_cases import configured  # noqa: E402
from bench.gpu.sanitize.cases import PATHS  # noqa: E402
from fastgrad.losses import contrast_norms  # noqa: E402
from fastgrad.ops import last_layer  # noqa: E402
from fastgrad.ops.triton.contrasts import contrast_sqnorm  # noqa: E402

LOSSES = ("cross_entropy", "bce", "mse", "brier")
pytestmark = pytest.mark.usefixtures("poison")


def by_margins(n: int, seed: int, margins: tuple[float, ...] = (0, 0.01, 1, 5, 10, 20, 30, 40)) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.cat([oracles.confident_logits(1, n, margin, generator) for margin in margins])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
def test_margins(loss: str, log: bool, path: str, device: torch.device) -> None:
    # The interpreter takes its time for every program, and this path has several for every row.
    margins = (0.0, 0.01, 1.0, 5.0, 10.0, 20.0, 30.0, 40.0) if path == "rows" else (0.01, 40.0)
    logits = by_margins(37, 1, margins)
    features = torch.randn(len(logits), 19, generator=torch.Generator().manual_seed(2))
    with configured(last_layer=PATHS[path]):
        out = contrast_sqnorm(features.to(device), logits.to(device), loss, True, log, False)
    check_contrasts(out, features, logits, loss, log)


@pytest.mark.parametrize("loss", LOSSES)
def test_logarithm_beyond_underflow(loss: str, device: torch.device) -> None:
    logits = by_margins(9, seed=3, margins=(60, 200))
    features = torch.ones(2, 4)
    out = contrast_sqnorm(features.to(device), logits.to(device), loss, True, True, False)
    check_contrasts(out, features, logits, loss, True, digits=400)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("loss", LOSSES)
def test_half_precision_input(loss: str, dtype: torch.dtype, device: torch.device) -> None:
    logits = by_margins(20, seed=4).to(dtype)
    features = torch.randn(len(logits), 8, generator=torch.Generator().manual_seed(5)).to(dtype)
    out = contrast_sqnorm(features.to(device), logits.to(device), loss, True, False, False)
    check_contrasts(out, features, logits, loss, False)


@pytest.mark.parametrize("path", PATHS)
def test_any_strides(path: str, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(6)
    columns = torch.randn(35, 4, generator=generator).to(device)
    spaced = torch.randn(4, 40, generator=generator).to(device)
    cases = [
        (spaced[::2, ::3], columns.T[::2, 1::2]),
        (spaced[:1].expand(2, 40), columns.T.contiguous()[:1].expand(2, 35)),
    ]
    with configured(last_layer=PATHS[path]):
        for features, logits in cases:
            out = contrast_sqnorm(features, logits, "cross_entropy", True, False, False)
            assert out.is_contiguous()
            check_contrasts(out, features, logits, "cross_entropy", False)


@pytest.mark.parametrize(("path", "log"), [(path, log) for path in PATHS for log in (False, True)])
@pytest.mark.parametrize("loss", LOSSES)
def test_ties_and_masked_classes(loss: str, path: str, log: bool, device: torch.device) -> None:
    logits = torch.randn(4, 37, generator=torch.Generator().manual_seed(7))
    logits[0] = 0.25
    logits[1, [3, 20, 36]] = 30.0
    if loss != "mse":  # the square of minus infinity is infinite, to autograd too
        logits[2, :34] = -math.inf
        logits[3, 1:] = -math.inf
    features = torch.ones(4, 3)
    with configured(last_layer=PATHS[path]):
        out = contrast_sqnorm(features.to(device), logits.to(device), loss, True, log, False)
        check_contrasts(out, features, logits, loss, log)


@pytest.mark.parametrize(("path", "log"), [(path, log) for path in PATHS for log in (False, True)])
@pytest.mark.parametrize("loss", LOSSES)
def test_nan_and_infinity(loss: str, log: bool, path: str, device: torch.device) -> None:
    logits = torch.randn(6, 37, generator=torch.Generator().manual_seed(8))
    features = torch.ones(6, 3)
    logits[0, 5] = math.nan
    logits[2, 20] = math.inf
    logits[4] = math.nan
    features[3, 1] = math.nan
    with configured(last_layer=PATHS[path]):
        out = contrast_sqnorm(features.to(device), logits.to(device), loss, True, log, False).cpu()
    assert out[[0, 3, 4]].isnan().all()
    eager = last_layer.contrast_sqnorm(features, logits, loss, True, log, False, "eager")
    assert torch.equal(out.isnan(), eager.isnan())
    assert torch.equal(out == math.inf, eager == math.inf)
    if loss in ("cross_entropy", "brier"):
        assert out[2].isnan().all()
    elif loss == "mse":
        assert (out[2] == math.inf).all()
    good = [1, 5]
    check_contrasts(out[good], features[good], logits[good], loss, log)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("loss", LOSSES)
def test_every_form_answers_infinities_alike(loss: str, path: str, device: torch.device) -> None:
    """By kernels and eager forms, of one row and several, with and without logarithm and derivative."""
    inf = math.inf
    logits = torch.tensor([[2.0, inf, 0, 1], [inf, inf, 0, 1], [-inf] * 4, [-inf, 0, 1, -inf], [math.nan, 0, inf, 1]])
    features = torch.ones(5, 3)
    found = []
    for log in (False, True):
        with configured(last_layer=PATHS[path]):
            out = contrast_sqnorm(features.to(device), logits.to(device), loss, True, log, False).cpu()
        arguments = (loss, True, log, False, "eager")
        found += [out, last_layer.contrast_sqnorm(features, logits, *arguments)]
        rows = zip(features.split(1), logits.split(1), strict=True)
        found.append(torch.cat([last_layer.contrast_sqnorm(h, z, *arguments) for h, z in rows]))
        found.append(last_layer.contrast_sqnorm(features, logits.clone().requires_grad_(), *arguments).detach())
    kinds = [out.isnan() * 2 + (out == inf) for out in found]
    assert all(torch.equal(kind, kinds[0]) for kind in kinds), kinds
    softmax = loss in ("cross_entropy", "brier")
    assert kinds[0].amin(1).tolist() == (
        [2, 2, 2, 0, 2] if softmax else [1, 1, 1, 1, 2] if loss == "mse" else [0] * 4 + [2]
    )


@pytest.mark.parametrize("loss", LOSSES)
def test_one_class(loss: str, device: torch.device) -> None:
    logits, features = torch.tensor([[0.5], [-40.0], [17.0]]), torch.ones(3, 2)
    for log in (False, True):
        out = contrast_sqnorm(features.to(device), logits.to(device), loss, True, log, False)
        check_contrasts(out, features, logits, loss, log)


def test_empty_batch(device: torch.device) -> None:
    out = contrast_sqnorm(torch.ones(0, 3, device=device), torch.ones(0, 7, device=device), "bce", True, False, False)
    assert out.shape == (0, 7)
    assert out.dtype == torch.float32


@pytest.mark.parametrize("loss", LOSSES)
def test_bias_and_mean(loss: str, device: torch.device) -> None:
    logits = torch.randn(3, 12, generator=torch.Generator().manual_seed(9)).to(device)
    features = torch.randn(3, 5, generator=torch.Generator().manual_seed(10)).to(device)
    plain = contrast_sqnorm(features, logits, loss, False, False, False)
    check_contrasts(plain, features, logits, loss, False, bias=False)
    for log in (False, True):
        mean = contrast_sqnorm(features, logits, loss, True, log, True)
        scaled = mean + 2 * math.log(12) if log else mean * 144
        check_contrasts(scaled, features, logits, loss, log)


def spread_errors(B: int, N: int, spread: float, device: torch.device, *, ties: bool = False) -> float:
    """Return the largest error of cross-entropy's contrasts, as `tune` runs them, relative to float64."""
    generator = torch.Generator().manual_seed(N)
    features = torch.randn(B, 33, generator=generator)
    logits = spread * torch.randn(B, N, generator=generator)
    if ties:
        logits[:, N // 2] = logits.amax(1)
    out = contrast_sqnorm(features.to(device), logits.to(device), "cross_entropy", True, False, False).double().cpu()
    exact = contrast_norms(logits.double(), loss="cross_entropy") * (features.double().square().sum(1) + 1)[:, None]
    normal = exact >= SMALLEST_NORMAL * (features.double().square().sum(1) + 1)[:, None]
    assert (out[~normal] <= exact[~normal] + SMALLEST_NORMAL).all()
    return float((out / exact - 1)[normal].abs().max()) if normal.any() else 0.0


@pytest.mark.parametrize("spread", [1, 3, 10, 30, 100, 300])
def test_errors_by_spread_and_length(spread: float, device: torch.device) -> None:
    """A tenth of the promise in the interpreter, whose exponential is exact; on a device all of it."""
    found = [spread_errors(5, N, spread, device, ties=ties) for N in (2, 3, 10, 100, 1000) for ties in (False, True)]
    found += [spread_errors(B, 7, spread, device) for B in (0, 1)]
    found.append(spread_errors(1, 1, spread, device))
    assert max(found) <= (PROMISE if device.type == "cuda" else PROMISE / 10), found


@pytest.mark.slow
@pytest.mark.parametrize("spread", [1, 30, 300])
def test_errors_of_long_rows(spread: float, device: torch.device) -> None:
    found = [spread_errors(2, N, spread, device, ties=ties) for N in (16_384, 16_385, 70_000) for ties in (False, True)]
    assert max(found) <= (PROMISE if device.type == "cuda" else PROMISE / 10), found


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize(("loss", "margin"), [("cross_entropy", 49.0), ("brier", 27.0)])
def test_powers_that_underflow(loss: str, margin: float, eager: bool, device: torch.device) -> None:
    logits = torch.zeros(1, 512)
    logits[0, 7] = margin
    features = torch.zeros(1, 3)
    if eager:
        out = contrast_norms(logits, loss=loss)
    else:
        out = contrast_sqnorm(features.to(device), logits.to(device), loss, True, False, False)
    assert math.exp(-margin * (2 if loss == "cross_entropy" else 4)) < SMALLEST_NORMAL < out[0, 7]
    check_contrasts(out, features, logits, loss, False)


@pytest.mark.parametrize("path", PATHS)
def test_offsets_beyond_32_bits(path: str, device: torch.device) -> None:
    # The memory is reserved, not touched: rows 2^31 elements apart, then columns 2^30 apart.
    generator = torch.Generator().manual_seed(12)
    storage = torch.empty(2**31 + 64, dtype=torch.float16, device=device)
    features = torch.randn(2, 3, generator=generator).half().to(device)
    with configured(last_layer=PATHS[path]):
        for size, stride in (((2, 33), (2**31, 1)), ((2, 3), (40, 2**30))):
            logits = storage.as_strided(size, stride)
            logits.copy_(torch.randn(size, generator=generator))
            out = contrast_sqnorm(features, logits, "cross_entropy", True, False, False)
            check_contrasts(out, features, logits, "cross_entropy", False)


@settings(max_examples=10, deadline=None)
@given(
    B=st.integers(1, 3),
    N=st.integers(1, 40),
    D=st.integers(1, 20),
    margin=st.floats(0, 40),
    path=st.sampled_from(sorted(PATHS)),
    loss=st.sampled_from(LOSSES),
    log=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_shape(B: int, N: int, D: int, margin: float, path: str, loss: str, log: bool, seed: int) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator().manual_seed(seed)
    logits = oracles.confident_logits(B, N, margin, generator)
    features = torch.randn(B, D, generator=generator)
    with configured(last_layer=PATHS[path]):
        out = contrast_sqnorm(features.to(device), logits.to(device), loss, True, log, False)
    check_contrasts(out, features, logits, loss, log)


def test_the_oracle_agrees_with_autograd() -> None:
    generator = torch.Generator().manual_seed(13)
    features = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    weight = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    bias = torch.randn(6, generator=generator, dtype=torch.float64)
    logits = features @ weight.T + bias
    for loss in LOSSES:
        by_autograd = oracles.contrast_autograd(features, weight, bias, loss)
        exact = oracles.contrast_matrix(logits, loss) * (features.square().sum(1) + 1)[:, None]
        # Autograd forms p_k - 1: a few units in the last place of 1, over the smallest value.
        torch.testing.assert_close(by_autograd, exact, rtol=1e-9, atol=0)


def test_the_page_shows_the_kernel() -> None:
    root = pathlib.Path(__file__).parents[2]
    shown = (root / "docs/explanation/kernels.md").read_text().split("from the load to the norms:")[1].split("```")[1]
    assert shown.removeprefix("text\n") in (root / "kernels/contrast.py").read_text()

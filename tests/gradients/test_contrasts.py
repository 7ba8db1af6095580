"""The public functions: values, shapes, dtypes, strides, gradients, compilation, errors."""

from __future__ import annotations

import functools
from typing import Any

import oracles
import pytest
import torch
from bad_arguments import Refused, refused
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import linear, one_hot

import fastgrad
from fastgrad.losses import LOSSES
from fastgrad.ops import dispatch, last_layer

EPS = torch.finfo(torch.float32).eps


def head(*leading: int, D: int = 7, N: int = 11, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    return torch.randn(*leading, D, dtype=dtype), torch.randn(N, D, dtype=dtype), torch.randn(N, dtype=dtype)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("bias", [True, False])
def test_equals_autograd_through_a_real_head(loss: str, bias: bool) -> None:
    h, weight, offset = head(3, D=5, N=6, dtype=torch.float64)
    b = offset if bias else None
    expected = oracles.contrast_autograd(h, weight, b, loss)
    logits, norms = fastgrad.linear_contrast_sqnorm(h, weight, b, loss=loss)
    torch.testing.assert_close(logits, linear(h, weight, b))
    torch.testing.assert_close(norms, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(
        fastgrad.contrast_sqnorm(h, logits, loss=loss, bias=bias), expected, rtol=1e-9, atol=1e-12
    )


@settings(deadline=None, max_examples=40)
@given(
    leading=st.lists(st.integers(0, 3), max_size=3),
    D=st.integers(1, 9),
    N=st.integers(1, 300),
    loss=st.sampled_from(LOSSES),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    log=st.booleans(),
    mean=st.booleans(),
)
def test_any_leading_shape_and_dtype(
    leading: list[int], D: int, N: int, loss: str, dtype: torch.dtype, log: bool, mean: bool
) -> None:
    h, z = torch.randn(*leading, D).to(dtype), torch.randn(*leading, N).to(dtype)
    reduction = "mean" if mean else "sum"
    got = fastgrad.contrast_sqnorm(h, z, loss=loss, log=log, reduction=reduction)
    assert got.shape == z.shape
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    wide = fastgrad.contrast_sqnorm(h.double(), z.double(), loss=loss, reduction=reduction)
    # The inputs are the same numbers, so only the arithmetic differs: a sum of N terms and a squared exponential.
    rtol = (64 + N) * EPS
    torch.testing.assert_close((got.double().exp() if log else got.double()), wide, rtol=rtol, atol=1e-30)


def test_statistics_equal_the_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(last_layer, "_CHUNK", 25)
    for loss in LOSSES:
        h, weight, b = head(2, 3, dtype=torch.float64)
        logits, norms = fastgrad.linear_contrast_sqnorm(h, weight, b, loss=loss)
        stats = fastgrad.linear_contrast_stats(h, weight, b, loss=loss)
        torch.testing.assert_close(stats.min, norms.amin(-1))
        torch.testing.assert_close(stats.max, norms.amax(-1))
        torch.testing.assert_close(stats.mean, norms.mean(-1))
        torch.testing.assert_close(stats.expected, (logits.softmax(-1) * norms).sum(-1))
        torch.testing.assert_close(stats.predicted, norms.gather(-1, logits.argmax(-1, keepdim=True)).squeeze(-1))
        given_logits = fastgrad.contrast_stats(h, logits, loss=loss)
        # Logits of some rows may be rounded otherwise than those of all.
        torch.testing.assert_close(given_logits, stats)


@pytest.mark.parametrize("impl", ["eager", "triton"])
@pytest.mark.parametrize("loss", LOSSES)
def test_the_contrasts_of_the_largest_logits(loss: str, impl: str, device: torch.device) -> None:
    h, z = torch.randn(2, 3, 5, device=device), 5 * torch.randn(2, 3, 40, device=device)
    every = fastgrad.contrast_sqnorm(h, z, loss=loss, bias=False, reduction="mean", impl=impl)
    norms, classes = fastgrad.contrast_topk(h, z, 4, loss=loss, bias=False, reduction="mean", impl=impl)
    assert torch.equal(classes, z.topk(4).indices)
    # Two kernels, whose last operations may be contracted differently.
    torch.testing.assert_close(norms, every.gather(-1, classes), rtol=2e-6, atol=0)
    if loss != "brier":
        assert torch.equal(norms, norms.sort(-1).values)
        torch.testing.assert_close(norms, every.sort(-1).values[..., :4], rtol=2e-6, atol=0)
    logs, _ = fastgrad.contrast_topk(h, z, 40, loss=loss, log=True, impl=impl)
    torch.testing.assert_close(
        logs.sort(-1).values, fastgrad.contrast_sqnorm(h, z, loss=loss, log=True).sort(-1).values
    )


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("chunk", [60, 250, 1 << 22])
def test_rows(loss: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(last_layer, "_CHUNK", chunk)
    h, weight, b = head(2, 2, dtype=torch.float64)
    z = linear(h, weight, b)
    full = fastgrad.contrast_rows(h, z, loss=loss, rows="full")
    torch.testing.assert_close(
        full.square().sum((-1, -2)), fastgrad.contrast_sqnorm(h, z, loss=loss, bias=False), rtol=1e-9, atol=1e-12
    )
    diagonal = fastgrad.contrast_rows(h, z, loss=loss)
    if loss in ("bce", "mse"):  # whose rows are those of the gradient for ones
        w = weight.clone().requires_grad_()
        value = oracles.loss_value(linear(h[0, :1], w, b), torch.ones(1, 11).double(), loss).sum()
        torch.testing.assert_close(diagonal[0, 0], torch.autograd.grad(value, w)[0])
    torch.testing.assert_close(diagonal, full.diagonal(dim1=-3, dim2=-2).transpose(-1, -2))
    V, c = torch.randn(5, 77, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    for offset in (c, None):
        got = fastgrad.contrast_rows_linear(h, z, V, offset, loss=loss)
        torch.testing.assert_close(got, linear(diagonal.flatten(-2), V, offset))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_layer_over_rows_a_unit_at_a_time(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    h, z, V = torch.randn(9, 33).to(dtype), torch.randn(9, 21).to(dtype), torch.randn(5, 33 * 21).to(dtype)
    inputs = [t.requires_grad_() for t in (h, z, V)]
    wide = [t.detach().double().requires_grad_() for t in inputs]
    expected = linear(fastgrad.contrast_rows(*wide[:2], loss="brier").flatten(-2), wide[2])
    cotangent = torch.randn(9, 5)
    exact = torch.autograd.grad(expected, wide, cotangent.double())
    expected = expected.detach()
    for chunk in (1 << 22, 1):
        monkeypatch.setattr(last_layer, "_CHUNK", chunk)
        got = fastgrad.contrast_rows_linear(*inputs, loss="brier")
        assert got.dtype == torch.float32
        # Half precision enters, and is computed with in float32; only gradients are rounded to it.
        torch.testing.assert_close(got.double(), expected, rtol=0, atol=33 * EPS * float(expected.abs().max()))
        with torch.no_grad():
            torch.testing.assert_close(fastgrad.contrast_rows_linear(*inputs, loss="brier"), got)
        for found, value in zip(torch.autograd.grad(got, inputs, cotangent), exact, strict=True):
            unit = torch.finfo(dtype).eps + 33 * EPS
            torch.testing.assert_close(found.double(), value, rtol=0, atol=unit * float(value.abs().max()))


def test_rows_alone_in_a_batch_and_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    h, z = torch.randn(6, 3), torch.randn(6, 2000)
    z[0] = 0
    z[1, [3, 1999]] = 20
    z[2, 5:] = -torch.inf
    z[3, 7] = 95  # the others' exponentials are denormal numbers
    z[4, -1] = 15
    exact = fastgrad.contrast_sqnorm(h.double(), z.double())
    alone = torch.cat([fastgrad.contrast_sqnorm(h[i : i + 1], z[i : i + 1]) for i in range(6)])
    found = [alone, fastgrad.contrast_sqnorm(h, z)]
    monkeypatch.setattr(last_layer, "_CACHED", 4096)
    found += [fastgrad.contrast_sqnorm(h, z), fastgrad.target_sqnorm(h, z, z.argmax(-1))[:, None]]
    for norms in found:
        wanted = exact if norms.shape == z.shape else exact.gather(-1, z.argmax(-1, keepdim=True))
        # A square of a number below 1e-38 is lost.
        torch.testing.assert_close(norms.double(), wanted, rtol=32 * EPS, atol=1e-37)


def test_bad_rows_strides_and_labels() -> None:
    """A row that is not finite stays alone; strides and integer dtypes of labels do not matter."""
    h, z = torch.randn(3, 4).t(), torch.randn(4, 600)[:, ::2]
    before, clean = z.clone(), fastgrad.contrast_sqnorm(h, z)
    # Another layout sums in another order.
    torch.testing.assert_close(fastgrad.contrast_sqnorm(h.contiguous(), z.contiguous()), clean, rtol=16 * EPS, atol=0)
    for dtype in (torch.uint8, torch.int16, torch.uint16, torch.uint32, torch.uint64):
        found = fastgrad.target_sqnorm(h, z, torch.arange(4).to(dtype))
        torch.testing.assert_close(found, clean[:, :4].diagonal())
    assert torch.equal(z, before)
    z[1, 5], h[2, 0] = float("nan"), float("inf")
    got = fastgrad.contrast_sqnorm(h, z)
    assert torch.equal(got[[0, 3]], clean[[0, 3]])
    assert not got[[1, 2]].isfinite().any()


@pytest.mark.parametrize("loss", LOSSES)
def test_differentiable_in_everything(loss: str) -> None:
    h, weight, b = (t.requires_grad_() for t in head(2, D=3, N=4, dtype=torch.float64))
    V = torch.randn(2, 12, dtype=torch.float64).requires_grad_()
    check = torch.autograd.gradcheck
    assert check(lambda *a: fastgrad.linear_contrast_sqnorm(*a, loss=loss), (h, weight, b))
    assert check(lambda *a: fastgrad.linear_contrast_sqnorm(*a, loss=loss, log=True)[1], (h, weight, b))
    assert check(lambda *a: tuple(fastgrad.linear_contrast_stats(*a, loss=loss)), (h, weight, b))
    assert check(lambda a, v: fastgrad.contrast_rows_linear(a, linear(a, weight), v, loss=loss), (h, V))
    z = linear(h, weight).detach().requires_grad_()
    for target in ("ones", "uniform", "predicted", torch.tensor([0, 3])):
        assert check(lambda a, y, t=target: fastgrad.target_sqnorm(a, y, t, loss=loss), (h, z))


def everything(h: torch.Tensor, weight: torch.Tensor, b: torch.Tensor | None, V: torch.Tensor) -> tuple[Any, ...]:
    """Logits, norms, their statistics, what else logits give, and units of a layer over rows."""
    z, norms = fastgrad.linear_contrast_sqnorm(h, weight, b)
    others = fastgrad.contrast_sqnorm(h, z, loss="bce", log=True), fastgrad.target_sqnorm(h, z, "ones")
    stats, classes = fastgrad.linear_contrast_stats(h, weight, b), fastgrad.target_sqnorm(h, z, z.argmax(-1))
    return z, norms, *stats, *others, classes, fastgrad.contrast_rows_linear(h, z, V)


def test_autocast_casts_as_linear_does() -> None:
    h, weight, b, units = (torch.randn(*shape) for shape in ((6, 3), (5, 3), (5,), (2, 15)))
    expected = everything(h, weight, None, units)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(everything(h, weight, None, units), expected)
        for other in (b, None):
            logits, norms, _, largest, *_ = everything(h.bfloat16(), weight, other, units)
            assert torch.equal(logits, linear(h.bfloat16(), weight, other))
            assert torch.equal(norms, fastgrad.contrast_sqnorm(h.bfloat16(), logits, bias=other is not None))
            torch.testing.assert_close(largest, norms.amax(-1))
    with pytest.raises(TypeError, match=r"weight.*bfloat16.*float32"):
        fastgrad.linear_contrast_sqnorm(h.bfloat16(), weight, b)


def test_labels_of_samples_under_vmap() -> None:
    h, z, y = torch.randn(6, 3), torch.randn(6, 5), torch.randint(5, (6,))
    mapped = torch.func.vmap(fastgrad.target_sqnorm)
    torch.testing.assert_close(mapped(h, z, y), fastgrad.target_sqnorm(h, z, y))
    torch.testing.assert_close(mapped(h, z, one_hot(y, 5).float()), fastgrad.target_sqnorm(h, z, y))
    with pytest.raises(ValueError, match="class indices from 0 to 4; it held 5"):
        mapped(h, z, torch.full((6,), 5))


@pytest.mark.parametrize("places", [(0, None), (None, 0)])
@pytest.mark.parametrize("loss", LOSSES)
def test_features_or_logits_alone_under_vmap(loss: str, places: tuple[int | None, int | None]) -> None:
    h, z = torch.randn(2, 3, 7), torch.randn(2, 3, 5)
    expected = [h if places[0] == 0 else h[0].expand_as(h), z if places[1] == 0 else z[0].expand_as(z)]
    given = [h if places[0] == 0 else h[0], z if places[1] == 0 else z[0]]
    mapped = torch.func.vmap(functools.partial(fastgrad.contrast_sqnorm, loss=loss), places)
    torch.testing.assert_close(mapped(*given), fastgrad.contrast_sqnorm(*expected, loss=loss))


def test_compiles_without_graph_breaks_at_dynamic_batch() -> None:
    compiled = torch.compile(everything, fullgraph=True, dynamic=True, backend="aot_eager")
    weight, b, V = torch.randn(11, 7), torch.randn(11), torch.randn(3, 77)
    for B in (2, 5, 9):
        h = torch.randn(B, 7)
        *got, units = compiled(h, weight, b, V)
        *expected, wanted = everything(h, weight, b, V)
        torch.testing.assert_close(got, expected, rtol=64 * EPS, atol=64 * EPS)
        # 77 products of V with h and p - y, whose length is below the root of 2, are added up in another order.
        budget = 77 * EPS * 2**0.5 * h.norm(dim=1, keepdim=True) * V.norm(dim=1)
        assert ((units - wanted).abs() <= budget).all()
    # Also of a penalty in training.
    leaves = [t.requires_grad_() for t in (torch.randn(4, 7), weight, b)]
    penalty = lambda: fastgrad.linear_contrast_sqnorm(*leaves, log=True)[1].mean()  # noqa: E731
    expected = torch.autograd.grad(penalty(), leaves)
    found = torch.autograd.grad(torch.compile(penalty, fullgraph=True, backend="aot_eager")(), leaves)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


H, Z, W = torch.randn(4, 7), torch.randn(4, 11), torch.randn(11, 7)
BAD: list[Refused] = [
    (lambda: fastgrad.contrast_sqnorm(H[0, 0], Z), ValueError, "features"),
    (lambda: fastgrad.contrast_sqnorm(H, Z[0, 0]), ValueError, "logits"),
    (lambda: fastgrad.contrast_sqnorm(H, Z[:, :0]), ValueError, "logits.*N >= 1"),
    (lambda: fastgrad.contrast_sqnorm(H[:2], Z), ValueError, r"features.*\(4,\).*\(2,\)"),
    (lambda: fastgrad.contrast_sqnorm(H, Z.long()), TypeError, "logits.*int64"),
    (lambda: fastgrad.contrast_sqnorm(H.tolist(), Z), TypeError, "features.*list"),  # type: ignore[arg-type]
    (lambda: fastgrad.contrast_sqnorm(H, Z.double()), TypeError, "float64"),
    (lambda: fastgrad.contrast_sqnorm(H, Z.to("meta")), ValueError, "features.*meta.*cpu"),
    (lambda: fastgrad.contrast_sqnorm(H.to("meta"), Z.to("meta")), ValueError, "features must be dense .* meta device"),
    (lambda: fastgrad.linear_contrast_stats(H.to_sparse(), W), ValueError, "features must be dense .*sparse_coo"),
    (lambda: fastgrad.contrast_sqnorm(H, Z.to_sparse()), ValueError, "logits must be dense .*sparse_coo"),
    (lambda: fastgrad.contrast_sqnorm(H, Z, loss="hinge"), ValueError, "loss.*brier.*hinge"),
    (lambda: fastgrad.contrast_sqnorm(H, Z, reduction="none"), ValueError, "reduction.*none"),
    (lambda: fastgrad.contrast_sqnorm(H, Z, bias=1), TypeError, "bias"),  # type: ignore[arg-type]
    (lambda: fastgrad.contrast_sqnorm(H, Z, impl="cuda"), ValueError, "impl.*cuda"),
    (lambda: fastgrad.contrast_sqnorm(H.double(), Z.double(), impl="triton"), ValueError, "impl.*float64"),
    (lambda: fastgrad.target_sqnorm(H, Z, "zeros"), ValueError, "target.*zeros"),
    (lambda: fastgrad.target_sqnorm(H, Z, 3), TypeError, "target.*int"),  # type: ignore[arg-type]
    (lambda: fastgrad.target_sqnorm(H, Z, torch.tensor([0, 1, 2, 11])), ValueError, "target.*0 to 10.*11"),
    (lambda: fastgrad.target_sqnorm(H, Z, torch.tensor([0, 1, 2, -1])), ValueError, "target.*-1"),
    (lambda: fastgrad.target_sqnorm(H, Z, torch.tensor([0, 1])), ValueError, "target"),
    (lambda: fastgrad.target_sqnorm(H, Z, torch.rand(4, 3)), ValueError, "target"),
    (lambda: fastgrad.target_sqnorm(H, Z, torch.ones(4, dtype=torch.bool)), TypeError, "target.*bool"),
    (lambda: fastgrad.linear_contrast_sqnorm(H, W[:, :3]), ValueError, r"weight.*7.*\(11, 3\)"),
    (lambda: fastgrad.linear_contrast_sqnorm(H, W, torch.randn(3)), ValueError, "bias"),
    (lambda: fastgrad.linear_contrast_sqnorm(H, W.half()), TypeError, "weight.*float16"),
    (lambda: fastgrad.linear_contrast_stats(H, W[0]), ValueError, "weight"),
    (lambda: fastgrad.contrast_topk(H, Z, 0), ValueError, "k must be an integer of at least 1; it was 0"),
    (lambda: fastgrad.contrast_topk(H, Z, 99), ValueError, "k must be at most the number of classes, .*; it was 99"),
    (lambda: fastgrad.contrast_stats(H[:0], Z), ValueError, "features must have the leading shape of logits"),
    (lambda: fastgrad.contrast_sqnorm(H.long(), Z), TypeError, "features.*int64"),
    (lambda: fastgrad.contrast_sqnorm(H, Z, log="yes"), TypeError, "log.*'yes'"),  # type: ignore[arg-type]
    (lambda: fastgrad.linear_contrast_sqnorm(H, W.to("meta")), ValueError, "weight.*cpu.*meta"),
    (lambda: fastgrad.linear_contrast_sqnorm(H, W, Z[0].half()), TypeError, "bias.*float32.*float16"),
    (lambda: fastgrad.contrast_rows_linear(H, Z, torch.ones(5, 77).long()), TypeError, "weight.*int64"),
    (lambda: fastgrad.contrast_rows(H, Z, rows="none"), ValueError, "rows"),
    (lambda: fastgrad.contrast_rows_linear(H, Z, torch.randn(5, 76)), ValueError, "weight.*77.*76"),
]


test_bad_arguments = refused(BAD)


def test_triton_on_a_cpu_needs_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(dispatch, "TRITON_INSTALLED", True)
    for found, message in ((True, r"impl.*cpu.*TRITON_INTERPRET"), (False, "checkout without symbolic links")):
        monkeypatch.setattr(dispatch, "KERNELS_FOUND", found)
        with pytest.raises(ValueError, match=message):
            fastgrad.contrast_sqnorm(H, Z, impl="triton")
    assert fastgrad.contrast_sqnorm(H, Z, impl="auto").shape == Z.shape

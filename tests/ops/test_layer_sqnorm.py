"""Per-sample squared weight-gradient norms against float64 autograd, every route."""

from __future__ import annotations

import contextlib
import functools
from unittest import mock

import pytest
import torch
from gradient_oracle import CONVOLUTIONS, conv_sqnorm, weight_norms
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from fastgrad.ops.conv import cost, routes, sqnorm
from fastgrad.ops.conv.geometry import Problem
from fastgrad.ops.conv.sqnorm import linear_sqnorm

ROUTES = (*routes.DIRECT, "gram")


@contextlib.contextmanager
def by(route):
    """Let convolutions take a route, without plans that are remembered; None leaves the choice to the cost model."""
    chosen = mock.patch.object(cost, "choose_route", return_value=route) if route else contextlib.nullcontext()
    with chosen, mock.patch.object(sqnorm, "plan", sqnorm.plan.__wrapped__):
        yield


@st.composite
def problems(draw):
    axes = draw(st.integers(1, 3))
    each = lambda low, high: tuple(draw(st.integers(low, high)) for _ in range(axes))  # noqa: E731
    groups = draw(st.integers(1, 3))
    depthwise = draw(st.booleans())
    inputs = groups * (1 if depthwise else draw(st.integers(1, 3)))
    outputs = groups * draw(st.integers(1, 3))
    kernel, stride, dilation = each(1, 3), each(1, 3), each(1, 2)
    padding = tuple(draw(st.integers(0, d * (k - 1))) for k, d in zip(kernel, dilation, strict=True))
    size = tuple(d * (k - 1) + 1 + draw(st.integers(0, 4)) for k, d in zip(kernel, dilation, strict=True))
    transposed = draw(st.booleans())
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    if transposed:
        options["output_padding"] = tuple(
            draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True)
        )
    weight = (inputs, outputs // groups, *kernel) if transposed else (outputs, inputs // groups, *kernel)
    return {
        "a": (draw(st.integers(1, 3)), inputs, *size),
        "weight": weight,
        "transposed": transposed,
        "options": options,
        "count": draw(st.integers(1, 2)),
        "seed": draw(st.integers(0, 2**31)),
    }


def make(case, dtype):
    torch.manual_seed(case["seed"])
    a = torch.randn(case["a"], dtype=torch.float64)
    weight = torch.randn(case["weight"], dtype=torch.float64)
    output = CONVOLUTIONS[case["transposed"]][a.dim() - 3](a, weight, **case["options"])
    g = torch.randn(case["count"], *output.shape, dtype=torch.float64)
    return a.to(dtype), g.to(dtype)


@given(problems())
@settings(deadline=None, max_examples=60)
def test_every_route_equals_autograd(case):
    # The sum of n products of unit normals cancels by at most the guard's factor 40 (float32 Gram route),
    # so 40 roundings, a few units each; float64 is not guarded, 1e-10 leaves six digits for cancellation.
    for dtype, budget in ((torch.float32, 40 * 8 * 2**-24), (torch.float64, 1e-10)):
        a, g = make(case, dtype)
        options = {k: v for k, v in case["options"].items() if k != "output_padding"}
        expected = weight_norms(a, g, case["weight"], transposed=case["transposed"], **case["options"])
        kernel = case["weight"][2:]
        for route in (None, *ROUTES):
            with by(route):
                result = conv_sqnorm(a, g, kernel, transposed=case["transposed"], **options)
                one = conv_sqnorm(a, g[0], kernel, transposed=case["transposed"], **options)
            assert result.dtype == dtype
            assert result.shape == expected.shape
            named = lambda m, r=route: f"{r}: {m}"  # noqa: E731
            torch.testing.assert_close(result.double(), expected, rtol=budget, atol=0, msg=named)
            assert one.shape == (a.shape[0],)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("kind", ["constant input", "opposed gradients", "zero"])
def test_cancellation(route, kind):
    """Gradients that nearly vanish (1e4 times smaller than their terms, squared) keep their digits."""
    torch.manual_seed(3)
    a, g = torch.randn(3, 4, 8, 8), torch.randn(3, 5, 8, 8)
    if kind == "constant input":
        a = 1 + 1e-2 * a
        g = g - g.mean((2, 3), keepdim=True)
    elif kind == "opposed gradients":
        g[:, :, 4:] = -g[:, :, :4]
        a[:, :, 4:] = a[:, :, :4] * (1 + 1e-2 * torch.rand(3, 4, 4, 8))
    else:
        g.zero_()
    expected = weight_norms(a, g[None], (5, 4, 1, 1))[0]
    with by(route):
        result = conv_sqnorm(a, g, 1)
    torch.testing.assert_close(result.double(), expected, rtol=1e-4, atol=0)


def test_pixels_beyond_the_windows():
    with by("gram"):
        flops = []
        for size in (8, 7):
            with FlopCounterMode(display=False) as counter:
                conv_sqnorm(torch.randn(2, 64, size, size), torch.randn(2, 8, 3, 3), 3, stride=2)
            flops.append(counter.get_total_flops())
    assert flops[0] == flops[1] > 0


def test_the_grouped_route_does_not_pad(monkeypatch):
    monkeypatch.delattr(Problem, "padded")
    for size, stride in ((8, 1), (8, 2), (9, 2)):
        a, g = torch.randn(2, 3, size, size), torch.randn(2, 4, *[-(-size // stride)] * 2)
        expected = weight_norms(a, g[None], (4, 3, 3, 3), stride=stride, padding=1)[0]
        with by("grouped"):
            result = conv_sqnorm(a, g, 3, stride=stride, padding=1)
        torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=0)


def test_gram_of_similar_patches():
    torch.manual_seed(6)
    a, g = 10 + 1e-2 * torch.randn(400, 64, 3, 3), torch.randn(400, 16, 3, 3)
    g -= g.mean((2, 3), keepdim=True) * torch.linspace(0.6, 1, 400).view(-1, 1, 1, 1)
    expected = weight_norms(a, g[None], (16, 64, 1, 1))[0]
    with by("gram"):
        torch.testing.assert_close(conv_sqnorm(a, g, 1).double(), expected, rtol=1e-5, atol=0)


def test_cancelling_samples_leave_the_gram_route(monkeypatch):
    torch.manual_seed(4)
    a, g = torch.randn(4, 3, 6, 6), torch.randn(4, 5, 6, 6)
    a[2] = 1
    g[2] -= g[2].mean((1, 2), keepdim=True) * (1 - 1e-3)
    seen, patch = [], routes.patch
    monkeypatch.setattr(routes, "patch", lambda p: seen.append(p.a.shape[0]) or patch(p))
    with by("gram"):
        result = conv_sqnorm(a, g, 1)
    assert seen == [1]
    expected = weight_norms(a, g[None], (5, 3, 1, 1))[0]
    torch.testing.assert_close(result.double(), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_accumulates_in_float32(dtype):
    torch.manual_seed(5)
    a, g = torch.randn(2, 8, 9, 9).to(dtype), torch.randn(2, 6, 9, 9).to(dtype)
    expected = weight_norms(a, g[None], (6, 8, 3, 3), padding=1)[0]
    for route in (None, *ROUTES):
        with by(route):
            result = conv_sqnorm(a, g, 3, padding=1)
        assert result.dtype == torch.float32
        torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("t", [1, 5, 40])
def test_linear_with_positions(t):
    torch.manual_seed(t)
    a, g = torch.randn(3, t, 7), torch.randn(2, 3, t, 9)
    expected = torch.einsum("kbto,btc->kboc", g.double(), a.double()).square().sum((2, 3))
    for route in (None, *ROUTES):
        with by(route):
            torch.testing.assert_close(linear_sqnorm(a, g).double(), expected, rtol=1e-5, atol=0)
            torch.testing.assert_close(linear_sqnorm(a, g[1]).double(), expected[1], rtol=1e-5, atol=0)


def test_chunks_and_layouts(monkeypatch):
    torch.manual_seed(6)
    a, g = torch.randn(5, 8, 6, 6), torch.randn(2, 5, 8, 6, 6)
    with by("patch"):
        whole = conv_sqnorm(a, g, 3, padding=1)
    strided = g.transpose(1, 2).contiguous().transpose(1, 2)
    last = conv_sqnorm(a.to(memory_format=torch.channels_last), strided, 3, padding=1)
    monkeypatch.setattr(cost, "CHUNK_BYTES", 1)
    for route in ROUTES:
        with by(route):
            torch.testing.assert_close(conv_sqnorm(a, g, 3, padding=1), whole, rtol=1e-5, atol=0)
    torch.testing.assert_close(last, whole, rtol=1e-5, atol=0)


def test_empty_batch():
    assert conv_sqnorm(torch.randn(0, 3, 5, 5), torch.randn(0, 4, 5, 5), 3, padding=1).shape == (0,)
    assert linear_sqnorm(torch.randn(0, 5, 3), torch.randn(2, 0, 5, 4)).shape == (2, 0)


@pytest.mark.parametrize("which", ["g", "a", "both"])
def test_vmap(which):
    torch.manual_seed(8)
    a, g = torch.randn(3, 2, 4, 6, 6), torch.randn(3, 2, 5, 6, 6)
    in_dims = {"g": (None, 0), "a": (0, None), "both": (0, 0)}[which]
    args = [x if d == 0 else x[0] for x, d in zip((a, g), in_dims, strict=True)]
    mapped = torch.func.vmap(lambda a, g: conv_sqnorm(a, g, 3, padding=1), in_dims)(*args)
    pairs = [(a[i if in_dims[0] == 0 else 0], g[i if in_dims[1] == 0 else 0]) for i in range(3)]
    one_by_one = torch.stack([conv_sqnorm(*pair, 3, padding=1) for pair in pairs])
    torch.testing.assert_close(mapped, one_by_one, rtol=1e-5, atol=0)


def test_vmap_shares_the_input(monkeypatch):
    counts = []
    solve = sqnorm._solve
    monkeypatch.setattr(sqnorm, "_solve", lambda a, g, *rest: counts.append(g.shape[0]) or solve(a, g, *rest))
    a, g = torch.randn(2, 3, 4), torch.randn(7, 2, 3, 5)
    torch.func.vmap(lambda g: linear_sqnorm(a, g))(g)
    assert counts == [7]


def test_differentiable():
    torch.manual_seed(10)
    a = torch.randn(2, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    g = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    for route, kernel in (("patch", 3), ("gram", 3), ("gram", 1)):  # patches that overlap, and that do not
        norms = functools.partial(conv_sqnorm, kernel=kernel, padding=kernel // 2)
        with by(route):
            assert torch.autograd.gradcheck(norms, (a, g))

"""Sums of squares of channels against float64: every layout, dtype and path of the eager form."""

from __future__ import annotations

import math
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

from fastgrad.ops import channel_moments as module
from fastgrad.ops.channel_moments import channel_square_sums

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def assert_close(result, x, dim=1, longest=None):
    """Against float64: ``longest`` sums one after the other, a tree of the rest, and the square."""
    expected = x.double().movedim(dim, 1).flatten(2) if x.dim() > 2 else x.double()[..., None]
    expected = expected.square().sum(2)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    positions = x.numel() // max(expected.numel(), 1)
    sums = positions if longest is None else longest + 2 * math.log2(positions)
    allowed = (sums + 4) * torch.finfo(dtype).eps / 2
    assert result.dtype == dtype
    assert result.shape == expected.shape
    assert ((result.double() - expected).abs() <= allowed * expected).all()


@st.composite
def tensors(draw):
    """A tensor and the dimension of its channels."""
    layout = draw(st.sampled_from(["contiguous", "channels last", "last dimension", "cropped", "expanded"]))
    axes = draw(st.integers(0 if layout in ("contiguous", "last dimension") else 1, 3))
    sizes = [draw(st.integers(0, 9)) for _ in range(axes)]
    batch, channels = draw(st.integers(0, 4)), draw(st.integers(1, 7))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    make = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    dtype = draw(st.sampled_from(DTYPES))
    if layout == "contiguous":
        return make(batch, channels, *sizes).to(dtype), 1
    if layout == "last dimension":
        return make(batch, *sizes, channels).to(dtype), -1
    if layout == "channels last":
        return make(batch, *sizes, channels).to(dtype).movedim(-1, 1), 1
    if layout == "cropped":
        return make(batch, channels, *sizes, 5).to(dtype)[..., 1:4], 1
    return make(batch, channels, *(1 for _ in sizes)).to(dtype).expand(batch, channels, *sizes), 1


@given(tensors(), st.sampled_from([1, 40, module.HELD]))
@settings(deadline=None, max_examples=200)
def test_against_float64(case, held):
    x, dim = case
    with mock.patch.object(module, "HELD", held):
        assert_close(channel_square_sums(x, dim), x, dim)


@pytest.mark.parametrize("positions", [(112, 112), (12547,)], ids=str)
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_equal_values(dtype, last, positions):
    """Their roundings all point the same way; a plain sum of 12544 would lose up to a thousand units."""
    x = torch.linspace(1.01, 1.99, 32).to(dtype)[None, :, None].expand(1, 32, math.prod(positions))
    x = x.transpose(1, 2).contiguous().transpose(1, 2) if last else x.contiguous()
    x = x.unflatten(2, positions)
    # A run of `LONGEST_RUN` goes to eight lanes or more, a tree of ATen's has steps of sixteen in four levels.
    assert_close(channel_square_sums(x), x, longest=64)


def test_small_and_large_values():
    x = torch.tensor([[1e-15, 3e-15], [1e15, 3e15]]).repeat_interleave(20, 1).reshape(2, 2, 20)
    assert_close(channel_square_sums(x), x)


def test_nan():
    x = torch.ones(2, 3, 4, 4)
    x[1, 2, 0, 3] = torch.nan
    result = channel_square_sums(x)
    assert result[1, 2].isnan()
    result[1, 2] = 16
    assert (result == 16).all()


def test_without_samples_or_positions():
    for shape, dim in (((0, 3, 5, 5), 1), ((0, 7, 3), -1), ((0, 3), 1)):
        assert channel_square_sums(torch.ones(shape), dim).shape == (0, 3)
    assert channel_square_sums(torch.ones(2, 1, 0, 4)).tolist() == [[0.0], [0.0]]


@pytest.mark.parametrize("mapped", [0, 1, 3])
@pytest.mark.parametrize("dim", [1, -1])
def test_vmap(dim, mapped):
    x = torch.randn(3, 4, 2, 5, 6)
    with mock.patch.object(module, "HELD", 1):
        result = torch.func.vmap(lambda x: channel_square_sums(x, dim), mapped)(x)
        one_by_one = [channel_square_sums(part, dim) for part in x.unbind(mapped)]
    torch.testing.assert_close(result, torch.stack(one_by_one), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("last", [False, True])
def test_traced_with_a_dynamic_batch(last):
    class Both(torch.nn.Module):
        def forward(self, x, tokens):
            return channel_square_sums(x), channel_square_sums(tokens, -1)

    def inputs(samples):
        x = torch.randn(samples, 4, 6, 7)
        return x.to(memory_format=torch.channels_last) if last else x, torch.randn(samples, 9, 5)

    dynamic = ({0: torch.export.Dim("batch", min=2, max=64)},) * 2
    flat = make_fx(Both(), tracing_mode="symbolic")(*inputs(3))
    exported = torch.export.export(Both(), inputs(3), dynamic_shapes=dynamic).module()
    compiled = torch.compile(Both(), fullgraph=True, backend="aot_eager", dynamic=True)
    for module_ in (flat, exported):
        targets = {str(node.target) for node in module_.graph.nodes if node.op == "call_function"}
        assert not any("fastgrad" in target for target in targets)
        assert any("aten.sum" in target for target in targets)
    for samples in (3, 7):
        x, tokens = inputs(samples)
        for function in (flat, exported, compiled):
            of_images, of_tokens = function(x, tokens)
            assert_close(of_images, x)
            assert_close(of_tokens, tokens, -1)


@pytest.mark.parametrize("dim", [1, -1])
def test_differentiable(dim):
    x = torch.randn(2, 3, 4, 2, dtype=torch.float64, requires_grad=True)
    with mock.patch.object(module, "HELD", 1):
        assert torch.autograd.gradcheck(lambda x: channel_square_sums(x, dim), (x,))
        assert torch.autograd.gradgradcheck(lambda x: channel_square_sums(x, dim), (x,))

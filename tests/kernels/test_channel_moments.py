"""The kernel of the channel moments against float64, in both layouts and with shared positions."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

triton = pytest.importorskip("triton")

from fastgrad.ops import tune  # noqa: E402
from fastgrad.ops.channel_moments import channel_moments  # noqa: E402
from fastgrad.ops.tune import ChannelConfig  # noqa: E402

pytestmark = pytest.mark.usefixtures("poison")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CONFIGS = {
    "one step": ChannelConfig(4, 64, 1, 1, 1),
    "steps": ChannelConfig(2, 8, 2, 1, 1),
    "shared": ChannelConfig(2, 4, 2, 3, 1),
    "more programs than steps": ChannelConfig(1, 16, 1, 9, 1),
}


def layout(x, name):
    """The same numbers ``(B, C, H, W)`` in another order in memory."""
    if name == "channels last":
        return x.to(memory_format=torch.channels_last)
    if name == "batch last":
        return x.movedim(0, -1).contiguous().movedim(-1, 0)
    if name == "cropped":
        return torch.nn.functional.pad(x, (1, 2, 3, 1))[:, :, 3:-1, 1:-2]
    return x.contiguous()


def assert_close(moments, x):
    x = x.double().flatten(2)
    # One sum after the other at worst, over positions and then over the programs' shares.
    allowed = (x.shape[2] + 4) * torch.finfo(torch.float32).eps / 2
    for result, expected, size in (
        (moments.sum, x.sum(2), x.abs().sum(2)),
        (moments.sum_of_squares, x.square().sum(2), x.square().sum(2)),
    ):
        assert result.dtype == torch.float32
        assert result.shape == expected.shape
        assert ((result.double().cpu() - expected).abs() <= allowed * size).all()


ORDERS = ("contiguous", "channels last", "batch last", "cropped")


@pytest.mark.parametrize(
    ("order", "config", "dtype"),
    # Every pair of two of them.
    [(o, c, DTYPES[(i + j) % 3]) for i, o in enumerate(ORDERS) for j, c in enumerate(CONFIGS)],
)
def test_against_float64(order, config, dtype, device):
    generator = torch.Generator().manual_seed(3)
    x = layout(torch.randn(2, 5, 6, 7, generator=generator).to(dtype), order)
    with tune.override(channel_moments=CONFIGS[config]):
        moments = channel_moments(x.to(device), impl="triton")
        again = channel_moments(x.to(device), impl="triton")
    assert_close(moments, x)
    assert all(map(torch.equal, moments, again))


shapes = st.tuples(st.integers(1, 3), st.integers(1, 20), st.integers(1, 12), st.integers(1, 12))


@given(shapes, st.sampled_from(["contiguous", "channels last", "cropped"]), st.sampled_from(DTYPES))
@settings(deadline=None, max_examples=25)
def test_any_shape_with_the_chosen_configuration(shape, order, dtype):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    x = layout(torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype), order)
    assert_close(channel_moments(x.to(device), impl="triton"), x)


@pytest.mark.parametrize("last", [False, True])
def test_many_positions(last, device):
    x = torch.linspace(1.01, 1.99, 3)[None, :, None, None].expand(1, 3, 112, 112)
    x = layout(x, "channels last" if last else "contiguous")
    first, second = channel_moments(x.to(device), impl="triton")
    # Each program adds at most LONGEST_SUM groups of UNROLL tiles, the rest are trees.
    depth = tune.LONGEST_SUM + tune.UNROLL + 2 * math.log2(112 * 112)
    for result, expected in ((first, x.double().sum((2, 3))), (second, x.double().square().sum((2, 3)))):
        error = (result.double().cpu() / expected - 1).abs()
        assert (error <= depth * torch.finfo(torch.float32).eps / 2).all()


@pytest.mark.parametrize("shape", [(3, 20, 5), (3, 20)], ids=str)
def test_channels_in_the_last_dimension(shape, device):
    shape = (shape[0], *shape[2:], shape[1])
    x = torch.randn(shape, generator=torch.Generator().manual_seed(4))
    moments = channel_moments(x.to(device), -1, impl="triton")
    assert_close(moments, x.movedim(-1, 1).unsqueeze(-1))


def test_an_expanded_gradient_is_read_where_it_is(device):
    x = torch.randn(2, 3, 1, 1, generator=torch.Generator().manual_seed(5)).expand(2, 3, 4, 5)
    assert_close(channel_moments(x.to(device), impl="triton"), x)


@pytest.mark.parametrize("config", CONFIGS)
def test_nan_stays_in_its_channel(config, device):
    x = torch.ones(3, 4, 5, 5, device=device)
    x[1, 2, 3, 3] = torch.nan
    with tune.override(channel_moments=CONFIGS[config]):
        for moment in channel_moments(x, impl="triton"):
            assert moment[1, 2].isnan()
            moment[1, 2] = 25
            assert (moment == 25).all()


@pytest.mark.parametrize("shape", [(0, 3, 5, 5), (2, 3, 0, 5), (2, 0, 4)], ids=str)
def test_empty(shape, device):
    for moment in channel_moments(torch.ones(shape, device=device), impl="triton"):
        assert moment.shape == shape[:2]
        assert (moment == 0).all()


def test_refuses_float64(device):
    with pytest.raises(ValueError, match="impl must be 'auto' or 'eager' here: it was 'triton'"):
        channel_moments(torch.ones(2, 3, 4, dtype=torch.float64, device=device), impl="triton")


ARCHITECTURES = [*tune.KNOWN_ARCHITECTURES.values(), tune.INTERPRETER]


@given(
    st.integers(1, 100_000), st.integers(1, 20_000), st.integers(1, 10_000_000), st.booleans(),
    st.sampled_from(ARCHITECTURES),
)  # fmt: skip
@settings(deadline=None, max_examples=200)
def test_configurations_cover_their_shape(B, C, T, last, arch):
    config = tune.channel_moments(B, C, T, last, arch)
    for value in (config.block_c, config.block_t, config.unroll, config.num_warps):
        assert value & (value - 1) == 0
    assert config.block_c * config.block_t <= tune.TILE
    steps = tune.cdiv(T, config.block_t * config.unroll)
    groups = tune.cdiv(steps, config.splits)
    assert groups <= tune.LONGEST_SUM
    assert groups * (config.splits - 1) < steps <= groups * config.splits


def test_few_large_samples_fill_the_device():
    for arch in tune.KNOWN_ARCHITECTURES.values():
        config = tune.channel_moments(1, 64, 224 * 224, True, arch)
        assert config.splits >= arch.processors / 2
        assert tune.channel_moments(64, 256, 196, False, arch).splits == 1

"""The layer kernels against float64 weight gradients, one per sample."""

from __future__ import annotations

import pytest
import torch
from gradient_oracle import CONVOLUTIONS as BY_AXES
from gradient_oracle import conv_sqnorm, weight_norms

triton = pytest.importorskip("triton")

from bench.gpu.compile_cases import configured  # noqa: E402
from bench.gpu.sanitize.cases import CONVOLUTIONS  # noqa: E402
from bench.gpu.sanitize.cases import LAYERS as SMALL  # noqa: E402
from fastgrad.ops.conv.sqnorm import linear_sqnorm  # noqa: E402
from fastgrad.ops.triton import layer_sqnorm  # noqa: E402

pytestmark = pytest.mark.usefixtures("poison")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


CASES = CONVOLUTIONS | {"depthwise": ((1, 3, 4, 5), 3, (3, 3), (1, 1), (1, 1), (1, 1), 3)}


@pytest.mark.parametrize(
    ("case", "dtype"), [(case, torch.float32) for case in CASES] + [("strided", dtype) for dtype in DTYPES[1:]]
)
def test_convolution(case, dtype, device):
    shape, outputs, kernel, stride, padding, dilation, groups = CASES[case]
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    generator = torch.Generator().manual_seed(11)
    a = torch.randn(shape, generator=generator).to(dtype)
    weight = torch.zeros(outputs, shape[1] // groups, *kernel)
    like = BY_AXES[False][a.dim() - 3](a.float(), weight, **options)
    g = torch.randn(2, *like.shape, generator=generator).to(dtype)
    g = g.transpose(1, 2).contiguous().transpose(1, 2)
    with configured(**SMALL):
        result = conv_sqnorm(a.to(device), g.to(device), kernel, impl="triton", **options)
    assert result.dtype == torch.float32
    # Sums of up to 130 products and as many squares in float32, without systematic cancellation.
    torch.testing.assert_close(result.double().cpu(), weight_norms(a, g, weight.shape, **options), rtol=1e-5, atol=0)


@pytest.mark.parametrize("gram", [False, True])
@pytest.mark.parametrize(
    ("positions", "dtype"), [(1, torch.float32), (16, torch.float32), *((37, dtype) for dtype in DTYPES)]
)
def test_linear(positions, gram, dtype, device):
    generator = torch.Generator().manual_seed(positions)
    a = torch.randn(3, 20, positions, generator=generator).to(dtype).transpose(1, 2)
    g = torch.randn(2, 3, positions, 17, generator=generator).to(dtype)
    expected = torch.einsum("kbto,btc->kboc", g.double(), a.double()).square().sum((2, 3))
    with configured(**SMALL, layer_prefers_gram=gram):
        result = linear_sqnorm(a.to(device), g.to(device), impl="triton")
    torch.testing.assert_close(result.double().cpu(), expected, rtol=1e-5, atol=0)


def test_cancelling_samples_are_computed_again(device):
    """A constant input against gradients without mean: the direct kernel replaces the Gram result of that sample."""
    generator = torch.Generator().manual_seed(5)
    a = torch.randn(9, 40, 8, generator=generator)
    g = torch.randn(2, 9, 40, 8, generator=generator)
    a[1] = 1 + 1e-2 * a[1]
    g[:, 1] -= g[:, 1].mean(1, keepdim=True)
    expected = torch.einsum("kbto,btc->kboc", g.double(), a.double()).square().sum((2, 3))
    with configured(**SMALL, layer_prefers_gram=True):
        result = layer_sqnorm.linear_sqnorm(a.to(device), g.to(device)).double().cpu()
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=0)
    with configured(**SMALL, layer_prefers_gram=False):
        direct = layer_sqnorm.linear_sqnorm(a.to(device), g.to(device)).double().cpu()
    # A compiler for GPUs may contract two variants of a kernel differently, which moves the last bit.
    torch.testing.assert_close(result[:, 1], direct[:, 1], rtol=1e-6 * (device.type != "cpu"), atol=0)
    # The others keep the Gram route's rounding, which is seldom the same.
    others = torch.arange(9) != 1
    assert (result[:, others] != direct[:, others]).any()


def test_a_grid_in_pieces(device, monkeypatch):
    a, g = torch.randn(2, 20, 4, 4, device=device), torch.randn(3, 2, 17, 4, 4, device=device)
    found = []
    for programs in (layer_sqnorm.PROGRAMS, 7):
        monkeypatch.setattr(layer_sqnorm, "PROGRAMS", programs)
        with configured(**SMALL):
            found.append(conv_sqnorm(a, g, 3, padding=1, impl="triton"))
    assert torch.equal(*found)


def test_nan_stays_in_its_sample(device):
    a, g = torch.ones(3, 4, 5, 5, device=device), torch.ones(1, 3, 4, 5, 5, device=device)
    a[1, 2, 3, 3] = torch.nan
    with configured(**SMALL):
        result = conv_sqnorm(a, g, 3, padding=1, impl="triton")[0]
    assert result[1].isnan()
    assert result[0] == result[2]
    assert result[0].isfinite()


def test_empty(device):
    a, g = torch.ones(0, 4, 5, 5, device=device), torch.ones(2, 0, 4, 5, 5, device=device)
    assert conv_sqnorm(a, g, 3, padding=1, impl="triton").shape == (2, 0)


def test_refusals(device):
    a, g = torch.ones(1, 4, 5, dtype=torch.float64, device=device), torch.ones(1, 4, 5, device=device)
    with pytest.raises(ValueError, match="impl must be 'auto' or 'eager' here: it was 'triton'"):
        conv_sqnorm(a, g, 1, impl="triton")


@pytest.mark.parametrize("operator", ["conv", "linear"])
def test_opcheck(operator, device):
    a, g = torch.ones(2, 4, 5, 5, device=device), torch.ones(1, 2, 4, 5, 5, device=device)
    with configured(**SMALL):
        if operator == "conv":
            arguments = (a, g, [3, 3], [1, 1], [1, 1], [1, 1], 1)
            torch.library.opcheck(torch.ops.fastgrad.conv_sqnorm_kernel.default, arguments)
        else:
            torch.library.opcheck(torch.ops.fastgrad.linear_sqnorm_kernel.default, (a[:, 0], g[:, :, 0]))

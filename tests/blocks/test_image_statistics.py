"""Image statistics against a pixel-by-pixel NumPy computation in float64, and what they must not depend on."""

import numpy as np
import pytest
import torch

from fastgrad.blocks.image_statistics import STATISTICS, image_statistics, is_image
from fastgrad.blocks.local_contrast import QUANTILES


def reference(image: np.ndarray) -> np.ndarray:
    """The definition, one pixel after the other, for ``(C, H, W)`` in float64."""
    _, height, width = image.shape
    diagonal, laplacian, down, right, intensity = [], [], [], [], []
    for i in range(1, height - 1):
        for j in range(1, width - 1):
            c = image[:, i, j]
            below, beside = image[:, i + 1, j], image[:, i, j + 1]
            diagonal.append(((c - below - beside + image[:, i + 1, j + 1]) ** 2).mean())
            around = below + beside + image[:, i - 1, j] + image[:, i, j - 1]
            laplacian.append(((4 * c - around) ** 2).mean())
            down.append(((c - below) ** 2).mean())
            right.append(((c - beside) ** 2).mean())
            intensity.append(c.mean())
    floor = 1e-8 * np.var(intensity)
    measures = [np.quantile(values, QUANTILES) for values in (diagonal, laplacian, down + right)]
    return np.concatenate(
        [*[(values + floor) ** 0.25 for values in measures], np.quantile(intensity, QUANTILES)]
    )


@pytest.mark.parametrize("shape", [(3, 9, 7), (1, 3, 3), (4, 12, 12)])
def test_equal_to_the_definition(shape):
    x = torch.rand(5, *shape, dtype=torch.float64)
    expected = np.stack([reference(image) for image in x.numpy()])
    # Float64: a fourth root divides relative errors by four; a difference of pixels below 1 has absolute
    # error 2 eps, and the floor keeps squared contrast above 1e-8 of the variance (here about 0.08).
    np.testing.assert_allclose(image_statistics(x).numpy(), expected, rtol=1e-10)
    np.testing.assert_allclose(image_statistics(x.float()).numpy(), expected, rtol=2e-5, atol=2e-5)


def test_half_precision_is_computed_in_float32():
    x = torch.rand(2, 3, 8, 8, dtype=torch.float16)
    assert image_statistics(x).dtype == torch.float32
    torch.testing.assert_close(image_statistics(x), image_statistics(x.float()))


def test_large_images_are_read_on_a_grid():
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(2, 3, 400, 300, generator=generator)
    whole = np.stack([reference(image) for image in x[:, :, ::1, ::1].double().numpy()[:1]])
    # 1,000 of 119,000 pixels: a quantile's standard error in rank is below sqrt(0.25 / 940) = 0.016, and the values of
    # each measure lie within a unit.
    found = image_statistics(x)[:1].double().numpy()
    assert abs(found - whole).max() < 4 * 0.016
    assert image_statistics(x).shape == (2, STATISTICS)


def test_no_neighbour_matters_and_flat_images_are_finite():
    x = torch.rand(6, 3, 16, 16)
    together, alone = image_statistics(x), torch.cat([image_statistics(part) for part in x.split(1)])
    assert torch.equal(together, alone)
    flat = image_statistics(torch.full((2, 3, 8, 8), 0.3))
    # Differences are exactly zero; the mean of the intensities, and so the floor, has a rounding error.
    assert flat[:, :-7].max() <= (1e-8 * (2 * 0.3 * torch.finfo(torch.float32).eps) ** 2) ** 0.25
    assert image_statistics(x[:0]).shape == (0, STATISTICS)
    assert image_statistics(torch.full((1, 1, 4, 4), float("nan"))).isnan().all()


def test_noise_raises_the_low_quantiles_and_blur_lowers_the_high_ones():
    generator = torch.Generator().manual_seed(0)
    smooth = torch.linspace(0, 1, 32).expand(4, 3, 32, 32).clone()
    smooth[:, :, :, 16:] += 0.5
    clean = image_statistics(smooth)
    noisy = image_statistics(smooth + 0.03 * torch.randn(smooth.shape, generator=generator))
    assert (noisy[:, 7:10] > 3 * clean[:, 7:10]).all()
    blurred = image_statistics(torch.nn.functional.avg_pool2d(smooth, 5, 1, 2, count_include_pad=False))
    assert (blurred[:, 13] < clean[:, 13]).all()


@pytest.mark.parametrize(
    "value", [torch.rand(2, 3, 2, 8), torch.rand(2, 8), torch.zeros(2, 3, 8, 8, dtype=torch.uint8), "image"]
)
def test_what_is_no_image_is_refused(value):
    assert not is_image(value)
    if isinstance(value, torch.Tensor):
        with pytest.raises(ValueError, match=r"images must be floating, \(B, C, H, W\)"):
            image_statistics(value)

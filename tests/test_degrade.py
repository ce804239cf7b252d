import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from ksag.guidance.blur import attention_mask, degrade, gaussian_blur
from tests.reference import blurred, upsampled


@pytest.mark.parametrize(("sigma", "kernel_size"), [(1.0, 9), (2.0, 9), (3.0, 31), (0.01, 5), (50.0, 3), (2.0, 1)])
@pytest.mark.parametrize("size", [(32, 32), (16, 40), (17, 19)])
def test_blur_is_scipys(sigma, kernel_size, size):
    x = torch.randn(2, 3, *size)
    torch.testing.assert_close(gaussian_blur(x, sigma, kernel_size).double(), blurred(x, sigma, kernel_size), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("size", "sigma", "kernel_size"), [
    ((19,), 2.0, 9), ((4, 9, 8), 1.0, 5), ((4, 9, 8), (0, 1.5, 1.5), (1, 7, 7)), ((4, 9, 8), (1.5, 0, 1.5), (5, 1, 7)),
])  # fmt: skip
def test_blur_in_one_and_three_dimensions_is_scipys(size, sigma, kernel_size):
    x = torch.randn(2, 3, *size)
    radius = kernel_size // 2 if isinstance(kernel_size, int) else [k // 2 for k in kernel_size]
    planes = [gaussian_filter(plane, sigma, mode="mirror", radius=radius) for plane in x.double().flatten(0, 1).numpy()]
    expected = torch.from_numpy(np.stack(planes)).view(x.shape)
    result = gaussian_blur(x, max(sigma) if isinstance(sigma, tuple) else sigma, kernel_size)
    torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-6)


def test_blur_sigma_zero_is_no_blur():
    x = torch.randn(1, 4, 16, 16)
    assert torch.equal(gaussian_blur(x, 0.0, 9), x)


def test_blur_keeps_its_precision_under_autocast():
    x = torch.randn(1, 4, 16, 16)
    expected = gaussian_blur(x, 2.0, 9)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(gaussian_blur(x, 2.0, 9), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_blur_of_half_precision_is_rounded_once(dtype):
    x = torch.randn(1, 4, 16, 16).to(dtype)
    assert torch.equal(gaussian_blur(x, 2.0, 9), gaussian_blur(x.float(), 2.0, 9).to(dtype))


def test_mask_is_strictly_above_the_threshold_and_nearest_upsampled():
    saliency = torch.tensor([[[1.0, 1.5, 0.5], [2.0, 0.2, 0.8]]])
    mask = attention_mask(saliency, 1.0, (4, 6))
    expected = torch.tensor([[0, 1, 0], [1, 0, 0]]).repeat_interleave(2, 0).repeat_interleave(2, 1)
    assert torch.equal(mask[0, 0], expected.bool())


@pytest.mark.parametrize("size", [(7, 10), (5, 9), (16, 24)])
def test_mask_upsampling_to_sizes_that_do_not_divide(size):
    saliency = torch.rand(2, 4, 5) * 2
    assert torch.equal(attention_mask(saliency, 1.0, size), upsampled(saliency > 1, size))


@pytest.mark.parametrize(("grid", "size"), [((3,), (12,)), ((2, 3, 2), (4, 6, 8))])
def test_mask_of_one_and_three_dimensions(grid, size):
    saliency = torch.rand(2, *grid) * 2
    expected = (saliency > 1)[:, None]
    for axis, (few, many) in enumerate(zip(grid, size, strict=True)):
        expected = expected.repeat_interleave(many // few, dim=axis + 2)
    assert torch.equal(attention_mask(saliency, 1.0, size), expected)


def test_degrade_touches_only_what_is_under_the_mask():
    u, mask = torch.randn(2, 3, 16, 16), torch.rand(2, 1, 16, 16) > 0.5
    d = degrade(u, mask, 2.0, 9)
    where = mask.expand_as(u)
    assert torch.equal(d[~where], u[~where])
    assert torch.equal(d[where], gaussian_blur(u, 2.0, 9)[where])
    assert d.dtype == u.dtype

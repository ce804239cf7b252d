import pytest
import torch

from ksag.guidance.blur import attention_mask, degrade, gaussian_blur
from tests.reference import blurred, upsampled


@pytest.mark.parametrize(("sigma", "kernel_size"), [(1.0, 9), (2.0, 9), (3.0, 31), (0.01, 5), (50.0, 3), (2.0, 1)])
@pytest.mark.parametrize("size", [(32, 32), (16, 40), (17, 19)])
def test_blur_is_scipys(sigma, kernel_size, size):
    x = torch.randn(2, 3, *size)
    torch.testing.assert_close(gaussian_blur(x, sigma, kernel_size).double(), blurred(x, sigma, kernel_size), rtol=1e-5, atol=1e-6)


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


def test_degrade_touches_only_what_is_under_the_mask():
    u, mask = torch.randn(2, 3, 16, 16), torch.rand(2, 1, 16, 16) > 0.5
    d = degrade(u, mask, 2.0, 9)
    where = mask.expand_as(u)
    assert torch.equal(d[~where], u[~where])
    assert torch.equal(d[where], gaussian_blur(u, 2.0, 9)[where])
    assert d.dtype == u.dtype

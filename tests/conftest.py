import k_diffusion as K
import pytest
import torch
from torch import nn

CLASSES = 10


def randomise(module: nn.Module, std: float = 0.05) -> nn.Module:
    """Gives the layers that a UNet initialises to zero random weights: with zeros, attention would do nothing."""
    for p in module.parameters():
        if not p.any():
            nn.init.normal_(p, std=std)
    return module.eval().requires_grad_(False)


def make_denoiser(seed: int = 0) -> K.layers.Denoiser:
    """k-diffusion's own UNet, small: two levels, self-attention at the deeper one, two heads."""
    torch.manual_seed(seed)
    model = K.models.ImageDenoiserModelV1(3, 32, [1, 1], [32, 128], [False, True], mapping_cond_dim=CLASSES)
    return K.layers.Denoiser(randomise(model), sigma_data=0.5)


@pytest.fixture
def denoiser() -> K.layers.Denoiser:
    return make_denoiser()


@pytest.fixture(scope="session")
def bundled() -> K.layers.Denoiser:
    from ksag import zoo

    return zoo.load()


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def inputs(batch: int = 2, size: tuple[int, int] = (16, 24), sigma: float = 3.0):
    """x, sigma, cond, uncond for `make_denoiser`."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 3, *size, generator=generator) * (sigma**2 + 0.25) ** 0.5
    cond = torch.randn(batch, CLASSES, generator=generator)
    return x, torch.full((batch,), sigma), cond, torch.zeros(batch, CLASSES)

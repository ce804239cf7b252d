import k_diffusion as K
import pytest
import torch

from tests.models import make_denoiser


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

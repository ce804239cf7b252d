import os

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # here and in the processes that tests start: more threads than cores slow PyTorch tenfold

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

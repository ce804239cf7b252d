import os

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # here and in the processes that tests start: more threads than cores slow PyTorch tenfold
os.environ.setdefault("K_DIFFUSION_USE_COMPILE", "0")  # its transformers would compile some small functions, which takes a minute

import subprocess
import sys
from pathlib import Path

import k_diffusion as K
import pytest
import torch
from filelock import FileLock

from tests.models import make_denoiser

ROOT = Path(__file__).parents[1]


@pytest.fixture
def denoiser() -> K.layers.Denoiser:
    return make_denoiser()


@pytest.fixture(scope="session")
def bundled() -> K.layers.Denoiser:
    from ksag import zoo

    return zoo.load()


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the documentation, built once for all processes. A warning, such as a broken link, is an error."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "site"
    built = folder.with_suffix(".built")
    with FileLock(folder.with_suffix(".lock")):
        if not built.is_file():
            command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
            result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            assert result.returncode == 0, result.stdout + result.stderr
            built.touch()
    return folder


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)

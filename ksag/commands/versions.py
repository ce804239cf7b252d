"""`ksag --version`: what a bug report needs to say."""

import platform
from importlib.metadata import PackageNotFoundError, version

import click

from ksag import __version__

PACKAGES = ("torch", "torchvision", "k-diffusion", "einops", "diffusers", "transformers")


def versions() -> str:
    """The versions of ksag, Python and the packages that it runs on, one a line. Imports none of the packages."""
    python = f"python {platform.python_version()}, {platform.system()} {platform.machine()}"
    return "\n".join([f"ksag {__version__}", python, *(f"{name} {_installed(name)}" for name in PACKAGES)])


def _installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


version_option = click.version_option(
    message=versions(), help="Show the versions of ksag, Python and the packages that it runs on, and exit."
)

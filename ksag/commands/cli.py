"""The command `ksag`."""

import importlib
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import click

from ksag import __version__

COMMANDS = ("demo", "sample", "evaluate")
"""Each is `command` in the module of its name in `ksag.commands`."""
PACKAGES = ("torch", "torchvision", "k-diffusion", "einops", "diffusers", "transformers")


def versions() -> str:
    """The versions of ksag, Python and the packages that it runs on, one a line, for bug reports. Imports none of the packages."""

    def installed(name: str) -> str:
        try:
            return version(name)
        except PackageNotFoundError:
            return "not installed"

    python = f"python {platform.python_version()}, {platform.system()} {platform.machine()}"
    return "\n".join([f"ksag {__version__}", python, *(f"{name} {installed(name)}" for name in PACKAGES)])


def is_ours(error: BaseException) -> bool:
    """Whether ksag's own code raised it. Errors from a model or another library keep their traceback."""
    last = error.__traceback__
    while last and last.tb_next:
        last = last.tb_next
    return last is not None and last.tb_frame.f_globals.get("__name__", "").partition(".")[0] == "ksag"


class Commands(click.Group):
    """Imports a command only when it is called, and shows ksag's errors as one line, without a traceback."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        return importlib.import_module(f"ksag.commands.{name}").command if name in COMMANDS else None

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (ValueError, OSError, ImportError) as error:
            raise click.ClickException(str(error)) from error
        except (RuntimeError, TypeError) as error:
            on_cpu = "DefaultCPUAllocator: "
            # PyTorch's, for a GPU or a CPU; importing the first one here would slow down --help
            if type(error).__name__ == "OutOfMemoryError" or on_cpu in str(error):
                hint = (
                    "A smaller --batch-size or --size takes less memory, and so do --no-batch-cond, --dtype float16, and --offload."
                )
                raise click.ClickException(f"{str(error).rpartition(on_cpu)[2].partition('. ')[0]}. {hint}") from error
            if is_ours(error):
                raise click.ClickException(str(error)) from error
            raise


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(message=versions(), help="Show the versions of ksag, Python and the packages that it runs on, and exit.")
def main() -> None:
    """Self-Attention Guidance (SAG), PAG and SEG for k-diffusion samplers.

    `ksag demo` shows their effect, `ksag sample` makes pictures with them, and `ksag evaluate` judges folders of pictures.
    """

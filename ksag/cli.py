"""The command `ksag`."""

import importlib
from typing import Any

import click

from ksag import __version__

COMMANDS = ("demo", "sample", "evaluate")
"""Each is a function of its name in the module of its name in `ksag.commands`."""


class Commands(click.Group):
    """Imports a command when it is asked for; shows the library's errors about bad input as one line, without a traceback."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        return getattr(importlib.import_module(f"ksag.commands.{name}"), name) if name in COMMANDS else None

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (ValueError, OSError, ImportError) as error:
            raise click.ClickException(str(error)) from error


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(__version__)
def main() -> None:
    """Self-Attention Guidance for k-diffusion samplers.

    `ksag demo` shows what it does, `ksag sample` makes pictures with it, and `ksag evaluate` judges folders of them.
    """

"""`python -m ksag` is the command `ksag`."""

from ksag.cli import main

main(prog_name="python -m ksag")

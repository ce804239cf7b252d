"""`python -m ksag` is the command `ksag`."""

from ksag.commands.cli import main

if __name__ == "__main__":
    main(prog_name="python -m ksag")

"""Turn a many-step diffusion model into a generator of 1 to 4 steps.

    rcfd distill

goes from real images to a 1-step generator, on the CPU in minutes; `rcfd COMMAND --help` shows the options of a
command. On several GPUs, or what else `accelerate launch` can do:

    accelerate launch --multi_gpu --num_processes 8 -m diffusers_rcfd distill
"""

import sys
from importlib import import_module
from types import ModuleType

from diffusers_rcfd import __version__

COMMANDS = (
    "distill",
    "sfd",
    "train-teacher",
    "train-classifier",
    "evaluate",
    "compare",
    "ablate",
    "sample",
    "inspect",
    "convert",
    "verify",
    "demo",
)


def main(args: list[str] | None = None) -> None:
    """Run a command: its name, then its options.

    Args:
        args (`list[str]`, *optional*): defaults to the command line of the process.
    """
    name, *options = (sys.argv[1:] if args is None else args) or ["--help"]
    if name in ("-h", "--help"):
        print(describe())
    elif name == "--version":
        print(__version__)
    elif name.replace("_", "-") in COMMANDS:
        load_command(name).main(options)
    else:
        sys.exit(f"rcfd: the command must be one of {', '.join(COMMANDS)}, got {name!r}.")


def load_command(name: str) -> ModuleType:
    """The module of a command."""
    return import_module(f"diffusers_rcfd.cli.{name.replace('-', '_')}")


def describe() -> str:
    """The page of `rcfd --help`: every command with the first line of its own page."""
    lines = (f"  {name:18}{load_command(name).__doc__.splitlines()[0]}" for name in COMMANDS)
    return "\n".join(["usage: rcfd COMMAND [options]", "", __doc__, "commands:", *lines])


if __name__ == "__main__":
    main()

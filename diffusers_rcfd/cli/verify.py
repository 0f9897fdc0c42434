"""Check every file that runs have written in a folder against the checksum that it was written with.

rcfd verify runs/digits
"""

from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from pathlib import Path


def read_options(args: list[str] | None = None) -> Namespace:
    """What to verify."""
    parser = ArgumentParser("rcfd verify", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="Folder of a run, a job, a checkpoint or a saved model.")
    return parser.parse_args(args)


def main(args: list[str] | None = None) -> None:
    """Name each damaged or missing file; the exit status is 1 where there is one."""
    folder = read_options(args).folder.expanduser()
    from diffusers_rcfd.trainers.parts import verify

    try:
        faults = verify(folder)
    except FileNotFoundError as error:
        raise SystemExit(f"rcfd verify: {error}") from error
    print("\n".join(faults) or f"Every file of {folder} is what was written.")
    raise SystemExit(int(bool(faults)))

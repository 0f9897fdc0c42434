"""Grids of distillation runs: what a YAML file asks for, checked, and the commands that it comes to."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from diffusers_rcfd.cli import distill, sfd, train_classifier, train_teacher
from diffusers_rcfd.cli.options import RECIPES, read_yaml
from diffusers_rcfd.validation import require

GRIDS = RECIPES / "ablations"
COMMANDS = {
    "distill": distill,
    "sfd": sfd,
    "train-teacher": train_teacher,
    "train-classifier": train_classifier,
}
SCRIPTS = {"distill_rcfd": "distill", "distill_sfd": "sfd"}  # what grids of version 0.1 call a command
SECTIONS = {
    "output_dir": (str, "a folder"),
    "seeds": (list, "a list"),
    "prepare": (list, "a list"),
    "options": (dict, "`option: value` lines"),
    "runs": (dict, "`name: options` lines"),
    "figure": (dict, "`option: value` lines"),
}


class AblationJob(NamedTuple):
    """A run of a command: its name, its command line, and the file that tells that it is done."""

    command: str
    args: list[str]
    done: Path


def read_grid(name: str, seeds: list[int] | None = None) -> dict:
    """Read and check a grid.

    Args:
        name (`str`): a YAML file, or the name of one of the paper's ablations.
        seeds (`list[int]`, *optional*): in place of the grid's own.

    Raises:
        FileNotFoundError: if there is no such grid.
        ValueError: for anything in it that cannot be a grid.
    """
    path = Path(name)
    path = path if path.is_file() else GRIDS / f"{name}.yaml"
    if not path.is_file():
        raise FileNotFoundError(f"`grid` must be a YAML file or one of {known_grids()}, got {name!r}.")
    grid = read_yaml(path, "grid")
    require(grid.keys() <= SECTIONS.keys(), "grid", path.name, f"sections of {sorted(SECTIONS)}")
    grid = {"seeds": ["0"], "prepare": [], "options": {}, "figure": {}} | grid
    for section, (kind, allowed) in SECTIONS.items():
        require(isinstance(grid.get(section), kind), section, grid.get(section), f"given in the grid, as {allowed}")
    require(grid["runs"], "runs", grid["runs"], "given in the grid")
    grid["runs"] = {str(run): check_options(own or {}, f"runs: {run}") for run, own in grid["runs"].items()}
    for section, options in (("options", grid["options"]), *(("prepare", job) for job in grid["prepare"])):
        check_options(options, section)
    for axis, value in grid["figure"].items():
        require(isinstance(value, str), f"figure: {axis}", value, "the name of an option")
    for options in grid["runs"].values():
        check_position(grid["options"] | options, grid["figure"].get("x"))
    return grid | {"seeds": seeds or [read_seed(seed) for seed in grid["seeds"]]}


def known_grids() -> list[str]:
    """The grids that are known by name."""
    return sorted(path.stem for path in GRIDS.glob("*.yaml"))


def read_seed(text: str) -> int:
    """A seed of a grid."""
    require(str(text).isdecimal(), "seeds", text, "integers of at least 0")
    return int(text)


def check_options(options: dict, section: str) -> dict:
    """Return the options of a section; a `ValueError` if one is not text, as on a command line, or a list of it."""
    require(isinstance(options, dict), section, options, "`option: value` lines")
    for name, value in options.items():
        parts = value if isinstance(value, list) else [value]
        text = all(isinstance(part, str) for part in parts)
        require(text, str(name), value, f"text, a number or a list of them in the grid's {section!r}")
    return options


def check_position(options: dict, x: str | None) -> None:
    """Raise a `ValueError` if a run cannot be drawn over the option x: found before the first run."""
    try:
        float(options.get(x, 0))
    except (TypeError, ValueError):
        require(False, "figure", x, f"an option that is one number, not {options[x]!r}")


def plan_jobs(grid: dict, given: dict[str, str]) -> Iterator[AblationJob]:
    """Every job of a grid, in order.

    Args:
        grid (`dict`): of `read_grid`.
        given (`dict[str, str]`): values of the variables in the grid's braces.
    """
    for seed in grid["seeds"]:
        variables = given | {"seed": seed}
        for job in grid["prepare"]:
            options = fill(job, variables) | {"seed": seed}
            command = name_command(options)
            for name in ("done", "output_dir"):
                require(isinstance(options.get(name), str), name, options.get(name), "given for each job of `prepare`")
            done = Path(options["output_dir"], options.pop("done"))
            yield AblationJob(command, make_command_line(options), done)
        for name, own in grid["runs"].items():
            folder = find_run(grid, name, seed)
            options = fill(grid["options"] | own, variables)
            options |= {"output_dir": str(folder), "seed": seed, "compare_with_pd": False}
            yield AblationJob("distill", make_command_line(options), folder / "comparison.json")


def name_command(options: dict) -> str:
    """Take the name of the command out of the options of a job; in grids of version 0.1 it is `script`."""
    key = "script" if "script" in options else "command"
    given = str(options.pop(key, None))
    name = SCRIPTS.get(given, given.replace("_", "-"))
    require(name in COMMANDS, key, given, f"one of {tuple(COMMANDS)}")
    return name


def find_run(grid: dict, name: str, seed: int) -> Path:
    """Folder of one run: the name with all but letters, digits and dots as dashes, and the seed."""
    plain = "".join(letter if letter.isalnum() or letter == "." else "-" for letter in name)
    return Path(grid["output_dir"], f"{plain}-seed{seed}")


def fill(options: dict, variables: dict) -> dict:
    """Options with {NAME} replaced by the variables."""
    try:
        return {k: v.format_map(variables) if isinstance(v, str) else v for k, v in options.items()}
    except KeyError as error:
        raise ValueError(f"`variables` must give {error.args[0]}=VALUE for this grid.") from None
    except (ValueError, IndexError, AttributeError) as error:
        raise ValueError(f"`grid` must have its braces around names of variables: {error} in {options}.") from None


def make_command_line(options: dict) -> list[str]:
    """Options as a command line that goes on from where a run stood."""
    args = ["--resume_from_checkpoint", "latest"]
    for name, value in options.items():
        args += [f"--{name}", *(str(part) for part in (value if isinstance(value, list) else [value]))]
    return args

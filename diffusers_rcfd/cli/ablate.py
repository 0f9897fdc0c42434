"""Run a grid of distillations, such as the paper's ablations: one table, one figure.

    rcfd ablate losses
    rcfd ablate classifiers --variables data_dir=FOLDER_OF_THE_IDX_FILES

A grid is a YAML file (those of the paper's ablations are known by name):

    output_dir: runs/ablations/losses
    seeds: [0, 1, 2]
    prepare:        # commands that run once for each seed, unless the file `done` is in their output_dir
      - {command: distill, done: comparison.json, config: digits, output_dir: "runs/digits-seed{seed}"}
    options:        # of `rcfd distill`, for every run; {seed} and the --variables are filled in
      teacher: runs/digits-seed{seed}/students/8-step
    runs:           # name: its own options
      PD: {objective: pd}
    figure: {x: temperature, line: distribution}     # optional: curves over an option, else bars

A grid that was stopped goes on where it stopped.
"""

import json
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from diffusers_rcfd.cli import distill, sfd, train_classifier, train_teacher
from diffusers_rcfd.cli.options import RECIPES, Group, parse_options, read_yaml
from diffusers_rcfd.validation import option, require, require_count

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


@dataclass
class Ablation:
    """Which grid to run."""

    grid: str = option("losses", "Grid: a YAML file, or the name of one of the paper's ablations.")
    seeds: list[int] | None = option(None, "Seeds instead of the grid's.")
    variables: list[str] = option([], "NAME=VALUE, for each {NAME} in the grid.")

    def __post_init__(self):
        for variable in self.variables:
            require("=" in variable, "variables", variable, "NAME=VALUE")
        for seed in self.seeds or ():
            require_count("seeds", seed, 0)


class AblationJob(NamedTuple):
    """A run of a command: its name, its command line, and the file that tells that it is done."""

    command: str
    args: list[str]
    done: Path


def read_options(args: list[str] | None = None) -> tuple[Ablation]:
    """Which grid to run; its name may stand first, without `--grid`."""
    args = sys.argv[1:] if args is None else list(args)
    if args and not args[0].startswith("-"):
        args = ["--grid", *args]
    return parse_options(Group(Ablation, "grid"), command="ablate", description=__doc__, args=args)


def main(args: list[str] | None = None) -> None:
    """Run the jobs of a grid that are not done, and report."""
    (ablation,) = read_options(args)
    try:
        grid = read_grid(ablation)
        jobs = list(plan_jobs(grid, ablation))
        for job in jobs:
            COMMANDS[job.command].read_options(job.args)  # mistakes are found before the first run
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"rcfd ablate: {error}")
    todo = [job for job in jobs if not job.done.exists()]
    for number, job in enumerate(todo, 1):
        print(f"[{number} of {len(todo)}] {job.done.parent}", flush=True)
        COMMANDS[job.command].main(job.args)
    report(grid)


def read_grid(ablation: Ablation) -> dict:
    """The grid of a YAML file, checked."""
    path = Path(ablation.grid)
    path = path if path.is_file() else GRIDS / f"{ablation.grid}.yaml"
    if not path.is_file():
        raise FileNotFoundError(f"`grid` must be a YAML file or one of {known_grids()}, got {ablation.grid!r}.")
    grid = read_yaml(path, "grid")
    require(grid.keys() <= SECTIONS.keys(), "grid", path.name, f"sections of {sorted(SECTIONS)}")
    grid = {"seeds": ["0"], "prepare": [], "options": {}, "figure": {}} | grid
    for section, (kind, allowed) in SECTIONS.items():
        require(isinstance(grid.get(section), kind), section, grid.get(section), f"given in the grid, as {allowed}")
    require(grid["runs"], "runs", grid["runs"], "given in the grid")
    grid["runs"] = {str(name): check_options(own or {}, f"runs: {name}") for name, own in grid["runs"].items()}
    for section, options in (("options", grid["options"]), *(("prepare", job) for job in grid["prepare"])):
        check_options(options, section)
    for name, value in grid["figure"].items():
        require(isinstance(value, str), f"figure: {name}", value, "the name of an option")
    for options in grid["runs"].values():
        check_position(grid["options"] | options, grid["figure"].get("x"))
    return grid | {"seeds": ablation.seeds or [read_seed(seed) for seed in grid["seeds"]]}


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
        text = all(isinstance(part, (str, int, float)) for part in parts)
        require(text, str(name), value, f"text, a number or a list of them in the grid's {section!r}")
    return options


def check_position(options: dict, x: str | None) -> None:
    """Raise a `ValueError` if a run cannot be drawn over the option x: found before the first run."""
    try:
        float(options.get(x, 0))
    except (TypeError, ValueError):
        require(False, "figure", x, f"an option that is one number, not {options[x]!r}")


def plan_jobs(grid: dict, ablation: Ablation) -> Iterator[AblationJob]:
    """Every job of a grid, in order."""
    given = dict(variable.split("=", 1) for variable in ablation.variables)
    for seed in grid["seeds"]:
        variables = given | {"seed": seed}
        for job in grid["prepare"]:
            options = fill(job, variables) | {"seed": seed}
            command = name_command(options)
            for name in ("done", "output_dir"):
                require(name in options, name, None, "given for each job of `prepare`")
            done = Path(options["output_dir"], options.pop("done"))
            yield AblationJob(command, make_command_line(options), done)
        for name, own in grid["runs"].items():
            folder = run_folder(grid, name, seed)
            options = fill(grid["options"] | own, variables)
            options |= {"output_dir": str(folder), "seed": seed, "compare_with_pd": False}
            yield AblationJob("distill", make_command_line(options), folder / "comparison.json")


def name_command(options: dict) -> str:
    """Take the name of the command out of the options of a job; in grids of version 0.1 it is `script`."""
    key = "script" if "script" in options else "command"
    given = options.pop(key, None)
    name = SCRIPTS.get(given, str(given).replace("_", "-"))
    require(name in COMMANDS, key, given, f"one of {tuple(COMMANDS)}")
    return name


def run_folder(grid: dict, name: str, seed: int) -> Path:
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


def report(grid: dict) -> None:
    """Write the table, the numbers and the figure of a grid whose runs are done."""
    results = {name: read_results(grid, name) for name in grid["runs"]}
    folder = Path(grid["output_dir"])
    first = json.loads((run_folder(grid, next(iter(grid["runs"])), grid["seeds"][0]) / "comparison.json").read_text())
    labels = {key: metric["label"] for key, metric in first[0]["evaluation"]["metrics"].items()}
    table = make_table(results, labels)
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    (folder / "results.md").write_text(table + "\n", encoding="utf-8")
    draw(results, grid, labels["fd"], folder / "results.png")
    print(f"\n{table}\n\nThe table, its numbers and the figure are in {folder}.")


def read_results(grid: dict, name: str) -> dict[str, dict[str, list[float]]]:
    """Values by seed of each metric, by steps, of one run."""
    results = {}
    for seed in grid["seeds"]:
        for row in json.loads((run_folder(grid, name, seed) / "comparison.json").read_text(encoding="utf-8")):
            if row["method"] != "DDIM":
                values = results.setdefault(str(row["num_inference_steps"]), {})
                for metric, value in row["evaluation"]["metrics"].items():
                    values.setdefault(metric, []).append(value["value"])
    return results


def make_table(results: dict, labels: dict) -> str:
    """A line for each run: the mean over the seeds of each metric at each step count, with its standard deviation."""
    columns = [(steps, metric) for steps in next(iter(results.values())) for metric in labels]
    header = ["run", *(f"{labels[metric]}, {steps} step{'s' * (steps != '1')}" for steps, metric in columns)]
    lines = [header, ["---", *("---:" for _ in columns)]]
    for name, values in results.items():
        cells = [values[steps][metric] for steps, metric in columns]
        lines.append([name, *(format_mean(cell) for cell in cells)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def format_mean(values: list[float]) -> str:
    """The mean of some values, with their standard deviation."""
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{deviation}"


def draw(results: dict, grid: dict, label: str, path: Path) -> None:
    """Distances as curves over the option `figure.x`, a line for each value of `figure.line`; else as bars."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    x, line = grid["figure"].get("x"), grid["figure"].get("line")
    all_steps = list(next(iter(results.values())))
    figure, axes = pyplot.subplots(1, len(all_steps), figsize=(4.5 * len(all_steps), 3.5), squeeze=False)
    for axis, steps in zip(axes[0], all_steps, strict=True):
        curves = {}
        for name, values in results.items():
            fd = values[steps]["fd"]
            spread = statistics.stdev(fd) if len(fd) > 1 else 0.0
            options = grid["options"] | grid["runs"][name]
            if x is None:
                axis.barh(name, statistics.mean(fd), xerr=spread, color="C0")
            elif x in options:
                curves.setdefault(str(options.get(line, "")), []).append(
                    (float(options[x]), statistics.mean(fd), spread)
                )
            else:
                axis.axhline(statistics.mean(fd), color="grey", linestyle="--", label=name)
        for name, points in curves.items():
            positions, means, spreads = zip(*sorted(points), strict=True)
            axis.errorbar(positions, means, spreads, marker="o", capsize=2, label=name)
        if x is None:
            axis.set(xscale="log", xlabel=label, title=f"{steps} steps")
            axis.invert_yaxis()
        else:
            axis.set(xlabel=x, ylabel=label, title=f"{steps} steps")
            axis.legend()
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)

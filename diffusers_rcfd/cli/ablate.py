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
from dataclasses import dataclass
from pathlib import Path

from diffusers_rcfd.cli.grids import COMMANDS, find_run, plan_jobs, read_grid
from diffusers_rcfd.cli.options import Group, parse_options
from diffusers_rcfd.validation import option, require, require_count


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
        grid = read_grid(ablation.grid, ablation.seeds)
        jobs = list(plan_jobs(grid, dict(variable.split("=", 1) for variable in ablation.variables)))
        for job in jobs:
            COMMANDS[job.command].read_options(job.args)  # mistakes are found before the first run
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"rcfd ablate: {error}")
    todo = [job for job in jobs if not job.done.exists()]
    for number, job in enumerate(todo, 1):
        print(f"[{number} of {len(todo)}] {job.done.parent}", flush=True)
        COMMANDS[job.command].main(job.args)
    report(grid)


def report(grid: dict) -> None:
    """Write the table, the numbers and the figure of a grid whose runs are done."""
    results = {name: read_results(grid, name) for name in grid["runs"]}
    folder = Path(grid["output_dir"])
    first = json.loads((find_run(grid, next(iter(grid["runs"])), grid["seeds"][0]) / "comparison.json").read_text())
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
        for row in json.loads((find_run(grid, name, seed) / "comparison.json").read_text(encoding="utf-8")):
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

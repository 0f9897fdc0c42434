"""A grid of distillation runs, one after another: the paper's ablations as one table and one figure.

python examples/ablate.py losses
python examples/ablate.py classifiers --variables data_dir=FOLDER_OF_THE_IDX_FILES

A grid is a YAML file (those of configs/ablations are known by name):

    output_dir: runs/ablations/losses
    seeds: [0, 1, 2]
    prepare:        # scripts that run once for each seed, unless the file `done` is in their output_dir
      - {script: distill_rcfd, done: comparison.json, config: digits, output_dir: "runs/digits-seed{seed}"}
    options:        # of distill_rcfd.py, for every run; {seed} and the --variables are filled in
      teacher: runs/digits-seed{seed}/students/8-step
    runs:           # name: its own options
      PD: {objective: pd}
    figure: {x: temperature, line: distribution}     # optional: curves over an option, else bars

A grid that was stopped goes on where it stopped.
"""

import importlib
import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import yaml

from diffusers_rcfd.cli.options import parse_options
from diffusers_rcfd.validation import option, require, require_count

EXAMPLES = Path(__file__).parent
GRIDS = EXAMPLES / "configs/ablations"
SECTIONS = {"output_dir", "seeds", "prepare", "options", "runs", "figure"}


@dataclass
class Ablation:
    """Which grid to run."""

    grid: str = option("losses", "Grid: a YAML file, or the name of one in configs/ablations.")
    seeds: list[int] | None = option(None, "Seeds instead of the grid's.")
    variables: list[str] = option([], "NAME=VALUE, for each {NAME} in the grid.")

    def __post_init__(self):
        for variable in self.variables:
            require("=" in variable, "variables", variable, "NAME=VALUE")
        for seed in self.seeds or ():
            require_count("seeds", seed, 0)


def main():
    args = sys.argv[1:]
    if args and not args[0].startswith("-"):
        args = ["--grid", *args]
    (ablation,) = parse_options(Ablation, description=__doc__, args=args)
    try:
        grid = read_grid(ablation)
        jobs = list(planned_jobs(grid, ablation))
        scripts = {script: load_script(script) for script, *_ in jobs}
        for script, job_args, _ in jobs:
            scripts[script].read_options(job_args)  # mistakes are found before the first run
    except (ValueError, FileNotFoundError, KeyError) as error:
        sys.exit(f"ablate.py: {error}")
    todo = [job for job in jobs if not job[2].exists()]
    for number, (script, job_args, done) in enumerate(todo, 1):
        print(f"[{number} of {len(todo)}] {done.parent}", flush=True)
        scripts[script].main(job_args)
    report(grid)


def read_grid(ablation: Ablation) -> dict:
    """The grid of a YAML file, checked."""
    path = Path(ablation.grid)
    path = path if path.is_file() else GRIDS / f"{ablation.grid}.yaml"
    known = sorted(file.stem for file in GRIDS.glob("*.yaml"))
    if not path.is_file():
        raise FileNotFoundError(f"`grid` must be a YAML file or one of {known}, got {ablation.grid!r}.")
    grid = yaml.safe_load(path.read_text(encoding="utf-8"))
    require(isinstance(grid, dict) and grid.keys() <= SECTIONS, "grid", path.name, f"sections of {sorted(SECTIONS)}")
    for section in ("output_dir", "runs"):
        require(grid.get(section), section, grid.get(section), "given in the grid")
    grid = {"prepare": [], "options": {}, "figure": {}, "seeds": [0]} | grid
    return grid | ({"seeds": ablation.seeds} if ablation.seeds else {})


def planned_jobs(grid: dict, ablation: Ablation):
    """(script, its command line, the file that tells it is done) of every job, in order."""
    given = dict(variable.split("=", 1) for variable in ablation.variables)
    for seed in grid["seeds"]:
        variables = given | {"seed": seed}
        for job in grid["prepare"]:
            options = filled({key: value for key, value in job.items() if key not in ("script", "done")}, variables)
            yield job["script"], command_line(options | {"seed": seed}), Path(options["output_dir"], job["done"])
        for name, own in grid["runs"].items():
            folder = run_folder(grid, name, seed)
            options = filled(grid["options"] | (own or {}), variables)
            options |= {"output_dir": str(folder), "seed": seed, "compare_with_pd": False}
            yield "distill_rcfd", command_line(options), folder / "comparison.json"


def run_folder(grid: dict, name: str, seed: int) -> Path:
    """Folder of one run: the name with all but letters, digits and dots as dashes, and the seed."""
    plain = "".join(letter if letter.isalnum() or letter == "." else "-" for letter in name)
    return Path(grid["output_dir"], f"{plain}-seed{seed}")


def filled(options: dict, variables: dict) -> dict:
    """Options with {NAME} replaced by the variables."""
    try:
        return {k: v.format_map(variables) if isinstance(v, str) else v for k, v in options.items()}
    except KeyError as error:
        raise ValueError(f"`variables` must give {error.args[0]}=VALUE for this grid.") from None


def command_line(options: dict) -> list[str]:
    """Options as a command line that goes on from where a run stood."""
    args = ["--resume_from_checkpoint", "latest"]
    for name, value in options.items():
        args += [f"--{name}", *(str(part) for part in (value if isinstance(value, list) else [value]))]
    return args


def load_script(name: str):
    """An example script as a module."""
    require((EXAMPLES / f"{name}.py").is_file(), "script", name, "an example that stands beside ablate.py")
    sys.path.insert(0, str(EXAMPLES))
    return importlib.import_module(name)


def report(grid: dict) -> None:
    """Write the table, the numbers and the figure of a grid whose runs are done."""
    results = {name: read_results(grid, name) for name in grid["runs"]}
    folder = Path(grid["output_dir"])
    first = json.loads((run_folder(grid, next(iter(grid["runs"])), grid["seeds"][0]) / "comparison.json").read_text())
    labels = {key: metric["label"] for key, metric in first[0]["evaluation"]["metrics"].items()}
    table = markdown_table(results, labels)
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


def markdown_table(results: dict, labels: dict) -> str:
    """A line for each run: the mean over the seeds of each metric at each step count, with its standard deviation."""
    columns = [(steps, metric) for steps in next(iter(results.values())) for metric in labels]
    header = ["run", *(f"{labels[metric]}, {steps} step{'s' * (steps != '1')}" for steps, metric in columns)]
    lines = [header, ["---", *("---:" for _ in columns)]]
    for name, values in results.items():
        cells = [values[steps][metric] for steps, metric in columns]
        lines.append([name, *(mean_and_deviation(cell) for cell in cells)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def mean_and_deviation(values: list[float]) -> str:
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
            options = grid["options"] | (grid["runs"][name] or {})
            if x is None:
                axis.barh(name, statistics.mean(fd), xerr=spread, color="C0")
            elif x in options:
                curves.setdefault(str(options.get(line, "")), []).append((options[x], statistics.mean(fd), spread))
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


if __name__ == "__main__":
    main()

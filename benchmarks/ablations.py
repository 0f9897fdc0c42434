"""The paper's Tables 2 and 3 and Figures 4 and 5 on the digits: `benchmarks/ablations.md` and its pictures.

    python benchmarks/ablations.py --data_dir FOLDER_OF_FASHION_MNISTS_IDX_FILES

runs the grids of `rcfd ablate` one after another, about an hour on two quiet cores; a run that is done is
not done again. The folder is for the classifier that never saw a digit. `--grids losses temperature` runs these alone;
the page shows those that have been run.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parent.parent
TITLES = {
    "losses": "Table 2: each loss alone, in pairs, and all three",
    "temperature": "Figure 4: the temperature, on features and on predictions",
    "classifiers": "Table 3: which classifier; the last one never saw a digit",
    "dual_temperature": "Figure 5: a temperature on teacher and student alike (Eq. 8)",
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", required=True, help="Folder of Fashion-MNIST's IDX files.")
    parser.add_argument("--grids", nargs="+", choices=TITLES, default=list(TITLES))
    args = parser.parse_args()
    for grid in args.grids:
        command = [ROOT / "examples/ablate.py", grid, "--variables", f"data_dir={args.data_dir}"]
        subprocess.run([sys.executable, *command], cwd=ROOT, check=True)
    path = ROOT / "benchmarks/ablations.md"  # what is written by hand at its end stays
    notes = (path.read_text(encoding="utf-8") if path.is_file() else "").partition("\n## What was")
    run = [grid for grid in TITLES if (ROOT / f"runs/ablations/{grid}/results.json").is_file()]
    path.write_text("\n".join([head(), *(section(grid) for grid in run)]) + notes[1] + notes[2], encoding="utf-8")


def head():
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers", "accelerate", "timm"))
    return f"""# The paper's ablations on the digits

Written on {date.today()} by

    python benchmarks/ablations.py --data_dir FOLDER_OF_FASHION_MNISTS_IDX_FILES

on shared CPU cores. {packages}.

A 4-step student of the 8-step student by PD, as in the paper's section 4.3, 200 iterations of 64 images each; seeds
0, 1, 2, each with its own base model, classifier and evaluator (benchmarks/digits.md). Mean over the seeds ± standard
deviation. FD: Frechet distance in the features of the evaluator, which no loss has seen, of 3000 generated images
against the 1797; **not FID**. Much of the deviation is between seeds and common to all rows, so that each row's ratio
to PD's of the same seed follows: mean (smallest to largest).
"""


def section(grid):
    folder = ROOT / "runs/ablations" / grid
    shutil.copy(folder / "results.png", ROOT / f"benchmarks/ablation_{grid}.png")
    results = {name: values["4"] for name, values in json.loads((folder / "results.json").read_text()).items()}
    pd = json.loads((ROOT / "runs/ablations/losses/results.json").read_text())["PD"]["4"]["fd"]
    lines = ["| run | FD | over PD's | IS |", "|---|---:|---:|---:|"]
    for name, values in results.items():
        ratios = [own / of_pd for own, of_pd in zip(values["fd"], pd, strict=True)]
        spread = f"{statistics.mean(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        lines.append(f"| {name} | {with_deviation(values['fd'])} | {spread} | {with_deviation(values['is'])} |")
    table = "\n".join(lines)
    return f"""
## {TITLES[grid]}

{table}

![The same as a picture](ablation_{grid}.png)
"""


def with_deviation(values):
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"


if __name__ == "__main__":
    main()

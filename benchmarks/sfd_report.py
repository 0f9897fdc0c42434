"""The report of what `benchmarks/sfd.py` has measured so far: tables and figures of `benchmarks/sfd.md`.

python benchmarks/sfd_report.py
"""

import json
import os
import statistics
from collections import defaultdict
from datetime import date
from importlib.metadata import version
from pathlib import Path

from sfd_agreement import agreement_table

ROOT = Path(__file__).parent.parent
EVALUATIONS = (4, 2, 1)
# The paper's lengths (1024 steps halved to 1; 10 000 iterations a rung, 20 000 for 2 and 1), 2 teacher steps each.
PAPER_LADDER = {N: sum(5 * (20_000 if M <= 2 else 10_000) for M in (512, 256, 128, 64, 32, 16, 8, 4, 2, 1) if M >= N)
                for N in EVALUATIONS}  # fmt: skip
ALONE = {
    4: "CFD on SFD's pairs, to 4, K = 2",
    2: "CFD on SFD's pairs, in stages",
    1: "CFD on SFD's pairs, to 1, K = 8",
}
VARIANTS = {  # of CFD alone, by evaluations
    name: {4: f"CFD on SFD's pairs, {name}, to 4, K = 2", 2: f"CFD on SFD's pairs, {name}{in_two}",
           1: f"CFD on SFD's pairs, {name}, to 1, K = {K}"}
    for name, in_two, K in (("spatial", "", 8), ("AFS", "", 4), ("no EMA", "", 8), ("and L1", ", in stages", 8))
}  # fmt: skip
BUDGETS = (500, 1000, 2000, 4000, 6000, 9000)
PUBLISHED = {"color": "C5", "marker": "^", "label": "SFD (L1, AFS, thresholding)"}
ANALYTICAL = {"color": "C9", "marker": "<", "label": "CFD on SFD's pairs, AFS"}
TOP = 15  # of the figures
SHOWN = {  # in the figures, by name; the others in grey
    "PD ladder": {"color": "C0", "marker": "o"},
    "RCFD ladder": {"color": "C1", "marker": "o"},
    "RCFD, base to 4, K = 8": {"color": "C8", "marker": "v"},
    "SFD (L1, AFS, thresholding)": PUBLISHED,
    "SFD (L1, AFS, thresholding), to 4": PUBLISHED,
    "SFD, no thresholding, no AFS, in stages": {"color": "C4", "marker": "D"},
    "SFD-v by CFD, one trajectory of 8": {"color": "C2", "marker": "s"},
    "CFD on SFD's pairs, in stages": {"color": "C3", "marker": "*"},
    "CFD on SFD's pairs, and L1, in stages": {"color": "black", "marker": "P"},
    "CFD on SFD's pairs, AFS": ANALYTICAL,
    "CFD on SFD's pairs, AFS, to 4, K = 2": ANALYTICAL,
    "CFD on SFD's pairs, AFS, to 1, K = 4": ANALYTICAL,
    "CFD on SFD's pairs, to 4, K = 2": {"color": "C6", "marker": "X"},
}


def read_rows(folder):
    return [row for path in sorted(folder.glob("*.json")) for row in json.loads(path.read_text(encoding="utf-8"))]


def means(rows):
    """{(method, evaluations): [(cost, mean FD, its standard deviation, mean score, seeds)]} by rising cost."""
    grouped = defaultdict(list)
    for row in rows:
        grouped[row["method"], row["evaluations"], row["cost"]].append(row)
    curves = defaultdict(list)
    for (method, N, cost), group in sorted(grouped.items(), key=lambda item: item[0][2]):
        distances = [row["fd"] for row in group]
        spread = statistics.stdev(distances) if len(group) > 1 else 0.0
        score = statistics.mean(row["is"] for row in group)
        curves[method, N].append((cost, statistics.mean(distances), spread, score, len(group)))
    return curves


def write_report():
    """`benchmarks/sfd.md` and a figure for each data set that has rows; what is written by hand at its end stays."""
    sections = []
    for data in ("digits", "fashion-mnist"):
        rows = read_rows(ROOT / "runs/sfd" / data)
        if rows:
            curves, picture = means(rows), f"sfd_{data.replace('-', '_')}.png"
            draw(curves, ROOT / "benchmarks" / picture)
            seeds = sorted({row["seed"] for row in rows})
            sections += [
                f"## {data}, seeds {', '.join(map(str, seeds))}",
                f"![FD against cost, up to {TOP}; grey: variants, which the table names]({picture})",
                table(curves),
                best_table(curves),
                variants_table(rows),
                teacher_table(curves),
            ]
    path = ROOT / "benchmarks/sfd.md"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers", "accelerate", "timm"))
    lengths = ", ".join(f"{cost:,} to {N}".replace(",", " ") for N, cost in PAPER_LADDER.items())
    head = f"""# Distance against the cost of distillation

Written by `python benchmarks/sfd.py` (see there for its options) on {date.today()},
{os.cpu_count()} shared CPU cores. {packages}.

Cost: network forward equivalents for each image of a batch of 64, a backward pass counted as two, so that an iteration
of a ladder costs K + 3 and a batch of SFD its teacher's evaluations and 3 for each of the student's; classifier and
base model are not counted. The ladders as the paper runs them (1024 steps halved, 10 000 iterations a rung, 20 000
for 2 and 1) would cost {lengths} steps; the
column *of the paper's ladder* sets each cost against that.

FD: Frechet distance in the features of an evaluator that no loss has seen; **not FID**. Mean over
the seeds ± standard deviation; a row of fewer seeds than another does not compare with it to the last digit.

## Agreement

{agreement_table()}"""
    hand = text.partition("\n## What")
    path.write_text("\n\n".join(filter(None, [head, *sections])) + "\n" + hand[1] + hand[2], encoding="utf-8")


def table(curves):
    lines = ["| evaluations | method | cost | of the paper's ladder | seeds | FD | score |",
             "|---:|---|---:|---:|---:|---:|---:|"]  # fmt: skip
    for N in EVALUATIONS:
        for (method, number), points in curves.items():
            for cost, fd, spread, score, seeds in points if number == N and points[0][0] else ():
                share, distance = cost / PAPER_LADDER[N], varied(fd, spread, seeds)
                lines.append(f"| {N} | {method} | {cost:.0f} | {share:.2%} | {seeds} | {distance} | {score:.2f} |")
    return "\n".join(lines)


def best_table(curves):
    """The entry of lowest mean FD that each budget pays for, of those with all seeds."""
    most = max(point[-1] for points in curves.values() for point in points)
    lines = [f"| for at most | {' | '.join(f'in {N}' for N in EVALUATIONS)} |", "|---:|" + "---|" * len(EVALUATIONS)]
    for budget in BUDGETS:
        cells = []
        for N in EVALUATIONS:
            paid = [(fd, method, cost) for (method, number), points in curves.items() if number == N
                    for cost, fd, _, _, seeds in points if 0 < cost <= budget and seeds == most]  # fmt: skip
            best = min(paid, key=lambda row: (row[0], len(row[1])), default=None)  # a first stage is an entry itself
            cells.append("{:.2f}, {} ({:.0f})".format(*best) if best else "")
        if any(cells):
            lines.append(f"| {budget} | {' | '.join(cells)} |")
    return "The best entry (its cost) for a budget, in 4, 2 and 1 evaluations:\n\n" + "\n".join(lines)


def variants_table(rows):
    """FD of each variant over that of CFD alone, with as many batches, on the seeds that both have."""
    found = defaultdict(dict)
    for row in rows:
        found[row["method"], row["evaluations"], row["scale"]][row["seed"]] = row["fd"]
    lines = [f"| evaluations | batches | CFD alone | {' | '.join(VARIANTS)} |", "|---:|---:|" + "---:|" * 5]
    for N, plain in ALONE.items():
        for scale in sorted(scale for method, number, scale in found if (method, number) == (plain, N)):
            alone, cells = found[plain, N, scale], []
            for entries in VARIANTS.values():
                ratios = [fd / alone[seed] for seed, fd in found[entries[N], N, scale].items() if seed in alone]
                spread = statistics.stdev(ratios) if len(ratios) > 1 else 0.0
                cells.append(varied(statistics.mean(ratios), spread, len(ratios)) if ratios else "")
            if any(cells):
                mean = statistics.mean(alone.values())
                lines.append(f"| {N} | {400 * scale:.0f} | {mean:.2f} | {' | '.join(cells)} |")
    title = "CFD's variants, FD over that of CFD alone on each seed, for as many batches:\n\n"
    return title + "\n".join(lines) if len(lines) > 2 else ""


def varied(value, spread, seeds):
    return f"{value:.2f} ± {spread:.2f}" if seeds > 1 else f"{value:.2f}"


def teacher_table(curves):
    """Of the teacher's own trajectories, which SFD's students learn; FD in each number of evaluations."""
    methods = [method for method in ("teacher", "teacher, AFS", "teacher, thresholding") if (method, 8) in curves]
    if not methods:
        return ""
    counts = sorted({N for method, N in curves if method in methods})
    lines = [f"| evaluations of the base model | {' | '.join(map(str, counts))} |", "|---|" + "---:|" * len(counts)]
    for method in methods:
        found = {N: points[0] for N in counts if (points := curves.get((method, N)))}
        cells = {N: varied(fd, spread, seeds) for N, (_, fd, spread, _, seeds) in found.items()}
        lines.append(f"| {method} | {' | '.join(cells.get(N, '') for N in counts)} |")
    return "The teacher's own trajectories, FD:\n\n" + "\n".join(lines)


def draw(curves, path):
    """A panel for each number of evaluations: FD against cost, both on log axes, a line for each of `SHOWN`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(EVALUATIONS), figsize=(15, 5.5), sharey=True)
    for axis, N in zip(axes, EVALUATIONS, strict=True):
        for (method, number), points in curves.items():
            if number == N and points[0][0]:
                costs, distances, spreads, *_ = zip(*points, strict=True)
                if method in SHOWN:
                    line = {"linestyle": "-" if "ladder" in method else "--", "label": method} | SHOWN[method]
                    axis.errorbar(costs, distances, spreads, capsize=2, **line)
                else:
                    axis.plot(costs, distances, ".", color="0.7", zorder=0)
        title = f"{N} evaluation{'s' * (N > 1)}"
        axis.set(xscale="log", yscale="log", xlabel="cost, forward equivalents", title=title)
        axis.set_ylim(top=TOP)
        axis.xaxis.set_minor_formatter("")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("{x:g}")
        axis.grid(alpha=0.3, which="both")
    axes[0].set_ylabel("FD")
    handles = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    labels = [method for method in SHOWN if method in handles]
    figure.legend([handles[method] for method in labels], labels, loc="lower center", ncols=5, fontsize=9)
    figure.tight_layout(rect=(0, 0.12, 1, 1))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    write_report()

"""Distance against the cost of distillation, for ladders and for SFD with its variants: `benchmarks/sfd.md`.

    python benchmarks/sfd.py --seeds 0 1 2                            # digits, on the runs of benchmarks/digits.py
    python benchmarks/sfd.py --data fashion-mnist --data_dir FOLDER   # on those of benchmarks/fashion_mnist.py

Every run is measured by the same evaluator, which no loss sees; what lies measured in runs/sfd is not run again, and
several processes can share the work, by seeds or by entries.
"""

import argparse
import json
import os
import statistics
import tempfile
from collections import defaultdict
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch
from accelerate import Accelerator
from sfd_agreement import agreement_table

from diffusers_rcfd import (
    CFDDistillationConfig,
    CFDDistillationTrainer,
    Evaluator,
    RCFDPipeline,
    SFDDistillationConfig,
    SFDDistillationTrainer,
    load_feature_classifier,
    load_image_data,
)

ROOT = Path(__file__).parent.parent
SHARED = {"train_batch_size": 64, "learning_rate": 5e-4, "checkpointing_steps": 0, "logging_steps": 1000}
EVALUATIONS = (4, 2, 1)
BACKWARD = 2  # a backward pass counts as two forward ones


@dataclass
class Ladder:
    """A ladder of rungs: student steps, teacher steps and iterations of each.

    `finished` is where, for each data set, its own benchmark has run this very ladder, which is not run twice.
    """

    student_steps: list[int]
    teacher_steps: list[int]
    iterations: dict[str, list[int]]
    options: dict = field(default_factory=dict)
    finished: dict[str, str] = field(default_factory=dict)

    def run(self, scale, bench, seed, folder):
        """(network evaluations, cost in forward equivalents, pipeline) of each rung that is measured."""
        iterations = [max(1, round(scale * number)) for number in self.iterations[bench.data]]
        if self.finished and scale == 1:
            folder = bench.folder(seed) / self.finished[bench.data]
        else:
            options = SHARED | bench.options | self.options | {"seed": seed, "max_train_steps": iterations}
            config = CFDDistillationConfig(
                folder, student_steps=self.student_steps, teacher_steps=self.teacher_steps, **options
            )
            CFDDistillationTrainer(bench.base(seed), bench.classifier(seed), config, bench.images).train()
        cost = 0
        for N, K, number in zip(self.student_steps, self.teacher_steps, iterations, strict=True):
            cost += number * (K + 1 + BACKWARD)
            if N in EVALUATIONS:
                yield N, cost, RCFDPipeline.from_pretrained(f"{folder}/{N}-step")


@dataclass
class Trajectories:
    """Students of SFD, each from the base model, or a single one for all of the step counts (SFD-v)."""

    student_steps: list[int]
    options: dict = field(default_factory=dict)
    joint: bool = False
    batches: int = 400

    def run(self, scale, bench, seed, folder):
        """As `Ladder.run`."""
        for counts in [self.student_steps] if self.joint else [[N] for N in self.student_steps]:
            own, options = f"{folder}/{len(counts)}-{counts[0]}", self.options
            student, cost = train_sfd(bench, seed, bench.base(seed), own, counts, self.batches * scale, options)
            for N in counts:
                yield N, cost, student


@dataclass
class Stages:
    """Students of SFD of falling step counts: the first one from the base model, each other from the one before."""

    student_steps: list[int]
    batches: list[int]
    temperature: list[float]
    options: dict = field(default_factory=dict)

    def run(self, scale, bench, seed, folder):
        """As `Ladder.run`."""
        teacher, cost = bench.base(seed), 0
        for N, batches, temperature in zip(self.student_steps, self.batches, self.temperature, strict=True):
            options = self.options | {"temperature": temperature}
            teacher, own = train_sfd(bench, seed, teacher, f"{folder}/{N}", [N], batches * scale, options)
            cost += own
            yield N, cost, teacher


@dataclass
class Teacher:
    """The teacher's own trajectories in several numbers of evaluations; nothing is trained."""

    evaluations: list[int]
    options: dict

    def run(self, scale, bench, seed, folder):
        """As `Ladder.run`."""
        for K in self.evaluations:
            options = bench.options | self.options
            config = SFDDistillationConfig(folder, student_steps=[1], teacher_steps=K, **options)
            yield K, 0, SFDDistillationTrainer(bench.base(seed), None, config).teacher_samplers[K]


def train_sfd(bench, seed, teacher, folder, counts, batches, options):
    """A student of SFD and its cost in forward equivalents."""
    batches = max(1, round(batches))
    options = {"ema_decay": 0.98} | SHARED | bench.options | options | {"seed": seed, "max_train_steps": batches}
    config = SFDDistillationConfig(folder, student_steps=counts, **options)
    trainer = SFDDistillationTrainer(teacher, bench.classifier(seed), config)
    student = trainer.train()
    each = [route.evaluations + N * (1 + BACKWARD) for route, N in zip(trainer.routes, counts, strict=True)]
    return student, batches * statistics.mean(each)


# The paper's lengths (1024 steps halved to 1; 10 000 iterations a rung, 20 000 for 2 and 1), 2 teacher steps each.
PAPER_LADDER = {N: sum(5 * (20_000 if M <= 2 else 10_000) for M in (512, 256, 128, 64, 32, 16, 8, 4, 2, 1) if M >= N)
                for N in EVALUATIONS}  # fmt: skip

LADDER = {"student_steps": [16, 8, 4, 2, 1], "teacher_steps": [4, 2, 2, 2, 2],
          "iterations": {"digits": [250, 250, 200, 300, 300], "fashion-mnist": [300, 300, 300, 400, 400]}}  # fmt: skip
SKIPPED = {"student_steps": [4, 2, 1], "iterations": {data: [300, 300, 300] for data in LADDER["iterations"]}}
ONCE = {"student_steps": [1], "iterations": {data: [400] for data in LADDER["iterations"]}}
RUN_BEFORE = {
    "pd": {"digits": "students-pd", "fashion-mnist": "pd/students"},
    "rcfd": {"digits": "students", "fashion-mnist": "rcfd-resnet18-classifier/students"},
}
GUIDED = {"objective": ["pd", "pd", "rcfd", "rcfd", "rcfd"], "temperature": [1.0, 1.0, 0.8, 1.0, 1.0]}
FROM_BASE = {"objective": ["rcfd"], "temperature": [0.8, 1.0, 1.0]}
AT_ONCE = {"objective": ["rcfd"], "temperature": [0.8]}
OWN_NODES = {"analytical_first_step": False, "dynamic_thresholding": False}
PAPER, OURS = {"objective": "l1"}, {"objective": "cfd", "temperature": 0.8} | OWN_NODES
THEN_ONE = {"batches": [400, 400], "temperature": [0.8, 1.0]}  # two stages, the second to 1 evaluation
VARIANTS = {
    "spatial": {"distribution": "spatial"},
    "AFS": {"analytical_first_step": True},
    "no EMA": {"ema_decay": 0.0},
    "and L1": {"l1_weight": 0.01},
}

ENTRIES = {
    "PD ladder": Ladder(**LADDER, options={"objective": ["pd"]}, finished=RUN_BEFORE["pd"]),
    "RCFD ladder": Ladder(**LADDER, options=GUIDED, finished=RUN_BEFORE["rcfd"]),
    "RCFD, base to 4, K = 4": Ladder(teacher_steps=[4, 2, 2], **SKIPPED, options=FROM_BASE),
    "RCFD, base to 4, K = 8": Ladder(teacher_steps=[8, 2, 2], **SKIPPED, options=FROM_BASE),
    "RCFD, base to 4, K = 16": Ladder(teacher_steps=[16, 2, 2], **SKIPPED, options=FROM_BASE),
    "RCFD, base to 1, K = 4": Ladder(teacher_steps=[4], **ONCE, options=AT_ONCE),
    "RCFD, base to 1, K = 8": Ladder(teacher_steps=[8], **ONCE, options=AT_ONCE),
    "RCFD, base to 1, K = 16": Ladder(teacher_steps=[16], **ONCE, options=AT_ONCE),
    "SFD (L1, AFS, thresholding)": Trajectories([2], PAPER),
    "SFD, no thresholding": Trajectories([2], PAPER | {"dynamic_thresholding": False}),
    "SFD, no thresholding, no AFS, to 4, K = 2": Trajectories([4], PAPER | OWN_NODES | {"teacher_steps": 2}),
    "SFD, no thresholding, no AFS, in stages": Stages([2, 1], **THEN_ONE, options=PAPER | OWN_NODES),
    "SFD, no thresholding, in stages 5, 1": Stages(
        [5, 1], **THEN_ONE, options=PAPER | {"dynamic_thresholding": False}
    ),
    "SFD-v, no thresholding, no AFS": Trajectories([1, 2, 4], PAPER | OWN_NODES, joint=True),
    "SFD-v by CFD": Trajectories([1, 2, 4], OURS, joint=True),
    "SFD-v by CFD, one trajectory of 8": Trajectories([1, 2, 4], OURS | {"teacher_steps": [8, 4, 2]}, joint=True),
    "CFD on SFD's pairs, in stages": Stages([2, 1], **THEN_ONE, options=OURS),
    "CFD on SFD's pairs, and L1, in stages": Stages([2, 1], **THEN_ONE, options=OURS | VARIANTS["and L1"]),
    "CFD on SFD's pairs, in 3 stages": Stages([4, 2, 1], [300, 300, 400], [0.8, 1.0, 1.0], OURS),
    "CFD on SFD's pairs, in 3 stages, K = 2": Stages(
        [4, 2, 1], [400, 400, 400], [0.8, 1.0, 1.0], OURS | {"teacher_steps": 2}
    ),
    "CFD on SFD's pairs, to 4, K = 2": Trajectories([4], OURS | {"teacher_steps": 2}),
    "CFD on SFD's pairs, to 4, K = 4": Trajectories([4], OURS),
    "CFD on SFD's pairs, to 2, K = 2": Trajectories([2], OURS | {"teacher_steps": 2}),
    "CFD on SFD's pairs, to 2, K = 8": Trajectories([2], OURS | {"teacher_steps": 8}),
    "CFD on SFD's pairs, to 1, K = 4": Trajectories([1], OURS),
    "CFD on SFD's pairs, to 1, K = 8": Trajectories([1], OURS | {"teacher_steps": 8}),
    "CFD on SFD's pairs, to 1, K = 16": Trajectories([1], OURS | {"teacher_steps": 16}),
    "CFD on SFD's pairs, spatial": Trajectories([2], OURS | VARIANTS["spatial"]),
    "CFD on SFD's pairs, AFS": Trajectories([2], OURS | VARIANTS["AFS"]),
    "CFD on SFD's pairs, AFS, and L1": Trajectories([2], OURS | VARIANTS["AFS"] | VARIANTS["and L1"]),
    "CFD on SFD's pairs, no EMA": Trajectories([2], OURS | VARIANTS["no EMA"]),
    "CFD on SFD's pairs, tau 1": Trajectories([2], OURS | {"temperature": 1.0}),
    "CFD on SFD's pairs, thresholding": Trajectories([2], OURS | {"dynamic_thresholding": True}),
    "RCFD on SFD's pairs": Trajectories([2], OURS | {"objective": "rcfd"}),
    **{
        f"CFD on SFD's pairs, {name}, to {N}, K = {K}": Trajectories([N], OURS | options | {"teacher_steps": K})
        for name, options in VARIANTS.items()
        for N, K in ((4, 2), (1, 4 if name == "AFS" else 8))
    },
    "teacher": Teacher([4, 8, 16, 32], OWN_NODES),
    "teacher, thresholding": Teacher([4, 8, 16, 32], OWN_NODES | {"dynamic_thresholding": True}),
}
BUDGETS = (500, 1000, 2000, 4000, 6000, 8000)
TOP = 15  # of the figures
SHOWN = {  # in the figures, by name; the others in grey
    "PD ladder": {"color": "C0", "marker": "o"},
    "RCFD ladder": {"color": "C1", "marker": "o"},
    "RCFD, base to 4, K = 8": {"color": "C8", "marker": "v"},
    "SFD (L1, AFS, thresholding)": {"color": "C5", "marker": "^"},
    "SFD, no thresholding, no AFS, in stages": {"color": "C4", "marker": "D"},
    "SFD-v by CFD, one trajectory of 8": {"color": "C2", "marker": "s"},
    "CFD on SFD's pairs, in stages": {"color": "C3", "marker": "*"},
    "CFD on SFD's pairs, and L1, in stages": {"color": "black", "marker": "P"},
    "CFD on SFD's pairs, AFS": {"color": "C9", "marker": "<"},
    "CFD on SFD's pairs, to 4, K = 2": {"color": "C6", "marker": "X"},
}


class Bench:
    """The teachers, classifiers, evaluators and images that every entry shares."""

    def __init__(self, args):
        self.args, self.data, self.options = args, args.data, {}
        self.images = load_image_data("digits")
        if self.data == "fashion-mnist":
            self.images = load_image_data("fashion-mnist", data_dir=args.data_dir, resolution=32)
            self.options = {"mixed_precision": "bf16"}
        self.accelerator = Accelerator(mixed_precision=self.options.get("mixed_precision", "no"))

    def folder(self, seed):
        return ROOT / (f"runs/digits-seed{seed}" if self.data == "digits" else "runs/fashion_mnist")

    def base(self, seed):
        return RCFDPipeline.from_pretrained(self.folder(seed) / "base")

    def classifier(self, seed):
        name = "classifier" if self.data == "digits" else "resnet18-classifier"
        return load_feature_classifier(self.folder(seed) / name)

    def measure(self, pipeline, N, seed):
        """(distance, score) of a pipeline in N network evaluations."""
        judge = load_feature_classifier(self.folder(seed) / "evaluator")
        options = {"accelerator": self.accelerator, "batch_size": 256, "seed": seed}
        evaluator = Evaluator(judge, self.images, name=f"{judge.config.backbone}-{self.data}", **options)
        result = evaluator.evaluate_pipeline(pipeline, self.args.num_images, N, seed=seed, progress=False)
        return [result.to_dict()["metrics"][metric]["value"] for metric in ("fd", "is")]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=("digits", "fashion-mnist"), default="digits")
    parser.add_argument("--data_dir", help="Folder of Fashion-MNIST's IDX files.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--scales", type=float, nargs="+", default=[1.0, 0.25],
                        help="Budgets, times the entries' own.")  # fmt: skip
    parser.add_argument("--entries", nargs="+", choices=ENTRIES, metavar="NAME", help=f"Of {list(ENTRIES)}.")
    parser.add_argument("--num_images", type=int, default=3000, help="Generated images of each value.")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    bench, folder = Bench(args), ROOT / "runs/sfd" / args.data
    folder.mkdir(parents=True, exist_ok=True)
    for name in args.entries or ENTRIES:
        for scale in [1.0] if isinstance(ENTRIES[name], Teacher) else args.scales:
            for seed in args.seeds:
                path = folder / f"{name}, seed {seed}, scale {scale:g}.json"
                if not path.is_file():
                    setting = {"method": name, "seed": seed, "scale": scale}
                    rows = [setting | row for row in run(name, scale, seed, bench)]
                    path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    write_report()


def run(name, scale, seed, bench):
    """The rows of an entry: a student of each step count, its cost and its measures."""
    with tempfile.TemporaryDirectory() as folder:
        for N, cost, pipeline in ENTRIES[name].run(scale, bench, seed, folder):
            fd, score = bench.measure(pipeline, N, seed)
            print(f"{name}, seed {seed}, scale {scale:g}: {N} evaluations, {cost:.0f}, FD {fd:.2f}", flush=True)
            yield {"evaluations": N, "cost": cost, "fd": fd, "is": score}


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


def varied(value, spread, seeds):
    return f"{value:.2f} ± {spread:.2f}" if seeds > 1 else f"{value:.2f}"


def teacher_table(curves):
    """Of the teacher's own trajectories, which SFD's students learn; FD in each number of evaluations."""
    methods = [method for method in ("teacher", "teacher, thresholding") if (method, 8) in curves]
    if not methods:
        return ""
    counts = sorted({N for method, N in curves if method in methods})
    lines = [f"| evaluations of the base model | {' | '.join(map(str, counts))} |", "|---|" + "---:|" * len(counts)]
    for method in methods:
        cells = (curves[method, N][0] for N in counts)
        lines.append(
            f"| {method} | " + " | ".join(varied(fd, spread, seeds) for _, fd, spread, _, seeds in cells) + " |"
        )
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
    main()

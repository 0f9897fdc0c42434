"""Distance against the cost of distillation, for ladders and for SFD with its variants: `benchmarks/sfd.md`.

    python benchmarks/sfd.py --seeds 0 1 2                            # digits, on the runs of benchmarks/digits.py
    python benchmarks/sfd.py --data fashion-mnist --data_dir FOLDER   # on those of benchmarks/fashion_mnist.py

Every run is measured by the same evaluator, which no loss sees; what lies measured in runs/sfd is not run again, and
several processes can share the work, by seeds or by entries.
"""

import argparse
import json
import math
import os
import statistics
import tempfile
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from sfd_report import EVALUATIONS, ROOT, write_report

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

SHARED = {"train_batch_size": 64, "learning_rate": 5e-4, "checkpointing_steps": 0, "logging_steps": 1000}
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
    """The teacher's own trajectories, for each student steps N and teacher steps K of `routes`; nothing is trained."""

    routes: list[tuple[int, int]]
    options: dict

    def run(self, scale, bench, seed, folder):
        """As `Ladder.run`."""
        for N, K in self.routes:
            options = bench.options | self.options
            config = SFDDistillationConfig(folder, student_steps=[N], teacher_steps=K, **options)
            trainer = SFDDistillationTrainer(bench.base(seed), None, config)
            yield from ((evaluations, 0, pipeline) for evaluations, pipeline in trainer.teacher_samplers.items())


def train_sfd(bench, seed, teacher, folder, counts, batches, options):
    """A student of SFD and its cost in forward equivalents."""
    batches = max(1, round(batches))
    options = {"ema_decay": 0.98} | SHARED | bench.options | options | {"seed": seed, "max_train_steps": batches}
    if "l1_weight" in options:
        options["l1_weight"] *= math.prod(teacher.image_shape)
    config = SFDDistillationConfig(folder, student_steps=counts, **options)
    trainer = SFDDistillationTrainer(teacher, bench.classifier(seed), config)
    student = trainer.train()
    each = [route.teacher_evaluations + N * (1 + BACKWARD) for route, N in zip(trainer.routes, counts, strict=True)]
    return student, batches * statistics.mean(each)


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
STRAIGHT = [(1, 4), (1, 8), (1, 16), (1, 32)]
VARIANTS = {
    "spatial": {"distribution": "spatial"},
    "AFS": {"analytical_first_step": True},
    "no EMA": {"ema_decay": 0.0},
    "and L1": {"l1_weight": 0.01},  # for each pixel
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
    "SFD (L1, AFS, thresholding), to 4": Trajectories([4], PAPER),
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
    "teacher": Teacher(STRAIGHT, OWN_NODES),
    "teacher, AFS": Teacher([(1, 4), (4, 2), (2, 4)], OWN_NODES | VARIANTS["AFS"]),
    "teacher, thresholding": Teacher(STRAIGHT, OWN_NODES | {"dynamic_thresholding": True}),
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


if __name__ == "__main__":
    main()

"""Teachers of every kind, made of Diffusers' own parts, distilled with and without adoption: `any_teacher.md`.

    python benchmarks/any_teacher.py --seeds 0 1 2

All kinds see the same images, as many of them, and have the same network. Each becomes a stock pipeline, and the
students come from `rcfd distill` and `rcfd sfd`. What lies in `--output_dir` is not run again.
"""

import argparse
import json
import statistics
import subprocess
import sys
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DDPMPipeline,
    DDPMScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    SchedulerMixin,
    UNet2DModel,
)
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel
from torch.nn import functional as F

from diffusers_rcfd import build_unet, load_image_data

ROOT = Path(__file__).parent.parent
EPOCHS, BATCH_SIZE, LEARNING_RATE, WARMUP_STEPS = 80, 64, 1e-3, 100
ADOPTION = {"full": 1200, "half": 600, "quarter": 300, "none": 0}  # iterations of the rung that changes the form
FORWARDS = 4  # forward equivalents of such an iteration: teacher 1, student 1 + 2
EVALUATIONS = (4, 2, 1)


@dataclass
class Kind:
    """A kind of teacher: its stock scheduler, and whether its network takes classes."""

    scheduler: SchedulerMixin
    class_conditional: bool = False


def ddpm(prediction_type: str, beta_schedule: str, **options) -> DDPMScheduler:
    return DDPMScheduler(prediction_type=prediction_type, beta_schedule=beta_schedule, **options)


KINDS = {
    "epsilon, linear": Kind(ddpm("epsilon", "linear")),  # what Diffusers' script makes by default
    "epsilon, scaled-linear": Kind(ddpm("epsilon", "scaled_linear", beta_start=0.00085, beta_end=0.012)),
    "v, cosine": Kind(ddpm("v_prediction", "squaredcos_cap_v2")),
    "x0, cosine": Kind(ddpm("sample", "squaredcos_cap_v2")),
    "EDM": Kind(EDMEulerScheduler()),
    "flow": Kind(FlowMatchEulerDiscreteScheduler()),
    "epsilon, linear, class-conditional": Kind(ddpm("epsilon", "linear"), class_conditional=True),
}

# --- teachers of stock parts ------------------------------------------------------------------------------------


def train_teacher(kind: Kind, folder: Path, seed: int) -> None:
    """What Diffusers' unconditional training script does, for every kind of network."""
    torch.manual_seed(seed)
    data = load_image_data("digits")
    x0 = data.images.float() / 127.5 - 1
    unet = build_unet("digits", num_class_embeds=10 if kind.class_conditional else None)
    optimizer = torch.optim.AdamW(unet.parameters(), LEARNING_RATE, betas=(0.95, 0.999), weight_decay=1e-6)
    steps = EPOCHS * (len(x0) // BATCH_SIZE)
    lr_scheduler = get_cosine_schedule_with_warmup(optimizer, WARMUP_STEPS, steps)
    ema = EMAModel(unet.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    for step in range(steps):
        rows = torch.randint(len(x0), (BATCH_SIZE,))
        labels = data.labels[rows] if kind.class_conditional else None
        loss = compute_loss(unet, kind.scheduler, x0[rows], labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        lr_scheduler.step()
        optimizer.zero_grad()
        ema.step(unet.parameters())
        if step % 500 == 0:
            print(f"{folder.parent.name}: step {step} of {steps}, loss {loss.item():.4f}", flush=True)
    ema.copy_to(unet.parameters())
    DDPMPipeline(unet, kind.scheduler).save_pretrained(folder)


def compute_loss(
    unet: UNet2DModel, scheduler: SchedulerMixin, x0: torch.Tensor, labels: torch.Tensor | None
) -> torch.Tensor:
    """The loss that networks of this scheduler are trained with."""
    eps = torch.randn_like(x0)
    if isinstance(scheduler, EDMEulerScheduler):  # Karras et al. 2022, Table 1
        sigma = (1.2 * torch.randn(len(x0), 1, 1, 1) - 1.2).exp()
        data_std = scheduler.config.sigma_data
        scale = (sigma**2 + data_std**2).sqrt()
        x = x0 + sigma * eps
        output = unet(x / scale, sigma.log().flatten() / 4, labels).sample
        return F.mse_loss(output, (x0 - (data_std / scale) ** 2 * x) / (sigma * data_std / scale))
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        t = torch.rand(len(x0), 1, 1, 1)
        output = unet((1 - t) * x0 + t * eps, 1000 * t.flatten(), labels).sample
        return F.mse_loss(output, eps - x0)
    t = torch.randint(len(scheduler), (len(x0),))
    output = unet(scheduler.add_noise(x0, eps, t), t, labels).sample
    predicts = scheduler.config.prediction_type
    if predicts == "sample":
        snr = scheduler.alphas_cumprod[t] / (1 - scheduler.alphas_cumprod[t])
        return (snr.clamp(min=1).view(-1, 1, 1, 1) * F.mse_loss(output, x0, reduction="none")).mean()
    return F.mse_loss(output, eps if predicts == "epsilon" else scheduler.get_velocity(x0, eps, t))


# --- students ---------------------------------------------------------------------------------------------------


def read_students(name: str, adoption: str, seed: int, args: argparse.Namespace) -> dict[tuple[int, str], float]:
    """{(evaluations, method): distance} of one teacher's students; what is missing is run."""
    judges = {kind: train_judge(kind, seed, args.output_dir) for kind in ("classifier", "evaluator")}
    home = args.output_dir / f"seed{seed}" / name.replace(", ", "-")
    teacher = home / "teacher"
    if not (teacher / "model_index.json").is_file():
        train_teacher(KINDS[name], teacher, seed)
    steps = ADOPTION[adoption]
    shared = {"teacher": teacher, **judges, "seed": seed, "sample_steps": 0}
    shared |= {"adoption_max_train_steps": steps} if steps else {"adopt": False}
    ladder = {"config": "digits", "student_steps": [8, 4, 2, 1], "teacher_steps": [8, 2, 2, 2]}
    ladder |= {"objective": ["pd", "rcfd", "rcfd", "rcfd"], "max_train_steps": [250, 200, 300, 300]}
    ladder |= {"temperature": [1.0, 0.8, 1.0, 1.0]}
    results = read_job("distill", home / f"ladder-{adoption}", ladder | shared)
    adopted = home / f"ladder-{adoption}" / "adopted"
    shared |= {"teacher": adopted} if adopted.is_dir() else {}  # made once
    for objective, label in (("l1", "SFD"), ("cfd", "CFD on SFD")):
        for N in EVALUATIONS:
            options = {"config": "digits_sfd", "student_steps": N, "objective": objective} | shared
            options |= {"l1_weight": 0} if objective == "l1" else {}
            found = read_job("sfd", home / f"{objective}-{N}-{adoption}", options)
            own = [
                value for (steps, method), value in found.items() if steps == N and method not in ("DDIM", "teacher")
            ]
            results[N, label] = own[-1]
    return results


def read_job(command: str, folder: Path, options: dict[str, Any]) -> dict[tuple[int, str], float]:
    """{(evaluations, method): distance} of a finished job's comparison; the job is run where it is missing."""
    path = folder / "comparison.json"
    if not path.is_file():
        run_command(command, options | {"output_dir": folder, "resume_from_checkpoint": "latest"})
    rows = json.loads(path.read_text(encoding="utf-8"))
    return {(row["num_inference_steps"], row["method"]): row["evaluation"]["metrics"]["fd"]["value"] for row in rows}


def train_judge(kind: str, seed: int, output_dir: Path) -> Path:
    """The classifier whose features are distilled, or the one that measures, with a seed of its own."""
    folder = output_dir / f"seed{seed}" / kind
    if not (folder / "config.json").is_file():
        own_seed = seed + (1000 if kind == "evaluator" else 0)
        run_command("train-classifier", {"config": "digits", "output_dir": folder, "seed": own_seed})
    return folder


def run_command(command: str, options: dict[str, Any]) -> None:
    words = [sys.executable, "-m", "diffusers_rcfd", command]
    for name, value in options.items():
        words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    subprocess.run(words, cwd=ROOT, check=True)


# --- tables -----------------------------------------------------------------------------------------------------

METHODS = ("DDIM", "PD", "RCFD", "SFD", "CFD on SFD")


def mean_table(runs: dict[str, list[dict]]) -> str:
    """Mean distances over the seeds: a line for each kind and number of evaluations."""
    lines = [f"| teacher | evaluations | {' | '.join(METHODS)} |", "|---|---:|" + "---:|" * len(METHODS)]
    for name, seeds in runs.items():
        for N in EVALUATIONS:
            cells = []
            for method in METHODS:
                values = [seed[N, method] for seed in seeds if (N, method) in seed]
                cells.append(f"{statistics.mean(values):.2f}" if values else "")
            lines.append(f"| {name} | {N} | {' | '.join(cells)} |")
    return "\n".join(lines)


def worst_ratio(runs: dict[str, list[dict]]) -> str:
    """By how much each kind's students are worse than the best kind's, at the worst number of evaluations."""
    lines = ["| teacher | RCFD / best | SFD / best |", "|---|---:|---:|"]
    for name in runs:
        cells = []
        for method in ("RCFD", "SFD"):
            ratios = []
            for N in EVALUATIONS:
                means = {kind: statistics.mean(seed[N, method] for seed in of_kind) for kind, of_kind in runs.items()}
                ratios.append(means[name] / min(means.values()))
            cells.append(f"{max(ratios):.2f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def write_report(adopted: dict, costs: dict, seeds: list[int]) -> None:
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers", "accelerate", "timm"))
    costly = ""
    for adoption, runs in costs.items():
        iterations = ADOPTION[adoption]
        costly += (
            f"### {iterations} iterations ({iterations * FORWARDS} forward equivalents)\n\n{mean_table(runs)}\n\n"
        )
    text = f"""# Any teacher

Written on {date.today()} with {packages}, by

    python benchmarks/any_teacher.py --seeds {" ".join(map(str, seeds))}

Each teacher is a stock pipeline that Diffusers' own parts trained on the digits: the same network, {EPOCHS} epochs of
batch {BATCH_SIZE}, its EMA. Mean over {len(seeds)} seeds of the Frechet distance in the features of a classifier that
no loss has seen, 3000 generated images against the 1797 of the digits; lower is better; **not FID**.

## After adoption

{mean_table(adopted)}

How far each kind lies behind the best one, at the worst of 4, 2 and 1 evaluations:

{worst_ratio(adopted)}

## With less adoption, and without

{costly.rstrip()}
"""
    (ROOT / "benchmarks/any_teacher.md").write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--output_dir", type=Path, default=ROOT / "runs/any-teacher")
    args = parser.parse_args()

    def read(name: str, adoption: str) -> list[dict]:
        return [read_students(name, adoption, seed, args) for seed in args.seeds]

    adopted = {name: read(name, "full") for name in args.kinds}
    # What adoption costs, on the teacher that most people have; a flow has no schedule without it.
    costs = {each: {name: read(name, each) for name in args.kinds[:1]} for each in ("half", "quarter", "none")}
    write_report(adopted, costs, args.seeds)


if __name__ == "__main__":
    main()

"""How fast, as ratios measured side by side: `benchmarks/speed.md`.

    python benchmarks/speed.py                        # everything, about half an hour on two cores
    python benchmarks/speed.py --sections sampler data

Each figure is the median ratio of alternating pairs of runs (at least 7) with its quartiles; absolute times say
nothing on a machine that others share. Needs only the package; run it where nothing else runs.
"""

import argparse
import copy
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDIMPipeline
from torch.utils.data import DataLoader, Dataset

from diffusers_rcfd import (
    CFDDistillationConfig,
    CFDDistillationTrainer,
    FeatureClassifier,
    RCFDPipeline,
    RCFDScheduler,
    build_unet,
    load_image_data,
)
from diffusers_rcfd.batches import endless_batches
from diffusers_rcfd.image_sampling import generate_images

ROOT = Path(__file__).parent.parent
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--pairs", type=int, default=9, help="Pairs of runs of each figure, at least 7.")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/speed.md")
    args = parser.parse_args()
    torch.manual_seed(0)
    rows = []
    for section in args.sections:
        for row in SECTIONS[section](max(args.pairs, 7)):
            rows.append(row)
            print(line(row), flush=True)
    if set(args.sections) == set(SECTIONS):
        args.output.write_text(report(rows), encoding="utf-8")


# --- measuring -------------------------------------------------------------------------------------------------------


def seconds(function, repeats):
    """Time of one call, the mean over `repeats`."""
    start = time.perf_counter()
    for _ in range(repeats):
        function()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats


def ratio(numerator, denominator, pairs, least_seconds=0.05):
    """Quartiles of the ratio of two functions' times, in alternating pairs, each long enough to be timed."""
    repeats = [max(1, round(least_seconds / max(seconds(f, 2), 1e-6))) for f in (numerator, denominator)]
    ratios = []
    for number in range(pairs):
        times = {}
        for which in (0, 1) if number % 2 else (1, 0):
            times[which] = seconds((numerator, denominator)[which], repeats[which])
        ratios.append(times[0] / times[1])
    return statistics.quantiles(ratios, n=4)


def row(figure, setting, quartiles, goal):
    return {"figure": figure, "setting": setting, "quartiles": quartiles, "goal": goal}


def line(row):
    low, median, high = row["quartiles"]
    met = (
        "" if row["goal"] is None else ("yes" if median <= row["goal"] else f"no, {median / row['goal'] - 1:.0%} over")
    )
    goal = "" if row["goal"] is None else f"{row['goal']:.2f}"
    return f"| {row['figure']} | {row['setting']} | {median:.3f} | {low:.3f} to {high:.3f} | {goal} | {met} |"


def pipeline_of(preset):
    pipeline = RCFDPipeline(build_unet(preset).eval(), RCFDScheduler()).to(DEVICE)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def batch_sizes(preset):
    return (1, 4) if preset == "cifar10" and DEVICE.type == "cpu" else (1, 64)


PRESETS = ("digits", "fashion-mnist", "cifar10")


# --- sampling --------------------------------------------------------------------------------------------------------


def sampler(pairs):
    """The pipeline over its bare network, and over the stock pipeline."""
    for preset in PRESETS:
        pipeline = pipeline_of(preset)
        stock = DDIMPipeline(pipeline.unet, pipeline.scheduler.to_ddim())
        stock.set_progress_bar_config(disable=True)
        for batch_size in batch_sizes(preset):
            z = torch.randn(batch_size, *pipeline.image_shape, device=DEVICE)
            t = torch.tensor(512, device=DEVICE)
            for N in (1, 2, 4):

                @torch.no_grad()
                def bare(N=N, z=z, t=t, unet=pipeline.unet):
                    for _ in range(N):
                        unet(z, t, return_dict=False)

                def ours(output_type="pt", N=N, z=z, pipeline=pipeline):
                    pipeline(len(z), N, latents=z if output_type == "pt" else None, output_type=output_type)

                def theirs(output_type, N=N, z=z, stock=stock):
                    stock(len(z), num_inference_steps=N, use_clipped_model_output=True, output_type=output_type)

                setting = f"{preset}, batch {batch_size}, {N} step{'s' * (N > 1)}"
                yield row("pipeline / network", setting, ratio(ours, bare, pairs), 1.10 if batch_size == 1 else 1.03)
                for output_type in ("np", "pil"):
                    quartiles = ratio(lambda o=output_type: ours(o), lambda o=output_type: theirs(o), pairs)
                    yield row("pipeline / DDIMPipeline", f"{setting}, {output_type}", quartiles, 1.00)


def bulk(pairs):
    """From noise to the metrics' uint8 images, over the bare forwards of as many images."""
    for preset, images, batch_size in (("digits", 4096, 512), ("fashion-mnist", 256, 64)):
        pipeline = pipeline_of(preset)
        z, t = torch.randn(batch_size, *pipeline.image_shape, device=DEVICE), torch.tensor(512, device=DEVICE)
        for N in (1, 4):

            @torch.no_grad()
            def bare(N=N, z=z, t=t, unet=pipeline.unet, calls=images // batch_size):
                for _ in range(N * calls):
                    unet(z, t, return_dict=False)

            def generate(N=N, pipeline=pipeline, images=images, batch_size=batch_size):
                options = {"batch_size": batch_size, "num_inference_steps": N, "progress": False}
                for _ in generate_images(pipeline, images, **options):
                    pass

            setting = f"{preset}, {N} step{'s' * (N > 1)}, batch {batch_size}"
            yield row("images in bulk / network", setting, ratio(generate, bare, pairs), 1.10)


# --- training --------------------------------------------------------------------------------------------------------


@contextmanager
def training(objective, preset="digits", batch_size=64, data=None, **options):
    """A trainer in the middle of its first rung, with a function that makes one step."""
    pipeline = pipeline_of(preset)
    channels, size, _ = pipeline.image_shape
    images = data or load_image_data("digits", resolution=None if size == 8 else size, channels=channels)
    backbone = "test_resnet" if preset == "digits" else "resnet18"
    classifier = FeatureClassifier(
        backbone, num_classes=10, in_channels=channels, small_stem=preset == "digits"
    ).eval()
    with tempfile.TemporaryDirectory() as folder:
        config = CFDDistillationConfig(folder, student_steps=[4], objective=[objective], train_batch_size=batch_size,
                                       logging_steps=50, checkpointing_steps=0, max_train_steps=[100_000],
                                       **options)  # fmt: skip
        trainer = CFDDistillationTrainer(pipeline, classifier, config, images)
        stage = next(trainer.stages(0))
        optimizer, lr_scheduler = trainer._prepare(stage, None)
        fixed = next(endless_batches(trainer.accelerator, images, config, trainer.state))

        def step(batch=None):
            (draws,) = trainer._draws(stage)
            trainer._train_step([(batch or fixed) | draws], optimizer, lr_scheduler)
            trainer.state.step += 1

        yield trainer, step, fixed, optimizer


def overhead(pairs):
    """A training step over its parts: networks, backward passes and optimizer, each alone."""
    for preset in ("digits", "fashion-mnist"):
        batch_size = 64 if preset == "digits" else 16
        with training("rcfd", preset, batch_size) as (trainer, step, fixed, optimizer):
            student, teacher, classifier = trainer.model, trainer.teacher.unet, trainer.classifier
            z = torch.randn_like(fixed["images"])
            t = torch.full((len(z),), 512, device=DEVICE)

            def parts(student=student, teacher=teacher, classifier=classifier, z=z, t=t, optimizer=optimizer):
                with torch.no_grad():
                    target = teacher(teacher(z, t).sample, t).sample
                    classifier(target)
                output = classifier(student(z, t).sample)
                (output.features.sum() + output.logits.sum()).backward()
                optimizer.step()
                optimizer.zero_grad()

            yield row("RCFD step / its parts", f"{preset}, batch {batch_size}", ratio(step, parts, pairs, 0.3), 1.05)


class PlainData(Dataset):
    """Images as research code loads them: from PIL, one by one, through torchvision's transforms."""

    def __init__(self, images, size, channels):
        from torchvision import transforms

        self.images = [image for image in images]
        mean = (0.5,) * channels
        self.transform = transforms.Compose(
            [transforms.ToPILImage(), transforms.Resize(size), transforms.RandomHorizontalFlip(),
             transforms.ToTensor(), transforms.Normalize(mean, mean)]
        )  # fmt: skip

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.transform(self.images[index])


def plain_step(objective, pipeline, classifier, data, batch_size):
    """The same algorithm written plainly: eager, float32, Adam as it comes, the loss read at every step."""
    scheduler, teacher = pipeline.scheduler, copy.deepcopy(pipeline.unet)
    student = copy.deepcopy(pipeline.unet).train()
    optimizer = torch.optim.Adam(student.parameters(), lr=5e-5, foreach=False, fused=False)
    size, channels = pipeline.image_shape[1], pipeline.image_shape[0]
    images = PlainData(data, size, channels)

    def forever():
        while True:
            yield from DataLoader(images, batch_size, shuffle=True, drop_last=True, num_workers=0)

    batches, grid, losses = forever(), torch.tensor(scheduler.grid(8)), []

    def step():
        x0 = next(batches).to(DEVICE)
        k = torch.randint(1, 5, (batch_size,)) * 2
        noise = torch.randn_like(x0)
        t, s, r = (grid[k - i].to(DEVICE) for i in (0, 1, 2))
        (a_t, s_t), (a_s, s_s), (a_r, s_r) = (scheduler.alpha_sigma(i, x0) for i in (t, s, r))
        z_t = a_t * x0 + s_t * noise
        with torch.no_grad():
            x = teacher(z_t, t).sample
            z_s = a_s * x + s_s * (z_t - a_t * x) / s_t
            x = teacher(z_s, s).sample
            z_r = a_r * x + s_r * (z_s - a_s * x) / s_s
            target = (z_r - s_r / s_t * z_t) / (a_r - s_r / s_t * a_t)
        predicted = student(z_t, t).sample
        if objective == "pd":
            weight = torch.clamp((a_t / s_t) ** 2, min=1)
            loss = (weight * (predicted - target) ** 2).mean()
        else:
            of_student = classifier(predicted)
            with torch.no_grad():
                of_teacher = classifier(target)
            p = F.softmax(of_teacher.features / 0.95, 1)
            kl = (p * (p.log() - F.log_softmax(of_student.features, 1))).sum(1).mean()
            q = F.softmax(of_student.logits, 1)
            entropy = -(q * q.log()).sum(1).mean()
            diversity = (q.mean(0) * q.mean(0).log()).sum()
            loss = kl + 0.003 * (0.75 * entropy + 0.25 * diversity)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())

    return step


def plain(pairs):
    """A step with its loader over the plain way's, in the number type that is the faster here."""
    for preset, batch_size in (("digits", 64), ("fashion-mnist", 16)):
        for objective in ("pd", "rcfd"):
            for mixed_precision in ("no", "bf16"):
                with training(objective, preset, batch_size, mixed_precision=mixed_precision) as made:
                    trainer, step, _, _ = made
                    batches = endless_batches(
                        trainer.accelerator, trainer.train_dataset, trainer.config, trainer.state
                    )
                    real = [trainer.train_dataset[i]["images"] for i in range(len(trainer.train_dataset))]
                    plainly = plain_step(objective, trainer.teacher, trainer.classifier, real, batch_size)
                    quartiles = ratio(lambda step=step, b=batches: step(next(b)), plainly, pairs, 0.5)
                setting = f"{objective.upper()}, {preset}, batch {batch_size}, mixed_precision {mixed_precision}"
                yield row("step / the plain way", setting, quartiles, 0.75 if DEVICE.type == "cpu" else 0.4)
                from accelerate.state import AcceleratorState

                AcceleratorState._reset_state(True)


def data(pairs):
    """Time of a step with a fixed batch over that of one with the real loader."""
    with training("pd") as (trainer, step, _, _):
        batches = endless_batches(trainer.accelerator, trainer.train_dataset, trainer.config, trainer.state)
        quartiles = ratio(lambda: step(next(batches)), step, pairs, 0.5)
    yield row("step with loader / fixed batch", "PD, digits, batch 64", quartiles, 1 / 0.97)


# --- starting --------------------------------------------------------------------------------------------------------


def start(pairs):
    """Whole processes: importing, `--help`, and the first image of a saved pipeline."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}

    def process(code):
        return lambda: subprocess.run([sys.executable, *code], check=True, env=environment, capture_output=True)

    imported, nothing = process(["-c", "import diffusers_rcfd"]), process(["-c", "import json"])
    extra = statistics.quantiles([seconds(imported, 3) - seconds(nothing, 3) for _ in range(pairs)], n=4)
    yield row("import diffusers_rcfd - import json", "seconds", extra, 0.02)
    for script in ("distill_rcfd.py", "evaluate.py"):
        help_ = process([str(ROOT / "examples" / script), "--help"])
        times = statistics.quantiles([seconds(help_, 1) for _ in range(pairs)], n=4)
        yield row(f"{script} --help", "seconds", times, 1.0)
    with tempfile.TemporaryDirectory() as folder:
        RCFDPipeline(build_unet("digits"), RCFDScheduler(num_inference_steps=1)).save_pretrained(folder)
        ours = process(["-c", f"from diffusers_rcfd import RCFDPipeline as P; P.from_pretrained({folder!r})()"])
        call = "num_inference_steps=1, use_clipped_model_output=True"
        stock = process(["-c", f"from diffusers import DDIMPipeline as P; P.from_pretrained({folder!r})({call})"])
        yield row("first image / stock Diffusers", "digits, process and all", ratio(ours, stock, pairs), 1.0)


SECTIONS = {"sampler": sampler, "bulk": bulk, "overhead": overhead, "plain": plain, "data": data, "start": start}


def report(rows):
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers", "accelerate", "timm"))
    machine = torch.cuda.get_device_name() if DEVICE.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    table = "\n".join(line(row) for row in rows)
    return f"""# Speed, as ratios measured side by side

Written by `python benchmarks/speed.py` on {date.today()}: {machine}, Python {platform.python_version()}, {packages}.
Each figure is the median over alternating pairs, with its quartiles. Lower is better.

| figure | setting | median | quartiles | goal | met |
|---|---|---:|---:|---:|---|
{table}
"""


if __name__ == "__main__":
    main()

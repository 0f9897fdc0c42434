"""How fast, as ratios measured side by side: `benchmarks/speed.md`.

    python benchmarks/speed.py                        # everything, and writes the page
    python benchmarks/speed.py --sections sampler data

Each figure is the median ratio of alternating pairs of runs with its quartiles; absolute times say nothing on a
machine that others share. Needs the package with its extra `onnx`; run it where nothing else runs. OpenVINO is among
the means where it is installed.
"""

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

import speed_training
import torch
from diffusers import DDIMPipeline
from paired import DEVICE, PRESETS, batch_sizes, clock, line, pipeline_of, ratio, row, seconds
from speed_means import NOT_MEASURED, means, means_table

from diffusers_rcfd import RCFDPipeline, RCFDScheduler, build_unet
from diffusers_rcfd.evaluation.sampling import generate_images

ROOT = Path(__file__).parent.parent


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", nargs="+", choices=[*SECTIONS, "means"], default=[*SECTIONS, "means"])
    parser.add_argument("--pairs", type=int, default=7, help="Pairs of runs of each figure.")
    parser.add_argument("--cpu_time", action="store_true", help="One thread's CPU time: for a machine that is busy.")
    parser.add_argument("--output", type=Path, help="The page; unset: benchmarks/speed.md, where all is measured.")
    args = parser.parse_args()
    if args.cpu_time:
        clock.cpu_time = True
        torch.set_num_threads(1)
    everything = set(args.sections) == {*SECTIONS, "means"}
    output = args.output or (ROOT / "benchmarks/speed.md" if everything else None)
    torch.manual_seed(0)
    began, rows, tried = time.perf_counter(), [], []
    for section in args.sections:
        for found in (means if section == "means" else SECTIONS[section])(args.pairs):
            (tried if section == "means" else rows).append(found)
            print(line(found), flush=True)
        minutes = (time.perf_counter() - began) / 60
        print(f"{section}: {minutes:.0f} minutes so far", flush=True)
        if output:  # after each section, for what a run that is stopped has found
            output.write_text(report(rows, tried, minutes), encoding="utf-8")
    if everything:
        output.write_text(report(rows, tried, minutes, speed_training.profiles()), encoding="utf-8")


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
                for output_type in ("np", "pil") if N == 1 else ("np",):
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


SECTIONS = {
    "sampler": sampler,
    "bulk": bulk,
    "overhead": speed_training.overhead,
    "plain": speed_training.plain,
    "memory": speed_training.memory,
    "data": speed_training.data,
    "utilisation": speed_training.utilisation,
    "start": start,
    "growth": speed_training.growth,
}


def machine():
    """What it ran on, without its name."""
    if DEVICE.type == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text().split() if cpuinfo.is_file() else []
    known = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_tile") if name in flags]
    return f"{os.cpu_count()} shared CPU cores ({', '.join(known)}), {torch.get_num_threads()} threads"


WHAT_HOLDS = """The shares are of the operators' own time in an RCFD step. *Time in float32*: most is
convolutions and their gradients, the same in both ways, and a step of the larger network reaches 0.8 of the rate of a
large matrix product, so that nothing around them can bring 0.75. A number type of half the size does, but less for the
digits network, whose layers are too small for it (0.2 of that type's matrix rate).

*Memory in float32* is what the student's backward pass needs, the same tensors in both ways: by
`torch.autograd.graph.saved_tensors_hooks` 27 MiB of student and 5 MiB of classifier at digits, batch 64, and 127 and
7 MiB at fashion-mnist, batch 16; weights are 2.5 and 10 MiB. bf16 halves them (15 and 69 MiB of the student), and
`gradient_checkpointing` takes most of them away. Its slope by parameters: a step also has Adam's two moments and the
teacher, the bare network has not.

*Sampling*: what remains of a call without its network is 0.12 to 0.16 ms (a profile of the pipeline with an empty
network), which only the digits network at batch 1 (3.2 ms) is small enough to show; the other misses, up to 3%, were
others in each of three runs."""


def report(rows, tried, minutes, profiles=""):
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers", "accelerate", "timm"))
    table = "\n".join(line(found) for found in rows)
    command = " ".join(["python", "benchmarks/speed.py", *sys.argv[1:]])
    timed = "CPU time of one thread" if clock.cpu_time else "Time as it passed"
    return f"""# Speed, as ratios measured side by side

Written by `{command}`
on {date.today()} in {minutes:.0f} minutes. {machine()}, Python {platform.python_version()}, {packages}. {timed}; load
average {os.getloadavg()[1]:.1f}. Each figure is the median over alternating pairs, with its quartiles;
lower is better, but for the share of the matrix rate. "pipeline / network": a call over as many bare forwards. "The
plain way": the same algorithm as research code has it, eager, float32, Adam unfused, the loss read at every step,
images from PIL one by one. Memory is the peak over what there was before networks and images were made, each way in
processes of its own. The share of the matrix rate: a step's FLOPs a second over those of a product of two 2048 x 2048
matrices of the same number type. Slopes are log-log, of an RCFD step and of its network's forward + backward alone.

| figure | setting | median | quartiles | goal | met |
|---|---|---:|---:|---:|---|
{table}

## What holds what misses its goal

{profiles}

{WHAT_HOLDS}

## Means, in pairs with and without

Time with the mean over time without; below 1 it pays. The predictions were written before this table, those of bf16
and channels_last after single timings.

{means_table(tried)}

{NOT_MEASURED}
"""


if __name__ == "__main__":
    main()

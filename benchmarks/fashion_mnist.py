"""Table 1 of the paper on Fashion-MNIST, from 60 000 images on: `benchmarks/fashion_mnist.md` and its pictures.

    python benchmarks/fashion_mnist.py --data_dir FOLDER_OF_THE_IDX_FILES

Base model, two classifiers, an evaluator that no loss sees, a ladder by PD, two by RCFD from its 8-step student, and
all of them beside stock samplers. What lies finished in --runs is not run again; what was stopped goes on.
"""

import argparse
import json
import os
import subprocess
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parent.parent
CLASSIFIERS = {"ResNet18": "resnet18-classifier", "DenseNet121": "densenet121-classifier"}  # the weaker one first
STEPS = (4, 2, 1)
PAPER = {"ResNet18": (0.122, 0.175, 0.201), "DenseNet201": (0.213, 0.316, 0.407)}  # gains over PD at 4, 2, 1 steps


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", required=True, help="Folder of Fashion-MNIST's IDX files.")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs/fashion_mnist", help="Folder of all runs.")
    parser.add_argument("--num_images", type=int, default=5000, help="Generated images of each row.")
    args = parser.parse_args()
    for folder, done, script, options in parts(args.runs):
        if not (args.runs / folder / done).is_file():
            options |= {"output_dir": args.runs / folder, "data_dir": args.data_dir}
            words = [word for name, value in options.items() for word in (f"--{name}", *str(value).split())]
            print(f"{folder}: {script} {' '.join(words)}", flush=True)
            subprocess.run([sys.executable, ROOT / f"examples/{script}.py", *words], check=True)
    rows = measured(args)
    (ROOT / "benchmarks/fashion_mnist.md").write_text(report(args, rows), encoding="utf-8")


def measured(args):
    """The rows of `compare` for stock samplers and students, with their pictures; each is kept when it is measured."""
    from accelerate import Accelerator

    from diffusers_rcfd import Evaluator, RCFDPipeline, load_feature_classifier, load_image_data
    from diffusers_rcfd.evaluation.comparison import (
        compare,
        save_comparison_figure,
        save_comparison_grid,
        stock_contenders,
        student_contender,
    )

    base = RCFDPipeline.from_pretrained(args.runs / "base")
    contenders = stock_contenders(base, ["ddim", "pndm", "dpm++2m"], [8, *STEPS])
    contenders += [student_contender(f"PD={args.runs}/pd/students/{N}-step") for N in (8, *STEPS)]
    for name, classifier in CLASSIFIERS.items():
        folder = args.runs / f"rcfd-{classifier}/students"
        contenders += [student_contender(f"RCFD({name})={folder}/{N}-step") for N in STEPS]

    judge = load_feature_classifier(args.runs / "evaluator")
    images = load_image_data("fashion-mnist", data_dir=args.data_dir, resolution=32)
    evaluator = Evaluator(judge, images, name=f"{judge.config.backbone}-fashion-mnist", accelerator=Accelerator())
    path = args.runs / "rows.json"
    rows = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    for contender in contenders:
        which = {"method": contender.method, "num_inference_steps": contender.num_inference_steps}
        if not any(which.items() <= row.items() for row in rows):
            rows += compare([contender], evaluator, args.num_images)
            path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    save_comparison_figure(rows, ROOT / "benchmarks/fashion_mnist_curve.png")
    save_comparison_grid(contenders, ROOT / "benchmarks/fashion_mnist.png", num_noises=6)
    return rows


def parts(runs):
    """(folder, the file that tells it is done, script, options) of every part, in order."""
    resumed = {"config": "fashion_mnist", "resume_from_checkpoint": "latest"}
    yield "base", "model_index.json", "train_teacher", resumed | {"seed": 0}
    weak, strong = CLASSIFIERS.values()
    yield weak, "config.json", "train_classifier", resumed | {"seed": 1000}
    stronger = resumed | {"backbone": "densenet121", "max_train_steps": 2000, "seed": 1002}
    yield strong, "config.json", "train_classifier", stronger
    judge = resumed | {"backbone": "test_resnet", "small_stem": True, "max_train_steps": 1500, "seed": 2000}
    yield "evaluator", "config.json", "train_classifier", judge

    ladder = resumed | {"evaluator": runs / "evaluator", "num_eval_images": 1000, "seed": 0}
    yield "pd", "comparison.json", "distill_rcfd", ladder | {"teacher": runs / "base", "objective": "pd"}
    guided = ladder | {"teacher": runs / "pd/students/8-step", "student_steps": "4 2 1", "compare_with_pd": False}
    guided |= {"teacher_steps": 2, "objective": "rcfd", "max_train_steps": "300 400 400", "temperature": "0.8 1.0 1.0"}
    for classifier in CLASSIFIERS.values():
        yield f"rcfd-{classifier}", "comparison.json", "distill_rcfd", guided | {"classifier": runs / classifier}


def report(args, rows):
    first = rows[0]["evaluation"]
    found = {(row["method"], row["num_inference_steps"]): row["evaluation"]["metrics"] for row in rows}
    counts = (8, *STEPS)
    table = [
        "| method | " + " | ".join(f"IS, {N} | FD, {N}" for N in counts) + " |",
        "|---|" + "---:|" * 2 * len(counts),
    ]
    for method in dict.fromkeys(row["method"] for row in rows):
        cells = [found.get((method, N)) for N in counts]
        table.append(f"| {method} | " + " | ".join(scores(cell) for cell in cells) + " |")
    gains = ["| RCFD's gain over PD | 4 steps | 2 steps | 1 step |", "|---|---:|---:|---:|"]
    for name in CLASSIFIERS:
        cells = [1 - found[f"RCFD({name})", N]["fd"]["value"] / found["PD", N]["fd"]["value"] for N in STEPS]
        gains.append(f"| here, {name} | " + " | ".join(f"{gain:.1%}" for gain in cells) + " |")
    for name, values in PAPER.items():
        gains.append(f"| the paper's on CIFAR-10, {name} | " + " | ".join(f"{gain:.1%}" for gain in values) + " |")
    accuracies = ", ".join(f"{name} {accuracy(args.runs / folder):.1%}" for name, folder in
                           (CLASSIFIERS | {"evaluator (test_resnet)": "evaluator"}).items())  # fmt: skip
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers", "accelerate", "timm"))
    path = ROOT / "benchmarks/fashion_mnist.md"  # what is written by hand at its end stays
    notes = (path.read_text(encoding="utf-8") if path.is_file() else "").partition("\n## What was")
    lines, gained = "\n".join(table), "\n".join(gains)
    return f"""# Fashion-MNIST, 32x32: the paper's Table 1

Written on {date.today()} by

    python benchmarks/fashion_mnist.py --data_dir FOLDER_OF_THE_IDX_FILES

on {os.cpu_count()} shared CPU cores, bf16, one seed (0). {packages}.

A U-Net of {base_parameters(args.runs):.1f} M parameters predicts x0; the base model is trained for 6000 steps of 64
images (6.4 passes over the 60 000). The ladder goes from 64-step DDIM to 16 and 8 steps by PD, 300 iterations each;
from the 8-step student on by PD and by RCFD with either classifier, 300, 400 and 400 iterations of 64 images at 4, 2
and 1 steps, the same for all.

FD: Frechet distance in the features of the evaluator ({first["extractor"]}), which no loss has seen, of
{first["num_images"]} generated images against the {first["num_reference_images"]} of {first["reference"]};
**not FID**. IS: inception-style score on its predictions.
Accuracy on held-out images: {accuracies}.

{lines}

{gained}

![FD against evaluations](fashion_mnist_curve.png)

![The same noise along each row](fashion_mnist.png)
{notes[1]}{notes[2]}"""


def scores(metrics):
    return " | " if metrics is None else f"{metrics['is']['value']:.2f} | {metrics['fd']['value']:.2f}"


def accuracy(folder):
    """Held-out accuracy, the last that a classifier's metrics tell."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["held_out_accuracy"] for line in lines if "held_out_accuracy" in line][-1]


def base_parameters(runs):
    """Millions of parameters of the base model."""
    from diffusers_rcfd import RCFDPipeline

    return RCFDPipeline.from_pretrained(runs / "base").unet.num_parameters() / 1e6


if __name__ == "__main__":
    main()

"""Samplers and students side by side, on the same work and from the same noise: a table and a picture."""

import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from diffusers_rcfd.evaluation import Evaluator
from diffusers_rcfd.image_sampling import initial_noise
from diffusers_rcfd.pipeline_rcfd import RCFDPipeline


@dataclass
class Contender:
    """One line of the comparison: `pipeline` sampled in `num_inference_steps` network evaluations."""

    method: str
    num_inference_steps: int
    pipeline: RCFDPipeline


def compare(contenders: list[Contender], evaluator: Evaluator, num_images: int, seed: int = 0) -> list[dict]:
    """Evaluate every contender on images from the same noise, and time it.

    Args:
        contenders (`list[Contender]`): what to compare.
        evaluator (`Evaluator`): the metrics and the reference.
        num_images (`int`): images of each contender.
        seed (`int`, defaults to 0): seed of the noise.

    Returns:
        `list[dict]`: "method", "num_inference_steps", "images_per_second" (at the evaluator's batch size on one
        process, best of three batches) and "evaluation" (`EvaluationResult.to_dict()`).
    """
    rows = []
    for contender in contenders:
        result = evaluator.evaluate_pipeline(
            contender.pipeline, num_images, contender.num_inference_steps, seed=seed, progress=False
        )
        rows.append(
            {
                "method": contender.method,
                "num_inference_steps": contender.num_inference_steps,
                "images_per_second": images_per_second(contender, min(num_images, evaluator.batch_size)),
                "evaluation": result.to_dict(),
            }
        )
    return rows


def images_per_second(contender: Contender, batch_size: int) -> float:
    """Sampling rate at a batch size, the best of three batches."""
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        _sample(contender, initial_noise(range(batch_size), contender.pipeline.image_shape)).cpu()
        seconds.append(time.perf_counter() - start)
    return batch_size / min(seconds)


def markdown_table(rows: list[dict]) -> str:
    """The rows of `compare` as a Markdown table, fewest steps last."""
    metrics = rows[0]["evaluation"]["metrics"]
    header = ["steps", "method", *(metric["label"] for metric in metrics.values()), "images/s"]
    lines = [" | ".join(header), " | ".join(["---:", "---", *("---:" for _ in metrics), "---:"])]
    for row in sorted(rows, key=lambda row: -row["num_inference_steps"]):
        values = [f"{metric['value']:.2f}" for metric in row["evaluation"]["metrics"].values()]
        cells = [str(row["num_inference_steps"]), row["method"], *values, f"{row['images_per_second']:.0f}"]
        lines.append(" | ".join(cells))
    return "\n".join(f"| {line} |" for line in lines)


def save_comparison(rows: list[dict], folder: Path) -> None:
    """Write the rows of `compare` as `comparison.md` and `comparison.json`."""
    (folder / "comparison.md").write_text(markdown_table(rows) + "\n", encoding="utf-8")
    (folder / "comparison.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


def save_comparison_grid(contenders: list[Contender], path: Path, num_noises: int = 8, seed: int = 0) -> None:
    """Draw a PNG with the same noise along each row and one contender in each column.

    Args:
        contenders (`list[Contender]`): the columns, from left to right.
        path (`Path`): of the PNG.
        num_noises (`int`, defaults to 8): rows.
        seed (`int`, defaults to 0): seed of the noise.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    size = (1 + 1.0 * len(contenders), 1 + 1.0 * num_noises)
    figure, axes = pyplot.subplots(num_noises, len(contenders), figsize=size, squeeze=False)
    for column, contender in zip(axes.T, contenders, strict=True):
        images = _sample(contender, initial_noise(range(num_noises), contender.pipeline.image_shape, seed)).cpu()
        for axis, image in zip(column, images, strict=True):
            axis.imshow(image.permute(1, 2, 0).squeeze(-1), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axis.set_axis_off()
        steps = contender.num_inference_steps
        column[0].set_title(f"{contender.method}\n{steps} step{'s' if steps > 1 else ''}")
    figure.subplots_adjust(wspace=0.06, hspace=0.06)
    figure.savefig(path, dpi=80, bbox_inches="tight")
    pyplot.close(figure)


def _sample(contender: Contender, noise: torch.Tensor) -> torch.Tensor:
    """Images (B, C, H, W) in [0, 1]; a class-conditional model is given its classes in turn."""
    pipeline = contender.pipeline
    pipeline.set_progress_bar_config(disable=True)
    num_classes = pipeline.num_classes
    labels = None if num_classes is None else torch.arange(len(noise)) % num_classes
    steps = contender.num_inference_steps
    return pipeline(len(noise), steps, latents=noise, class_labels=labels, output_type="pt").images

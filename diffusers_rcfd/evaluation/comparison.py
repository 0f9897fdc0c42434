"""Samplers and students side by side, on the same work and from the same noise: a table and a picture."""

import json
import time
import warnings
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm.auto import tqdm

from diffusers_rcfd.evaluation.evaluator import Evaluator
from diffusers_rcfd.evaluation.sampling import initial_noise
from diffusers_rcfd.pipelines.pipeline_rcfd import RCFDPipeline
from diffusers_rcfd.pipelines.stock_samplers import StockSamplerPipeline


@dataclass
class Contender:
    """One line of the comparison: `pipeline` sampled in `num_inference_steps` network evaluations."""

    method: str
    num_inference_steps: int
    pipeline: RCFDPipeline


def student_contender(student: str) -> Contender:
    """A student as a line of the comparison.

    Args:
        student (`str`): "NAME=PLACE@N": NAME in the table (else the last two parts of the place serve), folder or Hub
            id, and the network evaluations of a student that was made for several (else its largest number).

    Raises:
        ValueError: for a base model, which takes any number of steps, or a number the student was not made for.
    """
    name, _, place = student.rpartition("=")
    folder, _, number = place.rpartition("@")
    if not number.isdecimal() or Path(place).exists():
        folder, number = place, None
    pipeline = RCFDPipeline.from_pretrained(folder)
    scheduler = pipeline.scheduler
    made_for = scheduler.config.num_inference_steps or max(scheduler.trained_steps, default=None)
    if made_for is None:
        raise ValueError(f"`students` must have been distilled for a number of steps, got the base model {student!r}.")
    scheduler.set_timesteps(made_for if number is None else int(number))
    return Contender(name or "/".join(Path(folder).parts[-2:]), scheduler.num_inference_steps, pipeline)


def stock_contenders(base: RCFDPipeline, samplers: list[str], evaluations: list[int]) -> list[Contender]:
    """A base model under stock samplers; what a sampler cannot take (Heun an even number) is left out, and said.

    Args:
        base (`RCFDPipeline`): the base model.
        samplers (`list[str]`): of `STOCK_SAMPLERS`.
        evaluations (`list[int]`): numbers of network evaluations.
    """
    contenders = []
    for sampler in samplers:
        pipeline = StockSamplerPipeline(base.unet, base.scheduler, sampler=sampler)
        for number in evaluations:
            try:
                pipeline.stock_scheduler(number)
            except ValueError as error:
                warnings.warn(f"Left out of the comparison: {error}", stacklevel=2)
            else:
                contenders.append(Contender(pipeline.method, number, pipeline))
    return contenders


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
    rows, hidden = [], {} if evaluator.is_main_process else {"disable": True}
    for contender in tqdm(contenders, desc="Comparing", unit="line", **hidden):
        result = evaluator.evaluate_pipeline(contender.pipeline, num_images, contender.num_inference_steps, seed=seed)
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
    """The rows of `compare` as a Markdown table, fewest network evaluations last."""
    metrics = rows[0]["evaluation"]["metrics"]
    header = ["evaluations", "method", *(metric["label"] for metric in metrics.values()), "images/s"]
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


def save_comparison_figure(rows: list[dict], path: Path) -> None:
    """Draw the first metric (FID or FD) against the network evaluations, both on log axes, a line for each method.

    Args:
        rows (`list[dict]`): of `compare`.
        path (`Path`): of the PNG.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import LogFormatter

    metric, label = next((key, value["label"]) for key, value in rows[0]["evaluation"]["metrics"].items())
    lines = defaultdict(list)
    for row in sorted(rows, key=lambda row: row["num_inference_steps"]):
        lines[row["method"]].append((row["num_inference_steps"], row["evaluation"]["metrics"][metric]))
    figure, axis = pyplot.subplots(figsize=(6, 4))
    for method, points in lines.items():
        values = [point["value"] for _, point in points]
        intervals = [point["confidence_interval"] for _, point in points]
        below = [max(value - low, 0) for value, (low, _) in zip(values, intervals, strict=True)]
        above = [max(high - value, 0) for value, (_, high) in zip(values, intervals, strict=True)]
        axis.errorbar([steps for steps, _ in points], values, (below, above), marker="o", capsize=2, label=method)
    steps = sorted({row["num_inference_steps"] for row in rows})
    axis.set(xscale="log", yscale="log", xlabel="network evaluations", ylabel=label)
    axis.set_xticks(steps, [str(number) for number in steps])
    axis.xaxis.minorticks_off()
    axis.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(3, 1)))
    axis.grid(alpha=0.3, which="both")
    axis.legend(loc="upper left", bbox_to_anchor=(1.01, 1))
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)


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
        method = contender.method.replace("(", "\n(")  # "DPM-Solver++(2M)" is wider than an image
        column[0].set_title(f"{method}\n{steps} step{'s' if steps > 1 else ''}", fontsize=7)
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

"""Samplers and students side by side, on the same work and from the same noise: a table and a picture."""

import io
import json
import time
import warnings
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm.auto import tqdm

from diffusers_rcfd.evaluation.evaluator import ROLES, Evaluator
from diffusers_rcfd.evaluation.panel import Panel
from diffusers_rcfd.evaluation.sampling import initial_noise
from diffusers_rcfd.pipelines.pipeline_rcfd import RCFDPipeline
from diffusers_rcfd.pipelines.stock_samplers import StockSamplerPipeline
from diffusers_rcfd.saving import write_whole

POOR_ACCURACY = 0.8  # a trained judge below it sees too little of the data for its distances to mean much


@dataclass
class Contender:
    """One line of the comparison: `pipeline` sampled in `num_inference_steps` network evaluations."""

    method: str
    num_inference_steps: int
    pipeline: RCFDPipeline


def student_contender(student: str) -> Contender:
    """A student as a line of the comparison.

    Args:
        student (`str`): "NAME=PLACE@N": NAME in the table (by default the last two parts of the place), folder or Hub
            id, and the network evaluations of a student that was trained for several (by default the most).

    Raises:
        ValueError: for a base model, which takes any number of steps, or a number the student was not trained for.
    """
    name, _, place = student.rpartition("=")
    folder, _, number = place.rpartition("@")
    if not number.isdecimal() or Path(place).exists():
        folder, number = place, None
    pipeline = RCFDPipeline.from_pretrained(folder)
    scheduler = pipeline.scheduler
    trained_for = scheduler.config.num_inference_steps or max(scheduler.trained_steps, default=None)
    if trained_for is None:
        raise ValueError(f"`students` must have been distilled for a number of steps, got the base model {student!r}.")
    scheduler.set_timesteps(trained_for if number is None else int(number))
    return Contender(name or "/".join(Path(folder).parts[-2:]), scheduler.num_inference_steps, pipeline)


def stock_contenders(base: RCFDPipeline, samplers: list[str], evaluations: list[int]) -> list[Contender]:
    """A base model under stock samplers; a number that a sampler cannot take (Heun: even ones) gives a warning.

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


def compare(contenders: list[Contender], evaluator: Evaluator | Panel, num_images: int, seed: int = 0) -> list[dict]:
    """Evaluate every contender on images from the same noise, and time it.

    Args:
        contenders (`list[Contender]`): what to compare.
        evaluator (`Evaluator` or `Panel`): the metrics and the reference; a panel's judges see the same images.
        num_images (`int`): images of each contender.
        seed (`int`, defaults to 0): seed of the noise.

    Returns:
        `list[dict]`: "method", "num_inference_steps", "images_per_second" (at the evaluator's batch size on one
        process, best of three batches) and "evaluation" (`to_dict()` of the `EvaluationResult` or `PanelResult`).
    """
    rows = []
    hidden = {} if evaluator.is_main_process else {"disable": True}
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


def judgements(row: dict) -> list[dict]:
    """What each judge says of a row of `compare`, the main judge first; of a single evaluator, what it says."""
    return row["evaluation"].get("judges") or [row["evaluation"]]


def markdown_table(rows: list[dict]) -> str:
    """The rows of `compare` as a Markdown table, fewest network evaluations last, with notes on a panel's judges.

    All metrics of the main judge are shown, and the first one of the others.
    """

    def shown(row):
        main, *others = judgements(row)
        first = [next(iter(other["metrics"].values())) for other in others]
        return [*main["metrics"].values(), *first]

    labels = [metric["label"] for metric in shown(rows[0])]
    header = ["evaluations", "method", *labels, "images/s"]
    lines = [" | ".join(header), " | ".join(["---:", "---", *("---:" for _ in labels), "---:"])]
    for row in sorted(rows, key=lambda row: -row["num_inference_steps"]):
        values = [_format_value(metric["value"]) for metric in shown(row)]
        cells = [str(row["num_inference_steps"]), row["method"], *values, f"{row['images_per_second']:.0f}"]
        lines.append(" | ".join(cells))
    table = "\n".join(f"| {line} |" for line in lines)
    notes = table_notes(rows)
    return table + "".join(f"\n{note}" for note in ["", *notes] if notes)


def _format_value(value: float) -> str:
    """Two decimals, or three digits of a number below 1."""
    return f"{value:.2f}" if abs(value) >= 1 or value == 0 else f"{value:.3g}"


def table_notes(rows: list[dict]) -> list[str]:
    """What must be known to read the table of a panel: who judges, how well, and who wins before a twin alone."""
    judges = [judge for judge in judgements(rows[0]) if judge.get("role") is not None]
    return [_describe_judge(judge) for judge in judges] + _hollow_wins(rows)


def _describe_judge(judge: dict) -> str:
    name, role, accuracy = judge["extractor"], judge["role"], judge["accuracy"]
    note = f"- {name}: {role}, {ROLES[role]}" if name != role else f"- {name}: {ROLES[role]}"
    if accuracy is None:
        return f"{note}."
    note += f"; accuracy {accuracy:.3f} on held-out real images."
    poor = f" Warning: below {POOR_ACCURACY}, so its distances say little."
    return note + (poor if accuracy < POOR_ACCURACY else "")


def _hollow_wins(rows: list[dict]) -> list[str]:
    """A note for each method that is the best in its number of evaluations before twins and guides alone."""
    judges = [(judge["extractor"], judge.get("role")) for judge in judgements(rows[0])]
    kin = [number for number, (_, role) in enumerate(judges) if role in ("twin", "guide")]
    others = [number for number, (_, role) in enumerate(judges) if role in ("foreign", "pixels")]
    notes = []
    for steps in sorted({row["num_inference_steps"] for row in rows}, reverse=True) if others else []:
        rivals = [row for row in rows if row["num_inference_steps"] == steps]
        best = [max(rivals, key=lambda row, j=j: _score(judgements(row)[j]))["method"] for j in range(len(judges))]
        leaders = ", ".join(f"{best[number]} before {judges[number][0]}" for number in others)
        for method in sorted({best[number] for number in kin} - {best[number] for number in others}):
            before = " and ".join("{} ({})".format(*judges[number]) for number in kin if best[number] == method)
            s = "" if steps == 1 else "s"
            notes.append(f"- {method} in {steps} evaluation{s} wins only before {before}: {leaders}.")
    return notes


def _score(judge: dict) -> float:
    """The first metric of a judge with the sign that makes higher better."""
    metric, found = next(iter(judge["metrics"].items()))
    return -found["value"] if metric in ("fd", "kid") else found["value"]


def save_comparison(rows: list[dict], folder: Path) -> None:
    """Write the rows of `compare` as `comparison.md` and `comparison.json`."""
    write_whole(folder / "comparison.md", markdown_table(rows) + "\n")
    write_whole(folder / "comparison.json", json.dumps(rows, indent=2) + "\n")


def save_comparison_figure(rows: list[dict], path: Path) -> None:
    """Draw the first metric (FID or FD) of each judge against the network evaluations, on log axes, by method.

    Args:
        rows (`list[dict]`): of `compare`.
        path (`Path`): of the PNG.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import LogLocator

    number = len(judgements(rows[0]))
    figure, axes = pyplot.subplots(1, number, figsize=(1 + 5 * number, 4), squeeze=False)
    steps = sorted({row["num_inference_steps"] for row in rows})
    for judge, axis in enumerate(axes[0]):
        lines = defaultdict(list)
        for row in sorted(rows, key=lambda row: row["num_inference_steps"]):
            metric = next(iter(judgements(row)[judge]["metrics"].values()))
            lines[row["method"]].append((row["num_inference_steps"], metric))
        for method, points in lines.items():
            _draw_line(axis, method, points)
        axis.set(xscale="log", yscale="log", xlabel="network evaluations", ylabel=metric["label"])
        axis.set_xticks(steps, [str(step) for step in steps])
        axis.xaxis.minorticks_off()
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.minorticks_off()
        axis.grid(alpha=0.3)
    axis.legend(loc="upper left", bbox_to_anchor=(1.01, 1))
    figure.tight_layout()
    _save_figure(figure, path, dpi=120)


def _draw_line(axis, method: str, points: list[tuple[int, dict]]) -> None:
    """A method's values at each number of evaluations, with their confidence intervals."""
    values = [point["value"] for _, point in points]
    intervals = [point["confidence_interval"] for _, point in points]
    below = [max(value - low, 0) for value, (low, _) in zip(values, intervals, strict=True)]
    above = [max(high - value, 0) for value, (_, high) in zip(values, intervals, strict=True)]
    axis.errorbar([steps for steps, _ in points], values, (below, above), marker="o", capsize=2, label=method)


def _save_figure(figure, path: Path, dpi: int) -> None:
    from matplotlib import pyplot

    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=dpi, bbox_inches="tight")
    pyplot.close(figure)
    write_whole(path, content.getvalue())


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
    _save_figure(figure, path, dpi=80)


def _sample(contender: Contender, noise: torch.Tensor) -> torch.Tensor:
    """Images (B, C, H, W) in [0, 1]; a class-conditional model is given its classes in turn."""
    pipeline = contender.pipeline
    pipeline.set_progress_bar_config(disable=True)
    num_classes = pipeline.num_classes
    labels = None if num_classes is None else torch.arange(len(noise)) % num_classes
    steps = contender.num_inference_steps
    return pipeline(len(noise), steps, latents=noise, class_labels=labels, output_type="pt").images

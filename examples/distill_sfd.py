"""A base model distilled along the student's own trajectory, in a fraction of a ladder's time, and a comparison.

    accelerate launch examples/distill_sfd.py --teacher runs/digits/base --evaluator runs/digits/evaluator

runs the recipe `digits_sfd`; without these two they are trained first, by the recipe. Other recipes and options:

    accelerate launch examples/distill_sfd.py --config digits_sfdv --objective cfd --classifier runs/digits/classifier
"""

import os
from dataclasses import dataclass, replace
from pathlib import Path

from distill_rcfd import (
    SHARED,
    Job,
    build_evaluator,
    check_published,
    judge_contenders,
    new_unet,
    open_repositories,
    parts_of,
    train_classifier,
)

from diffusers_rcfd.cli.options import parse_options
from diffusers_rcfd.data.config import DataConfig
from diffusers_rcfd.trainers.config import ClassifierConfig, DiffusionConfig
from diffusers_rcfd.trainers.sfd_config import SFDDistillationConfig
from diffusers_rcfd.validation import option, require


@dataclass
class SFDJob(Job):
    """What to distil, with what, and how to judge it."""

    lpips_weights: str | None = option(
        None,
        "Second stage: folder of vgg16-397923af.pth and weights-vgg16-lpips.pth; unset: the classifier's features.",
    )
    compare_with: list[str] | None = option(
        None, "Further pipelines (folders or Hub ids) for the comparison, such as students of PD and RCFD."
    )


GROUPS = (
    SFDJob,
    DataConfig,
    (DiffusionConfig, "base_", SHARED),
    (ClassifierConfig, "classifier_", SHARED),
    (ClassifierConfig, "evaluator_", SHARED),
    SFDDistillationConfig,
)


def read_options(args: list[str] | None = None):
    """The options of the job, from the command line and its recipe."""
    recipes = Path(__file__).parent / "configs" / "distill_sfd"
    return parse_options(*GROUPS, description=__doc__, recipes=recipes, default_recipe="digits_sfd", args=args)


def main(args: list[str] | None = None):
    run(*read_options(args))


def run(job, data, base, classifier, evaluator, distillation):
    """Train what is missing, distil, compare."""
    import torch
    from accelerate import Accelerator

    from diffusers_rcfd import (
        DiffusionTrainer,
        RCFDPipeline,
        RCFDScheduler,
        SFDDistillationTrainer,
        load_feature_classifier,
        load_image_data,
    )
    from diffusers_rcfd.evaluation.comparison import Contender
    from diffusers_rcfd.losses.lpips import LPIPS
    from diffusers_rcfd.trainers.checkpoints import check_output_dir

    accelerator = Accelerator(mixed_precision=distillation.mixed_precision)
    if accelerator.device.type == "cpu" and accelerator.num_processes == 1:
        torch.set_num_threads(job.cpu_threads or os.cpu_count())

    # Everything that can be wrong is found here, before any training.
    output_dir, resume = Path(distillation.output_dir), distillation.resume_from_checkpoint
    require(resume in (None, "latest"), "resume_from_checkpoint", resume, "'latest' for this job of several parts")
    check_output_dir(distillation)
    check_published(job, base, classifier, evaluator)
    images = load_image_data(**vars(data))
    teacher = None if job.teacher is None else RCFDPipeline.from_pretrained(job.teacher)
    guide = None if job.classifier is None else load_feature_classifier(job.classifier)
    judge = None if job.evaluator is None else load_feature_classifier(job.evaluator)
    lpips = None if job.lpips_weights is None else LPIPS(job.lpips_weights)
    others = [RCFDPipeline.from_pretrained(name) for name in job.compare_with or ()]
    feature_loss = distillation.objective != "l1"
    second = teacher is not None and bool(teacher.scheduler.config.nodes)
    guided = feature_loss or (second and distillation.perceptual_weight > 0 and lpips is None)
    if images.num_classes is None and (judge is None or (guide is None and guided)):
        raise ValueError(f"`dataset` must have class labels to train a classifier with, got {data.dataset!r} without.")
    parts = parts_of(distillation, base, classifier, evaluator, "student")
    unet = None if teacher is not None else new_unet(job, images, distillation.seed)
    first = teacher or RCFDPipeline(unet, RCFDScheduler())
    for option_name, pipeline in [("teacher", first), *(("compare_with", other) for other in others)]:
        fits = pipeline.image_shape == images.image_shape
        allowed = f"for images {images.image_shape}, as `dataset` has"
        require(fits, option_name, pipeline.image_shape, allowed)
    unmeasured = replace(parts["student"], eval_steps=0, load_best_model_at_end=False)
    if guided and guide is None:  # nodes and LPIPS alone; the classifier will be made to fit
        unmeasured = replace(unmeasured, objective="l1", l1_weight=0.0, perceptual_weight=0.0)
    SFDDistillationTrainer(first, guide, unmeasured, lpips)
    contests = [(name, N, other) for name, other in zip(job.compare_with or (), others, strict=True)
                for N in shared_counts(name, other, distillation.student_steps)]  # fmt: skip
    repositories = open_repositories(parts, accelerator)

    # 1. The classifier that only measures, and the one whose features are distilled.
    if judge is None:
        judge = train_classifier(job, images, parts["evaluator"], job.evaluator_backbone)
    if guide is None and guided:
        guide = train_classifier(job, images, parts["classifier"], job.backbone)
    measure = build_evaluator(job, data, images, judge, accelerator, distillation.seed)

    # 2. The base model.
    if teacher is None:
        DiffusionTrainer(unet, RCFDScheduler(), parts["base"], images, evaluator=measure).train()
        teacher = RCFDPipeline.from_pretrained(output_dir / "base")

    # 3. The student.
    trainer = SFDDistillationTrainer(teacher, guide, parts["student"], lpips, evaluator=measure)
    trainer.teacher_name = repositories.get("base", trainer.teacher_name)
    student = trainer.train()

    # 4. The comparison.
    counts = sorted(distillation.student_steps, reverse=True)
    distilled = teacher.scheduler.config.num_inference_steps is not None
    contenders = [] if distilled else [Contender("DDIM", N, teacher) for N in counts]
    contenders += [Contender("teacher", K, sampler) for K, sampler in trainer.teacher_samplers.items()]
    contenders += [Contender("/".join(Path(name).parts[-2:]), N, other) for name, N, other in contests]
    method = ("SFD-v" if len(counts) > 1 else "SFD") + (f" {distillation.objective}" if feature_loss else "")
    contenders += [Contender(method, N, student) for N in counts]
    judge_contenders(job, distillation, contenders, measure)
    if accelerator.is_main_process:
        print(
            f"Everything is in {output_dir}: comparison.png, comparison.md, and the pipeline {output_dir / 'student'}"
        )
    accelerator.end_training()


def shared_counts(name, student, counts):
    """The network evaluations among `counts` that a student was made for, falling; a `ValueError` if none."""
    made_for = student.scheduler.trained_steps or [student.scheduler.config.num_inference_steps]
    shared = sorted({*made_for} & {*counts}, reverse=True)
    found = "a base model" if made_for == [None] else f"one for {made_for}"
    require(shared, "compare_with", f"{name}, {found}", f"students made for one of {counts} network evaluations")
    return shared


if __name__ == "__main__":
    main()

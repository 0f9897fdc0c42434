"""From real images to a 1-step generator: base model, classifier, ladder, comparison.

    rcfd distill

runs the recipe `digits` on the CPU in minutes. A recipe sets any option, and the command line wins:

    accelerate launch -m diffusers_rcfd distill --config cifar10_resnet18 --teacher me/ddpm --output_dir runs/cifar10
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from diffusers_rcfd.cli.job import (
    FIRST,
    Given,
    Job,
    check_labels,
    close_job,
    groups_of,
    open_job,
    open_repositories,
    train_missing,
)
from diffusers_rcfd.cli.options import RECIPES, parse_options
from diffusers_rcfd.distillation.rungs import Rung
from diffusers_rcfd.trainers.ladder_config import PER_RUNG, CFDDistillationConfig
from diffusers_rcfd.validation import option

if TYPE_CHECKING:
    from diffusers_rcfd import RCFDPipeline
    from diffusers_rcfd.evaluation.comparison import Contender
    from diffusers_rcfd.evaluation.panel import Panel


@dataclass
class LadderJob(Job):
    """What to distil, with what, and what to compare it with."""

    compare_with_pd: bool = option(True, "Also distil the classifier-guided rungs by pd, for the comparison.")


GROUPS = groups_of(LadderJob, CFDDistillationConfig)


def read_options(args: list[str] | None = None) -> tuple:
    """The options of the job, from the command line and its recipe."""
    return parse_options(
        *GROUPS,
        command="distill",
        description=__doc__,
        first=FIRST,
        recipes=RECIPES / "distill",
        default_recipe="digits",
        # A ladder on the command line has as many values as it has rungs, not as many as the recipe's.
        overridden={"student_steps": PER_RUNG},
        args=args,
    )


def main(args: list[str] | None = None) -> None:
    """Train what is missing, run the ladder, compare."""
    options = read_options(args)
    from diffusers_rcfd import CFDDistillationTrainer

    given = open_job(*options, result="students")
    rungs = plan_ladder(given)
    guided = [rung for rung in rungs if rung.guided]
    repositories = open_repositories(given)
    teacher, classifier, measure = train_missing(given, needs_classifier=bool(guided))

    trainer = CFDDistillationTrainer(teacher, classifier, given.parts["students"], given.images,
                                     evaluator=measure, lpips=given.lpips)  # fmt: skip
    trainer.teacher_name = repositories.get("base", trainer.teacher_name)
    trainer.train()
    students = {rung: given.output_dir / "students" / rung.name for rung in rungs}
    if given.job.compare_with_pd and guided:
        above = [folder for rung, folder in students.items() if rung.student_steps > guided[0].student_steps]
        students |= distil_by_pd(given, guided, above[-1] if above else teacher, measure)
    close_job(
        given,
        contenders_of(teacher, students),
        measure,
        f"pipelines for RCFDPipeline.from_pretrained, such as {students[rungs[-1]]}",
    )


def plan_ladder(given: Given) -> list[Rung]:
    """The rungs, once everything that can be wrong with them is found, before any training."""
    from diffusers_rcfd.trainers.generator import check_images_fit
    from diffusers_rcfd.trainers.ladder import check_rungs

    scheduler = given.teacher.scheduler
    rungs = given.distillation.rungs(scheduler.config.num_inference_steps, last_index=len(scheduler) - 1)
    check_images_fit(given.teacher, given.images)
    trains_classifier = given.classifier is None and any(rung.guided for rung in rungs)
    check_rungs(rungs, given.distillation, given.images.image_shape, given.classifier, given.lpips, trains_classifier)
    check_labels(given, needs_classifier=any(rung.guided for rung in rungs))
    return rungs


def distil_by_pd(
    given: Given, guided: list[Rung], teacher: "RCFDPipeline | Path", measure: "Panel"
) -> dict[Rung, Path]:
    """Distil by pd the rungs that the classifier guides, from the same teacher; the folder of each student."""
    from diffusers_rcfd import CFDDistillationTrainer, RCFDPipeline

    folder = given.output_dir / "students-pd"
    config = replace(
        given.parts["students"],
        output_dir=str(folder),
        push_to_hub=False,
        student_steps=[rung.student_steps for rung in guided],
        teacher_steps=[rung.teacher_steps for rung in guided],
        max_train_steps=[rung.max_train_steps for rung in guided],
        objective=["pd"],
        terms=None,
        temperature=None,
        regularization_weight=None,
        entropy_ratio=None,
    )
    if isinstance(teacher, Path):
        teacher = RCFDPipeline.from_pretrained(teacher)
    trainer = CFDDistillationTrainer(teacher, None, config, given.images, evaluator=measure)
    trainer.train()
    return {rung: folder / rung.name for rung in trainer.rungs}


def contenders_of(teacher: "RCFDPipeline", students: dict[Rung, Path]) -> "list[Contender]":
    """The base model by DDIM, and every student of at most 8 steps."""
    from diffusers_rcfd import RCFDPipeline
    from diffusers_rcfd.evaluation.comparison import Contender

    few = {rung: folder for rung, folder in students.items() if rung.student_steps <= 8}
    contenders = []
    if teacher.scheduler.config.num_inference_steps is None:
        steps = sorted({rung.student_steps for rung in few}, reverse=True)
        contenders += [Contender("DDIM", N, teacher) for N in steps]
    for rung in sorted(few, key=lambda rung: (rung.objective, -rung.student_steps)):
        student = RCFDPipeline.from_pretrained(few[rung])
        contenders.append(Contender(rung.objective.upper(), rung.student_steps, student))
    return contenders

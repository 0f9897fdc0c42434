"""Distil a base model along the student's own trajectory, in a fraction of a ladder's time.

    rcfd sfd --teacher runs/digits/base --evaluator runs/digits/evaluator

runs the recipe `digits_sfd`; without these two they are trained first, by the recipe. Other recipes and options:

    rcfd sfd --config digits_sfdv --objective cfd --classifier runs/digits/classifier
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

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
from diffusers_rcfd.distillation.objectives import needs_classifier
from diffusers_rcfd.trainers.sfd_config import SFDDistillationConfig
from diffusers_rcfd.validation import option, require

if TYPE_CHECKING:
    from diffusers_rcfd import RCFDPipeline, SFDDistillationTrainer
    from diffusers_rcfd.evaluation.comparison import Contender


@dataclass
class SFDJob(Job):
    """What to distil, with what, and what to compare it with."""

    compare_with: list[str] | None = option(
        None, "Further pipelines (folders or Hub ids) for the comparison, such as students of PD and RCFD."
    )


GROUPS = groups_of(SFDJob, SFDDistillationConfig)


class Plan(NamedTuple):
    """What the distillation needs besides the base model, checked before any training."""

    needs_classifier: bool
    others: "list[Contender]"  # of `compare_with`


def read_options(args: list[str] | None = None) -> tuple:
    """The options of the job, from the command line and its recipe."""
    return parse_options(
        *GROUPS,
        command="sfd",
        description=__doc__,
        first=FIRST,
        recipes=RECIPES / "sfd",
        default_recipe="digits_sfd",
        args=args,
    )


def main(args: list[str] | None = None) -> None:
    """Train what is missing, distil, compare."""
    options = read_options(args)
    from diffusers_rcfd import SFDDistillationTrainer

    given = open_job(*options, result="student")
    plan = plan_distillation(given)
    repositories = open_repositories(given)
    teacher, classifier, measure = train_missing(given, plan.needs_classifier)

    trainer = SFDDistillationTrainer(teacher, classifier, given.parts["student"], given.lpips, evaluator=measure)
    trainer.teacher_name = repositories.get("base", trainer.teacher_name)
    student = trainer.train()
    contenders = contenders_of(given.distillation, teacher, trainer, student, plan.others)
    close_job(given, contenders, measure, f"the pipeline {given.output_dir / 'student'}")


def plan_distillation(given: Given) -> Plan:
    """What is needed, once everything that can be wrong is found, before any training."""
    from diffusers_rcfd import SFDDistillationTrainer
    from diffusers_rcfd.distillation.terms import check_terms

    distillation, second_stage = given.distillation, bool(given.teacher.scheduler.config.nodes)
    others = load_others(given)
    require_shape("teacher", given.teacher, given)
    weights = distillation.weights(second_stage, given.lpips is not None)
    check_labels(given, needs_classifier(weights))
    unmeasured = replace(given.parts["student"], eval_steps=0, load_best_model_at_end=False)
    if needs_classifier(weights) and given.classifier is None:  # a classifier that fits is trained first
        check_terms(weights)
        unmeasured = replace(unmeasured, terms=["l1=1"])
    SFDDistillationTrainer(given.teacher, given.classifier, unmeasured, given.lpips)
    return Plan(needs_classifier(weights), others)


def load_others(given: Given) -> "list[Contender]":
    """The pipelines of `compare_with`, at each number of evaluations that the student shares with them."""
    from diffusers_rcfd import RCFDPipeline
    from diffusers_rcfd.evaluation.comparison import Contender

    contenders = []
    for name in given.job.compare_with or ():
        pipeline = RCFDPipeline.from_pretrained(name)
        require_shape("compare_with", pipeline, given)
        for N in find_shared_counts(name, pipeline, given.distillation.student_steps):
            contenders.append(Contender("/".join(Path(name).parts[-2:]), N, pipeline))
    return contenders


def require_shape(name: str, pipeline: "RCFDPipeline", given: Given) -> None:
    """Raise a `ValueError` for a pipeline of other images than the data set's."""
    shape = given.images.image_shape
    require(pipeline.image_shape == shape, name, pipeline.image_shape, f"for images {shape}, as `dataset` has")


def find_shared_counts(name: str, student: "RCFDPipeline", counts: list[int]) -> list[int]:
    """The network evaluations among `counts` that a student was made for, falling; a `ValueError` if none."""
    made_for = student.scheduler.trained_steps or [student.scheduler.config.num_inference_steps]
    shared = sorted({*made_for} & {*counts}, reverse=True)
    found = "a base model" if made_for == [None] else f"one for {made_for}"
    require(shared, "compare_with", f"{name}, {found}", f"students made for one of {counts} network evaluations")
    return shared


def contenders_of(
    distillation: SFDDistillationConfig,
    teacher: "RCFDPipeline",
    trainer: "SFDDistillationTrainer",
    student: "RCFDPipeline",
    others: "list[Contender]",
) -> "list[Contender]":
    """The base model by DDIM, its trajectories, the pipelines to compare with, and the student."""
    from diffusers_rcfd.evaluation.comparison import Contender

    counts = sorted(distillation.student_steps, reverse=True)
    is_base = teacher.scheduler.config.num_inference_steps is None
    contenders = [Contender("DDIM", N, teacher) for N in counts if is_base]
    contenders += [Contender("teacher", K, sampler) for K, sampler in trainer.teacher_samplers.items()]
    contenders += others
    method = "SFD-v" if len(counts) > 1 else "SFD"
    if list(trainer.objective.weights) != ["l1"]:
        method += f" {distillation.objective if distillation.terms is None else ' '.join(distillation.terms)}"
    return contenders + [Contender(method, N, student) for N in counts]

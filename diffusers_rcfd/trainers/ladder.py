"""Distillation down a ladder of students: progressive distillation, CFD and RCFD."""

import copy
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DModel
from torch.utils.data import Dataset

from diffusers_rcfd.distillation.pairs import Pair
from diffusers_rcfd.distillation.rungs import Rung
from diffusers_rcfd.distillation.sources import SOURCES
from diffusers_rcfd.distillation.terms import check_objective, check_terms
from diffusers_rcfd.evaluation.evaluator import Evaluator
from diffusers_rcfd.models.feature_classifier import FeatureClassifier
from diffusers_rcfd.pipelines.pipeline_rcfd import RCFDPipeline
from diffusers_rcfd.schedulers.scheduling_rcfd import RCFDScheduler
from diffusers_rcfd.trainers.checkpoints import architecture
from diffusers_rcfd.trainers.distillation import (
    Distillation,
    DistillationTrainer,
    Guides,
    LPIPSDistance,
    to_student,
    warn_of_parametrisation,
)
from diffusers_rcfd.trainers.generator import check_images_fit
from diffusers_rcfd.trainers.ladder_config import PER_RUNG, CFDDistillationConfig
from diffusers_rcfd.trainers.parts import load_part
from diffusers_rcfd.trainers.trainer import Stage, data_name
from diffusers_rcfd.validation import require


@dataclass(kw_only=True)
class RungStage(Distillation):
    """A student of the ladder on its way."""

    rung: Rung


class CFDDistillationTrainer(DistillationTrainer):
    """Distils a teacher into students of ever fewer steps; each rung's student is the next one's teacher.

    Args:
        teacher (`RCFDPipeline`): a base model, or a student distilled for some number of steps.
        classifier (`FeatureClassifier`, *optional*): frozen, gives the features of CFD; only pd does without.
        config (`CFDDistillationConfig`): the options; defaults are the paper's (appendix C.4).
        train_dataset (`torch.utils.data.Dataset`): see `Trainer`.
        student (`UNet2DModel`, *optional*): first weights of the first student; the teacher's if not given.
        evaluator (`Evaluator`, *optional*): measures the student every `eval_steps`.
        lpips (`Callable`, *optional*): for the term `lpips`, see `DistillationTrainer`.

    Raises:
        ValueError: if step counts, images, classifier and student do not fit the teacher.

    Example:
        ```python
        config = CFDDistillationConfig("runs/mine", student_steps=[4, 2, 1], max_train_steps=300)
        student = CFDDistillationTrainer(teacher, classifier, config, load_image_data("digits")).train()
        ```
    """

    described_elsewhere = (*PER_RUNG, "student_steps", "preset")

    def __init__(
        self,
        teacher: RCFDPipeline,
        classifier: FeatureClassifier | None = None,
        config: CFDDistillationConfig | None = None,
        train_dataset: Dataset = None,
        student: UNet2DModel | None = None,
        evaluator: Evaluator | None = None,
        lpips: LPIPSDistance | None = None,
    ):
        config = config or CFDDistillationConfig()
        super().__init__(teacher, classifier, config, train_dataset, lpips, evaluator)
        warn_of_parametrisation(self.teacher)
        scheduler = self.teacher.scheduler
        require(not scheduler.config.nodes, "teacher", scheduler.config.nodes, "on the uniform grid, without `nodes`")
        self.student = student
        self.rungs = config.rungs(scheduler.config.num_inference_steps, last_index=len(scheduler) - 1)
        check_images_fit(self.teacher, self.train_dataset)
        check_student_fits(student, self.teacher)
        check_rungs(self.rungs, config, self.teacher.image_shape, classifier, lpips)
        self._architecture = architecture(student or self.teacher.unet)

    def made_by(self) -> dict[str, Any]:
        """Also by this network and these rungs."""
        ladder = [f"{rung.student_steps} steps from {rung.teacher_steps} by {rung.objective}" for rung in self.rungs]
        made_by = super().made_by() | self._architecture | {"ladder": ladder, "source": self.config.source}
        made_by["rungs"] = [asdict(rung) for rung in self.rungs]
        return made_by

    def folder_of(self, stage: Stage) -> Path:
        """Its own folder, `output_dir/N-step`."""
        return self.output_dir / stage.name

    def run(self) -> RCFDPipeline:
        """Climb down the ladder; each student is saved as `output_dir/N-step`, and the last one is returned."""
        teacher, guides = self.teacher, self.freeze_guides()
        for index in range(len(self.rungs)):
            teacher = self.distil(index, teacher, guides)
        return teacher

    def distil(self, index: int, teacher: RCFDPipeline, guides: Guides) -> RCFDPipeline:
        """The student of a rung, distilled from its teacher, or loaded where it was finished before."""
        if index >= self.state.stage:
            self.fit(self.begin_rung(index, teacher, guides))
        return load_part(RCFDPipeline, self.output_dir / self.rungs[index].name)

    def begin_rung(self, index: int, teacher: RCFDPipeline, guides: Guides) -> RungStage:
        """The student of a rung at its start, a copy of its teacher, with what it learns from."""
        rung = self.rungs[index]
        student = self.student if self.student is not None and index == 0 else copy.deepcopy(teacher.unet)
        return RungStage(
            name=rung.name,
            index=index,
            model=to_student(student, rung.name),
            max_train_steps=rung.max_train_steps,
            rung=rung,
            teacher=self.freeze_teacher(teacher),
            scheduler=RCFDScheduler.from_config(
                dict(teacher.scheduler.config) | {"num_inference_steps": rung.student_steps}
            ),
            objective=self.config.objective_of(dict(rung.terms), rung.temperature),
            guides=guides,
            autocast=self.accelerator.autocast,
        )

    def draw(self, stage: RungStage, batch_size: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Noise, steps k uniform on the student's grid 1..N, and which images to mirror."""
        shape, device = (batch_size, *self.teacher.image_shape), generator.device
        return {
            "noise": torch.randn(shape, generator=generator, device=device),
            "k": torch.randint(1, stage.rung.student_steps + 1, (batch_size,), generator=generator, device=device),
            "flip": torch.rand(batch_size, generator=generator, device=device) < self.config.random_flip / 2,
        }

    def pairs(self, stage: RungStage, batch: dict[str, torch.Tensor]) -> Iterator[Pair]:
        """The pairs that the rung's source makes of a batch, see `distillation.ladder.ladder_pairs`."""
        return SOURCES[self.config.source](stage.student(), stage.teacher, stage.rung, batch)

    def finish_stage(self, stage: Stage) -> None:
        """Save the student of this rung."""
        RCFDPipeline(stage.model, stage.scheduler).save_pretrained(self.folder_of(stage))

    def students(self) -> list[tuple[str, Path, int]]:
        """The rungs whose students this run has made."""
        made = self.rungs[: self.state.stage]
        return [(rung.name, self.output_dir / rung.name, rung.student_steps) for rung in made]

    def published_folders(self) -> list[tuple[Path, str | None]]:
        """Each finished student on a branch named like its folder, "4-step", and the last of them on `main`."""
        folders = [(folder, name) for name, folder, _ in self.students()]
        return [*folders, (folders[-1][0], None)] if folders else []

    def create_model_card(self, folder: Path, existing: str | None = None) -> None:
        """Write the card of the student in `folder`, with a grid of its samples."""
        index = next(i for i, rung in enumerate(self.rungs) if rung.name == folder.name)
        self._write_card(
            RCFDPipeline.from_pretrained(str(folder)),
            folder,
            existing,
            objective=self.rungs[index].objective,
            is_guided=self.rungs[index].guided,
            rungs=self.rungs[: index + 1],
            teacher=self.teacher_name,
            dataset=data_name(self.train_dataset),
            classifier=self.describe_guide(),
        )


def check_student_fits(student: UNet2DModel | None, teacher: RCFDPipeline) -> None:
    """Raise a `ValueError` if a student of its own does not take and give what its teacher does."""
    for name in ("sample_size", "in_channels", "out_channels", "num_class_embeds") if student is not None else ():
        given, wanted = student.config[name], teacher.unet.config[name]
        require(given == wanted, "student", f"{name}={given}", f"a network with the teacher's {name}={wanted}")


def check_rungs(
    rungs: list[Rung],
    config: CFDDistillationConfig,
    image_shape: tuple[int, int, int],
    classifier: FeatureClassifier | None,
    lpips: LPIPSDistance | None = None,
    trains_classifier: bool = False,
) -> None:
    """Raise a `ValueError` if a rung's source is unknown or its loss cannot be computed, before any training.

    Args:
        rungs (`list[Rung]`): the ladder.
        config (`CFDDistillationConfig`): where the rungs come from.
        image_shape (`tuple[int, int, int]`): (C, H, W) of the images.
        classifier (`FeatureClassifier`, *optional*): what the losses look through.
        lpips (`Callable`, *optional*): see `DistillationTrainer`.
        trains_classifier (`bool`, defaults to `False`): a classifier that fits will be trained first.
    """
    require(config.source in SOURCES, "source", config.source, f"one of {tuple(SOURCES)}")
    for rung in rungs:
        if trains_classifier:
            check_terms(dict(rung.terms))
        else:
            check_objective(config.objective_of(dict(rung.terms), rung.temperature), image_shape, classifier, lpips)

"""Adoption of a teacher: the same network on our grid, then a copy of it that predicts v in place of eps."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch.utils.data import Dataset

from diffusers_rcfd.distillation.adoption import adoption_pairs
from diffusers_rcfd.distillation.objectives import OBJECTIVES, Weights, parse_terms
from diffusers_rcfd.distillation.pairs import Pair
from diffusers_rcfd.distillation.terms import check_objective
from diffusers_rcfd.evaluation.evaluator import Evaluator
from diffusers_rcfd.pipelines.adoption import adopt
from diffusers_rcfd.pipelines.pipeline_rcfd import RCFDPipeline
from diffusers_rcfd.schedulers.scheduling_rcfd import RCFDScheduler
from diffusers_rcfd.trainers.adoption_config import PARAMETRISATIONS, AdoptionConfig
from diffusers_rcfd.trainers.checkpoints import architecture
from diffusers_rcfd.trainers.distillation import Distillation, DistillationTrainer, to_student
from diffusers_rcfd.trainers.generator import check_images_fit
from diffusers_rcfd.trainers.made_files import note_made
from diffusers_rcfd.trainers.parts import load_part
from diffusers_rcfd.trainers.trainer import Stage, data_name


class AdoptionTrainer(DistillationTrainer):
    """Makes a teacher of any kind one that can be distilled: on the cosine schedule, predicting v.

    The first part is exact and needs no training (`adopt`). A network that predicts eps, or the velocity of flow
    matching, is then distilled into a copy of itself that predicts v at the same noise levels: the ladder and SFD
    compare x0, and the x0 of an eps network has an error that grows by sigma / alpha.

    Args:
        teacher (`DiffusionPipeline`): a base model.
        config (`AdoptionConfig`): the options.
        train_dataset (`torch.utils.data.Dataset`): see `Trainer`.
        evaluator (`Evaluator`, *optional*): measures the copy every `eval_steps`.

    Raises:
        ValueError: for a teacher that `adopt` refuses, or images that do not fit it.

    Example:
        ```python
        teacher = DDPMPipeline.from_pretrained("me/ddpm")
        adopted = AdoptionTrainer(teacher, AdoptionConfig("runs/adopted"), train_dataset=images).train()
        ```
    """

    def __init__(
        self,
        teacher: DiffusionPipeline,
        config: AdoptionConfig | None = None,
        train_dataset: Dataset = None,
        evaluator: Evaluator | None = None,
    ):
        config = config or AdoptionConfig()
        super().__init__(adopt(teacher), None, config, train_dataset, None, evaluator)
        self.teacher_name = teacher.name_or_path
        self.scheduler = self.teacher.scheduler
        if self.needs_training:
            own = {"prediction_type": config.prediction_type}
            self.scheduler = RCFDScheduler.from_config(dict(self.scheduler.config) | own)
        weights = OBJECTIVES["pd"](Weights()) if config.terms is None else parse_terms(config.terms)
        self.objective = config.objective_of(weights, temperature=1.0)
        check_objective(self.objective, self.teacher.image_shape)
        check_images_fit(self.teacher, train_dataset)

    @property
    def needs_training(self) -> bool:
        """Whether the teacher predicts something that few steps cannot be distilled from."""
        return self.teacher.scheduler.config.prediction_type not in PARAMETRISATIONS

    def made_by(self) -> dict[str, Any]:
        """Also by this network and what it is to predict."""
        predicts = [scheduler.config.prediction_type for scheduler in (self.teacher.scheduler, self.scheduler)]
        return super().made_by() | architecture(self.teacher.unet) | {"predicts": predicts}

    def run(self) -> RCFDPipeline:
        """Train the copy, the only stage; it is saved to `output_dir` and returned."""
        if not self.needs_training:
            if self.accelerator.is_main_process:
                note_made(self.output_dir, models=["."])
                self.teacher.save_pretrained(self.output_dir)
            self.accelerator.wait_for_everyone()
        elif not self.state.stage:
            self.fit(self.begin())
        return load_part(RCFDPipeline, self.output_dir)

    def begin(self) -> Distillation:
        """The copy at its start, with what it learns from."""
        return Distillation(
            name="adopted",
            index=0,
            model=to_student(copy.deepcopy(self.teacher.unet), "adopted"),
            max_train_steps=self.config.max_train_steps,
            teacher=self.freeze_teacher(self.teacher),
            scheduler=self.scheduler,
            objective=self.objective,
            guides=self.freeze_guides(),
            autocast=self.accelerator.autocast,
        )

    def draw(self, stage: Stage, batch_size: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Noise, noise levels t uniform on 0..T, and which images to mirror."""
        shape, device = (batch_size, *self.teacher.image_shape), generator.device
        return {
            "noise": torch.randn(shape, generator=generator, device=device),
            "t": torch.randint(len(self.scheduler), (batch_size,), generator=generator, device=device),
            "flip": torch.rand(batch_size, generator=generator, device=device) < self.config.random_flip / 2,
        }

    def pairs(self, stage: Distillation, batch: dict[str, torch.Tensor]) -> Iterator[Pair]:
        """The teacher's own x0, see `distillation.adoption.adoption_pairs`."""
        return adoption_pairs(stage.student(), stage.teacher, batch)

    def sampler(self, stage: Distillation) -> tuple[RCFDPipeline, int]:
        """The copy, sampled by DDIM in `sample_inference_steps`."""
        return RCFDPipeline(self.unwrap(stage.model), self.scheduler), self.config.sample_inference_steps

    def finish_stage(self, stage: Stage) -> None:
        """Save the adopted teacher."""
        RCFDPipeline(stage.model, self.scheduler).save_pretrained(self.output_dir)

    def students(self) -> list[tuple[str, Path, int]]:
        """The adopted teacher, in `sample_inference_steps`."""
        return [("adopted", self.output_dir, self.config.sample_inference_steps)]

    def create_model_card(self, folder: Path, existing: str | None = None) -> None:
        """Write the card of the adopted teacher, with a grid of its samples."""
        steps, dataset = self.config.sample_inference_steps, data_name(self.train_dataset)
        pipeline = RCFDPipeline.from_pretrained(str(folder))
        self._write_card(pipeline, folder, existing, steps, rungs=[], dataset=dataset, teacher=self.teacher_name)

"""What the distillers share: a frozen teacher, the loss of its pairs, and the evaluation of finished students."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, UNet2DModel
from diffusers.utils import logging
from torch.utils.data import Dataset

from diffusers_rcfd.distillation.objectives import Objective
from diffusers_rcfd.distillation.pairs import Pair
from diffusers_rcfd.distillation.terms import View, loss_terms, whole_batch
from diffusers_rcfd.evaluation.evaluator import Evaluator
from diffusers_rcfd.models.denoiser import Denoiser
from diffusers_rcfd.models.feature_classifier import FeatureClassifier
from diffusers_rcfd.models.fingerprints import fingerprint_weights
from diffusers_rcfd.pipelines.pipeline_rcfd import RCFDPipeline
from diffusers_rcfd.schedulers.scheduling_rcfd import RCFDScheduler
from diffusers_rcfd.trainers.adoption_config import PARAMETRISATIONS
from diffusers_rcfd.trainers.config import DistillationConfig
from diffusers_rcfd.trainers.fast_networks import freeze
from diffusers_rcfd.trainers.generator import GeneratorTrainer
from diffusers_rcfd.trainers.parts import load_part
from diffusers_rcfd.trainers.trainer import Stage
from diffusers_rcfd.validation import require

logger = logging.get_logger(__name__)

LPIPSDistance = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass
class Guides:
    """The frozen networks that losses look through."""

    classifier: FeatureClassifier | None
    lpips: LPIPSDistance | None


@dataclass(kw_only=True)
class Distillation(Stage):
    """A student on its way, with what it learns from.

    Args:
        teacher (`Denoiser`): frozen.
        scheduler (`RCFDScheduler`): the student's.
        objective (`Objective`): the loss.
        guides (`Guides`): what the loss looks through.
        autocast (`Callable`): makes the context that networks are called in.
    """

    teacher: Denoiser
    scheduler: RCFDScheduler
    objective: Objective
    guides: Guides
    autocast: Callable[[], AbstractContextManager]

    def student(self, num_inference_steps: int | None = None) -> Denoiser:
        """The model under training as a denoiser; `num_inference_steps` as there."""
        return Denoiser(self.model, self.scheduler, self.autocast, num_inference_steps)

    def view(self, pair: Pair) -> View:
        """A pair as the objective's terms see it."""
        return View(pair, self.objective, self.guides.classifier, self.guides.lpips)


class DistillationTrainer(GeneratorTrainer):
    """Base of the distillers. A trainer gives `run`, `draw`, `pairs` and `students`.

    Args:
        teacher (`DiffusionPipeline`): a base model or a student; any pipeline that `RCFDPipeline` takes over.
        classifier (`FeatureClassifier`, *optional*): what the guided terms of a loss look through.
        config (`DistillationConfig`): the options.
        train_dataset (`torch.utils.data.Dataset`, *optional*): see `Trainer`.
        lpips (`Callable`, *optional*): `losses.lpips.LPIPS` with its weights, or anything that takes two batches of
            images (B, 3, H, W) in [-1, 1] to (B,) or (B, 1, 1, 1), for the term `lpips`.
        evaluator (`Evaluator`, *optional*): measures the student every `eval_steps`.

    Raises:
        TypeError: if the teacher is no pipeline of a network and a scheduler.
        ValueError: if teacher and losses do not fit.
    """

    def __init__(
        self,
        teacher: DiffusionPipeline,
        classifier: FeatureClassifier | None,
        config: DistillationConfig,
        train_dataset: Dataset | None = None,
        lpips: LPIPSDistance | None = None,
        evaluator: Evaluator | None = None,
    ):
        super().__init__(config, train_dataset, evaluator)
        self.teacher = as_pipeline(teacher)
        self.teacher_name = self.teacher.config.get("_name_or_path")
        self.classifier = classifier
        self.lpips = lpips

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """Of the networks that a run is made by, as they are before it begins."""
        networks = {"teacher": self.teacher.unet, "classifier": self.classifier, "lpips": self.lpips,
                    "student": getattr(self, "student", None)}  # fmt: skip
        return {name: fingerprint_weights(network) for name, network in networks.items()
                if isinstance(network, torch.nn.Module)}  # fmt: skip

    def made_by(self) -> dict[str, Any]:
        """Also by the weights of these networks."""
        made_by = super().made_by()
        made_by["fingerprints"] |= self.fingerprints
        return made_by

    # --- what a distiller gives -----------------------------------------------------------------------------------

    def pairs(self, stage: Distillation, batch: dict[str, torch.Tensor]) -> Iterator[Pair]:
        """The pairs of a batch, one for each optimizer step."""
        raise NotImplementedError

    def students(self) -> list[tuple[str, Path, int]]:
        """The finished students: the name of the stage, the folder, and the network evaluations to sample in."""
        raise NotImplementedError

    # --- the loss ---------------------------------------------------------------------------------------------------

    def optimizer_steps(
        self, stage: Distillation, batches: list[dict[str, torch.Tensor]]
    ) -> Iterator[list[Callable[[], dict[str, torch.Tensor]]]]:
        """An optimizer step for each pair of a batch; the pairs of accumulated batches go side by side."""
        for pairs in zip(*(self.pairs(stage, batch) for batch in batches), strict=True):
            if len(pairs) > 1:
                self.look_at_whole_batch(stage, pairs)
            yield [partial(self.compute_loss, stage, pair) for pair in pairs]

    def look_at_whole_batch(self, stage: Distillation, pairs: tuple[Pair, ...]) -> None:
        """Tell each pair what the terms of a whole batch find in all of them, at the cost of a forward pass."""
        parts = [Pair(pair.predict, pair.x0_target, pair.alpha, pair.sigma) for pair in pairs]
        with torch.no_grad(), self.accelerator.autocast():
            found = whole_batch([stage.view(part) for part in parts])
        for pair in pairs:
            pair.whole_batch = found

    def compute_loss(self, stage: Distillation, pair: Pair) -> dict[str, torch.Tensor]:
        """The objective of a pair and its terms: scalars "loss", each term by its name, and those of `spread`."""
        with self.accelerator.autocast():
            return loss_terms(stage.view(pair))

    # --- the stages -------------------------------------------------------------------------------------------------

    def freeze_guides(self) -> Guides:
        """The classifier and LPIPS, frozen on the device."""
        device, lpips = self.accelerator.device, self.lpips
        classifier = None if self.classifier is None else freeze(self.config, self.classifier, device)
        return Guides(classifier, freeze(self.config, lpips, device) if isinstance(lpips, torch.nn.Module) else lpips)

    def freeze_teacher(self, teacher: RCFDPipeline) -> Denoiser:
        """A teacher as a frozen denoiser on the device; a student of SFD as the model of its default step count."""
        scheduler, counts = teacher.scheduler, teacher.scheduler.trained_steps
        steps = scheduler.config.num_inference_steps or max(counts) if counts else None
        return Denoiser(freeze(self.config, teacher.unet, self.accelerator.device), scheduler,
                        self.accelerator.autocast, steps)  # fmt: skip

    # --- results ----------------------------------------------------------------------------------------------------

    def sampler(self, stage: Distillation) -> tuple[RCFDPipeline, None]:
        """The student, in its own number of steps."""
        return RCFDPipeline(self.unwrap(stage.model), stage.scheduler), None

    def evaluate(self, evaluator: Evaluator | None = None, num_images: int = 50_000) -> dict[int, dict]:
        """Evaluate every finished student in its own number of steps, for the metrics file and the cards.

        Args:
            evaluator (`Evaluator`, *optional*): the metrics and the reference; the trainer's own if not given.
            num_images (`int`, defaults to 50 000): generated images of each student.

        Returns:
            `dict[int, dict]`: `EvaluationResult.to_dict()` by network evaluations, saved as `evaluation.json`.

        Raises:
            ValueError: if there is no evaluator.
        """
        judge, results = evaluator or self.evaluator, {}
        require(judge is not None, "evaluator", None, "given, here or to the trainer")
        for name, folder, N in self.students():
            student = load_part(RCFDPipeline, folder).to(self.accelerator.device)
            result = judge.evaluate_pipeline(student, num_images, N, progress=False)
            results[N] = result.to_dict()
            self.write_metrics({"stage": name, "num_inference_steps": N, **result.named_values})
            if self.accelerator.is_main_process:
                self.record_evaluation(N, result)
        return results

    def describe_guide(self) -> str | None:
        """The backbone of the classifier, for a card."""
        return None if self.classifier is None else self.classifier.config.backbone


def as_pipeline(teacher: DiffusionPipeline) -> RCFDPipeline:
    """Take a teacher over as an `RCFDPipeline`: itself, or its network and scheduler, with its name.

    Raises:
        TypeError: if it is no pipeline with a `unet` and a `scheduler`.
        ValueError: if its weights, from which the student starts, are narrower than float32.
    """
    if not isinstance(teacher, DiffusionPipeline) or not {"unet", "scheduler"} <= teacher.components.keys():
        raise TypeError(f"`teacher` must be a pipeline with a unet and a scheduler, got {type(teacher).__name__}.")
    dtype = teacher.unet.dtype
    is_wide = dtype in (torch.float32, torch.float64)
    require(is_wide, "teacher", dtype, "in float32, as loaded without `dtype`: `mixed_precision` narrows its passes")
    if isinstance(teacher, RCFDPipeline):
        return teacher
    pipeline = RCFDPipeline(teacher.unet, teacher.scheduler)
    pipeline.register_to_config(_name_or_path=teacher.name_or_path)
    return pipeline


def warn_of_parametrisation(teacher: RCFDPipeline) -> None:
    """Log that a teacher predicts what few steps cannot be distilled from."""
    predicts = teacher.scheduler.config.prediction_type
    if predicts not in PARAMETRISATIONS:
        logger.warning(
            f"`teacher` predicts {predicts!r}, whose error in x0 grows with the noise: students of few steps will be "
            "poor. `AdoptionTrainer` makes a teacher of it that predicts v."
        )


def to_student(unet: UNet2DModel, name: str) -> UNet2DModel:
    """Make a copy of a teacher's network ready for training: no dropout, all weights trained, a name of its own."""
    for module in unet.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    unet.register_to_config(dropout=0.0, _name_or_path=name)  # not the folder that its teacher was loaded from
    return unet.requires_grad_(True)

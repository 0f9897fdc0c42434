"""Distillation into few steps: progressive distillation, CFD and RCFD, down a whole ladder of students."""

import copy
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DModel
from torch.utils.data import Dataset

from diffusers_rcfd.data.image_tensors import flip
from diffusers_rcfd.distillation.feature_terms import check_stages, feature_terms
from diffusers_rcfd.distillation.rungs import Rung
from diffusers_rcfd.distillation.targets import ddim_target
from diffusers_rcfd.evaluation.evaluator import Evaluator
from diffusers_rcfd.losses.images import wide, x0_loss
from diffusers_rcfd.losses.predictions import log_mean_prediction
from diffusers_rcfd.models.feature_classifier import FeatureClassifier
from diffusers_rcfd.models.fingerprints import fingerprint_weights
from diffusers_rcfd.pipelines.pipeline_rcfd import RCFDPipeline
from diffusers_rcfd.schedulers.scheduling_rcfd import RCFDScheduler
from diffusers_rcfd.trainers.checkpoints import architecture
from diffusers_rcfd.trainers.fast_networks import frozen
from diffusers_rcfd.trainers.generator import GeneratorTrainer, as_pipeline, check_images_fit, conditioning, data_name
from diffusers_rcfd.trainers.ladder_config import PER_RUNG, CFDDistillationConfig
from diffusers_rcfd.trainers.parts import load_part
from diffusers_rcfd.trainers.trainer import Stage
from diffusers_rcfd.validation import require


class CFDDistillationTrainer(GeneratorTrainer):
    """Distils a teacher into students of ever fewer steps; each rung's student is the next one's teacher.

    Args:
        teacher (`RCFDPipeline`): a base model, or a student distilled for some number of steps.
        classifier (`FeatureClassifier`, *optional*): frozen, gives the features of CFD; only pd does without.
        config (`CFDDistillationConfig`): the options; defaults are the paper's (appendix C.4).
        train_dataset (`torch.utils.data.Dataset`): see `Trainer`.
        student (`UNet2DModel`, *optional*): first weights of the first student; the teacher's if not given.
        evaluator (`Evaluator`, *optional*): measures the student every `eval_steps`.

    Raises:
        ValueError: if step counts, images, classifier and student do not fit the teacher.
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
    ):
        config = config or CFDDistillationConfig()
        super().__init__(config, train_dataset, evaluator)
        teacher = as_pipeline(teacher)
        scheduler = teacher.scheduler
        require(not scheduler.config.nodes, "teacher", scheduler.config.nodes, "on the uniform grid, without `nodes`")
        self.teacher, self.student, self.classifier = teacher, student, classifier
        self.rungs = config.rungs(scheduler.config.num_inference_steps, last_index=len(scheduler) - 1)
        check_images_fit(teacher, train_dataset)
        self._check_student()
        check_classifier_fits(classifier, teacher.image_shape, self.rungs, config)
        self.rung, self.log_p_mean = self.rungs[0], None
        self.teacher_name = teacher.config.get("_name_or_path")
        self._architecture = architecture(student or teacher.unet)
        networks = {"teacher": teacher.unet, "classifier": classifier, "student": student}
        self._fingerprints = {name: network and fingerprint_weights(network) for name, network in networks.items()}

    def _check_student(self) -> None:
        if self.student is None:
            return
        for name in ("sample_size", "in_channels", "out_channels", "num_class_embeds"):
            given, wanted = self.student.config[name], self.teacher.unet.config[name]
            if given != wanted:
                raise ValueError(f"`student` must have the teacher's {name}={wanted}, got {given}.")

    def stages(self, first: int) -> Iterator[Stage]:
        """A student for each rung, from rung `first` on, each copied from its teacher."""
        if first:
            self.teacher = load_part(RCFDPipeline, self.output_dir / self.rungs[first - 1].name)
        for index, rung in enumerate(self.rungs[first:], first):
            self.rung = rung
            student = self.student if self.student is not None and index == 0 else copy.deepcopy(self.teacher.unet)
            device = self.accelerator.device
            self.teacher = RCFDPipeline(frozen(self.config, self.teacher.unet, device), self.teacher.scheduler)
            scheduler_config = dict(self.teacher.scheduler.config) | {"num_inference_steps": self.rung.student_steps}
            self.scheduler = RCFDScheduler.from_config(scheduler_config)
            if self.classifier is not None:
                self.classifier = frozen(self.config, self.classifier, device)
            without_dropout(student).requires_grad_(True)
            student.register_to_config(_name_or_path=rung.name)  # not the folder that its teacher was loaded from
            yield Stage(self.rung.name, index, student, self.rung.max_train_steps)
            self.teacher = load_part(RCFDPipeline, self.output_dir / rung.name)

    def made_by(self) -> dict[str, Any]:
        """Also by this network and these rungs."""
        ladder = [f"{rung.student_steps} steps from {rung.teacher_steps} by {rung.objective}" for rung in self.rungs]
        made_by = super().made_by() | self._architecture | {"ladder": ladder}
        made_by["rungs"] = [asdict(rung) for rung in self.rungs]
        made_by["fingerprints"] |= self._fingerprints
        return made_by

    def folder_of(self, stage: Stage) -> Path:
        """Its own folder, `output_dir/N-step`."""
        return self.output_dir / stage.name

    def train(self) -> RCFDPipeline:
        """Run the ladder; each student is saved as `output_dir/N-step`, and the last one is returned."""
        super().train()
        return self.teacher

    def finish_stage(self, stage: Stage) -> None:
        """Save the student of this rung."""
        RCFDPipeline(stage.model, self.scheduler).save_pretrained(self.output_dir / stage.name)

    @property
    def made_rungs(self) -> list[Rung]:
        """The rungs whose students this run has made."""
        return self.rungs[: self.state.stage]

    def published_folders(self) -> list[tuple[Path, str | None]]:
        """Each finished student on a branch named like its folder, "4-step", and the last of them on `main`."""
        folders = [(self.output_dir / rung.name, rung.name) for rung in self.made_rungs]
        return [*folders, (folders[-1][0], None)] if folders else []

    def evaluate(self, evaluator: Evaluator | None = None, num_images: int = 50_000) -> dict[int, dict]:
        """Evaluate every finished student in its own number of steps, for the metrics file and the cards.

        Args:
            evaluator (`Evaluator`, *optional*): the metrics and the reference; the trainer's own if not given.
            num_images (`int`, defaults to 50 000): generated images of each student.

        Returns:
            `dict[int, dict]`: `EvaluationResult.to_dict()` by student steps, saved as `evaluation.json`.

        Raises:
            ValueError: if there is no evaluator.
        """
        judge, results = self._judge(evaluator), {}
        for rung in self.made_rungs:
            student = load_part(RCFDPipeline, self.output_dir / rung.name).to(self.accelerator.device)
            result = judge.evaluate_pipeline(student, num_images)
            results[rung.student_steps] = result.to_dict()
            self.write_metrics({"stage": rung.name, **result.named_values})
            if self.accelerator.is_main_process:
                self.record_evaluation(rung.student_steps, result)
        return results

    def create_model_card(self, folder: Path, existing: str | None = None) -> None:
        """Write the card of the student in `folder`, with a grid of its samples."""
        index = next(i for i, rung in enumerate(self.rungs) if rung.name == folder.name)
        self._write_card(
            RCFDPipeline.from_pretrained(str(folder)),
            folder,
            existing,
            rungs=self.rungs[: index + 1],
            teacher=self.teacher_name,
            dataset=data_name(self.train_dataset),
            classifier=None if self.classifier is None else self.classifier.config.backbone,
        )

    def sampler(self) -> tuple[RCFDPipeline, None]:
        """The student, in its own number of steps."""
        return RCFDPipeline(self._unwrapped(), self.scheduler), None

    def draw(self, batch_size: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Noise, steps k uniform on the student's grid 1..N, and which images to mirror."""
        shape, device = (batch_size, *self.teacher.image_shape), generator.device
        return {
            "noise": torch.randn(shape, generator=generator, device=device),
            "k": torch.randint(1, self.rung.student_steps + 1, (batch_size,), generator=generator, device=device),
            "flip": torch.rand(batch_size, generator=generator, device=device) < self.config.random_flip / 2,
        }

    def compute_loss(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Named terms of the rung's objective, on a batch.

        Args:
            batch (`dict`): "images" in [-1, 1] and "noise", both (B, C, H, W); "k" (B,) in 1..N; "flip" (B,);
                "labels" (B,) for a class-conditional teacher.

        Returns:
            `dict`: scalars "loss"; for cfd and rcfd "cfd" and those of `spread`; for rcfd "entropy" and "diversity".
        """
        scheduler, rung = self.scheduler, self.rung
        labels = conditioning(self.teacher, batch)

        def teacher(z, t):
            with self.accelerator.autocast():
                prediction = self.teacher.unet(z, t, labels).sample
            return scheduler.predict_x0(wide(prediction), z, t)

        z_t, t = self._noisy(batch)
        # First the target: the teacher needs no memory any more when that of the student's activations is taken.
        x0_target = ddim_target(teacher, scheduler, z_t, batch["k"], rung.student_steps, rung.teacher_steps)
        x0_pred = self._predict(z_t, t, labels)
        if rung.objective == "pd":
            alpha, sigma = scheduler.alpha_sigma(t, z_t)
            return {"loss": x0_loss(x0_pred, x0_target, alpha, sigma, self.config.loss_weighting).mean()}
        regularization = (rung.regularization_weight, rung.entropy_ratio) if rung.objective == "rcfd" else None
        with self.accelerator.autocast():
            return feature_terms(self.classifier, x0_pred, x0_target, self.config, rung.temperature, regularization,
                                 self.log_p_mean)  # fmt: skip

    def prepare_step(self, batches: list[dict[str, torch.Tensor]]) -> None:
        """The mean prediction over all batches of a step: the diversity of many (Eq. 6) is no mean of theirs."""
        self.log_p_mean = None
        if len(batches) > 1 and self.rung.regularization_weight * (1 - self.rung.entropy_ratio) > 0:
            with torch.no_grad(), self.accelerator.autocast():
                x0 = [self._predict(*self._noisy(batch), conditioning(self.teacher, batch)) for batch in batches]
                logits = [self.classifier(images).logits for images in x0]
                self.log_p_mean = log_mean_prediction(torch.cat(logits))

    def _noisy(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """What the student is to predict from: z_t (B, C, H, W) and t (B,)."""
        x0 = flip(batch["images"], batch["flip"])
        t = self.scheduler.step_table(self.rung.student_steps, like=x0)[0][batch["k"]]
        return self.scheduler.add_noise(x0, batch["noise"], t), t

    def _predict(self, z_t: torch.Tensor, t: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        """The student's x0 (B, C, H, W)."""
        return self.scheduler.predict_x0(self.model(z_t, t, labels).sample, z_t, t)


def without_dropout(unet: UNet2DModel) -> UNet2DModel:
    """The network itself, which no longer drops anything in training."""
    for module in unet.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    unet.register_to_config(dropout=0.0)
    return unet


def check_classifier_fits(
    classifier: FeatureClassifier | None,
    image_shape: tuple[int, int, int],
    rungs: list[Rung],
    config: CFDDistillationConfig,
) -> None:
    """Raise a `ValueError` if the rungs need a classifier that is missing or cannot serve them.

    Args:
        classifier (`FeatureClassifier`, *optional*): the classifier.
        image_shape (`tuple[int, int, int]`): (C, H, W) of the images that it is to see.
        rungs (`list[Rung]`): the ladder.
        config (`CFDDistillationConfig`): where the rungs come from.
    """
    guided = [rung for rung in rungs if rung.objective != "pd"]
    if not guided:
        return
    if classifier is None:
        raise ValueError(f"`classifier` is needed by objective {guided[0].objective!r}; only 'pd' does without.")
    wanted, num_classes, channels = classifier.config.in_channels, classifier.config.num_classes, image_shape[0]
    if channels != wanted and channels != 1:
        raise ValueError(f"`classifier` must take images of {channels} channel(s), got one for {wanted}.")
    uses_predictions = any(rung.regularization_weight > 0 for rung in guided)
    if uses_predictions and num_classes < 2:
        raise ValueError(
            f"`classifier` must have at least 2 classes for entropy and diversity, got {num_classes}: use objective "
            "'cfd' or `regularization_weight=0`."
        )
    if config.cfd_weight == 0 and not uses_predictions:
        raise ValueError("`cfd_weight` must be above 0 where `regularization_weight` is 0: no loss is left.")
    if config.distribution == "spatial":
        check_stages(classifier, image_shape, config)

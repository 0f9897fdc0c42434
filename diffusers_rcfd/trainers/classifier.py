"""Training of the classifier whose features are distilled."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.data import Dataset

from diffusers_rcfd.data.datasets import as_image_dataset
from diffusers_rcfd.data.image_tensors import flip, shift_crop, to_model_range
from diffusers_rcfd.hub.model_card import ClassifierRecord, write_classifier_card
from diffusers_rcfd.models.feature_classifier import FeatureClassifier
from diffusers_rcfd.trainers.checkpoints import architecture
from diffusers_rcfd.trainers.config import ClassifierConfig
from diffusers_rcfd.trainers.parts import load_part
from diffusers_rcfd.trainers.trainer import Stage, Trainer, data_name


class ClassifierTrainer(Trainer):
    """Trains a `FeatureClassifier` on labelled images, with crops and flips, and reports its held-out accuracy.

    Args:
        classifier (`FeatureClassifier`): the network.
        config (`ClassifierConfig`): the options.
        train_dataset (`ImageData`): images with labels.
        eval_dataset (`ImageData`, *optional*): images held out for the accuracy; `eval_fraction` of the training
            images if not given.

    Raises:
        ValueError: if there are no labels, or more classes than the classifier has.
    """

    def __init__(
        self,
        classifier: FeatureClassifier,
        config: ClassifierConfig,
        train_dataset: Dataset,
        eval_dataset: Dataset | None = None,
    ):
        train_dataset = as_image_dataset(train_dataset)
        eval_dataset = None if eval_dataset is None else as_image_dataset(eval_dataset, "eval_dataset")
        num_classes = train_dataset.num_classes
        if num_classes is None or num_classes > classifier.config.num_classes:
            raise ValueError(
                f"`train_dataset` must have class labels in 0..{classifier.config.num_classes - 1} for it, "
                f"got {num_classes or 'no'} classes."
            )
        if eval_dataset is None:
            train_dataset, eval_dataset = train_dataset.split(config.eval_fraction, config.seed)
        super().__init__(config, train_dataset)
        self.classifier, self.eval_dataset = classifier, eval_dataset
        self.accuracy = None

    def run(self) -> FeatureClassifier:
        """Train the classifier, the only stage; it is saved to `output_dir` and returned, with `accuracy` measured."""
        if not self.state.stage:
            self.fit(Stage("classifier", 0, self.classifier, self.config.max_train_steps))
        return load_part(FeatureClassifier, self.output_dir)

    def made_by(self) -> dict[str, Any]:
        """Also by this network."""
        return super().made_by() | architecture(self.classifier)

    def draw(self, stage: Stage, batch_size: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """How far to shift each image, and which ones to mirror."""
        device, padding = generator.device, self.config.random_crop_padding
        return {
            "shift": torch.randint(2 * padding + 1, (batch_size, 2), generator=generator, device=device),
            "flip": torch.rand(batch_size, generator=generator, device=device) < self.config.random_flip / 2,
        }

    def compute_loss(self, stage: Stage, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Cross-entropy and accuracy on a batch."""
        images = shift_crop(batch["images"], batch["shift"], self.config.random_crop_padding)
        logits = stage.model(flip(images, batch["flip"])).logits.float()
        loss = F.cross_entropy(logits, batch["labels"], label_smoothing=self.config.label_smoothing)
        return {"loss": loss, "accuracy": (logits.argmax(1) == batch["labels"]).float().mean()}

    def evaluate_model(self, stage: Stage) -> None:
        """Measure the held-out accuracy."""
        if self.accelerator.is_main_process:
            self.accuracy = self.evaluate(self.unwrap(stage.model))
            self.write_metrics({"stage": stage.name, "step": self.state.step, "held_out_accuracy": self.accuracy})

    def finish_stage(self, stage: Stage) -> None:
        """Measure the held-out accuracy, if the last step did not, and save."""
        if not self.config.eval_steps:
            self.evaluate_model(stage)
        stage.model.save_pretrained(str(self.output_dir))

    def create_model_card(self, folder: Path, existing: str | None = None) -> None:
        """Write the card of the classifier, with its held-out accuracy."""
        name, backbone = self.repo_id or folder.name, self.classifier.config.backbone
        classifier = ClassifierRecord(name, backbone, data_name(self.train_dataset), self.accuracy)
        write_classifier_card(folder, classifier, existing)

    @torch.no_grad()
    def evaluate(self, classifier: FeatureClassifier | None = None) -> float:
        """Share of the held-out images that a classifier, the trainer's own by default, puts in the right class."""
        classifier, device = (classifier or self.classifier).eval(), self.accelerator.device
        right = 0
        for start in range(0, len(self.eval_dataset), 512):
            indices = range(start, min(start + 512, len(self.eval_dataset)))
            batch = self.eval_dataset.__getitems__(list(indices))
            logits = classifier(to_model_range(batch["images"].to(device))).logits
            right += (logits.argmax(1).cpu() == batch["labels"]).sum().item()
        return right / len(self.eval_dataset)

"""Training of the classifier whose features are distilled."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.data import Dataset

from diffusers_rcfd.data.image_tensors import flip, shift_crop, to_model_range
from diffusers_rcfd.hub.model_card import classifier_card
from diffusers_rcfd.models.feature_classifier import FeatureClassifier
from diffusers_rcfd.trainers.checkpoints import architecture
from diffusers_rcfd.trainers.config import ClassifierConfig
from diffusers_rcfd.trainers.generator import data_name
from diffusers_rcfd.trainers.parts import load_part
from diffusers_rcfd.trainers.trainer import Stage, Trainer


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

    def stages(self, first: int) -> Iterator[Stage]:
        """The classifier is the only stage."""
        if first == 0:
            yield Stage("classifier", 0, self.classifier, self.config.max_train_steps)
        self.classifier = load_part(FeatureClassifier, self.output_dir)

    def made_by(self) -> dict[str, Any]:
        """Also by this network."""
        return super().made_by() | architecture(self.classifier)

    def draw(self, batch_size: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """How far to shift each image, and which ones to mirror."""
        device, padding = generator.device, self.config.random_crop_padding
        return {
            "shift": torch.randint(2 * padding + 1, (batch_size, 2), generator=generator, device=device),
            "flip": torch.rand(batch_size, generator=generator, device=device) < self.config.random_flip / 2,
        }

    def compute_loss(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Cross-entropy and accuracy on a batch."""
        images = shift_crop(batch["images"], batch["shift"], self.config.random_crop_padding)
        logits = self.model(flip(images, batch["flip"])).logits.float()
        loss = F.cross_entropy(logits, batch["labels"], label_smoothing=self.config.label_smoothing)
        return {"loss": loss, "accuracy": (logits.argmax(1) == batch["labels"]).float().mean()}

    def train(self) -> FeatureClassifier:
        """Train, save to `output_dir` with the held-out accuracy, and return the classifier."""
        super().train()
        return self.classifier

    def evaluate_model(self, stage: Stage) -> None:
        """Measure the held-out accuracy."""
        if self.accelerator.is_main_process:
            self.accuracy = self.evaluate()
            self.write_metrics({"stage": stage.name, "step": self.state.step, "held_out_accuracy": self.accuracy})

    def finish_stage(self, stage: Stage) -> None:
        """Measure the held-out accuracy, if the last step did not, and save."""
        self.classifier = stage.model
        if not self.config.eval_steps:
            self.evaluate_model(stage)
        self.classifier.save_pretrained(str(self.output_dir))

    def create_model_card(self, folder: Path, existing: str | None = None) -> None:
        """Write the card of the classifier, unless there is one already."""
        if existing is None:
            name, backbone = self.repo_id or folder.name, self.classifier.config.backbone
            classifier_card(name, backbone, data_name(self.train_dataset), self.accuracy).save(folder / "README.md")

    @torch.no_grad()
    def evaluate(self) -> float:
        """Share of the held-out images that are classified right, in 0..1."""
        classifier, device = self.classifier.eval(), self.accelerator.device
        right = 0
        for start in range(0, len(self.eval_dataset), 512):
            indices = range(start, min(start + 512, len(self.eval_dataset)))
            batch = self.eval_dataset.__getitems__(list(indices))
            logits = classifier(to_model_range(batch["images"].to(device))).logits
            right += (logits.argmax(1).cpu() == batch["labels"]).sum().item()
        return right / len(self.eval_dataset)

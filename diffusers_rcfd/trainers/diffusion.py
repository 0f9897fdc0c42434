"""Training of the base diffusion model."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DModel
from torch.utils.data import Dataset

from diffusers_rcfd.data.image_tensors import flip
from diffusers_rcfd.evaluation.evaluator import Evaluator
from diffusers_rcfd.losses.images import x0_loss
from diffusers_rcfd.pipelines.pipeline_rcfd import RCFDPipeline
from diffusers_rcfd.schedulers.scheduling_rcfd import RCFDScheduler
from diffusers_rcfd.trainers.checkpoints import architecture
from diffusers_rcfd.trainers.config import DiffusionConfig
from diffusers_rcfd.trainers.generator import GeneratorTrainer, check_images_fit, conditioning, data_name
from diffusers_rcfd.trainers.parts import load_part
from diffusers_rcfd.trainers.trainer import Stage


class DiffusionTrainer(GeneratorTrainer):
    """Trains a U-Net to predict x0 (or eps, or v) at every noise level, by the loss max(mse(x0), mse(eps)).

    Args:
        unet (`UNet2DModel`): the network; its dropout is used as it is.
        scheduler (`RCFDScheduler`): the schedule, and what the network predicts.
        config (`DiffusionConfig`): the options; defaults are the paper's (appendix C.3).
        train_dataset (`torch.utils.data.Dataset`): see `Trainer`; labels are used by a class-conditional network.
        evaluator (`Evaluator`, *optional*): measures the model every `eval_steps`.

    Raises:
        ValueError: if the images do not have the network's shape, or labels are missing or out of range.
    """

    def __init__(
        self,
        unet: UNet2DModel,
        scheduler: RCFDScheduler,
        config: DiffusionConfig,
        train_dataset: Dataset,
        evaluator: Evaluator | None = None,
    ):
        super().__init__(config, train_dataset, evaluator)
        self.pipeline = RCFDPipeline(unet, scheduler)
        check_images_fit(self.pipeline, train_dataset)

    def stages(self, first: int) -> Iterator[Stage]:
        """The base model is the only stage."""
        if first == 0:
            yield Stage("base", 0, self.pipeline.unet, self.config.max_train_steps)
        self.pipeline = load_part(RCFDPipeline, self.output_dir)

    def made_by(self) -> dict[str, Any]:
        """Also by this network."""
        return super().made_by() | architecture(self.pipeline.unet)

    def draw(self, batch_size: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Noise, noise levels t uniform on 0..T, and which images to mirror."""
        shape, device = (batch_size, *self.pipeline.image_shape), generator.device
        n = len(self.pipeline.scheduler)
        return {
            "noise": torch.randn(shape, generator=generator, device=device),
            "t": torch.randint(n, (batch_size,), generator=generator, device=device),
            "flip": torch.rand(batch_size, generator=generator, device=device) < self.config.random_flip / 2,
        }

    def compute_loss(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The truncated-SNR loss of a batch (design: base training)."""
        scheduler, t = self.pipeline.scheduler, batch["t"]
        x0 = flip(batch["images"], batch["flip"])
        z_t = scheduler.add_noise(x0, batch["noise"], t)
        prediction = self.model(z_t, t, conditioning(self.pipeline, batch)).sample
        x0_pred = scheduler.predict_x0(prediction, z_t, t)
        return {"loss": x0_loss(x0_pred, x0, *scheduler.alpha_sigma(t, x0), self.config.loss_weighting).mean()}

    def train(self) -> RCFDPipeline:
        """Train, save to `output_dir` and return the pipeline."""
        super().train()
        return self.pipeline

    def finish_stage(self, stage: Stage) -> None:
        """Save the pipeline."""
        self.pipeline = RCFDPipeline(stage.model, self.pipeline.scheduler)
        self.pipeline.save_pretrained(self.output_dir)

    def create_model_card(self, folder: Path, existing: str | None = None) -> None:
        """Write the card of the base model, with a grid of its samples."""
        steps, dataset = self.config.sample_inference_steps, data_name(self.train_dataset)
        self._write_card(self.pipeline, folder, existing, steps, rungs=[], dataset=dataset)

    def sampler(self) -> tuple[RCFDPipeline, int]:
        """The base model, sampled by DDIM in `sample_inference_steps`."""
        return RCFDPipeline(self._unwrapped(), self.pipeline.scheduler), self.config.sample_inference_steps

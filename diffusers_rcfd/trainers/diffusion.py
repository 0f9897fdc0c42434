"""Training of the base diffusion model."""

from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DModel
from torch.utils.data import Dataset

from diffusers_rcfd.data.image_tensors import flip
from diffusers_rcfd.evaluation.evaluator import Evaluator
from diffusers_rcfd.losses.images import x0_loss
from diffusers_rcfd.models.denoiser import Denoiser
from diffusers_rcfd.pipelines.pipeline_rcfd import RCFDPipeline
from diffusers_rcfd.schedulers.scheduling_rcfd import RCFDScheduler
from diffusers_rcfd.trainers.checkpoints import architecture
from diffusers_rcfd.trainers.config import DiffusionConfig
from diffusers_rcfd.trainers.generator import GeneratorTrainer, check_images_fit
from diffusers_rcfd.trainers.parts import load_part
from diffusers_rcfd.trainers.trainer import Stage, data_name


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
        pipeline = RCFDPipeline(unet, scheduler)
        self.unet, self.scheduler = pipeline.unet, pipeline.scheduler
        check_images_fit(pipeline, self.train_dataset)

    def made_by(self) -> dict[str, Any]:
        """Also by this network."""
        return super().made_by() | architecture(self.unet)

    def run(self) -> RCFDPipeline:
        """Train the base model, the only stage; it is saved to `output_dir` and returned."""
        if not self.state.stage:
            self.fit(Stage("base", 0, self.unet, self.config.max_train_steps))
        return load_part(RCFDPipeline, self.output_dir)

    def draw(self, stage: Stage, batch_size: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Noise, noise levels t uniform on 0..T, and which images to mirror."""
        shape, device = (batch_size, *Denoiser(stage.model, self.scheduler).image_shape), generator.device
        return {
            "noise": torch.randn(shape, generator=generator, device=device),
            "t": torch.randint(len(self.scheduler), (batch_size,), generator=generator, device=device),
            "flip": torch.rand(batch_size, generator=generator, device=device) < self.config.random_flip / 2,
        }

    def compute_loss(self, stage: Stage, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The truncated-SNR loss of a batch (design: base training)."""
        denoiser, t = Denoiser(stage.model, self.scheduler, self.accelerator.autocast), batch["t"]
        x0 = flip(batch["images"], batch["flip"])
        z_t = self.scheduler.add_noise(x0, batch["noise"], t)
        x0_pred = denoiser(z_t, t, batch.get("labels"))
        return {"loss": x0_loss(x0_pred, x0, *self.scheduler.alpha_sigma(t, x0), self.config.loss_weighting).mean()}

    def finish_stage(self, stage: Stage) -> None:
        """Save the pipeline."""
        RCFDPipeline(stage.model, self.scheduler).save_pretrained(self.output_dir)

    def sampler(self, stage: Stage) -> tuple[RCFDPipeline, int]:
        """The base model, sampled by DDIM in `sample_inference_steps`."""
        return RCFDPipeline(self.unwrap(stage.model), self.scheduler), self.config.sample_inference_steps

    def create_model_card(self, folder: Path, existing: str | None = None) -> None:
        """Write the card of the base model, with a grid of its samples."""
        steps, dataset = self.config.sample_inference_steps, data_name(self.train_dataset)
        pipeline = RCFDPipeline.from_pretrained(str(folder))
        self._write_card(pipeline, folder, existing, steps, dataset=dataset)

"""What the trainers of generators share: sample grids, evaluation while training, the best weights, collapse."""

import warnings
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from torchvision.utils import save_image

from diffusers_rcfd.evaluation.evaluator import EvaluationResult, Evaluator
from diffusers_rcfd.hub.model_card import TrainingRecord, describe_generator, read_evaluations, write_model_card
from diffusers_rcfd.pipelines.pipeline_rcfd import RCFDPipeline
from diffusers_rcfd.saving import write_json
from diffusers_rcfd.trainers.batches import derived_seed
from diffusers_rcfd.trainers.checkpoints import EVALUATION_FILE
from diffusers_rcfd.trainers.config import GeneratorConfig
from diffusers_rcfd.trainers.made_files import note_made, seal_made
from diffusers_rcfd.trainers.parts import load_part
from diffusers_rcfd.trainers.trainer import Stage, Trainer

COLLAPSED = 0.05  # share of the teacher's variety


class GeneratorTrainer(Trainer):
    """Base of the trainers whose model generates images. A trainer gives `sampler`, and what `Trainer` asks for.

    Args:
        config (`GeneratorConfig`): the options.
        train_dataset (`torch.utils.data.Dataset`, *optional*): see `Trainer`.
        evaluator (`Evaluator`, *optional*): measures the model every `eval_steps`; the values go to the metrics file,
            the trackers and the model card, and the best weights by `best_metric` to `output_dir/best`.

    Raises:
        ValueError: if `eval_steps` has no evaluator, or one without `best_metric`.
    """

    def __init__(self, config: GeneratorConfig, train_dataset: Dataset | None, evaluator: Evaluator | None = None):
        super().__init__(config, train_dataset)
        self.evaluator, self.collapsed = evaluator, False
        if config.eval_steps:
            if evaluator is None:
                raise ValueError(f"`eval_steps` must be 0 without an `evaluator`, got {config.eval_steps}.")
            if config.best_metric not in evaluator.metrics:
                raise ValueError(
                    f"`best_metric` must be one that the evaluator measures, {evaluator.metrics}, got "
                    f"{config.best_metric!r}."
                )

    def sampler(self, stage: Stage) -> tuple[RCFDPipeline, int | None]:
        """The model under training as a pipeline, and the steps to sample it in (`None` for its own number)."""
        raise NotImplementedError

    def sample_images(self, stage: Stage) -> torch.Tensor:
        """Samples from noise that is the same at every call."""
        pipeline, num_inference_steps = self.sampler(stage)
        return sample_grid(pipeline, self.config, num_inference_steps)

    def evaluate_model(self, stage: Stage) -> None:
        """Measure the model under training, record the values, and keep the weights if they are the best so far."""
        pipeline, num_inference_steps = self.sampler(stage)
        images = self.config.eval_num_images
        result = self.evaluator.evaluate_pipeline(pipeline, images, num_inference_steps, progress=False)
        self.write_metrics({"stage": stage.name, "step": self.state.step, **result.named_values})
        score = result.score(self.config.best_metric)
        is_best = self.state.best is None or score > self.state.best
        if is_best:
            self.state.best = score
        if self.accelerator.is_main_process:
            if is_best:
                note_made(self.output_dir, models=[f"best/{stage.name}"])
                pipeline.save_pretrained(self._best_folder(stage))
            if is_best or not self.config.load_best_model_at_end:
                self.record_evaluation(num_inference_steps or pipeline.scheduler.num_inference_steps, result)
        self.accelerator.wait_for_everyone()

    def _prepare(self, stage: Stage):
        if self.config.gradient_checkpointing:
            stage.model.enable_gradient_checkpointing()
        return super()._prepare(stage)

    def choose_weights(self, stage: Stage) -> None:
        """Put the best weights into the model of a stage that is done, where that is asked for."""
        stage.model.disable_gradient_checkpointing()
        if self.config.load_best_model_at_end:
            best = load_part(RCFDPipeline, self._best_folder(stage))
            stage.model.load_state_dict(best.unet.state_dict())

    def record_evaluation(self, num_inference_steps: int, result: EvaluationResult) -> None:
        """Note a result in `evaluation.json`, where the model cards find it."""
        path = self.output_dir / EVALUATION_FILE
        note_made(self.output_dir, files=[EVALUATION_FILE])
        write_json(path, read_evaluations(path) | {num_inference_steps: result.to_dict()})
        seal_made(self.output_dir)

    def write_metrics(self, values: dict[str, Any]) -> None:
        """As `Trainer` does; with "collapsed" where `spread` is measured: 1 for a small share of the teacher's."""
        if "feature_variance_ratio" in values:
            smallest = min(values["feature_variance_ratio"], values["class_entropy_ratio"])
            if smallest < COLLAPSED and not self.collapsed:
                warnings.warn(
                    f"The student of {values['stage']} has collapsed by step {values['step']}: it shows "
                    f"{smallest:.2g} of its teacher's variety (metrics feature_variance_ratio, class_entropy_ratio).",
                    stacklevel=2,
                )
            self.collapsed = self.collapsed or smallest < COLLAPSED
            values = values | {"collapsed": int(smallest < COLLAPSED)}
        super().write_metrics(values)

    def _write_card(
        self, pipeline: RCFDPipeline, folder: Path, existing: str | None, num_inference_steps=None, **known
    ) -> None:
        """Write the card of a model in `folder`, with a grid of its samples; `known` goes to `TrainingRecord`."""
        config = self.config
        images = sample_grid(pipeline.to(self.accelerator.device), config, num_inference_steps)
        save_image(images, folder / "samples.png", nrow=8, padding=1)
        batch_size = config.train_batch_size * config.gradient_accumulation_steps * self.accelerator.num_processes
        model = describe_generator(pipeline, self.repo_id or folder.name)
        training = TrainingRecord(batch_size, config.learning_rate, seconds=self.state.seconds, **known)
        write_model_card(folder, model, training, read_evaluations(self.output_dir / EVALUATION_FILE), existing)

    def _best_folder(self, stage: Stage) -> Path:
        return self.output_dir / "best" / stage.name


def sample_grid(pipeline: RCFDPipeline, config, num_inference_steps: int | None = None) -> torch.Tensor:
    """Images (B, C, H, W) in [0, 1] of `config.num_sample_images`, from noise fixed by the seed."""
    pipeline.set_progress_bar_config(disable=True)
    num_classes = pipeline.num_classes
    labels = None if num_classes is None else [i % num_classes for i in range(config.num_sample_images)]
    generator = torch.Generator().manual_seed(derived_seed(config.seed, 0))
    latents = torch.randn((config.num_sample_images, *pipeline.image_shape), generator=generator)
    return pipeline(
        batch_size=config.num_sample_images,
        num_inference_steps=num_inference_steps,
        latents=latents,
        class_labels=labels,
        output_type="pt",
    ).images


def check_images_fit(pipeline: RCFDPipeline, dataset: Dataset) -> None:
    """Raise a `ValueError` if the images or labels of a data set do not suit the network of a pipeline."""
    if tuple(dataset.image_shape) != pipeline.image_shape:
        raise ValueError(
            f"`train_dataset` must hold images of shape (C, H, W) = {pipeline.image_shape}, as the network does, "
            f"got {tuple(dataset.image_shape)}: set `resolution` and `channels`."
        )
    wanted = pipeline.num_classes
    if wanted is not None and (dataset.num_classes is None or dataset.num_classes > wanted):
        raise ValueError(
            f"`train_dataset` must have class labels in 0..{wanted - 1} for `num_class_embeds`={wanted}, "
            f"got {dataset.num_classes or 'no'} classes."
        )

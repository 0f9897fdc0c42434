"""The Accelerator of a trainer: settings of its own, whatever another trainer in the process or a launcher has set."""

import os
from pathlib import Path

from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import (
    DataLoaderConfiguration,
    DistributedType,
    GradientAccumulationPlugin,
    ProjectConfiguration,
)
from diffusers.utils import logging

from diffusers_rcfd.trainers.config import TrainingConfig

logger = logging.get_logger(__name__)

# Sharded engines are set up once for a process, so that its trainers share their settings.
SEPARABLE = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
# What a launcher puts into the environment, by the option that has the last word.
LAUNCHER_VARIABLES = {
    "mixed_precision": "ACCELERATE_MIXED_PRECISION",
    "gradient_accumulation_steps": "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
}


def build_accelerator(config: TrainingConfig) -> Accelerator:
    """Build the Accelerator of a trainer.

    Accelerate keeps one state for a process; each trainer is given one of its own, so that two with different
    settings can live beside each other, in a notebook say. Where the options contradict the launcher, this is logged.
    """
    warn_of_launcher(config)
    if PartialState._shared_state.get("distributed_type", DistributedType.NO) in SEPARABLE:
        AcceleratorState._shared_state = {}
        GradientState._shared_state = {}
    output_dir = Path(config.output_dir)
    return Accelerator(
        mixed_precision=config.mixed_precision,
        dynamo_backend="no",  # `torch_compile` compiles
        log_with=None if config.report_to == "none" else config.report_to,
        project_config=ProjectConfiguration(str(output_dir), logging_dir=str(output_dir / "logs")),
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=config.gradient_accumulation_steps, sync_with_dataloader=False
        ),
        # One step of the learning-rate schedule for each optimizer step, on any number of processes.
        dataloader_config=DataLoaderConfiguration(split_batches=True),
    )


def use_state_of(accelerator: Accelerator) -> None:
    """Let optimizers and schedules that Accelerate prepares from now on follow this Accelerator's settings."""
    AcceleratorState._shared_state = accelerator.state.__dict__
    GradientState._shared_state = accelerator.gradient_state.__dict__


def warn_of_launcher(config: TrainingConfig) -> None:
    """Log each setting of `accelerate launch`, its config file or the environment that the options contradict."""
    for option, variable in LAUNCHER_VARIABLES.items():
        launched, used = os.environ.get(variable), getattr(config, option)
        if launched not in (None, "no", "1", str(used)):
            logger.warning(f"`{option}`={used} is used, not {launched}, which the launcher says ({variable}).")
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    if backend != "no" and not config.torch_compile:
        logger.warning(f"The launcher's dynamo backend {backend!r} is not used: `torch_compile` is what compiles.")

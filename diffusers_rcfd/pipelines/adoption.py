"""Adoption of a whole pipeline onto our grid."""

from diffusers import DiffusionPipeline
from diffusers.utils import logging

from diffusers_rcfd.models.adoption import adopt_unet, needs_adoption
from diffusers_rcfd.pipelines.pipeline_rcfd import RCFDPipeline

logger = logging.get_logger(__name__)


def adopt(pipeline: DiffusionPipeline) -> RCFDPipeline:
    """Put a base model on the cosine schedule with 1025 entries, exactly and without training.

    The network is the same function of image and noise level: at each index of our grid it is given the embedding
    that it was trained with at that level. What it predicts stays as it is, see `AdoptionTrainer`.

    Args:
        pipeline (`DiffusionPipeline`): a `UNet2DModel` and any scheduler of `models.adoption.adopt_unet`.

    Returns:
        `RCFDPipeline`: the adopted base model; the pipeline itself where nothing has to change.

    Raises:
        ValueError: for a scheduler that no map of noise levels describes, or a student.

    Example:
        ```python
        base = adopt(DDPMPipeline.from_pretrained("google/ddpm-cifar10-32"))
        ```
    """
    config = scheduler_config(pipeline)
    why = needs_adoption(config)
    if why is None:
        return pipeline if isinstance(pipeline, RCFDPipeline) else RCFDPipeline(pipeline.unet, pipeline.scheduler)
    logger.info(f"The teacher is adopted onto the cosine schedule: {why}.")
    return RCFDPipeline(*adopt_unet(pipeline.unet, config))


def scheduler_config(pipeline: DiffusionPipeline) -> dict:
    """The config of a pipeline's scheduler with the name of its class."""
    return {"_class_name": type(pipeline.scheduler).__name__, **pipeline.scheduler.config}

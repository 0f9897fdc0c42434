"""Train a base diffusion model on real images and save it as a pipeline.

accelerate launch examples/train_teacher.py --config digits --output_dir runs/digits-base
"""

from dataclasses import dataclass
from pathlib import Path

from diffusers_rcfd.cli.options import parse_options
from diffusers_rcfd.data.config import DataConfig
from diffusers_rcfd.evaluation.config import EvaluationConfig
from diffusers_rcfd.trainers.config import DiffusionConfig
from diffusers_rcfd.validation import option


@dataclass
class Network:
    """The network to train."""

    unet_preset: str = option("digits", "Architecture: one of the names in `UNET_PRESETS`.")
    class_conditional: bool = option(False, "Give the network the class labels.")
    dropout: float = option(0.1, "Dropout while training.")
    prediction_type: str = option("sample", "What the network predicts: 'sample' (x0), 'epsilon' or 'v_prediction'.")
    beta_schedule: str = option("squaredcos_cap_v2", "Noise schedule: any that DDIMScheduler names.")
    beta_start: float = option(0.0001, "First beta of a schedule other than the cosine one.")
    beta_end: float = option(0.02, "Last beta of a schedule other than the cosine one.")


def main():
    recipes = Path(__file__).parent / "configs/train_teacher"
    judge = (EvaluationConfig, "", ("num_images", "seed"))  # used with --eval_steps; those two are the trainer's
    groups = (Network, DataConfig, DiffusionConfig, judge)
    network, data, config, evaluation = parse_options(*groups, description=__doc__, recipes=recipes)
    import torch
    from accelerate import Accelerator

    from diffusers_rcfd import DiffusionTrainer, RCFDScheduler, build_unet, load_image_data
    from diffusers_rcfd.evaluation.evaluator import load_evaluator
    from diffusers_rcfd.trainers.checkpoints import check_output_dir

    check_output_dir(config)
    scheduler = RCFDScheduler(
        prediction_type=network.prediction_type,
        beta_schedule=network.beta_schedule,
        beta_start=network.beta_start,
        beta_end=network.beta_end,
    )
    images = load_image_data(**vars(data))
    torch.manual_seed(config.seed)
    unet = build_unet(
        network.unet_preset,
        dropout=network.dropout,
        num_class_embeds=images.num_classes if network.class_conditional else None,
    )
    accelerator = Accelerator(mixed_precision=config.mixed_precision)
    evaluator = load_evaluator(evaluation, images, accelerator) if config.eval_steps else None
    DiffusionTrainer(unet, scheduler, config, images, evaluator).train()
    print(f"The base model is in {config.output_dir}: RCFDPipeline.from_pretrained({config.output_dir!r})")


if __name__ == "__main__":
    main()

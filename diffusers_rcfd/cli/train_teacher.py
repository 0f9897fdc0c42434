"""Train a base diffusion model on real images.

    rcfd train-teacher --config digits --output_dir runs/digits-base
    accelerate launch -m diffusers_rcfd train-teacher --config cifar10

The result is a pipeline, and a teacher for `rcfd distill` and `rcfd sfd`.
"""

from dataclasses import dataclass

from diffusers_rcfd.cli.networks import UNetOptions
from diffusers_rcfd.cli.options import RECIPES, TRAINING, Group, parse_options
from diffusers_rcfd.data.config import DataConfig
from diffusers_rcfd.evaluation.config import EvaluationConfig
from diffusers_rcfd.trainers.config import DiffusionConfig
from diffusers_rcfd.validation import option


@dataclass
class Teacher(UNetOptions):
    """The base model to train."""

    dropout: float = option(0.1, "Dropout while training.")
    prediction_type: str = option("sample", "What the network predicts: 'sample' (x0), 'epsilon' or 'v_prediction'.")
    beta_schedule: str = option("squaredcos_cap_v2", "Noise schedule: any that DDIMScheduler names.")
    beta_start: float = option(0.0001, "First beta of a schedule other than the cosine one.")
    beta_end: float = option(0.02, "Last beta of a schedule other than the cosine one.")


GROUPS = (
    Group(Teacher, "base model"),
    Group(DataConfig, "images"),
    Group(DiffusionConfig, "base training", subjects=TRAINING),
    Group(EvaluationConfig, "evaluation, with --eval_steps", without=("num_images", "seed")),  # the trainer's are used
)
FIRST = ("dataset", "resolution", "unet_preset", "prediction_type", "max_train_steps", "train_batch_size",
         "learning_rate", "output_dir", "push_to_hub")  # fmt: skip


def read_options(args: list[str] | None = None) -> tuple:
    """The base model, the data, the training and the evaluation, from the command line and a recipe."""
    return parse_options(
        *GROUPS,
        command="train-teacher",
        description=__doc__,
        first=FIRST,
        recipes=RECIPES / "train_teacher",
        args=args,
    )


def main(args: list[str] | None = None) -> None:
    """Train a base model."""
    teacher, data, config, evaluation = read_options(args)
    from accelerate import Accelerator

    from diffusers_rcfd import DiffusionTrainer, RCFDScheduler, load_image_data
    from diffusers_rcfd.evaluation.panel import load_judges
    from diffusers_rcfd.trainers.checkpoints import check_output_dir

    check_output_dir(config)
    scheduler = RCFDScheduler(
        prediction_type=teacher.prediction_type,
        beta_schedule=teacher.beta_schedule,
        beta_start=teacher.beta_start,
        beta_end=teacher.beta_end,
    )
    images = load_image_data(**vars(data))
    unet = teacher.build(images, config.seed)
    accelerator = Accelerator(mixed_precision=config.mixed_precision)
    evaluator = load_judges(evaluation, images, accelerator) if config.eval_steps else None
    DiffusionTrainer(unet, scheduler, config, images, evaluator).train()
    print(f"The base model is in {config.output_dir}: RCFDPipeline.from_pretrained({config.output_dir!r})")

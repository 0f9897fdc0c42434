"""Train the classifier whose features are distilled, and report its accuracy.

    rcfd train-classifier --config digits --output_dir runs/digits-classifier
    accelerate launch -m diffusers_rcfd train-classifier --config cifar10

A tenth of the images is held out for the accuracy.
"""

from dataclasses import dataclass

from diffusers_rcfd.cli.networks import ClassifierOptions
from diffusers_rcfd.cli.options import RECIPES, TRAINING, Group, parse_options
from diffusers_rcfd.data.config import DataConfig
from diffusers_rcfd.trainers.config import ClassifierConfig
from diffusers_rcfd.validation import option


@dataclass
class Classifier(ClassifierOptions):
    """The classifier to train."""

    pretrained: bool = option(False, "Start from timm's pretrained weights.")


GROUPS = (
    Group(Classifier, "classifier"),
    Group(DataConfig, "images"),
    Group(ClassifierConfig, "augmentation and accuracy", subjects=TRAINING),
)
FIRST = ("dataset", "resolution", "backbone", "pretrained", "max_train_steps", "train_batch_size", "learning_rate",
         "output_dir", "push_to_hub")  # fmt: skip


def read_options(args: list[str] | None = None) -> tuple:
    """The classifier, the data and the training, from the command line and a recipe."""
    return parse_options(
        *GROUPS,
        command="train-classifier",
        description=__doc__,
        first=FIRST,
        recipes=RECIPES / "train_classifier",
        args=args,
    )


def main(args: list[str] | None = None) -> None:
    """Train a classifier."""
    options, data, config = read_options(args)
    import torch

    from diffusers_rcfd import ClassifierTrainer, FeatureClassifier, load_image_data
    from diffusers_rcfd.trainers.checkpoints import check_output_dir

    check_output_dir(config)
    images = load_image_data(**vars(data))
    if images.num_classes is None:
        raise SystemExit(f"`dataset` must have class labels, got {data.dataset!r} without: give `label_column`.")
    torch.manual_seed(config.seed)
    classifier = FeatureClassifier.from_backbone(
        options.backbone,
        pretrained=options.pretrained,
        num_classes=images.num_classes,
        in_channels=images.image_shape[0],
        small_stem=options.small_stem,
    )
    trainer = ClassifierTrainer(classifier, config, images)
    trainer.train()
    print(f"Accuracy {trainer.accuracy:.4f} on {len(trainer.eval_dataset)} held-out images.")
    print(f"The classifier is in {config.output_dir}: FeatureClassifier.from_pretrained({config.output_dir!r})")

"""Train the classifier whose features are distilled, and report its accuracy on held-out images.

accelerate launch examples/train_classifier.py --config digits --output_dir runs/digits-classifier
"""

from dataclasses import dataclass
from pathlib import Path

from diffusers_rcfd.cli.options import parse_options
from diffusers_rcfd.data.config import DataConfig
from diffusers_rcfd.trainers.config import ClassifierConfig
from diffusers_rcfd.validation import option


@dataclass
class Network:
    """The network to train."""

    backbone: str = option("resnet18", "timm model name.")
    pretrained: bool = option(False, "Start from timm's pretrained weights.")
    small_stem: bool = option(True, "ResNet and DenseNet begin with a 3x3 convolution of stride 1, for small images.")


def read_options(args: list[str] | None = None):
    """The network, the data and the training, from the command line and a recipe."""
    recipes = Path(__file__).parent / "configs/train_classifier"
    groups = (Network, DataConfig, ClassifierConfig)
    return parse_options(*groups, description=__doc__, recipes=recipes, args=args)


def main(args: list[str] | None = None):
    network, data, config = read_options(args)
    import torch

    from diffusers_rcfd import ClassifierTrainer, FeatureClassifier, load_image_data
    from diffusers_rcfd.trainers.checkpoints import check_output_dir

    check_output_dir(config)
    images = load_image_data(**vars(data))
    if images.num_classes is None:
        raise SystemExit(f"`dataset` must have class labels, got {data.dataset!r} without: give `label_column`.")
    torch.manual_seed(config.seed)
    classifier = FeatureClassifier.from_backbone(
        network.backbone,
        pretrained=network.pretrained,
        num_classes=images.num_classes,
        in_channels=images.image_shape[0],
        small_stem=network.small_stem,
    )
    trainer = ClassifierTrainer(classifier, config, images)
    trainer.train()
    print(f"Accuracy {trainer.accuracy:.4f} on {len(trainer.eval_dataset)} held-out images.")
    print(f"The classifier is in {config.output_dir}: FeatureClassifier.from_pretrained({config.output_dir!r})")


if __name__ == "__main__":
    main()

r"""Convert a published checkpoint to a pipeline or a classifier.

    rcfd convert --checkpoint logs/CIFAR10/4/ckpt.pt --output runs/authors/4-step
    rcfd convert --kind classifier --checkpoint classifier/result/cifar10/resnet18/ckpt.pt \
        --output runs/authors/resnet18

    rcfd convert --kind edm --checkpoint edm-cifar10.safetensors --output runs/edm

A checkpoint of the RCFD authors is a base model, a student by PD or RCFD, or a classifier; one of EDM is a base model
(docs/published_weights.md says how to export it).
"""

from dataclasses import dataclass, field
from pathlib import Path

from diffusers_rcfd.cli.options import Group, parse_options
from diffusers_rcfd.validation import option, require, require_count


@dataclass
class Conversion:
    """What to convert, and where to."""

    checkpoint: str = field(metadata={"help": "The file: .pt, read with weights_only=True, or .safetensors of EDM."})
    output: str = field(metadata={"help": "New folder of the pipeline or the classifier."})
    kind: str = option("unet", "'unet' or 'edm' (a pipeline is written), or 'classifier' (a FeatureClassifier).")
    weights: str = option("auto", "U-Net: 'ema_model', 'net_model' or 'auto', the first of them that there is.")
    num_inference_steps: int | None = option(None, "U-Net: steps to store; unset: the file's, none for a base model.")
    prediction_type: str = option("sample", "U-Net: what it predicts, 'sample' (x0) or 'epsilon'.")
    reference: bool = option(False, "Classifier: feed [-1, 1] as the authors' distillation does, not normalised.")

    def __post_init__(self):
        require(self.kind in ("unet", "classifier", "edm"), "kind", self.kind, "'unet', 'classifier' or 'edm'")
        weights, predictions = ("auto", "ema_model", "net_model"), ("sample", "epsilon")
        require(self.weights in weights, "weights", self.weights, f"one of {weights}")
        require(self.prediction_type in predictions, "prediction_type", self.prediction_type, f"one of {predictions}")
        if self.num_inference_steps is not None:
            require_count("num_inference_steps", self.num_inference_steps, 1)
        if self.kind != "classifier":
            require(not self.reference, "reference", self.reference, "unset for a U-Net")
        if self.kind != "unet":
            options = (self.weights, self.num_inference_steps, self.prediction_type)
            allowed = f"unset for kind {self.kind!r}, with `num_inference_steps` and `prediction_type`"
            require(options == ("auto", None, "sample"), "weights", options, allowed)
        require(Path(self.checkpoint).is_file(), "checkpoint", self.checkpoint, "a file")
        target = Path(self.output)
        empty = target.is_dir() and not any(target.iterdir())
        require(empty or not target.exists(), "output", self.output, "a new or empty folder")


def read_options(args: list[str] | None = None) -> tuple[Conversion]:
    """What to convert, and where to."""
    return parse_options(Group(Conversion, "conversion"), command="convert", description=__doc__, args=args)


def main(args: list[str] | None = None) -> None:
    """Convert a checkpoint and say what it holds."""
    (options,) = read_options(args)
    try:
        model, what = convert(options)
    except ValueError as error:
        raise SystemExit(str(error)) from error
    model.save_pretrained(options.output)
    network = getattr(model, "unet", model)
    print(f"The {what}, {sum(p.numel() for p in network.parameters()):,} parameters, is in {options.output}.")
    print(f"{type(model).__name__}.from_pretrained({options.output!r})")


def convert(options: Conversion) -> tuple:
    """The converted model, and what it is in words."""
    from diffusers_rcfd import RCFDPipeline
    from diffusers_rcfd.models.authors_checkpoints import convert_classifier, convert_unet, read_checkpoint
    from diffusers_rcfd.models.edm_checkpoints import convert_edm, read_edm_checkpoint

    if options.kind == "edm":
        return RCFDPipeline(*convert_edm(*read_edm_checkpoint(options.checkpoint))), "base model of EDM"
    checkpoint = read_checkpoint(options.checkpoint)
    if options.kind == "classifier":
        classifier = convert_classifier(checkpoint, reference=options.reference)
        return classifier, f"{classifier.config.backbone} of {classifier.num_classes} classes"
    steps, predicts = options.num_inference_steps, options.prediction_type
    pipeline = RCFDPipeline(*convert_unet(checkpoint, options.weights, steps, prediction_type=predicts))
    steps = pipeline.scheduler.config.num_inference_steps
    return pipeline, f"base model of {len(pipeline.scheduler) - 1} steps" if steps is None else f"{steps}-step model"

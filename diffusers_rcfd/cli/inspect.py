r"""Draw what a sampler predicts on its way, and what a classifier makes of it.

    rcfd inspect --models DDIM=runs/digits/base PD=runs/digits/students-pd/4-step \
        RCFD=runs/digits/students/4-step --num_inference_steps 4 --classifier runs/digits/evaluator \
        --output inspection.png

draws for each model the predicted x0 of a few noises at each step, and for all of them the entropy of the classifier's
predictions over the steps (Figure 2 of the paper) and the histogram of the classes of the final images.
"""

from dataclasses import dataclass
from pathlib import Path

from diffusers_rcfd.cli.options import Group, parse_options
from diffusers_rcfd.validation import option, require, require_count


@dataclass
class Inspection:
    """What to look at."""

    models: list[str] = option(["runs/digits/students/4-step"], "Pipelines: folders or Hub ids, NAME=PLACE or PLACE.")
    classifier: str = option("runs/digits/evaluator", "Classifier: a folder, a Hub id or a timm name.")
    num_inference_steps: int | None = option(None, "Network evaluations; unset: what each was distilled for.")
    num_images: int = option(500, "Images that entropy and histogram are taken from.")
    num_rows: int = option(6, "Noises that are drawn.")
    seed: int = option(0, "Seed of the noise, the same for every model.")
    output: str = option("inspection.png", "Picture; the numbers go beside it as .json.")

    def __post_init__(self):
        require_count("num_rows", self.num_rows, 1)
        require_count("num_images", self.num_images, self.num_rows)
        require_count("seed", self.seed, 0)
        picture = Path(self.output)
        require(picture.suffix == ".png" and picture.parent.is_dir(), "output", self.output, "a .png in a folder")


def read_options(args: list[str] | None = None) -> tuple[Inspection]:
    """What to look at."""
    return parse_options(Group(Inspection, "inspection"), command="inspect", description=__doc__, args=args)


def main(args: list[str] | None = None) -> None:
    """Draw the picture and save the numbers."""
    (options,) = read_options(args)
    import torch
    from tqdm.auto import tqdm

    from diffusers_rcfd import RCFDPipeline, load_feature_classifier
    from diffusers_rcfd.evaluation.inspection import draw_inspection, inspect_sampling
    from diffusers_rcfd.saving import write_json

    classifier = load_feature_classifier(options.classifier)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipelines = {}
    for model in options.models:
        name, _, place = model.rpartition("=")
        pipeline = RCFDPipeline.from_pretrained(place).to(device)
        pipeline.scheduler.set_timesteps(options.num_inference_steps)  # a wrong number is found now
        pipelines[name or "/".join(Path(place).parts[-2:])] = pipeline
    inspections = {}
    for name, pipeline in tqdm(pipelines.items(), unit="model"):
        inspections[name] = inspect_sampling(
            pipeline, classifier.to(device), options.num_inference_steps, options.num_images, options.seed
        )
    draw_inspection(inspections, Path(options.output), options.num_rows)
    numbers = {name: inspection.numbers() for name, inspection in inspections.items()}
    write_json(Path(options.output).with_suffix(".json"), numbers)
    for name, values in numbers.items():
        print(f"{name}: entropy over the steps {', '.join(f'{value:.3f}' for value in values['entropy'])}")

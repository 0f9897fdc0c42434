r"""Measure one pipeline: FID with Inception, or the same metrics on any classifier.

    rcfd evaluate --model runs/digits/students/1-step --feature_extractor runs/digits/evaluator
    accelerate launch -m diffusers_rcfd evaluate --model me/student --dataset uoft-cs/cifar10 \
        --inception_weights PATH --metrics fd is kid precision recall --output evaluation.json

Without --feature_extractor the network is Inception by torch-fidelity, whose weights --inception_weights names.
"""

from dataclasses import dataclass
from pathlib import Path

from diffusers_rcfd.cli.options import Group, parse_options
from diffusers_rcfd.data.config import DataConfig
from diffusers_rcfd.evaluation.config import EvaluationConfig
from diffusers_rcfd.validation import option, require


@dataclass
class Subject:
    """What to evaluate."""

    model: str = option("runs/digits/students/1-step", "Pipeline: a folder or Hub id.")
    num_inference_steps: int | None = option(None, "Network evaluations; unset: what the model was distilled for.")
    output: str | None = option(None, "JSON file for the numbers and how they came about; unset: only printed.")

    def __post_init__(self):
        folder = Path(self.output or ".").parent
        require(folder.is_dir() and self.output != "", "output", self.output, "a file in a folder that exists")


GROUPS = (Group(Subject, "model"), Group(EvaluationConfig, "evaluation"), Group(DataConfig, "reference images"))
FIRST = ("model", "num_inference_steps", "dataset", "resolution", "feature_extractor", "inception_weights", "metrics",
         "num_images", "output")  # fmt: skip


def read_options(args: list[str] | None = None) -> tuple:
    """The model, the evaluation and the reference images."""
    return parse_options(*GROUPS, command="evaluate", description=__doc__, first=FIRST, args=args)


def main(args: list[str] | None = None) -> None:
    """Measure a pipeline and print what came out."""
    subject, options, data = read_options(args)
    from accelerate import Accelerator

    from diffusers_rcfd import RCFDPipeline, load_image_data
    from diffusers_rcfd.evaluation.panel import load_judges
    from diffusers_rcfd.saving import write_json

    accelerator = Accelerator()
    pipeline = RCFDPipeline.from_pretrained(subject.model)
    pipeline.scheduler.set_timesteps(subject.num_inference_steps)  # a wrong number is found now
    evaluator = load_judges(options, load_image_data(**vars(data)), accelerator)
    pipeline.to(accelerator.device)
    result = evaluator.evaluate_pipeline(pipeline, options.num_images, subject.num_inference_steps)
    if accelerator.is_main_process:
        print(f"{pipeline.scheduler.num_inference_steps} network evaluations: {result}")
        if subject.output is not None:
            steps = pipeline.scheduler.num_inference_steps
            write_json(Path(subject.output), {"model": subject.model, "num_inference_steps": steps} | result.to_dict())
    accelerator.end_training()

"""How good one pipeline's images are: FID with Inception's weights, or the same metrics on any classifier.

accelerate launch examples/evaluate.py --model runs/digits/students/1-step --feature_extractor runs/digits/evaluator
accelerate launch examples/evaluate.py --model me/student --dataset uoft-cs/cifar10 --inception_weights PATH \
    --metrics fd is kid precision recall --output evaluation.json
"""

from dataclasses import dataclass
from pathlib import Path

from diffusers_rcfd.cli.options import parse_options
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


def main(args: list[str] | None = None):
    subject, options, data = parse_options(Subject, EvaluationConfig, DataConfig, description=__doc__, args=args)
    from accelerate import Accelerator

    from diffusers_rcfd import RCFDPipeline, load_image_data
    from diffusers_rcfd.evaluation.evaluator import load_evaluator
    from diffusers_rcfd.saving import write_json

    accelerator = Accelerator()
    pipeline = RCFDPipeline.from_pretrained(subject.model)
    pipeline.scheduler.set_timesteps(subject.num_inference_steps)  # a wrong number is found now
    evaluator = load_evaluator(options, load_image_data(**vars(data)), accelerator)
    pipeline.to(accelerator.device)
    result = evaluator.evaluate_pipeline(pipeline, options.num_images, subject.num_inference_steps)
    if accelerator.is_main_process:
        print(f"{pipeline.scheduler.num_inference_steps} network evaluations: {result}")
        if subject.output is not None:
            steps = pipeline.scheduler.num_inference_steps
            write_json(Path(subject.output), {"model": subject.model, "num_inference_steps": steps} | result.to_dict())
    accelerator.end_training()


if __name__ == "__main__":
    main()

r"""Compare students with a base model under Diffusers' samplers, from the same noise.

    rcfd compare --base runs/digits/base --students PD=runs/digits/students-pd/4-step \
        RCFD=runs/digits/students/4-step RCFD=runs/digits/students/1-step --samplers ddim dpm++2m unipc \
        --evaluations 8 4 2 1 --feature_extractor runs/digits/evaluator --num_images 5000

writes comparison.md, comparison.json, a figure with the distance against the evaluations, and a grid in which every
column starts from the same noise. A student is sampled in the steps it was distilled for; PLACE@N chooses where it was
distilled for several: SFD-v=runs/digits_sfdv/student@2.
"""

from dataclasses import dataclass
from pathlib import Path

from diffusers_rcfd.cli.options import Group, parse_options
from diffusers_rcfd.data.config import DataConfig
from diffusers_rcfd.evaluation.config import EvaluationConfig
from diffusers_rcfd.schedulers.names import STOCK_SAMPLERS
from diffusers_rcfd.validation import option, require, require_count


@dataclass
class Contest:
    """What to compare."""

    base: str | None = option(None, "Base model: a folder or Hub id, sampled with each of `samplers`.")
    samplers: list[str] = option(["ddim", "pndm", "dpm++2m", "unipc"], f"Stock samplers: of {STOCK_SAMPLERS}.")
    evaluations: list[int] = option([8, 4, 2, 1], "Network evaluations of the base.")
    students: list[str] = option(
        [], "Distilled pipelines: folders or Hub ids, each as NAME=PLACE or PLACE; PLACE@N for N network evaluations."
    )
    output_dir: str = option("comparison", "Folder for the table, the numbers and the pictures.")

    def __post_init__(self):
        require(self.base or self.students, "base", self.base, "given where there are no `students`")
        for sampler in self.samplers:
            require(sampler in STOCK_SAMPLERS, "samplers", sampler, f"of {STOCK_SAMPLERS}")
        for number in self.evaluations:
            require_count("evaluations", number, 1)
        used = Path(self.output_dir)
        require(not used.exists() or used.is_dir(), "output_dir", self.output_dir, "a folder")


GROUPS = (
    Group(Contest, "models and samplers"),
    Group(EvaluationConfig, "evaluation"),
    Group(DataConfig, "reference images"),
)
FIRST = ("base", "samplers", "evaluations", "students", "dataset", "feature_extractor", "inception_weights",
         "num_images", "output_dir")  # fmt: skip


def read_options(args: list[str] | None = None) -> tuple:
    """The models and samplers, the evaluation and the reference images."""
    return parse_options(*GROUPS, command="compare", description=__doc__, first=FIRST, args=args)


def main(args: list[str] | None = None) -> None:
    """Measure every line of the comparison, print the table and save it."""
    contest, options, data = read_options(args)
    from accelerate import Accelerator

    from diffusers_rcfd import RCFDPipeline, load_image_data
    from diffusers_rcfd.evaluation.comparison import (
        compare,
        markdown_table,
        save_comparison,
        save_comparison_figure,
        save_comparison_grid,
        stock_contenders,
        student_contender,
    )
    from diffusers_rcfd.evaluation.panel import load_judges

    accelerator = Accelerator()
    contenders = []
    if contest.base is not None:
        base = RCFDPipeline.from_pretrained(contest.base)
        contenders += stock_contenders(base, contest.samplers, contest.evaluations)
    contenders += [student_contender(student) for student in contest.students]
    evaluator = load_judges(options, load_image_data(**vars(data)), accelerator)
    for contender in contenders:
        contender.pipeline.to(accelerator.device)
    rows = compare(contenders, evaluator, options.num_images, seed=options.seed)
    if accelerator.is_main_process:
        folder = Path(contest.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        save_comparison(rows, folder)
        save_comparison_figure(rows, folder / "comparison_curve.png")
        save_comparison_grid(contenders, folder / "comparison.png", seed=options.seed)
        print(f"\n{markdown_table(rows)}\n")
        print(f"The table, its numbers and the pictures are in {folder}.")
    accelerator.end_training()

"""Serve a page that samples a student in 1, 2 or 4 steps, beside its base model.

    pip install gradio
    rcfd demo --model runs/digits/students --base runs/digits/base

The same page runs as a Space of the Hub; its variables MODEL_ID and BASE_MODEL_ID are the models it starts with:

    rcfd demo --make_space space
    hf repos create USER/NAME --type space --sdk gradio -e MODEL_ID=USER/STUDENTS -e BASE_MODEL_ID=USER/BASE
    hf upload USER/NAME space . --type space
"""

import math
import os
import shutil
import time
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from pathlib import Path

import diffusers_rcfd
from diffusers_rcfd.cli.options import Group, parse_options
from diffusers_rcfd.validation import option, require

STEPS = (1, 2, 4)
MAX_IMAGES = 64
SPACE_README = Path(__file__).parent / "space" / "README.md"
SPACE_SCRIPT = '''"""The page of `rcfd demo`, as a Space of the Hub runs it."""

from diffusers_rcfd.cli.demo import main

if __name__ == "__main__":
    main()
'''
GRID_WIDTH = 512  # pixels, about
CSS = """
.pixels img { image-rendering: pixelated; }
.pixels .icon-button-wrapper { opacity: 0; }
.pixels:hover .icon-button-wrapper { opacity: 1; }
"""
ABOUT = """# Images in one, two or four steps
A student of RCFD does in a few network evaluations what its teacher does in many. The base model beside it starts from
the same noise and takes as many steps by DDIM.
"""


@dataclass
class Demo:
    """What the page starts with, and where it is served."""

    model: str = option(
        os.environ.get("MODEL_ID", "runs/digits/students"),
        "Folder or Hub id of a pipeline, or of several in subfolders or revisions '4-step', '2-step', '1-step'.",
    )
    base: str | None = option(
        os.environ.get("BASE_MODEL_ID"), "Folder or Hub id of the base model's pipeline; unset: none is shown."
    )
    device: str | None = option(None, "Device, e.g. 'cuda'; unset: the best there is.")
    host: str | None = option(None, "Address to listen on; unset: GRADIO_SERVER_NAME, else this machine alone.")
    port: int | None = option(None, "Port; unset: GRADIO_SERVER_PORT, else the first free one from 7860.")
    make_space: str | None = option(None, "Serve nothing, but write the Hub Space into this new folder.")

    def __post_init__(self):
        folder = Path(self.make_space) if self.make_space else None
        new = folder is None or not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
        require(new, "make_space", self.make_space, "a new or an empty folder")


def find_pipeline(model: str, steps: int) -> tuple[str, str | None]:
    """(Folder or Hub id, revision) of the pipeline that runs `steps` steps: its own rung where `model` has it."""
    rung, folder = f"{steps}-step", Path(model)
    if folder.is_dir():
        rungs = sorted(path.parent.name for path in folder.glob("*-step/model_index.json"))
        if rung in rungs:
            return str(folder / rung), None
        if not (folder / "model_index.json").is_file():
            raise FileNotFoundError(
                f"{model!r} holds no pipeline, and none for {describe_steps(steps)} beside {rungs}."
            )
        return model, None

    from huggingface_hub import HfApi, snapshot_download

    hub = HfApi()
    try:
        if f"{rung}/model_index.json" in hub.list_repo_files(model):
            return str(Path(snapshot_download(model, allow_patterns=f"{rung}/*")) / rung), None
        branches = {branch.name for branch in hub.list_repo_refs(model).branches}
    except Exception as error:  # of several libraries, as the Hub's client does not wrap those of its transport
        raise FileNotFoundError(f"No folder and no model of the Hub: {model!r}. {error}") from error
    return model, rung if rung in branches else None


@lru_cache(maxsize=4)
def load_pipeline(source: str, revision: str | None, device: str):
    """The pipeline, which has run once, so that the time of its first image is that of any other."""
    from diffusers_rcfd.evaluation.sampling import generate_images

    options = {"revision": revision} if revision else {}
    pipeline = diffusers_rcfd.RCFDPipeline.from_pretrained(source, use_safetensors=True, **options).to(device)
    steps = min(pipeline.scheduler.trained_steps, default=1)
    list(generate_images(pipeline, 1, num_inference_steps=steps, progress=False))
    return pipeline


def sample(pipeline, steps: int, num_images: int, seed: int, class_label: int | str = "balanced"):
    """Images (B, C, H, W) in uint8 and the seconds they took; `class_label` is that of all, or "balanced"."""
    import torch

    from diffusers_rcfd.evaluation.sampling import generate_images

    if class_label != "balanced":
        class_label = None if pipeline.num_classes is None else [class_label] * num_images
    start = time.perf_counter()
    batches = generate_images(
        pipeline, num_images, num_inference_steps=steps, seed=seed, class_labels=class_label, progress=False
    )
    images = torch.cat(list(batches))
    return images, time.perf_counter() - start


def draw_grid(images):
    """A PIL image of all `images` (B, C, H, W), each pixel enlarged to a square."""
    from PIL import Image
    from torchvision.utils import make_grid

    columns = math.ceil(math.sqrt(len(images)))
    scale = max(1, GRID_WIDTH // (columns * images.shape[-1]))
    images = images.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    return Image.fromarray(make_grid(images, nrow=columns, padding=2, pad_value=255).permute(1, 2, 0).numpy())


def describe_steps(steps: int) -> str:
    """A number of steps in words."""
    return "1 step" if steps == 1 else f"{steps} steps"


def build_page(options: Demo):
    """The page and what its button does."""
    import gradio as gr
    from accelerate import Accelerator

    device = options.device or str(Accelerator().device)

    def load(model, steps, field):
        require(bool(model and model.strip()), field, model, "a folder or a Hub id")
        return load_pipeline(*find_pipeline(model.strip(), steps), device)

    def show_classes(model, steps):
        """Offer the classes where the model has some; one that cannot be loaded is reported by the button."""
        try:
            num_classes = load(model, steps, "model").num_classes
        except Exception:
            num_classes = None
        choices = [("Each in turn", "balanced"), *((str(i), i) for i in range(num_classes or 0))]
        return gr.Dropdown(choices, value="balanced", visible=num_classes is not None)

    def heading(name, steps, seconds, num_images, note):
        speed = f"**{seconds:.3f} s** on {device}, {1000 * seconds / num_images:.1f} ms an image"
        return f"### {name} in {describe_steps(steps)}\n{speed}; {note}"

    def generate(model, base, steps, class_label, num_images, seed):
        try:
            student = load(model, steps, "model")
            teacher = load(base, steps, "base") if base and base.strip() else None
            if teacher is not None:
                shapes = teacher.image_shape, student.image_shape
                require(shapes[0] == shapes[1], "base", shapes[0], f"a model of the same image shape {shapes[1]}")
            made_for = student.scheduler.config.num_inference_steps
            note = f"distilled for {describe_steps(made_for)}" if made_for else "not distilled"
            images, seconds = sample(student, steps, num_images, seed, class_label)
            shown = [heading("Model", steps, seconds, num_images, note), draw_grid(images)]
            if teacher is None:
                return *shown, "", None, gr.Column(visible=False)
            images, seconds = sample(teacher, steps, num_images, seed, class_label)
            note = "DDIM, same noise"
            shown += [heading("Base model", steps, seconds, num_images, note), draw_grid(images)]
            return *shown, gr.Column(visible=True)
        except Exception as error:
            raise gr.Error(str(error) or repr(error)) from error

    look = {"format": "png", "show_label": False, "interactive": False, "elem_classes": "pixels"}
    look["buttons"] = ["download", "fullscreen"]
    with gr.Blocks(title="RCFD demo", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.Markdown(ABOUT)
        with gr.Row():
            with gr.Column(scale=2, min_width=280):
                model = gr.Textbox(
                    options.model, label="Model", info="Folder or Hub id of one student or of several", elem_id="model"
                )
                base = gr.Textbox(options.base, label="Base model", info="May stay empty", elem_id="base")
                steps = gr.Radio(STEPS, value=1, label="Steps", info="Network evaluations", elem_id="steps")
                class_label = gr.Dropdown(
                    [("Each in turn", "balanced")], value="balanced", label="Class", visible=False, elem_id="class"
                )
                num_images = gr.Slider(1, MAX_IMAGES, 16, step=1, label="Number of images", elem_id="num_images")
                seed = gr.Number(0, precision=0, label="Seed", info="Each seed is a set of its own", elem_id="seed")
                button = gr.Button("Generate", variant="primary", elem_id="generate")
            with gr.Column(scale=3, min_width=320):
                title = gr.Markdown("### Model", elem_id="title")
                picture = gr.Image(elem_id="picture", **look)
            with gr.Column(scale=3, min_width=320, visible=bool(options.base)) as beside:
                base_title = gr.Markdown("### Base model", elem_id="base_title")
                base_picture = gr.Image(elem_id="base_picture", **look)

        gr.on([page.load, model.blur, model.submit, steps.change], show_classes, [model, steps], class_label,
              show_progress="hidden", trigger_mode="always_last", api_name="classes")  # fmt: skip
        button.click(
            generate,
            [model, base, steps, class_label, num_images, seed],
            [title, picture, base_title, base_picture, beside],
            show_progress_on=[picture, base_picture],
            api_name="generate",
        )
    return page


def serve(options: Demo):
    """Serve the page until it is interrupted."""
    import gradio as gr

    # The fonts of the visitor's own system: Gradio's default themes load theirs from the internet.
    theme = gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    build_page(options).launch(server_name=options.host, server_port=options.port, theme=theme, css=CSS,
                               footer_links=["api", "gradio"])  # fmt: skip


def make_space(folder: Path):
    """Write the repository of a Hub Space: a script, the package, its requirements, and the README with metadata."""
    package = Path(diffusers_rcfd.__file__).parent
    shutil.copytree(package, folder / package.name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "demo.py").write_text(SPACE_SCRIPT, encoding="utf-8")
    shutil.copy(SPACE_README, folder)
    requirements = [line for line in metadata.requires(package.name) if "extra ==" not in line]
    (folder / "requirements.txt").write_text("\n".join(requirements) + "\n", encoding="utf-8")
    print(f"The Space is in {folder}: hf upload USER/NAME {folder} . --type space")


def read_options(args: list[str] | None = None) -> tuple[Demo]:
    """What the page starts with, and where it is served."""
    return parse_options(Group(Demo, "page"), command="demo", description=__doc__, args=args)


def main(args: list[str] | None = None) -> None:
    """Serve the page, or write the Space."""
    (options,) = read_options(args)
    if options.make_space:
        make_space(Path(options.make_space))
    else:
        serve(options)

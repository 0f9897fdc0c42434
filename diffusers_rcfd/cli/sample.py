"""Sample images from a pipeline: a grid, a folder of PNG files or one .npz.

    rcfd sample --model runs/digits/students/1-step --output samples.png
    rcfd sample --model runs/digits/students/1-step --num_images 50000 --output samples.npz

Image i is the same in any batch size.
"""

from dataclasses import dataclass
from pathlib import Path

from diffusers_rcfd.cli.options import Group, parse_options
from diffusers_rcfd.validation import option, require, require_count


@dataclass
class Sampling:
    """What to sample, and where to."""

    model: str = option("runs/digits/students/1-step", "Pipeline: a folder or Hub id.")
    output: str = option("samples.png", "A .png (a grid of at most 64), a .npz (array `images`) or a folder of PNGs.")
    num_images: int = option(64, "Images.")
    num_inference_steps: int | None = option(None, "Network evaluations; unset: what the model was distilled for.")
    class_label: int | None = option(None, "Class of all images, for a class-conditional model; unset: all in turn.")
    batch_size: int = option(256, "Images at a time.")
    seed: int = option(0, "Seed of the noise; image i is the same in any batch size.")
    device: str | None = option(None, "Device, e.g. 'cuda'; unset: the best there is.")
    dtype: str = option("float32", "Number type of the network: 'float32', 'bfloat16' or 'float16'.")
    onnx_runtime: bool = option(False, "Run the network in ONNX Runtime, faster on CPUs: for dtype float32 on 'cpu'.")

    def __post_init__(self):
        require_count("num_images", self.num_images, 1)
        require_count("batch_size", self.batch_size, 1)
        require_count("seed", self.seed, 0)
        types = ("float32", "bfloat16", "float16")
        require(self.dtype in types, "dtype", self.dtype, f"one of {types}")
        plain = not self.onnx_runtime or (self.dtype == "float32" and self.device in (None, "cpu"))
        require(plain, "onnx_runtime", True, "False with another dtype than float32 or another device than 'cpu'")
        target = Path(self.output)
        other = target.suffix.lower() in (".jpg", ".jpeg", ".webp", ".gif", ".npy", ".pt")
        require(not other, "output", self.output, "a .png, a .npz or a folder")
        require(not target.is_dir() or not any(target.iterdir()), "output", self.output, "a new file or empty folder")
        require(
            target.suffix != ".png" or self.num_images <= 64, "num_images", self.num_images, "at most 64 in a grid"
        )


def read_options(args: list[str] | None = None) -> tuple[Sampling]:
    """What to sample, and where to."""
    return parse_options(Group(Sampling, "sampling"), command="sample", description=__doc__, args=args)


def main(args: list[str] | None = None) -> None:
    """Sample and save the images."""
    (options,) = read_options(args)
    import numpy as np
    import torch
    from accelerate import Accelerator
    from PIL import Image
    from torchvision.utils import save_image

    from diffusers_rcfd import RCFDPipeline, to_onnx_runtime
    from diffusers_rcfd.evaluation.sampling import generate_images

    pipeline = RCFDPipeline.from_pretrained(options.model, dtype=getattr(torch, options.dtype))
    pipeline.to("cpu" if options.onnx_runtime else options.device or Accelerator().device)
    if options.onnx_runtime:
        pipeline = to_onnx_runtime(pipeline)
    labels = "balanced" if options.class_label is None else [options.class_label] * options.num_images
    batches = generate_images(
        pipeline,
        options.num_images,
        batch_size=options.batch_size,
        num_inference_steps=options.num_inference_steps,
        seed=options.seed,
        class_labels=labels,
    )
    target = Path(options.output)
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.suffix == ".png":
        save_image(torch.cat(list(batches)) / 255, target, nrow=8, padding=1)
    elif target.suffix == ".npz":
        np.savez(target, images=torch.cat(list(batches)).permute(0, 2, 3, 1).numpy())  # (N, H, W, C), uint8
    else:
        target.mkdir(exist_ok=True)
        number = 0
        for batch in batches:
            for image in batch:
                pixels = image.permute(1, 2, 0).squeeze(-1).numpy()
                Image.fromarray(pixels).save(target / f"{number:06d}.png")
                number += 1
    print(f"{options.num_images} images are in {target}")

"""Images in bulk from a pipeline or any sampler, each from a noise of its own, straight into uint8."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from tqdm.auto import tqdm

from diffusers_rcfd.validation import require, require_count

if TYPE_CHECKING:
    from diffusers_rcfd.pipelines.pipeline_rcfd import RCFDPipeline


def image_generator(seed: int, index: int) -> torch.Generator:
    """The CPU generator of image `index`, the same for every batch size, device and process count.

    PyTorch's CPU generator uses the low 32 bits of its seed. The multiplier is the prime next to 2^32 / golden ratio,
    which spreads the runs of nearby seeds so far apart that 50 000 images of any two seeds below 38 000 share none.
    """
    return torch.Generator().manual_seed((seed * 2654435761 + index) % 2**32)


def initial_noise(indices: Sequence[int], shape: tuple[int, int, int], seed: int = 0) -> torch.Tensor:
    """The noise z_T that `generate_images` starts images `indices` from, for samplers compared on the same noise.

    Args:
        indices (`Sequence[int]`): image numbers.
        shape (`tuple[int, int, int]`): (C, H, W).
        seed (`int`, defaults to 0): the seed of the whole set.

    Returns:
        `torch.Tensor`: unit Gaussian, float32, on the CPU, (B, C, H, W).
    """
    noise = [torch.randn(1, *shape, generator=image_generator(seed, i)) for i in indices]
    return torch.cat(noise) if noise else torch.empty(0, *shape)


def generate_images(
    pipeline: "RCFDPipeline | Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]",
    num_images: int,
    *,
    batch_size: int = 256,
    num_inference_steps: int | None = None,
    seed: int = 0,
    class_labels: str | Sequence[int] | torch.Tensor | None = "balanced",
    image_shape: tuple[int, int, int] | None = None,
    indices: Sequence[int] | None = None,
    progress: bool = True,
) -> Iterator[torch.Tensor]:
    """Sample images in batches, straight into uint8.

    Image i depends only on the model, `seed` and i (to float rounding), never on batch size or process count.

    Args:
        pipeline (`RCFDPipeline` or `Callable`): the model; or any sampler `(noise, labels) -> images`, which is given
            `initial_noise` (B, C, H, W) and labels (B,) or None, and returns uint8, or floats in [0, 1].
        num_images (`int`): images in the whole set.
        batch_size (`int`, defaults to 256): images at a time.
        num_inference_steps (`int`, *optional*): steps of a pipeline; by default its own.
        seed (`int`, defaults to 0): the seed of the whole set.
        class_labels (`"balanced"`, labels (num_images,) or None, defaults to `"balanced"`): of a class-conditional
            model; `"balanced"` gives image i the class i mod number of classes. An unconditional pipeline takes
            `"balanced"` or None. A sampler function is given the labels, or None for `"balanced"`.
        image_shape (`tuple[int, int, int]`, *optional*): (C, H, W), for a sampler function.
        indices (`Sequence[int]`, *optional*): the images to generate, all of 0..num_images - 1 by default.
        progress (`bool`, defaults to `True`): show a progress bar.

    Yields:
        `torch.Tensor`: uint8, on the CPU, (B, C, H, W).

    Raises:
        ValueError: for numbers, labels or steps not allowed, and for images that are NaN or outside [0, 1].
    """
    num_images = require_count("num_images", num_images, 1)
    batch_size = require_count("batch_size", batch_size, 1)
    seed = require_count("seed", seed, 0)
    sample, num_classes = pipeline, None
    if hasattr(pipeline, "unet"):
        sample = partial(_sample, pipeline, num_inference_steps)
        image_shape, num_classes = pipeline.image_shape, pipeline.num_classes
    else:
        require(image_shape is not None, "image_shape", None, "(C, H, W) for a sampler function")
    labels = _class_labels(class_labels, num_classes, num_images)
    indices = range(num_images) if indices is None else indices

    def batches() -> Iterator[torch.Tensor]:
        hidden = {} if progress else {"disable": True}  # otherwise respect TQDM_DISABLE
        with tqdm(total=len(indices), desc="Generating", unit="image", delay=1, **hidden) as bar:
            for start in range(0, len(indices), batch_size):
                batch = list(indices[start : start + batch_size])
                noise = initial_noise(batch, image_shape, seed)
                yield as_uint8(sample(noise, None if labels is None else labels[batch]), first=batch[0]).cpu()
                bar.update(len(batch))

    return batches()  # a generator of its own, so that wrong arguments are found at the call


def _sample(pipeline, num_inference_steps, noise, labels) -> torch.Tensor:
    """Images (B, C, H, W) in [0, 1], without the pipeline's own progress bar."""
    bar_config = getattr(pipeline, "_progress_bar_config", {})
    pipeline.set_progress_bar_config(**{**bar_config, "disable": True})
    try:
        options = {} if labels is None else {"class_labels": labels}
        options |= {"num_inference_steps": num_inference_steps, "output_type": "pt"}
        return pipeline(batch_size=len(noise), latents=noise, **options).images
    finally:
        pipeline.set_progress_bar_config(**bar_config)


def _class_labels(class_labels, num_classes, num_images) -> torch.Tensor | None:
    """One label for each of `num_images` images, or None."""
    if isinstance(class_labels, str):
        require(class_labels == "balanced", "class_labels", class_labels, '"balanced", labels or None')
        class_labels = None if num_classes is None else torch.arange(num_images) % num_classes
    if class_labels is None:
        return None
    labels = torch.as_tensor(class_labels)
    valid = labels.shape == (num_images,) and not labels.is_floating_point()
    require(valid, "class_labels", tuple(labels.shape), f"{num_images} integers, one for each image")
    return labels


def as_uint8(images: torch.Tensor, first: int = 0) -> torch.Tensor:
    """Images as uint8 (B, C, H, W), from uint8 or from floats in [0, 1]; `first` is the number of the first one."""
    images = torch.as_tensor(images)
    require(images.ndim == 4, "images", tuple(images.shape), "of shape (B, C, H, W)")
    if images.dtype == torch.uint8:
        return images
    if not images.is_floating_point():
        raise TypeError(f"`images` must be uint8 in 0..255 or floats in [0, 1], got {images.dtype}.")
    bad = torch.nonzero(images.flatten(1).isnan().any(1)).flatten().tolist()
    require(not bad, "images", f"NaN in image {first + bad[0]}" if bad else None, "free of NaN")
    extremes = [] if images.numel() == 0 else [images.min().item(), images.max().item()]
    require(all(0 <= x <= 1 for x in extremes), "images", extremes, "uint8, or floats in [0, 1]")
    return images.float().mul(255).round().to(torch.uint8)

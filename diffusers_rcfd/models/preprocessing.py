"""What a classifier's network was fed with in its own library, as arguments of `FeatureClassifier`.

An image processor is measured, not read: it is given plain images, and what it answers tells the size, the scale and
the order of the channels, whatever its fields are called and however often it divides. Plain images stay plain when
they are resized or cropped.
"""

import logging
import math
from typing import Any

import numpy as np
import torch

logger = logging.getLogger(__name__)

_SIDES = (64, 96)  # of the plain images
_BILINEAR, _BICUBIC = 2, 3  # what Pillow calls them
_PILLOW_NAMES = {0: "nearest", 1: "lanczos", 4: "box", 5: "hamming"}


def measure_processor(processor: Any, channels: int) -> dict[str, Any]:
    """Measure what an image processor of transformers does to images.

    Whether it crops is left out on purpose: a generator is compared on its whole images, so they are resized to the
    size that the network takes.

    Args:
        processor: called with a list of images and `return_tensors="pt"`, as transformers' image processors are.
        channels (`int`): how many channels the network takes.

    Returns:
        `dict`: `image_size` (None where the processor keeps the size), `image_mean`, `image_std`, `interpolation` and
        `flip_channels` of `FeatureClassifier`.

    Raises:
        ValueError: the processor feeds something else than square images of `channels` channels, or changes their
            colours in another way than by a scale and a shift for each channel.
    """
    feed = type(processor).__name__
    levels = np.linspace(40, 220, channels).round()
    black, small = _answer(processor, np.zeros(channels), _SIDES[0])
    white, side = _answer(processor, np.full(channels, 255), _SIDES[1])
    colours, _ = _answer(processor, levels, _SIDES[1])
    if _pads(processor, white, side):
        raise ValueError(f"its {feed} must fill the {side} x {side} pixels that it feeds, but it pads images.")

    scale = (white - black) / 255
    if not (scale > 0).all():
        raise ValueError(f"its {feed} must make lighter pixels larger, got {black} for black and {white} for white.")
    fed = [bool((abs(black + scale * order - colours) < 2 * scale).all()) for order in (levels, levels[::-1])]
    if not any(fed):
        raise ValueError(
            f"its {feed} must scale and shift each channel alone, got {colours} for {levels}, {black} for black and"
            f" {white} for white."
        )
    return {
        "image_size": side if side == small else None,
        "image_mean": [_shorten(value) for value in -black / (white - black)],
        "image_std": [_shorten(value) for value in 1 / (white - black)],
        "interpolation": _interpolation(processor),
        "flip_channels": not fed[0],
    }


def _answer(processor: Any, colour: np.ndarray, side: int) -> tuple[np.ndarray, int]:
    """What a processor makes of an image of one colour: the pixel in the middle, and the height and width."""
    pixels = _feed(processor, colour, side)
    height = pixels.shape[1]
    return pixels[:, height // 2, height // 2].double().numpy(), height


def _pads(processor: Any, white: np.ndarray, side: int) -> bool:
    """Whether even a large image is not stretched to all that is fed."""
    pixels = _feed(processor, np.full(len(white), 255), 2 * side).double().numpy()
    return not np.allclose(pixels, white[:, None, None], rtol=1e-2, atol=1e-2)


def _feed(processor: Any, colour: np.ndarray, side: int) -> torch.Tensor:
    """The pixels (C, H, W), H = W, that a processor makes of an image of one colour."""
    from PIL import Image

    image = np.full((side, side, len(colour)), colour, dtype=np.uint8)
    image = Image.fromarray(image.squeeze(-1) if len(colour) == 1 else image)
    answer = processor([image], return_tensors="pt")
    pixels, feed = answer.get("pixel_values"), type(processor).__name__
    if not isinstance(pixels, torch.Tensor) or pixels.ndim != 4 or set(answer) - {"pixel_values", "pixel_mask"}:
        shapes = {key: tuple(getattr(value, "shape", ())) for key, value in answer.items()}
        raise ValueError(f"its {feed} must feed `pixel_values` of shape (B, C, H, W) alone, got {shapes}.")
    if pixels.shape[1] != len(colour) or pixels.shape[2] != pixels.shape[3]:
        allowed = f"square images of {len(colour)} channels"
        raise ValueError(f"its {feed} must feed {allowed}, got shape {tuple(pixels.shape[1:])}.")
    return pixels[0]


def _shorten(value: float) -> float:
    """The number of few digits that float32 cannot tell from a measured one: 0.485 for 0.48500001."""
    short = float(f"{value:.6g}") + 0.0  # 0.0 for -0.0
    return short if math.isclose(short, value, rel_tol=5e-7, abs_tol=1e-9) else float(value)


def _interpolation(processor: Any) -> str:
    resample = getattr(processor, "resample", None)
    if resample is None:  # a wrapper of timm's transforms
        return interpolation_of(getattr(processor, "data_config", {}).get("interpolation", "bicubic"))
    names = {_BILINEAR: "bilinear", _BICUBIC: "bicubic"} | _PILLOW_NAMES
    return interpolation_of(names.get(int(resample), "bicubic"))


def interpolation_of(name: str) -> str:
    """The nearest one that is differentiable and antialiased: `"bilinear"` or `"bicubic"`, logged if it is another."""
    if name in ("bilinear", "bicubic"):
        return name
    nearest = "bicubic" if name == "lanczos" else "bilinear"
    logger.warning("Images are resized with %s interpolation, the checkpoint's own is %s.", nearest, name)
    return nearest

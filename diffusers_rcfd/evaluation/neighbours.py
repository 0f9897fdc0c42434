"""Whether a model repeats its training images: the nearest real neighbours of what it generates."""

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from diffusers_rcfd.data.image_tensors import to_model_range
from diffusers_rcfd.losses.frechet import pixels
from diffusers_rcfd.saving import write_whole
from diffusers_rcfd.validation import require


@dataclass(frozen=True)
class Neighbours:
    """How near generated images are to real ones, and how near other real images are to these.

    Args:
        distances (`torch.Tensor` of shape (n,)): from each generated image to the nearest real one, float64.
        indices (`torch.Tensor` of shape (n,)): of the nearest real images.
        held_out_distances (`torch.Tensor` of shape (m,)): from each held-out real image to the nearest real one.
    """

    distances: torch.Tensor
    indices: torch.Tensor
    held_out_distances: torch.Tensor

    @property
    def ratio(self) -> float:
        """Median distance over that of the held-out images: near 1 for new images, 0 for copies."""
        return (self.distances.median() / self.held_out_distances.median()).item()

    @property
    def share_of_copies(self) -> float:
        """Share of the images that are nearer to a real one than 99 % of the held-out images: 0.01 for new images."""
        threshold = self.held_out_distances.quantile(0.01)
        return (self.distances <= threshold).double().mean().item()

    def numbers(self) -> dict[str, float]:
        """Median distances, their ratio and the share of copies, in types that JSON has."""
        return {
            "median_distance": self.distances.median().item(),
            "median_distance_of_held_out_images": self.held_out_distances.median().item(),
            "ratio": self.ratio,
            "share_of_copies": self.share_of_copies,
        }


def find_neighbours(
    images: torch.Tensor,
    real: torch.Tensor,
    held_out: torch.Tensor,
    space: Callable[[torch.Tensor], torch.Tensor] = pixels,
    batch_size: int = 256,
) -> Neighbours:
    """Find the nearest real image of each generated one, by Euclidean distance.

    Args:
        images (`torch.Tensor`): generated, uint8, (n, C, H, W).
        real (`torch.Tensor`): that the model was trained on, uint8, (N, C, H, W).
        held_out (`torch.Tensor`): real images that the model has not seen, uint8, (m, C, H, W).
        space (`Callable`, defaults to `pixels`): images in [-1, 1] to features (B, D), such as those of a classifier;
            see `build_space`.
        batch_size (`int`, defaults to 256): images at a time.

    Raises:
        ValueError: for no images.
        TypeError: for images of another number type.
    """
    for name, given in (("images", images), ("real", real), ("held_out", held_out)):
        require(len(given) > 0, name, "none", "one image or more")
        if given.dtype != torch.uint8:
            raise TypeError(f"`{name}` must be uint8, got {given.dtype}.")

    @torch.no_grad()
    def features(given):
        return torch.cat([space(to_model_range(part)).double() for part in given.split(batch_size)])

    real_features = features(real)

    def nearest(given):
        found = [torch.cdist(part, real_features).min(1) for part in features(given).split(batch_size)]
        return torch.cat([part.values for part in found]), torch.cat([part.indices for part in found])

    distances, indices = nearest(images)
    return Neighbours(distances, indices, nearest(held_out)[0])


def draw_neighbours(
    images: torch.Tensor, real: torch.Tensor, neighbours: Neighbours, path: Path, columns: int = 12
) -> None:
    """Draw a PNG: generated images above, the nearest real image of each below, the nearest pairs first.

    Args:
        images, real (`torch.Tensor`): as given to `find_neighbours`.
        neighbours (`Neighbours`): what it found.
        path (`Path`): of the PNG.
        columns (`int`, defaults to 12): pairs.
    """
    from torchvision.utils import make_grid, save_image

    chosen = neighbours.distances.argsort()[:columns]
    pairs = torch.cat([images[chosen], real[neighbours.indices[chosen]]]).float() / 255
    enlarged = pairs.repeat_interleave(4, 2).repeat_interleave(4, 3)  # neighbours of 8x8 pixels are hard to compare
    content = io.BytesIO()
    save_image(make_grid(enlarged, nrow=len(chosen), padding=4, pad_value=0.5), content, format="png")
    write_whole(path, content.getvalue())

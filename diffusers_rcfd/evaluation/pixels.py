"""Pixels as features: a judge that needs no network."""

import math
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from diffusers_rcfd.validation import require, require_count


class PixelExtractor(torch.nn.Module):
    """Gives the pixels of an image, in [0, 1], as its features; called like a FeatureClassifier.

    Images of more than `max_features` numbers are shrunk first, by the mean over blocks.

    Args:
        image_shape (`tuple[int, int, int]`): (C, H, W).
        max_features (`int`, defaults to 768): the covariance of more would need many images; 768 is 3 x 16 x 16.
    """

    name = "pixels"
    has_logits = False

    def __init__(self, image_shape: tuple[int, int, int], max_features: int = 768):
        super().__init__()
        channels, height, width = image_shape
        require_count("max_features", max_features, channels)
        shrink = min(1.0, math.sqrt(max_features / (channels * height * width)))
        self.image_shape = (channels, height, width)
        self.size = (max(1, int(height * shrink)), max(1, int(width * shrink)))
        self.config = {"size": self.size}

    @property
    def num_features(self) -> int:
        """Length D of the features."""
        return self.image_shape[0] * self.size[0] * self.size[1]

    def forward(self, images: torch.Tensor) -> SimpleNamespace:
        """Images (B, C, H, W) in [-1, 1] -> `features` (B, D), and `logits` (B, 0), of which there are none."""
        shape = tuple(images.shape[1:])
        require(shape == self.image_shape, "images", shape, f"of shape (C, H, W) = {self.image_shape}")
        pixels = F.adaptive_avg_pool2d(images.float() / 2 + 0.5, self.size).flatten(1)
        return SimpleNamespace(features=pixels, logits=pixels[:, :0])

"""LPIPS, the perceptual distance of Zhang et al. 2018, from weight files that are given; nothing is downloaded."""

import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torchvision.models.vgg import cfgs, make_layers

from diffusers_rcfd.losses.images import to_float32

VGG_FILE, LINEAR_FILE = "vgg16-397923af.pth", "weights-vgg16-lpips.pth"
_LAST_LAYERS = (3, 8, 15, 22, 29)  # the ReLU at the end of each stage of VGG16


class LPIPS(torch.nn.Module):
    """LPIPS on VGG16, frozen and differentiable in the images, which have at least `min_size` pixels a side.

    Args:
        folder (`str` or `os.PathLike`): holds torchvision's `vgg16-397923af.pth` and torch-fidelity's
            `weights-vgg16-lpips.pth`, as the cache of `torch.hub` does once torch-fidelity has fetched them. Read
            with `weights_only=True`.

    Raises:
        FileNotFoundError: if a file is absent.
        ValueError: if a file holds other weights.
    """

    min_size = 16  # VGG16 halves four times

    def __init__(self, folder: str | os.PathLike):
        super().__init__()
        weights = []
        for name in (VGG_FILE, LINEAR_FILE):
            path = Path(folder) / name
            if not path.is_file():
                raise FileNotFoundError(f"`lpips_weights` must be a folder that holds {name}, got {str(folder)!r}.")
            weights.append(torch.load(path, map_location="cpu", weights_only=True))
        vgg, linear = weights
        self.features = make_layers(cfgs["D"])
        try:
            own = {
                name.removeprefix("features."): value for name, value in vgg.items() if name.startswith("features.")
            }
            self.features.load_state_dict(own)
            scales = [linear[f"lin{i}.model.1.weight"].flatten() for i in range(len(_LAST_LAYERS))]
        except (KeyError, RuntimeError) as error:
            raise ValueError(f"`lpips_weights` {str(folder)!r} holds other weights: {error}") from error
        self.scales = torch.nn.ParameterList(scales)  # of the channels of each stage
        self.register_buffer("mean", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1))
        self.eval().requires_grad_(False)

    def forward(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """The distance of two batches of images in [-1, 1], (B, 3, H, W), at least 16 pixels a side; (B,)."""
        pair = (torch.cat([first, second]) - self.mean) / self.std
        distance = 0
        for i, layer in enumerate(self.features[: _LAST_LAYERS[-1] + 1]):
            # Not VGG's own ReLU, which works in place.
            pair = F.relu(pair) if isinstance(layer, torch.nn.ReLU) else layer(pair)
            if i in _LAST_LAYERS:
                a, b = F.normalize(to_float32(pair), dim=1, eps=1e-10).chunk(2)
                scale = self.scales[_LAST_LAYERS.index(i)].view(1, -1, 1, 1)
                distance = distance + (scale * (a - b).square()).sum(1).flatten(1).mean(1)
        return distance

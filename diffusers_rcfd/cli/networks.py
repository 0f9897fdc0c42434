"""Options of the networks that are trained here, and the networks."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from diffusers_rcfd.validation import option

if TYPE_CHECKING:
    from diffusers import UNet2DModel

    from diffusers_rcfd import ImageData


@dataclass
class UNetOptions:
    """The network of a base model."""

    unet_preset: str = option("digits", "Architecture of the base model: one of the names in `UNET_PRESETS`.")
    class_conditional: bool = option(False, "Train the base model with the class labels.")
    dropout: float = option(0.0, "Dropout of base training; distillation has none.")

    def build(self, images: "ImageData", seed: int) -> "UNet2DModel":
        """The network, with random weights, for these images."""
        import torch

        from diffusers_rcfd import build_unet

        torch.manual_seed(seed)
        num_class_embeds = images.num_classes if self.class_conditional else None
        return build_unet(self.unet_preset, dropout=self.dropout, num_class_embeds=num_class_embeds)


@dataclass
class ClassifierOptions:
    """The network of a classifier."""

    backbone: str = option("resnet18", "timm network of the classifier.")
    small_stem: bool = option(True, "ResNet and DenseNet begin with a 3x3 convolution of stride 1, for small images.")

"""U-Net architectures by name."""

from diffusers import UNet2DModel

_CIFAR10 = {
    "sample_size": 32,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (128, 256, 256, 256),
    "layers_per_block": 2,
    "attention_head_dim": None,  # one head over all channels
    "flip_sin_to_cos": False,
    "freq_shift": 0,
    "downsample_padding": 1,
}


def _attention_at(level: int | None, levels: int) -> dict:
    """Block types of a U-Net with self-attention at one level (0 is the full resolution) and in the middle block."""
    down = ["AttnDownBlock2D" if i == level else "DownBlock2D" for i in range(levels)]
    up = ["AttnUpBlock2D" if i == level else "UpBlock2D" for i in reversed(range(levels))]
    return {"down_block_types": tuple(down), "up_block_types": tuple(up)}


UNET_PRESETS = {
    # The authors' code: attention at 16x16, and in the middle block as every UNet2DModel here.
    "cifar10": _CIFAR10 | _attention_at(1, levels=4),
    # Appendix C.1 of the paper: attention at 8x8.
    "cifar10-paper": _CIFAR10 | _attention_at(2, levels=4),
    "fashion-mnist": _CIFAR10
    | _attention_at(2, levels=3)
    | {"in_channels": 1, "out_channels": 1, "block_out_channels": (32, 64, 128), "layers_per_block": 1}
    | {"norm_num_groups": 16},
    "fashion-mnist-small": _CIFAR10
    | _attention_at(2, levels=3)
    | {"in_channels": 1, "out_channels": 1, "block_out_channels": (16, 32, 64), "layers_per_block": 1}
    | {"norm_num_groups": 8},
    "digits": _CIFAR10
    | _attention_at(None, levels=2)
    | {"sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": (32, 64), "layers_per_block": 1}
    | {"norm_num_groups": 16},
}


def build_unet(preset: str, **overrides) -> UNet2DModel:
    """A randomly initialised `UNet2DModel` of a named architecture.

    `"cifar10"` and `"cifar10-paper"` are the DDPM network with 35.7 M parameters for 32x32 RGB images; dropout is 0
    unless given (0.1 in the paper's base training, 0 in distillation). `"fashion-mnist"` (2.7 M parameters) and
    `"fashion-mnist-small"` (0.7 M, for a CPU) take 32x32 grey images, `"digits"` 8x8 grey ones.

    Args:
        preset (`str`): `"cifar10"`, `"cifar10-paper"`, `"fashion-mnist"`, `"fashion-mnist-small"` or `"digits"`.
        overrides: arguments of `UNet2DModel` that replace the preset's, such as `dropout=0.1`, `sample_size=64` or
            `num_class_embeds=10` for a class-conditional network.

    Raises:
        ValueError: for an unknown preset.
        TypeError: for an argument that `UNet2DModel` does not have.
    """
    if preset not in UNET_PRESETS:
        raise ValueError(f"`preset` must be one of {sorted(UNET_PRESETS)}, got {preset!r}.")
    return UNet2DModel(**(UNET_PRESETS[preset] | overrides))

"""Copies of a network: with a table of embeddings, a row for each index of a schedule, or with fewer outputs."""

import inspect

import torch
from diffusers import UNet2DModel


@torch.no_grad()
def tabulate_levels(unet: UNet2DModel, timesteps: torch.Tensor) -> UNet2DModel:
    """A copy of a network that takes index k = 0..n - 1 where the network takes `timesteps[k]`.

    Between two rows of a table that the network has already, the row is interpolated.

    Args:
        unet (`UNet2DModel`): the network, with a positional embedding or a learned table.
        timesteps (`torch.Tensor`): what the network takes at each index, (n,), float64.

    Raises:
        ValueError: for a table with too few rows, or for a Fourier embedding. That one has twice as many features as
            a table of `UNet2DModel`, and its network divides its output by the timestep.
    """
    kind = unet.config.time_embedding_type
    if kind == "positional":
        table = unet.time_proj(timesteps.float().to(unet.device))  # (n, channels)
    elif kind == "learned":
        rows = unet.time_proj.num_embeddings
        if timesteps.max() > rows - 1:
            raise ValueError(
                f"`unet` must have a `num_train_timesteps` of at least {timesteps.max().ceil() + 1:.0f}, got {rows}."
            )
        table = _interpolate_rows(unet.time_proj.weight.cpu(), timesteps)
    else:
        raise ValueError(f"`unet` must have the `time_embedding_type` 'positional' or 'learned', got {kind!r}.")
    options = {"time_embedding_type": "learned", "num_train_timesteps": len(timesteps)}
    return _copy_with(unet, options, {"time_proj.weight": table})


@torch.no_grad()
def cut_output(unet: UNet2DModel, channels: int) -> UNet2DModel:
    """A copy of a network that predicts the first channels only."""
    last = {f"conv_out.{name}": tensor[:channels] for name, tensor in unet.conv_out.state_dict().items()}
    return _copy_with(unet, {"out_channels": channels}, last)


def _copy_with(unet: UNet2DModel, options: dict, weights: dict[str, torch.Tensor]) -> UNet2DModel:
    """A copy of a network with other arguments and weights."""
    arguments = inspect.signature(type(unet).__init__).parameters
    config = {name: value for name, value in unet.config.items() if name in arguments}  # without those of an EMAModel
    copied = type(unet)(**config | options)
    copied.load_state_dict(unet.state_dict() | weights)
    if unet.dtype != copied.dtype:  # otherwise Diffusers would warn of the cast
        copied.to(unet.dtype)
    return copied.to(unet.device).train(unet.training)


def _interpolate_rows(table: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Rows of a table (n, channels) at fractional indices (m,), in float64."""
    low = index.floor().long().clamp(0, len(table) - 1)
    high = (low + 1).clamp(max=len(table) - 1)
    return table.double()[low].lerp(table.double()[high], (index - low)[:, None])

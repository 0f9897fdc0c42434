"""The embedding of the noise level as a learned table: one row for each index of a schedule."""

import inspect

import torch
from diffusers import UNet2DModel


@torch.no_grad()
def tabulate_levels(unet: UNet2DModel, timesteps: torch.Tensor, **overrides) -> UNet2DModel:
    """A copy of a network that takes index k = 0..n - 1 where the network takes `timesteps[k]`.

    Between two rows of a table that the network has already, the row is interpolated.

    Args:
        unet (`UNet2DModel`): the network, with a positional embedding or a learned table.
        timesteps (`torch.Tensor`): what the network takes at each index, (n,), float64.
        overrides: arguments of the network that the copy has otherwise, such as `out_channels`.

    Raises:
        ValueError: for a Fourier embedding. It has twice as many features as a table of `UNet2DModel`, and its
            network divides its output by the timestep.
    """
    kind = unet.config.time_embedding_type
    if kind == "positional":
        table = unet.time_proj(timesteps.float().to(unet.device))  # (n, channels)
    elif kind == "learned":
        table = _interpolate_rows(unet.time_proj.weight.cpu(), timesteps)
    else:
        raise ValueError(f"`unet` must have the `time_embedding_type` 'positional' or 'learned', got {kind!r}.")
    arguments = inspect.signature(type(unet).__init__).parameters
    options = {name: value for name, value in unet.config.items() if name in arguments}  # without those of an EMAModel
    options |= {"time_embedding_type": "learned", "num_train_timesteps": len(timesteps)}
    copied = type(unet)(**options | overrides)
    weights = unet.state_dict() | {"time_proj.weight": table}
    expected = copied.state_dict()
    for name in ("conv_out.weight", "conv_out.bias"):
        weights[name] = weights[name][: len(expected[name])]  # without the channels of a variance
    copied.load_state_dict(weights)
    if unet.dtype != copied.dtype:  # otherwise Diffusers would warn of the cast
        copied.to(unet.dtype)
    return copied.to(unet.device).train(unet.training)


def _interpolate_rows(table: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Rows of a table (n, channels) at fractional indices (m,), in float64."""
    low = index.floor().long().clamp(0, len(table) - 1)
    high = (low + 1).clamp(max=len(table) - 1)
    return table.double()[low].lerp(table.double()[high], (index - low)[:, None])

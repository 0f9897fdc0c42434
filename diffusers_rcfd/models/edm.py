"""Networks with EDM's preconditioning (Karras et al. 2022) as networks of z_t and its index, exactly."""

import torch
from diffusers import UNet2DModel

from diffusers_rcfd.models.level_tables import tabulate_levels
from diffusers_rcfd.schedulers.scheduling_rcfd import RCFDScheduler

NUM_ENTRIES = 1025


def edm_sigmas(config: dict, n: int = NUM_ENTRIES) -> torch.Tensor:
    """The n noise levels of an EDM scheduler's config, rising from `sigma_min` to `sigma_max`; (n,), float64."""
    low, high = config["sigma_min"], config["sigma_max"]
    if config.get("sigma_schedule", "karras") == "exponential":
        low, high = torch.tensor([low, high], dtype=torch.float64).log()
        return torch.linspace(low, high, n, dtype=torch.float64).exp()
    rho = config.get("rho", 7.0)
    return torch.linspace(low ** (1 / rho), high ** (1 / rho), n, dtype=torch.float64) ** rho


def from_edm(unet: UNet2DModel, config: dict) -> tuple[UNet2DModel, RCFDScheduler]:
    """The network and schedule of an EDM pipeline in our terms, with equal predictions at every noise level.

    EDM's network F sees x / sqrt(sigma^2 + sigma_data^2) and ln(sigma) / 4; the image is c_skip x + c_out F. With
    z_t = x / sqrt(sigma^2 + sigma_data^2) that is a network of z_t that predicts v (or -v, where the scheduler says
    `epsilon`) of images divided by sigma_data (Karras et al. 2022, Table 1; Salimans and Ho 2022, appendix D). The
    index of the noise level enters by a table of the embeddings that F had for it.

    Args:
        unet (`UNet2DModel`): F, with positional time embeddings.
        config (`dict`): of an `EDMEulerScheduler` or `EDMDPMSolverMultistepScheduler`.

    Returns:
        a `UNet2DModel` with a learned embedding of 1025 noise levels, and its `RCFDScheduler`.

    Raises:
        ValueError: for another kind of time embedding or prediction.
    """
    sigmas = edm_sigmas(config)
    alphas_cumprod = 1 / (1 + (sigmas / config["sigma_data"]) ** 2)
    ratios = torch.cat([alphas_cumprod[:1], alphas_cumprod[1:] / alphas_cumprod[:-1]])
    scheduler = RCFDScheduler(
        NUM_ENTRIES,
        trained_betas=(1 - ratios).tolist(),
        prediction_type="v_prediction",
        clip_sample=False,
        data_std=config["sigma_data"],
    )
    return tabulate_edm(unet, config, sigmas), scheduler


@torch.no_grad()
def tabulate_edm(unet: UNet2DModel, config: dict, sigmas: torch.Tensor) -> UNet2DModel:
    """EDM's network as one that predicts v at the indices of its noise levels `sigmas` (n,); see `from_edm`.

    Raises:
        ValueError: for another kind of time embedding or prediction.
    """
    if unet.config.time_embedding_type != "positional":
        raise ValueError(
            f"`unet` of an EDM pipeline must have `time_embedding_type='positional'`, which takes ln(sigma) / 4, got "
            f"{unet.config.time_embedding_type!r}."
        )
    predicts = config["prediction_type"]
    if predicts not in ("epsilon", "v_prediction"):
        raise ValueError(f"`prediction_type` of EDM must be 'epsilon' or 'v_prediction', got {predicts!r}.")
    converted = tabulate_levels(unet, sigmas.log() / 4)
    if predicts == "epsilon":
        converted.conv_out.weight.neg_()
        converted.conv_out.bias.neg_()
    return converted

"""Any teacher on our grid: the same network at the noise levels of the cosine schedule with 1025 entries.

In x / alpha = x0 + nu eps with nu = sigma / alpha, every diffusion model is a denoiser at noise level nu. Index k of
our schedule has a nu, the teacher has a timestep at that nu, and the embedding of this timestep becomes row k of a
table.
"""

import torch
from diffusers import UNet2DModel
from diffusers.utils import logging

from diffusers_rcfd.models.edm import NUM_ENTRIES, tabulate_edm
from diffusers_rcfd.models.level_tables import cut_output, tabulate_levels
from diffusers_rcfd.schedulers.noise_schedules import cosine_betas
from diffusers_rcfd.schedulers.scheduling_rcfd import RCFDScheduler

logger = logging.get_logger(__name__)

LEARNED_VARIANCES = ("learned", "learned_range")
# What is carried over from a scheduler with betas.
KEPT = (
    "prediction_type",
    "clip_sample",
    "clip_sample_range",
    "thresholding",
    "dynamic_thresholding_ratio",
    "sample_max_value",
    "data_std",
)


def needs_adoption(config: dict) -> str | None:
    """Why a teacher should be adopted before it is distilled, or None where it need not be.

    Args:
        config (`dict`): of its scheduler, stock or ours, with `_class_name`.

    Raises:
        ValueError: for a scheduler that nothing here describes.
    """
    if is_flow(config):
        return "it predicts the velocity of flow matching"
    if is_continuous(config):
        return "its network takes ln(sigma) / 4 and not an index"
    scheduler = RCFDScheduler.from_config(config)
    if scheduler.config.prediction_type == "epsilon":
        return "it predicts epsilon"
    if not has_cosine_grid(scheduler):
        return f"its schedule is not the cosine one with {NUM_ENTRIES} entries"
    return None


def has_cosine_grid(scheduler: RCFDScheduler) -> bool:
    """Whether a scheduler has the noise levels of the cosine schedule with 1025 entries."""
    if len(scheduler) != NUM_ENTRIES:
        return False
    return torch.allclose(scheduler.alphas_cumprod, (1 - cosine_betas(NUM_ENTRIES)).cumprod(0), rtol=1e-9, atol=0)


def adopt_unet(unet: UNet2DModel, config: dict) -> tuple[UNet2DModel, RCFDScheduler]:
    """A teacher's network and its scheduler on the cosine schedule with 1025 entries, with the same D(x; nu).

    What the network predicts stays as it is, and so do clipping, thresholding and the scale of the images. An index
    beyond the teacher's noisiest or cleanest level gets that level, which is logged.

    | scheduler | its network takes |
    |---|---|
    | with betas: DDPM, DDIM, PNDM, DPM-Solver, Euler, Heun, ours, ... | z_t, index |
    | `EDMEulerScheduler`, `EDMDPMSolverMultistepScheduler` | x / sqrt(sigma^2 + sigma_data^2), ln(sigma) / 4 |
    | `EulerDiscreteScheduler(timestep_type="continuous", prediction_type="v_prediction")` | z_t, ln(sigma) / 4 |
    | `FlowMatchEulerDiscreteScheduler`, others with `use_flow_sigmas` | (1 - t) x0 + t eps, 1000 t |

    Args:
        unet (`UNet2DModel`): the network, with a positional embedding of its timestep or a learned table. One that
            predicts a variance too is cut down to the mean where the config says so.
        config (`dict`): of its scheduler, with `_class_name`.

    Returns:
        a network with a learned embedding of 1025 noise levels, and its scheduler.

    Raises:
        ValueError: for a scheduler that nothing here describes, one whose ln(alpha / sigma) does not fall, one of a
            student, which has few steps of its own, or a network with another kind of embedding.
    """
    if is_flow(config):
        return _adopt_flow(unet, config)
    if is_continuous(config):
        return _adopt_continuous(unet, config)
    return _adopt_indexed(unet, config)


def _adopt_flow(unet: UNet2DModel, config: dict) -> tuple[UNet2DModel, RCFDScheduler]:
    scheduler = RCFDScheduler(NUM_ENTRIES, prediction_type="flow_prediction", clip_sample=False)
    t = torch.sigmoid(-log_ratio(scheduler))  # nu = t / (1 - t)
    return tabulate_levels(_drop_variance(unet, config), config.get("num_train_timesteps", 1000) * t), scheduler


def _adopt_continuous(unet: UNet2DModel, config: dict) -> tuple[UNet2DModel, RCFDScheduler]:
    data_std = config.get("sigma_data", 1.0)
    scheduler = RCFDScheduler(NUM_ENTRIES, prediction_type="v_prediction", clip_sample=False, data_std=data_std)
    sigmas = _clamp_to_range(torch.exp(-log_ratio(scheduler)), config)
    if "sigma_data" in config:
        return tabulate_edm(unet, config, sigmas), scheduler
    return tabulate_levels(unet, sigmas.log() / 4), scheduler


def _adopt_indexed(unet: UNet2DModel, config: dict) -> tuple[UNet2DModel, RCFDScheduler]:
    theirs = RCFDScheduler.from_config(config)
    made_for = theirs.config.nodes or theirs.config.num_inference_steps
    if made_for is not None:
        raise ValueError(f"`config` must be of a base model, got one of a student of {made_for} steps.")
    scheduler = RCFDScheduler(NUM_ENTRIES, **{name: theirs.config[name] for name in KEPT})
    timesteps = find_index(log_ratio(theirs), log_ratio(scheduler))
    _warn_beyond(log_ratio(theirs)[-1], log_ratio(theirs)[0], log_ratio(scheduler))
    return tabulate_levels(_drop_variance(unet, config), timesteps), scheduler


def _drop_variance(unet: UNet2DModel, config: dict) -> UNet2DModel:
    """The network without the variance that it predicts beside the mean, where its scheduler says that it does."""
    channels, predicted = unet.config.in_channels, unet.config.out_channels
    if predicted == channels:
        return unet
    if predicted != 2 * channels or config.get("variance_type") not in LEARNED_VARIANCES:
        raise ValueError(
            f"`unet` must have as many `out_channels` as `in_channels`={channels}, or twice as many where the "
            f"scheduler has a learned `variance_type`, got {predicted} and {config.get('variance_type')!r}."
        )
    return cut_output(unet, channels)


def is_flow(config: dict) -> bool:
    """Whether a scheduler's network sees (1 - t) x0 + t eps and predicts eps - x0."""
    if str(config.get("_class_name", "")).startswith("FlowMatch"):
        return not config.get("invert_sigmas", False)
    return bool(config.get("use_flow_sigmas")) and config.get("prediction_type") == "flow_prediction"


def is_continuous(config: dict) -> bool:
    """Whether a scheduler's network takes ln(sigma) / 4: EDM's, and Euler's with continuous timesteps."""
    continuous = config.get("timestep_type") == "continuous" and config.get("prediction_type") == "v_prediction"
    return continuous or "sigma_data" in config


def log_ratio(scheduler: RCFDScheduler) -> torch.Tensor:
    """ln(alpha / sigma) at each index, float64; -inf where no signal is left."""
    return scheduler.alpha.log() - scheduler.sigma.log()


def find_index(log_ratios: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """The fractional index at which a schedule has a given ln(alpha / sigma), the nearest where it has not.

    Between two entries ln(alpha / sigma) is interpolated, next to an entry without signal alpha / sigma.

    Args:
        log_ratios (`torch.Tensor`): ln(alpha / sigma) of the schedule, (n,), falling, float64.
        wanted (`torch.Tensor`): the values looked for, (m,), float64.

    Returns:
        indices in 0..n - 1, (m,), float64.

    Raises:
        ValueError: if `log_ratios` does not fall.
    """
    falls = log_ratios[1:] < log_ratios[:-1]
    if not falls.all():
        k = int((~falls).nonzero()[0])
        raise ValueError(
            f"`scheduler` must have a falling ln(alpha / sigma), got {log_ratios[k]:.6g} at index {k} and "
            f"{log_ratios[k + 1]:.6g} at {k + 1}."
        )
    wanted = wanted.clamp(log_ratios[-1], log_ratios[0])
    high = torch.searchsorted(-log_ratios, -wanted).clamp(1, len(log_ratios) - 1)
    above, below = log_ratios[high - 1], log_ratios[high]
    fraction = torch.where(below.isinf(), 1 - (wanted - above).exp(), (above - wanted) / (above - below))
    return high - 1 + fraction


def _clamp_to_range(sigmas: torch.Tensor, config: dict) -> torch.Tensor:
    """Noise levels within those of a scheduler with continuous timesteps."""
    low, high = config.get("sigma_min"), config.get("sigma_max")
    if low is None or high is None:
        betas = RCFDScheduler.from_config({**config, "timestep_type": "discrete"})
        low, high = (torch.exp(-log_ratio(betas))[[0, -1]]).tolist()
    if not 0 < low < high:
        raise ValueError(f"`sigma_min` and `sigma_max` must satisfy 0 < sigma_min < sigma_max, got {low} and {high}.")
    ends = torch.tensor([low, high], dtype=torch.float64)
    _warn_beyond(-ends[1].log(), -ends[0].log(), -sigmas.log())
    return sigmas.clamp(low, high)


def _warn_beyond(noisiest: torch.Tensor, cleanest: torch.Tensor, wanted: torch.Tensor) -> None:
    """Log how many of our levels lie beyond a teacher's range of ln(alpha / sigma)."""
    for name, beyond, end in (
        ("noisiest", wanted < noisiest - 1e-9, noisiest),
        ("cleanest", wanted > cleanest + 1e-9, cleanest),
    ):
        if beyond.any():
            logger.warning(
                f"{int(beyond.sum())} of {len(wanted)} noise levels lie beyond the teacher's {name} one, which has "
                f"sigma / alpha = {torch.exp(-end):.4g}: there its network is told that one."
            )

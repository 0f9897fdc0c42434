"""How much noise each training index has: the betas of a diffusion process."""

import math

import torch

from diffusers_rcfd.validation import is_number

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid")


def schedule_betas(
    num_train_timesteps: int,
    beta_schedule: str = "squaredcos_cap_v2",
    beta_start: float = 0.0001,
    beta_end: float = 0.02,
    trained_betas: list[float] | None = None,
) -> torch.Tensor:
    """The betas that a scheduler config names, float64, shape (num_train_timesteps,).

    Args:
        num_train_timesteps (`int`): n.
        beta_schedule (`str`), beta_start, beta_end (`float`), trained_betas (`list[float]`): as in `RCFDScheduler`.

    Raises:
        ValueError: for betas outside (0, 1), or an unknown schedule.
    """
    n = num_train_timesteps
    if trained_betas is not None:
        try:
            betas = torch.as_tensor(trained_betas, dtype=torch.float64)
        except (TypeError, ValueError, RuntimeError):
            betas = torch.empty(0)
        if betas.shape != (n,) or not ((betas > 0) & (betas < 1)).all():
            given = repr(trained_betas)
            if betas.numel():
                given = f"shape {tuple(betas.shape)} from {betas.min():.3g} to {betas.max():.3g}"
            raise ValueError(f"`trained_betas` must hold `num_train_timesteps`={n} values in (0, 1), got {given}.")
        return betas
    if beta_schedule not in BETA_SCHEDULES:
        raise ValueError(f"`beta_schedule` must be one of {BETA_SCHEDULES}, got {beta_schedule!r}.")
    if beta_schedule == "squaredcos_cap_v2":
        return cosine_betas(n)
    if not (is_number(beta_start) and is_number(beta_end) and 0 < beta_start <= beta_end < 1):
        raise ValueError(
            f"`beta_start` and `beta_end` must satisfy 0 < beta_start <= beta_end < 1, got {beta_start!r} and "
            f"{beta_end!r}."
        )
    if beta_schedule == "linear":
        return torch.linspace(beta_start, beta_end, n, dtype=torch.float64)
    if beta_schedule == "scaled_linear":
        return torch.linspace(beta_start**0.5, beta_end**0.5, n, dtype=torch.float64) ** 2
    return torch.linspace(-6, 6, n, dtype=torch.float64).sigmoid() * (beta_end - beta_start) + beta_start


def cosine_betas(num_train_timesteps: int, max_beta: float = 0.999) -> torch.Tensor:
    """Betas of the cosine schedule (Nichol and Dhariwal 2021, Eq. 17), float64, shape (num_train_timesteps,)."""
    u = torch.arange(num_train_timesteps + 1, dtype=torch.float64) / num_train_timesteps
    alpha_bar = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=max_beta)


def zero_terminal_snr(betas: torch.Tensor) -> torch.Tensor:
    """Betas whose last SNR is zero and whose first is kept (Lin et al. 2023, Algorithm 1), shape (n,)."""
    alpha = (1 - betas).cumprod(0).sqrt()
    alpha = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
    alpha_bar = alpha**2
    return 1 - torch.cat([alpha_bar[:1], alpha_bar[1:] / alpha_bar[:-1]])


def prediction_coefficients(alpha, sigma, prediction_type: str, data_std: float = 1.0) -> tuple:
    """(c_in, c_z, c_out) of x0 = c_z z_t + c_out F(c_in z_t): what a network F sees and what it predicts.

    | `prediction_type` | F predicts | c_in | c_z | c_out |
    |---|---|---|---|---|
    | `sample` | x0 | 1 | 0 | 1 |
    | `epsilon` | eps | 1 | 1 / alpha | -sigma / alpha |
    | `v_prediction` | alpha eps - sigma x0 | 1 | alpha | -sigma |
    | `flow_prediction` | eps - x0 | 1 / (alpha + sigma) | 1 / (alpha + sigma) | -sigma / (alpha + sigma) |

    A flow network sees (1 - t) x0 + t eps, which is z_t / (alpha + sigma) at t = sigma / (alpha + sigma).

    Args:
        alpha, sigma (`float` or `torch.Tensor`): factors of image and noise in z_t.
        prediction_type (`str`): one of the four above.
        data_std (`float`, defaults to 1.0): for `v_prediction`, as in `RCFDScheduler`.
    """
    one, zero = alpha * 0 + 1, alpha * 0
    if prediction_type == "sample":
        return one, zero, one
    if prediction_type == "epsilon":
        return one, 1 / alpha, -sigma / alpha
    if prediction_type == "v_prediction":
        return one, data_std**2 * alpha, -data_std * sigma
    if prediction_type == "flow_prediction":
        total = alpha + sigma
        return 1 / total, 1 / total, -sigma / total
    raise ValueError(
        f"`prediction_type` must be sample, epsilon, v_prediction or flow_prediction, got {prediction_type!r}."
    )


def nodes_by_count(
    nodes: list[list[int]] | None, analytical_first_step: bool, num_train_timesteps: int
) -> dict[int, list[int]]:
    """Lists of nodes by their numbers of network evaluations; arguments as in `RCFDScheduler`.

    Raises:
        ValueError: for lists that do not fall in 0..num_train_timesteps - 1, or two of one length.
    """
    if not isinstance(analytical_first_step, bool):
        raise ValueError(f"`analytical_first_step` must be True or False, got {analytical_first_step!r}.")
    n, free, by_count = num_train_timesteps, int(analytical_first_step), {}
    if nodes is not None and not (isinstance(nodes, (list, tuple)) and len(nodes) > 0):
        raise ValueError(f"`nodes` must be lists of indices, one or more, got {nodes!r}.")
    for indices in nodes or ():
        listed = isinstance(indices, (list, tuple)) and all(type(index) is int for index in indices)
        falling = listed and all(high > low for high, low in zip(indices, indices[1:], strict=False))
        if not falling or len(indices) < 2 + free or not 0 <= indices[-1] < indices[0] < n:
            raise ValueError(
                f"`nodes` must be lists of {2 + free} or more indices in 0..{n - 1} that fall, got {indices!r}."
            )
        by_count[len(indices) - 1 - free] = list(indices)
    if len(by_count) != len(nodes or ()):
        raise ValueError(f"`nodes` must have a length of its own in each list, got {nodes!r}.")
    if free and not by_count:
        raise ValueError("`analytical_first_step` must be False without `nodes`, got True.")
    return by_count


def check_has_betas(config: dict) -> None:
    """Raise a `ValueError` if a scheduler config is of a network that no schedule of betas describes.

    Our networks see z_t = alpha_t x0 + sigma_t eps, alpha_t^2 + sigma_t^2 = 1, and its index t. Euler, Heun and their
    like scale their sample to this z_t before the network sees it; EDM's networks see something else.
    """
    name = config.get("_class_name") or "this scheduler"
    why = None
    if "sigma_data" in config:
        why = (
            f"its network is preconditioned with `sigma_data`={config['sigma_data']} (Karras et al. 2022): give the "
            "whole pipeline of an EDM scheduler to RCFDPipeline, which converts both"
        )
    elif name.startswith("FlowMatch"):
        why = "it has no betas: flow matching has to be adopted first"
    elif name.startswith(("ScoreSdeVe", "KarrasVe")):
        why = "it has no betas: its network sees x0 + sigma eps unscaled, and sigma itself in place of an index"
    elif config and "beta_schedule" not in config:
        why = "it has no betas"
    elif config.get("use_flow_sigmas"):
        why = "`use_flow_sigmas=True` is flow matching, which has to be adopted first"
    elif config.get("timestep_type") == "continuous" and config.get("prediction_type") == "v_prediction":
        why = "`timestep_type='continuous'` gives its network log(sigma) / 4: it has to be adopted first"
    if why is not None:
        raise ValueError(
            f"`scheduler` must have betas and integer timesteps, as those of DDPM, DDIM, PNDM, DPM-Solver, UniPC, "
            f"DEIS, Euler and Heun: {name} cannot be converted, {why}."
        )

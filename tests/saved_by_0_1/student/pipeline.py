"""Writing a folder whole or not at all."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

PREFIX = "partial-save-"


@contextmanager
def saved_whole(folder: Path) -> Iterator[Path]:
    """A place to write what is to lie in `folder`; it is moved there, file by file, once all of it is written.

    Args:
        folder (`Path`): made if it is missing; other files in it stay.

    Raises:
        OSError: if writing fails (a full disk, say); `folder` is then as it was before.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    partial = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(f"{PREFIX}*"):  # by a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        partial = Path(tempfile.mkdtemp(prefix=PREFIX, dir=folder))  # on the same disk, so that moving is renaming
        yield partial
        for path in sorted(path for path in partial.rglob("*") if path.is_file()):
            target = folder / path.relative_to(partial)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.replace(target)
        missing = []
    except (OSError, SafetensorError) as error:
        raise OSError(f"Saving in {str(folder)!r} failed, and changed nothing there: {error}") from error
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
        for path in missing:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()


"""How much noise each training index has: the betas of a diffusion process."""

import math

import torch

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid")


def is_number(value) -> bool:
    """Whether a value is an int or a float, which a bool is not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


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
    name = config.get("_class_name", "this scheduler")
    why = None
    if "sigma_data" in config:
        why = (
            f"its network is preconditioned with `sigma_data`={config['sigma_data']} (Karras et al. 2022): give the "
            "whole pipeline of an EDM scheduler to RCFDPipeline, which converts both"
        )
    elif config and "beta_schedule" not in config:
        why = "it has no betas"
    elif config.get("use_flow_sigmas"):
        why = "`use_flow_sigmas=True` is flow matching"
    elif config.get("timestep_type") == "continuous" and config.get("prediction_type") == "v_prediction":
        why = "`timestep_type='continuous'` gives its network log(sigma) / 4, not the index of a noise level"
    if why is not None:
        raise ValueError(
            f"`scheduler` must have betas and integer timesteps, as those of DDPM, DDIM, PNDM, DPM-Solver, UniPC, "
            f"DEIS, Euler and Heun: {name} cannot be converted, {why}."
        )


"""The diffusion process: step grid, DDIM step and the conversions between x0, eps and v."""

import inspect
import math

import diffusers
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin
from diffusers.utils import logging


logger = logging.get_logger(__name__)

PREDICTION_TYPES = ("sample", "epsilon", "v_prediction")


def x0_from_eps(eps, z_t, alpha, sigma):
    """Solve z_t = alpha x0 + sigma eps for x0."""
    return (z_t - sigma * eps) / alpha


def x0_from_v(v, z_t, alpha, sigma, data_std=1.0):
    """x0 of the velocity v = alpha eps - sigma x0 (Salimans and Ho 2022, appendix D), of x0 in units of `data_std`."""
    return data_std * (data_std * alpha * z_t - sigma * v)


def eps_from_x0(x0, z_t, alpha, sigma):
    """Solve z_t = alpha x0 + sigma eps for eps."""
    return (z_t - alpha * x0) / sigma


def v_from_x0(x0, z_t, alpha, sigma, data_std=1.0):
    """Velocity alpha eps - sigma x0 of a denoised image x0 at z_t, of x0 in units of `data_std`."""
    return (data_std * alpha * z_t - x0 / data_std) / sigma


def dynamic_threshold(x0: torch.Tensor, ratio: float, max_value: float) -> torch.Tensor:
    """Clip each image to s, the `ratio` quantile of its |x0| within 1..max_value, and divide it by s; (B, C, H, W).

    Source: Saharia et al. 2022, section 2.3.
    """
    s = x0.abs().flatten(1).quantile(ratio, dim=1).clamp(1, max_value).view(-1, 1, 1, 1)
    return x0.clamp(-s, s) / s


def ddim_coefficients(alpha_t, sigma_t, alpha_s, sigma_s):
    """The DDIM step (eta = 0) as z_s = a x0 + b z_t: returns (a, b) (RCFD paper, Eq. 1)."""
    b = sigma_s / sigma_t
    return alpha_s - b * alpha_t, b


class RCFDScheduler(SchedulerMixin, ConfigMixin):
    """DDIM-style deterministic scheduler whose N-step grids nest, for students of 1 to 4 steps.

    Step k of an N-step sampler stands at index `round(k (n - 1) / N)` of the n-entry schedule, k = N..0, so the
    N-step grid is a subset of the 2N-step grid and a student that halves its teacher's steps meets it exactly.
    The last step goes to index 0. Takes the config of any scheduler with betas and integer timesteps, such as DDPM,
    DDIM, PNDM, DPM-Solver, UniPC, DEIS, Euler and Heun (`RCFDScheduler.from_config`). What such a config says of the
    schedule, the prediction and the clipping is kept; its solver and its grid (`timestep_spacing`, `steps_offset`,
    `set_alpha_to_one`, `use_karras_sigmas`, ...) are replaced by DDIM on the grid above.

    A student of SFD brings nodes of its own instead of the grid, one list for each number of network evaluations that
    it was trained for. With an analytical first step (AFS), the step from the first node to the second takes the noise
    itself for eps: that is a factor on the noise, `init_noise_sigma`, and no network evaluation. Steps are counted as
    evaluations everywhere.

    Args:
        num_train_timesteps (`int`, defaults to 1025): entries n of the schedule, indices 0..n - 1.
        beta_start (`float`, defaults to 0.0001): first beta of `linear`, `scaled_linear` and `sigmoid`.
        beta_end (`float`, defaults to 0.02): last beta of the same.
        beta_schedule (`str`, defaults to `"squaredcos_cap_v2"`): `"linear"`, `"scaled_linear"`, `"sigmoid"` or
            `"squaredcos_cap_v2"` (cosine, betas clipped at 0.999).
        trained_betas (`list[float]`, *optional*): n betas in (0, 1) that replace the named schedule.
        prediction_type (`str`, defaults to `"sample"`): what the network predicts: `"sample"` (x0), `"epsilon"`
            or `"v_prediction"`.
        clip_sample (`bool`, defaults to `True`): clip the predicted x0 when sampling.
        clip_sample_range (`float`, defaults to 1.0): bound of that clip.
        thresholding (`bool`, defaults to `False`): `dynamic_threshold` in place of that clip.
        dynamic_thresholding_ratio (`float`, defaults to 0.995): its quantile, in (0, 1].
        sample_max_value (`float`, defaults to 1.0): its largest threshold, at least 1.
        rescale_betas_zero_snr (`bool`, defaults to `False`): move the schedule to zero terminal SNR; not possible
            with `epsilon`.
        data_std (`float`, defaults to 1.0): the images that z_t and v are made of are divided by it, so that alpha_t
            is sqrt(alphas_cumprod) / data_std; 0.5 for networks that come from EDM.
        num_inference_steps (`int`, *optional*): steps N that a student was distilled for, 1..n - 1; `None` for a
            base model, which takes any number. With `nodes`, the default among their counts; `None` is the largest.
        nodes (`list[list[int]]`, *optional*): for each number of evaluations, the indices that the sampler stands at,
            falling, from where it starts to where it ends.
        analytical_first_step (`bool`, defaults to `False`): the first step of `nodes` needs no network.

    Raises:
        ValueError: for a value outside those named above.
    """

    order = 1
    _compatibles = [scheduler.name for scheduler in KarrasDiffusionSchedulers]

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1025,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "squaredcos_cap_v2",
        trained_betas: list[float] | None = None,
        prediction_type: str = "sample",
        clip_sample: bool = True,
        clip_sample_range: float = 1.0,
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        rescale_betas_zero_snr: bool = False,
        data_std: float = 1.0,
        num_inference_steps: int | None = None,
        nodes: list[list[int]] | None = None,
        analytical_first_step: bool = False,
    ):
        # A default left out of the config would be read as another scheduler's default by its `from_config`.
        self.register_to_config(_use_default_values=[])
        n = num_train_timesteps
        if not isinstance(n, int) or n < 2:
            raise ValueError(f"`num_train_timesteps` must be an integer of at least 2, got {n!r}.")
        if prediction_type not in PREDICTION_TYPES:
            raise ValueError(f"`prediction_type` must be one of {PREDICTION_TYPES}, got {prediction_type!r}.")
        flags = {"clip_sample": clip_sample, "thresholding": thresholding}
        for name, value in (flags | {"rescale_betas_zero_snr": rescale_betas_zero_snr}).items():
            if not isinstance(value, bool):
                raise ValueError(f"`{name}` must be True or False, got {value!r}.")
        if not is_number(clip_sample_range) or not 0 < clip_sample_range < math.inf:
            raise ValueError(f"`clip_sample_range` must be a number above 0, got {clip_sample_range!r}.")
        if rescale_betas_zero_snr and prediction_type == "epsilon":
            raise ValueError(
                "`rescale_betas_zero_snr=True` leaves no image in z_T, which `prediction_type='epsilon'` must divide "
                "by: use 'sample' or 'v_prediction'."
            )

        if not is_number(data_std) or not 0 < data_std < math.inf:
            raise ValueError(f"`data_std` must be a number above 0, got {data_std!r}.")
        if not is_number(dynamic_thresholding_ratio) or not 0 < dynamic_thresholding_ratio <= 1:
            raise ValueError(f"`dynamic_thresholding_ratio` must be in (0, 1], got {dynamic_thresholding_ratio!r}.")
        if not is_number(sample_max_value) or not 1 <= sample_max_value < math.inf:
            raise ValueError(f"`sample_max_value` must be at least 1, got {sample_max_value!r}.")

        # (n,), float64, before any rescaling
        self.betas = schedule_betas(n, beta_schedule, beta_start, beta_end, trained_betas)
        betas = zero_terminal_snr(self.betas) if rescale_betas_zero_snr else self.betas
        self.alphas_cumprod = (1 - betas).cumprod(0)  # (n,), float64
        self.alpha = self.alphas_cumprod.sqrt() / data_std
        self.sigma = (1 - self.alphas_cumprod).sqrt()
        self._nodes = nodes_by_count(nodes, analytical_first_step, n)
        self.init_noise_sigma = 1.0  # deviation of the noise that the first evaluated step starts from
        self._device_tables = {}  # copies of (n, 2) and (N + 1, 2) tables where they were asked for
        self.set_timesteps()

    @classmethod
    def from_config(cls, config, return_unused_kwargs=False, **kwargs):
        """Build from the config of a scheduler with betas; one saved by us keeps what only `RCFDScheduler` knows.

        Raises:
            ValueError: for a config that no schedule of betas at integer timesteps describes: EDM's preconditioning,
                flow matching, variance-exploding and consistency schedulers.
        """
        # Stock configs list which values were their own defaults; ours differ, so every value is taken as it stands,
        # and what an old config leaves out is the default of the class that wrote it.
        config = dict(config.get("_rcfd", config))
        config.pop("_use_default_values", None)
        stock = getattr(diffusers, config.get("_class_name") or "", None)
        if stock is not None:
            signature = inspect.signature(stock.__init__).parameters.values()
            config = {p.name: p.default for p in signature if p.default is not p.empty} | config
        check_has_betas(config)
        for name in ("num_inference_steps", "data_std"):
            if f"_{name}" in config:
                config[name] = config.pop(f"_{name}")
        return super().from_config(config, return_unused_kwargs=return_unused_kwargs, **kwargs)

    def to_ddim(self) -> DDIMScheduler:
        """The stock `DDIMScheduler` of the same schedule, on the same grid for `config.num_inference_steps` = N.

        The grids are equal when N divides n - 1; otherwise the stock scheduler stands up to one index beside ours,
        which is logged. A base model (N is `None`) is given the grid of n - 1 steps.
        """
        n, N = self.config.num_train_timesteps, self.config.num_inference_steps or self.config.num_train_timesteps - 1
        if (n - 1) % N:
            logger.warning(
                f"Stock DDIMScheduler has no {N}-step grid from {n - 1} to 0: plain Diffusers will sample up to one "
                f"index beside RCFDScheduler."
            )
        scheduler = DDIMScheduler(
            **self._stock_schedule(),
            clip_sample=self.config.clip_sample,
            clip_sample_range=self.config.clip_sample_range,
            thresholding=self.config.thresholding,
            sample_max_value=self.config.sample_max_value,
            timestep_spacing="leading",
            steps_offset=n - 1 - (N - 1) * (n // N),
            set_alpha_to_one=False,
        )
        # The underscore keeps stock `from_pretrained` from warning of a key that it does not know.
        scheduler.register_to_config(_num_inference_steps=self.config.num_inference_steps)
        if self.config.data_std != 1:
            self._warn_of_data_std()
            scheduler.register_to_config(_data_std=self.config.data_std)
        return scheduler

    def _warn_of_data_std(self) -> None:
        logger.warning(
            f"Plain Diffusers knows no `data_std`={self.config.data_std}: its images will have the "
            "wrong contrast. Load this model as an RCFDPipeline or with `custom_pipeline`."
        )

    @property
    def has_stock_form(self) -> bool:
        """Whether a stock scheduler can take the steps of `nodes`: images in their own units, down to index 0."""
        return self.config.data_std == 1 and not any(nodes[-1] for nodes in self._nodes.values())

    def to_dpm_solver(self) -> DPMSolverMultistepScheduler:
        """The stock scheduler that takes the same steps when it is given the nodes, for plain Diffusers.

        First-order DPM-Solver++ is DDIM, and its thresholding at most 1 is the clip. `set_timesteps(timesteps=...)`
        takes the evaluated indices of a list of `nodes`, and `init_noise_sigma` is to be set to ours. It ends at index
        0, and knows no `data_std`; for nodes that end elsewhere, and another than 1, this is logged.
        """
        if any(nodes[-1] for nodes in self._nodes.values()):
            logger.warning("Stock DPMSolverMultistepScheduler ends at index 0, these `nodes` do not.")
        if self.config.data_std != 1:
            self._warn_of_data_std()
        dynamic = self.config.thresholding
        scheduler = DPMSolverMultistepScheduler(
            **self._stock_schedule(),
            solver_order=1,
            thresholding=dynamic or self.config.clip_sample,
            sample_max_value=self.config.sample_max_value if dynamic else self.config.clip_sample_range,
            final_sigmas_type="sigma_min",
        )
        ours = {key: value for key, value in self.config.items() if not key.startswith("_")}
        scheduler.register_to_config(_rcfd=ours)
        return scheduler

    def _stock_schedule(self) -> dict:
        """The schedule and the prediction type as stock schedulers name them, which cannot name `sigmoid`."""
        named = self.config.beta_schedule != "sigmoid"
        return {
            "num_train_timesteps": self.config.num_train_timesteps,
            "beta_start": self.config.beta_start,
            "beta_end": self.config.beta_end,
            "beta_schedule": self.config.beta_schedule if named else "linear",
            "trained_betas": self.config.trained_betas if named else self.betas.tolist(),
            "prediction_type": self.config.prediction_type,
            "dynamic_thresholding_ratio": self.config.dynamic_thresholding_ratio,
            "rescale_betas_zero_snr": self.config.rescale_betas_zero_snr,
        }

    # --- grid -------------------------------------------------------------------------------------------------

    @property
    def trained_steps(self) -> list[int]:
        """The numbers of network evaluations that `nodes` are for, in their order; empty without `nodes`."""
        return list(self._nodes)

    def grid(self, num_inference_steps: int) -> list[int]:
        """Indices t_k = round(k (n - 1) / N) of an N-step sampler, for k = 0..N, rising from 0 to n - 1.

        Raises:
            ValueError: if `num_inference_steps` is outside 1..n - 1.
        """
        last, N = self.config.num_train_timesteps - 1, num_inference_steps
        if isinstance(N, bool) or not isinstance(N, int) or not 1 <= N <= last:
            raise ValueError(f"`num_inference_steps` must be an integer in 1..{last}, got {N!r}.")
        return [round(k * last / N) for k in range(N + 1)]

    def set_timesteps(self, num_inference_steps: int | None = None, device: str | torch.device | None = None):
        """Prepare the N-step sampler: sets `timesteps` (N indices, falling) and the coefficients of each step.

        Args:
            num_inference_steps (`int`, *optional*): N; defaults to what the model was distilled for, else to n - 1.
                A model distilled for N steps also takes the divisors of N, one with `nodes` only their counts.
            device (`torch.device`, *optional*): where `timesteps` is put.

        Raises:
            ValueError: for a step count outside 1..n - 1, or one that the model was not made for.
        """
        if self._nodes:
            self._stand_at(self._own_grid(num_inference_steps), device)
            return
        made_for = self.config.num_inference_steps
        if num_inference_steps is None:
            num_inference_steps = self.config.num_train_timesteps - 1 if made_for is None else made_for
        grid = self.grid(num_inference_steps)
        if made_for is not None and made_for % num_inference_steps:
            allowed = [N for N in range(1, made_for + 1) if made_for % N == 0]
            raise ValueError(
                f"`num_inference_steps` must be one of {allowed}: this model was distilled for {made_for} steps, "
                f"got {num_inference_steps}."
            )
        self._stand_at(grid, device)

    def _own_grid(self, num_inference_steps: int | None) -> list[int]:
        """The rising indices of `nodes` for a number of evaluations, the one of AFS left out."""
        allowed, N = sorted(self._nodes), num_inference_steps
        N = (self.config.num_inference_steps or allowed[-1]) if N is None else N
        if isinstance(N, bool) or not isinstance(N, int) or N not in allowed:
            raise ValueError(
                f"`num_inference_steps` must be one of {allowed}: this model was trained for no other, got {N!r}."
            )
        nodes = self._nodes[N]
        if self.config.analytical_first_step:
            alpha, sigma = (table[nodes[:2]].tolist() for table in (self.alpha, self.sigma))
            self.init_noise_sigma = self.config.data_std**2 * alpha[0] * alpha[1] / (1 + sigma[0]) + sigma[1]
            nodes = nodes[1:]
        return nodes[::-1]

    def _stand_at(self, grid: list[int], device: str | torch.device | None) -> None:
        """Prepare the steps down a rising grid."""
        self.num_inference_steps = len(grid) - 1
        self.timesteps = torch.tensor(grid[:0:-1], device=device)
        self._coefficients = {t: self._step_coefficients(t, s) for s, t in zip(grid, grid[1:], strict=False)}
        self._upcoming = iter(grid[:0:-1])

    def _step_coefficients(self, t: int, s: int) -> tuple[float, float, float, float]:
        """(c_z, c_out, a, b) of x0 = c_z z_t + c_out network and z_s = a x0 + b z_t, as Python floats."""
        alpha, sigma, data_std = self.alpha[t].item(), self.sigma[t].item(), self.config.data_std
        c_z, c_out = {
            "sample": (0.0, 1.0),
            "epsilon": (1 / max(alpha, 1e-300), -sigma / max(alpha, 1e-300)),
            "v_prediction": (data_std**2 * alpha, -data_std * sigma),
        }[self.config.prediction_type]
        return c_z, c_out, *ddim_coefficients(alpha, sigma, self.alpha[s].item(), self.sigma[s].item())

    # --- sampling ---------------------------------------------------------------------------------------------

    def scale_model_input(self, sample: torch.Tensor, timestep=None) -> torch.Tensor:
        """Return `sample` unchanged; here for interchange with other schedulers."""
        return sample

    def clip(self, x0: torch.Tensor) -> torch.Tensor:
        """The predicted x0 (B, C, H, W) clipped as the config says, for sampling."""
        if self.config.thresholding:
            return dynamic_threshold(x0, self.config.dynamic_thresholding_ratio, self.config.sample_max_value)
        if self.config.clip_sample:
            return x0.clamp(-self.config.clip_sample_range, self.config.clip_sample_range)
        return x0

    def step(
        self, model_output: torch.Tensor, timestep: int | torch.Tensor, sample: torch.Tensor, return_dict: bool = True
    ) -> DDIMSchedulerOutput | tuple:
        """One DDIM step with eta = 0 from `timestep` to the next index of the grid (paper Eq. 1).

        Nothing is read back from the device: a `timestep` that lies there is taken to be the next of `timesteps`.

        Args:
            model_output (`torch.Tensor`): the network's prediction, (B, C, H, W).
            timestep (`int` or `torch.Tensor`): one of `timesteps`.
            sample (`torch.Tensor`): z_t, (B, C, H, W).
            return_dict (`bool`, defaults to `True`): a `DDIMSchedulerOutput`, else a tuple.

        Returns:
            `prev_sample` z_s and `pred_original_sample` x0 (clipped as the config says), both (B, C, H, W).

        Raises:
            ValueError: if `timestep` is not on the grid of `set_timesteps`.
        """
        upcoming = next(self._upcoming, None)
        t = upcoming if isinstance(timestep, torch.Tensor) and not timestep.device.type == "cpu" else int(timestep)
        if t not in self._coefficients:
            raise ValueError(f"`timestep` must be one of {sorted(self._coefficients)}, got {t}.")
        if t != upcoming:
            self._upcoming = (later for later in sorted(self._coefficients, reverse=True) if later < t)
        c_z, c_out, a, b = self._coefficients[t]

        x0 = model_output if self.config.prediction_type == "sample" else c_z * sample + c_out * model_output
        x0 = self.clip(x0)
        prev_sample = torch.add(b * sample, x0, alpha=a)
        if not return_dict:
            return prev_sample, x0
        return DDIMSchedulerOutput(prev_sample=prev_sample, pred_original_sample=x0)

    # --- training ---------------------------------------------------------------------------------------------

    def alpha_sigma(self, t: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """alpha_t and sigma_t for a batch of indices, shaped to broadcast over `like`.

        Args:
            t (`torch.Tensor`): indices 0..n - 1, shape (B,).
            like (`torch.Tensor`): a tensor (B, ...) whose device and number type (at least float32) are taken.

        Returns:
            two tensors of shape (B, 1, ..., 1).
        """
        dtype = torch.promote_types(like.dtype, torch.float32)
        key = (like.device, dtype)
        if key not in self._device_tables:
            self._device_tables[key] = torch.stack([self.alpha, self.sigma], dim=1).to(like.device, dtype)  # (n, 2)
        alpha, sigma = self._device_tables[key][t.to(like.device)].unbind(1)
        shape = (-1,) + (1,) * (like.ndim - 1)
        return alpha.view(shape), sigma.view(shape)

    def step_table(self, num_inference_steps: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The N-step grid and its unclipped steps z_s = a x0 + b z_t, on the device of `like`.

        Args:
            num_inference_steps (`int`): N.
            like (`torch.Tensor`): gives device and number type (at least float32).

        Returns:
            the indices t_k, (N + 1,), and the coefficients (a, b) of the step from t_k to t_{k-1}, (N + 1, 2), whose
            row 0 is NaN.
        """
        dtype = torch.promote_types(like.dtype, torch.float32)
        key = (like.device, dtype, num_inference_steps)
        if key not in self._device_tables:
            t = torch.tensor(self.grid(num_inference_steps))
            alpha, sigma = self.alpha[t], self.sigma[t]
            steps = torch.stack(ddim_coefficients(alpha[1:], sigma[1:], alpha[:-1], sigma[:-1]), dim=1)  # (N, 2)
            steps = torch.cat([torch.full((1, 2), torch.nan, dtype=steps.dtype), steps])
            self._device_tables[key] = t.to(like.device), steps.to(like.device, dtype)
        return self._device_tables[key]

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """z_t = alpha_t x0 + sigma_t eps: `original_samples` x0 and `noise` eps (B, C, H, W), `timesteps` (B,)."""
        alpha, sigma = self.alpha_sigma(timesteps, original_samples)
        return (alpha * original_samples + sigma * noise).to(original_samples.dtype)

    def get_velocity(self, sample: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """v = alpha_t eps - sigma_t x0: `sample` x0 and `noise` eps (B, C, H, W), `timesteps` (B,)."""
        (alpha, sigma), data_std = self.alpha_sigma(timesteps, sample), self.config.data_std
        return (data_std * alpha * noise - sigma / data_std * sample).to(sample.dtype)

    def predict_x0(self, model_output: torch.Tensor, z_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """x0 (unclipped) from what the network predicts, by `prediction_type`; (B, C, H, W), t (B,)."""
        if self.config.prediction_type == "sample":
            return model_output
        alpha, sigma = self.alpha_sigma(t, z_t)
        if self.config.prediction_type == "epsilon":
            return x0_from_eps(model_output, z_t, alpha, sigma)
        return x0_from_v(model_output, z_t, alpha, sigma, self.config.data_std)

    def __len__(self) -> int:
        return self.config.num_train_timesteps


"""The few-step generator: a U-Net and an RCFDScheduler."""

import importlib.util
import inspect
import re
import tempfile
from pathlib import Path

import torch
from diffusers import ConsistencyModelPipeline, DDIMPipeline, DiffusionPipeline, ImagePipelineOutput, UNet2DModel
from diffusers.utils.torch_utils import randn_tensor
from huggingface_hub import create_repo
from huggingface_hub.errors import HfHubHTTPError


OUTPUT_TYPES = ("pil", "np", "pt")
HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "force_download", "proxies")


class RCFDPipeline(DiffusionPipeline):
    """Pipeline that samples images in the few steps a student was distilled for, or from a base model in any number.

    Saved, it is a stock `DDIMPipeline` that plain Diffusers loads too (call that one with `num_inference_steps=N,
    use_clipped_model_output=True`), and it carries its own code as `pipeline.py` for `custom_pipeline`.

    A student of SFD, whose scheduler has `nodes`, is saved as a stock `ConsistencyModelPipeline` instead, the one that
    takes timesteps one by one. If it `has_stock_form`, plain Diffusers makes the same images from a `generator` with
    what `stock_call` spells out: the nodes as `timesteps`, with an analytical first step also
    `scheduler.init_noise_sigma`, and for a model of several step counts the `class_labels` that its step count and
    class have in the network.

    Args:
        unet (`UNet2DModel`): the network, unconditional or class-conditional. Where the scheduler has several lists of
            `nodes`, one table of class embeddings holds all classes for the first list, all for the second, and so on.
        scheduler (`RCFDScheduler`): or any scheduler with betas (DDPM, DDIM, PNDM, DPM-Solver, Euler, ...), which is
            turned into one; or EDM's, which is with its network.

    Raises:
        TypeError: for a network of another kind, such as the `UNet2DConditionModel` of a text-to-image pipeline.
        ValueError: for a network that predicts a variance too, a scheduler without betas, such as flow matching, or
            one of several step counts that the network's class embeddings are not for.
    """

    model_cpu_offload_seq = "unet"

    def __init__(self, unet: UNet2DModel, scheduler: RCFDScheduler):
        super().__init__()
        network = getattr(unet, "_orig_mod", unet)  # of a compiled one
        if not isinstance(network, UNet2DModel):
            raise TypeError(f"`unet` must be a UNet2DModel, got {type(network).__name__}.")
        check_network(network.config)
        if type(scheduler).__name__.startswith("EDM"):
            from diffusers_rcfd.edm_teacher import from_edm

            unet, scheduler = from_edm(network, scheduler.config)
        if not isinstance(scheduler, RCFDScheduler):
            scheduler = RCFDScheduler.from_config({"_class_name": type(scheduler).__name__, **scheduler.config})
        embeddings, counts = unet.config.num_class_embeds, len(scheduler.trained_steps)
        if counts > 1 and (not embeddings or embeddings % counts):
            raise ValueError(
                f"`unet` must have `num_class_embeds` in a multiple of {counts}, the step counts of the scheduler's "
                f"`nodes`, got {embeddings}."
            )
        self.register_modules(unet=unet, scheduler=scheduler)

    @property
    def components(self) -> dict:
        """Network and scheduler by their names. Diffusers asks after each call, and would inspect the signature."""
        return {"unet": self.unet, "scheduler": self.scheduler}

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images."""
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return self.unet.config.in_channels, height, width

    @property
    def num_classes(self) -> int | None:
        """Classes of a class-conditional model, else None; step counts that share the embeddings are not counted."""
        embeddings, counts = self.unet.config.num_class_embeds, len(self.scheduler.trained_steps)
        if embeddings is None or embeddings == counts > 1:
            return None
        return embeddings // max(counts, 1)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        num_inference_steps: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        class_labels: int | list[int] | torch.Tensor | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Sample images.

        Args:
            batch_size (`int`, defaults to 1): number of images; that of `latents` where those are given.
            num_inference_steps (`int`, *optional*): network evaluations N; defaults to what the model was distilled
                for, whose divisors are allowed too. A base model takes any number in 1..n - 1 (default n - 1), a
                student of SFD those that it was trained for (default the largest).
            generator (`torch.Generator` or a list of `batch_size` of them, *optional*): the source of the noise,
                one for the batch or one for each image.
            class_labels (`int`, `list[int]` or `torch.Tensor`, *optional*): one class for all, or one for each
                image, in 0..num_classes - 1; needed by, and only by, class-conditional models.
            latents (`torch.Tensor`, *optional*): the noise itself, (batch_size, C, H, W).
            output_type (`str`, defaults to `"pil"`): `"pil"`, `"np"` (B, H, W, C) or `"pt"` (B, C, H, W), the last
                two in [0, 1].
            return_dict (`bool`, defaults to `True`): an `ImagePipelineOutput`, else a tuple.

        Raises:
            ValueError: for a value outside those named above.
        """
        z, class_labels, dtype = self._begin(batch_size, generator, class_labels, latents, output_type)
        device = z.device
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        class_labels = self.network_labels(class_labels, z)
        z = z * self.scheduler.init_noise_sigma
        for t in self.progress_bar(self.scheduler.timesteps):
            model_output = self.unet(z.to(dtype), t, class_labels, return_dict=False)[0]
            z = self.scheduler.step(model_output.float(), t, z, return_dict=False)[0]

        return self._finish(z * self.scheduler.config.data_std, output_type, return_dict)  # z_0 is x0 / data_std

    def _begin(self, batch_size, generator, class_labels, latents, output_type) -> tuple:
        """The checked arguments of a call as noise (B, C, H, W) and labels (B,) or None, and the network's type."""
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"`output_type` must be one of {OUTPUT_TYPES}, got {output_type!r}.")
        device, dtype = self._device_and_dtype()
        z = self._initial_noise(batch_size, generator, latents, device)
        return z, self._check_class_labels(class_labels, len(z), device), dtype

    def _device_and_dtype(self) -> tuple[torch.device, torch.dtype]:
        """Where and in which number type the network computes; Diffusers' own answers take as long as a small network.

        Offloaded weights lie on the CPU or nowhere, and weights stored in 8 bits are computed with in more.
        """
        weight = next(self.unet.parameters())
        offloaded = weight.device.type in ("cpu", "meta") and torch.accelerator.is_available()
        device = self._execution_device if offloaded else weight.device
        return device, self.unet.dtype if weight.dtype.itemsize == 1 else weight.dtype

    def _finish(self, z: torch.Tensor, output_type: str, return_dict: bool) -> ImagePipelineOutput | tuple:
        """Images in [-1, 1] as what the caller asked for."""
        images = (z / 2 + 0.5).clamp(0, 1)
        if output_type != "pt":
            images = images.permute(0, 2, 3, 1).cpu().numpy()
            if output_type == "pil":
                images = self.numpy_to_pil(images)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _initial_noise(self, batch_size, generator, latents, device) -> torch.Tensor:
        """z_T (B, C, H, W) in float32, whatever the network's number type, so that noise depends on the seed alone."""
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"`batch_size` must be a positive integer, got {batch_size!r}.")
        if latents is not None:
            if latents.ndim != 4 or latents.shape[1:] != self.image_shape or batch_size not in (1, len(latents)):
                raise ValueError(
                    f"`latents` must have the shape (batch_size, C, H, W) = {(batch_size, *self.image_shape)}, got "
                    f"{tuple(latents.shape)}."
                )
            return latents.to(device, torch.float32)
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(
                f"`generator` as a list must hold one generator for each of the `batch_size`={batch_size} images, "
                f"got {len(generator)}."
            )
        return randn_tensor((batch_size, *self.image_shape), generator=generator, device=device, dtype=torch.float32)

    def _check_class_labels(self, class_labels, batch_size, device) -> torch.Tensor | None:
        """Class labels as a tensor (B,), or None for an unconditional model."""
        num_classes = self.num_classes
        if num_classes is None:
            if class_labels is not None:
                raise ValueError("`class_labels` must be None: this model is unconditional.")
            return None
        if class_labels is None:
            raise ValueError(f"`class_labels` must be given, in 0..{num_classes - 1}: the model is class-conditional.")
        labels = torch.as_tensor(class_labels)
        if labels.is_floating_point() or labels.shape not in ((), (1,), (batch_size,)):
            raise ValueError(
                f"`class_labels` must be one integer or {batch_size} integers, got {labels.dtype} of shape "
                f"{tuple(labels.shape)}."
            )
        if labels.min() < 0 or labels.max() >= num_classes:
            raise ValueError(f"`class_labels` must be in 0..{num_classes - 1}, got {labels.tolist()}.")
        return labels.to(device).expand(batch_size)

    def network_labels(self, class_labels: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor | None:
        """What the network is given as class labels (B,) for the step count that the scheduler is set to."""
        counts = self.scheduler.trained_steps
        row = counts.index(self.scheduler.num_inference_steps) if counts else 0
        return embedding_rows(class_labels, row, len(counts), self.num_classes, like)

    @property
    def has_stock_form(self) -> bool:
        """Whether plain Diffusers can sample a student of SFD alike; its `ConsistencyModelPipeline` makes squares."""
        return self.scheduler.has_stock_form and isinstance(self.unet.config.sample_size, int)

    def stock_call(self, num_inference_steps: int | None = None) -> dict:
        """What the `ConsistencyModelPipeline` that a student of SFD is saved as needs for the same images.

        Args:
            num_inference_steps (`int`, *optional*): as in a call.

        Returns:
            `dict`: "timesteps" and "class_labels" of the call, the latter of one image of class 0 and None where there
            is none, and "init_noise_sigma", to be set on its scheduler.
        """
        self.scheduler.set_timesteps(num_inference_steps)
        labels = None if self.num_classes is None else torch.zeros(1, dtype=torch.int64)
        rows = self.network_labels(labels, torch.empty(1))
        return {
            "timesteps": self.scheduler.timesteps.tolist(),
            "class_labels": None if rows is None else rows.tolist(),
            "init_noise_sigma": self.scheduler.init_noise_sigma,
        }

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """Load a saved pipeline of a `UNet2DModel` and a DDIM-like scheduler; pickled weights are never read.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): a folder, or the name of a Hub repository.
            kwargs: passed to `DiffusionPipeline.from_pretrained` (`revision`, `token`, `dtype`, `variant`, ...).

        Raises:
            ValueError: for `use_safetensors=False`, a pipeline of other components, or a name that is neither a
                folder nor one of a repository.
            OSError: if there is no such repository, revision or file, or the token does not open it.
        """
        if kwargs.get("use_safetensors") is False:
            raise ValueError("`use_safetensors` must be True: pickled weights can run code and are not read.")
        kwargs["use_safetensors"] = True
        name = str(pretrained_model_name_or_path)
        try:
            pipeline = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        except OSError as error:
            if isinstance(error.__cause__, HfHubHTTPError):  # Diffusers speaks of its cache instead
                raise OSError(f"Cannot load {name!r} from the Hub: {error.__cause__}") from error
            raise
        index = cls.load_config(name, **{key: kwargs[key] for key in HUB_OPTIONS if key in kwargs})
        parts = {key for key, value in index.items() if isinstance(value, (list, tuple)) and value[0] is not None}
        if parts > {"unet", "scheduler"}:  # which Diffusers would leave out without a word
            others = ", ".join(sorted(parts - {"unet", "scheduler"}))
            raise ValueError(
                f"{name!r} must be a pipeline of a unet and a scheduler that makes pixels; it is a "
                f"{index.get('_class_name')} and has also: {others}."
            )
        return pipeline

    def save_pretrained(
        self,
        save_directory,
        safe_serialization: bool = True,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        **kwargs,
    ) -> str | None:
        """Save as a stock pipeline in safetensors (see the class), with this class beside it as `pipeline.py`.

        Files take their place once all are written: a failure, such as a full disk, leaves what was there before.

        Args:
            save_directory (`str` or `os.PathLike`): the folder, made if it is missing.
            safe_serialization (`bool`, defaults to `True`): nothing else is allowed.
            push_to_hub (`bool`, defaults to `False`): also write a model card and publish the folder, as one commit.
            repo_id (`str`, *optional*): repository to publish to; the name of the folder by default.
            commit_message, private, token, create_pr: see `push_to_hub`.
            kwargs: passed to `DiffusionPipeline.save_pretrained` (`variant`, ...).

        Returns:
            the commit's address, where it is published.

        Raises:
            ValueError: for `safe_serialization=False`.
            OSError: if writing fails; the folder is then as it was before, and nothing is published.
        """
        if not safe_serialization:
            raise ValueError("`safe_serialization` must be True: nothing pickled is written.")
        folder = Path(save_directory)
        with saved_whole(folder) as partial:
            (partial / "pipeline.py").write_text(pipeline_source(), encoding="utf-8")
            if self.scheduler.config.nodes:
                stock = ConsistencyModelPipeline(unet=self.unet, scheduler=self.scheduler.to_dpm_solver())
            else:
                stock = DDIMPipeline(unet=self.unet, scheduler=self.scheduler.to_ddim())
            stock.save_pretrained(str(partial), **kwargs)
        if not push_to_hub:
            return None
        repo_id = create_repo(repo_id or folder.resolve().name, exist_ok=True, private=private, token=token).repo_id
        if importlib.util.find_spec("diffusers_rcfd"):  # the copy of this file that a saved pipeline carries has none
            model_card = importlib.import_module("diffusers_rcfd.model_card")
            model_card.write_pipeline_card(self, folder, repo_id, token)
        return self._upload_folder(
            str(folder), repo_id, token=token, commit_message=commit_message, create_pr=create_pr
        )

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        **kwargs,
    ) -> str:
        """Publish the pipeline with a model card, as one commit; a person's part of an existing card is kept.

        Args:
            repo_id (`str`): "name" or "owner/name"; made if it is missing.
            commit_message (`str`, *optional*): title of the commit.
            private (`bool`, *optional*): of a new repository; the account's default where not given.
            token (`str`, *optional*): defaults to that of `hf auth login`.
            create_pr (`bool`, defaults to `False`): open a pull request instead of committing.
            kwargs: passed to `save_pretrained` (`variant`, ...).

        Returns:
            the commit's address.
        """
        options = {"commit_message": commit_message, "private": private, "token": token, "create_pr": create_pr}
        with tempfile.TemporaryDirectory() as folder:
            return self.save_pretrained(folder, push_to_hub=True, repo_id=repo_id, **options, **kwargs)


def check_network(config) -> None:
    """Raise a `ValueError` if a `UNet2DModel` of this config does not turn z_t into a prediction of its own shape."""
    if config.sample_size is None:
        raise ValueError("`unet` must have a `sample_size`, the height and width of its images, got None.")
    if config.out_channels != config.in_channels:
        raise ValueError(
            f"`unet` must have as many `out_channels` as `in_channels`={config.in_channels}, got "
            f"{config.out_channels}: a network that predicts a variance too (`learned_range`) is not supported."
        )
    if config.class_embed_type is not None:
        raise ValueError(
            f"`unet` must take class labels by `num_class_embeds`, got `class_embed_type`={config.class_embed_type!r}."
        )


def embedding_rows(
    class_labels: torch.Tensor | None, row: int, counts: int, num_classes: int | None, like: torch.Tensor
) -> torch.Tensor | None:
    """The rows (B,) of a table of class embeddings that holds all classes for the first step count, then the second.

    Args:
        class_labels (`torch.Tensor`, *optional*): classes (B,), None for an unconditional model.
        row (`int`): number of the step count among `counts`; below two of them the classes are the rows.
        counts (`int`): step counts that share the table.
        num_classes (`int`, *optional*): classes, None for an unconditional model.
        like (`torch.Tensor`): gives batch size B and device.
    """
    if counts < 2:
        return class_labels
    if class_labels is None:
        class_labels = torch.zeros(len(like), dtype=torch.int64, device=like.device)
    return class_labels + row * (num_classes or 1)


def pipeline_source() -> str:
    """The pipeline and its scheduler as one Python file that needs Diffusers and nothing of ours."""
    parts = (saved_whole, schedule_betas, RCFDScheduler, RCFDPipeline)
    files = dict.fromkeys(inspect.getsourcefile(inspect.unwrap(part)) for part in parts)
    source = "\n\n".join(Path(file).read_text(encoding="utf-8") for file in files)
    return re.sub(r"^from diffusers_rcfd\S* import (\([^)]*\)|.*)\n", "", source, flags=re.MULTILINE)

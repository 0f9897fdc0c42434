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

from diffusers_rcfd.schedulers.noise_schedules import (
    check_has_betas,
    nodes_by_count,
    prediction_coefficients,
    schedule_betas,
    zero_terminal_snr,
)
from diffusers_rcfd.validation import is_number, require_count, to_integer

logger = logging.get_logger(__name__)

PREDICTION_TYPES = ("sample", "epsilon", "v_prediction", "flow_prediction")


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
        prediction_type (`str`, defaults to `"sample"`): what the network predicts: `"sample"` (x0), `"epsilon"`,
            `"v_prediction"` or `"flow_prediction"` (eps - x0, from z_t / (alpha + sigma): see `scale_model_input`).
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
        require_count("num_train_timesteps", n, 2)
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
        self.nu = self.sigma / self.alpha  # noise level of x = z / alpha
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
        if not self.has_stock_grid:
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
        if self.config.prediction_type == "flow_prediction":
            logger.warning(
                "Plain Diffusers has no DDIM for a network that predicts a flow, and refuses to sample: load this "
                "model as an RCFDPipeline or with `custom_pipeline`."
            )
        # The underscore keeps stock `from_pretrained` from warning of a key that it does not know.
        scheduler.register_to_config(_num_inference_steps=self.config.num_inference_steps)
        if self.config.data_std != 1:
            self._warn_of_data_std()
            scheduler.register_to_config(_data_std=self.config.data_std)
        return scheduler

    @property
    def has_stock_grid(self) -> bool:
        """Whether stock DDIMScheduler stands at the same indices, which it does where N divides n - 1."""
        return (self.config.num_train_timesteps - 1) % (self.config.num_inference_steps or 1) == 0

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
        last, N = self.config.num_train_timesteps - 1, to_integer(num_inference_steps)
        if N is None or not 1 <= N <= last:
            raise ValueError(f"`num_inference_steps` must be an integer in 1..{last}, got {num_inference_steps!r}.")
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
        if to_integer(N) not in allowed:
            raise ValueError(
                f"`num_inference_steps` must be one of {allowed}: this model was trained for no other, got {N!r}."
            )
        nodes = self._nodes[to_integer(N)]
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

    def _step_coefficients(self, t: int, s: int) -> tuple[float, float, float, float]:
        """(c_z, c_out, a, b) of x0 = c_z z_t + c_out network and z_s = a x0 + b z_t, as Python floats."""
        alpha, sigma, data_std = self.alpha[t].item(), self.sigma[t].item(), self.config.data_std
        predicts = self.config.prediction_type
        _, c_z, c_out = prediction_coefficients(max(alpha, 1e-300), sigma, predicts, data_std)
        return c_z, c_out, *ddim_coefficients(alpha, sigma, self.alpha[s].item(), self.sigma[s].item())

    # --- sampling ---------------------------------------------------------------------------------------------

    def scale_model_input(self, sample: torch.Tensor, timestep=None) -> torch.Tensor:
        """What a network sees at index `timestep`, one or (B,): `sample` z_t itself, scaled for a flow network."""
        if self.config.prediction_type != "flow_prediction":
            return sample
        alpha, sigma = self.alpha_sigma(torch.as_tensor(timestep).reshape(-1), sample)
        return (sample / (alpha + sigma)).to(sample.dtype)

    def clip(self, x0: torch.Tensor) -> torch.Tensor:
        """The predicted x0 (B, C, H, W) clipped as the config says, for sampling."""
        if self.config.thresholding:
            return dynamic_threshold(x0, self.config.dynamic_thresholding_ratio, self.config.sample_max_value)
        if self.config.clip_sample:
            return x0.clamp(-self.config.clip_sample_range, self.config.clip_sample_range)
        return x0

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = True,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> DDIMSchedulerOutput | tuple:
        """One DDIM step with eta = 0 from `timestep` to the next index of the grid (paper Eq. 1).

        Args:
            model_output (`torch.Tensor`): the network's prediction, (B, C, H, W).
            timestep (`int` or `torch.Tensor`): one of `timesteps`. For an entry of `timesteps` itself nothing is read
                back from the device.
            sample (`torch.Tensor`): z_t, (B, C, H, W).
            eta (`float`, defaults to 0.0): nothing but 0 is allowed: the sampler is deterministic.
            use_clipped_model_output (`bool`), generator (`torch.Generator`): not used; stock pipelines pass them. eps
                always follows from the clipped x0.
            return_dict (`bool`, defaults to `True`): a `DDIMSchedulerOutput`, else a tuple.

        Returns:
            `prev_sample` z_s and `pred_original_sample` x0 (clipped as the config says), both (B, C, H, W).

        Raises:
            ValueError: if `timestep` is not on the grid of `set_timesteps`, or for another `eta`.
        """
        if eta != 0:
            raise ValueError(f"`eta` must be 0, got {eta!r}.")
        t = self._index(timestep)
        if t not in self._coefficients:
            raise ValueError(f"`timestep` must be one of {sorted(self._coefficients)}, got {t}.")
        c_z, c_out, a, b = self._coefficients[t]

        x0 = model_output if self.config.prediction_type == "sample" else c_z * sample + c_out * model_output
        x0 = self.clip(x0)
        prev_sample = torch.add(b * sample, x0, alpha=a)
        if not return_dict:
            return prev_sample, x0
        return DDIMSchedulerOutput(prev_sample=prev_sample, pred_original_sample=x0)

    def _index(self, timestep: int | torch.Tensor) -> int:
        """A timestep as an integer; an entry of `timesteps` on a device is known by its place, without a wait."""
        if isinstance(timestep, torch.Tensor) and timestep.device.type != "cpu":
            own, given = self.timesteps.untyped_storage(), timestep.untyped_storage()
            if own.data_ptr() == given.data_ptr():
                return list(self._coefficients)[::-1][timestep.storage_offset()]
        return int(timestep)

    # --- training ---------------------------------------------------------------------------------------------

    def alpha_sigma(self, t: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """alpha_t and sigma_t for a batch of indices, shaped to broadcast over `like`.

        Args:
            t (`torch.Tensor`): indices 0..n - 1, shape (B,), or one for all, a scalar.
            like (`torch.Tensor`): a tensor (B, ...) whose device and number type (at least float32) are taken.

        Returns:
            two tensors of shape (B, 1, ..., 1).
        """
        dtype = torch.promote_types(like.dtype, torch.float32)
        key = (like.device, dtype)
        if key not in self._device_tables:
            self._device_tables[key] = torch.stack([self.alpha, self.sigma], dim=1).to(like.device, dtype)  # (n, 2)
        alpha, sigma = self._device_tables[key][t.to(like.device).reshape(-1)].unbind(1)
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
        if self.config.prediction_type == "flow_prediction":
            return (z_t - sigma * model_output) / (alpha + sigma)
        return x0_from_v(model_output, z_t, alpha, sigma, self.config.data_std)

    def __len__(self) -> int:
        return self.config.num_train_timesteps

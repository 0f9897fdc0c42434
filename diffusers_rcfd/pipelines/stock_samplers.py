"""A base model under Diffusers' own samplers, for comparison with distilled students at the same network calls."""

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    ImagePipelineOutput,
    PNDMScheduler,
    UNet2DModel,
    UniPCMultistepScheduler,
)

from diffusers_rcfd.pipelines.pipeline_rcfd import RCFDPipeline
from diffusers_rcfd.schedulers.names import STOCK_SAMPLERS
from diffusers_rcfd.schedulers.scheduling_rcfd import RCFDScheduler, eps_from_x0
from diffusers_rcfd.validation import require

# Name -> the scheduler, what it is called in tables, and the options in which it differs from its own defaults.
_SAMPLERS = {
    "ddim": (DDIMScheduler, "DDIM", {"clip_sample": False, "set_alpha_to_one": False}),
    "pndm": (PNDMScheduler, "PNDM", {"skip_prk_steps": True}),
    "dpm++1s": (DPMSolverSinglestepScheduler, "DPM-Solver++(1S)", {"solver_order": 1, "lower_order_final": True}),
    "dpm++2s": (DPMSolverSinglestepScheduler, "DPM-Solver++(2S)", {"solver_order": 2, "lower_order_final": True}),
    "dpm++3s": (DPMSolverSinglestepScheduler, "DPM-Solver++(3S)", {"solver_order": 3, "lower_order_final": True}),
    "dpm++2m": (DPMSolverMultistepScheduler, "DPM-Solver++(2M)", {"solver_order": 2}),
    "dpm++3m": (DPMSolverMultistepScheduler, "DPM-Solver++(3M)", {"solver_order": 3}),
    "unipc": (UniPCMultistepScheduler, "UniPC", {}),
    "euler": (EulerDiscreteScheduler, "Euler", {}),
    "heun": (HeunDiscreteScheduler, "Heun", {}),
}
assert tuple(_SAMPLERS) == STOCK_SAMPLERS


class StockSamplerPipeline(RCFDPipeline):
    """Samples a base model with a stock Diffusers sampler; called like an `RCFDPipeline`.

    The network's output, whatever it predicts, is turned into x0, clipped where the base model's scheduler clips, and
    handed to the stock scheduler as x0 (`prediction_type="sample"`), or as eps where it takes no x0 (PNDM). The stock
    scheduler runs on the base model's own noise schedule, from its last entry; PNDM from the last entry with
    ln(alpha / sigma) >= -5.1, the bound that Diffusers names for DPM-Solver on the cosine schedule.

    Args:
        unet (`UNet2DModel`): the network.
        scheduler (`RCFDScheduler`): of the base model: the noise schedule, and what the network predicts.
        sampler (`str`, defaults to `"ddim"`): one of `STOCK_SAMPLERS`.

    Raises:
        ValueError: for an unknown sampler, or a student of SFD, which samples in nodes of its own.
    """

    def __init__(self, unet: UNet2DModel, scheduler: RCFDScheduler, sampler: str = "ddim"):
        super().__init__(unet, scheduler)
        require(sampler in STOCK_SAMPLERS, "sampler", sampler, f"one of {STOCK_SAMPLERS}")
        nodes = self.scheduler.config.nodes
        require(not nodes, "scheduler", nodes, "of a base model, without `nodes`")
        self.register_to_config(sampler=sampler)

    @property
    def method(self) -> str:
        """What the sampler is called in a table: "DPM-Solver++(2M)"."""
        return _SAMPLERS[self.config.sampler][1]

    def stock_scheduler(self, num_evaluations: int) -> "torch.nn.Module":
        """The stock scheduler, its timesteps set such that sampling calls the network `num_evaluations` times.

        Raises:
            ValueError: where the sampler cannot take that number: Heun takes odd ones, PNDM 1, 3 and more.
        """
        kind, method, options = _SAMPLERS[self.config.sampler]
        last = len(self.scheduler) - 1
        require(1 <= num_evaluations <= last, "num_inference_steps", num_evaluations, f"in 1..{last}")
        ratios = self.scheduler.alphas_cumprod.clone()
        ratios[1:] /= self.scheduler.alphas_cumprod[:-1]
        betas = (1 - ratios).tolist()
        if kind is DDIMScheduler and last % num_evaluations:  # no stock grid ends at index 0: RCFDScheduler's does
            scheduler = RCFDScheduler(len(self.scheduler), trained_betas=betas, clip_sample=False)
            scheduler.set_timesteps(num_evaluations)
            return scheduler
        start = self._first_with_signal() if kind is PNDMScheduler else last
        for steps in range(num_evaluations, 0, -1):
            leading = self._grid_from(start, steps) if kind in (DDIMScheduler, PNDMScheduler) else {}
            scheduler = kind(
                num_train_timesteps=len(self.scheduler),
                trained_betas=betas,
                prediction_type="epsilon" if kind is PNDMScheduler else "sample",
                **options | leading,
            )
            if kind in (EulerDiscreteScheduler, HeunDiscreteScheduler):  # whose own grid of one step begins at 0
                scheduler.set_timesteps(timesteps=self.scheduler.grid(steps)[:0:-1])
            else:
                scheduler.set_timesteps(steps)
            if len(scheduler.timesteps) == num_evaluations:
                return scheduler
        raise ValueError(f"`num_inference_steps`={num_evaluations} is not possible with {method}.")

    def _grid_from(self, start: int, steps: int) -> dict:
        """Options of a scheduler's grid of `steps` entries that begins at `start`, as `RCFDScheduler.to_ddim`."""
        stride = len(self.scheduler) // steps
        return {"timestep_spacing": "leading", "steps_offset": start - (steps - 1) * stride}

    def _first_with_signal(self) -> int:
        """The last entry with ln(alpha / sigma) >= -5.1: PNDM averages eps, which beyond it is amplified by 1000s."""
        log_ratio = (self.scheduler.alphas_cumprod.sqrt() / self.scheduler.sigma).log()
        return int((log_ratio >= -5.1).nonzero().max())

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        num_inference_steps: int = 50,
        generator: torch.Generator | list[torch.Generator] | None = None,
        class_labels: int | list[int] | torch.Tensor | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Sample images in `num_inference_steps` network evaluations; see `RCFDPipeline.__call__`.

        Raises:
            ValueError: for arguments not allowed, among them a number of evaluations that the sampler cannot take.
        """
        stock = self.stock_scheduler(num_inference_steps)
        denoiser, x, class_labels = self._begin(batch_size, generator, class_labels, latents, output_type)
        x, data_std = x * stock.init_noise_sigma, self.scheduler.config.data_std
        for t in self.progress_bar(stock.timesteps):
            index = int(t)
            z = stock.scale_model_input(x, t)
            x0 = self.scheduler.clip(denoiser(z, torch.tensor(index, device=z.device), class_labels)) / data_std
            prediction = x0
            if stock.config.prediction_type == "epsilon":
                prediction = eps_from_x0(x0, z, *self._unit_level(index))
            x = stock.step(prediction, t, x, return_dict=False)[0]
        return self._finish(x * data_std, output_type, return_dict)

    def _unit_level(self, index: int) -> tuple[float, float]:
        """alpha and sigma of an entry of the schedule, with alpha^2 + sigma^2 = 1."""
        return self.scheduler.alphas_cumprod[index].sqrt().item(), self.scheduler.sigma[index].item()

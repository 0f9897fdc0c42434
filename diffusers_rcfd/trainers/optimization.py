"""One optimizer step, which changes nothing where the loss or a gradient is not finite.

The device decides this, without being waited for, and for all processes alike.
"""

import math

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel

from diffusers_rcfd.trainers.checkpoints import full_tensor
from diffusers_rcfd.trainers.config import TrainingConfig
from diffusers_rcfd.validation import require


def build_optimizer(config: TrainingConfig, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer that `config` names, fused into one kernel."""
    options = {"lr": config.learning_rate, "weight_decay": config.weight_decay, "fused": True}
    if config.optimizer == "sgd":
        return torch.optim.SGD(parameters, momentum=0.9, **options)
    return {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.optimizer](parameters, **options)


def check_mixed_precision(accelerator: Accelerator) -> None:
    """Raise a `ValueError` for fp16 on a CPU, whose kernels lack it."""
    half_on_cpu = accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu"
    require(not half_on_cpu, "mixed_precision", accelerator.mixed_precision, "'no' or 'bf16' on a CPU")


def begin_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Zero the momentum of SGD, which a first step that is skipped would leave undefined."""
    for group in optimizer.param_groups:
        for parameter in group["params"] if "momentum" in group else ():
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def backward(accelerator: Accelerator, loss: torch.Tensor) -> None:
    """Backward pass of a scalar loss that, where it is not finite, makes every gradient NaN, on all processes."""
    accelerator.backward(loss * torch.where(loss.detach().isfinite(), 1.0, math.nan))


def clip_gradients(accelerator: Accelerator, model: torch.nn.Module, optimizer, max_norm: float) -> torch.Tensor:
    """Clip the gradients and tell the optimizer whether to skip this step.

    Args:
        accelerator (`Accelerator`): what `model` and `optimizer` were prepared by.
        model (`torch.nn.Module`): the model.
        optimizer (`AcceleratedOptimizer`): its fused optimizer, which obeys `found_inf` as under a `GradScaler`.
        max_norm (`float`): largest norm; 0 does not clip.

    Returns:
        `torch.Tensor`: norm of all gradients before clipping; it is finite exactly where the step is taken.
    """
    norm = accelerator.clip_grad_norm_(model.parameters(), max_norm or math.inf)
    norm = full_tensor(torch.as_tensor(0.0 if norm is None else norm, device=accelerator.device))  # None: of DeepSpeed
    if accelerator.scaler is None:  # which sets the flag by itself
        optimizer.optimizer.found_inf = (~norm.isfinite()).float()
    return norm


@torch.no_grad()
def average_step(
    ema: EMAModel, parameters: list[torch.nn.Parameter], taken: torch.Tensor | bool, ramp: bool = True
) -> None:
    """Move averaged weights by one step: w_avg <- d w_avg + (1 - d) w.

    Args:
        ema (`EMAModel`): the averaged weights.
        parameters (`list[torch.nn.Parameter]`): the weights.
        taken (`torch.Tensor`): a boolean scalar; nothing moves where it is false.
        ramp (`bool`, defaults to `True`): whether d at step s = 0, 1, ... is min(decay, (1 + s) / (10 + s)), and 0 in
            the first step, as in Diffusers, so that the first weights are soon forgotten; else d is the decay from
            the first step on, as in the authors' code.
    """
    ema.optimization_step += 1
    decay = ema.get_decay(ema.optimization_step) if ramp else ema.decay
    changes = torch._foreach_sub(parameters, ema.shadow_params)
    torch._foreach_mul_(changes, taken * (1 - decay))
    torch._foreach_add_(ema.shadow_params, changes)

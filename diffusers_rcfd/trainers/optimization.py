"""One optimizer step, which leaves everything as it is where the loss or a gradient is not finite.

Whether it does is decided on the device, without waiting for it, and for all processes alike.
"""

import math

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel

from diffusers_rcfd.trainers.checkpoints import whole
from diffusers_rcfd.trainers.config import TrainingConfig


def build_optimizer(config: TrainingConfig, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer that `config` names, fused into one kernel."""
    options = {"lr": config.learning_rate, "weight_decay": config.weight_decay, "fused": True}
    if config.optimizer == "sgd":
        return torch.optim.SGD(parameters, momentum=0.9, **options)
    return {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.optimizer](parameters, **options)


def begin_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Zero the momentum of SGD, which a first step that is skipped would leave undefined."""
    for group in optimizer.param_groups:
        for parameter in group["params"] if "momentum" in group else ():
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def backward(accelerator: Accelerator, loss: torch.Tensor) -> None:
    """Backward pass of a scalar loss that, where it is not finite, makes every gradient NaN, on all processes."""
    accelerator.backward(loss * torch.where(loss.detach().isfinite(), 1.0, math.nan))


def clip_gradients(accelerator: Accelerator, model: torch.nn.Module, optimizer, max_norm: float) -> torch.Tensor:
    """Clip the gradients and tell the optimizer whether to leave this step out.

    Args:
        accelerator (`Accelerator`): what `model` and `optimizer` were prepared by.
        model (`torch.nn.Module`): the model.
        optimizer (`AcceleratedOptimizer`): its fused optimizer, which obeys `found_inf` as under a `GradScaler`.
        max_norm (`float`): largest norm; 0 does not clip.

    Returns:
        `torch.Tensor`: norm of all gradients before clipping; it is finite exactly where the step is taken.
    """
    norm = accelerator.clip_grad_norm_(model.parameters(), max_norm or math.inf)
    norm = whole(torch.as_tensor(0.0 if norm is None else norm, device=accelerator.device))  # None: of DeepSpeed
    if accelerator.scaler is None:  # which sets the flag by itself
        optimizer.optimizer.found_inf = (~norm.isfinite()).float()
    return norm


def average_step(ema: EMAModel, parameters: list[torch.nn.Parameter], taken: torch.Tensor) -> None:
    """`EMAModel.step`, but only where `taken`, a scalar boolean tensor, is true."""
    ema.optimization_step += 1
    share = taken * (1 - ema.get_decay(ema.optimization_step))
    changes = torch._foreach_sub(parameters, ema.shadow_params)
    torch._foreach_mul_(changes, share)
    torch._foreach_add_(ema.shadow_params, changes)

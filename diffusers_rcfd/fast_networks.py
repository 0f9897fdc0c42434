"""How a network is laid out and run for speed: `channels_last` and `torch_compile` of the options."""

import torch

from diffusers_rcfd.configs import TrainingConfig


def laid_out(config: TrainingConfig, network: torch.nn.Module) -> torch.nn.Module:
    """The network itself, the weights of its convolutions in the order that `channels_last` says."""
    return network.to(memory_format=torch.channels_last) if config.channels_last else network


def compiled(config: TrainingConfig, network: torch.nn.Module) -> torch.nn.Module:
    """What to call in place of the network, whose weights it shares: with `torch_compile` its compiled form.

    Each shape is compiled by itself. The network stays as it is, for saving and for sampling in other batches.
    """
    return torch.compile(network, dynamic=False) if config.torch_compile else network


def frozen(config: TrainingConfig, network: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """What to call in place of a network that training only asks, in eval mode on the device, its weights frozen."""
    network = getattr(network, "_orig_mod", network)  # of a rung before
    return compiled(config, laid_out(config, network.to(device).eval().requires_grad_(False)))

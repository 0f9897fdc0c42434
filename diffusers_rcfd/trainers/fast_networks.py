"""How a network is laid out and run for speed: `channels_last`, `torch_compile` and the number type of the options."""

import copy

import torch

from diffusers_rcfd.trainers.config import TrainingConfig

NUMBER_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
MULTIPLIED = (torch.nn.Conv2d, torch.nn.Linear)  # the layers that autocast computes in them


def set_memory_format(config: TrainingConfig, network: torch.nn.Module) -> torch.nn.Module:
    """Order the weights of the convolutions as `channels_last` says, and return the network."""
    return network.to(memory_format=torch.channels_last) if config.channels_last else network


def compile_network(config: TrainingConfig, network: torch.nn.Module) -> torch.nn.Module:
    """Return what to call in place of the network: with `torch_compile` its compiled form, which shares its weights.

    Each shape is compiled by itself. The network stays as it is, for saving and for sampling in other batches.
    """
    return torch.compile(network, dynamic=False) if config.torch_compile else network


def narrow(config: TrainingConfig, network: torch.nn.Module) -> torch.nn.Module:
    """With `mixed_precision` a copy that holds the weights as autocast would turn them in every call, else itself.

    Under autocast the copy computes the very same numbers, as only what autocast would cast is cast; but a U-Net with
    class embeddings also adds those in this type. The given network keeps its weights.
    """
    dtype = NUMBER_TYPES.get(config.mixed_precision)
    if dtype is None:
        return network
    network = copy.deepcopy(network)
    for module in network.modules():
        if type(module) in MULTIPLIED:  # a weight that a subclass works on first stays wide
            module.to(dtype)
    return network


def freeze(config: TrainingConfig, network: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """Freeze a network that is used for inference only: what to call in its place, in eval mode on the device."""
    network = narrow(config, getattr(network, "_orig_mod", network))  # the original, of a rung before
    return compile_network(config, set_memory_format(config, network.to(device).eval().requires_grad_(False)))

"""The closed-form networks that the golden numbers were computed with, and tiny real components."""

import resource
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from diffusers_rcfd import FeatureClassifier, RCFDPipeline, RCFDScheduler, build_unet

GOLDEN = Path(__file__).parent / "golden"


def golden(name):
    """Arrays of a golden file as tensors."""
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        return {key: torch.from_numpy(np.asarray(arrays[key])) for key in arrays}


def toy_teacher(z, t):
    return 1.3 * torch.tanh(0.7 * z + 0.3 * torch.cos(_like(t, z) / 200))


def toy_student(z, t):
    return 1.1 * torch.tanh(0.6 * z - 0.2 * torch.sin(_like(t, z) / 300))


def _like(t, z):
    return torch.as_tensor(t, dtype=z.dtype).reshape(-1, 1, 1, 1)


def tiny_unet(**overrides):
    """An 8x8 U-Net with 8 channels."""
    options = {"block_out_channels": (8, 8), "norm_num_groups": 4, "attention_head_dim": 4}
    return build_unet("digits", **(options | overrides))


def tiny_classifier(num_classes=10, **overrides):
    """A small-stem ResNet for 8x8 grey images."""
    options = {"in_channels": 1, "small_stem": True, "num_classes": num_classes}
    return FeatureClassifier("test_resnet", **(options | overrides))


def tiny_sfd_student(**options) -> RCFDPipeline:
    """SFD-v, not trained: one network of 2 and of 3 evaluations, unconditional where `options` say nothing."""
    torch.manual_seed(0)
    nodes = [[1016, 964, 379, 0], [1016, 990, 700, 379, 0]]
    scheduler = RCFDScheduler(nodes=nodes, analytical_first_step=True, clip_sample=False)
    return RCFDPipeline(tiny_unet(**{"num_class_embeds": 2} | options), scheduler)


def tiny_teacher(num_inference_steps=None, seed=0, **overrides):
    """A randomly initialised pipeline for 8x8 grey images."""
    torch.manual_seed(seed)
    names = ("prediction_type", "beta_schedule")
    scheduler_options = {name: overrides.pop(name) for name in names if name in overrides}
    scheduler = RCFDScheduler(num_inference_steps=num_inference_steps, **scheduler_options)
    pipeline = RCFDPipeline(tiny_unet(**overrides), scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def parameters(model):
    """All weights of a model as one vector."""
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@contextmanager
def largest_file(size):
    """Writing a file beyond `size` bytes fails in here, as on a full disk; `None` is no limit."""
    before, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (before if size is None else size, most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, most))

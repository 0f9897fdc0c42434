"""The pairs that change what a network predicts: a student of the same steps in another parametrisation."""

from collections.abc import Iterator

import torch

from diffusers_rcfd.data.image_tensors import flip
from diffusers_rcfd.distillation.pairs import Pair
from diffusers_rcfd.models.denoiser import Denoiser


def adoption_pairs(student: Denoiser, teacher: Denoiser, batch: dict[str, torch.Tensor]) -> Iterator[Pair]:
    """The teacher's own x0 at noised images, clipped as its sampler clips it: K = 1.

    A network that predicts eps gives x0 = (z - sigma eps) / alpha, whose error grows by sigma / alpha: no student of
    few steps can be trained well in that form. A copy that predicts v learns the same images.

    Args:
        student (`Denoiser`): predicts what it is to predict.
        teacher (`Denoiser`): on the same schedule.
        batch (`dict`): "images" in [-1, 1] and "noise", both (B, C, H, W); "t" (B,) in 0..T; "flip" (B,); "labels"
            (B,) for a class-conditional teacher.
    """
    scheduler, labels, t = student.scheduler, batch.get("labels"), batch["t"]
    z_t = scheduler.add_noise(flip(batch["images"], batch["flip"]), batch["noise"], t)
    with torch.no_grad():
        x0_target = teacher.scheduler.clip(teacher(z_t, t, labels))
    yield Pair(lambda: student(z_t, t, labels), x0_target, *scheduler.alpha_sigma(t, z_t))

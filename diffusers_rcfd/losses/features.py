"""Losses between what a classifier sees of two images; per sample, shape (B,)."""

import torch
import torch.nn.functional as F

from diffusers_rcfd.losses.images import to_float32


def feature_kl(student: torch.Tensor, teacher: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """KL(softmax(teacher / tau) || softmax(student)), the CFD loss (Eq. 4); shape (B,).

    The teacher's distribution is the reference and is alone sharpened.

    Args:
        student, teacher (`torch.Tensor`): features (or logits, section 4.3) of the two x0, (B, D); of feature maps
            (B, D, H, W) the value at each position, (B, H, W).
        temperature (`float`, defaults to 1.0): tau in (0, 1].
    """
    return _kl(F.log_softmax(to_float32(student), 1), F.log_softmax(to_float32(teacher) / temperature, 1))


def dual_temperature_kl(student: torch.Tensor, teacher: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """tau^2 KL(softmax(teacher / tau) || softmax(student / tau)), the ablation of Eq. 8; (B, D) to (B,)."""
    student, teacher = to_float32(student) / temperature, to_float32(teacher) / temperature
    return temperature**2 * _kl(F.log_softmax(student, 1), F.log_softmax(teacher, 1))


def _kl(log_q: torch.Tensor, log_p: torch.Tensor) -> torch.Tensor:
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1)


def spatial_kl(student: torch.Tensor, teacher: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """`feature_kl` over the channels at each position of a map, the mean over positions; (B, C, H, W) to (B,)."""
    return feature_kl(student, teacher, temperature).flatten(1).mean(1)


def spatial_l1(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """L1 between feature maps whose channels have unit length at each position, the mean over positions.

    The normalisation is that of LPIPS (Zhang et al. 2018); (B, C, H, W) to (B,).
    """
    difference = F.normalize(to_float32(student), dim=1) - F.normalize(to_float32(teacher), dim=1)
    return difference.abs().sum(1).flatten(1).mean(1)

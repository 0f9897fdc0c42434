"""The distillation losses as pure functions of tensors: per sample where the mathematics allows it, shape (B,).

No model and no scheduler in sight. Notation: shared by the paper and this package, e.g. temperature is tau of Eq. 4.
"""

import math

import torch
import torch.nn.functional as F
from torch import distributed as dist


def wide(x: torch.Tensor) -> torch.Tensor:
    """`x` in float32 at least, which every loss is computed in."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def x0_weight(alpha: torch.Tensor, sigma: torch.Tensor, weighting: str = "both") -> torch.Tensor:
    """Weight of the squared error of x0, shape of `alpha`.

    Args:
        alpha, sigma (`torch.Tensor`): of the noise level t, with alpha^2 + sigma^2 = 1.
        weighting (`str`, defaults to `"both"`): `"both"` is the truncated SNR max(alpha^2 / sigma^2, 1), which
            makes the loss max(mse(x0), mse(eps)) (Salimans and Ho 2022, section 4; RCFD paper, Eq. 2); `"x"` is 1,
            the error of x0; `"eps"` is alpha^2 / sigma^2, the error of eps.

    Raises:
        ValueError: for any other `weighting`.
    """
    snr = (alpha / sigma) ** 2
    if weighting == "both":
        return snr.clamp(min=1)
    if weighting == "eps":
        return snr
    if weighting == "x":
        return torch.ones_like(snr)
    raise ValueError(f"`weighting` must be 'both', 'x' or 'eps', got {weighting!r}.")


def x0_loss(
    x0_pred: torch.Tensor, x0_target: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor, weighting: str = "both"
) -> torch.Tensor:
    """Weighted mean squared error of x0: base training, and progressive distillation (Eq. 2); shape (B,).

    Args:
        x0_pred, x0_target (`torch.Tensor`): (B, C, H, W).
        alpha, sigma (`torch.Tensor`): (B, 1, 1, 1).
        weighting (`str`, defaults to `"both"`): see `x0_weight`.
    """
    mse = (wide(x0_pred) - wide(x0_target)).square().flatten(1).mean(1)
    return x0_weight(alpha, sigma, weighting).flatten() * mse


def feature_kl(student: torch.Tensor, teacher: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """KL(softmax(teacher / tau) || softmax(student)), the CFD loss (Eq. 4); shape (B,).

    The teacher's distribution is the reference and is alone sharpened.

    Args:
        student, teacher (`torch.Tensor`): features (or logits, section 4.3) of the two x0, (B, D); of feature maps
            (B, D, H, W) the value at each position, (B, H, W).
        temperature (`float`, defaults to 1.0): tau in (0, 1].
    """
    return _kl(F.log_softmax(wide(student), 1), F.log_softmax(wide(teacher) / temperature, 1))


def dual_temperature_kl(student: torch.Tensor, teacher: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """tau^2 KL(softmax(teacher / tau) || softmax(student / tau)), the ablation of Eq. 8; (B, D) to (B,)."""
    student, teacher = wide(student) / temperature, wide(teacher) / temperature
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
    difference = F.normalize(wide(student), dim=1) - F.normalize(wide(teacher), dim=1)
    return difference.abs().sum(1).flatten(1).mean(1)


def entropy(logits: torch.Tensor) -> torch.Tensor:
    """Entropy of each prediction in nats, 0..ln K (Eq. 5); (B, K) to (B,). Finite for one-hot predictions."""
    log_p = F.log_softmax(wide(logits), 1)
    return -(log_p.exp() * log_p).sum(1)


def log_mean_prediction(logits: torch.Tensor) -> torch.Tensor:
    """ln p_hat of Eq. 6, the mean prediction over the batches of all processes; (B, K) to (K,).

    Gradients pass the reduction: averaged over processes (as data-parallel training does), they are those of one
    process with the whole batch.
    """
    log_p = F.log_softmax(wide(logits), 1)
    log_p_mean = log_p.logsumexp(0) - math.log(len(log_p))
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        from torch.distributed.nn.functional import all_gather

        everyone = torch.stack(all_gather(log_p_mean))  # (processes, K)
        log_p_mean = everyone.logsumexp(0) - math.log(len(everyone))
    return log_p_mean


def diversity(logits: torch.Tensor, log_p_mean: torch.Tensor | None = None) -> torch.Tensor:
    """Negative entropy of the mean prediction, -ln K..0 (Eq. 6); a scalar, finite where a class has no probability.

    Args:
        logits (`torch.Tensor`): (B, K).
        log_p_mean (`torch.Tensor`, *optional*): `log_mean_prediction` (K,) of a larger batch that `logits` are one of
            several equal parts of; of `logits` themselves if not given. The mean of the gradients of all parts is
            that of the larger batch.
    """
    if log_p_mean is None:
        log_p_mean = log_mean_prediction(logits)
        return (log_p_mean.exp() * log_p_mean).sum()
    p_mean = F.softmax(wide(logits), 1).mean(0)
    through_this_part = ((log_p_mean + 1) * (p_mean - p_mean.detach())).sum()  # d(p ln p) = (ln p + 1) dp; value 0
    return (log_p_mean.exp() * log_p_mean).sum() + through_this_part


def rcfd_loss(
    cfd: torch.Tensor,
    entropy: torch.Tensor,
    diversity: torch.Tensor,
    regularization_weight: float,
    entropy_ratio: float,
) -> torch.Tensor:
    """CFD + beta (gamma entropy + (1 - gamma) diversity) (Eq. 7), of the three scalars.

    Args:
        cfd, entropy, diversity (`torch.Tensor`): scalars, batch means of Eq. 4 to 6.
        regularization_weight (`float`): beta, at least 0.
        entropy_ratio (`float`): gamma in [0, 1].
    """
    return cfd + regularization_weight * (entropy_ratio * entropy + (1 - entropy_ratio) * diversity)

"""Losses of a classifier's predictions: entropy and diversity."""

import math

import torch
import torch.nn.functional as F
from torch import distributed as dist

from diffusers_rcfd.losses.images import to_float32


def entropy(logits: torch.Tensor) -> torch.Tensor:
    """Entropy of each prediction in nats, 0..ln K (Eq. 5); (B, K) to (B,). Finite for one-hot predictions."""
    log_p = F.log_softmax(to_float32(logits), 1)
    return -(log_p.exp() * log_p).sum(1)


def log_mean_prediction(logits: torch.Tensor) -> torch.Tensor:
    """ln p_hat of Eq. 6, the mean prediction over the batches of all processes; (B, K) to (K,).

    Gradients pass the reduction: averaged over processes (as data-parallel training does), they are those of one
    process with the whole batch.
    """
    log_p = F.log_softmax(to_float32(logits), 1)
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
    p_mean = F.softmax(to_float32(logits), 1).mean(0)
    through_this_part = ((log_p_mean + 1) * (p_mean - p_mean.detach())).sum()  # d(p ln p) = (ln p + 1) dp; value 0
    return (log_p_mean.exp() * log_p_mean).sum() + through_this_part

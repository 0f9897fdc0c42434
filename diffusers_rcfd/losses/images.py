"""Losses between images; per sample, shape (B,)."""

import torch


def to_float32(x: torch.Tensor) -> torch.Tensor:
    """Widen `x` to float32 at least, the type that every loss is computed in."""
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
    mse = (to_float32(x0_pred) - to_float32(x0_target)).square().flatten(1).mean(1)
    return x0_weight(alpha, sigma, weighting).flatten() * mse


def l1(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference of two images (B, C, H, W); shape (B,).

    A mean over the pixels, so that a weight carries over from one image size to the next.
    """
    return (to_float32(first) - to_float32(second)).abs().flatten(1).mean(1)

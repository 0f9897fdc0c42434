"""The classifier-guided terms of a student's image against its target, for every trainer that has such a pair."""

import torch

from diffusers_rcfd.configs import FeatureLossConfig
from diffusers_rcfd.feature_classifier import FeatureClassifier
from diffusers_rcfd.losses import (
    diversity,
    dual_temperature_kl,
    entropy,
    feature_kl,
    rcfd_loss,
    spatial_kl,
    spatial_l1,
)


def feature_terms(
    classifier: FeatureClassifier,
    x0_pred: torch.Tensor,
    x0_target: torch.Tensor,
    config: FeatureLossConfig,
    temperature: float,
    regularization: tuple[float, float] | None = None,
) -> dict[str, torch.Tensor]:
    """CFD (Eq. 4 or 8), with entropy and diversity added for RCFD (Eq. 5 to 7).

    Args:
        classifier (`FeatureClassifier`): frozen.
        x0_pred, x0_target (`torch.Tensor`): images of student and teacher, (B, C, H, W); gradients flow to the first.
        config (`FeatureLossConfig`): what is compared, and how.
        temperature (`float`): tau.
        regularization (`tuple[float, float]`, *optional*): beta and gamma of RCFD; none for CFD.

    Returns:
        `dict`: scalars "loss" and "cfd", for RCFD also "entropy" and "diversity".
    """
    logits = None
    if config.distribution == "spatial":
        cfd = spatial_distance(classifier, x0_pred, x0_target, config, temperature)
        if regularization is not None:
            logits = classifier(x0_pred).logits
    else:
        student = classifier(x0_pred)
        with torch.no_grad():
            teacher = classifier(x0_target)
        logits, name = student.logits, "features" if config.distribution == "features" else "logits"
        kl = dual_temperature_kl if config.dual_temperature else feature_kl
        cfd = kl(getattr(student, name), getattr(teacher, name), temperature).mean()
    if regularization is None:
        return {"loss": config.cfd_weight * cfd, "cfd": cfd}
    terms = {"cfd": cfd, "entropy": entropy(logits).mean(), "diversity": diversity(logits)}
    loss = rcfd_loss(config.cfd_weight * cfd, terms["entropy"], terms["diversity"], *regularization)
    return {"loss": loss, **terms}


def spatial_distance(
    classifier: FeatureClassifier,
    x0_pred: torch.Tensor,
    x0_target: torch.Tensor,
    config: FeatureLossConfig,
    temperature: float = 1.0,
) -> torch.Tensor:
    """`spatial_l1` or `spatial_kl` of the stages' feature maps, the mean over stages and images, a scalar."""
    student = classifier.spatial_features(x0_pred, config.feature_stages)
    with torch.no_grad():
        teacher = classifier.spatial_features(x0_target, config.feature_stages)
    pairs = zip(student, teacher, strict=True)
    if config.spatial_loss == "kl":
        losses = [spatial_kl(s, t, temperature) for s, t in pairs]
    else:
        losses = [spatial_l1(s, t) for s, t in pairs]
    return torch.stack(losses).mean()

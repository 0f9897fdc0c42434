"""The classifier-guided terms of a student's image against its target, for every trainer that has such a pair."""

import torch

from diffusers_rcfd.losses.features import dual_temperature_kl, feature_kl, spatial_kl, spatial_l1
from diffusers_rcfd.losses.images import wide
from diffusers_rcfd.losses.predictions import diversity, entropy, rcfd_loss
from diffusers_rcfd.models.feature_classifier import FeatureClassifier, FeatureClassifierOutput
from diffusers_rcfd.trainers.config import FeatureLossConfig


def feature_terms(
    classifier: FeatureClassifier,
    x0_pred: torch.Tensor,
    x0_target: torch.Tensor,
    config: FeatureLossConfig,
    temperature: float,
    regularization: tuple[float, float] | None = None,
    log_p_mean: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """CFD (Eq. 4 or 8), with entropy and diversity added for RCFD (Eq. 5 to 7).

    Args:
        classifier (`FeatureClassifier`): frozen.
        x0_pred, x0_target (`torch.Tensor`): images of student and teacher, (B, C, H, W); gradients flow to the first.
        config (`FeatureLossConfig`): what is compared, and how.
        temperature (`float`): tau.
        regularization (`tuple[float, float]`, *optional*): beta and gamma of RCFD; none for CFD.
        log_p_mean (`torch.Tensor`, *optional*): of a larger batch that this is a part of, see `diversity`.

    Returns:
        `dict`: scalars "loss" and "cfd", for RCFD also "entropy" and "diversity", and those of `spread` (but with
        spatial features, which need no other output of the classifier).
    """
    if config.distribution == "spatial":
        terms = {"cfd": spatial_distance(classifier, x0_pred, x0_target, config, temperature)}
        logits, variety = None if regularization is None else classifier(x0_pred).logits, {}
    else:
        with torch.no_grad():
            teacher = classifier(x0_target)
        student = classifier(x0_pred)
        logits, name = student.logits, "features" if config.distribution == "features" else "logits"
        kl = dual_temperature_kl if config.dual_temperature else feature_kl
        terms = {"cfd": kl(getattr(student, name), getattr(teacher, name), temperature).mean()}
        variety = spread(student, teacher)
    loss = config.cfd_weight * terms["cfd"]
    if regularization is not None:
        terms |= {"entropy": entropy(logits).mean(), "diversity": diversity(logits, log_p_mean)}
        loss = rcfd_loss(loss, terms["entropy"], terms["diversity"], *regularization)
    return {"loss": loss, **terms, **variety}


def check_stages(classifier: FeatureClassifier, image_shape: tuple[int, int, int], config: FeatureLossConfig) -> None:
    """Compare an image with itself in the classifier's stages, so that what cannot be is found before training.

    Raises:
        ValueError: if the backbone has no stages, or not those of `feature_stages`.
    """
    image = torch.zeros(1, *image_shape, device=next(classifier.parameters()).device)
    try:
        with torch.no_grad():
            classifier.spatial_features(image, config.feature_stages)
    except ValueError as error:
        raise ValueError(f"`feature_stages` must suit the classifier, got {config.feature_stages}: {error}") from error


@torch.no_grad()
def spread(student: FeatureClassifierOutput, teacher: FeatureClassifierOutput) -> dict[str, torch.Tensor]:
    """Variety of a student's x0 as a share of its teacher's, about 1 when all is well and near 0 when it collapses.

    Args:
        student, teacher (`FeatureClassifierOutput`): features (B, D) and logits (B, K) of the two x0.

    Returns:
        `dict`: scalars "feature_variance_ratio", variance over the batch, mean over the features; and
        "class_entropy_ratio", entropy of the mean prediction over the batches of all processes.
    """
    variance = [wide(output.features).var(0, correction=0).mean() + 1e-12 for output in (student, teacher)]
    entropies = [1e-3 - diversity(output.logits) for output in (student, teacher)]
    return {
        "feature_variance_ratio": variance[0] / variance[1],
        "class_entropy_ratio": entropies[0] / entropies[1],
    }


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

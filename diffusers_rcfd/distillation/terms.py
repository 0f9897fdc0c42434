"""The terms that a loss is made of, each a function of a pair, and their weighted sum."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from diffusers_rcfd import losses
from diffusers_rcfd.distillation.objectives import Objective
from diffusers_rcfd.distillation.pairs import Pair
from diffusers_rcfd.models.feature_classifier import FeatureClassifier, FeatureClassifierOutput


class View:
    """A pair as the terms see it: its images, and what the classifier makes of them, each computed once.

    Args:
        pair (`Pair`): the pair.
        objective (`Objective`): the options of the terms.
        classifier (`FeatureClassifier`, *optional*): frozen.
        lpips (`Callable`, *optional*): two batches of images (B, 3, H, W) in [-1, 1] -> (B,), see `losses.lpips`.
    """

    def __init__(
        self,
        pair: Pair,
        objective: Objective,
        classifier: FeatureClassifier | None = None,
        lpips: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    ):
        self.pair = pair
        self.objective = objective
        self.classifier = classifier
        self.lpips = lpips

    @cached_property
    def student(self) -> FeatureClassifierOutput:
        """Features (B, D) and logits (B, K) of the student's x0."""
        return self.classifier(self.pair.x0)

    @cached_property
    def teacher(self) -> FeatureClassifierOutput:
        """Features and logits of the target."""
        with torch.no_grad():
            return self.classifier(self.pair.x0_target)

    @property
    def landings(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Where the steps of student and target end, (B, C, H, W) each."""
        return self.pair.landing(self.pair.x0), self.pair.landing(self.pair.x0_target)


@dataclass(frozen=True)
class Term:
    """A term of a loss.

    Args:
        function (`Callable`): (`View`) -> values (B,) or a scalar.
        needs (`str`, *optional*): `"classifier"` or `"lpips"`, where the term cannot do without.
        of_whole_batch (`Callable`, *optional*): for a term that looks at a whole batch: (list of `View`) -> what its
            function finds in `view.pair.whole_batch[name]` where the batch comes in several parts.
    """

    function: Callable[[View], torch.Tensor]
    needs: str | None = None
    of_whole_batch: Callable[[list[View]], Any] | None = None


def image(view: View) -> torch.Tensor:
    """Weighted squared error of x0 (Eq. 2)."""
    pair = view.pair
    return losses.x0_loss(pair.x0, pair.x0_target, pair.alpha, pair.sigma, view.objective.loss_weighting)


def l1(view: View) -> torch.Tensor:
    """Mean absolute error of the states that student and target lead to (SFD)."""
    return losses.l1(*view.landings)


def feature_kl(view: View) -> torch.Tensor:
    """CFD (Eq. 4), or Eq. 8 with a dual temperature."""
    return _sharpened_kl(view, view.student.features, view.teacher.features)


def prediction_kl(view: View) -> torch.Tensor:
    """CFD of the predictions in place of the features (section 4.3)."""
    return _sharpened_kl(view, view.student.logits, view.teacher.logits)


def _sharpened_kl(view: View, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    kl = losses.dual_temperature_kl if view.objective.dual_temperature else losses.feature_kl
    return kl(student, teacher, view.objective.temperature)


def spatial(view: View) -> torch.Tensor:
    """CFD of the feature maps of several stages."""
    return spatial_distance(view.classifier, view.pair.x0, view.pair.x0_target, view.objective)


def entropy(view: View) -> torch.Tensor:
    """Entropy of each prediction (Eq. 5)."""
    return losses.entropy(view.student.logits)


def diversity(view: View) -> torch.Tensor:
    """Negative entropy of the mean prediction (Eq. 6)."""
    return losses.diversity(view.student.logits, view.pair.whole_batch.get("diversity"))


def mean_prediction(views: list[View]) -> torch.Tensor:
    """ln p_hat of the whole batch, (K,): the diversity of many parts is not the mean of their diversities."""
    return losses.log_mean_prediction(torch.cat([view.student.logits for view in views]))


def lpips(view: View) -> torch.Tensor:
    """LPIPS of the images that a sampler's last step ends at; 0 elsewhere (SFD's second stage)."""
    if not view.pair.is_last:
        return torch.zeros((), device=view.pair.x0_target.device)
    return view.lpips(*(ends.expand(-1, 3, -1, -1) for ends in view.landings)).float()


def perceptual(view: View) -> torch.Tensor:
    """As `lpips`, by the spatial features of the classifier."""
    if not view.pair.is_last:
        return torch.zeros((), device=view.pair.x0_target.device)
    return spatial_distance(view.classifier, *view.landings, view.objective)


# Every term by its name. Register one of your own with a row: `TERMS["mine"] = Term(my_function)`.
TERMS = {
    "image": Term(image),
    "l1": Term(l1),
    "lpips": Term(lpips, needs="lpips"),
    "perceptual": Term(perceptual, needs="classifier"),
    "feature_kl": Term(feature_kl, needs="classifier"),
    "prediction_kl": Term(prediction_kl, needs="classifier"),
    "spatial": Term(spatial, needs="classifier"),
    "entropy": Term(entropy, needs="classifier"),
    "diversity": Term(diversity, needs="classifier", of_whole_batch=mean_prediction),
}


def loss_terms(view: View) -> dict[str, torch.Tensor]:
    """The objective of a pair and its terms, as scalars.

    Returns:
        `dict`: "loss", the weighted sum; each term by its name; and those of `spread`, where the classifier has seen
        both images.
    """
    weights = view.objective.weights
    terms = {name: TERMS[name].function(view).mean() for name in weights}
    loss = sum(weights[name] * term for name, term in terms.items())
    seen = {"student", "teacher"} <= view.__dict__.keys()
    return {"loss": loss, **terms, **(spread(view.student, view.teacher) if seen else {})}


def whole_batch(views: list[View]) -> dict[str, Any]:
    """What the terms that look at a whole batch find in the parts of one, by their names; without gradients."""
    looking = [name for name, weight in views[0].objective.weights.items() if weight and TERMS[name].of_whole_batch]
    if not looking:
        return {}
    with torch.no_grad():
        return {name: TERMS[name].of_whole_batch(views) for name in looking}


def spatial_distance(
    classifier: FeatureClassifier, x0: torch.Tensor, x0_target: torch.Tensor, objective: Objective
) -> torch.Tensor:
    """`spatial_l1` or `spatial_kl` of the stages' feature maps, the mean over stages and images, a scalar."""
    student = classifier.spatial_features(x0, objective.feature_stages)
    with torch.no_grad():
        teacher = classifier.spatial_features(x0_target, objective.feature_stages)
    pairs = zip(student, teacher, strict=True)
    if objective.spatial_loss == "kl":
        values = [losses.spatial_kl(s, t, objective.temperature) for s, t in pairs]
    else:
        values = [losses.spatial_l1(s, t) for s, t in pairs]
    return torch.stack(values).mean()


@torch.no_grad()
def spread(student: FeatureClassifierOutput, teacher: FeatureClassifierOutput) -> dict[str, torch.Tensor]:
    """Variety of a student's x0 as a share of its teacher's, about 1 when all is well and near 0 when it collapses.

    Args:
        student, teacher (`FeatureClassifierOutput`): features (B, D) and logits (B, K) of the two x0.

    Returns:
        `dict`: scalars "feature_variance_ratio", variance over the batch, mean over the features; and
        "class_entropy_ratio", entropy of the mean prediction over the batches of all processes.
    """
    outputs = student, teacher
    variance = [losses.to_float32(output.features).var(0, correction=0).mean() + 1e-12 for output in outputs]
    entropies = [1e-3 - losses.diversity(output.logits) for output in outputs]
    return {
        "feature_variance_ratio": variance[0] / variance[1],
        "class_entropy_ratio": entropies[0] / entropies[1],
    }


def check_terms(weights: dict[str, float]) -> None:
    """Raise a `ValueError` for a term that there is not, or where nothing weighs anything."""
    for name in weights:
        if name not in TERMS:
            raise ValueError(f"`terms` must be of {tuple(TERMS)}, got {name!r}.")
    if not any(weights.values()):
        raise ValueError(f"`cfd_weight` must be above 0 where no other loss is left, got the weights {weights}.")


def check_objective(
    objective: Objective,
    image_shape: tuple[int, int, int],
    classifier: FeatureClassifier | None = None,
    lpips: Callable | None = None,
) -> None:
    """Raise a `ValueError` if the terms of an objective cannot be computed, before any training.

    Args:
        objective (`Objective`): the objective.
        image_shape (`tuple[int, int, int]`): (C, H, W) of the images.
        classifier (`FeatureClassifier`, *optional*): that is to see them.
        lpips (`Callable`, *optional*): see `View`.
    """
    weights, channels = objective.weights, image_shape[0]
    check_terms(weights)
    if lpips is None and any(TERMS[name].needs == "lpips" for name in weights):
        raise ValueError("`lpips` must be given for the term 'lpips', got None.")
    guided = [name for name in weights if TERMS[name].needs == "classifier"]
    if not guided:
        return
    if classifier is None:
        raise ValueError(f"`classifier` must be given for the term {guided[0]!r}, got None.")
    wanted, num_classes = classifier.config.in_channels, classifier.config.num_classes
    if channels not in (1, wanted):
        raise ValueError(f"`classifier` must take images of {channels} channel(s), got one for {wanted}.")
    if num_classes < 2 and any(weights.get(name) for name in ("entropy", "diversity", "prediction_kl")):
        raise ValueError(
            f"`classifier` must have at least 2 classes for entropy, diversity and predictions, got {num_classes}: "
            "use objective 'cfd' or `regularization_weight=0`."
        )
    if {"spatial", "perceptual"} & set(weights):
        check_stages(classifier, image_shape, objective.feature_stages)


def check_stages(classifier: FeatureClassifier, image_shape: tuple[int, int, int], stages: list[int] | None) -> None:
    """Raise a `ValueError` if the backbone has no stages, or not these; found by looking at an image."""
    image = torch.zeros(1, *image_shape, device=next(classifier.parameters()).device)
    try:
        with torch.no_grad():
            classifier.spatial_features(image, stages)
    except ValueError as error:
        raise ValueError(f"`feature_stages` must suit the classifier, got {stages}: {error}") from error

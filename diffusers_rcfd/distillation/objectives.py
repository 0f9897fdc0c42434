"""Objectives: which terms a loss has, and how much each weighs. Free of torch, so that configs and `--help` use it.

The terms themselves are in `distillation.terms`.
"""

import math
from dataclasses import dataclass

from diffusers_rcfd.validation import require

# What CFD compares through the classifier, and the term that does.
COMPARISONS = {"features": "feature_kl", "predictions": "prediction_kl", "spatial": "spatial"}
# The terms that look through a classifier.
GUIDED_TERMS = ("feature_kl", "prediction_kl", "spatial", "perceptual", "entropy", "diversity")

# Each objective as a table of terms and weights, a function of the options named in `Weights`.
OBJECTIVES = {
    "pd": lambda w: {"image": 1.0},
    "l1": lambda w: {"l1": 1.0},
    "cfd": lambda w: {COMPARISONS[w.distribution]: w.cfd},
    "rcfd": lambda w: {
        COMPARISONS[w.distribution]: w.cfd,
        "entropy": w.beta * w.gamma,
        "diversity": w.beta * (1 - w.gamma),
    },
}


@dataclass(frozen=True)
class Weights:
    """The options that the tables of `OBJECTIVES` are made of: beta and gamma are those of Eq. 7."""

    distribution: str = "features"
    cfd: float = 1.0
    beta: float = 0.0
    gamma: float = 0.5


@dataclass(frozen=True)
class Objective:
    """A loss as a weighted sum of terms, with the options that the terms have.

    Args:
        weights (`dict[str, float]`): weight of each term of `distillation.terms.TERMS`; a term of weight 0 is measured
            only.
        temperature (`float`, defaults to 1.0): tau of the feature terms, sharpens the teacher's distribution.
        dual_temperature (`bool`, defaults to `False`): the ablation of Eq. 8.
        spatial_loss (`str`, defaults to `"l1"`): `"l1"` or `"kl"`, of the term `spatial`.
        feature_stages (`list[int]`, *optional*): stages of the backbone that `spatial` compares; all by default.
        loss_weighting (`str`, defaults to `"both"`): of the term `image`, see `losses.x0_weight`.
    """

    weights: dict[str, float]
    temperature: float = 1.0
    dual_temperature: bool = False
    spatial_loss: str = "l1"
    feature_stages: list[int] | None = None
    loss_weighting: str = "both"


def needs_classifier(weights: dict[str, float]) -> bool:
    """Whether one of the terms looks through a classifier."""
    return any(name in GUIDED_TERMS for name in weights)


def compares_features(weights: dict[str, float]) -> bool:
    """Whether one of the terms is CFD's comparison of what a classifier sees."""
    return any(name in COMPARISONS.values() for name in weights)


def parse_terms(terms: list[str]) -> dict[str, float]:
    """Weights by name from "name=weight" texts.

    Raises:
        ValueError: for another form, a weight below 0, a name given twice, or weights that are all 0.
    """
    weights = {}
    for term in terms:
        name, _, text = str(term).partition("=")
        try:
            weight = float(text)
        except ValueError:
            weight = math.nan
        fits = name and name not in weights and 0 <= weight < math.inf
        require(fits, "terms", term, "of the form name=weight, each name once, with a weight of at least 0")
        weights[name] = weight
    require(any(weights.values()), "terms", terms, "one term or more with a weight above 0")
    return weights

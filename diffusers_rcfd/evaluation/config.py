"""How generated images are judged: the options. Free of torch."""

from dataclasses import dataclass

from diffusers_rcfd.validation import document_options, normalize, option, require, require_count

METRICS = ("fd", "is", "kid", "precision", "recall")


@document_options
@dataclass
class EvaluationConfig:
    """How generated images are judged; the reference is a `DataConfig`."""

    feature_extractor: str | None = option(
        None, "Classifier that measures: a folder, a Hub id or a timm name. Unset: Inception, and FD is FID."
    )
    judges: list[str] | None = option(
        None,
        "Judges in place of `feature_extractor`: 'pixels', or ROLE=PLACE with a role of 'guide', 'twin' or 'foreign' "
        "and a folder, a Hub id, a timm name, 'inception' or 'efficientnet-lite0'; PLACE@64 enlarges images to 64 "
        "pixels.",
    )
    reference_statistics: str | None = option(
        None, "File of the reference's mean and covariance (.npz with mu and sigma, or torch-fidelity's)."
    )
    extractor_name: str | None = option(None, "What the classifier is called in reports; unset: its own name.")
    inception_weights: str | None = option(None, "torch-fidelity's Inception weights; unset: where it keeps them.")
    metrics: list[str] = option(["fd", "is"], f"Of {METRICS}; fd is FID with Inception.")
    num_images: int = option(50_000, "Generated images.")
    eval_batch_size: int = option(256, "Images at a time, for each process.")
    seed: int = option(0, "Seed of the noise, and of splits, subsets and bootstrap.")
    statistics_dir: str | None = option(None, "Cache of the reference's statistics; unset: in the Hugging Face home.")

    def __post_init__(self):
        normalize(self)
        require(len(self.metrics) > 0, "metrics", self.metrics, f"of {METRICS}")
        for metric in self.metrics:
            require(metric in METRICS, "metrics", metric, f"of {METRICS}")
        for name, least in (("num_images", 2), ("eval_batch_size", 1), ("seed", 0)):
            require_count(name, getattr(self, name), least)
        both = None not in (self.feature_extractor, self.inception_weights)
        require(not both, "inception_weights", self.inception_weights, "unset with `feature_extractor`")

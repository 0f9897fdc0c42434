"""The options that trainers share, checked where they enter. Free of torch, so that `--help` answers at once.

The help text of a field is its one documentation: it serves the command line, the YAML recipes and Python alike.
"""

import os
from dataclasses import dataclass, field

from diffusers_rcfd.distillation.objectives import COMPARISONS, Objective, parse_terms
from diffusers_rcfd.evaluation.config import METRICS
from diffusers_rcfd.validation import document_options, is_count, is_number, normalize, option, require, require_count

OPTIMIZERS = ("adam", "adamw", "sgd")
MIXED_PRECISIONS = ("no", "fp16", "bf16")
WEIGHTINGS = ("both", "x", "eps")
HUB_STRATEGIES = ("end", "every_rung", "checkpoint")
LR_SCHEDULERS = (
    "constant",
    "constant_with_warmup",
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "piecewise_constant",  # a tenth from half-way on, without warm-up
)


@document_options
@dataclass
class TrainingConfig:
    """What every trainer shares."""

    output_dir: str = option("output", "Folder for the models, checkpoints, samples and metrics.")
    overwrite_output_dir: bool = option(False, "Start anew in an `output_dir` that is not empty.")
    resume_from_checkpoint: str | None = option(
        None, "'latest' (the beginning, where there is none), the path of a checkpoint or its name in `output_dir`."
    )
    max_train_steps: int = option(10_000, "Optimizer steps.")
    train_batch_size: int = option(128, "Images in a batch of one process.")
    gradient_accumulation_steps: int | None = option(
        None, "Batches for each optimizer step; unset: what `accelerate launch` says, else 1."
    )
    learning_rate: float = option(2e-4, "Peak learning rate.")
    lr_scheduler: str = option("constant_with_warmup", f"Learning-rate schedule of Diffusers: one of {LR_SCHEDULERS}.")
    lr_warmup_steps: int = option(0, "Optimizer steps of linear warm-up; the lr_scheduler 'constant' has none.")
    optimizer: str = option("adam", f"One of {OPTIMIZERS}; sgd has momentum 0.9.")
    weight_decay: float = option(0.0, "Weight decay of the optimizer.")
    max_grad_norm: float = option(1.0, "Gradients are clipped to this norm; 0 does not clip.")
    max_skipped_steps: int = option(
        10, "A step with a loss or gradient that is not finite is skipped; so many in a row end the run."
    )
    mixed_precision: str | None = option(
        None,
        f"Number type of the networks, one of {MIXED_PRECISIONS}; losses are float32. Unset: what `accelerate launch` "
        "says, else 'no'.",
    )
    torch_compile: bool = option(
        False, "Compile the networks of training, once for each shape; pays where a run is far longer than compiling."
    )
    channels_last: bool = option(False, "Lay out convolutions channels-last, which some GPUs are faster with.")
    ema_decay: float = option(0.0, "Decay of the moving average of the weights, which is what is saved; 0 keeps none.")
    ema_ramp: bool = option(
        True,
        "Let the moving average forget the first weights: its decay at step s is at most (1 + s) / (10 + s), 0.978 at "
        "400. False: `ema_decay` from the first step on, as the authors do.",
    )
    random_flip: bool = option(False, "Mirror each image with probability 1/2.")
    dataloader_num_workers: int = option(0, "Processes that decode images; not needed for data that fit in memory.")
    seed: int = option(0, "Seed of everything random.")
    logging_steps: int = option(50, "Steps between two lines of metrics.")
    eval_steps: int = option(0, "Steps between two evaluations while training; 0 makes none.")
    sample_steps: int = option(0, "Steps between two sample grids from fixed noise; 0 draws none.")
    num_sample_images: int = option(64, "Images in a sample grid.")
    checkpointing_steps: int = option(1000, "Steps between two checkpoints; 0 writes them only between rungs.")
    checkpoints_total_limit: int = option(2, "Checkpoints kept.")
    report_to: str = option("none", "Accelerate trackers, e.g. 'tensorboard', 'wandb' or 'all'; 'none' for none.")
    push_to_hub: bool = option(False, "Publish the model on the Hub.")
    hub_model_id: str | None = option(None, "Repository to publish to; the name of `output_dir` if unset.")
    hub_private_repo: bool = option(False, "Make a new repository private.")
    hub_token: str | None = field(
        default=None,
        repr=False,
        metadata={"help": "Token with write access; that of `hf auth login` if unset. Never written anywhere."},
    )
    hub_strategy: str = option(
        "end", f"When to publish, one of {HUB_STRATEGIES}; 'checkpoint' publishes rungs and the latest checkpoint."
    )

    def __post_init__(self):
        normalize(self)
        self._ask_the_launcher()
        require(not os.path.isfile(self.output_dir), "output_dir", self.output_dir, "a folder, not a file")
        resume = self.resume_from_checkpoint
        if resume not in (None, "latest") and not os.path.exists(resume):
            inside = os.path.join(self.output_dir, resume)
            self.resume_from_checkpoint = inside if os.path.isdir(inside) else resume
        positive = ("train_batch_size", "gradient_accumulation_steps", "logging_steps", "num_sample_images")
        for name in (*positive, "max_skipped_steps", "checkpoints_total_limit"):
            require(is_count(getattr(self, name), 1), name, getattr(self, name), "a positive integer")
        for name in ("lr_warmup_steps", "dataloader_num_workers", "seed", "eval_steps", "sample_steps",
                     "checkpointing_steps"):  # fmt: skip
            require(is_count(getattr(self, name)), name, getattr(self, name), "an integer of at least 0")
        for steps in self.max_train_steps if isinstance(self.max_train_steps, list) else [self.max_train_steps]:
            require(is_count(steps, 1), "max_train_steps", steps, "a positive integer")
        require(
            is_number(self.learning_rate) and self.learning_rate > 0, "learning_rate", self.learning_rate, "above 0"
        )
        for name in ("weight_decay", "max_grad_norm"):
            value = getattr(self, name)
            require(is_number(value) and value >= 0, name, value, "a number of at least 0")
        require(
            is_number(self.ema_decay) and 0 <= self.ema_decay < 1,
            "ema_decay",
            self.ema_decay,
            "in [0, 1), 0 for none",
        )
        for name, allowed in (
            ("lr_scheduler", LR_SCHEDULERS),
            ("optimizer", OPTIMIZERS),
            ("mixed_precision", MIXED_PRECISIONS),
            ("hub_strategy", HUB_STRATEGIES),
        ):
            require(getattr(self, name) in allowed, name, getattr(self, name), f"one of {allowed}")

    def _ask_the_launcher(self) -> None:
        """Fill in what is unset and `accelerate launch`, its config file or the environment says."""
        if self.mixed_precision is None:
            self.mixed_precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        if self.mixed_precision.lower() in ("off", "false"):  # what YAML means by `no`
            self.mixed_precision = "no"
        if self.gradient_accumulation_steps is None:
            steps = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
            self.gradient_accumulation_steps = int(steps) if steps.isdecimal() else steps


@document_options
@dataclass
class GeneratorConfig(TrainingConfig):
    """What the trainers of generators share."""

    gradient_checkpointing: bool = option(
        False, "Compute the U-Net's activations again in the backward pass: less memory for more time."
    )
    eval_num_images: int = option(5000, "Images of an evaluation while training.")
    best_metric: str = option("fd", f"Metric by which the best weights are kept in `best/`: of {METRICS}.")
    load_best_model_at_end: bool = option(False, "The best weights are the result, not the last ones.")

    def __post_init__(self):
        super().__post_init__()
        require_count("eval_num_images", self.eval_num_images, 2)
        require(self.best_metric in METRICS, "best_metric", self.best_metric, f"one of {METRICS}")
        best = self.load_best_model_at_end
        require(not best or self.eval_steps > 0, "load_best_model_at_end", best, "False where `eval_steps` is 0")


@document_options
@dataclass
class DiffusionConfig(GeneratorConfig):
    """Base training, with the paper's appendix C.3 as defaults."""

    max_train_steps: int = option(800_000, "Optimizer steps.")
    lr_warmup_steps: int = option(5000, "Optimizer steps of linear warm-up.")
    ema_decay: float = option(0.9999, "Decay of the moving average of the weights, which is saved; 0 for none.")
    loss_weighting: str = option(
        "both", "'both': the truncated SNR, max(mse(x0), mse(eps)); 'x': mse(x0); 'eps': mse(eps)."
    )
    sample_inference_steps: int = option(64, "DDIM steps of the sample grids.")

    def __post_init__(self):
        super().__post_init__()
        require(self.loss_weighting in WEIGHTINGS, "loss_weighting", self.loss_weighting, f"one of {WEIGHTINGS}")
        require(
            is_count(self.sample_inference_steps, 1),
            "sample_inference_steps",
            self.sample_inference_steps,
            "a positive integer",
        )


@document_options
@dataclass
class ClassifierConfig(TrainingConfig):
    """Training of the classifier whose features are distilled."""

    max_train_steps: int = option(40_000, "Optimizer steps.")
    learning_rate: float = option(0.1, "Peak learning rate.")
    lr_scheduler: str = option("cosine", f"Learning-rate schedule of Diffusers: one of {LR_SCHEDULERS}.")
    optimizer: str = option("sgd", f"One of {OPTIMIZERS}; sgd has momentum 0.9.")
    weight_decay: float = option(5e-4, "Weight decay of the optimizer.")
    random_flip: bool = option(True, "Mirror each image with probability 1/2.")
    random_crop_padding: int = option(4, "Shift each image by up to this many pixels, black moving in; 0 does not.")
    label_smoothing: float = option(0.0, "Label smoothing in [0, 1).")
    eval_fraction: float = option(0.1, "Share of the images held out for the accuracy, in (0, 1).")

    def __post_init__(self):
        super().__post_init__()
        require(
            is_count(self.random_crop_padding),
            "random_crop_padding",
            self.random_crop_padding,
            "an integer of at least 0",
        )
        require(
            is_number(self.label_smoothing) and 0 <= self.label_smoothing < 1,
            "label_smoothing",
            self.label_smoothing,
            "in [0, 1)",
        )
        require(
            is_number(self.eval_fraction) and 0 < self.eval_fraction < 1,
            "eval_fraction",
            self.eval_fraction,
            "in (0, 1)",
        )


@document_options
@dataclass
class DistillationConfig(GeneratorConfig):
    """What the distillers share: the loss between a student's image and the one it should be."""

    terms: list[str] | None = option(
        None,
        "The loss as a mixture of terms, name=weight each, in place of `objective`: 'image' (squared error, weighted "
        "by the noise level), 'l1', 'lpips', 'feature_kl' (Eq. 4), 'prediction_kl', 'spatial', 'perceptual', "
        "'entropy' (Eq. 5), 'diversity' (Eq. 6).",
    )
    cfd_weight: float = option(1.0, "Weight of the CFD term; 0 leaves entropy and diversity alone (Table 2).")
    distribution: str = option(
        "features",
        "What CFD compares: 'features' before the last layer, 'predictions' (section 4.3), or 'spatial': the feature "
        "maps of several stages.",
    )
    spatial_loss: str = option(
        "l1", "spatial: 'l1' of channels normalised at each position, or 'kl', Eq. 4 over the channels of each."
    )
    feature_stages: list[int] | None = option(
        None,
        "spatial: which stages of the backbone, 0 the finest, -1 the last; unset: all. Their losses are averaged.",
    )
    dual_temperature: bool = option(False, "Temperature on teacher and student, loss times tau^2 (Eq. 8); tau > 0.")
    loss_weighting: str = option("both", "Weighting of the term 'image': 'both' is the truncated SNR, 'x' or 'eps'.")

    def __post_init__(self):
        super().__post_init__()
        require(self.cfd_weight >= 0, "cfd_weight", self.cfd_weight, "at least 0")
        for name, allowed in (
            ("distribution", tuple(COMPARISONS)),
            ("spatial_loss", ("l1", "kl")),
            ("loss_weighting", WEIGHTINGS),
        ):
            require(getattr(self, name) in allowed, name, getattr(self, name), f"one of {allowed}")
        require(self.feature_stages != [], "feature_stages", self.feature_stages, "integers, one or more")
        spatial = self.distribution == "spatial"
        require(not (spatial and self.dual_temperature), "dual_temperature", True, "False with 'spatial'")
        if self.terms is not None:
            parse_terms(self.terms)

    def check_temperature(self, tau: float) -> None:
        """Raise a `ValueError` for a temperature that Eq. 4 (or Eq. 8) does not know."""
        allowed = "above 0" if self.dual_temperature else "in (0, 1]"
        upper = float("inf") if self.dual_temperature else 1
        require(is_number(tau) and 0 < tau <= upper, "temperature", tau, allowed)

    def objective_of(self, weights: dict[str, float], temperature: float) -> Objective:
        """A table of weights with the options that its terms have."""
        return Objective(
            weights=weights,
            temperature=temperature,
            dual_temperature=self.dual_temperature,
            spatial_loss=self.spatial_loss,
            feature_stages=self.feature_stages,
            loss_weighting=self.loss_weighting,
        )

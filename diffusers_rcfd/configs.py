"""Every option of data and training, checked where it enters. Free of torch, so that `--help` answers at once.

The help text of a field is its one documentation: it serves the command line, the YAML recipes and Python alike.
"""

import math
from dataclasses import dataclass, field, fields
from os import PathLike
from typing import Any

OBJECTIVES = ("pd", "cfd", "rcfd")
OPTIMIZERS = ("adam", "adamw", "sgd")
MIXED_PRECISIONS = ("no", "fp16", "bf16")
WEIGHTINGS = ("both", "x", "eps")
HUB_STRATEGIES = ("end", "every_rung", "checkpoint")
# Diffusers' samplers that a base model is compared under, see `stock_samplers`.
STOCK_SAMPLERS = ("ddim", "pndm", "dpm++1s", "dpm++2s", "dpm++3s", "dpm++2m", "dpm++3m", "unipc", "euler", "heun")
LR_SCHEDULERS = (
    "constant",
    "constant_with_warmup",
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
)

# The options that take one value for each rung of a ladder.
PER_RUNG = ("teacher_steps", "objective", "temperature", "regularization_weight", "entropy_ratio", "max_train_steps")

# Appendix C.4 of the paper: student steps -> (tau, beta, gamma).
LOSS_PRESETS = {
    "resnet18": {4: (0.95, 0.003, 0.75), 2: (0.95, 0.003, 0.75), 1: (0.85, 0.003, 0.5)},
    "densenet201": {4: (0.9, 0.0, 0.5), 2: (1.0, 0.0, 0.5), 1: (0.85, 0.0, 0.5)},
}


def option(default: Any, help: str) -> Any:
    """A dataclass field with its documentation."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


def require(condition: bool, name: str, value: Any, allowed: str) -> None:
    """Raise the `ValueError` of a field whose value is not allowed."""
    if not condition:
        raise ValueError(f"`{name}` must be {allowed}, got {value!r}.")


def require_count(name: str, value: int, least: int) -> None:
    """Raise the `ValueError` of an argument that is not an integer of at least `least`."""
    integer = isinstance(value, int) and not isinstance(value, bool)
    require(integer and value >= least, name, value, f"an integer of at least {least}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == value


def _is_count(value: Any, minimum: int = 0) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= minimum


def require_kinds(config: Any) -> None:
    """Raise the `ValueError` of a field that should be text, a truth value or finite, and is not."""
    for each in fields(config):
        name, kind, value = each.name, each.type, getattr(config, each.name)
        if kind is bool:
            require(isinstance(value, bool), name, value, "True or False")
        elif kind is str or (kind == str | None and value is not None):
            require(isinstance(value, (str, PathLike)), name, value, "text")
        for number in value if isinstance(value, (list, tuple)) else [value]:
            require(not isinstance(number, float) or not math.isinf(number), name, number, "finite")


@dataclass
class DataConfig:
    """Where the real images come from; the arguments of `load_image_data`."""

    dataset: str = option(
        "digits",
        "'digits' (embedded), a data set's name on the Hub, a local folder of images, parquet or arrow files, or "
        "'fashion-mnist' with its IDX files in `data_dir`.",
    )
    dataset_config_name: str | None = option(None, "Configuration of a data set that has several.")
    data_dir: str | None = option(None, "Folder of the data set's files.")
    split: str = option("train", "Split to train on.")
    image_column: str | None = option(None, "Column of the images; found when there is one.")
    label_column: str | None = option(None, "Column of the class labels; found when there is one.")
    resolution: int | None = option(None, "Resize the shorter side to this, crop the centre; as they are if unset.")
    channels: int | None = option(None, "1 for grey, 3 for RGB; those of the images if unset.")
    streaming: bool = option(False, "Read a Hub data set while training, without downloading it first.")
    cache_dir: str | None = option(None, "Cache folder of the data set.")

    def __post_init__(self):
        require_kinds(self)
        grey_or_rgb = _is_count(self.channels) and self.channels in (1, 3)
        require(self.channels is None or grey_or_rgb, "channels", self.channels, "1 or 3")
        require(
            self.resolution is None or _is_count(self.resolution, 1),
            "resolution",
            self.resolution,
            "a positive integer",
        )


METRICS = ("fd", "is", "kid", "precision", "recall")


@dataclass
class EvaluationConfig:
    """How generated images are judged; the reference is a `DataConfig`."""

    feature_extractor: str | None = option(
        None, "Classifier that measures: a folder, a Hub id or a timm name. Unset: Inception, and FD is FID."
    )
    extractor_name: str | None = option(None, "What the classifier is called in reports; unset: its own name.")
    inception_weights: str | None = option(None, "torch-fidelity's Inception weights; unset: where it keeps them.")
    metrics: list[str] = option(["fd", "is"], f"Of {METRICS}; fd is FID with Inception.")
    num_images: int = option(50_000, "Generated images.")
    eval_batch_size: int = option(256, "Images at a time, for each process.")
    seed: int = option(0, "Seed of the noise, and of splits, subsets and bootstrap.")
    statistics_dir: str | None = option(None, "Cache of the reference's statistics; unset: in the Hugging Face home.")

    def __post_init__(self):
        require_kinds(self)
        several = isinstance(self.metrics, (list, tuple)) and len(self.metrics) > 0
        require(several, "metrics", self.metrics, f"of {METRICS}")
        for metric in self.metrics:
            require(metric in METRICS, "metrics", metric, f"of {METRICS}")
        for name, least in (("num_images", 2), ("eval_batch_size", 1), ("seed", 0)):
            require_count(name, getattr(self, name), least)
        both = None not in (self.feature_extractor, self.inception_weights)
        require(not both, "inception_weights", self.inception_weights, "unset with `feature_extractor`")


@dataclass
class TrainingConfig:
    """What every trainer shares."""

    output_dir: str = option("output", "Folder for the models, checkpoints, samples and metrics.")
    overwrite_output_dir: bool = option(False, "Start anew in an `output_dir` that is not empty.")
    resume_from_checkpoint: str | None = option(
        None, "'latest' (the beginning, where there is none) or the path of a checkpoint."
    )
    max_train_steps: int = option(10_000, "Optimizer steps.")
    train_batch_size: int = option(128, "Images in a batch of one process.")
    gradient_accumulation_steps: int = option(1, "Batches for each optimizer step.")
    learning_rate: float = option(2e-4, "Peak learning rate.")
    lr_scheduler: str = option("constant_with_warmup", f"Learning-rate schedule of Diffusers: one of {LR_SCHEDULERS}.")
    lr_warmup_steps: int = option(0, "Optimizer steps of linear warm-up.")
    optimizer: str = option("adam", f"One of {OPTIMIZERS}; sgd has momentum 0.9.")
    weight_decay: float = option(0.0, "Weight decay of the optimizer.")
    max_grad_norm: float = option(1.0, "Gradients are clipped to this norm; 0 does not clip.")
    max_skipped_steps: int = option(
        10, "A step with a loss or gradient that is not finite is skipped; so many in a row end the run."
    )
    mixed_precision: str = option("no", f"Number type of the networks, one of {MIXED_PRECISIONS}; losses are float32.")
    ema_decay: float = option(0.0, "Decay of the moving average of the weights, which is what is saved; 0 keeps none.")
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
        require_kinds(self)
        positive = ("train_batch_size", "gradient_accumulation_steps", "logging_steps", "num_sample_images")
        for name in (*positive, "max_skipped_steps", "checkpoints_total_limit"):
            require(_is_count(getattr(self, name), 1), name, getattr(self, name), "a positive integer")
        for name in ("lr_warmup_steps", "dataloader_num_workers", "seed", "eval_steps", "sample_steps",
                     "checkpointing_steps"):  # fmt: skip
            require(_is_count(getattr(self, name)), name, getattr(self, name), "an integer of at least 0")
        for steps in self.max_train_steps if isinstance(self.max_train_steps, list) else [self.max_train_steps]:
            require(_is_count(steps, 1), "max_train_steps", steps, "a positive integer")
        require(
            _is_number(self.learning_rate) and self.learning_rate > 0, "learning_rate", self.learning_rate, "above 0"
        )
        for name in ("weight_decay", "max_grad_norm"):
            value = getattr(self, name)
            require(_is_number(value) and value >= 0, name, value, "a number of at least 0")
        require(
            _is_number(self.ema_decay) and 0 <= self.ema_decay < 1,
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


@dataclass
class GeneratorConfig(TrainingConfig):
    """What the trainers of generators share."""

    eval_num_images: int = option(5000, "Images of an evaluation while training.")
    best_metric: str = option("fd", f"Metric by which the best weights are kept in `best/`: of {METRICS}.")
    load_best_model_at_end: bool = option(False, "The best weights are the result, not the last ones.")

    def __post_init__(self):
        super().__post_init__()
        require_count("eval_num_images", self.eval_num_images, 2)
        require(self.best_metric in METRICS, "best_metric", self.best_metric, f"one of {METRICS}")
        best = self.load_best_model_at_end
        require(not best or self.eval_steps > 0, "load_best_model_at_end", best, "False where `eval_steps` is 0")


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
            _is_count(self.sample_inference_steps, 1),
            "sample_inference_steps",
            self.sample_inference_steps,
            "a positive integer",
        )


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
            _is_count(self.random_crop_padding),
            "random_crop_padding",
            self.random_crop_padding,
            "an integer of at least 0",
        )
        require(
            _is_number(self.label_smoothing) and 0 <= self.label_smoothing < 1,
            "label_smoothing",
            self.label_smoothing,
            "in [0, 1)",
        )
        require(
            _is_number(self.eval_fraction) and 0 < self.eval_fraction < 1,
            "eval_fraction",
            self.eval_fraction,
            "in (0, 1)",
        )


@dataclass(frozen=True)
class Rung:
    """One student of the ladder: N = `student_steps`, each matching K = `teacher_steps` steps of its teacher."""

    student_steps: int
    teacher_steps: int
    objective: str
    temperature: float
    regularization_weight: float
    entropy_ratio: float
    max_train_steps: int

    @property
    def name(self) -> str:
        """Name of the student's folder: "4-step"."""
        return f"{self.student_steps}-step"


@dataclass
class CFDDistillationConfig(GeneratorConfig):
    """A ladder of students, each the next one's teacher, with the paper's appendix C.4 as defaults.

    Options said to be for each rung take one value for all, or as many as `student_steps` has.
    """

    student_steps: list[int] = option([4, 2, 1], "Steps of the students, falling, each dividing the one before.")
    teacher_steps: list[int] | None = option(
        None,
        "Teacher steps K that a student matches with each of its own, for each rung. Unset: 2 from a base model, else "
        "the ratio of the two step counts. A base model takes any K, so that rungs can be skipped.",
    )
    objective: list[str] = option(
        ["rcfd"],
        "For each rung: 'pd' matches images (Eq. 2), 'cfd' the classifier's feature distribution (Eq. 4), 'rcfd' adds "
        "entropy and diversity (Eq. 7).",
    )
    preset: str | None = option(
        "resnet18",
        f"Paper's temperature, weight and ratio for a classifier: one of {tuple(LOSS_PRESETS)} or none. It names "
        "4, 2 and 1 steps; earlier rungs take those of 4. Values given below win.",
    )
    temperature: list[float] | None = option(None, "tau in (0, 1], for each rung: sharpens the teacher's features.")
    regularization_weight: list[float] | None = option(
        None,
        "beta, for each rung: weight of entropy and diversity (rcfd). The diversity term's mean runs over the whole "
        "batch of an optimizer step, of all processes and accumulated batches, which those cost a forward pass more.",
    )
    entropy_ratio: list[float] | None = option(None, "gamma in [0, 1], for each rung: entropy's share of that weight.")
    max_train_steps: list[int] | None = option(
        None, "Optimizer steps, for each rung. Unset: the paper's 10 000 down to 4 student steps, 20 000 below."
    )
    cfd_weight: float = option(1.0, "Weight of the CFD term; 0 leaves entropy and diversity alone (Table 2).")
    distribution: str = option(
        "features", "What CFD compares: 'features' before the last layer, or 'predictions' (section 4.3)."
    )
    dual_temperature: bool = option(False, "Temperature on teacher and student, loss times tau^2 (Eq. 8); tau > 0.")
    loss_weighting: str = option("both", "Weighting of pd: 'both' is the truncated SNR, 'x' or 'eps'.")
    learning_rate: float = option(5e-5, "Peak learning rate, of each rung anew.")
    lr_scheduler: str = option("cosine", f"Learning-rate schedule of Diffusers: one of {LR_SCHEDULERS}.")

    def __post_init__(self):
        for name in PER_RUNG + ("student_steps",):
            value = getattr(self, name)
            if not isinstance(value, (list, tuple)) and (value is not None or name in ("student_steps", "objective")):
                setattr(self, name, [value])
        super_check = self.max_train_steps
        self.max_train_steps = self.max_train_steps or [1]
        super().__post_init__()
        self.max_train_steps = super_check

        steps = self.student_steps = list(self.student_steps)
        require(
            len(steps) > 0 and all(_is_count(N, 1) for N in steps),
            "student_steps",
            steps,
            "positive integers, one or more",
        )
        require(
            all(high > low and high % low == 0 for high, low in zip(steps, steps[1:], strict=False)),
            "student_steps",
            steps,
            "in falling order, each dividing the one before it",
        )
        for name in PER_RUNG:
            value = getattr(self, name)
            if value is not None:
                require(
                    len(value) in (1, len(steps)), name, value, f"one value, or one for each of the {len(steps)} rungs"
                )
        for K in self.teacher_steps or ():
            require(_is_count(K, 1), "teacher_steps", K, "positive integers")
        for objective in self.objective:
            require(objective in OBJECTIVES, "objective", objective, f"one of {OBJECTIVES}")
        if self.preset in ("none", ""):
            self.preset = None
        presets = tuple(LOSS_PRESETS)
        require(self.preset is None or self.preset in LOSS_PRESETS, "preset", self.preset, f"one of {presets} or none")
        for tau in self.temperature or ():
            allowed = "above 0" if self.dual_temperature else "in (0, 1]"
            upper = float("inf") if self.dual_temperature else 1
            require(_is_number(tau) and 0 < tau <= upper, "temperature", tau, allowed)
        for beta in self.regularization_weight or ():
            require(_is_number(beta) and beta >= 0, "regularization_weight", beta, "a number of at least 0")
        for gamma in self.entropy_ratio or ():
            require(_is_number(gamma) and 0 <= gamma <= 1, "entropy_ratio", gamma, "in [0, 1]")
        require(_is_number(self.cfd_weight) and self.cfd_weight >= 0, "cfd_weight", self.cfd_weight, "at least 0")
        require(
            self.distribution in ("features", "predictions"),
            "distribution",
            self.distribution,
            "'features' or 'predictions'",
        )
        require(self.loss_weighting in WEIGHTINGS, "loss_weighting", self.loss_weighting, f"one of {WEIGHTINGS}")

    def rungs(self, teacher_num_inference_steps: int | None, last_index: int) -> list[Rung]:
        """The ladder below a teacher.

        Args:
            teacher_num_inference_steps (`int`, *optional*): steps the teacher was distilled for; `None` for a base
                model, which samples in any number of steps.
            last_index (`int`): T, the largest step count of the schedule.

        Raises:
            ValueError: if the steps do not divide the teacher's, exceed them, or `teacher_steps` does not lead there.
        """
        above, rungs = teacher_num_inference_steps, []
        for i, N in enumerate(self.student_steps):
            K = self._of_rung("teacher_steps", i)
            if above is None:
                K = K or 2
                allowed = f"such that `student_steps` times `teacher_steps` is at most T = {last_index}"
                require(N * K <= last_index, "student_steps", f"{N} (with {K} teacher steps)", allowed)
            else:
                require(N < above or K == 1, "student_steps", N, f"below the teacher's {above} steps")
                require(above % N == 0, "student_steps", N, f"a divisor of the teacher's {above} steps")
                K = K or above // N
                require(N * K == above, "teacher_steps", K, f"{above // N}, for {above} steps to become {N}")
            presets = LOSS_PRESETS.get(self.preset, {})
            tau, beta, gamma = presets.get(min(N, 4), presets.get(2)) if presets else (1.0, 0.0, 0.5)
            given = (self._of_rung(name, i) for name in ("temperature", "regularization_weight", "entropy_ratio"))
            tau, beta, gamma = (
                default if value is None else value for value, default in zip(given, (tau, beta, gamma), strict=True)
            )
            objective = self._of_rung("objective", i)
            iterations = self._of_rung("max_train_steps", i) or (10_000 if N >= 4 else 20_000)
            rungs.append(Rung(N, K, objective, tau, beta if objective == "rcfd" else 0.0, gamma, iterations))
            above = N
        return rungs

    def _of_rung(self, name: str, i: int) -> Any:
        """The value of an option at rung i."""
        value = getattr(self, name)
        return None if value is None else value[i if len(value) > 1 else 0]

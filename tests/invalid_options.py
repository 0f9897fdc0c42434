"""Values that the configs and the scheduler must refuse, field by field, as Hypothesis strategies."""

import dataclasses
import inspect
import math

from hypothesis import strategies as st

from diffusers_rcfd import RCFDScheduler
from diffusers_rcfd.data.config import DataConfig
from diffusers_rcfd.distillation.objectives import OBJECTIVES
from diffusers_rcfd.evaluation.config import METRICS, EvaluationConfig
from diffusers_rcfd.schedulers.names import TEACHER_SOLVERS
from diffusers_rcfd.schedulers.noise_schedules import BETA_SCHEDULES
from diffusers_rcfd.schedulers.scheduling_rcfd import PREDICTION_TYPES
from diffusers_rcfd.trainers.config import (
    HUB_STRATEGIES,
    LR_SCHEDULERS,
    MIXED_PRECISIONS,
    OPTIMIZERS,
    WEIGHTINGS,
    ClassifierConfig,
    DiffusionConfig,
)
from diffusers_rcfd.trainers.ladder_config import LOSS_PRESETS, CFDDistillationConfig
from diffusers_rcfd.trainers.sfd_config import SFDDistillationConfig
from diffusers_rcfd.validation import to_number

WORDS = st.text(max_size=8)
THINGS = st.dictionaries(WORDS, st.integers(), max_size=1) | st.binary(max_size=4)


def not_an_integer_from(least):
    return st.integers(max_value=least - 1) | st.floats() | st.booleans() | WORDS | THINGS


def not_a_number(allowed):
    """Numbers for which `allowed` is false, and what is no finite number."""
    numbers = st.floats(allow_nan=False, allow_infinity=False) | st.integers()
    endless = st.sampled_from([math.nan, math.inf, -math.inf])
    no_numbers = WORDS.filter(lambda word: to_number(word) is None)
    return numbers.filter(lambda value: not allowed(value)) | endless | st.booleans() | no_numbers | THINGS


def none_of(allowed, *also):
    return WORDS.filter(lambda word: word not in (*allowed, *also)) | st.integers() | st.booleans() | THINGS


def lists_with(bad):
    """A bad value for every rung, or one among the rungs."""
    return bad.map(lambda value: [value])


def never_none(strategy):
    return strategy | st.none()


NOT_TRUE_OR_FALSE = st.none() | WORDS | st.floats() | st.integers() | THINGS
NOT_TEXT = st.integers() | st.floats() | st.booleans() | THINGS | st.lists(WORDS, max_size=2)

COUNTS_FROM = {  # field: smallest value
    "train_batch_size": 1, "logging_steps": 1, "num_sample_images": 1,
    "max_skipped_steps": 1, "checkpoints_total_limit": 1, "lr_warmup_steps": 0, "dataloader_num_workers": 0,
    "seed": 0, "sample_steps": 0, "eval_steps": 0, "checkpointing_steps": 0, "max_train_steps": 1,
    "eval_num_images": 2, "sample_inference_steps": 1, "random_crop_padding": 0, "num_images": 2,
    "eval_batch_size": 1, "num_train_timesteps": 2,
}  # fmt: skip
NUMBERS = {
    "learning_rate": lambda x: x > 0, "weight_decay": lambda x: x >= 0, "max_grad_norm": lambda x: x >= 0,
    "ema_decay": lambda x: 0 <= x < 1, "label_smoothing": lambda x: 0 <= x < 1, "eval_fraction": lambda x: 0 < x < 1,
    "cfd_weight": lambda x: x >= 0, "clip_sample_range": lambda x: x > 0,
    "data_std": lambda x: x > 0, "sample_max_value": lambda x: x >= 1,
    "dynamic_thresholding_ratio": lambda x: 0 < x <= 1,
    "beta_start": lambda x: 0 < x <= 0.02, "beta_end": lambda x: 0.0001 <= x < 1,
}  # fmt: skip
CHOICES = {
    "lr_scheduler": LR_SCHEDULERS, "optimizer": OPTIMIZERS,
    "hub_strategy": HUB_STRATEGIES, "loss_weighting": WEIGHTINGS, "best_metric": METRICS,
    "distribution": ("features", "predictions"), "prediction_type": PREDICTION_TYPES, "beta_schedule": BETA_SCHEDULES,
}  # fmt: skip
OF_SFD = {  # whose options are of one model, not of a rung each
    "student_steps": never_none(lists_with(not_an_integer_from(1)) | st.just([]) | st.just([2, 3, 2])),
    "temperature": never_none(not_a_number(lambda x: 0 < x <= 1)),
    "regularization_weight": never_none(not_a_number(lambda x: x >= 0)),
    "entropy_ratio": never_none(not_a_number(lambda x: 0 <= x <= 1)),
    "perceptual_weight": never_none(not_a_number(lambda x: x >= 0)),
    "l1_weight": never_none(not_a_number(lambda x: x == 0)),  # of objective l1
    "sigma_max": never_none(not_a_number(lambda x: x > 0.006)),
    "sigma_min": never_none(not_a_number(lambda x: 0 < x < 80)),
    "rho": never_none(not_a_number(lambda x: x > 0)),
    "solver_order": not_an_integer_from(1) | st.integers(4),
    "max_train_steps": never_none(not_an_integer_from(1) | lists_with(st.integers(1))),
    "teacher_steps": never_none(lists_with(not_an_integer_from(1)) | st.just([]) | st.just([4, 4])),
    "objective": never_none(none_of(OBJECTIVES)),
    "teacher_solver": never_none(none_of(TEACHER_SOLVERS)),
    "nodes": st.lists(st.floats(0.01, 90), max_size=4).filter(lambda x: len(x) < 3 or sorted(set(x))[::-1] != x)
    | lists_with(not_a_number(lambda x: False)) | WORDS | st.floats() | THINGS,
}  # fmt: skip
OTHERS = {
    "channels": not_an_integer_from(1) | st.integers(4),
    "resolution": not_an_integer_from(1),
    "metrics": never_none(lists_with(none_of(METRICS)) | st.just([]) | NOT_TEXT | none_of(METRICS)),
    "preset": none_of(LOSS_PRESETS, "none", ""),
    "gradient_accumulation_steps": not_an_integer_from(1),
    "mixed_precision": none_of(MIXED_PRECISIONS, "off", "false"),
    "terms": lists_with(WORDS.filter(lambda word: "=" not in word) | st.integers()) | st.just(["l1=-1"]),
    "judges": lists_with(st.integers() | st.booleans() | THINGS) | st.integers() | st.booleans() | THINGS,
    "feature_stages": lists_with(st.floats() | st.booleans() | WORDS | THINGS) | st.just([]) | st.floats(),
    "student_steps": never_none(
        lists_with(not_an_integer_from(1)) | st.just([])
        | st.lists(st.integers(1, 64), min_size=2, max_size=4).filter(lambda steps: not _falls(steps))
    ),
    "teacher_steps": lists_with(not_an_integer_from(1)) | st.lists(st.integers(1, 4), min_size=2, max_size=2),
    "objective": never_none(lists_with(none_of(OBJECTIVES)) | st.just([]) | st.just(["pd", "cfd"])),
    "temperature": lists_with(not_a_number(lambda x: 0 < x <= 1)) | st.just([0.9, 0.9]),
    "regularization_weight": lists_with(not_a_number(lambda x: x >= 0)) | st.just([0.1] * 4),
    "entropy_ratio": lists_with(not_a_number(lambda x: 0 <= x <= 1)) | st.just([]),
    "trained_betas": st.lists(st.floats(0.1, 0.9), max_size=3) | WORDS | st.floats() | THINGS
    | st.floats().filter(lambda beta: not 0 < beta < 1).map(lambda beta: [0.1] * 1024 + [beta]),
    "num_inference_steps": not_an_integer_from(1) | st.integers(1025),
    "load_best_model_at_end": NOT_TRUE_OR_FALSE | st.just(True),
}  # fmt: skip

CLASSES = (
    DataConfig,
    EvaluationConfig,
    DiffusionConfig,
    ClassifierConfig,
    CFDDistillationConfig,
    SFDDistillationConfig,
    RCFDScheduler,
)


def _falls(steps):
    return all(high > low and high % low == 0 for high, low in zip(steps, steps[1:], strict=False))


def fields_of(cls):
    """The fields of a config, or the arguments of the scheduler, with their annotations."""
    if dataclasses.is_dataclass(cls):
        return {field.name: field.type for field in dataclasses.fields(cls)}
    return {name: value.annotation for name, value in inspect.signature(cls).parameters.items()}


def all_fields():
    """(class, field) of everything a user may set."""
    return [(cls, field) for cls in CLASSES for field in fields_of(cls)]


def invalid_value(cls, field):
    """Strategy of values that a field must refuse."""
    kind = fields_of(cls)[field]
    if cls is SFDDistillationConfig and field in OF_SFD:
        return OF_SFD[field]
    if field == "max_train_steps" and cls is CFDDistillationConfig:
        return lists_with(not_an_integer_from(1)) | st.just([5, 5])
    if field in COUNTS_FROM:
        return never_none(not_an_integer_from(COUNTS_FROM[field]))
    if field in NUMBERS:
        return never_none(not_a_number(NUMBERS[field]))
    if field in CHOICES:
        return never_none(none_of(CHOICES[field]))
    if field in OTHERS:
        return OTHERS[field]
    if kind is bool:
        return NOT_TRUE_OR_FALSE
    return never_none(NOT_TEXT) if kind is str else NOT_TEXT


def fault_of_error(cls, field, value):
    """What is wrong with how a class refuses a value, or None."""
    used = {"beta_schedule": "linear"} if field in ("beta_start", "beta_end") else {}  # by the others alone
    try:
        cls(**{field: value}, **used)
    except (ValueError, TypeError, FileNotFoundError) as error:
        return None if field in str(error) else f"{type(error).__name__} without its name for {value!r}: {error}"
    except Exception as error:
        return f"{type(error).__name__} for {value!r}: {error}"
    return f"no error for {value!r}"

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusers_rcfd import CFDDistillationConfig, ClassifierConfig, DataConfig, DiffusionConfig
from tests.invalid_options import all_fields, fault_of_error, invalid_value


@pytest.mark.parametrize(
    "options, message",
    [
        ({"temperature": [0.0]}, r"`temperature` must be in \(0, 1\], got 0.0"),
        ({"temperature": [1.1]}, r"`temperature` must be in \(0, 1\], got 1.1"),
        ({"temperature": 2.0}, r"`temperature` must be in \(0, 1\], got 2.0"),
        ({"temperature": [0.0], "dual_temperature": True}, "`temperature` must be above 0, got 0.0"),
        ({"temperature": ["5e-1"]}, r"`temperature` must be in \(0, 1\], got '5e-1'"),
        ({"entropy_ratio": [-0.1]}, r"`entropy_ratio` must be in \[0, 1\], got -0.1"),
        ({"entropy_ratio": [1.5]}, r"`entropy_ratio` must be in \[0, 1\], got 1.5"),
        ({"regularization_weight": [-1.0]}, "`regularization_weight` must be a number of at least 0, got -1.0"),
        ({"regularization_weight": [float("nan")]}, "`regularization_weight` must be a number of at least 0, got nan"),
        ({"preset": "vgg"}, r"`preset` must be one of \('resnet18', 'densenet201'\) or none, got 'vgg'"),
        ({"objective": ["kd"]}, r"`objective` must be one of \('pd', 'cfd', 'rcfd'\), got 'kd'"),
        ({"objective": ["pd", "cfd"]}, "`objective` must be one value, or one for each of the 3 rungs"),
        ({"temperature": [0.9, 0.8]}, "`temperature` must be one value, or one for each of the 3 rungs"),
        ({"student_steps": []}, "`student_steps` must be positive integers, one or more"),
        ({"student_steps": [4.0]}, "`student_steps` must be positive integers"),
        ({"teacher_steps": [0]}, "`teacher_steps` must be positive integers, got 0"),
        ({"max_train_steps": [10, 0, 10]}, "`max_train_steps` must be a positive integer, got 0"),
        (
            {"distribution": "pixels"},
            r"`distribution` must be one of \('features', 'predictions', 'spatial'\), got 'pixels'",
        ),
        ({"spatial_loss": "l2"}, "`spatial_loss` must be 'l1' or 'kl', got 'l2'"),
        ({"feature_stages": [0.5]}, r"`feature_stages` must be integers, one or more, got \[0.5\]"),
        ({"distribution": "spatial", "dual_temperature": True}, "`dual_temperature` must be False with 'spatial'"),
        ({"loss_weighting": "snr"}, "`loss_weighting` must be one of"),
        ({"cfd_weight": -1}, "`cfd_weight` must be at least 0, got -1"),
        ({"learning_rate": 0}, "`learning_rate` must be above 0, got 0"),
        ({"learning_rate": float("nan")}, "`learning_rate` must be above 0, got nan"),
        ({"train_batch_size": 0}, "`train_batch_size` must be a positive integer, got 0"),
        ({"train_batch_size": True}, "`train_batch_size` must be a positive integer, got True"),
        ({"gradient_accumulation_steps": -1}, "`gradient_accumulation_steps` must be a positive integer, got -1"),
        ({"checkpointing_steps": -1}, "`checkpointing_steps` must be an integer of at least 0, got -1"),
        ({"checkpoints_total_limit": 0}, "`checkpoints_total_limit` must be a positive integer, got 0"),
        ({"ema_decay": 1.0}, r"`ema_decay` must be in \[0, 1\), 0 for none, got 1.0"),
        ({"mixed_precision": "fp8"}, "`mixed_precision` must be one of .*, got 'fp8'"),
        ({"lr_scheduler": "step"}, "`lr_scheduler` must be one of .*, got 'step'"),
        ({"optimizer": "lion"}, "`optimizer` must be one of .*, got 'lion'"),
        ({"max_grad_norm": -1}, "`max_grad_norm` must be a number of at least 0, got -1"),
        ({"seed": -1}, "`seed` must be an integer of at least 0, got -1"),
    ],
)
def test_bad_distillation_options(options, message):
    with pytest.raises(ValueError, match=message):
        CFDDistillationConfig(**options)


@pytest.mark.parametrize(
    "config, options, message",
    [
        (DiffusionConfig, {"loss_weighting": "p2"}, "`loss_weighting` must be one of"),
        (DiffusionConfig, {"sample_inference_steps": 0}, "`sample_inference_steps` must be a positive integer"),
        (DiffusionConfig, {"max_train_steps": -5}, "`max_train_steps` must be a positive integer, got -5"),
        (ClassifierConfig, {"eval_fraction": 0}, r"`eval_fraction` must be in \(0, 1\), got 0"),
        (ClassifierConfig, {"label_smoothing": 1.0}, r"`label_smoothing` must be in \[0, 1\), got 1.0"),
        (ClassifierConfig, {"random_crop_padding": -1}, "`random_crop_padding` must be an integer of at least 0"),
        (DataConfig, {"channels": 4}, "`channels` must be 1 or 3, got 4"),
        (DataConfig, {"resolution": 0}, "`resolution` must be a positive integer, got 0"),
    ],
)
def test_bad_options_of_the_others(config, options, message):
    with pytest.raises(ValueError, match=message):
        config(**options)


@pytest.mark.parametrize("cls, field", all_fields(), ids=lambda value: getattr(value, "__name__", value))
@settings(max_examples=25)
@given(data=st.data())
def test_no_field_takes_an_invalid_value(cls, field, data):
    """Of every config and the scheduler; the error is a `ValueError` or `TypeError` that names the field."""
    value = data.draw(invalid_value(cls, field))
    assert fault_of_error(cls, field, value) is None


def test_presets_of_appendix_c4():
    rungs = CFDDistillationConfig(student_steps=[4, 2, 1]).rungs(8, 1024)
    settings = [(r.temperature, r.regularization_weight, r.entropy_ratio, r.max_train_steps) for r in rungs]
    assert settings == [(0.95, 0.003, 0.75, 10_000), (0.95, 0.003, 0.75, 20_000), (0.85, 0.003, 0.5, 20_000)]
    rungs = CFDDistillationConfig(preset="densenet201").rungs(8, 1024)
    assert [(r.temperature, r.regularization_weight) for r in rungs] == [(0.9, 0), (1.0, 0), (0.85, 0)]
    config = CFDDistillationConfig()
    assert (config.learning_rate, config.lr_scheduler, config.train_batch_size) == (5e-5, "cosine", 128)
    assert (config.max_grad_norm, config.ema_decay) == (1.0, 0.0)


def test_given_values_win_over_the_preset():
    rungs = CFDDistillationConfig(temperature=0.5, entropy_ratio=[0.1, 0.2, 0.3], max_train_steps=7).rungs(8, 1024)
    assert [r.temperature for r in rungs] == [0.5] * 3 and [r.entropy_ratio for r in rungs] == [0.1, 0.2, 0.3]
    assert [r.max_train_steps for r in rungs] == [7] * 3 and rungs[0].regularization_weight == 0.003


def test_the_whole_ladder_of_the_paper():
    steps = [2**k for k in range(9, -1, -1)]
    config = CFDDistillationConfig(student_steps=steps, objective=["pd"] * 7 + ["rcfd"] * 3)
    rungs = config.rungs(None, 1024)
    assert [r.name for r in rungs][:2] == ["512-step", "256-step"] and {r.teacher_steps for r in rungs} == {2}
    assert [r.max_train_steps for r in rungs] == [10_000] * 8 + [20_000] * 2
    assert [r.regularization_weight for r in rungs] == [0] * 7 + [0.003] * 3


def test_teacher_steps_follow_from_the_step_counts():
    rungs = CFDDistillationConfig(student_steps=[4, 1]).rungs(16, 1024)
    assert [r.teacher_steps for r in rungs] == [4, 4]
    rungs = CFDDistillationConfig(student_steps=[4, 1], teacher_steps=[8, 4]).rungs(None, 1024)
    assert [r.teacher_steps for r in rungs] == [8, 4]

import dataclasses
import json
import os
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusers_rcfd import (
    CFDDistillationConfig,
    ClassifierConfig,
    DataConfig,
    DiffusionConfig,
    SFDDistillationConfig,
)
from diffusers_rcfd.evaluation.config import EvaluationConfig
from tests.invalid_options import CLASSES, all_fields, fault_of_error, invalid_value

CONFIGS = [cls for cls in CLASSES if dataclasses.is_dataclass(cls)]
PATHS = ("output_dir", "resume_from_checkpoint", "dataset", "data_dir", "cache_dir", "feature_extractor",
         "inception_weights", "statistics_dir")  # fmt: skip
TEXT_FIELDS = [(cls, field) for cls, field in all_fields() if cls in CONFIGS and field in PATHS]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"temperature": [0.0]}, r"`temperature` must be in \(0, 1\], got 0.0"),
        ({"temperature": [1.1]}, r"`temperature` must be in \(0, 1\], got 1.1"),
        ({"temperature": 2.0}, r"`temperature` must be in \(0, 1\], got 2.0"),
        ({"temperature": [0.0], "dual_temperature": True}, "`temperature` must be above 0, got 0.0"),
        ({"temperature": ["half"]}, "`temperature` must be a finite number, got 'half'"),
        ({"temperature": [True]}, "`temperature` must be a finite number, got True"),
        ({"entropy_ratio": [-0.1]}, r"`entropy_ratio` must be in \[0, 1\], got -0.1"),
        ({"entropy_ratio": [1.5]}, r"`entropy_ratio` must be in \[0, 1\], got 1.5"),
        ({"regularization_weight": [-1.0]}, "`regularization_weight` must be a number of at least 0, got -1.0"),
        ({"regularization_weight": [float("nan")]}, "`regularization_weight` must be a finite number, got nan"),
        ({"preset": "vgg"}, r"`preset` must be one of \('resnet18', 'densenet201'\) or none, got 'vgg'"),
        ({"objective": ["kd"]}, r"`objective` must be one of \('pd', 'l1', 'cfd', 'rcfd'\), got 'kd'"),
        ({"objective": ["pd", "cfd"]}, "`objective` must be one value, or one for each of the 3 rungs"),
        ({"temperature": [0.9, 0.8]}, "`temperature` must be one value, or one for each of the 3 rungs"),
        ({"student_steps": []}, "`student_steps` must be positive integers, one or more"),
        ({"student_steps": [4.0]}, "`student_steps` must be an integer, got 4.0"),
        ({"student_steps": None}, "`student_steps` must be an integer, got None"),
        ({"teacher_steps": [0]}, "`teacher_steps` must be positive integers, got 0"),
        ({"max_train_steps": [10, 0, 10]}, "`max_train_steps` must be a positive integer, got 0"),
        (
            {"distribution": "pixels"},
            r"`distribution` must be one of \('features', 'predictions', 'spatial'\), got 'pixels'",
        ),
        ({"spatial_loss": "l2"}, r"`spatial_loss` must be one of \('l1', 'kl'\), got 'l2'"),
        ({"feature_stages": [0.5]}, "`feature_stages` must be an integer, got 0.5"),
        ({"distribution": "spatial", "dual_temperature": True}, "`dual_temperature` must be False with 'spatial'"),
        ({"loss_weighting": "snr"}, "`loss_weighting` must be one of"),
        ({"cfd_weight": -1}, "`cfd_weight` must be at least 0, got -1"),
        ({"learning_rate": 0}, "`learning_rate` must be above 0, got 0"),
        ({"learning_rate": float("nan")}, "`learning_rate` must be a finite number, got nan"),
        ({"train_batch_size": 0}, "`train_batch_size` must be a positive integer, got 0"),
        ({"train_batch_size": True}, "`train_batch_size` must be an integer, got True"),
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
        (DataConfig, {"channels": 4}, r"`channels` must be 1 \(grey\) or 3 \(RGB\), got 4"),
        (DataConfig, {"resolution": 0}, "`resolution` must be a positive integer of at most 8192, got 0"),
        (DataConfig, {"resolution": 100_000}, "`resolution` must be a positive integer of at most 8192, got 100000"),
        (DataConfig, {"dataset": ""}, "`dataset` must be a name that is not empty, got ''"),
    ],
)
def test_bad_options_of_the_others(config, options, message):
    with pytest.raises(ValueError, match=message):
        config(**options)


def test_output_dir_that_is_a_file(tmp_path):
    (tmp_path / "run").write_text("no folder")
    with pytest.raises(ValueError, match="`output_dir` must be a folder, not a file, got .*run"):
        DiffusionConfig(tmp_path / "run")


def test_checkpoint_is_also_looked_for_in_the_output_dir(tmp_path, monkeypatch):
    (tmp_path / "run" / "checkpoint-3").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)

    def resumed_from(name):
        return DiffusionConfig("run", resume_from_checkpoint=name).resume_from_checkpoint

    assert resumed_from("checkpoint-3") == os.path.join("run", "checkpoint-3")
    assert resumed_from("run/checkpoint-3") == "run/checkpoint-3"
    assert resumed_from("latest") == "latest"
    assert resumed_from("checkpoint-4") == "checkpoint-4"  # which is refused where the run begins
    assert resumed_from(None) is None


def test_values_become_those_of_a_recipe(tmp_path):
    """Paths, numpy's numbers and text from YAML give the config that plain values give, and its JSON."""
    given = CFDDistillationConfig(
        tmp_path / "run",
        student_steps=np.array([4, 2]),
        teacher_steps=(2, np.int64(2)),
        objective="cfd",
        temperature=["9e-1", np.float64(0.85)],
        regularization_weight="3e-3",
        max_train_steps=np.int32(5),
        learning_rate="1e-4",
        ema_decay=np.float32(0.5),
        train_batch_size=np.uint8(4),
    )
    plain = CFDDistillationConfig(
        str(tmp_path / "run"),
        student_steps=[4, 2],
        teacher_steps=[2, 2],
        objective=["cfd"],
        temperature=[0.9, 0.85],
        regularization_weight=[0.003],
        max_train_steps=[5],
        learning_rate=1e-4,
        ema_decay=0.5,
        train_batch_size=4,
    )
    assert json.dumps(asdict(given)) == json.dumps(asdict(plain))
    sfd = SFDDistillationConfig(nodes=("80", 3, np.float64(0.5)), student_steps=np.int64(2), teacher_steps=(4,))
    assert sfd.nodes == [80.0, 3.0, 0.5] and sfd.student_steps == [1] and sfd.teacher_steps == [4]
    assert EvaluationConfig(metrics="kid").metrics == ["kid"]


@pytest.mark.parametrize("cls, field", TEXT_FIELDS, ids=lambda value: getattr(value, "__name__", value))
def test_every_path_may_be_path_like_and_begin_with_the_home(cls, field, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for value in (tmp_path / "here", "~/here", Path("~/here")):
        assert getattr(cls(**{field: value}), field) == str(tmp_path / "here")


@pytest.mark.parametrize("cls", CONFIGS)
def test_docstring_describes_each_option_with_its_help(cls):
    documented = " ".join(cls.__doc__.split())
    for field in dataclasses.fields(cls):
        assert f"{field.name} (`" in documented
        assert " ".join(field.metadata["help"].split()) in documented
    first = next(iter(cls.__annotations__))
    assert cls.__doc__.split("Args:\n")[1].startswith(f"    {first} (`")
    assert max(map(len, cls.__doc__.splitlines())) < 120


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

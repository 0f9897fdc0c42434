"""What a run is made by: what differs is refused by name, or recorded from the step on from which it does."""

import json
from dataclasses import fields, replace

import pytest
import torch

from diffusers_rcfd import (
    CFDDistillationConfig,
    CFDDistillationTrainer,
    ClassifierConfig,
    ClassifierTrainer,
    DiffusionConfig,
    DiffusionTrainer,
    RCFDScheduler,
    SFDDistillationConfig,
    SFDDistillationTrainer,
    load_image_data,
)
from diffusers_rcfd.saving import read_checked, write_checked
from diffusers_rcfd.trainers.checkpoints import STATE_FILE, find_changes, find_fault
from diffusers_rcfd.trainers.run_record import PLACES
from tests.toys import tiny_classifier, tiny_teacher, tiny_unet

SHARED = {"train_batch_size": 4, "logging_steps": 1, "checkpointing_steps": 1, "learning_rate": 1e-3}
CONFIGS = {
    "base": DiffusionConfig(**SHARED, max_train_steps=2, lr_warmup_steps=0, ema_decay=0.9),
    "classifier": ClassifierConfig(**SHARED, max_train_steps=2),
    "ladder": CFDDistillationConfig(
        **SHARED, max_train_steps=[2], student_steps=[2], temperature=[0.9], regularization_weight=[0.01],
        entropy_ratio=[0.5], teacher_steps=[2],
    ),
    "sfd": SFDDistillationConfig(**SHARED, max_train_steps=2, objective="rcfd", student_steps=[2], sigma_max=70.0),
}  # fmt: skip
OTHER = {
    "lr_scheduler": "linear", "optimizer": "adamw", "mixed_precision": "bf16", "report_to": "tensorboard",
    "hub_model_id": "other", "hub_strategy": "checkpoint", "best_metric": "kid", "loss_weighting": "x",
    "distribution": "predictions", "spatial_loss": "kl", "feature_stages": [0], "student_steps": [4],
    "teacher_steps": [3], "teacher_solver": "euler", "preset": "densenet201", "temperature": [0.8], "solver_order": 2,
    "terms": ["l1=1"], "source": "other",
    "regularization_weight": [0.02], "entropy_ratio": [0.25], "nodes": [70.0, 10.0, 1.0, 0.006],
}  # fmt: skip


@pytest.fixture(scope="module")
def digits():
    return load_image_data(max_images=32)


def trainer(kind, config, digits, seed=0, classifier_seed=0):
    teacher = tiny_teacher(seed=seed)
    if kind == "base":
        return DiffusionTrainer(tiny_unet(), RCFDScheduler(), config, digits)
    torch.manual_seed(classifier_seed)
    classifier = tiny_classifier()
    if kind == "classifier":
        return ClassifierTrainer(classifier, config, digits)
    if kind == "ladder":
        return CFDDistillationTrainer(teacher, classifier.eval(), config, digits)
    return SFDDistillationTrainer(teacher, classifier.eval(), config)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, digits):
    """A folder for each kind of run, of two steps with a checkpoint after each."""
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in CONFIGS}
    for kind, config in CONFIGS.items():
        trainer(kind, replace(config, output_dir=str(folders[kind])), digits).train()
    return folders


def other_value(kind, name, value):
    """Another value of an option, that is allowed."""
    if name == "teacher_steps" and kind == "ladder":
        return [4]
    if name in ("temperature", "regularization_weight", "entropy_ratio") and kind == "sfd":
        return OTHER[name][0]
    if name in OTHER:
        return OTHER[name]
    if isinstance(value, list):
        return [each + 1 for each in value] if name == "max_train_steps" else ["pd"]
    if name == "objective":
        return "cfd"
    return not value if isinstance(value, bool) else value + 1 if isinstance(value, int) else value * 0.5 + 0.1


def with_another(config, kind, name):
    """The config with another value of an option, and what that needs."""
    needed = {"load_best_model_at_end": {"eval_steps": 1}, "lr_warmup_steps": {"lr_scheduler": "linear"},
              "nodes": {"student_steps": [2]}}.get(name, {})  # fmt: skip
    return replace(config, **needed | {name: other_value(kind, name, getattr(config, name))})


# SFD is trained on noise, not on images; here all that a preset gives is given by hand.
NOT_TAKEN = {"sfd": ("random_flip", "dataloader_num_workers"), "ladder": ("preset",)}


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_option_that_differs_is_refused_by_name_or_recorded(runs, digits, kind):
    """Of a run in its first step. This is more than 100 changed settings over the four trainers."""
    checkpoint, config = runs[kind] / "checkpoint-1", CONFIGS[kind]
    for name in [field.name for field in fields(config)]:
        if name in PLACES or name in NOT_TAKEN.get(kind, ()):
            continue
        run = trainer(kind, CONFIGS[kind], digits)
        run.config = with_another(config, kind, name)
        if kind == "ladder":
            run.rungs = run.config.rungs(None, 1024)
        if kind == "sfd":
            run.routes = [run._route(N) for N in run.config.student_steps]
        made_by = run.made_by()
        fault, changes = find_fault(checkpoint, made_by), find_changes(checkpoint, made_by)
        was, now = getattr(config, name), getattr(run.config, name)
        if fault is None:
            assert name in changes, f"{name}: {was} -> {now} is mixed in silently"
        elif name != "student_steps":  # of which the message shows what follows from them
            values = [str(each[0] if isinstance(each, list) and name != "nodes" and kind == "ladder" else each)
                      for each in (was, now)]  # fmt: skip
            assert f"its {name}" in fault, (name, fault)
            # Nodes are shown as indices of the schedule, a batch as that of all processes.
            assert all(value in fault for value in values) or name in ("train_batch_size", "nodes"), (name, fault)


def test_other_weights_and_other_data_are_refused(runs, digits):
    for kind in ("ladder", "sfd"):
        checkpoint = runs[kind] / "checkpoint-1"
        assert find_fault(checkpoint, trainer(kind, CONFIGS[kind], digits).made_by()) is None
        fault = find_fault(checkpoint, trainer(kind, CONFIGS[kind], digits, seed=1).made_by())
        assert "its fingerprint of the teacher is " in fault
        fault = find_fault(checkpoint, trainer(kind, CONFIGS[kind], digits, classifier_seed=1).made_by())
        assert "its fingerprint of the classifier is " in fault
    others = load_image_data(max_images=32, seed=1)
    for kind in ("base", "classifier", "ladder"):
        fault = find_fault(runs[kind] / "checkpoint-1", trainer(kind, CONFIGS[kind], others).made_by())
        assert "its fingerprint of the data is " in fault


def test_as_many_images_a_batch_on_other_processes_are_the_same_run(runs, digits):
    made_by = trainer("base", replace(CONFIGS["base"], train_batch_size=2), digits).made_by()
    made_by["options"]["train_batch_size of all processes"] *= 2
    made_by["may_change"]["num_processes"] = 2
    checkpoint = runs["base"] / "checkpoint-1"
    assert find_fault(checkpoint, made_by) is None
    assert find_changes(checkpoint, made_by) == {"train_batch_size": (4, 2), "num_processes": (1, 2)}


def test_what_may_change_is_recorded_from_the_step_on(tmp_path, digits):
    """Among them the number of steps, where the schedule does not depend on it."""
    config = replace(CONFIGS["base"], output_dir=str(tmp_path), lr_scheduler="constant", checkpoints_total_limit=9)
    trainer("base", config, digits).train()
    first = str(tmp_path / "checkpoint-1")
    more = replace(config, resume_from_checkpoint=first, max_train_steps=3, logging_steps=2)
    trainer("base", more, digits).train()
    record = json.loads((tmp_path / "run.json").read_text())
    changes = [{"step": 1, "name": "logging_steps", "was": 1, "is": 2},
               {"step": 1, "name": "max_train_steps", "was": 2, "is": 3}]  # fmt: skip
    assert record["changes"] == changes
    assert record["config"]["max_train_steps"] == 2 and record["config"]["logging_steps"] == 1
    # From the checkpoint before that change another time: it did not happen.
    trainer("base", replace(config, resume_from_checkpoint=first), digits).train()
    assert json.loads((tmp_path / "run.json").read_text())["changes"] == []
    finished = replace(config, resume_from_checkpoint="latest", max_train_steps=4)
    with pytest.raises(ValueError, match="its max_train_steps is 2, not 4"):  # there is nothing to go on from
        trainer("base", finished, digits).train()


def test_other_options_do_not_pass_over_to_an_earlier_checkpoint(runs, digits):
    config = replace(CONFIGS["base"], output_dir=str(runs["base"]), resume_from_checkpoint="latest", seed=5)
    record = (runs["base"] / "run.json").read_bytes()
    with pytest.raises(ValueError, match="checkpoint-2 is of another run: its seed is 0, not 5. `overwrite"):
        trainer("base", config, digits).train()
    assert (runs["base"] / "run.json").read_bytes() == record


def test_checkpoint_of_version_01_is_taken_and_named(tmp_path, digits, caplog):
    """It has no options and no fingerprints, which are then those of the run that goes on."""
    config = replace(CONFIGS["ladder"], output_dir=str(tmp_path))
    trainer("ladder", config, digits).train()
    (tmp_path / "made.json").unlink()
    state = read_checked(tmp_path / "checkpoint-1" / STATE_FILE)
    for name in ("options", "may_change", "fingerprints", "rungs"):
        del state["made_by"][name]
    for name in ("taken", "skipped_in_a_row"):
        del state[name]
    write_checked(tmp_path / "checkpoint-1" / STATE_FILE, state)
    again = replace(config, resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    trainer("ladder", again, digits).train()
    assert "checkpoint-1 is of version 0.1: its options, data and teacher are taken as unchanged" in caplog.text


def test_damaged_record_is_named_and_made_again(tmp_path, digits):
    config = replace(CONFIGS["base"], output_dir=str(tmp_path))
    trainer("base", config, digits).train()
    (tmp_path / "run.json").write_text('{"config": {')
    with pytest.warns(UserWarning, match="run.json' is damaged and not used"):
        trainer("base", replace(config, resume_from_checkpoint="latest"), digits).train()
    assert json.loads((tmp_path / "run.json").read_text())["config"]["max_train_steps"] == 2

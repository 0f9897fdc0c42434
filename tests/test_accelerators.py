"""Settings of Accelerate: those of a launcher, and those of several trainers in one process."""

import json

import pytest
import torch
from diffusers.utils.logging import disable_propagation, enable_propagation

from diffusers_rcfd import CFDDistillationConfig, CFDDistillationTrainer, DiffusionConfig, load_image_data
from tests.toys import parameters, tiny_teacher


@pytest.fixture(scope="module")
def digits():
    return load_image_data(max_images=64)


def trainer(folder, digits, **options):
    defaults = {"student_steps": [1], "objective": ["pd"], "max_train_steps": [2], "train_batch_size": 8,
                "logging_steps": 1, "checkpointing_steps": 0, "learning_rate": 1e-3}  # fmt: skip
    config = CFDDistillationConfig(str(folder), **defaults | options)
    return CFDDistillationTrainer(tiny_teacher(), None, config, digits)


def test_two_trainers_of_one_process_keep_their_settings_in_either_order(tmp_path, digits):
    settings = {"plain": {}, "other": {"mixed_precision": "bf16", "gradient_accumulation_steps": 2,
                                       "train_batch_size": 4}}  # fmt: skip
    alone = {name: parameters(trainer(tmp_path / f"alone-{name}", digits, **own).train().unet)
             for name, own in settings.items()}  # fmt: skip
    assert not torch.equal(alone["plain"], alone["other"])
    for first, second in (("plain", "other"), ("other", "plain")):
        made = {
            name: trainer(tmp_path / f"{first}-first-{name}", digits, **settings[name]) for name in (first, second)
        }
        for name, run in made.items():
            assert torch.equal(parameters(run.train().unet), alone[name])
            assert run.accelerator.mixed_precision == settings[name].get("mixed_precision", "no")


def test_what_the_launcher_says_is_taken_or_contradicted_by_name(tmp_path, digits, monkeypatch, caplog):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    assert DiffusionConfig().mixed_precision == "bf16" and DiffusionConfig().gradient_accumulation_steps == 2
    trainer(tmp_path / "taken", digits).train()
    ran = json.loads((tmp_path / "taken/run.json").read_text())["config"]
    assert ran["mixed_precision"] == "bf16" and ran["gradient_accumulation_steps"] == 2
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    enable_propagation()
    try:
        run = trainer(tmp_path / "contradicted", digits, mixed_precision="no", gradient_accumulation_steps=1)
    finally:
        disable_propagation()
    assert run.accelerator.mixed_precision == "no"
    for words in ("`mixed_precision`=no is used, not bf16", "`gradient_accumulation_steps`=1 is used, not 2",
                  "dynamo backend 'inductor' is not used"):  # fmt: skip
        assert words in caplog.text
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(ValueError, match="`mixed_precision` must be one of .* got 'fp8'"):
        DiffusionConfig()

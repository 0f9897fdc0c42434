"""Model cards, and what version 0.1 wrote of them and of models: see `saved_by_0_1/make.py`."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from diffusers_rcfd import (
    CFDDistillationConfig,
    CFDDistillationTrainer,
    ClassifierConfig,
    ClassifierTrainer,
    DiffusionConfig,
    DiffusionTrainer,
    FeatureClassifier,
    RCFDPipeline,
    RCFDScheduler,
    SFDDistillationConfig,
    SFDDistillationTrainer,
    load_image_data,
)
from diffusers_rcfd.distillation.rungs import Rung
from diffusers_rcfd.hub.model_card import (
    Classifier,
    Generator,
    Training,
    create_model_card,
    describe_generator,
    write_classifier_card,
    write_model_card,
    write_pipeline_card,
)
from diffusers_rcfd.trainers.checkpoints import write_json
from tests.saved_by_0_1.described import MADE_ELSEWHERE, RUNGS, evaluation
from tests.toys import tiny_sfd_student, tiny_teacher, tiny_unet

SAVED = Path(__file__).parent / "saved_by_0_1"
PIPELINES = ("base", "student", "conditional", "sfd")
LADDER = [Rung(*rung) for rung in RUNGS]


# --- what version 0.1 saved ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def outputs():
    with np.load(SAVED / "outputs.npz") as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays}


@pytest.mark.parametrize(
    "name, steps, result",
    [("base", 4, "base"), ("student", None, "student"), ("conditional", None, "conditional"), ("sfd", None, "sfd"),
     ("sfd", 2, "sfd-2")],
)  # fmt: skip
def test_pipelines_of_0_1_give_equal_images(outputs, name, steps, result):
    pipeline = RCFDPipeline.from_pretrained(SAVED / name)
    labels = [0, 3, 9] if name == "conditional" else None
    images = pipeline(3, steps, latents=outputs["latents"], class_labels=labels, output_type="pt").images
    torch.testing.assert_close(images, outputs[result], rtol=0, atol=1e-6)


def test_code_carried_by_a_pipeline_of_0_1_gives_equal_images(outputs):
    pipeline = DiffusionPipeline.from_pretrained(
        SAVED / "student", custom_pipeline=str(SAVED / "student"), trust_remote_code=True
    )
    assert type(pipeline).__module__.startswith("diffusers_modules.")
    images = pipeline(3, latents=outputs["latents"], output_type="pt").images
    torch.testing.assert_close(images, outputs["student"], rtol=0, atol=1e-6)


@torch.no_grad()
def test_classifier_of_0_1_gives_equal_logits(outputs):
    output = FeatureClassifier.from_pretrained(str(SAVED / "classifier"))(outputs["images"])
    torch.testing.assert_close(output.logits, outputs["logits"], rtol=0, atol=1e-5)
    torch.testing.assert_close(output.features, outputs["features"], rtol=0, atol=1e-5)


# --- the cards that version 0.1 wrote --------------------------------------------------------------------------


def as_before(name):
    """A card of version 0.1 with all that has been changed since: where several lines were empty, one is."""
    text = (SAVED / "cards" / f"{name}.md").read_text(encoding="utf-8")
    return without_versions(re.sub(r"\n{3,}", "\n\n", text))


def without_versions(text):
    return re.sub(r"^- Python 3.*", "- versions", str(text), flags=re.MULTILINE)


def stock_calls(pipeline):
    return describe_generator(pipeline, "").stock_calls


def generators():
    """What the cards are of: model, training, evaluations."""
    base = Training(128, 5e-5)
    sfd = {"seconds": 59.6, "teacher": "you/base"}
    several = Generator("anna/sfd", [2, 3], True, stock_calls=stock_calls(tiny_sfd_student()))
    conditional = tiny_sfd_student(num_class_embeds=20)
    ladder = Training(128, 5e-5, "rcfd", LADDER, "you/base", "anna/digits", "resnet18", seconds=3725)
    return {
        "base": (Generator("anna/base"), Training(64, 2e-4, dataset="anna/digits"), {}),
        "base-evaluated": (Generator("anna/base"), Training(128, 5e-5, seconds=86400), {64: evaluation(3.5)}),
        "base-conditional": (Generator("anna/base", num_classes=10), Training(128, 5e-5, dataset="digits"), {}),
        "base-epsilon": (Generator("anna/base", prediction_type="epsilon"),
                         Training(128, 5e-5, dataset="/data/images"), {}),
        "base-v": (Generator("anna/base", prediction_type="v_prediction"), base, {}),
        "base-data-std": (Generator("anna/base", data_std=0.5), base, {}),
        "ladder": (Generator("anna/two", [2]), ladder, {2: evaluation(3.5), 4: evaluation(2.25)}),
        "ladder-pd": (Generator("anna/four", [4]),
                      Training(128, 5e-5, "pd", LADDER[:1], "/data/base", "/data/images"), {}),
        "ladder-one-step": (Generator("anna/one", [1], num_classes=10),
                            Training(128, 5e-5, "cfd", [Rung(1, 1024, "cfd", 1, 0, 1, 9)]), {}),
        "sfd-one": (Generator("anna/one", [1], True), Training(256, 1e-4, "l1", **sfd), {1: evaluation(9.0)}),
        "sfd-several": (several, Training(256, 1e-4, "l1", **sfd), {}),
        "sfd-rcfd": (several, Training(256, 1e-4, "rcfd", classifier="resnet18", dataset="anna/digits", **sfd),
                     {3: evaluation(2.0), 2: evaluation(4.0)}),
        "sfd-conditional": (Generator("anna/sfd", [2, 3], True, 10, stock_calls=stock_calls(conditional)),
                            Training(256, 1e-4, "cfd", **sfd), {}),
    }  # fmt: skip


def test_cards_are_those_of_0_1(tmp_path):
    for name, (model, training, evaluations) in generators().items():
        card = create_model_card(model, training, evaluations)
        assert without_versions(card) == as_before(name), name
    write_model_card(tmp_path, *generators()["ladder"])
    results = (tmp_path / ".eval_results/diffusers_rcfd.yaml").read_text()
    assert results == (SAVED / "cards/ladder.eval_results.yaml").read_text()
    write_classifier_card(tmp_path, Classifier("anna/classifier", "resnet18", "anna/digits", 0.98765))
    assert (tmp_path / "README.md").read_text() == as_before("classifier")
    write_classifier_card(tmp_path, Classifier("anna/classifier", "resnet18"))
    assert (tmp_path / "README.md").read_text() == as_before("classifier-unmeasured")


def test_merged_cards_are_those_of_0_1():
    merged = create_model_card(*generators()["ladder"], MADE_ELSEWHERE)
    assert without_versions(merged) == as_before("merged-foreign")
    own = (SAVED / "cards/base.md").read_text()
    own = own.replace("# base", "# My base\n\nHand-made words.").replace("apache-2.0", "mit") + "\nMore words.\n"
    assert without_versions(create_model_card(*generators()["ladder"], own)) == as_before("merged-own")


@pytest.mark.parametrize("name", PIPELINES)
def test_pipeline_cards_are_those_of_0_1(name, tmp_path):
    pipeline = RCFDPipeline.from_pretrained(SAVED / name)
    pipeline.set_progress_bar_config(disable=True)
    write_pipeline_card(pipeline, tmp_path, "anna/pushed")
    assert (tmp_path / "README.md").read_text() == as_before(f"pipeline-{name}")
    assert (tmp_path / "samples.png").stat().st_size > 100


def test_cards_of_trainers_are_those_of_0_1(tmp_path):
    options = {"output_dir": str(tmp_path), "num_sample_images": 4, "train_batch_size": 8}
    data, classifier = load_image_data(max_images=32), FeatureClassifier.from_pretrained(str(SAVED / "classifier"))
    write_json(tmp_path / "evaluation.json", {2: evaluation(3.5), 3: evaluation(2.5)})

    def card_of(trainer, folder=tmp_path):
        trainer.state.seconds, trainer.repo_id = 3725, "anna/trained"
        trainer.create_model_card(folder)
        return without_versions((folder / "README.md").read_text())

    config = DiffusionConfig(sample_inference_steps=2, **options)
    trainer = DiffusionTrainer(tiny_unet(), RCFDScheduler(), config, data)
    assert card_of(trainer) == as_before("trained-base")

    ladder = {"student_steps": [4, 2], "objective": ["pd", "cfd"], "max_train_steps": [7, 8]}
    config = CFDDistillationConfig(**ladder, **options, gradient_accumulation_steps=2)
    trainer = CFDDistillationTrainer(tiny_teacher(), classifier, config, data)
    tiny_teacher(2).save_pretrained(tmp_path / "2-step")
    assert card_of(trainer, tmp_path / "2-step") == as_before("trained-ladder")

    config = SFDDistillationConfig(student_steps=[2, 3], objective="rcfd", **options)
    trainer = SFDDistillationTrainer(tiny_teacher(), classifier, config)
    tiny_sfd_student().save_pretrained(tmp_path)
    assert card_of(trainer) == as_before("trained-sfd")

    trainer = ClassifierTrainer(classifier, ClassifierConfig(**options), data)
    trainer.accuracy = 0.5
    assert card_of(trainer) == as_before("trained-classifier")

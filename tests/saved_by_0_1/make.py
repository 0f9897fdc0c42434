"""Made the files of this folder, with version 0.1 and its `tests`: `PYTHONPATH=<checkout of 0.1> python make.py`.

Pipelines and a classifier with random weights, what they give for the noise in `outputs.npz`, and the cards that
version 0.1 wrote. Offline, so that no card is looked for on the Hub.
"""

import json
import os
import shutil
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import torch

import diffusers_rcfd
from diffusers_rcfd import (
    CFDDistillationConfig,
    CFDDistillationTrainer,
    ClassifierConfig,
    ClassifierTrainer,
    DiffusionConfig,
    DiffusionTrainer,
    FeatureClassifier,
    RCFDScheduler,
    SFDDistillationConfig,
    SFDDistillationTrainer,
    load_image_data,
)
from diffusers_rcfd.cfd_config import Rung
from diffusers_rcfd.model_card import (
    RunDescription,
    classifier_card,
    create_model_card,
    write_model_card,
    write_pipeline_card,
)
from tests.toys import tiny_sfd_student, tiny_teacher, tiny_unet

from described import MADE_ELSEWHERE, RUNGS, evaluation  # isort: skip

HERE = Path(__file__).parent
SMALL = {"block_out_channels": (4, 4)}
LADDER = [Rung(*rung) for rung in RUNGS]


def save_models():
    """Each pipeline in a folder of its own, by name, and what it gives for some noise."""
    torch.manual_seed(0)
    outputs = {"latents": torch.randn(3, 1, 8, 8), "images": torch.rand(3, 1, 8, 8) * 2 - 1}
    calls = {
        "base": (tiny_teacher(**SMALL), {"num_inference_steps": 4}),
        "student": (tiny_teacher(4, seed=1, **SMALL), {}),
        "conditional": (tiny_teacher(2, seed=2, num_class_embeds=10, **SMALL), {"class_labels": [0, 3, 9]}),
        "sfd": (tiny_sfd_student(**SMALL), {}),
    }
    for name, (pipeline, call) in calls.items():
        pipeline.save_pretrained(HERE / name)
        if name != "student":  # 50 kB of the same code
            (HERE / name / "pipeline.py").unlink()
        outputs[name] = pipeline(3, latents=outputs["latents"], output_type="pt", **call).images
    outputs["sfd-2"] = calls["sfd"][0](3, 2, latents=outputs["latents"], output_type="pt").images
    classifier = FeatureClassifier(
        in_channels=1, small_stem=True, backbone_config={"channels": (8, 8, 16, 16), "layers": (1, 1, 1, 1)}
    ).eval()
    classifier.save_pretrained(HERE / "classifier")
    with torch.no_grad():
        outputs |= {"logits": (output := classifier(outputs["images"])).logits, "features": output.features}
    np.savez_compressed(HERE / "outputs.npz", **{name: value.numpy() for name, value in outputs.items()})
    return {name: pipeline for name, (pipeline, _) in calls.items()}, classifier


def stock_calls(pipeline):
    return {N: pipeline.stock_call(N) for N in sorted(pipeline.scheduler.trained_steps, reverse=True)}


def described():
    """What `RunDescription` was given, by the name of the card."""
    sfd = {"training_seconds": 59.6, "teacher": "you/base", "train_batch_size": 256, "learning_rate": 1e-4}
    one = {"network_evaluations": [1], "objective": "l1"} | sfd
    several = {"network_evaluations": [2, 3], "stock_calls": stock_calls(tiny_sfd_student())} | sfd
    both = {"stock_calls": stock_calls(tiny_sfd_student(num_class_embeds=20)), "num_classes": 10}
    return {
        "base": RunDescription("anna/base", [], dataset="anna/digits", train_batch_size=64, learning_rate=2e-4),
        "base-evaluated": RunDescription("anna/base", [], evaluations={64: evaluation(3.5)}, training_seconds=86400),
        "base-conditional": RunDescription("anna/base", [], dataset="digits", num_classes=10),
        "base-epsilon": RunDescription("anna/base", [], dataset="/data/images", prediction_type="epsilon"),
        "base-v": RunDescription("anna/base", [], prediction_type="v_prediction"),
        "base-data-std": RunDescription("anna/base", [], data_std=0.5),
        "ladder": RunDescription("anna/two", LADDER, "you/base", "anna/digits", "resnet18", training_seconds=3725,
                                 evaluations={2: evaluation(3.5), 4: evaluation(2.25)}),
        "ladder-pd": RunDescription("anna/four", LADDER[:1], "/data/base", "/data/images"),
        "ladder-one-step": RunDescription("anna/one", [Rung(1, 1024, "cfd", 1, 0, 1, 9)], num_classes=10),
        "sfd-one": RunDescription("anna/one", [], evaluations={1: evaluation(9.0)}, **one),
        "sfd-several": RunDescription("anna/sfd", [], objective="l1", **several),
        "sfd-rcfd": RunDescription("anna/sfd", [], classifier="resnet18", objective="rcfd", dataset="anna/digits",
                                   evaluations={3: evaluation(2.0), 2: evaluation(4.0)}, **several),
        "sfd-conditional": RunDescription("anna/sfd", [], objective="cfd", **several | both),
    }  # fmt: skip


def write_cards(pipelines, classifier, folder):
    """Each card as a file of `cards`."""
    cards = {name: create_model_card(run) for name, run in described().items()}
    merged = described()["ladder"]
    cards["merged-foreign"] = create_model_card(merged, MADE_ELSEWHERE)
    own = cards["base"].content.replace("# base", "# My base\n\nHand-made words.").replace("apache-2.0", "mit")
    cards["merged-own"] = create_model_card(merged, own + "\nMore words.\n")
    for name, pipeline in pipelines.items():
        write_pipeline_card(pipeline, folder, "anna/pushed")
        cards[f"pipeline-{name}"] = (folder / "README.md").read_text()
    cards["classifier"] = classifier_card("anna/classifier", "resnet18", "anna/digits", 0.98765)
    cards["classifier-unmeasured"] = classifier_card("anna/classifier", "resnet18", None, None)
    cards |= {f"trained-{name}": text for name, text in trained_cards(classifier, folder)}
    for name, card in cards.items():
        (HERE / "cards" / f"{name}.md").write_text(str(card))
    write_model_card(folder, described()["ladder"])
    shutil.copy(folder / ".eval_results" / "diffusers_rcfd.yaml", HERE / "cards" / "ladder.eval_results.yaml")


def trained_cards(classifier, folder):
    """The cards that trainers write of models that have not been trained."""
    options = {"output_dir": str(folder), "num_sample_images": 4, "train_batch_size": 8}
    data = load_image_data(max_images=32)
    (folder / "evaluation.json").write_text(json.dumps({2: evaluation(3.5), 3: evaluation(2.5)}))

    def card_of(trainer, folder):
        trainer.state.seconds, trainer.repo_id = 3725, "anna/trained"
        trainer.create_model_card(folder)
        return (folder / "README.md").read_text()

    trainer = DiffusionTrainer(
        tiny_unet(), RCFDScheduler(), DiffusionConfig(sample_inference_steps=2, **options), data
    )
    yield "base", card_of(trainer, folder)
    ladder = {"student_steps": [4, 2], "objective": ["pd", "cfd"], "max_train_steps": [7, 8]}
    trainer = CFDDistillationTrainer(
        tiny_teacher(), classifier, CFDDistillationConfig(**ladder, **options, gradient_accumulation_steps=2), data
    )
    tiny_teacher(2).save_pretrained(folder / "2-step")
    yield "ladder", card_of(trainer, folder / "2-step")
    config = SFDDistillationConfig(student_steps=[2, 3], objective="rcfd", **options)
    trainer = SFDDistillationTrainer(tiny_teacher(), classifier, config)
    tiny_sfd_student().save_pretrained(folder)
    yield "sfd", card_of(trainer, folder)
    trainer = ClassifierTrainer(classifier, ClassifierConfig(**options), data)
    trainer.accuracy = 0.5
    yield "classifier", card_of(trainer, folder)


if __name__ == "__main__":
    assert diffusers_rcfd.__version__ == "0.1.0"
    (HERE / "cards").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        write_cards(*save_models(), Path(folder))

"""Model cards, and what version 0.1 wrote of them and of models: see `saved_by_0_1/make.py`."""

import ast
import html
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard

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
from diffusers_rcfd.distillation.objectives import OBJECTIVES, Weights
from diffusers_rcfd.distillation.rungs import Rung
from diffusers_rcfd.hub.model_card import (
    BEGIN,
    END,
    ClassifierRecord,
    GeneratorRecord,
    TrainingRecord,
    create_model_card,
    describe_generator,
    write_classifier_card,
    write_model_card,
    write_pipeline_card,
)
from diffusers_rcfd.hub.public_names import is_hub_id, markdown_code, markdown_text, public_name, remove_local_names
from diffusers_rcfd.saving import write_json
from tests.saved_by_0_1.described import MADE_ELSEWHERE, RUNGS, evaluation
from tests.toys import tiny_sfd_student, tiny_teacher, tiny_unet

SAVED = Path(__file__).parent / "saved_by_0_1"
PIPELINES = ("base", "student", "conditional", "sfd")


def as_rung(*values):
    """A rung with the terms of its objective, of which version 0.1 did not know."""
    return Rung(*values, terms=tuple(OBJECTIVES[values[2]](Weights()).items()))


LADDER = [as_rung(*rung) for rung in RUNGS]


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
    base = TrainingRecord(128, 5e-5)
    guided = {"is_guided": True}
    sfd = {"seconds": 59.6, "teacher": "you/base"}
    several = GeneratorRecord("anna/sfd", [2, 3], True, stock_calls=stock_calls(tiny_sfd_student()))
    conditional = tiny_sfd_student(num_class_embeds=20)
    ladder = TrainingRecord(128, 5e-5, "rcfd", LADDER, "you/base", "anna/digits", "resnet18", True, seconds=3725)
    return {
        "base": (GeneratorRecord("anna/base"), TrainingRecord(64, 2e-4, dataset="anna/digits"), {}),
        "base-evaluated": (GeneratorRecord("anna/base"), TrainingRecord(128, 5e-5, seconds=86400),
                           {64: evaluation(3.5)}),
        "base-conditional": (GeneratorRecord("anna/base", num_classes=10),
                             TrainingRecord(128, 5e-5, dataset="digits"), {}),
        "base-epsilon": (GeneratorRecord("anna/base", prediction_type="epsilon"),
                         TrainingRecord(128, 5e-5, dataset="/data/images"), {}),
        "base-v": (GeneratorRecord("anna/base", prediction_type="v_prediction"), base, {}),
        "base-data-std": (GeneratorRecord("anna/base", data_std=0.5), base, {}),
        "ladder": (GeneratorRecord("anna/two", [2]), ladder, {2: evaluation(3.5), 4: evaluation(2.25)}),
        "ladder-pd": (GeneratorRecord("anna/four", [4]),
                      TrainingRecord(128, 5e-5, "pd", LADDER[:1], "/data/base", "/data/images"), {}),
        "ladder-one-step": (GeneratorRecord("anna/one", [1], num_classes=10),
                            TrainingRecord(128, 5e-5, "cfd", [as_rung(1, 1024, "cfd", 1, 0, 1, 9)], **guided), {}),
        "sfd-one": (GeneratorRecord("anna/one", [1], True), TrainingRecord(256, 1e-4, "l1", **sfd),
                    {1: evaluation(9.0)}),
        "sfd-several": (several, TrainingRecord(256, 1e-4, "l1", **sfd), {}),
        "sfd-rcfd": (several, TrainingRecord(256, 1e-4, "rcfd", classifier="resnet18", dataset="anna/digits",
                                             **guided, **sfd),
                     {3: evaluation(2.0), 2: evaluation(4.0)}),
        "sfd-conditional": (GeneratorRecord("anna/sfd", [2, 3], True, 10, stock_calls=stock_calls(conditional)),
                            TrainingRecord(256, 1e-4, "cfd", **guided, **sfd), {}),
    }  # fmt: skip


def test_cards_are_those_of_0_1(tmp_path):
    for name, (model, training, evaluations) in generators().items():
        card = create_model_card(model, training, evaluations)
        assert without_versions(card) == as_before(name), name
    write_model_card(tmp_path, *generators()["ladder"])
    results = (tmp_path / ".eval_results/diffusers_rcfd.yaml").read_text()
    assert results == (SAVED / "cards/ladder.eval_results.yaml").read_text()
    write_classifier_card(tmp_path, ClassifierRecord("anna/classifier", "resnet18", "anna/digits", 0.98765))
    assert (tmp_path / "README.md").read_text() == as_before("classifier")
    write_classifier_card(tmp_path, ClassifierRecord("anna/classifier", "resnet18"))
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
    RCFDPipeline(tiny_unet(), RCFDScheduler()).save_pretrained(tmp_path)
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


def test_card_of_a_student_whose_stock_form_is_not_exact_shows_the_call_that_is():
    """Stock DDIM has no 4-step grid of 1000 entries that ends at 0."""
    for entries, exact in ((1000, False), (1025, True)):
        student = RCFDPipeline(tiny_unet(), RCFDScheduler(entries, num_inference_steps=4))
        card = str(create_model_card(describe_generator(student, "anna/four")))
        assert ("use_clipped_model_output=True" in card) == exact
        assert ("custom_pipeline=repo" in card) != exact


# --- what a card says ------------------------------------------------------------------------------------------


def metadata(card):
    return yaml.safe_load(card.content.split("---")[1])


def test_card_is_valid_and_complete():
    card = create_model_card(*generators()["ladder"])
    data = metadata(card)
    assert data["base_model"] == "you/base" and data["datasets"] == ["anna/digits"] and data["license"] == "apache-2.0"
    result = data["model-index"][0]["results"][0]
    assert result["metrics"][0] == {"type": "fd-tiny", "value": 3.5, "name": "FD(tiny), 2 steps, 64 images"}
    for words in (
        'RCFDPipeline.from_pretrained("anna/two")', "use_clipped_model_output=True", "@inproceedings",
        "1 h 02 min 05 s", "| 2-step | 4 | rcfd | 0.9 | 0.003 |", "| 4-step | 8 | pd | - | - | - | 300 |",
        "64 generated images (seed 0) against 99",
    ):  # fmt: skip
        assert words in card.content, words
    assert "FID" not in card.content


def test_local_names_are_not_published(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("faces", "runs/base"):  # the form of a data set's name, and of a Hub id
        (tmp_path / name).mkdir(parents=True)
    local = ("/data/base", "~/base", "../base", "C:\\base", "a/b/c", "faces", "runs/base", str(tmp_path), "")
    assert [public_name(name) for name in (*local, None)] == [None] * (len(local) + 1)
    assert [public_name(f"{name} [train]") for name in local[:-1]] == [None] * (len(local) - 1)
    public = ("digits", "anna/digits", "anna/digits [train]", "digits [train[:10]]", "2026-11-27T06:14:49+00:00")
    assert [public_name(name) for name in public] == list(public)
    assert is_hub_id("anna/digits") and not is_hub_id("anna/digits [train]") and not is_hub_id(tmp_path)
    record = {"config": {"output_dir": "run", "dataset": "/data/x", "tags": ["a", "/b"], "steps": 3}, "on": True}
    public = {"config": {"output_dir": None, "dataset": None, "tags": ["a", None], "steps": 3}, "on": True}
    assert remove_local_names(record) == public
    measured = {2: evaluation(3.5) | {"reference": "/data/images [train]"}}
    training = TrainingRecord(128, 5e-5, "pd", LADDER[:1], "runs/base", "/data/images")
    card = create_model_card(GeneratorRecord("anna/two", [2]), training, measured)
    assert "/data" not in card.content and "runs" not in card.content and card.data.get("base_model") is None
    assert "- teacher: a local model\n- data: local files\n" in card.content and "99 of local files," in card.content
    write_classifier_card(tmp_path, ClassifierRecord("anna/guide", "resnet18", "/data/images"))
    assert "trained on images," in (tmp_path / "README.md").read_text()


ODD_NAMES = ("a`b", "a|b|c", "a\n\n# b", "{{ training.teacher }}", "{% raw %}", "</div><b>", f"x {END} y", "*a* _b_",
             "[a](b)", "a\r\n---\nb", "a\n---\nb", "\\", "a & b", "```", "\x1b[2J", '"; import os  # ')  # fmt: skip


def test_names_mean_nothing_to_markdown():
    for name in ODD_NAMES:
        text = markdown_text(name)
        assert re.fullmatch(r"[\w \[\]./@:,+=()%&#;-]*", text) and "](" not in text, name
        assert html.unescape(text) == " ".join(name.replace("\x1b", " ").split())
        assert markdown_code(name) in (text, f"`{name}`") and not re.search("[`<|\n]", markdown_code(name)[1:-1])
    assert markdown_text("a_b [train]") == "a_b [train]" and markdown_text("_a_") == "&#95;a&#95;"
    assert markdown_code("test_resnet.r160_in1k") == "`test_resnet.r160_in1k`"


def test_odd_names_leave_the_card_as_it_is():
    """Line by line it reads as one with plain names does, and so do its metadata and its code."""

    def card_of(name):
        return create_model_card(
            GeneratorRecord(f"anna/{name}", [2], num_classes=3),
            TrainingRecord(128, 5e-5, "rcfd", LADDER, "you/base", name, name),
            {2: evaluation(3.5) | {"extractor": name, "reference": f"{name} [train]"}},
        )

    def lines_of(card):
        return card.text.replace("`", "").splitlines()  # an odd name is no inline code

    wanted = lines_of(card_of("plain"))
    for name in (re.sub(r"[/\\]", "", name) for name in ODD_NAMES):  # else it would be a path
        card = card_of(name)
        assert ModelCard(card.content).data.to_dict() == card.data.to_dict()
        assert card.data.model_name == name and card.data.eval_results[0].dataset_name == f"{name} [train]"
        lines = lines_of(card)
        assert len(lines) == len(wanted) and card.text.count(BEGIN) == card.text.count(END) == 1
        for line, expected in zip(lines, wanted, strict=True):
            parts = expected.split("plain")
            assert line.startswith(parts[0]) and line.endswith(parts[-1])
        code = card.text.split("```python\n")[1].split("\n```")[0]
        assert f"anna/{name}" in [node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)]
        again = create_model_card(GeneratorRecord("anna/two", [2]), existing=card.content)
        assert again.text.count(BEGIN) == again.text.count(END) == 1 and "## Ladder" not in again.text


def test_existing_card_without_our_section_keeps_its_text():
    text = "---\nlicense: mit\ntags:\n- mine\nmetrics:\n- old\n---\n\n# Mine\n\nWords.\n"
    card = create_model_card(*generators()["ladder"], text)
    data = metadata(card)
    assert data["license"] == "mit" and data["tags"][0] == "mine" and "rcfd" in data["tags"]
    assert data["metrics"] == ["fd-tiny", "is-tiny"] and "Words." in card.content and BEGIN in card.content
    assert metadata(create_model_card(*generators()["base"], text))["metrics"] == ["old"]


def test_results_of_other_weights_are_not_kept(tmp_path):
    """Neither in the metadata of the card that is there, nor beside it."""
    before = write_model_card(tmp_path, *generators()["ladder"])
    assert "model-index" in metadata(before) and (tmp_path / ".eval_results/diffusers_rcfd.yaml").is_file()
    model, training, _ = generators()["ladder"]
    card = write_model_card(tmp_path, model, training, existing=before.content)
    assert not {"model-index", "metrics"} & metadata(card).keys() and metadata(card)["base_model"] == "you/base"
    assert not (tmp_path / ".eval_results/diffusers_rcfd.yaml").exists()

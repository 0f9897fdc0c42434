"""Pixels, logits and features of every family of image classifiers that timm and transformers know."""

from importlib.util import find_spec

import pytest
import timm
import transformers
from timm.models import model_entrypoint
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from diffusers_rcfd import load_feature_classifier
from diffusers_rcfd.models.preprocessing import measure_processor
from tests.classifier_families import (
    NO_IMAGES,
    TIMM_MODELS,
    TRANSFORMERS_MODELS,
    save_transformers,
    timm_agreement,
    transformers_agreement,
)

# Batch norm in the head, two last layers, two branches, a plain one.
QUICK_TIMM = ["efficientvit_m0", "deit_tiny_distilled_patch16_224", "crossvit_tiny_240", "test_resnet"]
# A normalisation made twice, one of a wrapper, BGR; two last layers; a plain one.
QUICK_TRANSFORMERS = [
    ("clip", "CLIPForImageClassification"),
    ("deit", "DeiTForImageClassificationWithTeacher"),
    ("efficientnet", "EfficientNetForImageClassification"),
    ("pp_lcnet", "PPLCNetForImageClassification"),
    ("timm_wrapper", "TimmWrapperForImageClassification"),
]


def quick_first(models, quick):
    """All models, those that are not quick as slow tests."""
    ids = [model if isinstance(model, str) else model[-1] for model in models]
    marks = [() if model in quick else pytest.mark.slow for model in models]
    return [pytest.param(model, id=name, marks=mark) for model, name, mark in zip(models, ids, marks, strict=True)]


def assert_agrees(agreement, linear=True):
    """Pixels are equal where nothing is resized and half a grey level apart elsewhere; so are logits and features."""
    assert agreement.pixels < 2e-6
    assert agreement.resized < 0.5
    assert agreement.logits < 1e-4
    assert not linear or agreement.features < 1e-4


@pytest.mark.parametrize("name", quick_first(TIMM_MODELS, QUICK_TIMM))
def test_timm_module(name, tmp_path):
    assert_agrees(timm_agreement(name, tmp_path), linear=not name.startswith("volo"))  # which also asks each token


@pytest.mark.parametrize("model", quick_first(TRANSFORMERS_MODELS, QUICK_TRANSFORMERS))
def test_transformers_family(model, tmp_path):
    family, name = model
    if family == "dinat" and find_spec("natten") is None:
        pytest.skip("transformers' Dinat needs natten")
    assert_agrees(transformers_agreement(family, name, tmp_path))


def test_every_timm_module_is_among_them():
    modules = {model_entrypoint(name).__module__.rpartition(".")[2] for name in TIMM_MODELS}
    assert modules == set(timm.list_modules())


@pytest.mark.parametrize(
    ("processor", "options", "size", "mean", "std", "flip"),
    [
        ("EfficientNetImageProcessor", {"image_std": [0.4] * 3}, 346, 0.5, 0.16, False),  # divides twice
        ("EfficientNetImageProcessor", {"include_top": False}, 346, 0.5, 0.5, False),
        ("EfficientNetImageProcessor", {"rescale_factor": 1 / 127.5, "rescale_offset": True, "do_normalize": False,
                                        "include_top": False}, 346, 0.5, 0.5, False),
        ("PerceiverImageProcessor", {}, 224, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225], False),  # crops first
        ("ConvNextImageProcessor", {"size": {"shortest_edge": 64}, "crop_pct": 0.5}, 64, 0.5, 0.5, False),
        ("LevitImageProcessor", {}, 224, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225], False),
        ("PPLCNetImageProcessor", {}, 224, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225], True),  # BGR, turned last
        ("BitImageProcessor", {"do_rescale": False, "do_normalize": False}, 224, 0.0, 1 / 255, False),
        ("ViTImageProcessor", {"do_resize": False}, None, 0.5, 0.5, False),
        ("CLIPImageProcessor", {"do_center_crop": False, "size": {"shortest_edge": 40}}, 40, 0.5, 0.5, False),
    ],
)  # fmt: skip
def test_what_a_processor_feeds_is_measured(processor, options, size, mean, std, flip):
    if processor == "CLIPImageProcessor":
        options = {**options, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    measured = measure_processor(getattr(transformers, processor)(**options), channels=3)
    assert measured["image_size"] == size and measured["flip_channels"] is flip
    assert measured["image_mean"] == pytest.approx(mean if isinstance(mean, list) else [mean] * 3, abs=1e-6)
    assert measured["image_std"] == pytest.approx(std if isinstance(std, list) else [std] * 3, rel=1e-6)


@pytest.mark.parametrize("family", NO_IMAGES)
def test_networks_that_take_no_images_are_refused(family, tmp_path):
    CONFIG_MAPPING[family]().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"{tmp_path.name}.*must be a network that takes images, got '{family}'"):
        load_feature_classifier(str(tmp_path), pretrained=False)


@pytest.mark.parametrize(
    ("processor", "options", "reason"),
    [
        ("DonutImageProcessor", {"size": {"height": 32, "width": 24}}, r"square images of 3 channels.*\(3, 32, 24\)"),
        ("MobileViTImageProcessor", {"size": {"shortest_edge": 24}, "crop_size": {"height": 32, "width": 32}}, "pads"),
        ("ImageGPTImageProcessor", {"clusters": [[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]]}, r"`pixel_values`.*\(B, C, H, W"),
        ("Siglip2ImageProcessor", {}, r"`pixel_values`.*spatial_shapes"),
        ("ViTImageProcessor", {"image_std": [-0.5, 0.5, 0.5]}, "lighter pixels larger"),
        ("ViTImageProcessor", {"image_mean": [0.5, 0.5]}, "size of tensor"),
    ],
    ids=lambda value: value if isinstance(value, str) and value.endswith("Processor") else None,
)
def test_processors_that_cannot_be_followed_are_refused(processor, options, reason, tmp_path):
    save_transformers("clip", "CLIPForImageClassification", tmp_path)
    getattr(transformers, processor)(**options).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"(?s)cannot prepare images as .*{tmp_path.name}.*{reason}"):
        load_feature_classifier(str(tmp_path))

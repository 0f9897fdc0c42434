import copy
import json
import os
import shutil
import socket
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf
from torch import nn
from torchvision.transforms import Normalize
from transformers import (
    AutoModelForImageClassification,
    ConvNextConfig,
    MobileViTImageProcessor,
    ResNetConfig,
    ViTConfig,
    ViTImageProcessor,
)

from diffusers_rcfd.models.feature_classifier import (
    FeatureClassifier,
    FeatureClassifierOutput,
    load_feature_classifier,
)
from tests.fake_hub import FakeHub

LOOK_UP = socket.getaddrinfo
HEAD = ("weight", "bias")
SMALL_RESNET = {"channels": [8, 8, 16, 16], "layers": [1, 1, 1, 1]}
SMALL_DENSENET = {"growth_rate": 4, "block_config": [1, 1, 1, 1]}
SMALL_VIT = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2}
SMALL_CONVNEXT = {"depths": [1, 1, 1, 1], "dims": [8, 8, 8, 16]}
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

TRANSFORMERS_CONFIGS = {
    "resnet": ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic", num_labels=5),
    "vit": ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=16,
        patch_size=4,
        num_labels=5,
    ),
    "convnext": ConvNextConfig(hidden_sizes=[8, 12], depths=[1, 1], num_stages=2, num_labels=5),
}


def images_of(batch=2, channels=3, size=16, seed=0):
    return torch.rand(batch, channels, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def shift_batch_norm(model):
    """Make running statistics unlike their initial values, so that losing them shows."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.copy_(0.1 * torch.randn(module.running_mean.shape, generator=generator))
            module.running_var.copy_(1 + torch.rand(module.running_var.shape, generator=generator))
    return model


def small_resnet(**overrides):
    torch.manual_seed(0)
    arguments = {"backbone": "resnet18", "backbone_config": SMALL_RESNET, "num_classes": 5, **overrides}
    return shift_batch_norm(FeatureClassifier(**arguments)).eval()


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("a test of this file reached for the network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Folders of tiny transformers checkpoints with random weights: resnet and vit with a processor, convnext bare."""
    folders = {}
    for name, config in TRANSFORMERS_CONFIGS.items():
        torch.manual_seed(0)
        folders[name] = str(tmp_path_factory.mktemp(name))
        shift_batch_norm(AutoModelForImageClassification.from_config(config)).save_pretrained(folders[name])
    statistics = {"image_mean": list(IMAGENET_MEAN), "image_std": list(IMAGENET_STD)}
    for name in ("resnet", "vit"):
        size = {"height": 16, "width": 16}
        ViTImageProcessor(size=size, resample=2, **statistics).save_pretrained(folders[name])
    return folders


@pytest.fixture(scope="module")
def timm_folder(tmp_path_factory):
    torch.manual_seed(0)
    folder = str(tmp_path_factory.mktemp("timm"))
    model = shift_batch_norm(timm.create_model("resnet18", num_classes=5, **SMALL_RESNET))
    save_for_hf(model, folder, safe_serialization=True)
    return folder


# What the backbone sees


@pytest.mark.parametrize("channels", [1, 3])
def test_closed_form_normalisation_is_torchvisions_on_0_to_1(channels):
    mean, std = IMAGENET_MEAN[:channels], IMAGENET_STD[:channels]
    model = small_resnet(in_channels=channels, image_mean=list(mean), image_std=list(std))
    images = images_of(channels=channels)
    torch.testing.assert_close(model._prepare(images), Normalize(mean, std)((images + 1) / 2), atol=1e-6, rtol=1e-6)


def test_default_normalisation_and_reference_leave_images_as_they_are():
    images = images_of()
    assert torch.equal(small_resnet()._prepare(images), images)
    reference = small_resnet(image_mean=list(IMAGENET_MEAN), image_std=list(IMAGENET_STD), reference=True)
    assert torch.equal(reference._prepare(images), images)
    assert not torch.equal(small_resnet(image_mean=list(IMAGENET_MEAN))._prepare(images), images)


def test_reference_still_resizes():
    images = images_of()
    expected = F.interpolate(images, (24, 24), mode="bilinear", align_corners=False)
    prepared = small_resnet(image_size=24, interpolation="bilinear", reference=True)._prepare(images)
    assert torch.equal(prepared, expected)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [8, 40])
def test_resize_is_antialiased_only_where_it_shrinks(interpolation, size):
    images = images_of()
    prepared = small_resnet(image_size=size, interpolation=interpolation)._prepare(images)
    expected = F.interpolate(images, (size, size), mode=interpolation, align_corners=False, antialias=size < 16)
    torch.testing.assert_close(prepared, expected)


def test_images_of_the_right_size_are_not_resampled(monkeypatch):
    monkeypatch.setattr(F, "interpolate", lambda *args, **kwargs: pytest.fail("resized"))
    small_resnet(image_size=16)(images_of(size=16))
    small_resnet(image_size=None)(images_of(size=8))


@pytest.mark.parametrize("reference", [False, True])
def test_grey_images_are_repeated(reference):
    model = small_resnet(image_mean=list(IMAGENET_MEAN), image_std=list(IMAGENET_STD), reference=reference)
    grey = images_of(channels=1)
    assert torch.equal(model(grey).logits, model(grey.repeat(1, 3, 1, 1)).logits)


def test_flip_channels_feeds_bgr():
    images = images_of()
    assert torch.equal(small_resnet(flip_channels=True)._prepare(images), images[:, [2, 1, 0]])


def test_normalisation_keeps_float32_in_bfloat16():
    model = small_resnet(image_mean=list(IMAGENET_MEAN), image_std=list(IMAGENET_STD))
    scale, shift = model.input_scale.clone(), model.input_shift.clone()
    model.to(torch.bfloat16)
    assert torch.equal(model.input_scale, scale) and torch.equal(model.input_shift, shift)
    output = model(images_of().to(torch.bfloat16))
    assert output.logits.dtype == output.features.dtype == torch.bfloat16
    assert output.logits.isfinite().all()
    model.to_empty(device="cpu")
    assert torch.equal(model.input_scale, scale) and torch.equal(model.input_shift, shift)


def test_half_precision_images_are_normalised_in_float32():
    model = small_resnet(image_size=12, image_mean=list(IMAGENET_MEAN), image_std=list(IMAGENET_STD))
    images = images_of().to(torch.bfloat16)
    assert torch.equal(model._prepare(images), model._prepare(images.float()))


# Logits and features


@pytest.mark.parametrize(
    ("backbone", "config", "features"),
    [
        ("resnet18", SMALL_RESNET, 16),
        ("densenet121", SMALL_DENSENET, None),
        ("vit_tiny_patch16_224", SMALL_VIT, 16),
        ("convnext_tiny", SMALL_CONVNEXT, 16),
        ("resnetv2_18", {"channels": [8, 8, 8, 16], "layers": [1, 1, 1, 1], "stem_chs": 8}, 16),  # convolutional head
    ],
)
def test_timm_logits_are_the_backbones_own_and_the_last_layer_of_the_features(backbone, config, features):
    torch.manual_seed(0)
    model = FeatureClassifier(backbone, num_classes=7, backbone_config=config).eval()
    size = 16 if "vit" in backbone else 32
    with torch.no_grad():
        nn.init.normal_(model.network.get_classifier().weight)
        output = model(images_of(size=size))
        expected = model.network(images_of(size=size))
    assert isinstance(output, FeatureClassifierOutput)
    assert torch.equal(output.logits, expected) and expected.std() > 0
    assert output.features.shape == (2, model.num_features) and output.logits.shape == (2, model.num_classes)
    assert features in (None, model.num_features)
    classifier = model.network.get_classifier()
    weight, bias = classifier.weight.flatten(1), classifier.bias
    torch.testing.assert_close(output.logits, F.linear(output.features, weight, bias))


def test_timm_backbone_runs_once():
    model, passes = small_resnet(), []
    model.network.layer1.register_forward_hook(lambda *args: passes.append(1))
    logits, features = model(images_of(), return_dict=False)
    assert len(passes) == 1 and logits.shape == (2, 5) and features.shape == (2, 16)


def test_distilled_timm_head_gives_its_own_logits():
    model = FeatureClassifier("deit_tiny_distilled_patch16_224", num_classes=4, backbone_config=SMALL_VIT).eval()
    output = model(images_of())
    assert torch.equal(output.logits, model.network(images_of())) and output.features.shape == (2, model.num_features)


def test_transformers_last_layer_among_others_of_its_width():
    config = {**TRANSFORMERS_CONFIGS["vit"].to_dict(), "id2label": None, "num_labels": 16}  # its hidden size
    model = FeatureClassifier("vit", library="transformers", num_classes=16, backbone_config=config).eval()
    output = model(images_of())
    torch.testing.assert_close(output.logits, model.network.classifier(output.features))


@pytest.mark.parametrize("name", TRANSFORMERS_CONFIGS)
def test_transformers_checkpoint_gives_its_own_logits_and_last_features(name, checkpoints):
    model = FeatureClassifier.from_backbone(checkpoints[name])
    source = AutoModelForImageClassification.from_pretrained(checkpoints[name]).eval()
    images = images_of()
    inputs = (images + 1) / 2
    if name != "convnext":
        inputs = Normalize(IMAGENET_MEAN, IMAGENET_STD)(inputs)
    else:  # no processor: raw [-1, 1] at the size of its config
        inputs = F.interpolate(images, (224, 224), mode="bicubic", align_corners=False)
    with torch.no_grad():
        output, expected = model(images), source(inputs).logits
    torch.testing.assert_close(output.logits, expected, atol=1e-5, rtol=1e-5)
    last = [module for module in source.modules() if isinstance(module, nn.Linear)][-1]
    torch.testing.assert_close(output.logits, last(output.features), atol=1e-5, rtol=1e-5)
    assert output.features.shape == (2, model.num_features) and model.num_classes == 5


@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_gradients_reach_the_images_through_a_frozen_classifier(library, checkpoints):
    model = small_resnet(image_size=12) if library == "timm" else FeatureClassifier.from_backbone(checkpoints["vit"])
    assert model.train().freeze() is model and not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    images = images_of(size=20).requires_grad_()
    model(images).features.square().sum().backward()
    assert images.grad.abs().amax(dim=(1, 2, 3)).min() > 0
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_compiling_breaks_no_graph(library, checkpoints):
    """The features are kept inside of the graph; a copy of the classifier keeps its own."""
    model = small_resnet() if library == "timm" else FeatureClassifier.from_backbone(checkpoints["vit"])
    copied = copy.deepcopy(model.freeze())
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", dynamic=False, fullgraph=True)
    for seed in (0, 1):
        images = images_of(seed=seed).requires_grad_()
        output, expected = compiled(images), copied(images)
        assert torch.equal(output.logits, expected.logits) and torch.equal(output.features, expected.features)
        output.features.square().sum().backward()
        assert images.grad.abs().max() > 0
    for parameter in copied.parameters():
        parameter.mul_(0.9)
    assert not torch.equal(copied(images).features, expected.features)
    assert torch.equal(model(images).features, expected.features)


def test_closed_form_gradient_of_the_normalisation():
    model = small_resnet(image_std=[0.25, 0.5, 1.0])
    images = images_of().requires_grad_()
    model._prepare(images).sum().backward()
    expected = torch.tensor([2.0, 1.0, 0.5]).view(1, 3, 1, 1).expand_as(images)
    torch.testing.assert_close(images.grad, expected)


# Construction


def test_constructor_leaves_a_trainable_classifier():
    model = FeatureClassifier("resnet18", backbone_config=SMALL_RESNET)
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())


def test_small_stem_of_a_digits_classifier():
    model = FeatureClassifier(
        backbone="resnet18",
        backbone_config={"channels": [16, 32, 64, 128], "layers": [1, 1, 1, 1]},
        small_stem=True,
        in_channels=1,
        num_classes=10,
    ).eval()
    stem = model.network.conv1
    assert (stem.in_channels, stem.kernel_size, stem.stride, stem.padding) == (1, (3, 3), (1, 1), (1, 1))
    assert isinstance(model.network.maxpool, nn.Identity)
    shapes = []
    model.network.layer1.register_forward_hook(lambda module, inputs, output: shapes.append(output.shape[-2:]))
    assert model(images_of(channels=1, size=8)).logits.shape == (2, 10)
    assert shapes == [(8, 8)]


@pytest.mark.parametrize(
    ("backbone", "config"),
    [("densenet121", SMALL_DENSENET), ("densenetblur121d", SMALL_DENSENET), ("resnet10t", None)],
)
def test_small_stem_keeps_the_resolution(backbone, config):
    model = FeatureClassifier(backbone, num_classes=5, small_stem=True, backbone_config=config).eval()
    first = "layer1" if "resnet" in backbone else "features.denseblock1"
    shapes = []
    hook = lambda module, inputs, output: shapes.append(output.shape[-2:])  # noqa: E731
    model.network.get_submodule(first).register_forward_hook(hook)
    assert model(images_of(size=8)).logits.shape == (2, 5)
    assert shapes == [(8, 8)]


def test_small_stem_of_another_backbone_is_refused(checkpoints):
    with pytest.raises(ValueError, match="test_convnext"):
        FeatureClassifier("test_convnext", small_stem=True)
    with pytest.raises(ValueError, match="small_stem"):
        FeatureClassifier.from_backbone(checkpoints["resnet"], small_stem=True)


def test_fixed_size_backbone_is_built_for_image_size():
    model = FeatureClassifier.from_backbone("test_vit", pretrained=False, num_classes=4, image_size=32)
    assert model(images_of(size=16)).logits.shape == (2, 4)
    assert model.network.patch_embed.img_size == (32, 32)
    assert FeatureClassifier.from_backbone("test_vit", pretrained=False).config.image_size == 160


# Pretrained weights


@pytest.mark.parametrize("name", ["{}", "local-dir:{}"])
def test_timm_pretrained_weights(name, timm_folder):
    model = load_feature_classifier(name.format(timm_folder))
    source = timm.create_model(f"local-dir:{timm_folder}", pretrained=True).eval()
    assert not model.training
    assert (model.config.backbone, model.config.image_size, model.num_classes) == ("resnet18", 224, 5)
    assert tuple(model.config.image_mean) == IMAGENET_MEAN and tuple(model.config.image_std) == IMAGENET_STD
    images = images_of(size=224)
    with torch.no_grad():
        expected = source(Normalize(IMAGENET_MEAN, IMAGENET_STD)((images + 1) / 2))
        torch.testing.assert_close(model(images).logits, expected, atol=1e-5, rtol=1e-5)


def test_timm_pretrained_weights_with_a_small_stem_keep_all_but_the_stem(timm_folder):
    model = FeatureClassifier.from_backbone(f"local-dir:{timm_folder}", small_stem=True, in_channels=1, num_classes=3)
    source = timm.create_model(f"local-dir:{timm_folder}", pretrained=True)
    assert model.config.image_size is None and model.num_classes == 3
    weights, expected = model.network.state_dict(), source.state_dict()
    assert weights["conv1.weight"].shape == (64, 1, 3, 3)
    kept = [key for key in expected if key.split(".")[0] not in ("conv1", "fc")]
    assert all(torch.equal(weights[key], expected[key]) for key in kept)
    torch.testing.assert_close(model.input_shift.flatten(), torch.tensor([(0.5 - 0.449) / 0.226]))


def test_without_pretrained_no_weights_are_read(timm_folder, checkpoints):
    for folder in (timm_folder, checkpoints["resnet"]):
        loaded, fresh = (FeatureClassifier.from_backbone(folder, pretrained=value) for value in (True, False))
        assert fresh.training and fresh.config.image_size is None
        assert tuple(fresh.config.image_mean) == IMAGENET_MEAN
        assert not torch.equal(next(loaded.parameters()), next(fresh.parameters()))


def test_transformers_processor_settings(tmp_path, checkpoints):
    config = FeatureClassifier.from_backbone(checkpoints["vit"]).config
    assert (config.image_size, config.interpolation, config.backbone) == (16, "bilinear", "vit")
    AutoModelForImageClassification.from_config(TRANSFORMERS_CONFIGS["resnet"]).save_pretrained(tmp_path)
    MobileViTImageProcessor(size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32}).save_pretrained(
        tmp_path
    )
    model = FeatureClassifier.from_backbone(str(tmp_path))
    images = images_of(size=32)
    assert model.config.image_size == 32 and model.config.flip_channels
    torch.testing.assert_close(model._prepare(images), (images.flip(1) + 1) / 2)  # BGR in [0, 1]


def test_transformers_rescale_factor_is_honoured(tmp_path):
    AutoModelForImageClassification.from_config(TRANSFORMERS_CONFIGS["resnet"]).save_pretrained(tmp_path)
    size = {"height": 16, "width": 16}
    ViTImageProcessor(size=size, rescale_factor=1 / 127.5, image_mean=[1.0] * 3, image_std=[1.0] * 3).save_pretrained(
        tmp_path
    )
    images = images_of()
    torch.testing.assert_close(FeatureClassifier.from_backbone(str(tmp_path))._prepare(images), images)


def test_transformers_new_classes_keep_the_backbone(checkpoints):
    model = FeatureClassifier.from_backbone(checkpoints["vit"], num_classes=3)
    own = FeatureClassifier.from_backbone(checkpoints["vit"])
    assert model(images_of()).logits.shape == (2, 3)
    torch.testing.assert_close(model(images_of()).features, own(images_of()).features)
    with pytest.raises(ValueError, match="in_channels.*must be 3"):
        FeatureClassifier.from_backbone(checkpoints["vit"], in_channels=1)
    grey = FeatureClassifier.from_backbone(checkpoints["vit"], pretrained=False, in_channels=1, image_size=8)
    assert grey(images_of(channels=1, size=8)).logits.shape == (2, 5)


# Saving and loading


@pytest.mark.parametrize("kind", ["timm", "timm_small_stem", "vit", "resnet"])
def test_save_and_load_give_equal_outputs(kind, tmp_path, checkpoints):
    if kind.startswith("timm"):
        model = small_resnet(
            image_mean=list(IMAGENET_MEAN), image_std=list(IMAGENET_STD), small_stem="stem" in kind, image_size=24
        )
    else:
        model = FeatureClassifier.from_backbone(checkpoints[kind])
    model.save_pretrained(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["checksums.json", "config.json", "diffusion_pytorch_model.safetensors"]
    expected = model(images_of())
    for load in (
        FeatureClassifier.from_pretrained,
        load_feature_classifier,
        lambda folder: FeatureClassifier.from_pretrained(folder, low_cpu_mem_usage=True),
    ):
        loaded = load(str(tmp_path))
        assert not loaded.training
        assert torch.equal(loaded.input_scale, model.input_scale) and torch.equal(
            loaded.input_shift, model.input_shift
        )
        weights, saved = loaded.state_dict(), model.state_dict()
        assert list(weights) == list(saved) and all(torch.equal(weights[key], saved[key]) for key in saved)
        output = loaded(images_of())
        torch.testing.assert_close(output.logits, expected.logits)
        torch.testing.assert_close(output.features, expected.features)


def test_loading_keeps_attention_masks_that_are_not_saved(tmp_path):
    swin = {"embed_dim": 8, "depths": [2, 1, 1, 1], "num_heads": [1, 1, 1, 1]}
    model = FeatureClassifier("swin_tiny_patch4_window7_224", image_size=56, backbone_config=swin).eval()
    model.save_pretrained(tmp_path)
    loaded = FeatureClassifier.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(images_of()).logits, model(images_of()).logits)


def test_loading_in_bfloat16_keeps_the_normalisation(tmp_path):
    model = small_resnet(image_mean=list(IMAGENET_MEAN), image_std=list(IMAGENET_STD))
    model.save_pretrained(tmp_path)
    loaded = FeatureClassifier.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16 and torch.equal(loaded.input_scale, model.input_scale)
    assert loaded(images_of()).logits.dtype == torch.bfloat16


def test_saved_config_names_no_local_folder(tmp_path, checkpoints):
    FeatureClassifier.from_backbone(checkpoints["vit"]).save_pretrained(tmp_path)
    assert checkpoints["vit"] not in (tmp_path / "config.json").read_text()


def test_overrides_of_a_saved_classifier(tmp_path):
    small_resnet(image_mean=list(IMAGENET_MEAN)).save_pretrained(tmp_path)
    loaded = load_feature_classifier(str(tmp_path), reference=True, image_size=24, num_classes=5)
    assert loaded.config.reference and loaded.config.image_size == 24
    assert load_feature_classifier(str(tmp_path), image_size="auto").config.image_size is None
    with pytest.raises(ValueError, match="`num_classes` 6.*saved with 5"):
        load_feature_classifier(str(tmp_path), num_classes=6)
    with pytest.raises(ValueError, match="from_pretrained"):
        FeatureClassifier.from_backbone(str(tmp_path))


@pytest.mark.parametrize("name", ["resnet18", "timm/resnet18", "timm/resnet18.a1_in1k"])
def test_timm_names_load_pretrained(name, monkeypatch):
    calls = []
    create_model = timm.create_model

    def record(model_name, pretrained=False, **kwargs):
        calls.append((model_name, pretrained))
        return create_model(model_name, pretrained=False, **kwargs)

    monkeypatch.setattr(timm, "create_model", record)
    model = load_feature_classifier(name, num_classes=3, backbone_config=SMALL_RESNET, reference=True)
    assert calls == [(name.removeprefix("timm/"), True), (name.removeprefix("timm/"), False)]
    assert model.config.reference and model.config.interpolation == "bilinear" and model.config.image_size == 224


def test_hub_repository_is_told_by_its_config(tmp_path, checkpoints, monkeypatch):
    from diffusers_rcfd.models.classifier_backbones import find_source

    small_resnet().save_pretrained(tmp_path / "ours")
    (tmp_path / "timm").mkdir()
    (tmp_path / "timm" / "config.json").write_text(json.dumps({"architecture": "resnet18"}))
    folders = {"me/ours": tmp_path / "ours", "me/timm": tmp_path / "timm", "me/vit": checkpoints["vit"]}
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda repo, file, **hub: os.path.join(folders[repo], file))
    assert find_source("me/ours") == ("saved", "me/ours")
    assert find_source("me/timm") == ("timm", "hf-hub:me/timm")
    assert find_source("me/vit") == ("transformers", "me/vit")
    assert find_source("hf-hub:me/timm") == ("timm", "hf-hub:me/timm")


# Refusals


def test_pickled_backbones_are_refused(tmp_path, timm_folder, checkpoints):
    """With the weights as a pickle beside the config, in place of safetensors."""
    for folder in (timm_folder, checkpoints["vit"]):
        copy = tmp_path / os.path.basename(folder)
        shutil.copytree(folder, copy)
        torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
        (copy / "model.safetensors").unlink()
        with pytest.raises(ValueError, match=f"{copy.name}.*model.safetensors"):
            load_feature_classifier(str(copy))


def test_only_safetensors_are_written(tmp_path):
    with pytest.raises(ValueError, match="`safe_serialization` must be True"):
        small_resnet().save_pretrained(tmp_path / "pickled", safe_serialization=False)
    assert not (tmp_path / "pickled").exists()


@pytest.mark.parametrize("name", ["resnet81", "./resnet18", "a/b/resnet18"])
def test_unknown_name(name):
    with pytest.raises(ValueError, match=f"{name}.*resnet18.*Allowed: .*transformers.*timm"):
        load_feature_classifier(name)


def test_folders_that_are_no_classifier(tmp_path):
    with pytest.raises(ValueError, match="no config.json"):
        load_feature_classifier(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel"}))
    with pytest.raises(ValueError, match="not of a classifier"):
        load_feature_classifier(str(tmp_path))


# Weights that a checkpoint lacks


def edit_config(folder, **values):
    path = Path(folder) / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def edit_weights(path, change):
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


@pytest.fixture
def damaged(tmp_path, timm_folder, checkpoints):
    """Copy a checkpoint of timm or transformers without its last layer, or with another size of it in the config."""

    def damage(library, fault):
        source = timm_folder if library == "timm" else checkpoints["vit"]
        folder = shutil.copytree(source, tmp_path / library)
        if fault == "headless":
            head = "fc." if library == "timm" else "classifier."
            edit_weights(folder / "model.safetensors", lambda weights: [weights.pop(head + key) for key in HEAD])
        elif library == "timm":
            edit_config(folder, num_classes=4)
        else:
            labels = {str(number): f"label {number}" for number in range(4)}
            edit_config(folder, id2label=labels, label2id={value: int(key) for key, value in labels.items()})
        return str(folder)

    return damage


@pytest.mark.parametrize("fault", ["headless", "other size"])
@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_last_layer_that_is_missing_or_does_not_fit(library, fault, damaged, timm_folder, checkpoints, caplog):
    """Refused, unless `num_classes` asks for a new one, which is then said to be untrained."""
    folder = damaged(library, fault)
    with pytest.raises(
        ValueError, match=f"(?s)weights of '.*{library}' must fit its config.*(fc|classifier|4 classes)"
    ):
        load_feature_classifier(folder)
    for num_classes in (3, 4, 5):
        caplog.clear()
        model = load_feature_classifier(folder, num_classes=num_classes)
        fits = fault == "other size" and num_classes == 5  # what its weights are for
        said = [record.message for record in caplog.records if "is new and untrained" in record.message]
        assert len(said) == (not fits)
        assert fits or f"last layer of {folder}, for {num_classes} classes, is" in said[0]
        whole = load_feature_classifier(timm_folder if library == "timm" else checkpoints["vit"])
        output, expected = model(images_of(size=32)), whole(images_of(size=32))
        assert output.logits.shape == (2, num_classes)
        torch.testing.assert_close(output.features, expected.features, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("library", ["timm", "transformers"])
@pytest.mark.parametrize("num_classes", [None, 3])
def test_other_layers_that_are_missing_are_refused(library, num_classes, damaged, caplog):
    """Also where a new last layer is asked for."""
    folder = damaged(library, "none")
    config = {"num_classes": 5} if library == "timm" else {"id2label": None, "label2id": None, "num_labels": 5}
    edit_config(folder, **config)
    key = "conv1.weight" if library == "timm" else "vit.embeddings.cls_token"
    edit_weights(Path(folder) / "model.safetensors", lambda weights: weights.pop(key))
    with pytest.raises(ValueError, match=f"(?s)weights of '.*{library}' must fit its config.*{key}"):
        load_feature_classifier(folder, num_classes=num_classes)


def test_new_classes_of_a_whole_checkpoint_are_said_to_be_untrained(timm_folder, checkpoints, caplog):
    for folder in (timm_folder, checkpoints["resnet"]):
        load_feature_classifier(folder)
        load_feature_classifier(folder, num_classes=5)
        assert "untrained" not in caplog.text
        load_feature_classifier(folder, num_classes=3)
        assert f"The last layer of {folder}, for 3 classes, is new and untrained." in caplog.text
        caplog.clear()


def test_saved_weights_that_do_not_fit_their_config_are_refused(tmp_path):
    """Of our own: missing ones would be random."""
    small_resnet().save_pretrained(tmp_path)
    edit_weights(tmp_path / "diffusion_pytorch_model.safetensors", lambda weights: weights.pop("network.fc.bias"))
    with pytest.raises(ValueError, match=f"weights of '.*{tmp_path.name}' must fit its config.*network.fc.bias"):
        FeatureClassifier.from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", ["timm", "transformers", "saved"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(kind, value, tmp_path, timm_folder, checkpoints):
    if kind == "saved":
        small_resnet().save_pretrained(tmp_path / kind)
    else:
        shutil.copytree(timm_folder if kind == "timm" else checkpoints["vit"], tmp_path / kind)
    (path,) = (tmp_path / kind).glob("*.safetensors")
    edit_weights(path, lambda weights: weights[max(weights)].view(-1)[:1].fill_(value))
    with pytest.raises(ValueError, match=f"weights of '.*{kind}' must be finite"):
        load_feature_classifier(str(tmp_path / kind))


def test_own_code_is_refused_without_a_question(tmp_path, checkpoints, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("asked on the console"))
    code = {"AutoConfig": "mine.Config", "AutoModelForImageClassification": "mine.Model"}
    shutil.copytree(checkpoints["vit"], tmp_path / "model")
    edit_config(tmp_path / "model", model_type="mine", auto_map=code)
    with pytest.raises(ValueError, match="'.*model' is of a model type unknown .* 'mine' and brings its own code"):
        load_feature_classifier(str(tmp_path / "model"))
    shutil.copytree(checkpoints["vit"], tmp_path / "processor")
    path = tmp_path / "processor/preprocessor_config.json"
    path.write_text(json.dumps({"image_processor_type": "Mine", "auto_map": {"AutoImageProcessor": "mine.Mine"}}))
    with pytest.raises(ValueError, match="(?s)cannot prepare images as '.*processor' does: .*custom code"):
        load_feature_classifier(str(tmp_path / "processor"))


@pytest.mark.parametrize("text", ["{", "[1, 2]", "\u0000", "[" * 100_000])
def test_damaged_config(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=f"config.json of '.*{tmp_path.name}' (is damaged|must hold an object)"):
        load_feature_classifier(str(tmp_path))


def test_transformers_model_that_is_no_image_classifier_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ValueError, match=f"'.*{tmp_path.name}' must be an image classifier, got 'bert'"):
        load_feature_classifier(str(tmp_path), pretrained=False)


# The Hub's reasons


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub at this machine that the clients of this process take for the one."""
    constants = huggingface_hub.constants
    with FakeHub() as hub:
        monkeypatch.setattr(socket, "getaddrinfo", LOOK_UP)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        huggingface_hub.close_session()
        yield hub
    huggingface_hub.close_session()


@pytest.fixture
def published(hub, timm_folder, checkpoints):
    """The names of repositories at the Hub: of timm, of transformers, and of each with a pickle alone."""
    for name, folder in (("timm", timm_folder), ("vit", checkpoints["vit"])):
        files = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
        hub.add_repo(f"anna/{name}", files)
        pickled = {key: value for key, value in files.items() if not key.endswith(".safetensors")}
        hub.add_repo(f"anna/{name}-pickled", pickled | {"pytorch_model.bin": b"\x80\x02."})
        hub.add_repo(f"anna/{name}-private", files, private=True)
    hub.add_repo("anna/notes", {"README.md": b"# Notes"})
    return hub


@pytest.mark.parametrize("name", ["anna/vit", "anna/timm"])
def test_offline_mode_reads_the_cache_and_says_so_where_it_is_empty(name, published, monkeypatch):
    online = load_feature_classifier(name)(images_of(size=32)).logits
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    torch.testing.assert_close(load_feature_classifier(name)(images_of(size=32)).logits, online)
    with pytest.raises(ValueError, match="^'anna/other' is not in the cache, and offline mode is on"):
        load_feature_classifier("anna/other")
    with pytest.raises(ValueError, match=f"^`revision` 'v2' of '{name}' is not in the cache, and offline mode is on"):
        load_feature_classifier(name, revision="v2")
    with pytest.raises(ValueError, match="^'resnet18' is not in the cache, and offline mode is on"):
        load_feature_classifier("resnet18")


@pytest.mark.parametrize(("prefix", "name"), [("", "anna/vit"), ("", "anna/timm"), ("hf-hub:", "anna/timm")])
def test_reasons_of_the_hub(prefix, name, published):
    with pytest.raises(ValueError, match=f"^`revision` 'v2' of '{name}' is not on the Hub"):
        load_feature_classifier(prefix + name, revision="v2")
    with pytest.raises(
        ValueError, match=f"'{name}-pickled' must hold model.safetensors: pickled weights can run code"
    ):
        load_feature_classifier(f"{prefix}{name}-pickled")
    with pytest.raises(
        ValueError, match=f"No classifier '{name}-private' .* or it is private: then run `hf auth login`"
    ):
        load_feature_classifier(f"{prefix}{name}-private", token=False)
    load_feature_classifier(f"{prefix}{name}-private", token="hf_anna_may_write")


def test_repository_without_a_classifier(published):
    with pytest.raises(ValueError, match="^'anna/notes' is on the Hub, but holds no classifier"):
        load_feature_classifier("anna/notes")


def test_hub_out_of_reach(hub, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between two tries
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/{filename}")
    with pytest.raises(ValueError, match="^'anna/vit' is not in the cache, and the Hub is out of reach"):
        load_feature_classifier("anna/vit")


# Arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"library": "keras"}, "`library`.*'keras'"),
        ({"interpolation": "nearest"}, "`interpolation`.*'nearest'"),
        ({"num_classes": 0}, "`num_classes`.*0"),
        ({"in_channels": 0}, "`in_channels`.*0"),
        ({"image_size": 0}, "`image_size`.*0"),
        ({"image_size": 100_000}, "`image_size`.*to 4096, got 100000"),
        ({"num_classes": 10**12}, "`num_classes`.*to 1000000, got 1000000000000"),
        ({"num_classes": True}, "`num_classes`.*True"),
        ({"backbone_config": {"chanels": [8]}}, "`backbone_config`.*'resnet18'.*'chanels'"),
        ({"backbone_config": {"channels": [10**9] * 4}}, "`backbone_config`.*'resnet18'.*1000000000"),
        ({"image_mean": [0.5, 0.5]}, r"`image_mean`.*3.*\[0.5, 0.5\]"),
        ({"image_std": 0.0}, "`image_std`.*0.0"),
        ({"backbone": "resnet81"}, "'resnet81'.*resnet18"),
        ({"backbone": "resnet18.no_such_tag"}, "no_such_tag.*a1_in1k"),
        ({"backbone": "no-such-type", "library": "transformers"}, "'no-such-type'"),
    ],
)
def test_arguments_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        FeatureClassifier(**arguments)
    assert FeatureClassifier(backbone_config=SMALL_RESNET).num_features == 16


@pytest.mark.parametrize(
    ("channels", "shape", "message"),
    [
        (3, (3, 8, 8), r"\(B, 3 or 1, H, W\), got \(3, 8, 8\)"),
        (3, (2, 2, 8, 8), r"got \(2, 2, 8, 8\)"),
        (1, (2, 3, 8, 8), r"\(B, 1, H, W\), got \(2, 3, 8, 8\)"),
    ],
)
def test_images_of_a_wrong_shape(channels, shape, message):
    with pytest.raises(ValueError, match=message):
        small_resnet(in_channels=channels)(torch.zeros(shape))


@pytest.mark.parametrize(
    ("images", "message"), [(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "torch.uint8"), ([[0.0]], "list")]
)
def test_images_of_a_wrong_type(images, message):
    with pytest.raises(TypeError, match=message):
        small_resnet()(images)


@pytest.mark.parametrize(
    "backbone, config, channels",
    [("resnet18", SMALL_RESNET, [64, 8, 8, 16, 16]), ("vit_tiny_patch16_224", SMALL_VIT, [16])],
)
def test_spatial_features_are_the_stages_of_timm(backbone, config, channels):
    model = FeatureClassifier(backbone, backbone_config=config, num_classes=5, image_size=16).freeze()
    images = images_of(size=16).requires_grad_()
    maps = model.spatial_features(images)
    channels = channels[-len(maps) :]
    assert [m.shape[1] for m in maps] == channels and all(m.ndim == 4 and len(m) == 2 for m in maps)
    (last,) = model.spatial_features(images, [-1])
    torch.testing.assert_close(last, maps[-1])
    if backbone == "resnet18":
        torch.testing.assert_close(last.mean((2, 3)), model(images).features)
    sum(m.square().sum() for m in maps).backward()
    assert images.grad.abs().max() > 0
    with pytest.raises(ValueError, match=r"`stages` must be in -\d..\d for this backbone, got 9"):
        model.spatial_features(images, [9])


@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_spatial_features_of_transformers(name, checkpoints):
    model = load_feature_classifier(str(checkpoints[name]))
    maps = model.spatial_features(images_of(size=16))
    assert len(maps) > 1 and all(m.ndim == 4 and len(m) == 2 for m in maps)
    assert maps[-1].shape[1] == {"resnet": 12, "vit": 16}[name]

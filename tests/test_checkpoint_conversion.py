"""Conversion of the authors' checkpoints, against golden outputs and against their networks written out below."""

import itertools
import math
import os
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from diffusers_rcfd import FeatureClassifier, RCFDPipeline, build_unet
from diffusers_rcfd.models.authors_checkpoints import convert_classifier, convert_unet, read_checkpoint
from tests.toys import GOLDEN, golden

SCRIPT = Path(__file__).parent.parent / "examples" / "convert_checkpoint.py"
CHECKPOINT = GOLDEN / "official_small_ckpt.pt"
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


class RandomState(dict):
    """A state dict of random weights under which activations keep their size."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(0)

    def layer(self, name, *shape, bias=True):
        self[f"{name}.weight"] = torch.randn(shape, generator=self.generator) / math.prod(shape[1:]) ** 0.5
        if bias:
            self[f"{name}.bias"] = 0.1 * torch.randn(shape[0], generator=self.generator)

    def norm(self, name, channels, statistics=False):
        self[f"{name}.weight"] = 1 + 0.1 * torch.randn(channels, generator=self.generator)
        self[f"{name}.bias"] = 0.1 * torch.randn(channels, generator=self.generator)
        if statistics:
            self[f"{name}.running_mean"] = 0.1 * torch.randn(channels, generator=self.generator)
            self[f"{name}.running_var"] = 0.5 + torch.rand(channels, generator=self.generator)


# --- the U-Net ------------------------------------------------------------------------------------------------


def unet_state(ch=32, multipliers=(1, 2), attention=(1,), blocks=1, classes=None):
    state = RandomState()

    def residual_block(name, c_in, c_out, attend):
        state.norm(f"{name}.block1.0", c_in)
        state.layer(f"{name}.block1.2", c_out, c_in, 3, 3)
        state.layer(f"{name}.temb_proj.1", c_out, 4 * ch)
        state.norm(f"{name}.block2.0", c_out)
        state.layer(f"{name}.block2.3", c_out, c_out, 3, 3)
        if c_in != c_out:
            state.layer(f"{name}.shortcut", c_out, c_in, 1, 1)
        if attend:
            state.norm(f"{name}.attn.group_norm", c_out)
            for part in ("proj_q", "proj_k", "proj_v", "proj"):
                state.layer(f"{name}.attn.{part}", c_out, c_out, 1, 1)

    angles = torch.arange(1025.0)[:, None] / 10000 ** (torch.arange(0, ch, 2) / ch)
    state["time_embedding.timembedding.0.weight"] = torch.stack([angles.sin(), angles.cos()], 2).reshape(1025, ch)
    state.layer("time_embedding.timembedding.1", 4 * ch, ch)
    state.layer("time_embedding.timembedding.3", 4 * ch, 4 * ch)
    if classes:
        state.layer("y_embedding", 4 * ch, classes)
    state.layer("head", ch, 3, 3, 3)
    width, skips, index = ch, [ch], itertools.count()
    for level, multiplier in enumerate(multipliers):
        for _ in range(blocks):
            residual_block(f"downblocks.{next(index)}", width, ch * multiplier, level in attention)
            width = ch * multiplier
            skips.append(width)
        if level < len(multipliers) - 1:
            state.layer(f"downblocks.{next(index)}.main", width, width, 3, 3)
            skips.append(width)
    residual_block("middleblocks.0", width, width, True)
    residual_block("middleblocks.1", width, width, False)
    index = itertools.count()
    for level, multiplier in reversed(list(enumerate(multipliers))):
        for _ in range(blocks + 1):
            residual_block(f"upblocks.{next(index)}", width + skips.pop(), ch * multiplier, level in attention)
            width = ch * multiplier
        if level > 0:
            state.layer(f"upblocks.{next(index)}.main", width, width, 3, 3)
    state.norm("tail.0", width)
    state.layer("tail.2", 3, width, 3, 3)
    return dict(state)


def unet_checkpoint(T=8, size=16, **architecture):
    state = unet_state(**architecture)
    return {"net_model": state, "x_T": torch.zeros(1, 3, size, size), "T": T, "time_scale": 1024 // T, "step": 3}


@torch.no_grad()
def official_unet(state, x, t, labels=None):
    """The authors' network as a function of its weights."""

    def conv(name, h, stride=1):
        weight = state[f"{name}.weight"]
        return F.conv2d(h, weight, state[f"{name}.bias"], stride=stride, padding=weight.shape[-1] // 2)

    def linear(name, h):
        return F.linear(h, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(name, h):
        return F.group_norm(h, 32, state[f"{name}.weight"], state[f"{name}.bias"])

    def block(name, x):
        h = conv(f"{name}.block1.2", F.silu(norm(f"{name}.block1.0", x)))
        h = h + linear(f"{name}.temb_proj.1", F.silu(embedding))[:, :, None, None]
        h = conv(f"{name}.block2.3", F.silu(norm(f"{name}.block2.0", h)))
        h = h + (conv(f"{name}.shortcut", x) if f"{name}.shortcut.weight" in state else x)
        if f"{name}.attn.proj.weight" not in state:
            return h
        normed = norm(f"{name}.attn.group_norm", h)
        q, k, v = (conv(f"{name}.attn.proj_{part}", normed).flatten(2) for part in "qkv")  # (B, C, HW)
        weights = torch.softmax(q.transpose(1, 2) @ k / h.shape[1] ** 0.5, dim=-1)  # (B, HW, HW)
        return h + conv(f"{name}.attn.proj", (v @ weights.transpose(1, 2)).reshape(h.shape))

    name = "time_embedding.timembedding"
    embedding = linear(f"{name}.3", F.silu(linear(f"{name}.1", state[f"{name}.0.weight"][t])))
    if labels is not None:
        embedding = embedding + linear("y_embedding", F.one_hot(labels, state["y_embedding.weight"].shape[1]).float())
    h = conv("head", x)
    skips = [h]
    for i in range(sum(bool(re.match(r"downblocks\.\d+\.(main|block2\.3)\.bias", key)) for key in state)):
        name = f"downblocks.{i}"
        h = conv(f"{name}.main", h, stride=2) if f"{name}.main.weight" in state else block(name, h)
        skips.append(h)
    h = block("middleblocks.1", block("middleblocks.0", h))
    for i in range(sum(bool(re.match(r"upblocks\.\d+\.(main|block2\.3)\.bias", key)) for key in state)):
        name = f"upblocks.{i}"
        if f"{name}.main.weight" in state:
            h = conv(f"{name}.main", F.interpolate(h, scale_factor=2.0, mode="nearest"))
        else:
            h = block(name, torch.cat([h, skips.pop()], dim=1))
    return conv("tail.2", F.silu(norm("tail.0", h)))


@torch.no_grad()
def assert_same_unet(unet, state, size=16, labels=None):
    x, t = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1)), torch.tensor([1024, 37])
    torch.testing.assert_close(unet(x, t, labels).sample, official_unet(state, x, t, labels), **CLOSE)


def test_golden_student():
    checkpoint, numbers = read_checkpoint(CHECKPOINT), golden("official_small_io")
    x, t, y = numbers["x"], numbers["t"], numbers["y"]
    pipeline = RCFDPipeline(*convert_unet(checkpoint))
    assert not pipeline.unet.training and pipeline.image_shape == (3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(pipeline.unet(x, t).sample, y, atol=1e-5, rtol=0)
    # The network written out in this file is theirs, too: the other tests hold conversion against it.
    torch.testing.assert_close(official_unet(checkpoint["net_model"], x, t), y, atol=1e-5, rtol=0)


def test_golden_sampling_takes_their_steps():
    checkpoint, schedule = read_checkpoint(CHECKPOINT), golden("schedule")
    T, time_scale, z = checkpoint["T"], checkpoint["time_scale"], checkpoint["x_T"]
    pipeline = RCFDPipeline(*convert_unet(checkpoint))
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(latents=z, output_type="pt").images
    assert pipeline.scheduler.config.num_inference_steps == T == 4
    assert len(pipeline.scheduler) == len(schedule["alpha"]) == 1025
    for k in range(T, 0, -1):
        t, s = k * time_scale, (k - 1) * time_scale
        x0 = official_unet(checkpoint["net_model"], z, torch.full((len(z),), t)).clamp(-1, 1)
        eps = (z - schedule["alpha"][t] * x0) / schedule["sigma"][t]
        z = schedule["alpha"][s] * x0 + schedule["sigma"][s] * eps
    torch.testing.assert_close(images * 2 - 1, z.float().clamp(-1, 1), **CLOSE)


def test_cifar10_network_has_every_key_matched():
    checkpoint = unet_checkpoint(T=1, size=32, ch=128, multipliers=(1, 2, 2, 2), attention=(1,), blocks=2)
    unet, _ = convert_unet(checkpoint)
    assert sum(parameter.numel() for parameter in unet.parameters()) == 35_746_307
    preset = build_unet("cifar10")
    assert {**unet.config, "_use_default_values": []} == {**preset.config, "_use_default_values": []}
    assert unet.state_dict().keys() == preset.state_dict().keys()
    assert_same_unet(unet, checkpoint["net_model"])


@pytest.mark.parametrize(
    "architecture",
    [
        {"multipliers": (1, 1, 1), "attention": (1, 2), "blocks": 3},
        {"multipliers": (1, 2), "attention": (0,), "blocks": 2},
        {"multipliers": (1,), "attention": ()},
    ],
)
def test_architecture_is_read_off_the_tensors(architecture):
    checkpoint = unet_checkpoint(**architecture)
    unet, _ = convert_unet(checkpoint)
    levels = range(len(architecture["multipliers"]))
    attention = [block.startswith("Attn") for block in unet.config.down_block_types]
    assert attention == [level in architecture["attention"] for level in levels]
    assert [block.startswith("Attn") for block in unet.config.up_block_types] == attention[::-1]
    assert_same_unet(unet, checkpoint["net_model"])


def test_class_conditional_network():
    checkpoint = unet_checkpoint(classes=5)
    unet, _ = convert_unet(checkpoint)
    assert unet.config.num_class_embeds == 5
    assert_same_unet(unet, checkpoint["net_model"], labels=torch.tensor([4, 1]))


def test_base_model_and_the_choice_of_weights():
    checkpoint = unet_checkpoint(T=1024)
    checkpoint["ema_model"] = {key: 0.5 * tensor for key, tensor in checkpoint["net_model"].items()}
    table = "time_embedding.timembedding.0.weight"
    checkpoint["ema_model"][table] = checkpoint["net_model"][table] + 2e-4  # what averaging leaves of it
    for weights, name in (("auto", "ema_model"), ("ema_model", "ema_model"), ("net_model", "net_model")):
        unet, scheduler = convert_unet(checkpoint, weights)
        assert torch.equal(unet.conv_in.weight, checkpoint[name]["head.weight"])
        assert scheduler.config.num_inference_steps is None
        assert scheduler.config.prediction_type == "sample"
    _, scheduler = convert_unet(checkpoint, num_inference_steps=8, prediction_type="epsilon")
    assert scheduler.config.num_inference_steps == 8
    assert scheduler.config.prediction_type == "epsilon"
    del checkpoint["ema_model"]
    assert torch.equal(convert_unet(checkpoint)[0].conv_in.weight, checkpoint["net_model"]["head.weight"])


def test_data_parallel_prefix():
    checkpoint = unet_checkpoint()
    plain = convert_unet(checkpoint)[0].state_dict()
    checkpoint["net_model"] = {f"module.{key}": tensor for key, tensor in checkpoint["net_model"].items()}
    prefixed = convert_unet(checkpoint)[0].state_dict()
    assert all(torch.equal(prefixed[key], tensor) for key, tensor in plain.items())


@pytest.mark.parametrize(
    "change, message",
    [
        ({"net_model": None}, "`net_model` of the checkpoint must be a dict of tensors, got NoneType"),
        ({"T": None}, "must have an integer `T` of at least 1, got None"),
        ({"time_scale": 64}, r"must have T \* time_scale \+ 1 = 513 rows, got shape \(1025, 32\)"),
        ({"x_T": None}, "must have a tensor `x_T`"),
        ({"tail.2.weight": None}, "no tensor 'tail.2.weight'"),
        ({"downblocks.0.block2.3.bias": None}, r"missing: downblocks\.0\.block2\.3\.bias\.$"),
        ({"middleblocks.0.attn.proj.weight": None}, r"missing: middleblocks\.0\.attn\.proj\.weight\.$"),
        ({"upblocks.0.attn.scale": torch.ones(1)}, r"not of this network: upblocks\.0\.attn\.scale\.$"),
        ({"upblocks.4.attn.proj.bias": torch.ones(32)}, r"missing: .*upblocks\.3\.attn\.proj_k\.bias.* and 11 more\."),
        ({"y_embedding.weight": torch.ones(128, 5)}, "no tensor 'y_embedding.bias'"),
        ({"head.weight": torch.ones(16, 3, 3, 3)}, r"head.weight \(16, 3, 3, 3\) instead of \(32, 3, 3, 3\)"),
        ({"time_embedding.timembedding.0.weight": torch.ones(1025, 32)}, "must hold the sinusoidal embedding"),
        ({"tail.0.bias": 1.0}, "`net_model` .* must hold tensors only, got something else at tail.0.bias"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    checkpoint = unet_checkpoint()
    for key, value in change.items():
        where = checkpoint if key in checkpoint else checkpoint["net_model"]
        if value is None and "." in key:
            del where[key]
        else:
            where[key] = value
    with pytest.raises(ValueError, match=message):
        convert_unet(checkpoint)


def test_arguments_are_checked():
    checkpoint = unet_checkpoint()
    with pytest.raises(ValueError, match=r"`weights` must be one of \('auto', .*, got 'ema'"):
        convert_unet(checkpoint, weights="ema")
    with pytest.raises(ValueError, match="must have `ema_model`, got net_model, x_T, T, time_scale, step"):
        convert_unet(checkpoint, weights="ema_model")
    with pytest.raises(ValueError, match="`num_inference_steps` must be an integer of at least 1, got 0"):
        convert_unet(checkpoint, num_inference_steps=0)


class Code:
    def __reduce__(self):
        return os.mkdir, ("made-by-a-pickle",)


def test_only_tensors_are_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"net_model": Code(), "T": 4}, "code.pt")
    content = CHECKPOINT.read_bytes()
    for name, data in (("half.pt", content[: len(content) // 2]), ("text.pt", b"weights"), ("empty.pt", b"")):
        Path(name).write_bytes(data)
    for name in ("code.pt", "half.pt", "text.pt", "empty.pt"):
        with pytest.raises(ValueError, match=f"`checkpoint` '{name}' cannot be read with weights_only=True"):
            read_checkpoint(name)
    assert not Path("made-by-a-pickle").exists()
    torch.save(torch.ones(2), "tensor.pt")
    with pytest.raises(ValueError, match="must hold a dict, got Tensor"):
        read_checkpoint("tensor.pt")
    with pytest.raises(FileNotFoundError):
        read_checkpoint("none.pt")


# --- classifiers ----------------------------------------------------------------------------------------------


def resnet_state(layers=(1, 2, 1, 1), channels=(8, 16, 16, 32), bottleneck=False, shortcut="downsample", last="fc"):
    state, width, expansion = RandomState(), 64, 4 if bottleneck else 1
    state.layer("conv1", 64, 3, 3, 3, bias=False)
    state.norm("bn1", 64, statistics=True)
    for k, (blocks, c) in enumerate(zip(layers, channels, strict=True), start=1):
        for j in range(blocks):
            shapes = [(c, width, 1), (c, c, 3), (4 * c, c, 1)] if bottleneck else [(c, width, 3), (c, c, 3)]
            for i, (c_out, c_in, kernel) in enumerate(shapes, start=1):
                state.layer(f"layer{k}.{j}.conv{i}", c_out, c_in, kernel, kernel, bias=False)
                state.norm(f"layer{k}.{j}.bn{i}", c_out, statistics=True)
            if j == 0 and (k > 1 or width != c * expansion):
                state.layer(f"layer{k}.0.{shortcut}.0", c * expansion, width, 1, 1, bias=False)
                state.norm(f"layer{k}.0.{shortcut}.1", c * expansion, statistics=True)
            width = c * expansion
    state.layer(last, 10, width)
    return dict(state)


def batch_norm(state, name, h):
    names = (f"{name}.{part}" for part in ("running_mean", "running_var", "weight", "bias"))
    return F.batch_norm(h, *(state[part] for part in names))


def official_resnet(state, x, shortcut="downsample", last="fc"):
    """Logits and features of He et al.'s network behind a 3x3 convolution."""

    def conv(block, i, h, stride=1):
        weight = state[f"{block}conv{i}.weight"]
        return batch_norm(state, f"{block}bn{i}", F.conv2d(h, weight, stride=stride, padding=weight.shape[-1] // 2))

    h = F.relu(conv("", 1, x))
    found = (re.match(r"layer(\d)\.(\d+)", key) for key in state)
    for k, j in sorted({tuple(map(int, match.groups())) for match in found if match}):
        name, stride = f"layer{k}.{j}.", 2 if k > 1 and j == 0 else 1
        skip = h
        if f"{name}{shortcut}.0.weight" in state:
            skip = F.conv2d(h, state[f"{name}{shortcut}.0.weight"], stride=stride)
            skip = batch_norm(state, f"{name}{shortcut}.1", skip)
        if f"{name}conv3.weight" in state:
            inner = F.relu(conv(name, 2, F.relu(conv(name, 1, h)), stride))
            h = F.relu(conv(name, 3, inner) + skip)
        else:
            h = F.relu(conv(name, 2, F.relu(conv(name, 1, h, stride))) + skip)
    features = h.mean((2, 3))
    return F.linear(features, state[f"{last}.weight"], state[f"{last}.bias"]), features


DENSENET_NAMES = {  # block, transition, last norm, last layer
    "authors": ("block{}", "trans{}", "final_norm", "fc"),
    "torchvision": ("features.denseblock{}", "features.transition{}", "features.norm5", "classifier"),
}


def densenet_state(layers=(2, 3, 1), growth=8, bn_size=2, style="authors"):
    block, transition, final_norm, last = DENSENET_NAMES[style]
    state, width = RandomState(), 2 * growth
    state.layer("features.conv0", width, 3, 3, 3, bias=False)
    state.norm("features.norm0", width, statistics=True)
    for k, count in enumerate(layers, start=1):
        for j in range(1, count + 1):
            name = f"{block.format(k)}.denselayer{j}"
            state.norm(f"{name}.norm1", width, statistics=True)
            state.layer(f"{name}.conv1", bn_size * growth, width, 1, 1, bias=False)
            state.norm(f"{name}.norm2", bn_size * growth, statistics=True)
            state.layer(f"{name}.conv2", growth, bn_size * growth, 3, 3, bias=False)
            width += growth
        if k < len(layers):
            state.norm(f"{transition.format(k)}.norm", width, statistics=True)
            state.layer(f"{transition.format(k)}.conv", width // 2, width, 1, 1, bias=False)
            width //= 2
    state.norm(final_norm, width, statistics=True)
    state.layer(last, 10, width)
    return dict(state)


def official_densenet(state, x, layers=(2, 3, 1), style="authors"):
    """Logits and features of Huang et al.'s DenseNet-BC behind a 3x3 convolution."""
    block, transition, final_norm, last = DENSENET_NAMES[style]

    def activated(name, h):
        return F.relu(batch_norm(state, name, h))

    h = activated("features.norm0", F.conv2d(x, state["features.conv0.weight"], padding=1))
    for k, count in enumerate(layers, start=1):
        for j in range(1, count + 1):
            name = f"{block.format(k)}.denselayer{j}"
            inner = F.conv2d(activated(f"{name}.norm1", h), state[f"{name}.conv1.weight"])
            new = F.conv2d(activated(f"{name}.norm2", inner), state[f"{name}.conv2.weight"], padding=1)
            h = torch.cat([h, new], dim=1)
        if k < len(layers):
            name = transition.format(k)
            h = F.avg_pool2d(F.conv2d(activated(f"{name}.norm", h), state[f"{name}.conv.weight"]), 2)
    features = activated(final_norm, h).mean((2, 3))
    return F.linear(features, state[f"{last}.weight"], state[f"{last}.bias"]), features


@torch.no_grad()
def assert_same_classifier(checkpoint, official):
    """With the default normalisation and, as the authors' distillation feeds it, without."""
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    mean, std = torch.tensor([0.4914, 0.4822, 0.4465]), torch.tensor([0.2023, 0.1994, 0.2010])
    normalised = ((images + 1) / 2 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    for reference, fed in ((False, normalised), (True, images)):
        classifier = convert_classifier(checkpoint, reference=reference)
        assert not classifier.training and classifier.config.reference is reference
        logits, features = official(fed)
        output = classifier(images)
        torch.testing.assert_close(output.features, features, **CLOSE)
        torch.testing.assert_close(output.logits, logits, **CLOSE)
    return classifier


@pytest.mark.parametrize("bottleneck", [False, True])
@pytest.mark.parametrize("key, names", [("model", ("downsample", "fc")), ("net", ("shortcut", "linear"))])
def test_resnet(key, names, bottleneck):
    state = resnet_state(bottleneck=bottleneck, shortcut=names[0], last=names[1])
    checkpoint = {key: {f"module.{name}": tensor for name, tensor in state.items()}, "acc": 95.0}
    assert_same_classifier(checkpoint, lambda x: official_resnet(state, x, *names))


@pytest.mark.parametrize("style", DENSENET_NAMES)
def test_densenet(style):
    state = densenet_state(style=style)
    assert_same_classifier({"model": state}, lambda x: official_densenet(state, x, style=style))


def test_networks_of_the_paper():
    state = resnet_state((2, 2, 2, 2), (64, 128, 256, 512))
    classifier = assert_same_classifier({"model": state}, lambda x: official_resnet(state, x))
    assert classifier.config.backbone == "resnet18" and classifier.config.backbone_config is None
    assert (classifier.num_features, classifier.num_classes) == (512, 10)
    layers = (6, 12, 48, 32)
    state = densenet_state(layers, growth=32, bn_size=4)
    classifier = assert_same_classifier({"model": state}, lambda x: official_densenet(state, x, layers))
    assert classifier.config.backbone == "densenet201" and classifier.config.backbone_config is None
    assert classifier.num_features == 1920


def test_normalisation_is_that_of_the_arguments():
    state = resnet_state()
    classifier = convert_classifier(state, image_mean=0.5, image_std=0.25)
    images = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(classifier(images).logits, official_resnet(state, 2 * images)[0], **CLOSE)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"conv1.weight": torch.ones(64, 3, 7, 7)}, r"`conv1.weight` must be a 3x3 .*, got \(64, 3, 7, 7\)"),
        ({"bn1.running_var": None}, r"missing: bn1.running_var\.$"),
        ({"layer2.1.fc1.weight": torch.ones(1)}, r"not of this network: layer2\.1\.fc1\.weight\.$"),
        ({"fc.weight": None}, "no last layer: none of `fc`, `linear` and `classifier`"),
        ({"layer4.0.conv1.weight": None}, "no tensor 'layer4.0.conv1.weight'"),
        ({"layer1.0.conv1.weight": None}, "must hold a ResNet or a DenseNet, got layers conv1.weight, bn1.weight"),
        ({"layer1.0.conv2.weight": torch.ones(8, 4, 3, 3)}, r"of another shape: layer1.0.conv2.weight \(8, 4, 3, 3\)"),
    ],
)
def test_classifier_that_does_not_fit_is_refused(change, message):
    state = resnet_state()
    for key, value in change.items():
        if value is None:
            del state[key]
        else:
            state[key] = value
    with pytest.raises(ValueError, match=message):
        convert_classifier({"model": state})


def test_other_files_are_no_classifier():
    with pytest.raises(ValueError, match="straight into the first block; timm's has a norm and ReLU in between"):
        convert_classifier({"net": {"conv1.weight": torch.ones(1), "dense1.0.conv1.weight": torch.ones(1)}})
    with pytest.raises(ValueError, match="must hold tensors only, got something else at net_model, T, time_scale"):
        convert_classifier(unet_checkpoint())
    state = densenet_state()
    with pytest.raises(ValueError, match="no tensor 'block1.denselayer1'"):
        convert_classifier({key: tensor for key, tensor in state.items() if "block1" not in key})
    del state["final_norm.bias"]
    with pytest.raises(ValueError, match=r"missing: features\.norm5\.bias\.$"):
        convert_classifier(state)


# --- the script -----------------------------------------------------------------------------------------------


@pytest.fixture
def convert(monkeypatch):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", [SCRIPT.name, *map(str, arguments)])
        runpy.run_path(str(SCRIPT), run_name="__main__")

    return run


def test_script_writes_a_pipeline(convert, tmp_path, capsys):
    convert("--checkpoint", CHECKPOINT, "--output", tmp_path / "student")
    state = read_checkpoint(CHECKPOINT)["net_model"]
    count = sum(tensor.numel() for tensor in state.values()) - state["time_embedding.timembedding.0.weight"].numel()
    assert f"The 4-step model, {count:,} parameters" in capsys.readouterr().out
    loaded, numbers = RCFDPipeline.from_pretrained(tmp_path / "student"), golden("official_small_io")
    assert loaded.scheduler.config.num_inference_steps == 4
    with torch.no_grad():
        y = loaded.unet(numbers["x"], numbers["t"]).sample
    torch.testing.assert_close(y, numbers["y"], atol=1e-5, rtol=0)
    convert("--checkpoint", CHECKPOINT, "--output", tmp_path / "2", "--num_inference_steps", 2)
    assert RCFDPipeline.from_pretrained(tmp_path / "2").scheduler.config.num_inference_steps == 2


def test_script_writes_a_classifier(convert, tmp_path):
    torch.save({"model": resnet_state()}, tmp_path / "ckpt.pt")
    convert("--kind", "classifier", "--checkpoint", tmp_path / "ckpt.pt", "--output", tmp_path / "new", "--reference")
    loaded, images = FeatureClassifier.from_pretrained(tmp_path / "new"), torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(loaded(images).logits, official_resnet(resnet_state(), images)[0], **CLOSE)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--output", "{}/new"], "arguments are required: --checkpoint"),
        (["--checkpoint", "{}/none.pt", "--output", "{}/new"], "`checkpoint` must be a file, got '.*none.pt'"),
        (["--checkpoint", str(CHECKPOINT), "--output", "{}"], "`output` must be a new or empty folder"),
        (
            ["--checkpoint", str(CHECKPOINT), "--output", "{}/new", "--reference"],
            "`reference` must be unset for a U-N",
        ),
        (["--checkpoint", str(CHECKPOINT), "--output", "{}/new", "--weights", "ema"], "`weights` must be one of"),
        (["--checkpoint", str(CHECKPOINT), "--output", "{}/new", "--kind", "classifier"], "must hold tensors only"),
        (["--checkpoint", str(CHECKPOINT), "--output", "{}/new", "--weights", "ema_model"], "must have `ema_model`"),
    ],
)
def test_script_names_what_is_wrong(convert, tmp_path, capsys, arguments, message):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as leave:
        convert(*(argument.format(tmp_path) for argument in arguments))
    assert re.search(message, f"{leave.value.code} {capsys.readouterr().err}")
    assert not (tmp_path / "new").exists()

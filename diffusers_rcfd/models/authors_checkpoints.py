"""The authors' checkpoints turned into a `UNet2DModel` with its `RCFDScheduler`, and a `FeatureClassifier`.

A U-Net file is a dict of `net_model` (and, of a base model, `ema_model`), the noise `x_T` that its sample images start
from, `T` and `time_scale`, as their files and public code show. `T` is the number of steps N that the network was made
for. Its step k = 1..N is fed as the index t = k * time_scale, so T * time_scale is 1024 and the table of time
embeddings has 1025 rows. A base model has time_scale 1. A classifier file is a dict with `model`. Every number that
shapes a network is read off its tensors.

A file does not say what the network predicts (x0 by default), the schedule (cosine), the normalisation of the
classifier's images, the strides of its convolutions or what it pools: these are arguments or assumed.
"""

import math
import re
from collections.abc import Sequence
from os import PathLike
from typing import Any

import torch
from diffusers import UNet2DModel

from diffusers_rcfd.models.feature_classifier import FeatureClassifier
from diffusers_rcfd.models.state_dicts import check_tensors, get_tensor, load_tensors, shorten
from diffusers_rcfd.models.unet_presets import build_unet
from diffusers_rcfd.schedulers.scheduling_rcfd import RCFDScheduler
from diffusers_rcfd.validation import require, require_count

WEIGHTS = ("auto", "ema_model", "net_model")
# What the authors train their classifiers with; the deviation of all CIFAR-10 pixels is (0.2470, 0.2435, 0.2616).
CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.2023, 0.1994, 0.2010)

_TABLE = "time_embedding.timembedding.0.weight"
_TIME_INPUT = "time_embedding.timembedding.1.weight"
_LABEL_INPUT = ("y_embedding.weight", "y_embedding.bias")
# Modules of their U-Net and of UNet2DModel.
_ENDS = {
    "time_embedding.timembedding.1": "time_embedding.linear_1",
    "time_embedding.timembedding.3": "time_embedding.linear_2",
    "head": "conv_in",
    "tail.0": "conv_norm_out",
    "tail.2": "conv_out",
}
_RESIDUAL_BLOCK = {
    "block1.0": "norm1",
    "block1.2": "conv1",
    "temb_proj.1": "time_emb_proj",
    "block2.0": "norm2",
    "block2.3": "conv2",
    "shortcut": "conv_shortcut",
}
_ATTENTION = {"group_norm": "group_norm", "proj_q": "to_q", "proj_k": "to_k", "proj_v": "to_v", "proj": "to_out.0"}

_RESNET_NAMES = {r"^linear\.": "fc.", r"\.shortcut\.": ".downsample."}
_DENSENET_NAMES = {
    r"^block(\d+)\.": r"features.denseblock\1.",
    r"^trans(\d+)\.": r"features.transition\1.",
    r"^final_norm\.": "features.norm5.",
    r"^fc\.": "classifier.",
}


def read_checkpoint(path: str | PathLike) -> dict[str, Any]:
    """Read a `.pt` file of tensors onto the CPU, running no code that it may hold (`weights_only=True`).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is truncated, holds anything but tensors and plain values, or no dict.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # a broken pickle can fail in any way
        # Of torch's message only the reason: the rest is advice to switch the safeguard off.
        reason = next((line for line in str(error).splitlines() if "nsupported" in line), type(error).__name__)
        raise ValueError(
            f"`checkpoint` {str(path)!r} cannot be read with weights_only=True: it is truncated, in another format or "
            f"holds code ({reason})."
        ) from error
    if not isinstance(checkpoint, dict):
        raise ValueError(f"`checkpoint` {str(path)!r} must hold a dict, got {type(checkpoint).__name__}.")
    return checkpoint


def convert_unet(
    checkpoint: dict[str, Any],
    weights: str = "auto",
    num_inference_steps: int | None = None,
    prediction_type: str = "sample",
) -> tuple[UNet2DModel, RCFDScheduler]:
    """The network and scheduler of a base model or of a PD, CFD or RCFD student.

    Widths, levels, blocks a level, attention and classes are those of the tensors; the image size is that of `x_T`.

    Args:
        checkpoint (`dict`): what `read_checkpoint` returned.
        weights (`str`, defaults to `"auto"`): `"ema_model"`, `"net_model"`, or `"auto"`: the first of them that the
            file has. (Students have no `ema_model`.)
        num_inference_steps (`int`, *optional*): steps N to store with the model, instead of the file's `T`. A base
            model (time_scale 1) stores none and samples in any number.
        prediction_type (`str`, defaults to `"sample"`): what the network was trained to predict, which the file does
            not say: `"sample"` (x0, the authors' default) or `"epsilon"`.

    Raises:
        ValueError: for a file that is not of this format, naming what it lacks or what is left over.
    """
    if num_inference_steps is not None:
        require_count("num_inference_steps", num_inference_steps, 1)
    state = _choose_weights(checkpoint, weights)
    T, time_scale = (_read_count(checkpoint, name) for name in ("T", "time_scale"))
    table = get_tensor(state, _TABLE)
    _check_time_table(table, T, time_scale)
    x_T = checkpoint.get("x_T")
    if not isinstance(x_T, torch.Tensor) or x_T.ndim != 4:
        raise ValueError("`checkpoint` must have a tensor `x_T` of shape (B, C, H, W), which tells the image size.")

    down, up = _read_levels(state, "downblocks"), _read_levels(state, "upblocks")
    height, width = x_T.shape[-2:]
    unet = build_unet(
        "cifar10",
        sample_size=height if height == width else (height, width),
        in_channels=get_tensor(state, "head.weight").shape[1],
        out_channels=get_tensor(state, "tail.2.weight").shape[0],
        block_out_channels=tuple(
            get_tensor(state, f"downblocks.{level[0]}.block1.2.weight").shape[0] for level in down
        ),
        layers_per_block=len(down[0]),
        down_block_types=tuple(f"{_find_attention(state, 'downblocks', level)}DownBlock2D" for level in down),
        up_block_types=tuple(f"{_find_attention(state, 'upblocks', level)}UpBlock2D" for level in up),
        num_class_embeds=get_tensor(state, _LABEL_INPUT[0]).shape[1] if _LABEL_INPUT[0] in state else None,
    )
    modules = _name_modules(down, up)
    load_tensors(unet, _convert_tensors(state, modules), {ours: theirs for theirs, ours in modules.items()})
    if num_inference_steps is None and time_scale > 1:
        num_inference_steps = T
    scheduler = RCFDScheduler(len(table), prediction_type=prediction_type, num_inference_steps=num_inference_steps)
    return unet.eval(), scheduler


def convert_classifier(
    checkpoint: dict[str, Any],
    reference: bool = False,
    image_mean: float | Sequence[float] = CIFAR10_MEAN,
    image_std: float | Sequence[float] = CIFAR10_STD,
) -> FeatureClassifier:
    """The classifier of a ResNet or DenseNet made for small images: first convolution 3x3, and no pooling after it.

    It takes the layer names of the authors' ResNet and DenseNet files (those of torchvision but for the DenseNet's
    blocks, its last norm and its last layer) and of kuangliu/pytorch-cifar's ResNets. Each of these computes the same
    as timm's. The tensors do not tell ReLU, the strides of the papers, that no pooling follows the first convolution,
    and that the last layer takes an average over all positions: these are assumed. It refuses pytorch-cifar's DenseNet
    (which has no norm and ReLU after its first convolution, as timm's has), VGG and grouped or wide ResNets.

    Args:
        checkpoint (`dict`): what `read_checkpoint` returned; the weights are its `model`, `net` or `state_dict`, or
            the dict itself.
        reference (`bool`, defaults to False): feed [-1, 1] without normalisation, as the authors' distillation does.
            Right also for a classifier that was trained so.
        image_mean (`float` or one per channel): mean, on [0, 1], that it was trained with; the authors' by default.
        image_std (`float` or one per channel): standard deviation likewise.

    Returns:
        `FeatureClassifier` in eval mode.

    Raises:
        ValueError: for another network, naming the layers that are left over or missing.
    """
    state = next((checkpoint[key] for key in ("model", "net", "state_dict") if key in checkpoint), checkpoint)
    state = check_tensors(state, "model")
    if "layer1.0.conv1.weight" in state:
        backbone, config, names, first = *_describe_resnet(state), _RESNET_NAMES, "conv1.weight"
    elif "features.conv0.weight" in state:
        backbone, config, names, first = *_describe_densenet(state), _DENSENET_NAMES, "features.conv0.weight"
    elif "dense1.0.conv1.weight" in state:
        raise ValueError(
            "`checkpoint` holds pytorch-cifar's DenseNet, which goes from its first convolution straight into the "
            "first block; timm's has a norm and ReLU in between, so no weights make the two equal."
        )
    else:
        raise ValueError(f"`checkpoint` must hold a ResNet or a DenseNet, got layers {shorten(state)}.")
    stem = get_tensor(state, first)
    if stem.shape[-2:] != (3, 3):
        raise ValueError(
            f"`{first}` must be a 3x3 convolution, got {tuple(stem.shape)}: load a classifier of large images by its "
            "timm name with `load_feature_classifier`."
        )

    tensors = {}
    for key, tensor in state.items():
        name = key
        for pattern, replacement in names.items():
            name = re.sub(pattern, replacement, name)
        tensors[name] = (key, tensor)
    last = tensors.get("fc.weight") or tensors.get("classifier.weight")
    if last is None:
        raise ValueError(
            f"`checkpoint` has no last layer: none of `fc`, `linear` and `classifier` in {shorten(state)}."
        )
    classifier = FeatureClassifier(
        backbone,
        num_classes=len(last[1]),
        in_channels=stem.shape[1],
        image_mean=image_mean,
        image_std=image_std,
        small_stem=True,
        reference=reference,
        backbone_config=config,
    )
    load_tensors(classifier.network, tensors, theirs={})
    return classifier.eval()


def _choose_weights(checkpoint: dict[str, Any], weights: str) -> dict[str, torch.Tensor]:
    require(weights in WEIGHTS, "weights", weights, f"one of {WEIGHTS}")
    wanted = [name for name in WEIGHTS[1:] if weights in ("auto", name)]
    found = next((name for name in wanted if name in checkpoint), None)
    if found is None:
        raise ValueError(f"`checkpoint` must have `{'` or `'.join(wanted)}`, got {shorten(checkpoint)}.")
    return check_tensors(checkpoint[found], found)


def _check_time_table(table: torch.Tensor, T: int, time_scale: int) -> None:
    if table.ndim != 2 or len(table) != T * time_scale + 1:
        shape = tuple(table.shape)
        raise ValueError(f"`{_TABLE}` must have T * time_scale + 1 = {T * time_scale + 1} rows, got shape {shape}.")
    n, width = table.shape
    frequencies = torch.exp(-math.log(10000) * torch.arange(0, width, 2) / width)
    angles = torch.arange(n)[:, None] * frequencies
    expected = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)  # (n, width): sine, cosine, sine, ...
    # Not to the last digit: averaging the same numbers for many iterations leaves them up to 2e-4 away in `ema_model`.
    if not torch.allclose(table.float(), expected, atol=1e-3):
        raise ValueError(f"`{_TABLE}` must hold the sinusoidal embedding that UNet2DModel computes, got another one.")


def _read_levels(state: dict[str, torch.Tensor], path: str) -> list[list[int]]:
    """Indices of the residual blocks of each level in `"downblocks"` or `"upblocks"`: a resampler ends a level."""
    modules = {match.groups() for key in state if (match := re.match(rf"{path}\.(\d+)\.(\w+)", key))}
    levels: list[list[int]] = [[]]
    for index in sorted({int(index) for index, _ in modules}):
        if (str(index), "main") in modules:
            levels.append([])
        else:
            levels[-1].append(index)
    if not all(levels):
        raise ValueError(f"`checkpoint` must have a residual block at every level of `{path}`, got {levels}.")
    return levels


def _find_attention(state: dict[str, torch.Tensor], path: str, level: list[int]) -> str:
    return "Attn" if any(key.startswith(f"{path}.{i}.attn.") for key in state for i in level) else ""


def _name_modules(down: list[list[int]], up: list[list[int]]) -> dict[str, str]:
    """Each module of their U-Net with its name in UNet2DModel."""
    modules = dict(_ENDS)

    def add_block(theirs: str, ours: str, j: int) -> None:
        modules.update({f"{theirs}.{a}": f"{ours}.resnets.{j}.{b}" for a, b in _RESIDUAL_BLOCK.items()})
        modules.update({f"{theirs}.attn.{a}": f"{ours}.attentions.{j}.{b}" for a, b in _ATTENTION.items()})

    for path, levels in (("down", down), ("up", up)):
        for k, level in enumerate(levels):
            for j, index in enumerate(level):
                add_block(f"{path}blocks.{index}", f"{path}_blocks.{k}", j)
            modules[f"{path}blocks.{level[-1] + 1}.main"] = f"{path}_blocks.{k}.{path}samplers.0.conv"
    for j in (0, 1):
        add_block(f"middleblocks.{j}", "mid_block", j)
    return modules


def _convert_tensors(state: dict[str, torch.Tensor], modules: dict[str, str]) -> dict[str, tuple[str, torch.Tensor]]:
    """Name in UNet2DModel -> (name in the file, tensor); names that UNet2DModel has not stay as they are."""
    tensors = {}
    for key, tensor in state.items():
        module, _, parameter = key.rpartition(".")
        if key == _TIME_INPUT:  # their input is sine, cosine, sine, ...; ours all sines, then all cosines
            tensor = torch.cat([tensor[:, 0::2], tensor[:, 1::2]], dim=1)
        elif ".attn.proj" in key and tensor.ndim == 4:
            tensor = tensor.flatten(1)  # 1x1 convolution (C, C, 1, 1) -> linear layer (C, C)
        tensors[f"{modules.get(module, module)}.{parameter}"] = (key, tensor)
    del tensors[_TABLE]
    if _LABEL_INPUT[0] in state:  # a linear layer on one-hot labels: the same as a table of its columns
        (_, weight), (_, bias) = (tensors.pop(name, ("", get_tensor(state, name))) for name in _LABEL_INPUT)
        tensors["class_embedding.weight"] = (_LABEL_INPUT[0], weight.T + bias)
    return tensors


def _describe_resnet(state: dict[str, torch.Tensor]) -> tuple[str, dict[str, Any] | None]:
    """timm name and further arguments of a ResNet."""
    bottleneck = "layer1.0.conv3.weight" in state
    blocks = {match[0] for key in state if (match := re.match(r"layer\d+\.\d+", key))}
    layers = tuple(sum(block.startswith(f"layer{k}.") for block in blocks) for k in range(1, 5))
    channels = tuple(get_tensor(state, f"layer{k}.0.conv1.weight").shape[0] for k in range(1, 5))
    if not bottleneck and (layers, channels) == ((2, 2, 2, 2), (64, 128, 256, 512)):
        return "resnet18", None
    return "resnet50" if bottleneck else "resnet18", {"layers": list(layers), "channels": list(channels)}


def _describe_densenet(state: dict[str, torch.Tensor]) -> tuple[str, dict[str, Any] | None]:
    """timm name and further arguments of a DenseNet."""
    first = next((key for key in state if key.endswith("block1.denselayer1.conv2.weight")), "block1.denselayer1")
    growth_rate, width = get_tensor(state, first).shape[:2]
    layers = {match[1] for key in state if (match := re.search(r"(block\d+\.denselayer\d+)\.", key))}
    blocks = [layer.split(".")[0] for layer in layers]
    block_config = [blocks.count(block) for block in sorted(set(blocks))]
    if (growth_rate, width, block_config) == (32, 128, [6, 12, 48, 32]):
        return "densenet201", None
    return "densenet121", {"growth_rate": growth_rate, "block_config": block_config, "bn_size": width // growth_rate}


def _read_count(checkpoint: dict[str, Any], name: str) -> int:
    value = checkpoint.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"`checkpoint` must have an integer `{name}` of at least 1, got {value!r}.")
    return value

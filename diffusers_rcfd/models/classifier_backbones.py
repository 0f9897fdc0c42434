"""Where the networks of classifiers come from: timm models and transformers checkpoints, by name.

timm and transformers are imported when first needed.
"""

import difflib
import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from diffusers_rcfd.models.checkpoint_folder import checkpoint_folder, explain_hub_errors, read_config
from diffusers_rcfd.models.preprocessing import interpolation_of, measure_processor

logger = logging.getLogger(__name__)

_TIMM_PREFIXES = ("hf-hub:", "hf_hub:", "local-dir:")
_SOURCES = (
    "a folder or Hub repository saved by FeatureClassifier.save_pretrained, a transformers image-classification"
    " checkpoint (folder or Hub repository), or a timm model (its name, 'timm/<name>', 'hf-hub:<repository>' or"
    " 'local-dir:<folder>')"
)
# Image classifiers of transformers whose network takes something else than images.
_NO_IMAGES = {
    "imagegpt": "the numbers of colours",
    "shieldgemma2": "images with text",
    "siglip2": "patches with their positions",
}


def find_source(name: str, revision: str | None = None, token: str | None = None) -> tuple[str, str]:
    """Tell what `name` is: ("saved" | "timm" | "transformers", the name that its library takes)."""
    import timm

    folder = Path(name).expanduser()
    if (folder / "config.json").is_file():
        return _source_of_config(read_config(folder / "config.json", name), name, str(folder))
    if name.startswith(_TIMM_PREFIXES):
        return "timm", name
    timm_name = name.removeprefix("timm/")
    if "/" not in timm_name and timm.is_model(timm_name):
        return "timm", timm_name
    if folder.is_dir():
        raise ValueError(f"Folder {name!r} has no config.json. Allowed: {_SOURCES}.")
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise ValueError(f"Unknown classifier {name!r}{_close_timm_names(timm_name)}. Allowed: {_SOURCES}.")

    from huggingface_hub import hf_hub_download

    with explain_hub_errors(name, revision, hint=f"{_close_timm_names(name)} Allowed: {_SOURCES}."):
        path = hf_hub_download(name, "config.json", revision=revision, token=token)
    return _source_of_config(read_config(Path(path), name), name, name)


def _source_of_config(config: dict[str, Any], name: str, location: str) -> tuple[str, str]:
    if config.get("_class_name") == "FeatureClassifier":
        return "saved", location
    if "model_type" in config:
        return "transformers", location
    if "architecture" in config:
        return "timm", f"{'local-dir' if Path(location).is_dir() else 'hf-hub'}:{location}"
    raise ValueError(f"The config.json of {name!r} is not of a classifier. Allowed: {_SOURCES}.")


def _close_timm_names(name: str) -> str:
    import timm

    close = difflib.get_close_matches(name.split("/")[-1], timm.list_models() + timm.list_pretrained(), n=3)
    return f" (close timm names: {', '.join(close)})" if close else ""


# timm


def build_timm(name: str, num_classes: int, in_channels: int, image_size: int | None, extra: dict) -> nn.Module:
    """A randomly initialised timm model; one of fixed input size is built for `image_size`."""
    import timm

    if _timm_config(name).fixed_input_size and image_size is not None:
        extra = {"img_size": image_size, **extra}
    try:
        return timm.create_model(name, pretrained=False, num_classes=num_classes, in_chans=in_channels, **extra)
    except (TypeError, RuntimeError, AssertionError, MemoryError) as error:
        if not extra:
            raise
        raise ValueError(f"`backbone_config` must fit timm's {name!r}, got {extra}: {error}") from error


def _timm_config(name: str) -> Any:
    import timm

    if not timm.is_model(name):
        raise ValueError(f"`backbone` {name!r} is not a timm model{_close_timm_names(name)}.")
    try:
        return timm.models.get_pretrained_cfg(name)
    except RuntimeError as error:
        allowed = timm.list_pretrained(f"{name.split('.')[0]}.*")
        raise ValueError(f"`backbone` {name!r} has a tag unknown to timm. Allowed: {allowed}.") from error


def load_timm(
    name: str,
    pretrained: bool,
    num_classes: int | None,
    in_channels: int | None,
    image_size: int | None,
    extra: dict,
    revision: str | None = None,
    token: str | None = None,
) -> tuple[nn.Module, dict[str, Any]]:
    """Create the timm model and the arguments with which the constructor builds the same."""
    from timm.data import resolve_model_data_config

    if name.startswith(_TIMM_PREFIXES):
        place = name.partition(":")[2]
        folder = _timm_folder(name, revision, token, pretrained)
        name = f"local-dir:{folder}"
    else:
        place = name
        folder = None
        _timm_config(name)
    sizes = {"num_classes": num_classes, "in_chans": in_channels}
    model = _create_timm(name, place, folder, pretrained, sizes, extra)
    if model.num_classes < 1:
        raise ValueError(f"`name_or_path` {place!r} has no classification layer: give `num_classes`.")
    saved = dict(getattr(model, "pretrained_model_args", None) or {})  # of a Hub repository or a folder
    data = resolve_model_data_config(model)
    fixed_size = model.pretrained_cfg.get("fixed_input_size", False)
    own_size = {**saved, **extra}.get("img_size", data["input_size"][-1])
    own_size = own_size if isinstance(own_size, int) else own_size[-1]
    if fixed_size and image_size not in (None, own_size):
        extra = {**extra, "img_size": image_size}
        model = _create_timm(name, place, folder, pretrained, sizes, extra)  # with its position embedding resampled
    extra = {**saved, **extra}
    return model, {
        "backbone": model.pretrained_cfg["architecture"] if folder else name,
        "num_classes": model.num_classes,
        "in_channels": in_channels or saved.get("in_chans", 3),
        "image_size": own_size,
        "image_mean": list(data["mean"]),
        "image_std": list(data["std"]),
        "interpolation": interpolation_of(data["interpolation"]),
        "backbone_config": {k: v for k, v in extra.items() if k not in ("num_classes", "in_chans")} or None,
        "fixed_size": fixed_size,
    }


def _create_timm(
    name: str, place: str, folder: Path | None, pretrained: bool, sizes: dict[str, int | None], extra: dict
) -> nn.Module:
    """Create a timm model with all its pretrained weights, or all but those of a last layer that is asked for."""
    import timm

    num_classes = sizes["num_classes"]
    if not pretrained:
        return timm.create_model(name, pretrained=False, **sizes, **extra)
    try:
        with explain_hub_errors(place):
            model = timm.create_model(name, pretrained=True, in_chans=sizes["in_chans"], **extra)
        trained = model.pretrained_cfg["num_classes"]
        if trained != model.num_classes:  # else timm has loaded all weights or raised
            raise RuntimeError(f"it tells of {trained} classes and builds a network for {model.num_classes}")
    except RuntimeError as error:
        if folder is None or num_classes is None:
            reason = f"{error}. Give `num_classes` for a new last layer; no other layer is made anew."
            raise ValueError(f"The weights of {place!r} must fit its config: {reason}") from error
        model = timm.create_model(name, pretrained=False, **sizes, **extra)
        _load_all_but_last_layer(model, folder, place)
        return model
    if num_classes not in (None, model.num_classes):
        model.reset_classifier(num_classes)
        _log_untrained(place, num_classes)
    return model


def _load_all_but_last_layer(model: nn.Module, folder: Path, place: str) -> None:
    own = model.state_dict()
    weights = load_file(folder / "model.safetensors")
    weights = {key: value for key, value in weights.items() if key in own and value.shape == own[key].shape}
    require_trained(model, own.keys() - weights.keys(), place, model.num_classes)
    model.load_state_dict(weights, strict=False)


def _timm_folder(name: str, revision: str | None, token: str | None, pretrained: bool) -> Path:
    """The folder of config and safetensors weights behind 'local-dir:FOLDER' or 'hf-hub:REPOSITORY[@REVISION]'."""
    prefix, _, place = name.partition(":")
    if prefix != "local-dir":
        place, _, named = place.partition("@")
        revision = revision or named or None
    elif not Path(place).expanduser().is_dir():
        raise ValueError(f"`name_or_path` must be the folder of a timm model, got {name!r}.")
    return checkpoint_folder(place, pretrained, revision, token)


def set_small_stem(backbone: nn.Module, in_channels: int, name: str) -> None:
    """Replace the first convolution by a 3x3 one of stride 1 and leave out the pooling after it (He et al. 2015)."""
    from timm.models.densenet import DenseNet
    from timm.models.resnet import ResNet

    if isinstance(backbone, ResNet):
        owner, convolution, pooling = backbone, "conv1", "maxpool"
    elif isinstance(backbone, DenseNet):
        owner, convolution, pooling = backbone.features, "conv0", "pool0"
    else:
        raise ValueError(f"`small_stem` is for timm's ResNet and DenseNet families, got {name!r}.")
    old = [module for module in getattr(owner, convolution).modules() if isinstance(module, nn.Conv2d)][-1]
    new = nn.Conv2d(in_channels, old.out_channels, kernel_size=3, stride=1, padding=1, bias=False)
    nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")
    setattr(owner, convolution, new)
    setattr(owner, pooling, nn.Identity())


# transformers


def build_transformers(name: str, num_classes: int, in_channels: int, config: dict[str, Any]) -> nn.Module:
    """A randomly initialised transformers image classifier of a stored config."""
    from transformers import AutoConfig, AutoModelForImageClassification
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING

    model_type = config.pop("model_type", name)
    try:
        config = AutoConfig.for_model(model_type, **config)
    except ValueError as error:
        raise ValueError(f"`backbone` {name!r} is not a model type that transformers knows: {error}") from error
    _require_images(config, name)
    if config.num_labels != num_classes:
        config.num_labels = num_classes
    if getattr(config, "num_channels", in_channels) != in_channels:
        config.num_channels = in_channels
    classes = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING[type(config)]
    if isinstance(classes, tuple) and not config.architectures:  # of which transformers then fails to choose
        config.architectures = [classes[0].__name__]
    return AutoModelForImageClassification.from_config(config)


def load_transformers(
    name: str,
    pretrained: bool,
    num_classes: int | None,
    in_channels: int | None,
    image_size: int | str | None,
    revision: str | None = None,
    token: str | None = None,
) -> tuple[nn.Module | None, dict[str, Any]]:
    """Load the transformers model, if wanted, and the arguments with which the constructor builds the same."""
    folder = checkpoint_folder(name, pretrained, revision, token)
    config = _transformers_config(folder, name, num_classes)
    channels = getattr(config, "num_channels", 3)
    model = None
    if pretrained:
        if in_channels not in (None, channels):
            raise ValueError(f"`in_channels` of the pretrained {name!r} must be {channels}, got {in_channels!r}.")
        model = _load_transformers_weights(folder, name, config, num_classes)
    elif isinstance(image_size, int) and hasattr(config, "image_size"):
        config.image_size = image_size
    stored = json.loads(config.to_json_string(use_diff=False))
    stored.pop("_name_or_path", None)
    return model, {
        "backbone": config.model_type,
        "num_classes": config.num_labels,
        "in_channels": in_channels or channels,
        "backbone_config": stored,
        **_processor_config(folder, name, config, channels),
    }


def _transformers_config(folder: Path, name: str, num_classes: int | None) -> Any:
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    stored = read_config(folder / "config.json", name)
    if stored["model_type"] not in CONFIG_MAPPING:
        code = " and brings its own code, which is not run" if "auto_map" in stored else ""
        raise ValueError(f"{name!r} is of a model type unknown to transformers, {stored['model_type']!r}{code}.")
    labels = {} if num_classes is None else {"num_labels": num_classes}
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, **labels)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"The config.json of {name!r} is damaged: {error}") from error
    _require_images(config, name)
    return config


def _require_images(config: Any, name: str) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING

    if config.model_type in _NO_IMAGES:
        taken = _NO_IMAGES[config.model_type]
        raise ValueError(f"{name!r} must be a network that takes images, got {config.model_type!r}: it takes {taken}.")
    if type(config) not in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
        raise ValueError(f"{name!r} must be an image classifier, got {config.model_type!r}.")


def _load_transformers_weights(folder: Path, name: str, config: Any, num_classes: int | None) -> nn.Module:
    from safetensors import SafetensorError
    from transformers import AutoModelForImageClassification

    options = {"ignore_mismatched_sizes": True, "use_safetensors": True, "trust_remote_code": False}
    try:
        model, found = AutoModelForImageClassification.from_pretrained(
            folder, config=config, output_loading_info=True, **options
        )
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"The weights of {name!r} cannot be read: {error}") from error
    lacking = {*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])}
    require_trained(model, lacking, name, num_classes)
    return model


def _processor_config(folder: Path, name: str, config: Any, channels: int) -> dict[str, Any]:
    """Measure what a transformers checkpoint's image processor feeds its network."""
    from transformers import AutoImageProcessor

    files = [folder / "preprocessor_config.json", folder / "processor_config.json"]
    if config.model_type != "timm_wrapper" and not any(file.is_file() for file in files):
        logger.warning("%s has no image processor: images are fed in [-1, 1], at the size in its config.", name)
        return {"image_size": _size_of(config)}
    try:
        measured = measure_processor(AutoImageProcessor.from_pretrained(folder, trust_remote_code=False), channels)
    except (OSError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"FeatureClassifier cannot prepare images as {name!r} does: {error}") from error
    if measured["image_size"] is None:
        measured["image_size"] = _size_of(config)
    return measured


def _size_of(config: Any) -> int | None:
    """The height and width that a network is built for, where its config tells one of both."""
    size = getattr(config, "image_size", None)
    sizes = set(size) if isinstance(size, (list, tuple)) else {size}
    return sizes.pop() if len(sizes) == 1 else None


# The last layer, and weights that are there


def last_layers(network: nn.Module, num_classes: int) -> list[nn.Linear | nn.Conv2d]:
    """The layers that give the logits: one, or more where the network averages the logits of several.

    A convolution counts, if it has as many outputs as there are classes.
    """
    network = getattr(network, "timm_model", network)  # which transformers' wrapper of timm holds
    if hasattr(network, "get_classifier"):  # timm
        heads = network.get_classifier()
        if hasattr(heads, "head_dist"):  # RepViT holds both heads of a distilled network in one module
            heads = (heads.head, heads.head_dist)
        heads = list(heads) if isinstance(heads, (tuple, list, nn.ModuleList)) else [heads]
    else:  # transformers: what stands beside the trunk, or all
        trunk = getattr(network, "base_model_prefix", "")
        heads = [child for name, child in network.named_children() if name != trunk]
    layers = [layer for head in heads if (layer := _last_layer(head, num_classes)) is not None]
    layers = layers or [layer for layer in [_last_layer(network, num_classes)] if layer is not None]
    if not layers:
        raise ValueError(f"{type(network).__name__} has no last layer with {num_classes} outputs to take features of.")
    return layers


def _last_layer(head: nn.Module, num_classes: int) -> nn.Linear | nn.Conv2d | None:
    for module in reversed(list(head.modules())):
        if isinstance(module, nn.Linear) and module.out_features == num_classes:
            return module
        if isinstance(module, nn.Conv2d) and module.out_channels == num_classes:
            return module
    return None


def require_trained(network: nn.Module, lacking: Iterable[str], name: str, num_classes: int | None) -> None:
    """Refuse weights that a checkpoint lacks, but for a last layer that the user asks for with `num_classes`.

    Args:
        network: the network that the weights are of.
        lacking: keys of its state that the checkpoint lacks or holds in another shape.
        name (`str`): of the checkpoint.
        num_classes (`int`, *optional*): as the user gave it.
    """
    lacking = sorted(lacking)
    if not lacking:
        return
    if num_classes is not None:
        layers = {id(layer) for layer in last_layers(network, num_classes)}
        new = [f"{path}." for path, module in network.named_modules() if id(module) in layers]
        if trunk := getattr(network, "base_model_prefix", ""):
            new += [f"{path}." for path, _ in network.named_children() if path != trunk]
        if all(key.startswith(tuple(new)) for key in lacking):
            return _log_untrained(name, num_classes)
    listed = ", ".join(lacking[:3]) + (f" and {len(lacking) - 3} more" if len(lacking) > 3 else "")
    raise ValueError(
        f"The weights of {name!r} must fit its config, but these are missing or of another shape: {listed}. Give"
        " `num_classes` for a new last layer; no other layer is made anew."
    )


def _log_untrained(name: str, num_classes: int) -> None:
    logger.warning("The last layer of %s, for %d classes, is new and untrained.", name, num_classes)


def require_finite(network: nn.Module, name: str) -> None:
    """Refuse a checkpoint with NaN or infinite weights. A buffer may be infinite, as a bound that clips nothing is."""
    for key, value in network.named_parameters():
        if not torch.isfinite(value).all():
            raise ValueError(f"The weights of {name!r} must be finite, got NaN or infinity in {key}.")
    for key, value in network.named_buffers():
        if torch.isnan(value).any():
            raise ValueError(f"The weights of {name!r} must be finite, got NaN in {key}.")

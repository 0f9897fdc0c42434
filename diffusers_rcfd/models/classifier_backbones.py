"""Where the networks of classifiers come from: timm models and transformers checkpoints, by name.

timm and transformers are imported when first needed.
"""

import difflib
import json
import logging
from pathlib import Path
from typing import Any

from torch import nn

logger = logging.getLogger(__name__)

_TIMM_PREFIXES = ("hf-hub:", "hf_hub:", "local-dir:")
_SOURCES = (
    "a folder or Hub repository saved by FeatureClassifier.save_pretrained, a transformers image-classification"
    " checkpoint (folder or Hub repository), or a timm model (its name, 'timm/<name>', 'hf-hub:<repository>' or"
    " 'local-dir:<folder>')"
)


def find_source(name: str, revision: str | None = None, token: str | None = None) -> tuple[str, str]:
    """Tell what `name` is: ("saved" | "timm" | "transformers", the name that its library takes)."""
    import timm

    folder = Path(name).expanduser()
    if (folder / "config.json").is_file():
        return _source_of_config(json.loads((folder / "config.json").read_text(encoding="utf-8")), name, str(folder))
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
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        path = hf_hub_download(name, "config.json", revision=revision, token=token)
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except RevisionNotFoundError as error:
        raise ValueError(f"`revision` {revision!r} of {name!r} is not on the Hub.") from error
    except (EntryNotFoundError, HFValidationError, RepositoryNotFoundError) as error:  # also: Hub out of reach
        raise ValueError(
            f"No classifier {name!r} here or on the Hub{_close_timm_names(name)}. Allowed: {_SOURCES}."
        ) from error
    return _source_of_config(config, name, name)


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


def build_timm(name: str, num_classes: int, in_channels: int, image_size: int | None, extra: dict) -> nn.Module:
    """A randomly initialised timm model; one of fixed input size is built for `image_size`."""
    import timm

    if _timm_config(name).fixed_input_size and image_size is not None:
        extra = {"img_size": image_size, **extra}
    return timm.create_model(name, pretrained=False, num_classes=num_classes, in_chans=in_channels, **extra)


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
    import timm
    from timm.data import resolve_model_data_config

    if not name.startswith(_TIMM_PREFIXES):
        _timm_config(name)
    else:
        name = f"local-dir:{_timm_folder(name, revision, token, pretrained)}"
    arguments = {"pretrained": pretrained, "num_classes": num_classes, "in_chans": in_channels}
    model = timm.create_model(name, **arguments, **extra)
    if model.num_classes < 1:
        raise ValueError(f"`name_or_path` {name!r} has no classification layer: give `num_classes`.")
    saved = dict(getattr(model, "pretrained_model_args", None) or {})  # of a Hub repository or a folder
    data, fixed_size = resolve_model_data_config(model), model.pretrained_cfg.get("fixed_input_size", False)
    own_size = {**saved, **extra}.get("img_size", data["input_size"][-1])
    own_size = own_size if isinstance(own_size, int) else own_size[-1]
    if fixed_size and image_size not in (None, own_size):
        extra = {**extra, "img_size": image_size}
        model = timm.create_model(name, **arguments, **extra)  # with its position embedding resampled
    extra = {**saved, **extra}
    return model, {
        "backbone": model.pretrained_cfg["architecture"] if name.startswith(_TIMM_PREFIXES) else name,
        "num_classes": model.num_classes,
        "in_channels": in_channels or saved.get("in_chans", 3),
        "image_size": own_size,
        "image_mean": list(data["mean"]),
        "image_std": list(data["std"]),
        "interpolation": "bilinear" if data["interpolation"] == "bilinear" else "bicubic",
        "backbone_config": {k: v for k, v in extra.items() if k not in ("num_classes", "in_chans")} or None,
        "fixed_size": fixed_size,
    }


def _timm_folder(name: str, revision: str | None, token: str | None, pretrained: bool) -> str:
    """The folder of config and safetensors weights behind 'local-dir:FOLDER' or 'hf-hub:REPOSITORY[@REVISION]'."""
    prefix, _, place = name.partition(":")
    folder = Path(place).expanduser()
    if prefix != "local-dir":
        from huggingface_hub import snapshot_download

        place, _, named = place.partition("@")
        files = ["config.json", "*.safetensors"]
        folder = Path(snapshot_download(place, revision=revision or named or None, token=token, allow_patterns=files))
    if pretrained and not any(folder.glob("*.safetensors")):
        raise ValueError(f"{name!r} must hold model.safetensors: pickled weights can run code and are not read.")
    return str(folder)


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


def build_transformers(name: str, num_classes: int, in_channels: int, config: dict[str, Any]) -> nn.Module:
    """A randomly initialised transformers image classifier of a stored config."""
    from transformers import AutoConfig, AutoModelForImageClassification

    model_type = config.pop("model_type", name)
    try:
        config = AutoConfig.for_model(model_type, **config)
    except ValueError as error:
        raise ValueError(f"`backbone` {name!r} is not a model type that transformers knows: {error}") from error
    if config.num_labels != num_classes:
        config.num_labels = num_classes
    if getattr(config, "num_channels", in_channels) != in_channels:
        config.num_channels = in_channels
    model = AutoModelForImageClassification.from_config(config)
    last_linear(model, num_classes)
    return model


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
    from transformers import AutoConfig, AutoModelForImageClassification

    hub = {"revision": revision, "token": token}
    hub = {key: value for key, value in hub.items() if value is not None}
    labels = {} if num_classes is None else {"num_labels": num_classes}
    config = AutoConfig.from_pretrained(name, **labels, **hub)
    channels = getattr(config, "num_channels", 3)
    model = None
    if pretrained:
        if in_channels not in (None, channels):
            raise ValueError(f"`in_channels` of the pretrained {name!r} must be {channels}, got {in_channels!r}.")
        try:
            model = AutoModelForImageClassification.from_pretrained(
                name, config=config, ignore_mismatched_sizes=True, use_safetensors=True, **hub
            )
        except OSError as error:
            raise ValueError(f"The weights of {name!r} must be there, as model.safetensors: {error}") from error
        config = model.config
    elif isinstance(image_size, int) and hasattr(config, "image_size"):
        config.image_size = image_size
    stored = json.loads(config.to_json_string(use_diff=False))
    stored.pop("_name_or_path", None)
    return model, {
        "backbone": config.model_type,
        "num_classes": config.num_labels,
        "in_channels": in_channels or channels,
        "backbone_config": stored,
        **_processor_config(name, config, hub),
    }


def _processor_config(name: str, config: Any, hub: dict[str, str]) -> dict[str, Any]:
    """Read size, mean, deviation and channel order from a transformers checkpoint's image processor."""
    from transformers import AutoImageProcessor

    try:
        processor = AutoImageProcessor.from_pretrained(name, **hub)
    except (OSError, ValueError):
        logger.warning("%s has no image processor: images are fed in [-1, 1], at the size in its config.", name)
        return {"image_size": getattr(config, "image_size", None)}

    def get(key: str, default: Any = None) -> Any:
        value = getattr(processor, key, None)
        return default if value is None else value

    # The processor sees 0..255: what it feeds is (255 * rescale * x - mean) / std for x in [0, 1].
    top = 255 * get("rescale_factor", 1 / 255) if get("do_rescale", True) else 255.0
    mean, std = (get("image_mean", 0.0), get("image_std", 1.0)) if get("do_normalize") else (0.0, 1.0)
    mean, std = ([v / top for v in ([x] if isinstance(x, int | float) else x)] for x in (mean, std))
    size = get("crop_size") if get("do_center_crop") else get("size")
    if not isinstance(size, int | None):
        size = size.get("height") or size.get("shortest_edge")
    return {
        "image_size": size,
        "image_mean": mean,
        "image_std": std,
        "interpolation": "bilinear" if get("resample", 3) in (0, 2) else "bicubic",
        "flip_channels": bool(get("do_flip_channel_order", False)),
    }


def last_linear(model: nn.Module, num_classes: int) -> nn.Linear:
    """The last linear layer with as many outputs as there are classes: what comes before it are the features."""
    for module in reversed(list(model.modules())):
        if isinstance(module, nn.Linear) and module.out_features == num_classes:
            return module
    raise ValueError(f"{type(model).__name__} has no linear layer with {num_classes} outputs to take features before.")

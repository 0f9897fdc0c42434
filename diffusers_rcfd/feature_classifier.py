"""The classifier whose features distillation compares: a timm or transformers backbone fed with generator images.

`FeatureClassifier` owns the way from images in [-1, 1] to what its backbone was trained on. timm and transformers are
imported when first needed.
"""

import difflib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from torch import nn

logger = logging.getLogger(__name__)

_LIBRARIES = ("timm", "transformers")
_INTERPOLATIONS = ("bicubic", "bilinear")
_TIMM_PREFIXES = ("hf-hub:", "hf_hub:", "local-dir:")
_SOURCES = (
    "a folder or Hub repository saved by FeatureClassifier.save_pretrained, a transformers image-classification"
    " checkpoint (folder or Hub repository), or a timm model (its name, 'timm/<name>', 'hf-hub:<repository>' or"
    " 'local-dir:<folder>')"
)


@dataclass
class FeatureClassifierOutput(BaseOutput):
    """What a `FeatureClassifier` returns.

    Args:
        logits (`torch.Tensor` of shape (B, K)): class scores before the softmax.
        features (`torch.Tensor` of shape (B, D)): input of the last layer, F in Eq. 3 and 4 of the RCFD paper.
    """

    logits: torch.Tensor
    features: torch.Tensor


class FeatureClassifier(ModelMixin, ConfigMixin):
    """Image classifier that takes images in [-1, 1] and returns its logits and the features before its last layer.

    The constructor makes random weights (in train mode, trainable) and never downloads; `from_backbone` starts from
    pretrained weights; `from_pretrained` loads what `save_pretrained` wrote, with no other file, in eval mode.

    Args:
        backbone (`str`, defaults to `"resnet18"`): timm model name, or the `model_type` of a transformers config.
        library (`str`, defaults to `"timm"`): `"timm"` or `"transformers"`.
        num_classes (`int`, defaults to 10): number of classes K, at least 1.
        in_channels (`int`, defaults to 3): channels the backbone takes; grey images are repeated to as many.
        image_size (`int`, *optional*): images of another size are resized (not cropped) to this height and width.
            A timm backbone that takes one size only is built for this one. None: never resized.
        image_mean (`float` or one per channel, defaults to 0.5): mean, on [0, 1], that the backbone was trained with.
        image_std (`float` or one per channel, defaults to 0.5): standard deviation on [0, 1], above 0. With both at
            0.5 the backbone sees [-1, 1].
        interpolation (`str`, defaults to `"bicubic"`): `"bicubic"` or `"bilinear"`; antialiased where it shrinks.
        small_stem (`bool`, defaults to False): 3x3 stride 1 first convolution and no pooling after it, for images of
            about 8 to 64 pixels. timm's ResNet and DenseNet families only.
        reference (`bool`, defaults to False): feed [-1, 1] without normalisation, as the authors' code does; resizing
            stays.
        flip_channels (`bool`, defaults to False): feed BGR, as some transformers checkpoints (MobileViT) were trained.
        backbone_config (`dict`, *optional*): further arguments of the timm model, for example
            `{"channels": [16, 32, 64, 128], "layers": [1, 1, 1, 1]}` of `"resnet18"`, or the transformers config.

    Raises:
        ValueError: an argument out of its range, an unknown backbone, or `small_stem` where there is none.

    Source: RCFD paper, Eq. 3; the paper leaves the classifier's input open, and the authors' code feeds it raw
    [-1, 1] images, bilinear to 224 where the network is an ImageNet one.
    """

    @register_to_config
    def __init__(
        self,
        backbone: str = "resnet18",
        library: str = "timm",
        num_classes: int = 10,
        in_channels: int = 3,
        image_size: int | None = None,
        image_mean: float | Sequence[float] = 0.5,
        image_std: float | Sequence[float] = 0.5,
        interpolation: str = "bicubic",
        small_stem: bool = False,
        reference: bool = False,
        flip_channels: bool = False,
        backbone_config: dict[str, Any] | None = None,
    ):
        super().__init__()
        if library not in _LIBRARIES:
            raise ValueError(f"`library` must be one of {_LIBRARIES}, got {library!r}.")
        if interpolation not in _INTERPOLATIONS:
            raise ValueError(f"`interpolation` must be one of {_INTERPOLATIONS}, got {interpolation!r}.")
        for name, value in (("num_classes", num_classes), ("in_channels", in_channels), ("image_size", image_size)):
            if not (value is None and name == "image_size") and (not isinstance(value, int) or value < 1):
                raise ValueError(f"`{name}` must be an integer of at least 1, got {value!r}.")

        self._set_normalisation(torch.device("cpu"))
        backbone_config = dict(backbone_config or {})
        if library == "timm":
            self.network = _build_timm(backbone, num_classes, in_channels, image_size, backbone_config)
        else:
            self.network = _build_transformers(backbone, num_classes, in_channels, backbone_config)
        if small_stem:
            _set_small_stem(self.network, in_channels, backbone)

    @classmethod
    def from_backbone(
        cls,
        name_or_path: str,
        *,
        pretrained: bool = True,
        num_classes: int | None = None,
        in_channels: int | None = None,
        small_stem: bool = False,
        image_size: int | str | None = "auto",
        reference: bool = False,
        backbone_config: dict[str, Any] | None = None,
    ) -> "FeatureClassifier":
        """Make a classifier of a timm model or a transformers image-classification checkpoint.

        Size, mean, standard deviation and interpolation are those of the backbone's own data config.

        Args:
            name_or_path (`str`): timm model (its name, `timm/<name>`, `hf-hub:<repository>`, `local-dir:<folder>`) or
                transformers checkpoint (local folder or Hub repository).
            pretrained (`bool`, defaults to True): load the weights, and return in eval mode; else random weights, in
                train mode.
            num_classes (`int`, *optional*): defaults to the backbone's own; another number gives a new last layer.
            in_channels (`int`, *optional*): defaults to the backbone's own. Pretrained transformers weights cannot
                change it.
            small_stem (`bool`, defaults to False): see the class; the first convolution's weights are then new.
            image_size (`int`, `"auto"` or None, defaults to `"auto"`): None never resizes. `"auto"` is the backbone's
                own, or None with `small_stem` or without `pretrained`, except for a timm backbone of one fixed size.
            reference (`bool`, defaults to False): see the class; resizes bilinearly, as the authors' code does.
            backbone_config (`dict`, *optional*): further arguments of a timm model.

        Returns:
            `FeatureClassifier`, trainable (see `freeze`).

        Raises:
            ValueError: the name is none of these, or an argument does not fit the backbone.
        """
        kind, name = _find_source(str(name_or_path))
        if kind == "saved":
            raise ValueError(f"`name_or_path` {name!r} was saved by FeatureClassifier: load it with from_pretrained.")
        if image_size != "auto" and isinstance(image_size, str):
            raise ValueError(f"`image_size` must be an integer of at least 1, None or 'auto', got {image_size!r}.")
        if kind == "timm":
            size = None if image_size == "auto" else image_size
            source, config = _load_timm(name, pretrained, num_classes, in_channels, size, dict(backbone_config or {}))
        elif backbone_config is not None:
            raise ValueError(f"`backbone_config` {backbone_config!r} is for timm models, {name!r} has its own config.")
        else:
            source, config = _load_transformers(name, pretrained, num_classes, in_channels, image_size)

        fixed_size = config.pop("fixed_size", False)
        if image_size != "auto":
            config["image_size"] = image_size
        elif (small_stem or not pretrained) and not fixed_size:
            config["image_size"] = None
        for key in {"image_mean", "image_std"} & config.keys():
            if len(config[key]) not in (1, config["in_channels"]):  # a three-colour backbone made for other channels
                config[key] = sum(config[key]) / len(config[key])
        if reference:
            config["interpolation"] = "bilinear"
        model = cls(library=kind, small_stem=small_stem, reference=reference, **config)
        if pretrained:
            if small_stem:
                _set_small_stem(source, config["in_channels"], name)
            model.network.load_state_dict(source.state_dict())  # strict: the stored config rebuilds this backbone
            model.eval()
        return model

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, **kwargs: Any) -> "FeatureClassifier":
        """Load what `save_pretrained` wrote, from a folder or the Hub, in eval mode; arguments as in Diffusers.

        `low_cpu_mem_usage` defaults to False unless a `device_map` is given. `reference=True` and the other
        constructor arguments that leave the weights as they are replace the saved value.
        """
        # On the meta device timm's Swin and ViTamin lose what they compute once, such as attention masks.
        if kwargs.get("device_map") is None:
            kwargs.setdefault("low_cpu_mem_usage", False)
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    @property
    def num_features(self) -> int:
        """Length D of the features."""
        last = self._last_layer()
        if isinstance(last, nn.Linear):
            return last.in_features
        return getattr(self.network, "head_hidden_size", self.network.num_features)

    @property
    def num_classes(self) -> int:
        """Number of classes K."""
        return self.config.num_classes

    def freeze(self) -> "FeatureClassifier":
        """Set eval mode, stop gradients to the parameters (those to the images still flow), and return self."""
        return self.eval().requires_grad_(False)

    def forward(
        self, images: torch.Tensor, return_dict: bool = True
    ) -> FeatureClassifierOutput | tuple[torch.Tensor, torch.Tensor]:
        """Classify images and return the features before the last layer, differentiable in the images.

        Args:
            images (`torch.Tensor` of shape (B, C, H, W)): floating point in [-1, 1]; C is `in_channels` or 1.
            return_dict (`bool`, defaults to True): return a `FeatureClassifierOutput`, else (logits, features).

        Raises:
            TypeError: images are not a floating-point tensor.
            ValueError: images are not of shape (B, `in_channels` or 1, H, W).
        """
        images = self._prepare(images)  # (B, in_channels, H', W')
        logits, features = (self._run_timm if self.config.library == "timm" else self._run_transformers)(images)
        return FeatureClassifierOutput(logits=logits, features=features) if return_dict else (logits, features)

    def _prepare(self, images: torch.Tensor) -> torch.Tensor:
        channels = self.config.in_channels
        if not isinstance(images, torch.Tensor) or not images.is_floating_point():
            kind = images.dtype if isinstance(images, torch.Tensor) else type(images).__name__
            raise TypeError(f"`images` must be a floating-point tensor in [-1, 1], got {kind}.")
        if images.ndim != 4 or images.shape[1] not in (1, channels):
            allowed = "1" if channels == 1 else f"{channels} or 1"
            raise ValueError(f"`images` must have shape (B, {allowed}, H, W), got {tuple(images.shape)}.")
        if images.dtype in (torch.float16, torch.bfloat16):
            images = images.float()  # resizing and the shift lose digits in half precision
        size = self.config.image_size
        if size is not None and tuple(images.shape[-2:]) != (size, size):
            mode, shrinks = self.config.interpolation, max(images.shape[-2:]) > size
            images = F.interpolate(images, (size, size), mode=mode, align_corners=False, antialias=shrinks)
        images = images.expand(-1, channels, -1, -1)
        if self.config.flip_channels:
            images = images.flip(1)
        if not self.config.reference:
            images = images * self.input_scale + self.input_shift
        return images.to(self.dtype)

    def _run_timm(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        feature_map = self.network.forward_features(images)
        features = self.network.forward_head(feature_map, pre_logits=True)  # (B, D)
        classifier = self.network.get_classifier()
        # Convolutional, distilled and token-labelling (VOLO) heads do more than one product with the features.
        if isinstance(classifier, nn.Linear) and getattr(self.network, "aux_head", None) is None:
            return classifier(features), features
        return self.network.forward_head(feature_map), features

    def _run_transformers(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        inputs = []
        handle = self._last_layer().register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
        try:
            logits = self.network(pixel_values=images).logits
        finally:
            handle.remove()
        return logits, inputs[-1].flatten(1)

    def _last_layer(self) -> Any:
        if self.config.library == "timm":
            return self.network.get_classifier()
        return _last_linear(self.network, self.config.num_classes)

    def _set_normalisation(self, device: torch.device) -> None:
        """Fold (x + 1) / 2, minus the mean, over the deviation, into one scale and one shift for each channel."""
        channels = self.config.in_channels
        mean = _per_channel("image_mean", self.config.image_mean, channels)
        std = _per_channel("image_std", self.config.image_std, channels)
        if not (std > 0).all():
            raise ValueError(f"`image_std` must be above 0, got {self.config.image_std!r}.")
        for name, value in (("input_scale", 0.5 / std), ("input_shift", (0.5 - mean) / std)):
            value = value.view(1, -1, 1, 1).to(device=device, dtype=torch.float32)
            self.register_buffer(name, value, persistent=False)

    def _apply(self, fn: Any, recurse: bool = True) -> "FeatureClassifier":
        # Written again from the config after every move, so that neither .to(bfloat16) nor to_empty() changes them.
        super()._apply(fn, recurse)
        self._set_normalisation(self.input_scale.device)
        return self


def load_feature_classifier(name_or_path: str, **kwargs: Any) -> FeatureClassifier:
    """Load a classifier from whatever a command line names: ours, a transformers checkpoint or a timm model.

    A local folder with a config.json comes first, then a timm name, then a Hub repository.

    Args:
        name_or_path (`str`): folder or Hub repository saved by `FeatureClassifier.save_pretrained`, transformers
            image-classification checkpoint (folder or Hub repository), or timm model (its name, `timm/<name>`,
            `hf-hub:<repository>`, `local-dir:<folder>`), which is loaded with its pretrained weights.
        kwargs: arguments of `FeatureClassifier.from_backbone`. For a classifier saved by ours, `reference` and an
            `image_size` other than `"auto"` replace the saved value; `num_classes`, `in_channels` and `small_stem`
            must agree with it.

    Returns:
        `FeatureClassifier` in eval mode, trainable (see `freeze`).

    Raises:
        ValueError: the name is none of these, or an argument does not fit what was saved.
    """
    kind, name = _find_source(str(name_or_path))
    if kind != "saved":
        return FeatureClassifier.from_backbone(name_or_path, **kwargs)
    for key in ("num_classes", "in_channels", "small_stem"):
        value = kwargs.pop(key, None)
        saved = FeatureClassifier.load_config(name).get(key)
        if value is not None and value != saved:
            raise ValueError(f"`{key}` {value!r} does not fit {name!r}, which was saved with {saved!r}.")
    if kwargs.get("image_size") == "auto":
        del kwargs["image_size"]
    return FeatureClassifier.from_pretrained(name, **kwargs)


def _per_channel(name: str, value: float | Sequence[float], channels: int) -> torch.Tensor:
    with torch.device("cpu"):
        values = torch.tensor([value] if isinstance(value, int | float) else list(value), dtype=torch.float64)
    if values.numel() not in (1, channels):
        raise ValueError(f"`{name}` must be one number or {channels}, one for each channel, got {value!r}.")
    return values.expand(channels)


def _find_source(name: str) -> tuple[str, str]:
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
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError, RepositoryNotFoundError

    try:
        config = json.loads(Path(hf_hub_download(name, "config.json")).read_text(encoding="utf-8"))
    except (EntryNotFoundError, HFValidationError, RepositoryNotFoundError) as error:  # also: Hub out of reach
        raise ValueError(
            f"No classifier {name!r} here or on the Hub{_close_timm_names(name)}. Allowed: {_SOURCES}."
        ) from error
    return _source_of_config(config, name, name)


def _source_of_config(config: dict[str, Any], name: str, location: str) -> tuple[str, str]:
    if config.get("_class_name") == FeatureClassifier.__name__:
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


def _build_timm(name: str, num_classes: int, in_channels: int, image_size: int | None, extra: dict) -> nn.Module:
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


def _load_timm(
    name: str, pretrained: bool, num_classes: int | None, in_channels: int | None, image_size: int | None, extra: dict
) -> tuple[nn.Module, dict[str, Any]]:
    """Create the timm model and the arguments with which the constructor builds the same."""
    import timm
    from timm.data import resolve_model_data_config

    if not name.startswith(_TIMM_PREFIXES):
        _timm_config(name)
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


def _set_small_stem(backbone: nn.Module, in_channels: int, name: str) -> None:
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


def _build_transformers(name: str, num_classes: int, in_channels: int, config: dict[str, Any]) -> nn.Module:
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
    _last_linear(model, num_classes)
    return model


def _load_transformers(
    name: str, pretrained: bool, num_classes: int | None, in_channels: int | None, image_size: int | str | None
) -> tuple[nn.Module | None, dict[str, Any]]:
    """Load the transformers model, if wanted, and the arguments with which the constructor builds the same."""
    from transformers import AutoConfig, AutoModelForImageClassification

    labels = {} if num_classes is None else {"num_labels": num_classes}
    config = AutoConfig.from_pretrained(name, **labels)
    channels = getattr(config, "num_channels", 3)
    model = None
    if pretrained:
        if in_channels not in (None, channels):
            raise ValueError(f"`in_channels` of the pretrained {name!r} must be {channels}, got {in_channels!r}.")
        model = AutoModelForImageClassification.from_pretrained(name, config=config, ignore_mismatched_sizes=True)
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
        **_processor_config(name, config),
    }


def _processor_config(name: str, config: Any) -> dict[str, Any]:
    """Read size, mean, deviation and channel order from a transformers checkpoint's image processor."""
    from transformers import AutoImageProcessor

    try:
        processor = AutoImageProcessor.from_pretrained(name)
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


def _last_linear(model: nn.Module, num_classes: int) -> nn.Linear:
    for module in reversed(list(model.modules())):
        if isinstance(module, nn.Linear) and module.out_features == num_classes:
            return module
    raise ValueError(f"{type(model).__name__} has no linear layer with {num_classes} outputs to take features before.")

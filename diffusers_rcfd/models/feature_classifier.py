"""The classifier whose features distillation compares: a timm or transformers backbone fed with generator images.

`FeatureClassifier` owns the way from images in [-1, 1] to what its backbone was trained on. timm and transformers are
imported when first needed.
"""

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

from diffusers_rcfd.models.classifier_backbones import (
    build_timm,
    build_transformers,
    find_source,
    last_layers,
    load_timm,
    load_transformers,
    require_finite,
    set_small_stem,
)
from diffusers_rcfd.saving import saved_whole
from diffusers_rcfd.validation import is_count, require

_LIBRARIES = ("timm", "transformers")
_INTERPOLATIONS = ("bicubic", "bilinear")
_LARGEST = {"num_classes": 1_000_000, "in_channels": 1024, "image_size": 4096}  # beyond is a mistake, not a wish
_PUBLISHING = {"commit_message", "private", "token", "create_pr"}


@dataclass
class FeatureClassifierOutput(BaseOutput):
    """What a `FeatureClassifier` returns.

    Args:
        logits (`torch.Tensor` of shape (B, K)): class scores before the softmax.
        features (`torch.Tensor` of shape (B, D)): input of the last linear layer, F in Eq. 3 and 4 of the RCFD paper.
            Where that layer is applied at each position (a 1x1 convolution before the pooling), their mean. Where the
            network averages the logits of several last layers (distilled ViT, CrossViT), their inputs side by side.
    """

    logits: torch.Tensor
    features: torch.Tensor = None  # never None; the default lets Accelerate rebuild an output from a dictionary


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
        require(library in _LIBRARIES, "library", library, f"one of {_LIBRARIES}")
        require(interpolation in _INTERPOLATIONS, "interpolation", interpolation, f"one of {_INTERPOLATIONS}")
        _require_size("num_classes", num_classes)
        _require_size("in_channels", in_channels)
        if image_size is not None:
            _require_size("image_size", image_size)

        self._set_normalisation(torch.device("cpu"))
        backbone_config = dict(backbone_config or {})
        if library == "timm":
            self.network = build_timm(backbone, num_classes, in_channels, image_size, backbone_config)
        else:
            self.network = build_transformers(backbone, num_classes, in_channels, backbone_config)
        if small_stem:
            set_small_stem(self.network, in_channels, backbone)
        self._inputs: list[torch.Tensor] = []  # of the last layers, while the network runs
        for layer in last_layers(self.network, num_classes):
            layer.register_forward_pre_hook(self._keep_input)

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
        revision: str | None = None,
        token: str | None = None,
    ) -> "FeatureClassifier":
        """Make a classifier of a timm model or a transformers image-classification checkpoint.

        Size, mean, standard deviation, channel order and interpolation are what feeds the backbone in its own library:
        timm's data config, or what transformers' image processor does to images, which is measured. Images are not
        cropped, so that a generator is compared on all of them.

        Args:
            name_or_path (`str`): timm model (its name, `timm/<name>`, `hf-hub:<repository>`, `local-dir:<folder>`) or
                transformers checkpoint (local folder or Hub repository).
            pretrained (`bool`, defaults to True): load the weights, and return in eval mode; else random weights, in
                train mode.
            num_classes (`int`, *optional*): defaults to the backbone's own. Another number gives a new last layer, and
                so does any where the checkpoint's own is missing or does not fit; that it is untrained is logged.
            in_channels (`int`, *optional*): defaults to the backbone's own. Pretrained transformers weights cannot
                change it.
            small_stem (`bool`, defaults to False): see the class; the first convolution's weights are then new.
            image_size (`int`, `"auto"` or None, defaults to `"auto"`): None never resizes. `"auto"` is the backbone's
                own, or None with `small_stem` or without `pretrained`, except for a timm backbone of one fixed size.
            reference (`bool`, defaults to False): see the class; resizes bilinearly, as the authors' code does.
            backbone_config (`dict`, *optional*): further arguments of a timm model.
            revision (`str`, *optional*): branch, tag or commit of a Hub repository.
            token (`str`, *optional*): for a private one; defaults to that of `hf auth login`.

        Returns:
            `FeatureClassifier`, trainable (see `freeze`).

        Raises:
            ValueError: the name is none of these, the Hub does not give it, its weights are pickled, do not fit its
                config or are not finite, its images are prepared in a way that `FeatureClassifier` cannot follow, or
                an argument does not fit the backbone.
        """
        hub = {"revision": revision, "token": token}
        kind, name = find_source(str(name_or_path), **hub)
        if kind == "saved":
            raise ValueError(f"`name_or_path` {name!r} was saved by FeatureClassifier: load it with from_pretrained.")
        if image_size != "auto" and isinstance(image_size, str):
            raise ValueError(f"`image_size` must be an integer of at least 1, None or 'auto', got {image_size!r}.")
        if num_classes is not None:
            _require_size("num_classes", num_classes)
        if kind == "timm":
            size = None if image_size == "auto" else image_size
            extra = dict(backbone_config or {})
            source, config = load_timm(name, pretrained, num_classes, in_channels, size, extra, **hub)
        elif backbone_config is not None:
            raise ValueError(f"`backbone_config` {backbone_config!r} is for timm models, {name!r} has its own config.")
        else:
            source, config = load_transformers(name, pretrained, num_classes, in_channels, image_size, **hub)

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
                set_small_stem(source, config["in_channels"], name)
            require_finite(source, str(name_or_path))
            model.network.load_state_dict(source.state_dict())  # strict: the stored config rebuilds this backbone
            model.eval()
        return model

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, **kwargs: Any) -> "FeatureClassifier":
        """Load what `save_pretrained` wrote, from a folder or the Hub, in eval mode; arguments as in Diffusers.

        `low_cpu_mem_usage` defaults to False unless a `device_map` is given. `reference=True` and the other
        constructor arguments that leave the weights as they are replace the saved value.

        Raises:
            ValueError: `use_safetensors=False`: pickled weights are never read; or the weights do not fit the config
                or are not finite.
            OSError: there is no such folder, repository, revision or file.
        """
        if kwargs.get("use_safetensors") is False:
            raise ValueError("`use_safetensors` must be True: pickled weights can run code and are not read.")
        name = str(pretrained_model_name_or_path)
        wants_info = kwargs.pop("output_loading_info", False)
        kwargs["use_safetensors"] = True
        # On the meta device timm's Swin and ViTamin lose what they compute once, such as attention masks.
        if kwargs.get("device_map") is None:
            kwargs.setdefault("low_cpu_mem_usage", False)
        model, info = super().from_pretrained(name, output_loading_info=True, **kwargs)
        unfit = [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]
        if unfit:
            raise ValueError(f"The weights of {name!r} must fit its config, but these do not: {unfit[:3]}.")
        require_finite(model, name)
        return (model, info) if wants_info else model

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Save config and weights in safetensors, whole or not at all; arguments as in Diffusers.

        Raises:
            ValueError: `safe_serialization=False`.
            OSError: writing failed; the folder is then as it was before, and nothing is published.
        """
        _require_safetensors(kwargs)
        hub_options = {key: kwargs.pop(key) for key in _PUBLISHING & kwargs.keys()}
        publish, repo_id = kwargs.pop("push_to_hub", False), kwargs.pop("repo_id", None)
        with saved_whole(Path(save_directory)) as partial:
            super().save_pretrained(str(partial), **kwargs)
        if publish:
            self.push_to_hub(repo_id or Path(save_directory).resolve().name, **hub_options)

    def push_to_hub(self, repo_id: str, commit_message: str | None = None, **kwargs: Any) -> str:
        """Publish in one commit; arguments as in Diffusers. `safe_serialization=False` is a `ValueError`."""
        _require_safetensors(kwargs)
        return super().push_to_hub(repo_id, commit_message, **kwargs)

    @property
    def num_features(self) -> int:
        """Length D of the features."""
        layers = last_layers(self.network, self.config.num_classes)
        return sum(layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels for layer in layers)

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
        self._inputs = []
        logits = self.network(images) if self.config.library == "timm" else self.network(pixel_values=images)[0]
        features = torch.cat(self._inputs, dim=1) if len(self._inputs) > 1 else self._inputs[0]  # (B, D)
        self._inputs = []
        return FeatureClassifierOutput(logits=logits, features=features) if return_dict else (logits, features)

    def spatial_features(self, images: torch.Tensor, stages: Sequence[int] | None = None) -> list[torch.Tensor]:
        """Feature maps of the backbone's stages, finest first, differentiable in the images.

        Args:
            images (`torch.Tensor` of shape (B, C, H, W)): as in `forward`.
            stages (`Sequence[int]`, *optional*): which ones, from 0, or from -1, the last, back; all by default.

        Returns:
            `list[torch.Tensor]` of shapes (B, C_i, H_i, W_i); the tokens of a transformers ViT are (B, C, tokens, 1).

        Raises:
            TypeError, ValueError: as in `forward`; or there is no such stage, or timm knows no stages of the backbone.
        """
        images = self._prepare(images)
        if self.config.library == "timm":
            if not hasattr(self.network, "forward_intermediates"):
                raise ValueError(f"`backbone` {self.config.backbone!r} has no stages that timm knows of.")
            maps = self.network.forward_intermediates(images, intermediates_only=True)
        else:
            hidden = self.network(pixel_values=images, output_hidden_states=True).hidden_states
            maps = [state if state.ndim == 4 else state.transpose(1, 2).unsqueeze(-1) for state in hidden]
        for stage in stages or ():
            if not -len(maps) <= stage < len(maps):
                raise ValueError(f"`stages` must be in {-len(maps)}..{len(maps) - 1} for this backbone, got {stage}.")
        return [maps[stage] for stage in stages] if stages else list(maps)

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

    def _keep_input(self, layer: nn.Module, inputs: tuple[torch.Tensor]) -> None:
        (features,) = inputs
        if features.ndim > 2:  # a mean over the positions at which the layer is applied
            features = features.flatten(2).mean(2) if isinstance(layer, nn.Conv2d) else features.flatten(1, -2).mean(1)
        self._inputs.append(features)

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


def _require_size(name: str, value: int) -> None:
    largest = _LARGEST[name]
    require(is_count(value, 1) and value <= largest, name, value, f"an integer from 1 to {largest}")


def _require_safetensors(options: dict[str, Any]) -> None:
    if options.get("safe_serialization") is False:
        raise ValueError("`safe_serialization` must be True: nothing pickled is written.")


def load_feature_classifier(
    name_or_path: str, *, revision: str | None = None, token: str | None = None, **kwargs: Any
) -> FeatureClassifier:
    """Load a classifier from whatever a command line names: ours, a transformers checkpoint or a timm model.

    A local folder with a config.json comes first, then a timm name, then a Hub repository.

    Args:
        name_or_path (`str`): folder or Hub repository saved by `FeatureClassifier.save_pretrained`, transformers
            image-classification checkpoint (folder or Hub repository), or timm model (its name, `timm/<name>`,
            `hf-hub:<repository>`, `local-dir:<folder>`), which is loaded with its pretrained weights.
        revision (`str`, *optional*): branch, tag or commit of a Hub repository.
        token (`str`, *optional*): for a private one; defaults to that of `hf auth login`.
        kwargs: arguments of `FeatureClassifier.from_backbone`. For a classifier saved by ours, `reference` and an
            `image_size` other than `"auto"` replace the saved value; `num_classes`, `in_channels` and `small_stem`
            must agree with it.

    Returns:
        `FeatureClassifier` in eval mode, trainable (see `freeze`).

    Raises:
        ValueError: as in `FeatureClassifier.from_backbone` and `from_pretrained`, or an argument does not fit what was
            saved.
    """
    hub = {"revision": revision, "token": token}
    kind, name = find_source(str(name_or_path), **hub)
    if kind != "saved":
        return FeatureClassifier.from_backbone(name_or_path, **hub, **kwargs)
    for key in ("num_classes", "in_channels", "small_stem"):
        value = kwargs.pop(key, None)
        saved = FeatureClassifier.load_config(name, **hub).get(key)
        if value is not None and value != saved:
            raise ValueError(f"`{key}` {value!r} does not fit {name!r}, which was saved with {saved!r}.")
    if kwargs.get("image_size") == "auto":
        del kwargs["image_size"]
    return FeatureClassifier.from_pretrained(name, **hub, **kwargs)


def _per_channel(name: str, value: float | Sequence[float], channels: int) -> torch.Tensor:
    with torch.device("cpu"):
        values = torch.tensor([value] if isinstance(value, int | float) else list(value), dtype=torch.float64)
    if values.numel() not in (1, channels):
        raise ValueError(f"`{name}` must be one number or {channels}, one for each channel, got {value!r}.")
    return values.expand(channels)

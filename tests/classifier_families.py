"""One small network of random weights for each timm module and each image classifier of transformers, and what comes
out of it by its own library and by `FeatureClassifier`: the pixels, the logits and the features.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_transform, resolve_model_data_config
from timm.models._hub import save_config_for_hf
from torch import nn
from transformers import AutoImageProcessor
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

from diffusers_rcfd.models.classifier_backbones import last_layers
from diffusers_rcfd.models.feature_classifier import FeatureClassifier, load_feature_classifier

CLASSES = 7

# The smallest model of each timm module, or nearly, and further heads. Large ones are copied with fewer layers.
TIMM_MODELS = """
beit_base_patch16_224 halonet_h1 test_byobnet cait_xxs24_224 coat_tiny convit_tiny convmixer_768_32 test_convnext
cpubone_nano crossvit_tiny_240 csatv2 cs3darknet_m cspnext_tiny davit_tiny deepseek_vit_412m deit_tiny_patch16_224
densenet121 dla46_c dpn48b edgenext_xx_small efficientformer_l1 efficientformerv2_s0 test_efficientnet efficientvim_m1
efficientvit_b0 efficientvit_m0 vit_tiny_patch16_dinov3_qkvb fasternet_t0 fastvit_t8 focalnet_tiny_srf gcvit_xxtiny
gemma4_vit_167m ghostnet_050 hardcorenas_b hgnetv2_b0 hiera_tiny_224 sam2_hiera_tiny hrnet_w18_small iformer_t
inception_next_atto inception_resnet_v2 inception_v3 inception_v4 lcnetv2_small levit_128s lowformer_b0 test_mambaout
test_coatnet caformer_s18 gmlp_ti16_224 lcnet_035 mobilenetv5_base mobilevit_xxs mvitv2_tiny
naflexvit_base_patch16_gap nasnetalarge nest_tiny nextvit_small test_nfnet pit_ti_224 pnasnet5large pvt_v2_b0
qwen3_vit_88m rdnet_tiny regnetx_002 repghostnet_050 repvit_m1 res2next50 resnest14d test_resnet resnetv2_18
rexnet_100 selecsls42 legacy_seresnet18 sequencer2d_s shvit_s1 skresnet18 starnet_s050 swiftformer_xs
swin_tiny_patch4_window7_224 swinv2_tiny_window8_256 swinv2_cr_tiny_224 tiny_vit_5m_224 tnt_s_legacy_patch16_224
tresnet_m twins_svt_small vgg11 visformer_tiny test_vit vit_tiny_r_s16_p8_224 test_vit_relpos samvit_base_patch16_224
vitamin_small_224 volo_d1_224 ese_vovnet19b_slim legacy_xception xception41p xcit_nano_12_p8_224
deit_tiny_distilled_patch16_224 levit_conv_128s
""".split()
_SHALLOW = {"depth": 1}
TIMM_OPTIONS = {
    "beit_base_patch16_224": _SHALLOW,
    "deepseek_vit_412m": _SHALLOW | {"img_size": 224},
    "gemma4_vit_167m": _SHALLOW | {"img_size": 224},
    "naflexvit_base_patch16_gap": _SHALLOW | {"img_size": 224},
    "qwen3_vit_88m": _SHALLOW | {"img_size": 224},
    "samvit_base_patch16_224": _SHALLOW,
    "vgg11": {"mlp_ratio": 0.01},
}
TIMM_SIZES = {"csatv2": 256, "sam2_hiera_tiny": 224, "nasnetalarge": 331, "pnasnet5large": 331}

# What makes the networks of transformers small: options that many configs know, and those of one.
_FEW_LAYERS = {"num_hidden_layers": 1, "depths": [1, 1, 1, 1], "num_self_attends_per_block": 1}
_TOWER = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
_TOWERS = {"vision_config": _TOWER, "text_config": _TOWER}
_TIMM_DATA = {
    "input_size": [3, 160, 160],
    "interpolation": "bicubic",
    "crop_pct": 0.95,
    "mean": [0.485, 0.456, 0.406],
    "std": [0.229, 0.224, 0.225],
}
_NETWORKS = {
    "clip": _TOWERS,
    "metaclip_2": _TOWERS,
    "siglip": _TOWERS,
    "efficientnet": {"width_coefficient": 0.5, "depth_coefficient": 0.5, "hidden_dim": 640},
    "levit": {"depths": [1, 1, 1]},
    "perceiver": {"num_latents": 8, "d_latents": 64, "image_size": 224, "num_cross_attention_heads": 1},
    "timm_wrapper": {"architecture": "test_resnet", "pretrained_cfg": _TIMM_DATA},
}
# Image processors where the family has none of its own, or where the defaults are not those of any checkpoint.
_PROCESSORS = {
    "dinov2_with_registers": ("BitImageProcessor", {}),
    "donut-swin": ("DonutImageProcessor", {"size": {"height": 224, "width": 224}}),
    "efficientnet": (
        "EfficientNetImageProcessor",
        {"size": {"height": 224, "width": 224}, "image_std": [0.4785, 0.4733, 0.4743]},
    ),
    "hgnet_v2": ("ViTImageProcessor", {}),
    "mobilevit": ("MobileViTImageProcessor", {"size": {"shortest_edge": 288}}),
    "mobilevitv2": ("MobileViTImageProcessor", {"size": {"shortest_edge": 288}}),
}
NO_IMAGES = ("imagegpt", "shieldgemma2", "siglip2")  # their networks take no images, and are refused
# (family, class) of the image classifiers of transformers.
TRANSFORMERS_MODELS = [
    (family, name)
    for family, names in sorted(MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES.items())
    for name in ([names] if isinstance(names, str) else names)
    if family not in NO_IMAGES
]


@dataclass
class Agreement:
    """How far `FeatureClassifier` is from the network's own library.

    Attributes:
        size: height and width of what the network takes.
        crop: height and width of an image of which the library's own preparation keeps the middle of `size`.
        pixels: largest difference of the pixels that are fed, for such an image.
        resized: mean difference of the pixels for a smooth image twice as large, in grey levels of 255.
        logits: largest difference of the logits, over the largest logit.
        features: largest difference of the logits from the last layers' products with the features, likewise.
        length: of the features.
    """

    size: int
    crop: int
    pixels: float
    resized: float
    logits: float
    features: float
    length: int


def timm_agreement(name: str, folder: Path) -> Agreement:
    """Save a timm model of random weights, load it with `FeatureClassifier` and compare the two."""
    source = save_timm(name, folder, **TIMM_OPTIONS.get(name, {}))
    size = TIMM_SIZES.get(name, "auto")
    classifier = load_feature_classifier(str(folder), image_size=size)
    size = classifier.config.image_size
    data = {**resolve_model_data_config(source), "input_size": (3, size, size)}
    transform = create_transform(**data, is_training=False)

    def feed(image):
        return transform(Image.fromarray(image))[None]

    return _compare(classifier, source, feed, {size, int(size / data["crop_pct"])})


def save_timm(name: str, folder: Path, num_classes: int = CLASSES, **options) -> nn.Module:
    """Save a timm model of random weights as timm does, and return it."""
    torch.manual_seed(0)
    model = train_a_little(timm.create_model(name, num_classes=num_classes, **options))
    folder.mkdir(exist_ok=True)
    save_config_for_hf(model, str(folder / "config.json"), model_args=options or None)
    weights = {key: value.clone() for key, value in model.state_dict().items()}  # CoaT shares some
    save_file(weights, folder / "model.safetensors")
    return model


def transformers_agreement(family: str, name: str, folder: Path) -> Agreement:
    """Save a transformers checkpoint with an image processor, load it with `FeatureClassifier` and compare the two."""
    save_transformers(family, name, folder)
    classifier = load_feature_classifier(str(folder))
    source = getattr(transformers, name).from_pretrained(folder).eval()
    processor = AutoImageProcessor.from_pretrained(folder)
    size = classifier.config.image_size

    def feed(image):
        return processor([Image.fromarray(image)], return_tensors="pt")["pixel_values"]

    def call(pixels):
        output = source(pixel_values=pixels)
        return output.logits if "logits" in output else output.last_hidden_state  # PP-LCNet

    crops = {getattr(processor, "crop_pct", None) or 1, 224 / 256, _TIMM_DATA["crop_pct"]}
    given = [dict(getattr(processor, key, None) or {}) for key in ("size", "crop_size")]
    sides = {side for each in given for side in each.values() if side} | {int(size / share) for share in crops}
    return _compare(classifier, call, feed, {size, *sides})


def save_transformers(family: str, name: str, folder: Path, processor: dict | None = None, **options) -> None:
    """Save a network of random weights and its family's image processor as transformers does.

    Args:
        processor: options of the image processor.
        options: of the network's config.
    """
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family]
    known = config().to_dict()
    few = {key: value for key, value in _FEW_LAYERS.items() if key in known}
    if len(known.get("depths", [])) != 4:
        few.pop("depths", None)
    options = {"num_labels": CLASSES, **few, **_NETWORKS.get(family, {}), **options}
    network = getattr(transformers, name)(config(**options))
    train_a_little(network).save_pretrained(folder)
    own = (IMAGE_PROCESSOR_MAPPING_NAMES.get(family) or {}).get("torchvision")
    kind, defaults = _PROCESSORS.get(family, (own, {}))
    if kind is not None:  # a wrapper of timm keeps it in the config
        getattr(transformers, kind)(**(defaults if processor is None else processor)).save_pretrained(folder)


def train_a_little(network: nn.Module) -> nn.Module:
    """Give batch norm and the last layers values as after training, and return the network in eval mode."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in network.modules():
            if getattr(module, "running_mean", None) is not None:
                module.running_mean.copy_(0.2 * torch.randn(module.running_mean.shape, generator=generator))
                module.running_var.copy_(0.8 + 0.4 * torch.rand(module.running_var.shape, generator=generator))
        for module in network.modules():
            outputs = getattr(module, "out_features", getattr(module, "out_channels", None))
            if outputs == CLASSES:
                module.weight.copy_(0.1 * torch.randn(module.weight.shape, generator=generator))
    return network.eval()


def _compare(classifier: FeatureClassifier, source: Callable, feed: Callable, sides: set[int]) -> Agreement:
    size = classifier.config.image_size
    side, start = _find_crop(classifier, feed, sides)
    noise, smooth = _noise(side), _smooth(2 * side)
    pixels = feed(noise)
    with torch.no_grad():
        expected, output = source(pixels), classifier(_middle(noise, start, size))
        product = _product(classifier, output.features)
    largest = expected.abs().max()
    assert expected.std() > 1e-4 * largest, "the logits tell nothing"
    level = 2 / 255 * classifier.input_scale.mean()
    resized = classifier._prepare(_middle(smooth, 2 * start, 2 * size)) - feed(smooth)
    return Agreement(
        size=size,
        crop=side,
        pixels=(classifier._prepare(_middle(noise, start, size)) - pixels).abs().max().item(),
        resized=(resized.abs().mean() / level).item(),
        logits=((output.logits - expected).abs().max() / largest).item(),
        features=((product - expected).abs().max() / largest).item(),
        length=output.features.shape[1],
    )


def _find_crop(classifier: FeatureClassifier, feed: Callable, sides: set[int]) -> tuple[int, int]:
    """The size of an image that the library's own preparation only crops, and where its crop starts."""
    size, distances = classifier.config.image_size, {}
    for side in sides:
        for start in {(side - size) // 2, (side - size + 1) // 2} if side >= size else ():
            ours = classifier._prepare(_middle(_noise(side), start, size))
            distances[side, start] = (ours - feed(_noise(side))).abs().max().item()
    return min(distances, key=distances.get)


def _product(classifier: FeatureClassifier, features: torch.Tensor) -> torch.Tensor:
    """The mean of what the last layers make of their parts of the features."""
    layers = last_layers(classifier.network, CLASSES)
    parts = features.split([layer.weight.shape[1] for layer in layers], dim=1)
    products = [F.linear(part, layer.weight.flatten(1), layer.bias) for part, layer in zip(parts, layers, strict=True)]
    return sum(products) / len(products)


def _middle(image: np.ndarray, start: int, size: int) -> torch.Tensor:
    """Part of an image (H, W, 3) as images (1, 3, size, size) in [-1, 1]."""
    part = image[start : start + size, start : start + size]
    return torch.from_numpy(part.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1


def _noise(side: int) -> np.ndarray:
    return np.random.RandomState(0).randint(0, 256, (side, side, 3), dtype=np.uint8)


def _smooth(side: int) -> np.ndarray:
    coarse = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    smooth = F.interpolate(coarse, (side, side), mode="bicubic", align_corners=False).clamp(0, 1)
    return (255 * smooth[0]).round().byte().permute(1, 2, 0).numpy()

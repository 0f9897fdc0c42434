"""Few-step pixel diffusion models by classifier-based feature distillation (CFD, RCFD), for Hugging Face Diffusers.

The public names are loaded when first used: importing the package imports neither torch nor Diffusers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Each public name and the module that defines it.
_MODULE_OF = {
    "CFDDistillationConfig": "cfd_config",
    "CFDDistillationTrainer": "cfd_trainer",
    "ClassifierConfig": "configs",
    "ClassifierTrainer": "classifier_trainer",
    "DataConfig": "configs",
    "DiffusionConfig": "configs",
    "DiffusionTrainer": "diffusion_trainer",
    "EvaluationResult": "evaluation",
    "Evaluator": "evaluation",
    "FeatureClassifier": "feature_classifier",
    "ImageData": "image_data",
    "RCFDPipeline": "pipeline_rcfd",
    "RCFDScheduler": "scheduling_rcfd",
    "SFDDistillationConfig": "sfd_config",
    "SFDDistillationTrainer": "sfd_trainer",
    "UNET_PRESETS": "unet_presets",
    "build_unet": "unet_presets",
    "load_feature_classifier": "feature_classifier",
    "load_image_data": "image_data",
    "to_onnx_runtime": "onnx_runtime",
}

__all__ = list(_MODULE_OF)

if TYPE_CHECKING:
    from diffusers_rcfd.cfd_config import CFDDistillationConfig as CFDDistillationConfig
    from diffusers_rcfd.cfd_trainer import CFDDistillationTrainer as CFDDistillationTrainer
    from diffusers_rcfd.classifier_trainer import ClassifierTrainer as ClassifierTrainer
    from diffusers_rcfd.configs import ClassifierConfig as ClassifierConfig
    from diffusers_rcfd.configs import DataConfig as DataConfig
    from diffusers_rcfd.configs import DiffusionConfig as DiffusionConfig
    from diffusers_rcfd.diffusion_trainer import DiffusionTrainer as DiffusionTrainer
    from diffusers_rcfd.evaluation import EvaluationResult as EvaluationResult
    from diffusers_rcfd.evaluation import Evaluator as Evaluator
    from diffusers_rcfd.feature_classifier import FeatureClassifier as FeatureClassifier
    from diffusers_rcfd.feature_classifier import load_feature_classifier as load_feature_classifier
    from diffusers_rcfd.image_data import ImageData as ImageData
    from diffusers_rcfd.image_data import load_image_data as load_image_data
    from diffusers_rcfd.onnx_runtime import to_onnx_runtime as to_onnx_runtime
    from diffusers_rcfd.pipeline_rcfd import RCFDPipeline as RCFDPipeline
    from diffusers_rcfd.scheduling_rcfd import RCFDScheduler as RCFDScheduler
    from diffusers_rcfd.sfd_config import SFDDistillationConfig as SFDDistillationConfig
    from diffusers_rcfd.sfd_trainer import SFDDistillationTrainer as SFDDistillationTrainer
    from diffusers_rcfd.unet_presets import UNET_PRESETS as UNET_PRESETS
    from diffusers_rcfd.unet_presets import build_unet as build_unet


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value  # found without this function from now on
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE_OF})

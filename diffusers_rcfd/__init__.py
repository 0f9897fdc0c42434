"""Few-step pixel diffusion models by classifier-based feature distillation (CFD, RCFD), for Hugging Face Diffusers.

The public names are loaded when first used: importing the package imports neither torch nor Diffusers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0.dev0"

# Each public name and the module that defines it.
_MODULE_OF = {
    "AdoptionConfig": "trainers.adoption_config",
    "AdoptionTrainer": "trainers.adoption",
    "CFDDistillationConfig": "trainers.ladder_config",
    "CFDDistillationTrainer": "trainers.ladder",
    "ClassifierConfig": "trainers.config",
    "ClassifierTrainer": "trainers.classifier",
    "DataConfig": "data.config",
    "DiffusionConfig": "trainers.config",
    "DiffusionTrainer": "trainers.diffusion",
    "EvaluationResult": "evaluation.evaluator",
    "Evaluator": "evaluation.evaluator",
    "FeatureClassifier": "models.feature_classifier",
    "ImageData": "data.image_data",
    "RCFDPipeline": "pipelines.pipeline_rcfd",
    "RCFDScheduler": "schedulers.scheduling_rcfd",
    "SFDDistillationConfig": "trainers.sfd_config",
    "SFDDistillationTrainer": "trainers.sfd",
    "UNET_PRESETS": "models.unet_presets",
    "adopt": "pipelines.adoption",
    "build_unet": "models.unet_presets",
    "convert_edm": "models.edm_checkpoints",
    "load_feature_classifier": "models.feature_classifier",
    "load_image_data": "data.image_data",
    "to_onnx_runtime": "pipelines.onnx_runtime",
}

__all__ = list(_MODULE_OF)

if TYPE_CHECKING:
    from diffusers_rcfd.data.config import DataConfig as DataConfig
    from diffusers_rcfd.data.image_data import ImageData as ImageData
    from diffusers_rcfd.data.image_data import load_image_data as load_image_data
    from diffusers_rcfd.evaluation.evaluator import EvaluationResult as EvaluationResult
    from diffusers_rcfd.evaluation.evaluator import Evaluator as Evaluator
    from diffusers_rcfd.models.edm_checkpoints import convert_edm as convert_edm
    from diffusers_rcfd.models.feature_classifier import FeatureClassifier as FeatureClassifier
    from diffusers_rcfd.models.feature_classifier import load_feature_classifier as load_feature_classifier
    from diffusers_rcfd.models.unet_presets import UNET_PRESETS as UNET_PRESETS
    from diffusers_rcfd.models.unet_presets import build_unet as build_unet
    from diffusers_rcfd.pipelines.adoption import adopt as adopt
    from diffusers_rcfd.pipelines.onnx_runtime import to_onnx_runtime as to_onnx_runtime
    from diffusers_rcfd.pipelines.pipeline_rcfd import RCFDPipeline as RCFDPipeline
    from diffusers_rcfd.schedulers.scheduling_rcfd import RCFDScheduler as RCFDScheduler
    from diffusers_rcfd.trainers.adoption import AdoptionTrainer as AdoptionTrainer
    from diffusers_rcfd.trainers.adoption_config import AdoptionConfig as AdoptionConfig
    from diffusers_rcfd.trainers.classifier import ClassifierTrainer as ClassifierTrainer
    from diffusers_rcfd.trainers.config import ClassifierConfig as ClassifierConfig
    from diffusers_rcfd.trainers.config import DiffusionConfig as DiffusionConfig
    from diffusers_rcfd.trainers.diffusion import DiffusionTrainer as DiffusionTrainer
    from diffusers_rcfd.trainers.ladder import CFDDistillationTrainer as CFDDistillationTrainer
    from diffusers_rcfd.trainers.ladder_config import CFDDistillationConfig as CFDDistillationConfig
    from diffusers_rcfd.trainers.sfd import SFDDistillationTrainer as SFDDistillationTrainer
    from diffusers_rcfd.trainers.sfd_config import SFDDistillationConfig as SFDDistillationConfig


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value  # found without this function from now on
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE_OF})

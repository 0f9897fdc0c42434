"""The options of adopting a teacher, checked where they enter. Free of torch."""

from dataclasses import dataclass

from diffusers_rcfd.trainers.config import LR_SCHEDULERS, DistillationConfig
from diffusers_rcfd.validation import document_options, option, require

PARAMETRISATIONS = ("v_prediction", "sample")


@document_options
@dataclass
class AdoptionConfig(DistillationConfig):
    """Training of a copy of a teacher that predicts v in place of eps."""

    prediction_type: str = option("v_prediction", f"What the adopted network predicts: one of {PARAMETRISATIONS}.")
    max_train_steps: int = option(10_000, "Optimizer steps.")
    learning_rate: float = option(1e-4, "Peak learning rate.")
    lr_scheduler: str = option("cosine", f"Learning-rate schedule of Diffusers: one of {LR_SCHEDULERS}.")
    ema_decay: float = option(
        0.999, "Decay of the moving average of the weights, which is what is saved; 0 keeps none."
    )
    sample_inference_steps: int = option(64, "DDIM steps of the sample grids.")

    def __post_init__(self):
        super().__post_init__()
        known = self.prediction_type in PARAMETRISATIONS
        require(known, "prediction_type", self.prediction_type, f"one of {PARAMETRISATIONS}")

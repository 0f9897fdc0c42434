"""The distillation losses as pure functions of tensors: no model and no scheduler in sight.

Notation is that of the papers, e.g. `temperature` is tau of Eq. 4.
"""

from diffusers_rcfd.losses.features import dual_temperature_kl as dual_temperature_kl
from diffusers_rcfd.losses.features import feature_kl as feature_kl
from diffusers_rcfd.losses.features import spatial_kl as spatial_kl
from diffusers_rcfd.losses.features import spatial_l1 as spatial_l1
from diffusers_rcfd.losses.images import l1 as l1
from diffusers_rcfd.losses.images import to_float32 as to_float32
from diffusers_rcfd.losses.images import x0_loss as x0_loss
from diffusers_rcfd.losses.images import x0_weight as x0_weight
from diffusers_rcfd.losses.predictions import diversity as diversity
from diffusers_rcfd.losses.predictions import entropy as entropy
from diffusers_rcfd.losses.predictions import log_mean_prediction as log_mean_prediction

"""What a student predicts at one noise level, and what it should predict there."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from diffusers_rcfd.schedulers.trajectories import euler_step


@dataclass
class Step:
    """The step of a sampler that a pair belongs to: from x = z / alpha at noise level s to level s_next."""

    x: torch.Tensor
    s: float
    s_next: float


@dataclass
class Pair:
    """A student's denoised image at one noise level, and the image it should be there.

    A source of pairs is a generator that yields one pair for each optimizer step. What lies after the `yield` runs
    once the step is taken, so that a source can go on from `x0`.

    Args:
        predict (`Callable`): () -> x0 (B, C, H, W), the student's prediction, differentiable in its weights.
        x0_target (`torch.Tensor`): the image to match, (B, C, H, W), without gradient.
        alpha, sigma (`torch.Tensor`): of the noise level, (B, 1, 1, 1) or (1, 1, 1, 1).
        step (`Step`, *optional*): where the states are compared that x0 leads to, and not x0 itself.
        is_last (`bool`, defaults to `True`): whether the sampler ends after this step.
        whole_batch (`dict[str, Any]`): of terms that look at a whole batch, what `Term.of_whole_batch` found in the
            larger batch that this pair is a part of.
    """

    predict: Callable[[], torch.Tensor]
    x0_target: torch.Tensor
    alpha: torch.Tensor
    sigma: torch.Tensor
    step: Step | None = None
    is_last: bool = True
    whole_batch: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def x0(self) -> torch.Tensor:
        """The student's prediction (B, C, H, W), computed once."""
        return self.predict()

    def landing(self, x0: torch.Tensor) -> torch.Tensor:
        """Where the sampler's step by a denoised image x0 ends, (B, C, H, W); x0 itself where there is no step.

        The states of student and teacher differ by (1 - s'/s) times the difference of their denoised images.
        """
        return x0 if self.step is None else euler_step(self.step.x, x0, self.step.s, self.step.s_next)

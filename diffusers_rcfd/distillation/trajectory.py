"""The pairs of Simple and Fast Distillation (SFD; Zhou et al. 2024, arXiv 2409.19681): Algorithm 1."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch

from diffusers_rcfd.distillation.pairs import Pair, Step
from diffusers_rcfd.models.denoiser import Denoiser
from diffusers_rcfd.schedulers.trajectories import analytical_first_step, network_calls, one_step_target, solve


@dataclass(frozen=True)
class Route:
    """The nodes of one step count, and how the teacher gets down them.

    Args:
        student (`list[int]`): falling indices of the schedule that the student stands at.
        teacher (`list[int]`): the teacher's, which contain them.
        solver (`str`), order (`int`), thresholding (`bool`), analytical_first (`bool`): the teacher's, see `solve`.
        student_analytical_first (`bool`): the student's first step is taken without its network (AFS).
    """

    student: list[int]
    teacher: list[int]
    solver: str = "dpm-solver++"
    order: int = 3
    thresholding: bool = True
    analytical_first: bool = False
    student_analytical_first: bool = False

    @property
    def num_inference_steps(self) -> int:
        """Network evaluations of the student."""
        return len(self.student) - 1 - self.student_analytical_first

    @property
    def teacher_evaluations(self) -> int:
        """Network evaluations of the teacher."""
        return network_calls(self.teacher, self.solver) - self.analytical_first


@torch.no_grad()
def teacher_states(
    teacher: Denoiser, route: Route, x: torch.Tensor, labels: torch.Tensor | None = None
) -> list[torch.Tensor]:
    """The teacher's states at the student's nodes after the first, (B, C, H, W) each, from x at the first."""
    states = solve(
        lambda x, i: teacher.at_index(x, route.teacher[i], labels),
        x,
        teacher.scheduler.nu[route.teacher].tolist(),
        route.solver,
        route.order,
        route.thresholding,
        route.analytical_first,
        teacher.scheduler.config.data_std,
    )
    return [state for k, state in zip(route.teacher, states, strict=True) if k in route.student[1:]]


def trajectory_pairs(
    student: Denoiser, teacher: Denoiser, route: Route, batch: dict[str, torch.Tensor]
) -> Iterator[Pair]:
    """A pair for each node that the student evaluates, along its own trajectory (Algorithm 1).

    The student moves on by the weights that a loss was taken with, those before the optimizer step.

    Args:
        student, teacher (`Denoiser`): on the same schedule.
        route (`Route`): the nodes.
        batch (`dict`): "noise" (B, C, H, W), "labels" (B,) for a class-conditional teacher.
    """
    scheduler, labels, first, last = student.scheduler, batch.get("labels"), route.student[0], route.student[-1]
    x = batch["noise"] / scheduler.alpha[first].item()
    targets = teacher_states(teacher, route, x, labels)
    for (k, k_next), target in zip(pairwise(route.student), targets, strict=True):
        s, s_next = scheduler.nu[[k, k_next]].tolist()
        if k == first and route.student_analytical_first:
            x = analytical_first_step(x, s, s_next, scheduler.config.data_std)
            continue
        pair = Pair(
            partial(student.at_index, x, k, labels),
            one_step_target(x, target, s, s_next),
            *scheduler.alpha_sigma(torch.tensor([k]), x),
            step=Step(x, s, s_next),
            is_last=k_next == last,
        )
        yield pair
        x = pair.landing(pair.x0).detach()

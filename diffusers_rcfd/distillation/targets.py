"""What a student is to match: the teacher's DDIM steps, folded into one x0. The only code that calls a teacher."""

from collections.abc import Callable

import torch

from diffusers_rcfd.schedulers.scheduling_rcfd import RCFDScheduler


@torch.no_grad()
def ddim_target(
    denoise: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    scheduler: RCFDScheduler,
    z_t: torch.Tensor,
    k: torch.Tensor,
    student_steps: int,
    teacher_steps: int = 2,
) -> torch.Tensor:
    """The x0 that takes an N-step student in one DDIM step where its teacher gets in K (appendix B, Eq. 9 to 12).

    The teacher walks unclipped from z_t at step k of the student's grid to step k - 1, along the K N-step grid; the
    straight DDIM step with the same ends is then solved for x0. z_t cancels from that solution, which leaves a
    weighted mean of the teacher's predictions on the way; Eq. 12 taken literally subtracts nearly equal images.
    (The paper's Eq. 10 misprints z_t for z_t': the second step starts at z_t'.)

    Args:
        denoise (`Callable`): the teacher as (z_t, t) -> unclipped x0, with z_t (B, C, H, W) and t (B,).
        scheduler (`RCFDScheduler`): the schedule and grid that teacher and student share.
        z_t (`torch.Tensor`): noisy images (B, C, H, W).
        k (`torch.Tensor`): step of the student's grid that each image stands at, integers 1..N, (B,).
        student_steps (`int`): N.
        teacher_steps (`int`, defaults to 2): K, teacher steps for each student step; 2 is the paper's.

    Returns:
        `torch.Tensor`: x0_target (B, C, H, W), float32 or wider.
    """
    t, steps = scheduler.step_table(student_steps * teacher_steps, like=z_t)
    z, x0_sum, weight_sum = z_t, 0, 0
    for position in range(teacher_steps):
        p = k * teacher_steps - position
        a, b = steps[p].view(-1, 2, 1, 1, 1).unbind(1)  # each (B, 1, 1, 1)
        x0 = denoise(z, t[p])
        z = a * x0 + b * z
        x0_sum = a * x0 + b * x0_sum
        weight_sum = a + b * weight_sum
    return x0_sum / weight_sum
